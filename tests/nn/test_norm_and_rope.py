"""RMSNorm and the rotations against goldens and float64 oracles."""

import pytest
import torch

from zimage_core.errors import BadShape
from zimage_core.nn.layers import RMSNorm, for_halves, rotate_half, rotation


def test_rotation_has_the_golden_values_of_position_33_5_7():
    cos, sin = rotation(torch.tensor([[33, 5, 7]]), (32, 48, 48), 256.0)
    golden = {0: (-0.01328, 0.99991), 1: (-0.22547, -0.97425), 16: (0.28366, -0.95892),
              40: (0.75390, 0.65699), 63: (0.99941, 0.03444)}  # fmt: skip
    for pair, (c, s) in golden.items():
        assert cos[0, pair].item() == pytest.approx(c, abs=1e-5)  # goldens have five digits
        assert sin[0, pair].item() == pytest.approx(s, abs=1e-5)


def test_rotate_half_turns_each_pair_by_its_angle():
    x = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(0))
    turn = rotation(torch.arange(7)[:, None], (8,), 100.0)
    pairs = x.unflatten(-1, (2, 4)).transpose(-1, -2)
    angle = torch.arange(7)[:, None].double() * 100.0 ** -(torch.arange(4) * 2 / 8).double()
    turned = (
        torch.view_as_complex(pairs.double().contiguous())
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    want = torch.view_as_real(turned).transpose(-1, -2).flatten(-2)
    # float32 cosines of angles to 7
    torch.testing.assert_close(rotate_half(x, for_halves(turn)).double(), want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_is_the_formula(dtype):
    norm = RMSNorm(63, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.3)
    x = torch.randn(5, 63, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    # two roundings to dtype, each half a unit in the last place
    assert ((norm(x).double() - want).abs() <= want.abs() * torch.finfo(dtype).eps * 1.5 + 1e-7).all()


def test_rms_norm_refuses_another_width():
    with pytest.raises(BadShape, match="rows of 4, the weight has 8"):
        RMSNorm(8, 1e-5)(torch.zeros(2, 4))

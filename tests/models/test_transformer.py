"""S3-DiT alone: golden sinusoid, float16 that survives activations of 1e6, refusals of what does not fit."""

import pytest
import torch

from zimage_core.config import TransformerConfig
from zimage_core.errors import BadShape
from zimage_core.models.timestep import timestep_sinusoid
from zimage_core.models.transformer import FP16_FFN_SCALE, ZImageTransformer
from zimage_core.nn.elementwise import gate_norm_residual

TINY = TransformerConfig(
    dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=20, hidden_dim=170, axes_dims=(8, 12, 12),
    axes_lens=(256, 64, 64),
)  # fmt: skip


def tiny(std=0.08):
    torch.manual_seed(0)
    model = ZImageTransformer(TINY)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, std)
    return model.eval()


def inputs():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(16, 1, 8, 12, generator=g)], torch.tensor([0.3]), [torch.randn(9, 20, generator=g)]


def test_timestep_sinusoid_has_the_golden_values_of_500():
    s = timestep_sinusoid(torch.tensor([500.0]))[0]
    want = torch.tensor([-0.88385, 0.94595, 0.84851])
    torch.testing.assert_close(s[:3], want, atol=1e-4, rtol=0)  # goldens have five digits
    torch.testing.assert_close(s[128:131], torch.tensor([-0.46777, 0.32432, -0.52918]), atol=1e-4, rtol=0)


@torch.no_grad()
def loud():
    """A model whose values, products and branch outputs reach 1e6 although the residual stays near 1."""
    model = tiny()
    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        block.attention.to_v.weight *= 10000
        block.attention.to_out[0].weight *= 100
        block.feed_forward.w1.weight *= 30
        block.feed_forward.w3.weight *= 200
        block.feed_forward.w2.weight *= 100
    return model


@torch.no_grad()
def peaks(model):
    seen = {"to_out": 0.0, "w2": 0.0}
    for name, module in model.named_modules():
        for key in seen:
            if name.endswith((key, key + ".0")) and not isinstance(module, torch.nn.ModuleList):
                module.register_forward_hook(
                    lambda _m, _i, out, key=key: seen.update({key: max(seen[key], float(out.abs().max()))})
                )
    out = model(*inputs())[0]
    return seen, out


def test_float16_with_activations_of_1e6_differs_from_float32_by_rounding_only():
    seen, want = peaks(loud())
    assert min(seen.values()) > 1e6  # far over 65504: the test would mean nothing otherwise
    half = loud().half()
    got = half(*inputs())[0]
    assert torch.isfinite(got).all()
    quiet = (tiny().half()(*inputs())[0].float() - tiny()(*inputs())[0]).abs().max()
    # as far from float32 as an ordinary model is in float16, times 4 for the larger condition number
    assert (got.float() - want).abs().max() <= 4 * quiet


@torch.no_grad()
def test_a_caption_beyond_float16_is_normed_before_it_is_cast():
    x, t, caption = inputs()
    loud_caption = [caption[0] * 1e6]
    got = tiny().half()(x, t, loud_caption)[0]
    assert torch.isfinite(got).all()
    # the norm takes the factor away again but for its eps
    assert (got.float() - tiny()(x, t, loud_caption)[0]).abs().max() < 0.01


def test_without_the_scales_float16_overflows(monkeypatch):
    monkeypatch.setattr("zimage_core.models.transformer.FP16_ATTENTION_SCALE", 1.0)
    monkeypatch.setattr("zimage_core.models.transformer.FP16_FFN_SCALE", 1.0)
    with torch.no_grad():
        assert not torch.isfinite(loud().half()(*inputs())[0]).all()


@torch.no_grad()
def test_a_power_of_two_taken_out_of_a_branch_changes_no_bit_in_float32():
    block = tiny().layers[0]
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    norm = block.ffn_norm2
    joined = [
        gate_norm_residual(x, block.feed_forward(x, scale), norm.weight, norm.eps, None, scale)
        for scale in (1.0, FP16_FFN_SCALE)
    ]
    assert torch.equal(*joined)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, t, c: ([x[0][0]], t, c), "wanted \\[16, 1, h, w\\]"),
        (lambda x, t, c: ([x[0][..., :11]], t, c), "multiples of 2"),
        (lambda x, t, c: (x, t, [c[0][:, :19]]), "text encoder that belongs"),
        (lambda x, t, c: (x, t, [c[0][None]]), "wanted \\[L, 20\\]"),
        (lambda x, t, c: (x * 2, t, c), "2 latents, 1 times and 1 captions"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_one_sentence(change, words):
    with pytest.raises(BadShape, match=words):
        tiny()(*change(*inputs()))

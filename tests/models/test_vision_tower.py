"""The vision tower alone: one layer of full width, half precision, packed weights, streaming."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from tests.helpers.model_files import write_gguf
from tests.helpers.parity import apart
from tests.helpers.streamed import at_home, ringed, streamed
from tests.helpers.vision import CONFIG, mmproj_content, mmproj_keys, our_tower, their_tower
from zimage_core.config import VisionConfig
from zimage_core.errors import BadArgument, BadShape
from zimage_core.models.vision_tower import VisionTower
from zimage_core.nn.compute import set_compute
from zimage_core.weights.load import load_siglip

WIDER = replace(CONFIG, hidden_size=256, intermediate_size=512)
"""Whole blocks of the K types in each row."""


def patches(grid, config=CONFIG, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(grid[0] * grid[1], config.patch_dim, generator=generator)


@pytest.mark.parity
@torch.no_grad()
def test_a_layer_of_full_width_is_transformers():
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    model = their_tower(num_hidden_layers=1, num_patches=256, patch_size=16, **sizes)
    tower, grid = our_tower(model), (5, 9)
    assert tower.config == replace(VisionConfig(), num_layers=1)
    x = patches(grid, tower.config)
    want = model(x[None], torch.ones(1, len(x), dtype=torch.int32), torch.tensor([grid])).last_hidden_state[0]
    assert apart(tower(x, grid), want) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_half_precision_is_near(dtype, bits):
    tower = our_tower(their_tower())
    x, grid = patches((5, 7)), (5, 7)
    want = tower(x, grid)
    got = tower.to(dtype)(x, grid)
    assert got.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert (got.float() - want).abs().mean() <= 2 ** (2 - bits) * want.abs().mean()


@torch.no_grad()
def test_float16_keeps_a_residual_beyond_its_range():
    tower = our_tower(their_tower())
    for layer in tower.layers:
        layer.mlp.fc2.bias[3] += 4e4
    x, grid = patches((3, 3)), (3, 3)
    want = tower(x, grid)
    got = tower.half()(x, grid)
    assert torch.isfinite(got).all()
    assert apart(got, want) <= 2**-7 * want.abs().max()


@pytest.mark.parametrize("wrong", [((2, 3), (7, 48)), ((2, 3), (6, 47)), ((0, 3), (0, 48))], ids=str)
def test_patches_that_do_not_fit_are_refused(wrong):
    grid, shape = wrong
    with pytest.raises(BadShape, match="vision tower: got patches"):
        VisionTower(CONFIG)(torch.zeros(shape), grid)


@pytest.mark.parametrize("change", [{"num_heads": 5}, {"num_patches": 60}, {"hidden_size": 0}], ids=str)
def test_a_config_that_cannot_be_is_refused(change):
    with pytest.raises(BadArgument, match="vision config"):
        replace(CONFIG, **change)


@torch.no_grad()
@pytest.mark.parametrize("matrix", ["Q8_0", "Q4_K"])
def test_packed_weights_give_what_their_dense_numbers_give(tmp_path, matrix):
    path = write_gguf(tmp_path / "mmproj.gguf", mmproj_content(matrix, config=WIDER), mmproj_keys(WIDER))
    tower, dense = load_siglip(path), load_siglip(path)
    packed = [name for name, layer in dense.named_modules() if hasattr(layer, "dequantize_weight")]
    for name in packed:
        dense.get_submodule(name).dequantize_weight(torch.float32)
    assert tower.layers[0].mlp.fc1.weight.format.name == matrix
    x, grid = patches((6, 10), WIDER), (6, 10)
    assert apart(tower(x, grid), dense(x, grid)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("resident", [(), (1,)], ids=str)
def test_streamed_is_resident_to_the_bit(tmp_path, resident):
    path = write_gguf(tmp_path / "mmproj.gguf", mmproj_content("Q4_K", config=WIDER), mmproj_keys(WIDER))
    tower = load_siglip(path)
    x, grid = patches((4, 4), WIDER), (4, 4)
    want = tower(x, grid)
    with closing(streamed(tower, resident, **ringed(slots=2))) as stream:
        assert stream.streamed == tuple(i for i in range(3) if i not in resident)
        for _ in range(2):
            assert torch.equal(tower(x, grid), want)
    assert at_home(tower)


@torch.no_grad()
@pytest.mark.parametrize(("mode", "most"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_other_modes_of_computing_are_near(tmp_path, mode, most):
    path = write_gguf(tmp_path / "mmproj.gguf", mmproj_content("Q8_0", config=WIDER), mmproj_keys(WIDER))
    tower = load_siglip(path)
    x, grid = patches((6, 6), WIDER), (6, 6)
    want = tower(x, grid)
    assert set_compute(tower, mode, torch.device("cpu")) == mode
    assert tower.layers[0].mlp.fc2.arithmetic.mode == mode
    got = tower(x, grid)
    assert not torch.equal(got, want)
    assert (got - want).norm() <= most * want.norm()

"""The values that the steps of a run share are computed once, and equal those of single steps."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.parity import WIDE, apart, in_float64
from zimage_core.sampling.euler import network_time


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(16, 6, 4, generator=g)
    return latent, torch.randn(9, 24, generator=g)


def alone(model, latent, time, caption):
    return model([latent.unsqueeze(1)], torch.tensor([time]), [caption])[0].squeeze(1)


def count_calls(module, counts, name):
    return module.register_forward_hook(lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1))


@torch.no_grad()
def test_every_step_gives_what_it_gives_alone(model):
    latent, caption = (x.double() for x in inputs())
    wide = copy.deepcopy(model).double()
    times = [float(network_time(s)) for s in (1.0, 0.9, 0.5, 0.1)]
    with in_float64():
        prepared = wide.prepare([caption], times, (6, 4))
        for i, time in enumerate(times):
            # four rows or one: sums in another order
            assert apart(wide.step(latent, prepared, i), alone(wide, latent, time, caption)) <= WIDE


@torch.no_grad()
def test_one_time_is_the_same_to_the_bit(model):
    latent, caption = inputs()
    prepared = model.prepare([caption], [0.3], (6, 4))
    assert torch.equal(model.step(latent, prepared, 0), alone(model, latent, 0.3, caption))


@torch.no_grad()
def test_captions_and_norms_run_once_a_run(model):
    latent, caption = inputs()
    counts: dict[str, int] = {}
    places = {
        "refiner": model.context_refiner[0],
        "norms": model.layers[0].adaLN_modulation[0],
        "time": model.t_embedder.mlp[0],
        "block": model.layers[0],
    }
    handles = [count_calls(module, counts, name) for name, module in places.items()]
    try:
        prepared = model.prepare([caption, caption], [0.25, 0.5, 0.75], (6, 4))
        for i in range(3):
            for k in range(2):
                model.step(latent, prepared, i, k)
    finally:
        for handle in handles:
            handle.remove()
    assert counts == {"refiner": 1, "norms": 1, "time": 1, "block": 6}


@torch.no_grad()
def test_each_caption_has_its_own_tokens_and_rotation(model):
    latent, short = inputs()
    long = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    prepared = model.prepare([short, long, short], [0.5], (6, 4))
    assert [len(text) for text in prepared.texts] == [32, 64, 32]
    for k, caption in enumerate((short, long, short)):
        assert torch.equal(model.step(latent, prepared, 0, k), alone(model, latent, 0.5, caption))


@torch.no_grad()
def test_gates_keep_the_float32_of_their_tanh(model):
    """One gate for a run, and for a block called with temb, that no dtype of the model rounds."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    block, temb = half.layers[0], torch.randn(3, model.config.adaln_dim, dtype=torch.bfloat16)
    raw = block.adaLN_modulation(temb).double().chunk(4, -1)
    found = block.modulation(temb)
    assert found.dtype == torch.float32
    assert half.modulate(torch.rand(3))[0].dtype == torch.float32
    for part, (given, exact) in enumerate(zip(found.double().chunk(4, -1), raw, strict=True)):
        wanted = exact.tanh() if part % 2 else exact
        assert (given - wanted).abs().max() <= 2.0**-23 * wanted.abs().max()
    x, rope = torch.randn(3, 5, model.config.dim), model.rotation(torch.zeros(5, 3, dtype=torch.int64))
    x = x.to(torch.bfloat16)
    assert torch.equal(block(x, rope, temb), block(x, rope, modulation=found))

"""What a run's steps have in common is computed once, and is what each step would compute alone."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import tiny
from zimage_core.models.conditioning import Conditioning
from zimage_core.sampling.euler import network_time


@pytest.fixture(scope="module")
def model():
    return tiny.transformer()


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    latent = torch.randn(16, 1, 6, 4, generator=g)
    return latent, torch.randn(9, 24, generator=g)


def count_calls(module, counts, name):
    return module.register_forward_hook(lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1))


@torch.no_grad()
def test_every_step_gives_what_it_gives_alone(model):
    latent, caption = inputs()
    times = [float(network_time(s)) for s in (1.0, 0.9, 0.5, 0.1)]
    known = Conditioning(model, times)
    for time in times:
        together = model([latent], torch.tensor([time]), [caption], known)[0]
        alone = model([latent], torch.tensor([time]), [caption])[0]
        # four rows or one: sums of 256 products in another order, 2^-24 * 256 of values about 1
        torch.testing.assert_close(together, alone, rtol=0, atol=5e-5)


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
        known = Conditioning(model, [0.25, 0.5, 0.75])
        for time in (0.25, 0.5, 0.75):
            model([latent, latent], torch.tensor([time, time]), [caption, caption], known)
    finally:
        for handle in handles:
            handle.remove()
    assert counts == {"refiner": 1, "norms": 1, "time": 1, "block": 6}


@torch.no_grad()
def test_a_time_outside_the_schedule_is_computed_when_it_comes(model):
    latent, caption = inputs()
    known = Conditioning(model, [0.25])
    got = model([latent], torch.tensor([0.3]), [caption], known)[0]
    assert torch.equal(got, model([latent], torch.tensor([0.3]), [caption])[0])


@torch.no_grad()
def test_a_caption_changed_in_place_is_read_again(model):
    latent, caption = inputs()
    known = Conditioning(model)
    first = model([latent], torch.tensor([0.5]), [caption], known)[0]
    caption.mul_(2)
    second = model([latent], torch.tensor([0.5]), [caption], known)[0]
    assert not torch.equal(first, second)
    assert torch.equal(second, model([latent], torch.tensor([0.5]), [caption])[0])


@torch.no_grad()
def test_captions_of_dropped_tensors_are_never_mixed_up(model):
    """Memory of a dropped tensor may be given to the next one; the key must not be."""
    latent, _ = inputs()
    known = Conditioning(model)
    for seed in range(20):
        caption = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
        got = model([latent], torch.tensor([0.5]), [caption], known)[0]
        assert torch.equal(got, model([latent], torch.tensor([0.5]), [caption])[0])
        del caption


def test_captions_of_inference_mode_are_remembered_too(model):
    """Such tensors count no versions."""
    with torch.inference_mode():
        latent, caption = inputs()
        known = Conditioning(model, [0.5])
        a, b = (model([latent], torch.tensor([0.5]), [caption], known)[0] for _ in range(2))
    assert torch.equal(a, b)

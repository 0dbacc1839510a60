"""Predictions with control against diffusers' ZImageControlNetModel and ZImageTransformer2DModel."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import controls
from tests.helpers.parity import WIDE, apart, in_float64
from zimage_core.control.apply import DIFFUSERS, TRAINER, Control, Controls

SIDES = {"15 tokens, 17 pads": (6, 10), "32 tokens, no pads": (8, 16)}


@torch.no_grad()
def both(variant, sides, length, scale, hints):
    base, net = controls.transformer(), controls.controlnet(variant)
    their_net, their_base = controls.theirs(variant, net, base)
    generator = torch.Generator().manual_seed(5)
    dtype = torch.get_default_dtype()
    latent, caption, image = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((16, *sides), (length, controls.BASE["cap_feat_dim"]), (net.config.channels, *sides))
    )
    if dtype == torch.float64:
        for each in (base, net, their_net, their_base):
            each.double()
    prepared = base.prepare([caption], [0.3], sides)
    member = Control(net, image[None], scale, (0, 1), hints)
    after = Controls(base, [member]).after(prepared, 0, 0, 0)
    ours = base.step(latent, prepared, 0, after=after)
    call = ([latent[:, None]], torch.tensor([0.3], dtype=dtype), [caption])
    samples = their_net(*call, [image[:, None]], conditioning_scale=scale)
    theirs = their_base(*call, controlnet_block_samples=samples)[0][0][:, 0]
    plain = base.step(latent, prepared, 0)
    return ours, theirs, plain


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("variant", controls.VARIANTS)
def test_control_is_that_of_diffusers(variant, sides):
    hints = TRAINER if variant == "1.0" else DIFFUSERS
    for length in (5, 70):
        ours, theirs, plain = both(variant, sides, length, 0.75, hints)
        assert apart(ours, theirs) <= 1e-5 * max(1.0, float(theirs.abs().max()))
        assert apart(ours, plain) > 0.01, "the control does nothing, so that the test shows nothing"
        with in_float64():
            wide, theirs, _ = both(variant, sides, length, 0.75, hints)
        assert apart(wide, theirs) <= WIDE


@pytest.mark.parametrize("variant", ["2.0", "2.1", "2.1 lite"])
def test_the_base_model_sees_the_hints_for_its_noise_refiner(variant):
    """diffusers' place for them is another one, and shows in the result."""
    ours, theirs, _ = both(variant, (6, 10), 5, 0.75, TRAINER)
    assert apart(ours, theirs) > 0.01

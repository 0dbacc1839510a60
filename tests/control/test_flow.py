"""Predictions with control against an oracle of the trainer's flow, and what must change nothing."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import controls
from tests.helpers.control_oracle import OracleControl, predict
from tests.helpers.parity import WIDE, apart, in_float64
from zimage_core.control.apply import Control, Controls

SIDES = (6, 10)
"""15 tokens and 17 pads."""


def drawn(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())


def members(*variants, scale=0.7, inpaint=False):
    """A control image for each variant, with a mask and an image to inpaint in the further channels."""
    found = []
    for i, variant in enumerate(variants):
        net = controls.controlnet(variant, seed=7 + i)
        latents = drawn((net.config.channels, *SIDES), 20 + i)
        if net.config.channels == 33:
            latents[16:] = latents[16:] if inpaint else 0
            latents[16] = (latents[16] > 0).to(latents)
        found.append(Control(net, latents[None], scale * (1 + i), (0, 8)))
    return found


def ours(base, found, latent, caption, time=0.3):
    prepared = base.prepare([caption], [time], SIDES)
    return base.step(latent, prepared, 0, after=Controls(base, found).after(prepared, 0, 0, 0))


def oracle(base, found, latent, caption, time=0.3):
    acting = [
        OracleControl(
            m.net.state_dict(), m.net.config.refiner, m.net.config.places_in(6), m.latents[0], m.scale
        )
        for m in found
    ]
    return predict(base.state_dict(), controls.BASE, latent, time, caption, acting)


CASES = {
    **{variant: ((variant,), False) for variant in controls.VARIANTS},
    "inpaint channels": (("2.1",), True),
    "two images of one net": (("2.1", "2.1"), False),
    "two nets": (("1.0", "2.0"), True),
}


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_control_follows_the_trainer(case):
    variants, inpaint = CASES[case]
    with in_float64():
        base, found = controls.transformer().double(), members(*variants, inpaint=inpaint)
        for member in found:
            member.net.double()
        latent, caption = drawn((16, *SIDES), 1), drawn((5, controls.BASE["cap_feat_dim"]), 2)
        assert apart(ours(base, found, latent, caption), oracle(base, found, latent, caption)) <= WIDE


@torch.no_grad()
@pytest.mark.parametrize("variant", controls.VARIANTS)
def test_a_net_with_zero_projections_changes_nothing(variant):
    base, found = controls.transformer(), members(variant)
    for name, p in found[0].net.named_parameters():
        if ".after_proj." in name:
            p.zero_()
    latent, caption = drawn((16, *SIDES), 1), drawn((5, controls.BASE["cap_feat_dim"]), 2)
    plain = base.step(latent, base.prepare([caption], [0.3], SIDES), 0)
    assert torch.equal(ours(base, found, latent, caption), plain)


@torch.no_grad()
def test_hints_are_linear_in_scale_for_the_first_layer_of_version_1():
    """The hints of 1.0 do not depend on the scale, so the joint sequence moves in proportion."""
    base, latent, caption = controls.transformer(), drawn((16, *SIDES), 1), drawn((5, 20), 2)
    prepared = base.prepare([caption], [0.3], SIDES)
    moved = []
    for scale in (0.0, 0.25, 0.5, 1.0):
        found = members("1.0", scale=scale)
        after = Controls(base, found).after(prepared, 0, 0, 0)

        def seen(i, tokens, after=after):
            out = tokens if after is None else after(i, tokens)
            if i == len(base.noise_refiner):  # after layer 0
                moved.append(out - tokens)
            return out

        base.step(latent, prepared, 0, after=seen)
    assert float(moved[0].abs().max()) == 0
    for part, share in zip(moved[1:3], (0.25, 0.5), strict=True):
        assert torch.allclose(part, share * moved[3], rtol=1e-5, atol=1e-6)
    assert float(moved[3][-32:].abs().min(dim=1).values.max()) > 0, "captions get hints as well"


def test_a_control_acts_in_its_steps_alone():
    member = members("1.0")[0]
    for steps in ((0, 0), (2, 5)):
        acting = Control(member.net, member.latents, 1.0, steps)
        assert [i for i in range(8) if acting.acts(i)] == list(range(*steps))
    assert not Control(member.net, member.latents, 0.0, (0, 8)).acts(3)

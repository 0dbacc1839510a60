"""S3-DiT is diffusers' block by block, and each known mistake would be seen.

The limits are derived in tests/helpers/parity.py.
"""

import pytest
import torch

from tests.helpers import parity
from zimage_core.models import block_norms, sequence, timestep, transformer
from zimage_core.nn import layers
from zimage_core.nn.elementwise import rms_norm_modulate

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("case", "sides", "captions"), list(parity.transformer_cases()))
def test_every_block_is_diffusers(case, sides, captions):
    for difference in parity.transformer_differences(sides, captions, case):
        assert difference.passes, difference


@torch.no_grad()
def test_a_batch_is_its_members_bit_for_bit():
    _, ours = parity.transformer_pair()
    x, t, caps = parity.transformer_inputs([(6, 10), (12, 16)], [5, 70])
    both = ours(x, t, caps)
    for i in range(2):
        alone = ours(x[i : i + 1], t[i : i + 1], caps[i : i + 1])[0]
        assert torch.equal(both[i], alone)


def _caption_pads_at_zero(monkeypatch):
    def positions(padded):
        ids = rows(padded)
        ids[5:] = 0  # the caption of the control has 5 real tokens
        return ids

    rows = sequence.caption_positions
    monkeypatch.setattr(sequence, "caption_positions", positions)


def _image_time_from_unpadded_caption(monkeypatch):
    original = sequence.image_positions
    monkeypatch.setattr(sequence, "image_positions", lambda r, c, padded: original(r, c, 5))


def _channel_outermost_patch(monkeypatch):
    original = sequence.patchify

    def patchify(latent, patch):
        tokens = original(latent, patch)
        return tokens.unflatten(-1, (patch * patch, -1)).transpose(-1, -2).flatten(-2)

    monkeypatch.setattr(sequence, "patchify", patchify)


def _image_pads_numbered_on(monkeypatch):
    original = sequence.image_positions

    def positions(rows, cols, padded):
        ids = original(rows, cols, padded)
        n = rows * cols
        more = torch.arange(n, len(ids))
        ids[n:] = torch.stack((torch.full_like(more, padded + 1), more // cols, more % cols), dim=1)
        return ids

    monkeypatch.setattr(sequence, "image_positions", positions)


def _silu_before_block_modulation(monkeypatch):
    original = transformer.TransformerBlock.modulation

    def modulation(self, temb):
        return original(self, torch.nn.functional.silu(temb))

    monkeypatch.setattr(transformer.TransformerBlock, "modulation", modulation)


def _no_silu_before_final_modulation(monkeypatch):
    original = transformer.FinalLayer.modulation

    def modulation(self, temb):
        self.adaLN_modulation[0] = torch.nn.Identity()
        return original(self, temb)

    monkeypatch.setattr(transformer.FinalLayer, "modulation", modulation)


def _no_tanh_on_gates(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tanh", lambda self: self)


def _time_not_scaled(monkeypatch):
    original = timestep.timestep_sinusoid
    monkeypatch.setattr(timestep, "timestep_sinusoid", lambda t: original(t / 1000))


def _sin_before_cos(monkeypatch):
    original = timestep.timestep_sinusoid
    monkeypatch.setattr(
        timestep, "timestep_sinusoid", lambda t: torch.cat(original(t).chunk(2, -1)[::-1], -1)
    )


def _pads_dropped(monkeypatch):
    monkeypatch.setattr(sequence, "pad_count", lambda tokens: 0)


def _half_split_rotation(monkeypatch):
    def qk_norm_rope(q, k, q_weight, k_weight, eps, *turn):
        normed = rms_norm_modulate(q, q_weight, eps), rms_norm_modulate(k, k_weight, eps)
        return tuple(layers.rotate_half(x, layers.for_halves(turn)) for x in normed)

    monkeypatch.setattr(block_norms, "qk_norm_rope", qk_norm_rope)


MISTAKES = [
    _caption_pads_at_zero, _image_time_from_unpadded_caption, _channel_outermost_patch,
    _image_pads_numbered_on,
    _silu_before_block_modulation, _no_silu_before_final_modulation, _no_tanh_on_gates, _time_not_scaled,
    _sin_before_cos, _pads_dropped, _half_split_rotation,
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__.strip("_"))
@torch.no_grad()
def test_a_known_mistake_would_be_seen(mistake, monkeypatch):
    with parity.in_float64():
        theirs, ours = parity.transformer_pair()
        x, t, caps = parity.transformer_inputs([(6, 10)], [5])
        want = theirs([v.clone() for v in x], t, [c.clone() for c in caps], return_dict=False)[0][0]
        assert parity.apart(ours(x, t, caps)[0], want) <= parity.WIDE
        mistake(monkeypatch)
        # float32 moves this output of diffusers by 1e-5, so a mistake is far outside of its limit too
        assert parity.apart(ours(x, t, caps)[0], want) > 1e-2

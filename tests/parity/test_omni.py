"""S3-DiT with images among the text is diffusers' block by block; limits as in tests/helpers/parity.py."""

import pytest

from tests.helpers import omni_parity
from zimage_core.models import omni, omni_sequence
from zimage_core.models.omni import OmniTransformer
from zimage_core.models.sequence import pad_count

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("case", omni_parity.CASES)
def test_every_block_is_diffusers(case):
    for difference in omni_parity.differences(case):
        assert difference.passes, difference


def _features_in_order(monkeypatch):
    monkeypatch.setattr(omni, "_scrambled", lambda features: features.flatten(0, 1))


def _features_over_patches(monkeypatch):
    original = omni_sequence.feature_positions
    monkeypatch.setattr(
        omni_sequence, "feature_positions", lambda size, image, t, patch: original(size, image, t, 1)
    )


def _images_behind_the_pads_of_their_text(monkeypatch):
    original = omni_sequence.caption_positions

    def positions(lengths, numbers):
        captions, ends = original(lengths, numbers)
        return captions, [end + pad_count(length) for end, length in zip(ends, lengths, strict=True)]

    monkeypatch.setattr(omni_sequence, "caption_positions", positions)


def _last_text_clean(monkeypatch):
    original = OmniTransformer._sample

    def sample(self, pieces, references, features, mask, *others):
        return original(self, pieces, references, features, [*mask, 0], *others)

    monkeypatch.setattr(OmniTransformer, "_sample", sample)


def _clean_at_the_time_of_noise(monkeypatch):
    monkeypatch.setattr(omni, "CLEAN", 0.0)


MISTAKES = [
    _features_in_order, _features_over_patches, _images_behind_the_pads_of_their_text, _last_text_clean,
    _clean_at_the_time_of_noise,
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_known_mistake_would_be_seen(monkeypatch, mistake):
    mistake(monkeypatch)
    (output,) = (d for d in omni_parity.differences("1 image") if d.place == "output")
    assert output.float64 > 1e-3, "a thousand times what float32 moves"

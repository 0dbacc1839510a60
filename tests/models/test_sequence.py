"""Patches, pads and positions are those of the paper's code: goldens by hand and round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_core.config import TransformerConfig
from zimage_core.errors import BadArgument
from zimage_core.models import sequence


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2]))
def test_unpatchify_undoes_patchify(rows, cols, channels, patch):
    latent = torch.arange(channels * rows * cols * patch * patch).reshape(
        channels, rows * patch, cols * patch
    )
    tokens = sequence.patchify(latent, patch)
    assert tokens.shape == (rows * cols, patch * patch * channels)
    assert torch.equal(sequence.unpatchify(tokens, rows * patch, cols * patch, patch), latent)


def test_a_token_is_row_column_channel_with_the_channel_innermost():
    latent = torch.arange(2 * 2 * 4).reshape(2, 2, 4)  # [C, H, W]
    first, second = sequence.patchify(latent, 2)
    assert first.tolist() == [0, 8, 1, 9, 4, 12, 5, 13]
    assert second.tolist() == [2, 10, 3, 11, 6, 14, 7, 15]


def test_patchify_keeps_leading_axes():
    latent = torch.randn(3, 16, 4, 6)
    assert torch.equal(sequence.patchify(latent, 2)[1], sequence.patchify(latent[1], 2))


def test_positions_of_a_caption_of_5_and_a_image_of_3_by_5():
    caption = sequence.caption_positions(32)
    assert caption[0].tolist() == [1, 0, 0]
    assert caption[-1].tolist() == [32, 0, 0]
    image = sequence.image_positions(3, 5, 32)
    assert image.shape == (32, 3)
    assert image[0].tolist() == [33, 0, 0]
    assert image[14].tolist() == [33, 2, 4]
    assert image[15:].abs().sum() == 0


@pytest.mark.parametrize(("tokens", "pads"), [(1, 31), (31, 1), (32, 0), (33, 31), (64, 0)])
def test_streams_fill_up_to_a_multiple_of_32(tokens, pads):
    assert sequence.pad_count(tokens) == pads


@pytest.mark.parametrize(
    ("rows", "cols", "caption"), [(0, 4, 5), (513, 4, 5), (4, 513, 5), (4, 4, 0), (4, 4, 1505)]
)
def test_lengths_beyond_the_positions_are_refused_by_name(rows, cols, caption):
    with pytest.raises(BadArgument, match=r"caption of|image of"):
        sequence.check_lengths(TransformerConfig(), rows, cols, caption)
    sequence.check_lengths(TransformerConfig(), 512, 512, 1504)

"""Masks and margins: what is painted, what stays, and how the edge between them falls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zimage_core.editing.images import expand, open_images
from zimage_core.editing.mask import Margins, grown, make_mask, softened
from zimage_core.errors import BadArgument


@pytest.mark.parametrize(
    ("margins", "size", "want"),
    [
        ((0, 0, 0, 0), (32, 48), (0, 0, 0, 0)),
        ((16, 0, 0, 0), (32, 48), (16, 0, 0, 0)),
        ((10, 0, 0, 0), (32, 48), (16, 0, 0, 0)),  # what is missing is added where the image grows
        ((0, 10, 0, 0), (32, 48), (0, 16, 0, 0)),
        ((10, 0, 3, 0), (32, 48), (10, 0, 6, 0)),  # at the right, if it grows on both sides
        ((1, 0, 0, 0), (31, 47), (1, 0, 0, 1)),  # or nowhere
        ((0, 0, 0, 1), (30, 40), (0, 0, 8, 2)),
    ],
)
def test_a_grown_image_has_sides_of_whole_tokens(margins, size, want):
    got = Margins(*margins).rounded(*size, 16)
    assert got == want
    assert (got.top + size[0] + got.bottom) % 16 == (got.left + size[1] + got.right) % 16 == 0


def test_a_grown_image_holds_the_given_one_and_goes_on_at_its_edge():
    pixels = torch.rand(1, 3, 5, 7)
    large = grown(pixels, Margins(2, 1, 0, 3))
    assert large.shape == (1, 3, 9, 9)
    assert torch.equal(large[..., 1:6, 2:], pixels)
    assert torch.equal(large[..., 0, 2:], pixels[..., 0, :])


@pytest.mark.parametrize("blur", [0.0, 0.5, 1.0, 2.0, 7.0, 16.0])
def test_a_soft_edge_is_one_inside_and_zero_beyond_its_width(blur):
    mask = torch.zeros(1, 1, 64, 80)
    mask[..., 30:41, 33:39] = 1
    soft = softened(mask, blur)
    assert bool((soft[mask > 0] == 1).all())
    width = max(2, 2 * round(blur / 2)) if blur else 0
    far = torch.ones_like(mask)
    far[..., 30 - width : 41 + width, 33 - width : 39 + width] = 0
    assert bool((soft[far > 0] == 0).all())
    between = soft[0, 0, 35, 39 : 39 + width + 1]
    assert bool((between.diff() <= 0).all())
    assert width == 0 or 0 < float(between[0]) < 1


def test_a_soft_edge_at_the_border_of_the_image():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :5] = 1
    soft = softened(mask, 6)
    assert torch.equal(soft[..., 0, :], soft[..., 15, :])
    assert bool((soft[..., :5] == 1).all())


def test_a_mask_is_cut_at_one_half_and_its_latents_are_every_eighth_pixel():
    values = np.random.default_rng(0).integers(0, 256, (32, 48), dtype=np.uint8)
    mask = make_mask(open_images(values, "mask_image", gray=True), 32, 48, 8, None, 0.0)
    assert np.array_equal(mask.pixels[0, 0].numpy(), values >= 128)
    assert np.array_equal(mask.latents[0, 0].numpy(), (values >= 128)[::8, ::8])
    assert torch.equal(mask.alpha, mask.pixels)


def test_margins_are_painted_with_every_latent_that_holds_some_of_them():
    mask = make_mask(None, 32, 48, 8, Margins(3, 0, 0, 0), 0.0)
    assert bool((mask.pixels[..., :3] == 1).all())
    assert float(mask.pixels[..., 3:].max()) == 0
    assert mask.latents[0, 0, 0].tolist() == [1, 0, 0, 0, 0, 0]


def test_a_mask_and_margins_add_up():
    own = Image.new("L", (32, 32))
    own.paste(255, (16, 16, 32, 32))
    mask = make_mask(open_images(own, "mask_image", gray=True), 32, 48, 8, Margins(16, 0, 0, 0), 0.0)
    assert mask.latents[0, 0].tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 0, 0, 1, 1]] * 2


def test_each_image_is_next_to_its_copies():
    values = torch.arange(2.0)[:, None]
    assert expand(values, 4, "image").flatten().tolist() == [0, 0, 1, 1]
    for count in (1, 3):
        with pytest.raises(BadArgument, match=f"image: got 2 for a run of {count} images"):
            expand(values, count, "image")

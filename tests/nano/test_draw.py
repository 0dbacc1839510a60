"""Drawings show what their scene says, prompts say it too, and held-out combinations stay out."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.nano.draw import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZE,
    ZH,
    Scene,
    describe,
    draw,
    fonts_installed,
    glyph_mask,
    loosen,
    random_scene,
    shape_mask,
)


def scenes(count: int, held_out: bool = False, **share: float) -> list[Scene]:
    rng = np.random.default_rng(11)
    return [random_scene(rng, held_out, **share) for _ in range(count)]


def test_the_same_seed_draws_the_same_image():
    for scene in scenes(20, glyphs=0.0):
        a, b = (draw(scene, np.random.default_rng(3)) for _ in range(2))
        assert a.shape == (SIZE, SIZE, 3)
        assert a.dtype == np.uint8
        assert np.array_equal(a, b)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_centred_and_grows_with_its_radius(shape: str):
    small, big = shape_mask(shape, 10), shape_mask(shape, 20)
    ratio = big.sum() / small.sum()
    assert 3.7 < ratio < 4.3, f"{shape}: twice the radius gives {ratio:.2f} times the area"
    column = (big.sum(0) @ np.arange(2 * SIZE)) / big.sum()
    assert abs(column - (SIZE - 0.5)) < 1, f"{shape} stands at column {column}, not in the middle"


@pytest.mark.parametrize("position", POSITIONS)
def test_the_ink_lies_where_the_scene_says(position: str):
    scene = Scene("white", "black", "circle", position, "small")
    light = draw(scene, np.random.default_rng(0)).astype(float).sum(-1) - 60
    light[light < 100] = 0
    place = np.array([(light.sum(0) @ np.arange(SIZE)), (light.sum(1) @ np.arange(SIZE))]) / light.sum()
    offset = place - (SIZE - 1) / 2
    assert np.abs(offset - POSITIONS[position]).max() < 3.5  # jitter is two pixels each way


def test_english_prompts_name_every_attribute():
    rng = np.random.default_rng(5)
    for scene in scenes(300):
        text = describe(scene, rng, chinese=False)
        assert scene.colour in text.lower()
        assert f"{scene.background} background" in text.lower()
        assert (scene.glyph or scene.shape) in text
        if not scene.glyph and scene.count == 1 and scene.position != "center":
            assert scene.position in text


def test_chinese_prompts_name_every_attribute():
    rng = np.random.default_rng(5)
    for scene in scenes(300):
        text = describe(scene, rng, chinese=True)
        assert ZH[scene.colour] in text
        assert ZH[scene.background] + "背景" in text
        assert (scene.glyph or ZH[scene.shape]) in text
        assert ("大" in text) == (scene.size == "big" and not scene.glyph) or scene.glyph == "大"


def test_loosened_prompts_keep_colours_and_glyphs():
    rng = np.random.default_rng(6)
    changed = 0
    for k, scene in enumerate(scenes(400)):
        text = describe(scene, rng, chinese=bool(k % 2))
        loose = loosen(text, rng)
        changed += loose != text
        assert (scene.colour in loose.lower()) or (ZH[scene.colour][0] in loose)
        assert scene.glyph in loose
    assert 20 < changed < 160


def test_a_combination_is_held_out_or_trained_on_never_both():
    trained = set(scenes(3000))
    kept = set(scenes(300, held_out=True))
    assert not trained & kept
    assert all(s.held_out for s in kept)


def test_object_and_background_never_share_a_colour():
    assert all(s.colour != s.background and {s.colour, s.background} <= set(COLOURS) for s in scenes(500))


@pytest.mark.skipif(
    not fonts_installed(),
    reason="needs Debian's fonts-dejavu-core and fonts-wqy-zenhei",
)
def test_no_two_glyphs_look_alike():
    masks = {g: glyph_mask(g) for g in "AB08OQ人大中田"}
    for a in masks:
        for b in masks:
            if a < b:
                apart = np.square(masks[a] - masks[b]).sum() / np.square(masks[a]).sum()
                assert apart > 0.05, f"{a} and {b} differ by {apart:.3f} of their ink"

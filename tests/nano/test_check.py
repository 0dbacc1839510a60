"""The checker reads drawings without a mistake, and reads nothing into a blot."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.nano.check import ATTRIBUTES, exam, markdown, moot, read, score, templates
from benchmarks.nano.draw import SIZE, Scene, draw, fonts_installed, random_scene


def test_every_shape_place_size_and_count_is_read_off_a_drawing():
    rng = np.random.default_rng(1)
    for _ in range(80):
        scene = random_scene(rng, held_out=bool(rng.integers(2)), glyphs=0.0)
        seen = read(draw(scene, rng))
        wrong = [a for a in ATTRIBUTES if not moot(scene, a) and getattr(seen, a) != getattr(scene, a)]
        assert not wrong, f"{scene} was read as {seen}"


@pytest.mark.skipif(not fonts_installed(), reason="needs Debian's fonts-dejavu-core and fonts-wqy-zenhei")
def test_glyphs_are_read_off_a_drawing():
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = random_scene(rng, held_out=False, glyphs=1.0)
        assert read(draw(scene, rng)).glyph == scene.glyph


def test_noise_is_read_as_nothing():
    rng = np.random.default_rng(3)
    assert read(rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)).shape == ""


def test_a_blank_image_is_read_as_nothing():
    assert read(np.full((SIZE, SIZE, 3), 245, np.uint8)).shape == ""


def test_the_wrong_image_scores_wrong():
    scene = Scene("red", "blue", "circle", "left", "big")
    rng = np.random.default_rng(4)
    other = Scene("green", "white", "star", "right", "small")
    table = score([scene, scene], [read(draw(scene, rng)), read(draw(other, rng))])
    for name in ("colour", "background", "shape", "position", "size", "everything"):
        assert table[name] == {"right": 1, "of": 2}, name
    assert table["glyph"]["of"] == 0


def test_the_exam_is_fixed_and_held_out():
    first, second = exam(60), exam(60)
    assert first == second
    assert all(scene.held_out for scene in first[0])
    assert all(
        text.isascii() for text, s in list(zip(first[1], first[0], strict=True))[::2] if s.glyph.isascii()
    )


def test_masks_of_different_scenes_differ():
    known = templates()
    assert len(known.scenes) == len(known.masks) >= 4700
    assert len({mask.tobytes() for mask in known.masks}) == len(known.masks)
    assert (known.squared > 0).all()


def test_the_table_has_a_row_for_every_attribute():
    blank = {name: {"right": 1, "of": 2} for name in (*ATTRIBUTES, "everything")}
    columns = ("all", "english", "chinese", "drawings", "vae")
    text = markdown({"prompts": 2, "steps": 8, "scores": dict.fromkeys(columns, blank)})
    assert all(f"| {name} | 2 | 1 | 50.0 %" in text for name in blank)

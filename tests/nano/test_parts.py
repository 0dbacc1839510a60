"""The LoRA and the ControlNet in the package have the names of their formats and do what they learned."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from benchmarks.nano.check import ink, read, templates
from benchmarks.nano.draw import SHAPES, SIZE, Scene, coverage, draw, edges, shape_mask
from zimage_core import ZImagePipeline
from zimage_core.assets import PARTS, embedded_part


def test_short_names_find_the_files():
    assert embedded_part("outline") == PARTS["outline"]
    assert embedded_part("edges") == PARTS["edges"]
    assert embedded_part("edge") is None


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "outline").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert embedded_part("outline") is None
    assert embedded_part(os.fspath("edges")) is not None


def test_the_lora_has_pairs_with_the_names_of_peft():
    with safe_open(PARTS["outline"], "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    config = json.loads(metadata["lora_adapter_metadata"])
    modules = config["transformer.target_modules"]
    assert len(modules) == 5 * 7  # five modulated blocks, four matrices of attention, three of feed-forward
    assert names == {f"transformer.{m}.lora_{h}.weight" for m in modules for h in "AB"}
    for module in modules:
        down, up = (shapes[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        assert down[0] == up[1] == config["transformer.r"] == config["transformer.lora_alpha"]


def test_outlines_and_filled_shapes_differ_but_for_the_ring():
    for shape in SHAPES:
        filled, outline = shape_mask(shape, 15), shape_mask(shape, 15, outline=True)
        assert (filled == outline).all() == (shape == "ring"), shape
        if shape != "ring":
            assert filled[SIZE, SIZE] == 1
            assert outline[SIZE, SIZE] == 0


def test_glyphs_and_the_masks_of_both_styles_stay_apart():
    filled, outline = templates(), templates(outline=True)
    ring = np.array([scene.shape == "ring" or bool(scene.glyph) for scene in filled.scenes])
    assert filled.scenes == outline.scenes
    assert (filled.masks == outline.masks).all(axis=1).tolist() == ring.tolist()


def test_edges_lie_on_the_border_alone():
    scene = Scene("red", "blue", "square", size="big")
    mask = coverage(scene, np.random.default_rng(0))
    lines = edges(mask)
    assert lines.shape == (SIZE, SIZE, 3)
    inside = np.pad(mask, 1, mode="edge")
    flat = np.ptp([inside[y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)], axis=0) == 0
    assert (lines[flat] == 0).all()
    assert lines[~flat].any()


def test_drawing_by_parts_draws_what_it_drew_before():
    """The checkpoints were trained on these drawings: their random numbers must come in the same order."""
    scene = Scene("red", "blue", "circle", "left", "small")
    assert int(draw(scene, np.random.default_rng(3)).astype(np.int64).sum()) == 2_132_872


@pytest.fixture(scope="module")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_default()


@pytest.mark.parametrize(
    "prompt", ["a big red circle on a white background", "a big blue square on a yellow background"]
)
def test_a_shape_is_an_outline_with_the_lora_and_filled_without_weight(pipe: ZImagePipeline, prompt: str):
    pipe.load_lora(PARTS["outline"], name="outline")
    middle = {}
    for weight in (1.0, 0.0):
        pipe.set_adapters(["outline"], [weight])
        colour, background, covered = ink(np.asarray(pipe(prompt, seed=1).images[0]))
        assert colour in prompt
        assert background in prompt
        middle[weight] = covered[SIZE // 2 - 3 : SIZE // 2 + 3, SIZE // 2 - 3 : SIZE // 2 + 3].mean()
    pipe.unload_lora()
    assert middle[1.0] < 0.2
    assert middle[0.0] > 0.8


def test_edges_move_a_shape_that_the_prompt_leaves_open(pipe: ZImagePipeline):
    scene = Scene("red", "blue", "circle", "left", "small")
    mask = coverage(scene, np.random.default_rng(0))
    pipe.load_controlnet(PARTS["edges"])
    made = pipe("a red circle on a blue background", seed=1, control_image=Image.fromarray(edges(mask)))
    pipe.unload_controlnet()
    seen = read(np.asarray(made.images[0]))
    assert (seen.colour, seen.background, seen.position, seen.size) == ("red", "blue", "left", "small")

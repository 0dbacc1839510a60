"""`zimage compare` says how far apart two files or settings are, and writes its reports whole."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.tree import ROOT
from zimage_core import convert_file

NANO = ROOT / "zimage_core" / "assets" / "nano"
SMALL = ("--prompt", "a red circle", "-W", 32, "-H", 32, "--steps", 2, "--block-steps", 1)


def test_a_file_against_itself_is_equal(zimage):
    outcome = zimage("compare", "default", NANO / "transformer.gguf", *SMALL, "--quiet")
    assert (outcome.status, outcome.err) == (0, "")
    assert "1 image: PSNR equal, SSIM 1.0000, velocity error 0.000%" in outcome.out
    assert "worst block: " in outcome.out


def test_settings_are_compared_and_reports_written(zimage, tmp_path):
    page, sheet = tmp_path / "a.html", tmp_path / "a.png"
    words = ("compare", "default", "default", *SMALL, "-n", 2, "--b-dtype", "bfloat16", "--json")
    outcome = zimage(*words, "--report", page, "--sheet", sheet)
    data = json.loads(outcome.out)
    assert data["labels"] == ["default", "default dtype=bfloat16"]
    assert [p["seed"] for p in data["images"]] == [0, 1]
    assert 30 < data["psnr"] < 90
    assert 1e-4 < data["velocity"] < 0.05
    assert [s["step"] for s in data["steps"]] == [0, 1]
    assert {b["block"] for b in data["blocks"]} >= {"noise_refiner.0", "layers.3"}
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert sheet.read_bytes()[:4] == b"\x89PNG"
    assert "comparing 6/6 runs" in outcome.err


def test_a_prompt_that_the_sheet_has_no_letters_for_is_in_a_legend(zimage, tmp_path):
    words = ("-W", 16, "-H", 16, "--steps", 1, "--block-steps", 0, "--quiet")
    sheet = tmp_path / "a.png"
    outcome = zimage(
        "compare", "default", "default", "--prompt", "黑色背景中间有一个黄色星形", *words, "--sheet", sheet
    )
    assert outcome.err == f"{sheet}: row 1: seed 0, 黑色背景中间有一个黄色星形\n"


def test_other_steps_compare_images_alone(zimage):
    outcome = zimage("compare", "default", "default", *SMALL, "--b-steps", 3, "--quiet")
    assert "steps and blocks were not compared" in outcome.out


def test_another_model_folder(zimage, model):
    """The parts of --model, with its own transformer named as a file."""
    outcome = zimage("compare", "default", model / "transformer", "--model", model, *SMALL, "--quiet")
    assert "PSNR equal" in outcome.out


def test_files_are_refused_before_anything_is_drawn(zimage, tmp_path, monkeypatch):
    monkeypatch.setattr("zimage_core.cli.compare.load_pipeline", lambda _: pytest.fail("loaded"))
    (tmp_path / "x.html").write_text("<html>")
    cases = [
        (("default", tmp_path / "x.html"), "an HTML page, not a model"),
        (("default", tmp_path / "none.gguf"), "no such file"),
        (("default", NANO / "text_encoder.gguf"), "text encoder"),
        (("default", "default", "--report", tmp_path / "x.html"), "exists already"),
        (("default", "default", "--vae", NANO / "vae.safetensors"), "give --text-encoder too"),
        (("default", "default", "-n", 0), "--count: got 0"),
        (("default", "default", "--b-steps", 0), "--b-steps: got 0"),
        (("default", "default", "--b-guidance", 99), "--b-guidance: got 99"),
        (("default", "default", "--cfg", 2, "--b-guidance", 1), "--b-guidance goes with --guidance"),
    ]
    for words, message in cases:
        outcome = zimage("compare", *words, *SMALL)
        assert outcome.status in (1, 2), words
        assert message in outcome.error, words


def test_images_of_two_sizes_are_refused_before_anything_is_drawn(zimage, tmp_path, monkeypatch):
    """A file that states no size draws 1024 px, the embedded model 80."""
    convert_file("default", tmp_path / "a.safetensors", dequantize="bf16", component="transformer")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    monkeypatch.setattr("zimage_core.cli.compare.load_pipeline", lambda _: pytest.fail("loaded"))
    for words, message in {
        ("default", tmp_path / "b.safetensors"): "B draws images of 1024 x 1024, A of 80 x 80; give both",
        (tmp_path / "b.safetensors", "default"): "B draws images of 80 x 80, A of 1024 x 1024; give both",
        ("default", tmp_path / "a.safetensors", "-W", 50): "width: got 50, wanted a multiple of 16",
        ("default", "default", "--b-steps", 0): "--b-steps: got 0",
        ("default", "default", "--sheet", tmp_path / "a.html"): "--sheet",
        ("default", "default", "--report", tmp_path / "a.png"): "--report",
    }.items():
        outcome = zimage("compare", *words, "--prompt", "a red circle")
        assert message in outcome.error, words

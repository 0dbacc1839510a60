"""`zimage generate --preview` rewrites one PNG after each step; samplers and schedules are chosen by name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from zimage_core.cli import generate
from zimage_core.files.png import read_metadata

SMALL = ("-W", 32, "-H", 32, "--steps", 2, "--quiet")


def test_a_preview_is_written_after_each_step_and_changes_no_image(zimage, model, tmp_path, monkeypatch):
    words = ("generate", "a", "--model", model, *SMALL, "--seed", 5)
    seen, write = [], generate.write_atomically

    def watched(path, data, overwrite):
        write(path, data, overwrite=overwrite)
        seen.append((path, Image.open(path).size))

    monkeypatch.setattr(generate, "write_atomically", watched)
    preview = tmp_path / "look.png"
    assert zimage(*words, "-o", tmp_path / "a.png", "--preview", preview).status == 0
    assert seen == [(str(preview), (32, 32))] * 2
    assert zimage(*words, "-o", tmp_path / "b.png").status == 0
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "look.png"]


def test_a_preview_takes_the_place_of_nothing(zimage, model, tmp_path):
    (tmp_path / "there.png").write_bytes(b"mine")
    (tmp_path / "folder.png").mkdir()
    for name, message in {
        "there.png": "exists already",
        "folder.png": "is a folder",
        "a.png": "this is the name of an image",
        "look.jpg": "wanted a name that ends in .png",
        "no/look.png": "its folder does not exist",
    }.items():
        words = ("generate", "a", "--model", model, *SMALL, "-o", tmp_path / "a.png")
        outcome = zimage(*words, "--preview", tmp_path / name)
        assert outcome.status != 0
        assert message in outcome.error
    assert (tmp_path / "there.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--taef1", "t.safetensors"), "--taef1 goes with --preview PNG"),
        (("--sampler", "eulr"), "invalid choice: 'eulr'"),
        (("--schedule", "karras"), "invalid choice: 'karras'"),
        (("--variety", "-1"), "variety: got -1.0, wanted a number from 0 to 100"),
        (("--variety", "nan"), "variety: got nan"),
    ],
)
def test_wrong_options_are_one_line(zimage, model, tmp_path, words, message):
    outcome = zimage("generate", "a", "--model", model, *SMALL, "-o", tmp_path / "a.png", *words)
    assert outcome.status == 2
    assert message in outcome.error


def test_a_wrong_taef1_file_is_refused_by_what_it_is(zimage, model, tmp_path):
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    words = ("--preview", tmp_path / "p.png", "--taef1", vae)
    outcome = zimage("generate", "a", "--model", model, *SMALL, "-o", tmp_path / "a.png", *words)
    assert outcome.status != 0
    assert "another VAE" in outcome.error


def test_options_of_the_sampling_stand_in_the_image(zimage, model, tmp_path):
    words = ("--sampler", "heun", "--schedule", "beta", "--variety", 0.2)
    zimage("generate", "a", "--model", model, *SMALL, "-o", tmp_path / "a.png", *words)
    settings = read_metadata(tmp_path / "a.png").settings
    assert (settings["sampler"], settings["schedule"], settings["variety"]) == ("heun", "beta", 0.2)

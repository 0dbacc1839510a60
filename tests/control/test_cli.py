"""The command line with control images: `generate` and `inspect`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers import controls, tiny
from zimage_core.cli.main import main


@pytest.fixture
def files(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image.save(tmp_path / "canny.png")
    controls.write(tmp_path / "net.safetensors", controls.controlnet("2.1", controls.TINY))
    tiny.folder(tmp_path / "model")
    return tmp_path


def generate(files, *options):
    out = files / "out.png"
    size = ("--width", "32", "--height", "32")
    usual = ["generate", "a", "--seed", "1", "--steps", "2", *size, "--quiet", "--force", "-o", str(out)]
    return main([*usual, *map(str, options)])


def said(files, capsys):
    assert main(["inspect", str(files / "out.png"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["metadata"]["zimage"]


def test_a_control_image_steers_the_image_and_stands_in_it(files, capsys):
    model, control = ("--model", files / "model"), ("--control", files / "canny.png")
    net = ("--controlnet", files / "net.safetensors")
    assert generate(files, *model) == 0
    plain = np.array(Image.open(files / "out.png"))
    options = ("--control-scale", 0.6, "--control-start", 0, "--control-end", 0.5)
    assert generate(files, *model, *control, *net, *options) == 0
    assert not np.array_equal(np.array(Image.open(files / "out.png")), plain)
    capsys.readouterr()
    settings = said(files, capsys)
    (found,) = settings["controls"]
    assert {k: found[k] for k in ("controlnet", "scale", "end")} == {
        "controlnet": "net",
        "scale": 0.6,
        "end": 0.5,
    }
    assert settings["files"]["controlnet net"]["name"] == "net.safetensors"
    assert generate(files, *model, *control, *control, *net, *net, "--control-scale", 0.5) == 0
    capsys.readouterr()
    assert [each["controlnet"] for each in said(files, capsys)["controls"]] == ["net", "net-2"]
    (files / "other").mkdir()
    controls.write(files / "other" / "net.safetensors", controls.controlnet("1.0", controls.TINY))
    namesake = ("--controlnet", files / "other" / "net.safetensors")
    assert generate(files, *model, *control, *control, *net, *namesake) == 0
    capsys.readouterr()
    assert [each["controlnet"] for each in said(files, capsys)["controls"]] == ["net", "net-2"]


def test_the_embedded_model_has_a_controlnet_of_its_own(files, capsys):
    assert generate(files, "--control", files / "canny.png") == 0
    capsys.readouterr()
    assert said(files, capsys)["controls"][0]["controlnet"] == "edges"


def test_options_that_do_not_go_together_are_refused_before_loading(files, capsys):
    model = ("--model", files / "model")
    for options, message in (
        (
            ("--controlnet", files / "net.safetensors"),
            "--controlnet: it needs an image to follow; give --control",
        ),
        (("--control-scale", 1), "--control-scale: it needs an image to follow"),
        ((*model, "--control", files / "canny.png"), "--control: it needs a ControlNet for this model"),
        ((*model, "--control", "/nowhere.png", "--controlnet", files / "net.safetensors"), "is not a file"),
        (
            (*model, "--control", files / "canny.png", "--controlnet", files / "model" / "transformer"),
            "this is a Z-Image transformer (width 32, 2 layers), where a Z-Image ControlNet is wanted",
        ),
    ):
        assert generate(files, *options) != 0
        assert message in capsys.readouterr().err


def test_inspect_names_the_variant(files, capsys):
    assert main(["inspect", str(files / "net.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "a Z-Image ControlNet (2.1 lite, 2 control layers, 33 control channels), safetensors" in shown
    assert "zimage generate --controlnet FILE --control IMAGE" in shown

"""`zimage generate` with an image, a mask, margins and hires: the embedded model, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from zimage_core.cli.main import main
from zimage_core.files.png import read_metadata


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def mask(tmp_path):
    path, values = tmp_path / "mask.png", np.zeros((48, 64), np.uint8)
    values[:, 40:] = 255
    Image.fromarray(values).save(path)
    return path


def generate(tmp_path, *options):
    out = tmp_path / "out.png"
    done = main(
        ["generate", "a red circle", "--seed", "1", "--steps", "2", "-o", str(out), "--quiet", *options]
    )
    return done, out


def test_an_image_is_painted_anew(tmp_path, image):
    done, out = generate(tmp_path, "--image", str(image), "--strength", "0.5")
    assert done == 0
    settings = read_metadata(out).settings
    assert (settings["width"], settings["height"], settings["strength"]) == (64, 48, 0.5)
    assert len(settings["image_sha256"]) == 64
    assert str(tmp_path) not in str(read_metadata(out).text)


def test_a_mask_keeps_the_rest_to_the_bit(tmp_path, image, mask):
    done, out = generate(tmp_path, "--image", str(image), "--mask", str(mask), "--mask-blur", "4")
    assert done == 0
    before, after = (np.asarray(Image.open(path)) for path in (image, out))
    assert np.array_equal(before[:, :36], after[:, :36])
    assert not np.array_equal(before[:, 40:], after[:, 40:])


def test_an_image_grows(tmp_path, image):
    done, out = generate(tmp_path, "--image", str(image), "--outpaint", "16,0,0,32")
    assert done == 0
    assert np.array_equal(np.asarray(Image.open(out))[:48, 16:], np.asarray(Image.open(image)))


def test_hires_enlarges(tmp_path):
    done, out = generate(tmp_path, "-W", "32", "-H", "32", "--hires", "1.5", "--strength", "0.7")
    assert done == 0
    assert Image.open(out).size == (48, 48)
    assert read_metadata(out).settings["hires"] == 1.5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mask", "IMAGE"], "--mask: it needs image"),
        (["--strength", "0.5"], "--strength: it needs image"),
        (["--image", "IMAGE", "--strength", "0"], "strength: got 0"),
        (["--image", "IMAGE", "--mask-blur", "3"], "--mask-blur: it needs"),
        (["--image", "NOTHING"], "is not a file"),
        (["--image", "BROKEN"], "no image of a kind"),
        (["--image", "IMAGE", "--outpaint", "1,2"], "--outpaint"),
        (["--image", "IMAGE", "--outpaint", "0,0,0,0"], "four zeros"),
        (["--hires", "2", "--image", "IMAGE"], "leave --image out"),
        (["--hires", "0.5"], "--hires: got 0.5"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_loaded(tmp_path, image, options, said, capsys, monkeypatch):
    from zimage_core.cli import generate as verb

    monkeypatch.setattr(verb, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "broken").write_bytes(b"no image")
    places = {"IMAGE": image, "NOTHING": tmp_path / "nothing", "BROKEN": tmp_path / "broken"}
    try:
        done, out = generate(tmp_path, *(str(places.get(option, option)) for option in options))
    except SystemExit as refused:  # by the parser itself
        done, out = refused.code, tmp_path / "out.png"
    lines = capsys.readouterr().err.strip().splitlines()
    assert done in (1, 2)  # of a file, or of an argument
    assert not out.exists()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize("option", ["--image", "--mask", "--control"])
def test_a_preview_never_replaces_what_the_run_reads(tmp_path, image, mask, option):
    files = {"--image": image, "--mask": mask, "--control": image}
    if option == "--control":
        words = ["--control", str(image)]
    else:
        words = ["--image", str(image), "--mask", str(mask)]
    before = files[option].read_bytes()
    done, out = generate(tmp_path, *words, "--preview", str(files[option]), "--force")
    assert done == 2
    assert files[option].read_bytes() == before
    assert not out.exists()


@pytest.mark.parametrize("margins", ["\u00b2,0,0,0", "1,2,3", "1,2,3,x", "64"])
def test_margins_that_are_no_numbers_are_one_sentence(tmp_path, image, margins, capsys):
    with pytest.raises(SystemExit):
        generate(tmp_path, "--image", str(image), "--outpaint", margins)
    assert "wanted four numbers such as 64,0,64,0" in capsys.readouterr().err

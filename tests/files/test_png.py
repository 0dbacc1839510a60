"""Settings in a PNG come back, stay small and hold no path; hostile files are refused in a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers import tiny
from zimage_core.errors import BadArgument, BadFile
from zimage_core.files import png
from zimage_core.pipeline import ZImagePipeline

ROOT = Path(__file__).resolve().parents[2]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


IHDR = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
IDAT = chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
IEND = chunk(b"IEND", b"")


def made(*chunks: bytes) -> bytes:
    return png.SIGNATURE + IHDR + b"".join(chunks) + IDAT + IEND


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("secret folder") / "m")


@pytest.fixture(scope="module")
def result(model):
    pipe = ZImagePipeline.from_pretrained(model)
    return pipe("a star 星形\nand a line", height=32, width=48, seed=9, num_images_per_prompt=2)


def test_settings_come_back(result, tmp_path):
    result.save(tmp_path / "a.png", index=1)
    got = png.read_metadata(tmp_path / "a.png")
    assert (got.width, got.height) == (48, 32)
    settings = got.settings
    assert settings == result.metadata(1)
    assert settings["prompt"] == "a star 星形\nand a line"
    assert (settings["seed"], settings["steps"], settings["guidance_scale"]) == (10, 8, 0.0)
    lines = got.parameters.split("\n")
    assert lines[:2] == ["a star 星形", "and a line"]
    assert lines[2].startswith(
        "Steps: 8, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Shift: 3, Seed: 10,"
    )
    assert "Size: 48x32" in lines[2]


def test_pixels_are_those_of_the_run_and_pillow_reads_the_text(result, tmp_path):
    result.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(result.images[0]))
        assert image.text["parameters"].startswith("a star 星形")
        assert json.loads(image.text["zimage"])["seed"] == 9


def test_two_runs_give_one_file(result, model, tmp_path):
    again = ZImagePipeline.from_pretrained(model)
    prompt = "a star 星形\nand a line"
    again(prompt, height=32, width=48, seed=9, num_images_per_prompt=2).save(tmp_path / "b.png")
    result.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_files_are_named_and_hashed_without_their_folder(result, model, tmp_path):
    import hashlib

    result.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for word in (b"secret", os.fsencode(tmp_path.name), b"/"):
        texts = b"".join(t.encode() for t in png.read_metadata(tmp_path / "a.png").text.values())
        assert word not in texts
    assert b"secret" not in data
    entry = png.read_metadata(tmp_path / "a.png").settings["files"]["vae"]
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_file_that_went_away_loses_no_image(tmp_path):
    folder = tiny.folder(tmp_path / "m")
    made = ZImagePipeline.from_pretrained(folder)("a", height=32, width=32, num_inference_steps=1, seed=1)
    shutil.rmtree(folder)
    made.save(tmp_path / "a.png")
    files = png.read_metadata(tmp_path / "a.png").settings["files"]
    assert set(files) == {"transformer", "text_encoder", "vae"}
    assert set(made.metadata(full_hash=True)["files"]["vae"]) == {"name", "size", "sha256"}


def test_no_metadata_when_not_wanted(result, tmp_path):
    result.save(tmp_path / "a.png", metadata=False)
    assert png.read_metadata(tmp_path / "a.png").text == {}


def test_an_existing_file_is_kept_unless_forced(result, tmp_path):
    path = tmp_path / "a.png"
    path.write_text("precious")
    with pytest.raises(BadFile, match="exists"):
        result.save(path)
    assert path.read_text() == "precious"
    result.save(path, force=True)
    assert path.read_bytes().startswith(png.SIGNATURE)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_saving_arrays_or_a_image_that_is_not_there_is_refused(result, tmp_path):
    with pytest.raises(BadArgument, match="no image 2"):
        result.save(tmp_path / "a.png", index=2)
    arrays = tiny.pipeline()("a", output_type="np", num_inference_steps=1)
    with pytest.raises(BadArgument, match="output_type='pil'"):
        arrays.save(tmp_path / "a.png")


@given(prompt=st.text(max_size=40), times=st.sampled_from([1, 100, 5000]), seed=st.integers(0, 2**64 - 1))
def test_any_prompt_stays_below_16_kib_and_parses(prompt, times, seed):
    settings = {"prompt": prompt * times, "negative_prompt": prompt * times, "seed": seed, "steps": 8,
                "width": 16, "height": 16,
                "files": {"transformer": {"name": "x" * 255, "size": 1, "sha256": "0" * 64}}}  # fmt: skip
    chunks = png.text_chunks(settings)
    image = Image.new("RGB", (1, 1))
    assert 0 < len(png.encode(image, settings)) - len(png.encode(image)) <= png.MAX_TEXT
    back = json.loads(chunks["zimage"])
    assert back["seed"] == seed
    if len(prompt) * times <= 500:
        assert back["prompt"] == prompt * times
    else:
        assert (prompt * times).startswith(back["prompt"].removesuffix("…"))


def test_text_chunks_of_other_programs_are_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(made(
        chunk(b"tEXt", b"parameters\0caf\xe9"),
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{}")),
        chunk(b"iTXt", b"Title\0\1\0de\0Titel\0" + zlib.compress("星".encode())),
        chunk(b"tEXt", b"parameters\0second"),
    ))  # fmt: skip
    assert png.read_metadata(path).text == {"parameters": "café", "workflow": "{}", "Title": "星"}
    assert png.read_metadata(path).settings is None


BOMB = zlib.compress(bytes(60 << 20))
HOSTILE = {
    "empty": b"",
    "not a png": b"GIF89a" + bytes(50),
    "signature only": png.SIGNATURE,
    "cut in a chunk": made(chunk(b"tEXt", b"a\0" + b"b" * 100))[:90],
    "no end": png.SIGNATURE + IHDR + IDAT,
    "bad checksum": made(chunk(b"tEXt", b"a\0b")[:-1] + b"x"),
    "chunk of 2 GiB": made(struct.pack(">I4s", 0x7FFFFFFF, b"tEXt")),
    "no header": png.SIGNATURE + IDAT + IEND,
    "zero width": png.SIGNATURE + chunk(b"IHDR", bytes(13)) + IEND,
    "2 MB of text": made(chunk(b"tEXt", b"a\0" + b"b" * (2 << 20))),
    "60 chunks of 1 MB": made(
        *[chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1 << 20))) for i in range(60)]
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(BadFile) as caught:
        png.read_metadata(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    b"", b"\0", b"a", b"x" * 80 + b"\0y", b"a\0\0" + BOMB, b"a\0\0not zlib", b"a\0\1\0", b"a\0\2\0\0\0z",
])  # fmt: skip
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"tEXt"])
def test_odd_text_chunks_are_left_out_or_read_within_the_limit(tmp_path, kind, text):
    path = tmp_path / "a.png"
    path.write_bytes(made(chunk(kind, text)))
    got = png.read_metadata(path)
    assert sum(len(v) for v in got.text.values()) <= png.READ_LIMIT


@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_a_bad_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(png.SIGNATURE + IHDR + data)
    with contextlib.suppress(BadFile):
        png.read_metadata(path)


def test_settings_that_are_no_object_are_ignored():
    for text in ("[1]", "{", "[" * 100_000, "NaN"):
        assert png.PngText(1, 1, {"zimage": text}).settings is None


def test_folders_and_fifos_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "absent"):
        with pytest.raises(BadFile):
            png.read_metadata(path)

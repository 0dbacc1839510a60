"""`zimage quantize` and `zimage convert`: words, exit statuses, and what Ctrl-C leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.tree import ROOT
from tests.helpers.wide import wide_state, write_wide
from zimage_core.errors import BadFile
from zimage_core.export.mixes import INT8, MIXES
from zimage_core.export.recipes import read_recipe
from zimage_core.weights.inspection import inspect_file


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_wide(tmp_path_factory.mktemp("wide") / "transformer", wide_state())


def test_a_type_gives_one_line_on_what_came_out(zimage, wide, tmp_path):
    outcome = zimage("quantize", wide, tmp_path / "a.gguf", "--type", "q4_k_m")
    assert outcome.status == 0
    assert len(outcome.out.splitlines()) == 1
    assert "Q4_K 8" in outcome.out
    assert "which blocks of Q6_K do not divide: F16 instead" in outcome.err
    assert inspect_file(tmp_path / "a.gguf").usable


def test_an_int8_file_is_made_and_told_of(zimage, wide, tmp_path):
    out = tmp_path / "a.safetensors"
    outcome = zimage("quantize", wide, out, "--type", "int8_convrot")
    assert outcome.status == 0
    assert re.search(r"; BF16 \d+, I8 20$", outcome.out.strip())
    assert "  note      INT8, rotated by blocks of 256: 16 matrices" in zimage("inspect", out).out
    refused = zimage("quantize", wide, out, "--type", "INT8_ROW", "--write-recipe", tmp_path / "r.txt")
    assert refused.status == 2
    assert "--write-recipe: int8 rows follow no recipe" in refused.error


def test_quiet_is_quiet(zimage, wide, tmp_path):
    outcome = zimage("quantize", wide, tmp_path / "a.gguf", "--type", "Q8_0", "--quiet")
    assert (outcome.status, outcome.err) == (0, "")


def test_a_recipe_and_a_size_work_as_well(zimage, wide, tmp_path):
    (tmp_path / "r.txt").write_text("*.qkv.weight = Q8_0\n* = source\n")
    assert zimage("quantize", wide, tmp_path / "a.gguf", "--recipe", tmp_path / "r.txt").status == 0
    types = {t.format: t.tensors for t in inspect_file(tmp_path / "a.gguf").types}
    assert types["Q8_0"] == 4, "two layers and two refiners"
    assert zimage("quantize", wide, tmp_path / "b.gguf", "--size", "7MB").status == 0
    assert 6_600_000 < (tmp_path / "b.gguf").stat().st_size <= 7_000_000
    # the recipe that was found stands in the file, and is one
    (tmp_path / "found.txt").write_text(inspect_file(tmp_path / "b.gguf").metadata["zimage.recipe"])
    assert read_recipe(tmp_path / "found.txt").rules


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "one of the arguments --type --recipe --size"),
        (("--type", "Q4_K_M", "--size", "1GB"), 2, "not allowed with"),
        (("--type", "Q9"), 2, "unknown type 'Q9'; known are F32, F16, BF16, Q8_0"),
        (("--size", "much"), 2, "--size: got much, wanted bytes"),
        (("--size", "1kB"), 1, "the smallest possible is"),
        (("--recipe", "none.txt"), 1, "none.txt: the file cannot be opened: no such file"),
        (("--type", "Q8_0", "--imatrix", "none.dat"), 1, "none.dat"),
        (("--type", "Q8_0", "--component", "text_encoder"), 1, "where a Qwen3-4B text encoder is wanted"),
    ],
)
def test_a_wrong_command_is_one_line(zimage, wide, tmp_path, words, status, message):
    outcome = zimage("quantize", wide, tmp_path / "a.gguf", *words)
    assert outcome.status == status
    assert message in outcome.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_force_is_needed_to_replace(zimage, wide, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"old")
    refused = zimage("quantize", wide, tmp_path / "a.gguf", "--type", "Q8_0", "--quiet")
    assert refused.status == 1
    assert "exists already" in refused.error
    assert "--force" in refused.error
    assert zimage("quantize", wide, tmp_path / "a.gguf", "--type", "Q8_0", "--force").status == 0


def test_the_disk_is_looked_at_first(zimage, wide, tmp_path, monkeypatch):
    def full(target, nbytes):
        raise BadFile(target, "1 kB are free on its disk")

    monkeypatch.setattr("zimage_core.files.atomic.check_free_space", full)
    outcome = zimage("quantize", wide, tmp_path / "a.gguf", "--type", "Q8_0", "--quiet")
    assert outcome.status == 1
    assert "1 kB are free" in outcome.error
    assert not list(tmp_path.iterdir())


def test_converting_there_and_back(zimage, wide, tmp_path):
    assert (
        zimage("convert", wide, tmp_path / "a.safetensors", "--prefix", "model.diffusion_model.").status == 0
    )
    outcome = zimage("convert", tmp_path / "a.safetensors", tmp_path / "out", "--shard-size", "1MB")
    assert outcome.status == 0
    assert "BF16" in outcome.out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors.index.json"} <= names
    assert zimage("convert", wide, tmp_path / "out").status == 1
    assert zimage("convert", wide, tmp_path / "x.gguf", "--to", "onnx").status == 2


def test_packed_weights_need_a_word(zimage, wide, tmp_path):
    zimage("quantize", wide, tmp_path / "q.gguf", "--type", "Q8_0", "--quiet")
    refused = zimage("convert", tmp_path / "q.gguf", tmp_path / "a.safetensors", "--quiet")
    assert refused.status == 1
    assert "--dequantize bf16 or f32" in refused.error
    words = ("--dequantize", "bf16", "--quiet")
    assert zimage("convert", tmp_path / "q.gguf", tmp_path / "a.safetensors", *words).status == 0


def test_help_names_the_types_and_examples(zimage):
    text = zimage("quantize", "--help").out
    assert {*MIXES, *INT8} - set(re.findall(r"\w+", text)) == {"F32", "Q1_0", "Q2_0"}
    assert "--size 3.5GB" in text


# Both stand still in the middle, until the signal ends them.
SLOW = (
    "import time, zimage_core.export.streaming as s, zimage_core.cli.main as m\n"
    "encode, done = s.encode, []\n"
    "def slow(*a):\n    done.append(len(done) < 6 or time.sleep(600))\n    return encode(*a)\n"
    "s.encode = slow; m.process()"
)
SLOW_COPY = (
    "import time, zimage_core.export.checkpoint as c, zimage_core.cli.main as m\n"
    "raw, done = c.Checkpoint.raw, []\n"
    "def slow(*a):\n    done.append(len(done) < 3 or time.sleep(600))\n    yield from raw(*a)\n"
    "c.Checkpoint.raw = slow; m.process()"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (SLOW, ("quantize", "a.gguf", "--type", "Q8_0", "--force")),
        (SLOW_COPY, ("convert", "a.safetensors", "--force")),
        (SLOW_COPY, ("convert", "folder")),
    ],
    ids=["quantize", "file", "folder"],
)
def test_a_stopped_run_leaves_what_was_there(wide, tmp_path, number, code, words):
    verb, out, *options = words
    if "--force" in options:
        (tmp_path / out).write_bytes(b"old")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    command = [sys.executable, "-c", code, verb, str(wide), str(tmp_path / out), *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True)
    until = time.monotonic() + 300
    while not list(tmp_path.glob(".*.tmp")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- sources that are folders ----------------------------------------------------------------

NANO = ROOT / "zimage_core" / "assets" / "nano"
PREFIX = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "vae": "vae.",
}


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    """The tiny pipeline as a diffusers folder, a folder of loose files, and one file in a folder."""
    loose, merged = tmp_path_factory.mktemp("loose"), tmp_path_factory.mktemp("merged")
    everything = {}
    for part, prefix in PREFIX.items():
        state = load_file(next((model / part).glob("*.safetensors")))
        save_file(state, loose / f"{part}.safetensors")
        everything |= {prefix + name: tensor for name, tensor in state.items()}
    save_file(everything, merged / "all.safetensors")
    return {"diffusers": model, "loose": loose, "merged": merged, "file": merged / "all.safetensors"}


@pytest.mark.parametrize("kind", ["diffusers", "loose", "merged", "file"])
@pytest.mark.parametrize("part", [None, *PREFIX])
def test_every_folder_gives_the_part_that_is_asked_for(zimage, sources, tmp_path, kind, part):
    words = () if part is None else ("--component", part)
    outcome = zimage("convert", sources[kind], tmp_path / "a.safetensors", *words, "--quiet")
    assert (outcome.status, outcome.out.count("\n")) == (0, 1)
    assert inspect_file(tmp_path / "a.safetensors").kind == (part or "transformer")
    if part != "vae":  # which is never quantised
        words = ("--type", "Q8_0", *words, "--quiet")
        assert zimage("quantize", sources[kind], tmp_path / "a.gguf", *words).status == 0
        assert inspect_file(tmp_path / "a.gguf").kind == (part or "transformer")


@pytest.mark.parametrize("source", [NANO, "default"])
def test_the_shipped_folder_is_its_transformer(zimage, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    assert zimage("convert", source, tmp_path / "a.gguf", "--quiet").status == 0
    assert inspect_file(tmp_path / "a.gguf").kind == "transformer"
    words = ("--type", "Q8_0", "--requantize", "--component", "text_encoder", "--quiet")
    assert zimage("quantize", source, tmp_path / "b.gguf", *words).status == 0
    assert inspect_file(tmp_path / "b.gguf").kind == "text_encoder"


def test_a_folder_named_default_comes_before_the_embedded_model(zimage, wide, tmp_path, monkeypatch):
    shutil.copytree(wide, tmp_path / "default")
    monkeypatch.chdir(tmp_path)
    assert zimage("convert", "default", tmp_path / "a.gguf", "--quiet").status == 0
    assert "width 256, 2 layers" in inspect_file(tmp_path / "a.gguf").title, "the embedded one has 4"


def test_what_cannot_be_written_is_refused_in_a_line(zimage, wide, tmp_path):
    out = tmp_path / "a.safetensors"
    for words, message in {
        ("quantize", wide, out, "--type", "Q8_0"): "ends in .gguf",
        ("convert", wide, out, "--shard-size", "1"): "only a folder of diffusers has shards",
        ("convert", wide, tmp_path / "a.pt"): ".pt is not written",
        ("quantize", wide, tmp_path / "a.gguf", "--type", "Q8_0", "--write-recipe", tmp_path / "a.gguf"): (
            "names OUT itself"
        ),
    }.items():
        outcome = zimage(*words)
        assert outcome.status == 2, words
        assert message in outcome.error
    assert not list(tmp_path.iterdir())

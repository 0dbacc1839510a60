"""`zimage generate` writes the image that the pipeline makes, where it was told to, or says why not."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from zimage_core.cli.model_options import read_prompts
from zimage_core.errors import BadFile
from zimage_core.files.png import read_metadata
from zimage_core.pipeline import ZImagePipeline

SMALL = ("-W", 32, "-H", 32, "--steps", 2, "--quiet")


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_image_is_the_pipelines(zimage, model, tmp_path):
    target = tmp_path / "a.png"
    outcome = zimage("generate", "红色圆形", "--model", model, *SMALL, "--seed", 5, "-o", target)
    assert (outcome.status, outcome.out, outcome.err) == (0, f"{target}\n", "")
    expected = ZImagePipeline.from_pretrained(model)(
        "红色圆形", width=32, height=32, num_inference_steps=2, seed=5
    )
    assert np.array_equal(pixels(target), np.asarray(expected.images[0]))
    settings = read_metadata(target).settings
    assert (settings["prompt"], settings["seed"], settings["steps"]) == ("红色圆形", 5, 2)
    assert str(model.parent).encode() not in target.read_bytes(), "no path of the model goes into the image"
    assert list(tmp_path.iterdir()) == [target]


def test_files_can_be_named_one_by_one(zimage, model, tmp_path):
    parts = [(f"--{name.replace('_', '-')}", model / name) for name in ("transformer", "text_encoder", "vae")]
    words = [word for part in parts for word in part]
    outcome = zimage("generate", "a", *words, *SMALL, "--seed", 5, "-o", tmp_path / "files.png")
    assert outcome.status == 0, outcome.err
    zimage("generate", "a", "--model", model, *SMALL, "--seed", 5, "-o", tmp_path / "folder.png")
    assert np.array_equal(pixels(tmp_path / "files.png"), pixels(tmp_path / "folder.png"))


def test_a_new_folder_is_made(zimage, model, tmp_path):
    words = ("generate", "a", "--model", model, *SMALL, "--seed", 3)
    assert zimage(*words, "-o", f"{tmp_path}/new/deep/").status == 0
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["zimage-3.png"]
    (tmp_path / "file").write_text("x")
    assert "file" in zimage(*words, "-o", f"{tmp_path}/file/").error
    assert "use new.png, or new.jpg/ for a new folder" in zimage(*words, "-o", "new.jpg").error


def test_image_i_is_made_from_seed_plus_i(zimage, model, tmp_path):
    zimage("generate", "a", "--model", model, *SMALL, "--seed", 7, "-n", 3, "-o", tmp_path / "n.png")
    zimage("generate", "a", "--model", model, *SMALL, "--seed", 9, "-o", tmp_path / "alone.png")
    assert sorted(p.name for p in tmp_path.glob("n-*")) == ["n-1.png", "n-2.png", "n-3.png"]
    assert np.array_equal(pixels(tmp_path / "n-3.png"), pixels(tmp_path / "alone.png"))


def test_prompts_come_from_a_file_one_a_line(zimage, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffred circle\r\n\n 蓝色方形 \n".encode())
    out = tmp_path / "out"
    out.mkdir()
    outcome = zimage("generate", "--prompts", prompts, "--model", model, *SMALL, "--seed", 1, "-o", out)
    assert outcome.out.splitlines() == [f"{out}/zimage-1.png", f"{out}/zimage-2.png"]
    found = [read_metadata(out / f"zimage-{i}.png").settings["prompt"] for i in (1, 2)]
    assert found == ["red circle", "蓝色方形"]


def test_only_line_ends_separate_prompts(tmp_path):
    """Other characters that end a line for `str.splitlines` occur within prompts copied from elsewhere."""
    inside = "a fox\u2028in\u2029the\x85snow\x0bat\x0cnight\x1cor\x1dby\x1eday"
    (tmp_path / "p.txt").write_bytes(f"\ufeffone\r\n{inside}\rthree\n\n \t\nfour".encode())
    assert read_prompts(str(tmp_path / "p.txt")) == ["one", inside, "three", "four"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["p.txt", "-"])
def test_a_text_in_another_encoding_is_named(zimage, tmp_path, monkeypatch, encoding, name):
    monkeypatch.chdir(tmp_path)
    data = "a red circle\n红\n".encode(encoding)
    (tmp_path / "p.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    outcome = zimage("generate", "--prompts", name)
    assert outcome.status == 1
    assert "UTF-16" in outcome.error
    assert "save it as UTF-8" in outcome.error


@pytest.mark.parametrize("words", [["-"], ["--prompt", "-"]])
def test_a_prompt_comes_from_standard_input(zimage, model, tmp_path, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("два слова\n".encode())))
    outcome = zimage("generate", *words, "--model", model, *SMALL, "-o", tmp_path / "a.png")
    assert outcome.status == 0
    assert read_metadata(tmp_path / "a.png").settings["prompt"] == "два слова"


def test_json_tells_how_it_was_made(zimage, model, tmp_path):
    outcome = zimage(
        "generate", "a", "--model", model, *SMALL, "--cfg", 1.5, "-o", tmp_path / "a.png", "--json"
    )
    (record,) = json.loads(outcome.out)
    assert record["path"] == str(tmp_path / "a.png")
    assert record["settings"]["guidance_scale"] == 0.5
    assert record["settings"]["seed"] == record["seed"] < 2**32
    assert len(record["sigmas"]) == 3
    assert len(record["seconds"]["steps"]) == 2
    assert record["peak_memory_bytes"] > 0
    assert outcome.err.count("\n") == 1, "guidance on a distilled checkpoint warns in one line"
    assert outcome.err.startswith("warning: --guidance 0.5 ")


def test_without_a_seed_two_runs_differ(zimage, model, tmp_path):
    for name in "ab":
        zimage("generate", "a", "--model", model, *SMALL, "-o", tmp_path / f"{name}.png")
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_no_metadata_writes_none(zimage, model, tmp_path):
    zimage("generate", "secret", "--model", model, *SMALL, "-o", tmp_path / "a.png", "--no-metadata")
    assert read_metadata(tmp_path / "a.png").text == {}
    assert b"secret" not in (tmp_path / "a.png").read_bytes()


def test_progress_goes_to_stderr_with_the_time_of_a_step(zimage, model, tmp_path):
    outcome = zimage("generate", "a", "--model", model, *SMALL[:-1], "-o", tmp_path / "a.png")
    assert "2/2 steps" in outcome.err
    assert "s a step" in outcome.err
    assert "\r" not in outcome.err, "not a terminal: no line is redrawn"


def test_a_file_that_exists_stays_as_it_is_without_force(zimage, model, tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"precious")
    outcome = zimage("generate", "a", "--model", "no-such-folder", *SMALL, "-o", target)
    assert outcome.status == 1
    assert "exists already" in outcome.error, "found out before a model is looked for"
    assert target.read_bytes() == b"precious"
    assert zimage("generate", "a", "--model", model, *SMALL, "-o", target, "--force").status == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_names_of_our_own_choice_never_collide(zimage, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [zimage("generate", "a", "--model", model, *SMALL, "--seed", 1).out.strip() for _ in range(3)]
    assert names == ["zimage-1.png", "zimage-1-2.png", "zimage-1-3.png"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "give one prompt"),
        (["a", "--prompts", "b"], "give one prompt"),
        (["a", "-W", 33], "32 and 48"),
        (["a", "-H", 0], "--height: got 0"),
        (["a", "-W", "1e3"], "--width"),
        (["a", "--steps", 0], "--steps: got 0"),
        (["a", "--steps", -1], "steps"),
        (["a", "--guidance", "nan"], "--guidance: got"),
        (["a", "--guidance", "inf"], "guidance"),
        (["a", "--cfg", 0.5], "--cfg: got"),
        (["a", "--cfg", 2, "--guidance", 1], "--guidance"),
        (["a", "--seed", -1], "--seed: got -1"),
        (["a", "--seed", 2**64], "seed"),
        (["a", "--max-length", 0], "--max-length: got 0"),
        (["a", "--vram", "6GiB", "--device", "cpu"], "give --ram alone, such as --ram 4GiB"),
        (["a", "--ram", "lots"], "--ram: got lots"),
        (["a", "-n", 0], "--count: got 0"),
        (["a", "-o", "a.jpg"], ".png"),
        (["a", "--dtype", "int8"], "--dtype"),
        (["a", "--device", "quantum"], "--device: got 'quantum'"),
        (["a\0b"], "NUL"),
        (["a" * 20_000], "16384"),
        (["\udc80"], "surrogate"),
        (["a", "--bogus"], "--bogus"),
        (["a", "--seed", "9" * 5000], "--seed"),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(zimage, model, tmp_path, monkeypatch, words, what):
    monkeypatch.chdir(tmp_path)
    outcome = zimage("generate", *words, "--model", model)
    assert outcome.status == 2
    assert what in outcome.error
    assert len(outcome.error) < 600
    assert list(tmp_path.iterdir()) == []


def test_one_part_alone_cannot_draw(zimage, model):
    outcome = zimage("generate", "a", "--transformer", model / "transformer")
    assert outcome.status == 2
    assert "--text-encoder and --vae" in outcome.error


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--prompts", "no-such-file"], "no-such-file"),
        (["-o", "no-such-folder/a.png"], "folder does not exist"),
        (["-o", "/dev/null/a.png"], "/dev/null"),
    ],
)
def test_what_fails_is_one_line_and_not_status_0(zimage, model, tmp_path, monkeypatch, words, what):
    monkeypatch.chdir(tmp_path)
    prompt = [] if "--prompts" in words else ["a"]
    chosen = [] if "--model" in words else ["--model", model]
    outcome = zimage("generate", *prompt, *words, *chosen, *SMALL)
    assert outcome.status in (1, 2)
    assert what in outcome.error


def test_a_wrong_model_names_what_it_is_and_what_to_get(zimage, model):
    swapped = (
        "--transformer",
        model / "vae",
        "--text-encoder",
        model / "text_encoder",
        "--vae",
        model / "vae",
    )
    outcome = zimage("generate", "a", *swapped)
    assert outcome.status == 1
    assert "VAE" in outcome.error
    assert "Z-Image" in outcome.error


def test_prompts_without_a_prompt_are_refused(zimage, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert zimage("generate", "--prompts", tmp_path / "empty.txt").status == 2
    (tmp_path / "binary.txt").write_bytes(b"a\xff\xfe\n")
    outcome = zimage("generate", "--prompts", tmp_path / "binary.txt")
    assert outcome.status == 1
    assert "UTF-8" in outcome.error


def test_a_prompt_may_be_named(zimage, model, tmp_path):
    outcome = zimage("generate", "--prompt", "a cat", "--model", model, *SMALL, "-o", tmp_path / "a.png")
    assert outcome.status == 0, outcome.err
    assert read_metadata(tmp_path / "a.png").settings["prompt"] == "a cat"
    assert zimage("generate", "--promp", "a cat").status == 2, "a shortened option is not guessed"


def test_seeds_go_on_from_zero_after_the_last(zimage, model, tmp_path):
    last = 2**64 - 1
    outcome = zimage("generate", "a", "-n", 2, "--model", model, *SMALL, "--seed", last, "-o", tmp_path)
    assert [p.rpartition("-")[2] for p in outcome.out.split()] == [f"{last}.png", "0.png"]


def test_what_was_drawn_before_a_failure_is_in_the_json(zimage, model, tmp_path, monkeypatch):
    draw, calls = ZImagePipeline.__call__, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise BadFile("x", "gone")
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(ZImagePipeline, "__call__", failing)
    outcome = zimage("generate", "a", "-n", 2, "--json", "--model", model, *SMALL, "-o", tmp_path / "a.png")
    assert outcome.status == 1
    assert [r["path"] for r in json.loads(outcome.out)] == [str(tmp_path / "a-1.png")]


def test_an_empty_standard_input_is_no_prompt(zimage, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "standard input is empty" in zimage("generate", "-").error


def test_a_folder_that_cannot_be_written_is_found_before_drawing(zimage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zimage-1.png").mkdir()
    monkeypatch.setattr("zimage_core.cli.generate.load_pipeline", lambda _: pytest.fail("loaded"))
    outcome = zimage("generate", "a", "--seed", 1, "--force")
    assert outcome.status == 1


def test_a_cut_prompt_is_said_and_how_to_keep_it(zimage, model, tmp_path):
    words = ("generate", "a " * 600, "--model", model, *SMALL)
    outcome = zimage(*words, "-o", tmp_path / "a.png")
    assert outcome.err.startswith("warning: the prompt has ")
    assert len(outcome.err) < 1100, "a long text loses its middle"
    assert outcome.err.rstrip().endswith("raise --max-length (up to 1504)")
    assert zimage(*words, "--max-length", 1504, "-o", tmp_path / "b.png").err == ""

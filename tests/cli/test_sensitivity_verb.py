"""`zimage sensitivity`, and what `zimage quantize` makes of it."""

from __future__ import annotations

import json

import pytest

from tests.helpers import tiny
from zimage_core.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("verb") / "tiny")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\ntwo stars\n")
    return path


def measure(folder, prompts, out, *words):
    small = ["-W", "32", "-H", "32", "--steps", "2", "--every", "1", "--quiet"]
    named = ["--prompts", str(prompts), "--model", str(folder), "-o", str(out)]
    return main(["sensitivity", *named, *small, *words])


def test_measure_choose_write(folder, prompts, tmp_path, capsys):
    out, recipe = tmp_path / "s.json", tmp_path / "r.txt"
    assert measure(folder, prompts, out, "--types", "Q4_0, Q8_0") == 0
    assert "12 tensors, 2 types" in capsys.readouterr().out
    assert json.loads(out.read_text())["settings"]["images"] == 2
    assert main(["quantize", str(folder), str(tmp_path / "8.gguf"), "--type", "Q8_0", "--quiet"]) == 0
    size = (tmp_path / "8.gguf").stat().st_size - 1000
    words = ["quantize", str(folder), str(tmp_path / "a.gguf"), "--quiet", "--sensitivity", str(out)]
    assert main([*words, "--size", str(size), "--write-recipe", str(recipe)]) == 0
    text = recipe.read_text()
    assert "by measured costs" in text
    assert main(["quantize", str(folder), str(tmp_path / "b.gguf"), "--recipe", str(recipe), "--quiet"]) == 0
    a, b = ((tmp_path / name).stat().st_size for name in ("a.gguf", "b.gguf"))
    assert abs(a - b) < 2000, "the same types; names in the header differ"
    assert a <= size


def test_a_card_instead_of_a_size(folder, tmp_path, capsys):
    words = ["quantize", str(folder), str(tmp_path / "a.gguf"), "--quiet"]
    assert main([*words, "--fit", "1GiB", "-W", "64", "-H", "64"]) == 0
    assert "F16" in capsys.readouterr().out, "this model fits as it is"
    assert main([*words, "--fit", "100kB", "--force"]) == 1
    assert "do not hold the steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--types", "Q4_0,Q9"], "unknown type 'Q9'"),
        (["--probe", "none"], "unknown type 'none'"),
        (["--every", "0"], "every"),
        (["--imatrix", "/nowhere"], "nowhere"),
    ],
)
def test_wrong_options(folder, prompts, tmp_path, capsys, words, message):
    assert measure(folder, prompts, tmp_path / "s.json", *words) in (1, 2)
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "s.json").exists()


def test_an_existing_file_is_kept(folder, prompts, tmp_path, capsys):
    out = tmp_path / "s.json"
    out.write_text("mine")
    assert measure(folder, prompts, out) == 1
    assert out.read_text() == "mine"
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["--vram", "--ram"])
def test_a_memory_limit_is_refused(folder, prompts, tmp_path, capsys, limit):
    assert measure(folder, prompts, tmp_path / "s.json", limit, "4GiB") == 2
    assert "leave out --vram and --ram" in capsys.readouterr().err


def test_a_partial_file_grows_and_is_read_like_a_whole_one(folder, prompts, tmp_path, monkeypatch):
    from zimage_core.export.sensitivity import read_sensitivity
    from zimage_core.study import sensitivity

    real, count = sensitivity.velocity_error, 0

    def stops(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sensitivity, "velocity_error", stops)
    out = tmp_path / "s.json"
    assert measure(folder, prompts, out, "--types", "Q8_0", "--partial") == 130
    assert len(read_sensitivity(out).costs) == 3
    count = 0
    assert measure(folder, prompts, tmp_path / "t.json", "--types", "Q8_0") == 130
    assert not (tmp_path / "t.json").exists()


def test_fit_is_for_transformers(folder, tmp_path, capsys):
    words = ["quantize", str(folder), str(tmp_path / "a.gguf"), "--fit", "1GiB", "--quiet"]
    assert main([*words, "--component", "text_encoder"]) == 2
    assert "give --size" in capsys.readouterr().err

"""`zimage sensitivity`, and what `zimage quantize` makes of it."""

from __future__ import annotations

import json

import pytest

SMALL = ("-W", 32, "-H", 32, "--steps", 2, "--every", 1, "--quiet")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\ntwo stars\n")
    return path


@pytest.fixture
def measure(zimage, model, prompts):
    """The verb on the tiny model: the file to write, options -> the outcome."""

    def run(out, *words):
        return zimage("sensitivity", "--prompts", prompts, "--model", model, "-o", out, *SMALL, *words)

    return run


def test_measure_choose_write(zimage, model, measure, tmp_path):
    out, recipe = tmp_path / "s.json", tmp_path / "r.txt"
    outcome = measure(out, "--types", "Q4_0, Q8_0")
    assert outcome.status == 0
    assert "12 tensors, 2 types" in outcome.out
    assert json.loads(out.read_text())["settings"]["images"] == 2

    def size(name, *words):
        assert zimage("quantize", model, tmp_path / name, "--quiet", *words).status == 0
        return (tmp_path / name).stat().st_size

    most = size("8.gguf", "--type", "Q8_0") - 1000
    a = size("a.gguf", "--sensitivity", out, "--size", most, "--write-recipe", recipe)
    assert "by measured costs" in recipe.read_text()
    assert abs(a - size("b.gguf", "--recipe", recipe)) < 2000, "the same types; names in the header differ"
    assert a <= most


def test_a_card_instead_of_a_size(zimage, model, tmp_path):
    words = ("quantize", model, tmp_path / "a.gguf", "--quiet")
    outcome = zimage(*words, "--fit", "1GiB", "-W", 64, "-H", 64)
    assert outcome.status == 0
    assert "F16" in outcome.out, "this model fits as it is"
    outcome = zimage(*words, "--fit", "100kB", "--force")
    assert outcome.status == 1
    assert "do not hold the steps" in outcome.error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--types", "Q4_0,Q9"], "unknown type 'Q9'"),
        (["--probe", "none"], "unknown type 'none'"),
        (["--every", "0"], "every"),
        (["--imatrix", "/nowhere"], "nowhere"),
        (["--vram", "4GiB"], "leave out --vram and --ram"),
        (["--ram", "4GiB"], "leave out --vram and --ram"),
        (["--seed", -1], "seed"),
        (["--negative", "a\0b"], "NUL"),
    ],
)
def test_wrong_options(measure, tmp_path, words, message):
    outcome = measure(tmp_path / "s.json", *words)
    assert outcome.status in (1, 2)
    assert message in outcome.error
    assert not (tmp_path / "s.json").exists()


def test_an_imatrix_of_another_model_is_refused_before_anything_is_drawn(measure, tmp_path, monkeypatch):
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.quantize.imatrix import flat, write_imatrix

    monkeypatch.setattr(ZImagePipeline, "__call__", lambda *words, **options: pytest.fail("drawn"))
    write_imatrix(tmp_path / "other.gguf", flat({"layers.0.attention.qkv.weight": 48}))
    outcome = measure(tmp_path / "s.json", "--imatrix", tmp_path / "other.gguf", "--quiet")
    assert "this is the imatrix of another model" in outcome.error
    monkeypatch.setattr("zimage_core.cli.sensitivity.load_pipeline", lambda _: pytest.fail("loaded"))
    assert "height" in measure(tmp_path / "s.json", "-H", 50).error


def test_an_existing_file_is_kept(measure, tmp_path):
    out = tmp_path / "s.json"
    out.write_text("mine")
    outcome = measure(out)
    assert outcome.status == 1
    assert out.read_text() == "mine"
    assert "exists" in outcome.error


def test_a_partial_file_grows_and_is_read_like_a_whole_one(measure, tmp_path, monkeypatch):
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
    assert measure(out, "--types", "Q8_0", "--partial").status == 130
    assert len(read_sensitivity(out).costs) == 3
    count = 0
    assert measure(tmp_path / "t.json", "--types", "Q8_0").status == 130
    assert not (tmp_path / "t.json").exists()


def test_fit_is_for_transformers(zimage, model, tmp_path):
    words = ("quantize", model, tmp_path / "a.gguf", "--fit", "1GiB", "--quiet")
    outcome = zimage(*words, "--component", "text_encoder")
    assert outcome.status == 2
    assert "give --size" in outcome.error

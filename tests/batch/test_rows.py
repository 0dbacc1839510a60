"""Rows are checked as the call checks its arguments, and named by what decides their image."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from zimage_core.batch import columns
from zimage_core.batch.model import Model
from zimage_core.batch.rows import Context, read_rows, sealed
from zimage_core.batch.tables import Raw, given_rows
from zimage_core.cli import generate
from zimage_core.cli.messages import option_names
from zimage_core.run.request import Request

LIMITS = Model.of({}).survey().limits


def read(rows, folder=Path(), text=False, **others):
    context = Context(LIMITS, folder=folder, **others)
    return read_rows([replace(raw, text=text) for raw in given_rows(rows)], context)


def row(cells, **others):
    rows, faults = read([{"prompt": "a", **cells}], **others)
    assert not faults.count, faults.listed
    return rows[0]


def fault(cells, **others):
    rows, faults = read([cells], **others)
    assert not rows
    return faults.listed[0][1]


def test_every_argument_of_a_call_is_a_column_or_stated_to_be_none():
    names = {field.name for field in fields(Request)}
    assert set(columns.KINDS) | columns.NOT_COLUMNS == names
    assert not set(columns.KINDS) & columns.NOT_COLUMNS


def test_columns_have_the_names_of_the_options_too():
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers(), argparse.ArgumentParser(add_help=False))
    options = option_names(parser._subparsers._group_actions[0].choices["generate"])
    for name, option in options.items():
        if name in columns.KINDS:
            assert columns.argument(option.removeprefix("--")) == name
    for alias, name in columns.ALIASES.items():
        assert options[name] == f"--{alias.replace('_', '-')}"


def test_text_and_numbers_give_the_same_call():
    cells = {"steps": 4, "guidance_scale": 2, "outpaint": [64, 0, 0, 0], "seed": 7, "enable_thinking": False}
    texts = {"steps": "4", "guidance_scale": "2.0", "outpaint": "64,0,0,0", "seed": "7.0"}
    folder = pictures("x.png")
    typed = row({**cells, "image": "x.png", "cfg_truncation": 1.0}, folder=folder)
    others = {"enable_thinking": "False", "image": " x.png", "cfg_truncation": "1"}
    text = row({**texts, **others}, folder=folder, text=True)
    assert (typed.call, typed.key) == (text.call, text.key)
    assert typed.call["num_inference_steps"] == 4
    assert isinstance(typed.call["guidance_scale"], float)


def pictures(*names, value=7):
    import tempfile

    folder = Path(tempfile.mkdtemp())
    for name in names:
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(folder / name)
    return folder


BAD = {
    "no prompt": ({}, "prompt"),
    "prompt": ({"prompt": 5}, "wanted text"),
    "long prompt": ({"prompt": "a" * 20_000}, "20000 bytes"),
    "NUL": ({"prompt": "a\0"}, "NUL"),
    "surrogate": ({"prompt": "\ud800"}, "prompt"),
    "column": ({"prompt": "a", "heigth": 32}, "did you mean height?"),
    "twice": ({"prompt": "a", "negative": "b", "negative_prompt": "c"}, "one argument"),
    "seed": ({"prompt": "a", "seed": -1}, "seed"),
    "huge seed": ({"prompt": "a", "seed": 10**5000}, "bits"),
    "text seed": ({"prompt": "a", "seed": "5"}, "seed"),
    "true seed": ({"prompt": "a", "seed": True}, "seed"),
    "fraction": ({"prompt": "a", "steps": 1.5}, "num_inference_steps"),
    "steps": ({"prompt": "a", "steps": 0}, "num_inference_steps"),
    "width": ({"prompt": "a", "width": 100}, "multiple of 16"),
    "large": ({"prompt": "a", "width": 1 << 20}, "width"),
    "NaN": ({"prompt": "a", "guidance": float("nan")}, "guidance_scale"),
    "both scales": ({"prompt": "a", "cfg": 2, "guidance": 1}, "give one"),
    "sampler": ({"prompt": "a", "sampler": "eular"}, "sampler"),
    "strength alone": ({"prompt": "a", "strength": 0.5}, "it needs image"),
    "no image": ({"prompt": "a", "image": "none.png"}, "none.png"),
    "not an image": ({"prompt": "a", "image": "bad.png"}, "is no image"),
    "image of a kind": ({"prompt": "a", "image": 5}, "wanted the path"),
    "lora": ({"prompt": "a", "lora": "none.safetensors"}, "there is no such file"),
    "weight": ({"prompt": "a", "lora": "outline:1000"}, "lora"),
    "lora kind": ({"prompt": "a", "lora": 5}, "lora"),
    "control number": ({"prompt": "a", "control_scale": 1}, "it needs control_image"),
    "nested": ({"prompt": "a", "seed": {"a": 1}}, "seed"),
    "list": ({"prompt": ["a", "b"]}, "wanted text"),
    "sigmas": ({"prompt": "a", "sigmas": "x"}, "sigmas"),
    "template": ({"prompt": "a", "prompt_template": 5}, "wanted text"),
}


@pytest.mark.parametrize(("cells", "words"), BAD.values(), ids=BAD)
def test_a_bad_row_is_one_sentence(cells, words, tmp_path):
    (tmp_path / "bad.png").write_text("no")
    found = fault(cells, folder=tmp_path)
    assert words in found
    assert "\n" not in found
    assert len(found) < 600


def test_bad_rows_are_numbered_and_counted():
    rows, faults = read([{"prompt": "a"}, {}, {"prompt": "b"}, "text", {3: 4}])
    assert [each.number for each in rows] == [1, 3]
    assert ([number for number, _ in faults.listed], faults.count) == ([2, 4, 5], 3)
    rows, faults = read([{}] * 1500)
    assert (len(faults.listed), faults.count) == (1000, 1500)


def test_a_model_says_what_it_cannot_take(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    found = fault({"prompt": "a", "control": "a.png"}, folder=tmp_path, extras={"control_image": "no net"})
    assert found == "no net"


def test_options_are_defaults_for_rows():
    assert row({}, defaults={"guidance_scale": 2.0, "width": 64}).call["width"] == 64
    assert row({"width": 32}, defaults={"width": 64}).call["width"] == 32
    assert "guidance_scale" not in row({"cfg": 3}, defaults={"guidance_scale": 2.0}).call


def test_kept_columns_go_beside_the_call():
    found = row({"id": 5, "when": {1, 2}}, keep=("id", "when"))
    assert found.kept == {"id": 5, "when": "{1, 2}"}
    assert found.key == row({}).key


def test_adapters_are_files_with_weights(tmp_path):
    (tmp_path / "a:1").write_bytes(Path("zimage_core/assets/nano/outline.safetensors").read_bytes())
    cases = {"outline": [1.0], "outline:0.5": [0.5], "a:1": [1.0]}
    lists = [(["outline", "a:1:2"], [1.0, 2.0]), (["outline", 0.25], [0.25]), ([["outline", 3]], [3.0])]
    for cell, weights in (*cases.items(), *lists):
        assert [weight for _, weight in row({"lora": cell}, folder=tmp_path).loras] == weights
    assert len(row({"lora": "outline:0.5; a:1"}, folder=tmp_path, text=True).loras) == 2


# --- keys and seeds ---

CELLS = st.fixed_dictionaries(
    {"prompt": st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20)},
    optional={
        "seed": st.integers(0, 2**64 - 1),
        "steps": st.integers(1, 50),
        "guidance": st.floats(0, 30, allow_nan=False),
        "negative": st.sampled_from(["", "x", "ß"]),
        "sampler": st.sampled_from(["euler", "heun"]),
    },
)


@given(st.lists(CELLS, min_size=1, max_size=8), st.randoms())
def test_keys_and_seeds_do_not_depend_on_the_order(rows, random):
    def images(table):
        return sorted((each.key, each.call["seed"]) for each in read(table)[0])

    moved = list(rows)
    random.shuffle(moved)
    moved = [dict(sorted(each.items(), key=lambda _: random.random())) for each in moved]
    assert images(moved) == images(rows)


@given(CELLS, CELLS)
def test_rows_have_one_key_exactly_if_their_calls_are_equal(first, second):
    a, b = row(first), row(second)
    defaults = {field.name: field.default for field in fields(Request)}
    calls = [{n: v for n, v in each.call.items() if v != defaults[n]} for each in (a, b)]
    assert (a.key == b.key) == (calls[0] == calls[1])


def test_equal_rows_without_seeds_get_seeds_of_their_own():
    rows, _ = read([{"prompt": "a"}] * 3 + [{"prompt": "b"}])
    assert len({each.call["seed"] for each in rows}) == 4
    assert len({each.key for each in rows}) == 4


def test_a_seed_does_not_depend_on_options():
    assert row({}).call["seed"] == row({}, defaults={"num_inference_steps": 4}).call["seed"]
    assert row({}).key != row({}, defaults={"num_inference_steps": 4}).key


def test_the_contents_of_an_image_count_and_not_its_name():
    first, same, other = pictures("a.png"), pictures("b.png"), pictures("a.png", value=8)
    keys = [row({"image": name, "seed": 1}, folder=folder).key
            for folder, name in ((first, "a.png"), (same, "b.png"), (other, "a.png"))]  # fmt: skip
    assert keys[0] == keys[1] != keys[2]
    assert (
        row({"image": "a.png"}, folder=first).call["seed"]
        == row({"image": "b.png"}, folder=same).call["seed"]
    )


def test_the_model_counts():
    rows, _ = read([{"prompt": "a"}, {"prompt": "b"}])
    first, second = (sealed(rows, {"files": {"transformer": {"sha256": digit}}}) for digit in "ab")
    assert {each.key for each in first}.isdisjoint(each.key for each in second)
    assert first == sealed(rows, {"files": {"transformer": {"sha256": "a"}}})


def test_a_row_tells_its_fault():
    assert read_rows([Raw(7, {}, "is broken")], Context(LIMITS))[1].listed == [(7, "is broken")]


@pytest.mark.parametrize("seed", ["--5", "+-5", "+", "1_0", "5 5"])
def test_text_that_is_no_number_is_a_fault_of_its_row(seed):
    rows, faults = read([{"prompt": "a", "seed": seed}], text=True)
    assert not rows
    assert faults.listed[0][1].startswith("seed: got ")

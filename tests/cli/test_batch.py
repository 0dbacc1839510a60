"""`zimage batch IN OUT` draws a table, says what failed, and goes on after an interruption."""

from __future__ import annotations

import json

import pytest

from zimage_core.batch import shards
from zimage_core.batch.dataset import SHARD_SIZE
from zimage_core.cli import batch
from zimage_core.cli.main import build_parser
from zimage_core.errors import NonFinite
from zimage_core.pipeline import ZImagePipeline

SMALL = ("-W", 32, "-H", 32, "--steps", 1, "--threads", 1)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,seed,id\nred circle,5,a\nblue ring,6,b\n")
    return path


def test_an_image_is_that_of_generate(zimage, table, tmp_path):
    outcome = zimage("batch", table, tmp_path / "out", *SMALL, "--keep", "id")
    assert (outcome.status, outcome.out) == (0, f"{tmp_path / 'out'}\n")
    assert "2 images made" in outcome.err.splitlines()[-1]
    zimage("generate", "red circle", "--seed", 5, *SMALL[:-2], "-o", tmp_path / "one.png")
    records = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [record["columns"] for record in records] == [{"id": "a"}, {"id": "b"}]
    assert (tmp_path / "out" / records[0]["file"]).read_bytes() == (tmp_path / "one.png").read_bytes()


def test_the_report_as_json(zimage, table, tmp_path):
    words = ("batch", table, tmp_path / "out", *SMALL, "--keep", "id", "--json", "--quiet")
    outcome = zimage(*words, "--limit", 1)
    assert outcome.err == ""
    found = json.loads(outcome.out)
    assert (found["rows"], found["made"], found["skipped"], found["failed"]) == (1, 1, 0, [])
    found = json.loads(zimage(*words).out)
    assert (found["made"], found["skipped"]) == (1, 1)


def test_bad_rows_are_listed_and_nothing_is_drawn(zimage, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + '{"prompt": "a", "seed": -1}\n' * 12)
    outcome = zimage("batch", path, tmp_path / "out")
    lines = outcome.err.splitlines()
    assert outcome.status == 2
    assert lines[0].startswith("row 2: seed: got -1")
    assert (len(lines), lines[-1].count("12 rows cannot be drawn")) == (11, 1)
    assert not (tmp_path / "out").exists()
    outcome = zimage("batch", path, tmp_path / "out", "--skip-bad", *SMALL)
    assert outcome.status == 0
    assert "row 2 left out: seed" in outcome.err
    assert "2 more rows left out" in outcome.err


def test_a_row_that_fails_makes_the_status_one(zimage, table, tmp_path, monkeypatch):
    def call(self, **words):
        raise NonFinite("it is not finite")

    monkeypatch.setattr(ZImagePipeline, "__call__", call)
    outcome = zimage("batch", table, tmp_path / "out", *SMALL, "--keep", "id")
    assert outcome.status == 1
    assert "row 1 failed: it is not finite" in outcome.err
    assert "2 failed (see" in outcome.err
    assert len((tmp_path / "out" / "failures.jsonl").read_text().splitlines()) == 2


def test_an_interruption_says_how_to_go_on(zimage, table, tmp_path, monkeypatch):
    def call(self, **words):
        raise KeyboardInterrupt

    words = ("batch", table, tmp_path / "out", *SMALL, "--keep", "id")
    with monkeypatch.context() as patch:
        patch.setattr(ZImagePipeline, "__call__", call)
        outcome = zimage(*words)
    assert outcome.status == 130
    assert "the same command goes on from there" in outcome.err
    assert zimage(*words).status == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("none.jsonl", "out"), "there is no such file"),
        (("rows.csv", "out"), "column 'id' is no argument of a call"),
        (("rows.csv", "out", "--keep", "id", "--workers", 2), "--workers"),
        (("rows.csv", "out", "--keep", "id", "--threads", 0), "--threads"),
        (("rows.csv", "out", "--keep", "id", "--steps", 0), "num_inference_steps"),
        (("rows.csv", "rows.csv", "--keep", "id"), "is a file"),
    ],
)
def test_a_wrong_command_is_a_line(zimage, table, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    outcome = zimage("batch", *words)
    assert outcome.status in (1, 2)
    assert text in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_the_defaults_of_the_parser_are_those_of_the_room():
    assert batch.FORMATS == shards.FORMATS
    args = build_parser().parse_args(["batch", "rows.csv", "out"])
    assert args.shard_size == SHARD_SIZE

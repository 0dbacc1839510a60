"""Tables of every kind give the same rows; what is wrong with a row is told of that row alone."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import threading

import pyarrow
import pytest
from pyarrow import parquet

from zimage_core.batch import tables
from zimage_core.batch.tables import read_table
from zimage_core.errors import BadFile, Unsupported

ROWS = [{"prompt": "a red, round\ncircle", "seed": 5}, {"prompt": "红色", "seed": 2**64 - 1}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def faults(path):
    return {raw.number: raw.fault for raw in read_table(path) if raw.fault}


def test_every_kind_of_table_gives_the_same_rows(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    csv = write(tmp_path / "a.csv", f'prompt,seed\r\n"{ROWS[0]["prompt"]}",5\r\n红色,{2**64 - 1}\r\n')
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), tmp_path / "a.parquet")
    assert [raw.cells for raw in read_table(jsonl)] == ROWS
    assert [raw.cells for raw in read_table(tmp_path / "a.parquet")] == ROWS[:1]
    found = list(read_table(csv))
    assert [raw.cells for raw in found] == [{**row, "seed": str(row["seed"])} for row in ROWS]
    assert all(raw.text for raw in found)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.list"])
def test_text_has_a_prompt_a_line_and_numbers_of_lines(tmp_path, name):
    path = write(tmp_path / name, b"\xef\xbb\xbfa cat\r\n\r\n  a dog \n")
    assert [(raw.number, raw.cells) for raw in read_table(path)] == [
        (1, {"prompt": "a cat"}),
        (3, {"prompt": "a dog"}),
    ]


def test_the_first_bytes_decide_where_the_name_does_not(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), tmp_path / "rows")
    assert [raw.cells for raw in read_table(tmp_path / "rows")] == ROWS[:1]
    path = write(tmp_path / "other", b'\xef\xbb\xbf\n{"prompt": "a"}\n')
    assert [(raw.number, raw.cells) for raw in read_table(path)] == [(2, {"prompt": "a"})]


def test_standard_input_and_pipes_are_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n')))
    assert [raw.cells for raw in read_table("-")] == [{"prompt": "a"}]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=("a cat\n",))
    writer.start()
    assert [raw.cells for raw in read_table(fifo)] == [{"prompt": "a cat"}]
    writer.join()


def test_empty_cells_are_no_arguments(tmp_path):
    assert next(iter(read_table(write(tmp_path / "a.csv", "prompt,seed,width\na,, 32 \n")))).cells == {
        "prompt": "a",
        "width": " 32 ",
    }
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", "seed": null}')
    assert next(iter(read_table(path))).cells == {"prompt": "a"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_header_shows_what_separates_cells(tmp_path, delimiter):
    path = write(tmp_path / "a.csv", f"prompt{delimiter}seed\na{delimiter}1\n")
    assert next(iter(read_table(path))).cells == {"prompt": "a", "seed": "1"}


BAD_JSON = {
    "not JSON": b"{prompt: 1}",
    "not an object": b"[1]",
    "NaN": b'{"prompt": "a", "guidance_scale": NaN}',
    "infinity": b'{"prompt": "a", "shift": -Infinity}',
    "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "depth": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"prompt": "\xff"}',
    "NUL": b'{"prompt": "a\0"}',
}


@pytest.mark.parametrize("line", BAD_JSON.values(), ids=BAD_JSON)
def test_a_bad_line_of_json_costs_no_other(tmp_path, line):
    path = write(tmp_path / "a.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    found = list(read_table(path))
    assert [raw.number for raw in found] == [1, 2, 3]
    assert [bool(raw.fault) for raw in found] == [False, True, False]
    assert len(found[1].fault) < 300
    assert "\n" not in found[1].fault


BAD_CSV = {
    "ragged": b"a,1,2",
    "short": b"a",
    "not UTF-8": b"\xff,1",
    "NUL": b"a\0,1",
    "quotes": b'"a"b,1',
    "large cell": b"a" * 200_000 + b",1",
}


@pytest.mark.parametrize("line", BAD_CSV.values(), ids=BAD_CSV)
def test_a_bad_record_of_csv_costs_no_other(tmp_path, line):
    path = write(tmp_path / "a.csv", b"prompt,seed\na,1\n" + line + b"\nb,2\n")
    assert list(faults(path)) == [2]
    assert {raw.number: raw.cells.get("prompt") for raw in read_table(path) if not raw.fault} == {
        1: "a",
        3: "b",
    }


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.json", b'[{"prompt": "a"}]', "jq -c"),
        ("a.csv", b"prompt,prompt\na,b\n", "twice"),
        ("a.csv", b"prompt,steps,num_inference_steps\n", "one argument"),
        ("a.csv", b"prompt,sede\n", "did you mean seed?"),
        ("a.csv", b"\n\n", "no header"),
        ("a.parquet", b"PAR1 and nothing else", "no sound Parquet"),
        ("a.jsonl", b'{"prompt": "' + b"a" * (1 << 20), "more than 1048576 bytes"),
        ("a.txt", b"a" * (2 << 20), "more than 1048576 bytes"),
        ("a.csv", b"prompt\n" + b"a" * (2 << 20), "more than 1048576 bytes"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_one_sentence(tmp_path, name, data, words):
    with pytest.raises(BadFile, match="a\\.") as caught:
        list(read_table(write(tmp_path / name, data)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl", "a\0b"):
        with pytest.raises(BadFile):
            list(read_table(path))


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Unsupported, match=r"zimage-core\[parquet\]"):
        list(read_table(tmp_path / "a.parquet"))


def test_a_large_table_is_read_row_by_row(tmp_path, monkeypatch):
    """The reader asks for one row at a time, so its memory does not grow with the table."""
    path = write(tmp_path / "a.jsonl", b'{"prompt": "a"}\n' * 1000)
    asked = []
    lines = tables._lines
    monkeypatch.setattr(tables, "_lines", lambda *a: (asked.append(n) or (n, line) for n, line in lines(*a)))
    next(iter(read_table(path)))
    assert asked == [1]


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}'), "is compressed by gzip"),
        ("a.xlsx", b"PK\3\4" + bytes(9), "is a ZIP archive or a spreadsheet of Excel"),
        ("a.csv", "prompt,seed\na,5\n".encode("utf-16"), "is text in UTF-16"),
        ("a.txt", "a cat\n".encode("utf-16"), "is text in UTF-16"),
        ("b.csv", b"pr\xffmpt,seed\na,5\n", "its header is not text in UTF-8"),
    ],
)
def test_another_kind_of_file_is_named_once_and_not_row_by_row(tmp_path, name, data, found):
    with pytest.raises(BadFile, match=found):
        list(read_table(write(tmp_path / name, data)))

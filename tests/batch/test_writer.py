"""The folder of a dataset: complete images alone, in the order of the rows, whatever ended the last run."""

from __future__ import annotations

import errno
import json
import os
import sys

import pytest

from zimage_core.batch import folder as folders
from zimage_core.batch.shards import FORMATS
from zimage_core.batch.worker import Failed
from zimage_core.batch.writer import Writer
from zimage_core.errors import BadFile

forms = pytest.mark.parametrize("form", FORMATS)


def fill(out, form, outcomes, order=None, rows=None, finish=True, size=3):
    writer = Writer(out, form, size)
    try:
        wanted = {row.number for row in writer.begin(rows or [each.row for each in outcomes])}
        for i in range(len(outcomes)) if order is None else order:
            if outcomes[i].row.number in wanted:
                writer.add(outcomes[i])
        if finish:
            writer.finish()
    finally:
        writer.close()
    return wanted


def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def records(out):
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


@forms
def test_the_files_do_not_depend_on_the_order_of_finishing(form, done, tmp_path):
    outcomes = [done(i) for i in range(1, 8)]
    fill(tmp_path / "a", form, outcomes)
    fill(tmp_path / "b", form, outcomes, order=[6, 0, 3, 5, 2, 1, 4])
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert [record["row"] for record in records(tmp_path / "a")] == list(range(1, 8))


@forms
def test_a_run_that_stopped_anywhere_goes_on_to_the_same_files(form, done, tmp_path):
    outcomes = [done(i) for i in range(1, 8)]
    fill(tmp_path / "whole", form, outcomes)
    rows = [each.row for each in outcomes]
    for stop in range(8):
        out = tmp_path / f"cut{stop}"
        order = [6, 0, 3, 5, 2, 1, 4]
        fill(out, form, outcomes, order[:stop], rows, finish=False)
        wanted = fill(out, form, outcomes)
        assert wanted == {order[i] + 1 for i in range(stop, 7)}, "what was finished is not made again"
        assert files(out) == files(tmp_path / "whole")
        assert not list((out / folders.WORK).glob("*-*"))


@forms
def test_an_index_with_a_torn_line_is_mended(form, done, tmp_path):
    outcomes = [done(i) for i in range(1, 8)]
    fill(tmp_path, form, outcomes)
    index = tmp_path / "index.jsonl"
    whole = index.read_bytes()
    index.write_bytes(whole + b'{"row": 8, "key": "ab')
    assert fill(tmp_path, form, outcomes) == set()
    assert index.read_bytes() == whole


def test_a_damaged_line_of_the_index_is_named(done, tmp_path):
    fill(tmp_path, "png", [done(1), done(2)])
    index = tmp_path / "index.jsonl"
    index.write_bytes(b"{}\n" + index.read_bytes())
    with pytest.raises(BadFile, match="line 1 is damaged"):
        Writer(tmp_path, "png", 3)


def test_a_process_that_ends_between_two_writes_loses_nothing(done, tmp_path, monkeypatch):
    """The run ends at each write in turn, as a kill does: nothing behind it happens."""
    outcomes = [done(i) for i in range(1, 4)]
    fill(tmp_path / "whole", "webdataset", outcomes, size=2)

    class Killed(BaseException):
        pass

    def counting(function, left):
        def call(*words, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*words, **options)

        return call

    stops = 0
    for stop in range(1, 20):
        out, left = tmp_path / f"killed{stop}", [stop]
        with monkeypatch.context() as patch:
            for place in ("writer.write_atomically", "writer.atomic_file", "writer.Writer._forget"):
                name = f"zimage_core.batch.{place}"
                module, _, attribute = name.rpartition(".")
                owner = sys.modules.get(module) or Writer
                patch.setattr(owner, attribute, counting(getattr(owner, attribute), left))
            patch.setattr(folders.Folder, "append", counting(folders.Folder.append, left))
            writer = Writer(out, "webdataset", 2)
            try:
                writer.begin([each.row for each in outcomes])
                for each in outcomes:
                    writer.add(each)
                writer.finish()
            except Killed:
                stops += 1
            finally:
                writer.folder.close()
        fill(out, "webdataset", outcomes, size=2)
        assert files(out) == files(tmp_path / "whole"), f"after {stop} writes"
        assert not list((out / folders.WORK).glob("*-*"))
    assert 10 < stops < 19, "the loop went through all writes"


def test_images_that_were_removed_are_made_again(done, tmp_path):
    outcomes = [done(i) for i in range(1, 4)]
    fill(tmp_path, "png", outcomes)
    before = files(tmp_path)
    (tmp_path / records(tmp_path)[1]["file"]).unlink()
    assert fill(tmp_path, "png", outcomes) == {2}
    assert sorted(files(tmp_path)) == sorted(before)
    assert sorted(record["row"] for record in records(tmp_path)) == [1, 2, 3]


@forms
def test_later_rows_are_added(form, done, tmp_path):
    fill(tmp_path, form, [done(i) for i in range(1, 5)])
    before = files(tmp_path)
    assert fill(tmp_path, form, [done(9), *(done(i) for i in range(1, 5))]) == {9}
    after = files(tmp_path)
    assert all(after[name] == data for name, data in before.items() if name != "index.jsonl")
    assert len(records(tmp_path)) == 5


def test_finished_images_of_rows_that_left_the_table_are_kept(done, tmp_path):
    fill(tmp_path, "webdataset", [done(1), done(2)], finish=False)
    fill(tmp_path, "webdataset", [done(2)])
    assert sorted(record["row"] for record in records(tmp_path)) == [1, 2]


def test_equal_rows_give_one_image(done, tmp_path):
    writer = Writer(tmp_path, "png", 3)
    assert len(writer.begin([done(1).row, done(1).row])) == 1
    writer.close()


def test_failures_are_listed_and_tried_again(done, tmp_path):
    failed = Failed(done(2).row, "it has no colour")
    fill(tmp_path, "webdataset", [done(1), failed, done(3), done(4)], size=2)
    (line,) = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 2
    assert "no colour" in line
    assert [record["row"] for record in records(tmp_path)] == [1, 3, 4]
    assert fill(tmp_path, "webdataset", [done(i) for i in range(1, 5)], size=2) == {2}
    assert not (tmp_path / "failures.jsonl").exists()
    assert {record["file"] for record in records(tmp_path)} == {"000000.tar", "000001.tar", "000002.tar"}


# --- whose folder it is ---


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadFile, match=r"no dataset of this command, such as thesis\.txt"):
        Writer(tmp_path, "png", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(BadFile, match="is a file"):
        Writer(tmp_path / "thesis.txt", "png", 3)


def test_files_that_joined_a_dataset_are_left_alone(done, tmp_path):
    fill(tmp_path, "webdataset", [done(1)])
    (tmp_path / "000001.tar").write_text("mine")
    (tmp_path / ".note.txt.0123abcd.tmp").write_text("mine")
    fill(tmp_path, "webdataset", [done(1), done(2)])
    assert (tmp_path / "000001.tar").read_text() == "mine"
    assert (tmp_path / ".note.txt.0123abcd.tmp").exists()
    assert [record["file"] for record in records(tmp_path)] == ["000000.tar", "000002.tar"]


def test_another_format_is_refused(done, tmp_path):
    fill(tmp_path, "png", [done(1)])
    with pytest.raises(BadFile, match="the format png, and parquet was asked for"):
        Writer(tmp_path, "parquet", 3)


def test_one_of_two_writers_is_refused(tmp_path):
    writer = Writer(tmp_path, "png", 3)
    with pytest.raises(BadFile, match="another process is writing to this folder"):
        Writer(tmp_path, "png", 3)
    writer.close()
    Writer(tmp_path, "png", 3).close()


def test_temporary_files_of_a_process_that_was_killed_go_away(done, tmp_path):
    fill(tmp_path, "png", [done(1)])
    for name in (".00000002-0123456789abcdef.png.0123abcd.tmp", f"{folders.WORK}/.x.json.0123abcd.tmp"):
        (tmp_path / name).write_text("half")
    fill(tmp_path, "png", [done(1)])
    assert not list(tmp_path.rglob("*.tmp"))


@forms
def test_a_full_disk_is_one_sentence_and_loses_nothing(form, done, tmp_path, monkeypatch):
    outcomes = [done(i) for i in range(1, 5)]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "fsync", full)
        with pytest.raises(BadFile, match="no space left on device") as caught:
            fill(tmp_path, form, outcomes)
    assert "\n" not in str(caught.value)
    fill(tmp_path, form, outcomes)
    assert [record["row"] for record in records(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["packing.json", "00000001-0.json"])
@pytest.mark.parametrize("text", ["", "{}", "[]", '{"file": 5, "names": 5, "key": 5}'])
def test_a_damaged_file_of_the_work_folder_is_one_sentence(name, text, done, tmp_path):
    fill(tmp_path / "a", "webdataset", [done(1)])
    (tmp_path / "a" / folders.WORK / name).write_text(text)
    with pytest.raises(BadFile, match="is damaged; this program wrote it"):
        Writer(tmp_path / "a", "webdataset", 3)


def test_an_index_that_is_no_regular_file_is_refused_and_does_not_block(done, tmp_path):
    fill(tmp_path / "a", "webdataset", [done(1)])
    (tmp_path / "a" / "index.jsonl").unlink()
    os.mkfifo(tmp_path / "a" / "index.jsonl")
    with pytest.raises(BadFile, match="is not a regular file"):
        Writer(tmp_path / "a", "webdataset", 3)

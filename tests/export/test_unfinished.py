"""A large file survives an interruption, is resumed only by the same job, and never appears half."""

from __future__ import annotations

import errno
import fcntl
import os
import zlib

import pytest

from zimage_core import BadFile, quantize_file
from zimage_core.export import unfinished as room
from zimage_core.export.unfinished import Unfinished
from zimage_core.files import atomic
from zimage_core.files.atomic import remove_unfinished, unfinished

DATA = {"a": b"x" * 1000, "b": b"y" * 2000}


def write(target, identity="job", stop_at="", remark="later", overwrite=False) -> list[str]:
    """The tensors that had to be written."""
    written = []
    with Unfinished(target, 3000, identity, overwrite, remark).writing() as file:
        offset = 0
        for name, data in DATA.items():
            if name == stop_at:
                raise KeyboardInterrupt
            if not file.holds(name, offset, len(data)):
                file.write(offset, data)
                file.finished(name, zlib.crc32(data))
                written.append(name)
            offset += len(data)
    return written


def test_a_finished_file_leaves_nothing_beside_it(tmp_path):
    assert write(tmp_path / "f") == ["a", "b"]
    assert (tmp_path / "f").read_bytes() == DATA["a"] + DATA["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_the_same_job_goes_on_where_it_was_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", stop_at="b")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".f.unfinished", ".f.unfinished.log"]
    assert write(tmp_path / "f") == ["b"]
    assert (tmp_path / "f").read_bytes() == DATA["a"] + DATA["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_another_job_starts_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", stop_at="b")
    assert write(tmp_path / "f", identity="other") == ["a", "b"]


def test_a_tensor_that_did_not_reach_the_disk_is_written_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", stop_at="b")
    with (tmp_path / ".f.unfinished").open("r+b") as file:
        file.seek(10)
        file.write(b"?")
    with (tmp_path / ".f.unfinished.log").open("a") as journal:
        journal.write('["b", 1')  # cut in the middle of a line
    assert write(tmp_path / "f") == ["a", "b"]


@pytest.mark.parametrize("torn", ['["a", 1', '["a", 12]', "\0\0\0", "nonsense\n"])
def test_a_torn_journal_is_mended_so_that_later_interruptions_lose_nothing(tmp_path, torn):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", stop_at="a")
    with (tmp_path / ".f.unfinished.log").open("a") as journal:
        journal.write(torn)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", stop_at="b")
    assert write(tmp_path / "f") == ["b"]
    assert (tmp_path / "f").read_bytes() == DATA["a"] + DATA["b"]


def test_without_a_remark_nothing_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", stop_at="b", remark="")
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(BadFile, match="exists already"):
        write(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"old"
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", stop_at="b", overwrite=True)
    assert (tmp_path / "f").read_bytes() == b"old", "the old file stays until the new one is whole"
    write(tmp_path / "f", overwrite=True)
    assert len((tmp_path / "f").read_bytes()) == 3000


def test_two_processes_do_not_write_one_file(tmp_path):
    """flock belongs to the open file, so a second opening in this process stands for another process."""
    with (
        Unfinished(tmp_path / "f", 10, "job", False).writing() as file,
        pytest.raises(BadFile, match="being written by another process"),
        Unfinished(tmp_path / "f", 10, "job", False).writing(),
    ):
        raise AssertionError("never reached")
    del file
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def killed(*args):
    raise SystemExit


def test_a_kill_between_publishing_and_tidying_harms_nothing(tmp_path, monkeypatch):
    """Both names then stand for the finished file, which the next job must not write into."""
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_sync_folder", killed)
        patch.setattr(Unfinished, "_close", lambda self, keep: self._unlock())
        with pytest.raises(SystemExit):
            write(tmp_path / "f")
    good = DATA["a"] + DATA["b"]
    assert (tmp_path / "f").samefile(tmp_path / ".f.unfinished")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "f", identity="other", stop_at="b", overwrite=True)
    assert (tmp_path / "f").read_bytes() == good
    assert not (tmp_path / "f").samefile(tmp_path / ".f.unfinished")
    assert write(tmp_path / "f", identity="other", overwrite=True) == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_another_process_published_meanwhile_is_not_written_into(
    tmp_path, monkeypatch, overwrite
):
    """The other one publishes after our opening and before our lock."""
    real, path, done = fcntl.flock, tmp_path / ".f.unfinished", []

    def late(handle, operation):
        if not done:
            done.append(True)
            (tmp_path / "g").write_bytes(b"good")
            (tmp_path / "g").replace(path)
        real(handle, operation)

    monkeypatch.setattr(room.fcntl, "flock", late)
    with Unfinished(tmp_path / "f", 3, "job", overwrite).writing() as file:
        assert path.stat().st_ino == os.fstat(file._handle).st_ino
        file.write(0, b"abc")
    assert (tmp_path / "f").read_bytes() == b"abc"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_nothing_of_the_next_process_is_removed_at_the_end(tmp_path, monkeypatch):
    """With overwriting the temporary name is free from the last rename on, and the next one may take it."""
    theirs = [tmp_path / ".f.unfinished", tmp_path / ".f.unfinished.log"]

    def publish_and_wait(*args):
        atomic.publish(*args)
        for path in theirs:
            path.write_bytes(b"theirs")

    monkeypatch.setattr(room, "publish", publish_and_wait)
    write(tmp_path / "f", overwrite=True)
    assert [path.read_bytes() for path in theirs] == [b"theirs"] * 2


def test_the_lock_is_held_until_the_temporary_name_is_gone(tmp_path, monkeypatch):
    real, seen = Unfinished._unlock, []

    def watched(self):
        if self._handle >= 0:
            seen.append(self.path.exists())
        real(self)

    monkeypatch.setattr(Unfinished, "_unlock", watched)
    write(tmp_path / "f")
    assert seen == [False]


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BadFile, match=r"1 kB are free on its disk, 16\.8 MB are needed; free some space"):
        write(tmp_path / "f")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(room.os, call, full)
    with pytest.raises(BadFile, match="the disk is full, 3 kB were wanted; what was written is removed"):
        write(tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_a_quantisation_is_resumed_to_the_same_bytes(wide, tmp_path):
    quantize_file(wide, tmp_path / "whole.gguf", "Q4_K_M")
    out, seen = tmp_path / "a.gguf", []

    def interrupt(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(wide, out, "Q4_K_M", progress=interrupt)
    assert not out.exists()
    assert (tmp_path / ".a.gguf.unfinished").exists()
    done = quantize_file(wide, out, "Q4_K_M", progress=lambda *step: seen.append(step))
    assert any(remark.startswith("going on after ") for remark in done.remarks)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "whole.gguf"]


def test_the_end_of_the_process_removes_what_cannot_be_resumed_and_tells_of_the_rest(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "shard").write_bytes(b"x")
    (tmp_path / "kept").write_bytes(b"x")
    with unfinished(tmp_path / "folder"), unfinished(tmp_path / "kept", "the same command goes on"):
        assert remove_unfinished() == ["the same command goes on"]
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert remove_unfinished() == []

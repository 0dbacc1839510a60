"""A written file is either the old one or the complete new one, after any failure."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading

import pytest

from tests.helpers.tree import ROOT
from zimage_core.errors import BadFile
from zimage_core.files import atomic
from zimage_core.files.atomic import SPARE, atomic_file, atomic_folder, check_destination, write_atomically

CHUNKS = [bytes([i]) * 1000 for i in range(5)]
FAULTS = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EIO, "I/O error"),
    KeyboardInterrupt(),
]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def breaking(k, fault):
    for i, chunk in enumerate(CHUNKS):
        if i == k:
            raise fault
        yield chunk


def test_bytes_and_chunks_arrive_whole(tmp_path):
    write_atomically(tmp_path / "a", b"one")
    write_atomically(tmp_path / "b", iter(CHUNKS))
    assert (tmp_path / "a").read_bytes() == b"one"
    assert (tmp_path / "b").read_bytes() == b"".join(CHUNKS)
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{type(f).__name__}-{f}")
@pytest.mark.parametrize("k", range(len(CHUNKS)))
def test_a_fault_at_any_write_leaves_the_old_file(tmp_path, k, fault):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    expected = KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else BadFile
    with pytest.raises(expected):
        write_atomically(target, breaking(k, fault), overwrite=True)
    assert names(tmp_path) == ["a"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_fault_of_the_system_leaves_nothing(tmp_path, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(BadFile, match="i/o error"):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == []


def test_a_file_system_without_hard_links_is_served(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    with pytest.raises(BadFile, match="exists"):
        write_atomically(tmp_path / "a", b"newer")


def test_an_existing_file_is_replaced_only_on_demand(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(BadFile, match="exists already"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    write_atomically(target, b"new", overwrite=True)
    assert target.read_bytes() == b"new"


def test_of_many_writers_of_one_name_exactly_one_succeeds(tmp_path):
    outcomes = []

    def write(i):
        try:
            write_atomically(tmp_path / "a", bytes([i]) * 100_000)
        except BadFile:
            return
        outcomes.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = outcomes
    assert (tmp_path / "a").read_bytes() == bytes([winner]) * 100_000
    assert names(tmp_path) == ["a"]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "a").symlink_to("precious")
    write_atomically(tmp_path / "a", b"new", overwrite=True)
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("place", "what"),
    [("folder", "is a folder"), ("fifo", "pipe"), ("absent/a", "folder does not exist"), ("a\0b", "NUL")],
)
def test_what_is_no_place_for_a_file_is_named_before_any_work(tmp_path, place, what):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for call in (check_destination, lambda path, overwrite: write_atomically(path, b"x", overwrite)):
        with pytest.raises(BadFile, match=what):
            call(tmp_path / place, True)


def test_a_killed_writer_leaves_the_old_file_and_does_not_stop_the_next_one(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    code = (
        "import os, sys\nfrom zimage_core.files.atomic import write_atomically\n"
        "def chunks():\n    yield b'new'\n    os.kill(os.getpid(), 9)\n"
        "write_atomically(sys.argv[1], chunks(), overwrite=True)"
    )
    run = subprocess.run([sys.executable, "-c", code, target], cwd=ROOT, check=False)
    assert run.returncode == -9
    assert target.read_bytes() == b"old"
    (left,) = [name for name in names(tmp_path) if name != "a.png"]
    assert re.fullmatch(r"\.a\.png\.[0-9a-f]{8}\.tmp", left)
    write_atomically(target, b"new", overwrite=True)
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == sorted(["a.png", left])


def test_the_longest_name_fits(tmp_path):
    name = "名" * 83 + ".png"
    assert len(name.encode()) == 253
    write_atomically(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


def test_unfinished_files_can_be_removed_from_a_signal_handler(tmp_path):
    def chunks():
        yield b"a"
        assert len(names(tmp_path)) == 1
        atomic.remove_unfinished()
        assert names(tmp_path) == []

    with pytest.raises(BadFile, match="no such file"):
        write_atomically(tmp_path / "a", chunks())


def test_the_end_of_the_process_removes_folders_too(tmp_path):
    def write():
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "shard").write_bytes(b"x")
            atomic.remove_unfinished()
            assert names(tmp_path) == []

    with pytest.raises(BadFile, match="no such file"):
        write()


# --- large files, whose size is known ----------------------------------------------------


def test_a_file_of_known_size_is_written_in_any_order(tmp_path):
    with atomic_file(tmp_path / "a", nbytes=10) as out:
        out.seek(6)
        out.write(b"cd")
        out.seek(0)
        out.write(b"ab")
    assert (tmp_path / "a").read_bytes() == b"ab\0\0\0\0cd\0\0"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    for place in (atomic_file, atomic_folder):
        with (
            pytest.raises(BadFile, match=r"1 kB are free on its disk, 16\.8 MB are needed; free some space"),
            place(tmp_path / "a", nbytes=3000),
        ):
            pytest.fail("began")
    assert names(tmp_path) == []
    usage.free = 3000 + SPARE
    with atomic_file(tmp_path / "a", nbytes=3000):
        pass


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("reserves", [False, True])
def test_a_disk_that_fills_up_leaves_no_half_file(tmp_path, monkeypatch, reserves):
    def write():
        with atomic_file(tmp_path / "a", nbytes=3000) as out:
            assert not reserves
            out.write(b"x")
            no_space()

    if reserves:
        monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(BadFile, match="the disk is full, 3 kB were wanted; what was written is removed"):
        write()
    assert names(tmp_path) == []


def test_a_system_that_cannot_reserve_space_is_served(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with atomic_file(tmp_path / "a", nbytes=3000) as out:
        out.write(b"x")
    assert (tmp_path / "a").stat().st_size == 3000

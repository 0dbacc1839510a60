"""The folder of a dataset: whose it is, who may write to it now, and its index."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zimage_core.batch.shards import as_json
from zimage_core.errors import BadFile, printable
from zimage_core.files.atomic import write_atomically

WORK = ".zimage-batch"
"""The folder inside of the dataset's for what is not part of it yet."""
MANIFEST = "dataset.json"
INDEX = "index.jsonl"
VERSION = 1
_UNFINISHED = re.compile(
    r"\.(\d{8,}-[0-9a-f]{16}\.png|\d{6,}\.tar|part-\d{5,}\.parquet|(index|failures)\.jsonl)\.[0-9a-f]{8}\.tmp"
)
"""Temporary files of `files.atomic` for files of ours, which a process that was killed leaves behind."""


class Folder:
    """A dataset's folder, locked as long as it is open; the lock ends with the process.

    Args:
        out: The folder; new, empty, or that of an earlier run.
        form: Format of the dataset.

    Attributes:
        done: Keys of the images that are part of the dataset.
        shards: Number of the next shard.
        work: The folder for what is not part of it yet.

    Raises:
        BadFile: It holds files that no batch wrote, a dataset of another format, or is in use.
    """

    def __init__(self, out: Path, form: str) -> None:
        self.out, self.work = out, out / WORK
        self.done: set[str] = set()
        self.shards = 0
        self._lock = -1
        try:
            self._claim()
            self._check_manifest(form)
            self._tidy()
            self._read_index()
        except OSError as error:
            self.close()
            raise _refused(Path(error.filename or out), error) from None
        except BaseException:
            self.close()
            raise

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to the index; either all of them are in it, or none.

        Raises:
            BadFile: The disk is full, or refuses to be written.
        """
        records = list(records)
        data = b"".join(as_json(record) + b"\n" for record in records)
        path = self.out / INDEX
        try:
            with path.open("ab") as index:
                before = index.tell()
                try:
                    index.write(data)
                    index.flush()
                    os.fsync(index.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        index.truncate(before)
                    raise
        except OSError as error:
            raise _refused(path, error) from None
        self.done.update(record["key"] for record in records)

    def close(self) -> None:
        """Let another process use the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _claim(self) -> None:
        """Make the folder, or see that it is ours, and lock it."""
        if self.out.exists() and not self.out.is_dir():
            raise BadFile(self.out, "is a file, a folder for the images was wanted", "name a new folder")
        if self.out.is_dir() and not (self.work / MANIFEST).is_file():
            foreign = sorted(each.name for each in self.out.iterdir() if each.name != WORK)
            if foreign:
                raise BadFile(
                    self.out,
                    f"holds files that are no dataset of this command, such as {printable(foreign[0], 80)}",
                    "name a new folder, or the one of an earlier run",
                )
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fault = "another process is writing to this folder"
            raise BadFile(self.out, fault, "wait for it, or name another folder") from None

    def _check_manifest(self, form: str) -> None:
        path = self.work / MANIFEST
        if not path.is_file():
            note = {"program": "zimage_core", "version": VERSION, "format": form}
            write_atomically(path, as_json(note), overwrite=True)
            return
        try:
            note = json.loads(path.read_bytes())
            found, version = note["format"], note["version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise BadFile(path, "is damaged", "name a new folder") from None
        if version != VERSION or found != form:
            fault = f"holds a dataset of the format {printable(found, 40)}, and {form} was asked for"
            if version != VERSION:
                fault = f"was made by another version of this program ({printable(version, 40)})"
            raise BadFile(self.out, fault, "name a new folder")

    def _tidy(self) -> None:
        """Remove temporary files of a process that was killed."""
        for path in (*self.work.glob(".*.tmp"), *self.out.glob(".*.tmp")):
            if path.parent == self.work or _UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _read_index(self) -> None:
        """Read the index; its last line may be torn, and what it names may have been removed."""
        path = self.out / INDEX
        if not path.is_file():
            if os.path.lexists(path):  # a FIFO would block
                raise BadFile(path, "is not a regular file", "remove it, or name a new folder")
            return
        there: dict[str, bool] = {}
        size = 0
        with path.open("rb") as index:
            for number, line in enumerate(index, 1):
                if not line.endswith(b"\n"):
                    break  # a process was killed while it wrote this line
                size += len(line)
                key, file = _entry(path, number, line)
                if file not in there:
                    there[file] = "/" not in file and (self.out / file).is_file()
                if there[file]:
                    self.done.add(key)
                    self.shards = max(self.shards, _number(file) + 1)
        if not all(there.values()):
            with path.open("rb") as index:
                kept = (line for line in index if line.endswith(b"\n") and there[_entry(path, 0, line)[1]])
                write_atomically(path, kept, overwrite=True)
        elif size < path.stat().st_size:
            os.truncate(path, size)


def _entry(path: Path, number: int, line: bytes) -> tuple[str, str]:
    """Key and file of a line of the index."""
    try:
        record = json.loads(line)
        key, file = record["key"], record["file"]
        if isinstance(key, str) and isinstance(file, str):
            return key, file
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise BadFile(path, f"line {number} is damaged", "remove the line; its image is then made again")


def _number(file: str) -> int:
    """The number of a shard by its name."""
    digits = re.search(r"\d+", file)
    return int(digits[0]) if digits and not file.endswith(".png") else -1


def _refused(path: Path, error: OSError) -> BadFile:
    reason = printable((error.strerror or type(error).__name__).lower(), 100)
    return BadFile(path, f"could not be written ({reason})", "what is finished is kept")

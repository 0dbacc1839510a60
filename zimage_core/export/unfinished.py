"""A large file written tensor by tensor: it survives an interruption, and appears complete or not at all.

Beside the destination NAME stand `.NAME.unfinished` and its journal `.NAME.unfinished.log`: one line with the
identity of the job, then one for each finished tensor with the CRC of its bytes. A later job of the same
identity checks the CRCs and goes on after the last good tensor; any other job starts anew. The space is
reserved before the first tensor, so a full disk is noticed at the start, not after an hour.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import IO, NoReturn

from zimage_core.errors import BadFile, printable
from zimage_core.files.atomic import check_destination, publish, unfinished
from zimage_core.files.units import in_bytes

CHUNK = 16 << 20
ROOM = 16 << 20
"""Bytes of the disk that a job leaves free."""
LOCK_TRIES = 16
"""Times that a file in the making may vanish while it is being locked."""


def check_room(target: Path, nbytes: int, present: int = 0) -> None:
    """Refuse a job that the disk has no room for.

    Args:
        target: The file to be written.
        nbytes: Its size.
        present: Bytes of it that are on the disk already.

    Raises:
        BadFile: Less is free; the sentence has both numbers.
    """
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(target.parent).free
        wanted = nbytes - present + ROOM
        if free < wanted:
            raise BadFile(
                target,
                f"{in_bytes(free)} are free on its disk, {in_bytes(wanted)} are needed",
                "free some space or name another place",
            )


class Unfinished:
    """The file in the making.

    Args:
        target: Name that it gets at the end.
        nbytes: Its final size.
        identity: Text that is the same only for a job that writes the same bytes.
        overwrite: Replace an existing target.
        remark: What to tell a user who interrupts; "" removes the file then, and no journal is kept.

    Attributes:
        done: Tensor -> CRC of those that stand in the file already.
    """

    def __init__(
        self, target: str | PathLike[str], nbytes: int, identity: str, overwrite: bool, remark: str = ""
    ) -> None:
        self.target = Path(target)
        self.nbytes = nbytes
        self.overwrite = overwrite
        self.remark = remark
        self.done: dict[str, int] = {}
        self._identity = sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
        check_destination(self.target, overwrite)
        name = self.target.name
        short = name if len(os.fsencode(name)) <= 200 else sha256(os.fsencode(name)).hexdigest()[:32]
        self.path = self.target.with_name(f".{short}.unfinished")
        self.journal = self.path.with_name(f"{self.path.name}.log")
        self._handle = -1
        self._log: IO[str] | None = None
        self._mine = False  # whether the file in the making is ours to remove

    @contextlib.contextmanager
    def writing(self) -> Iterator[Unfinished]:
        """Open or resume the file; on the way out it is published, kept for resuming, or removed.

        Raises:
            BadFile: No room, another process writes the same file, or the system refuses.
        """
        keep = False
        with unfinished(self.path, self.remark):
            try:
                self._open()
                yield self
                self._finish()
            except KeyboardInterrupt:
                keep = bool(self.remark)
                raise
            except OSError as error:
                self._refuse(error)
            finally:
                self._close(keep)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes at an offset."""
        view, place = memoryview(data).cast("B"), offset
        while view:
            try:
                count = os.pwrite(self._handle, view[:CHUNK], place)
            except OSError as error:
                self._refuse(error)
            view, place = view[count:], place + count

    def finished(self, name: str, crc: int) -> None:
        """Note that all bytes of a tensor are written."""
        self.done[name] = crc
        if self._log is not None:
            self._log.write(json.dumps([name, crc]) + "\n")
            self._log.flush()

    def holds(self, name: str, offset: int, nbytes: int) -> bool:
        """Whether a tensor stands in the file whole, by its CRC."""
        if name not in self.done:
            return False
        crc = 0
        for start in range(offset, offset + nbytes, CHUNK):
            data = os.pread(self._handle, min(CHUNK, offset + nbytes - start), start)
            crc = zlib.crc32(data, crc)
        if crc != self.done[name]:
            del self.done[name]
        return name in self.done

    def _open(self) -> None:
        self._lock()
        present = os.fstat(self._handle).st_blocks * 512
        if not self._read_journal():
            self._mine = True
            os.ftruncate(self._handle, 0)
            self.done, present = {}, 0
        check_room(self.target, self.nbytes, min(present, self.nbytes))
        self._mine = True  # what an earlier job left stays when there is no room for the rest
        if self.remark:
            self._log = self.journal.open("a", encoding="utf-8")
            if self._log.tell() == 0:
                self._log.write(json.dumps([self._identity]) + "\n")
        self._reserve()

    def _lock(self) -> None:
        """Open the file in the making as its only writer.

        Another process may publish or remove the file between our opening and our lock, and a process that
        was killed while it published has left both names on one file, which is the finished one: what is
        locked then is not a file in the making, and a new one is opened.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        for _ in range(LOCK_TRIES):
            self._handle = os.open(self.path, flags, 0o666)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._unlock()
                break
            if self._is_in_place():
                if os.fstat(self._handle).st_nlink == 1:
                    return
                self.journal.unlink(missing_ok=True)
                self.path.unlink()
            self._unlock()
        hint = "wait for it, or name another file"
        raise BadFile(self.target, "is being written by another process", hint)

    def _unlock(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _is_in_place(self) -> bool:
        """Whether the open file still has the name of the file in the making."""
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._handle))

    def _reserve(self) -> None:
        try:
            os.posix_fallocate(self._handle, 0, self.nbytes)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            os.ftruncate(self._handle, self.nbytes)

    def _read_journal(self) -> bool:
        """Whether the file in the making is of this very job; then `done` is what it holds."""
        try:
            # what follows the last newline was cut by the interruption
            first, *lines = self.journal.read_bytes().split(b"\n")[:-1]
            if json.loads(first) != [self._identity]:
                raise ValueError
        except (OSError, ValueError):
            self.journal.unlink(missing_ok=True)
            return False
        size = len(first) + 1
        for line in lines:
            try:
                name, crc = json.loads(line)
                self.done[str(name)] = int(crc)
            except (ValueError, TypeError):
                break
            size += len(line) + 1
        os.truncate(self.journal, size)  # the next line must not be joined to a cut one
        return True

    def _finish(self) -> None:
        os.fsync(self._handle)
        self.journal.unlink(missing_ok=True)  # a published file has none, and another process may start one
        publish(self.path, self.target, self.overwrite)

    def _refuse(self, error: OSError) -> NoReturn:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fault = f"the disk is full, {in_bytes(self.nbytes)} were wanted; what was written is removed"
            raise BadFile(self.target, fault, "free some space and start again") from None
        reason = (error.strerror or type(error).__name__).lower()
        raise BadFile(self.target, f"could not be written ({printable(reason, 100)})") from None

    def _close(self, keep: bool) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._mine and not keep and self._is_in_place():
            self.journal.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        self._unlock()  # last, so that no other process takes what is about to be removed

"""Files and folders that appear complete or not at all.

The content goes to a new place beside the target, `.NAME.XXXXXXXX.tmp`, is flushed to the disk and takes the
final name in one step. A reader never sees half a file, and a failed write leaves what stood there before.
Only a process that is killed leaves its temporary file behind; nothing reads it, and it may be deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from zimage_core.errors import BadFile, printable
from zimage_core.files.units import in_bytes

SPARE = 16 << 20
"""Bytes of disk space that must stay free after a large file is written."""

_unfinished: set[Path] = set()  # temporary files and folders of this process, for remove_unfinished()


def check_destination(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Refuse a path that `atomic_file` would refuse; for use before a long computation.

    Raises:
        BadFile: The folder is missing or not writable, or the path exists and may not be replaced.
    """
    target = Path(path)
    if "\0" in str(target):
        raise BadFile(target, "a file name cannot hold a NUL character")
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise BadFile(target, f"cannot be written ({_reason(error)})") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise BadFile(target, "is a folder, a file name was wanted")
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise BadFile(target, "is a device, a pipe or a socket, only regular files are replaced")
    if mode is not None and not overwrite:
        raise BadFile(target, "exists already", "choose another name or allow overwriting (--force)")
    if not target.parent.is_dir():
        raise BadFile(target, "cannot be written, its folder does not exist", "make the folder first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise BadFile(target, "cannot be written, no permission in its folder")


def check_free_space(target: Path, nbytes: int) -> None:
    """Refuse to write a file or folder that does not fit on the disk.

    Args:
        target: The file or folder to be written.
        nbytes: Its size.

    Raises:
        BadFile: Fewer than `nbytes + SPARE` bytes are free; the message has both numbers.
    """
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(target.parent).free
        if free < nbytes + SPARE:
            raise BadFile(
                target,
                f"{in_bytes(free)} are free on its disk, {in_bytes(nbytes + SPARE)} are needed",
                "free some space or name another place",
            )


@contextlib.contextmanager
def atomic_file(
    path: str | os.PathLike[str], overwrite: bool = False, nbytes: int = 0
) -> Iterator[IO[bytes]]:
    """A new binary file, open for writing; it becomes `path` if the `with` block raises no exception.

    Args:
        path: Destination; a link is replaced, not followed.
        overwrite: Replace an existing file. Otherwise the name is claimed by a hard link, so that exactly one
            of two processes that write the same name succeeds.
        nbytes: Size of the finished file, if known: the space is checked and reserved first, and parts that
            are not written are zeros.

    Raises:
        BadFile: The destination exists and `overwrite` is false, the disk has too little space, or the system
            refuses the write.
    """
    check_destination(path, overwrite)
    target = Path(path)
    if nbytes:
        check_free_space(target, nbytes)
    with _temporary_place(target) as temporary:
        try:
            # mode "x" fails if the name exists, so a planted link or an old file is never written to
            with temporary.open("xb") as out:
                if nbytes:
                    _reserve(out.fileno(), nbytes)
                yield out
                out.flush()
                os.fsync(out.fileno())
            if overwrite:
                temporary.replace(target)
            else:
                _claim(temporary, target)
            _sync_folder(target.parent)
        except OSError as error:
            if nbytes and error.errno in (errno.ENOSPC, errno.EDQUOT):
                fault = f"the disk is full, {in_bytes(nbytes)} were wanted; what was written is removed"
                raise BadFile(target, fault, "free some space and start again") from None
            raise _refusal(target, error) from None


def write_atomically(
    path: str | os.PathLike[str], data: bytes | Iterable[bytes], overwrite: bool = False
) -> None:
    """Write `data` (bytes, or chunks of bytes) to `path` completely, or leave `path` unchanged.

    Raises:
        BadFile: The destination exists and `overwrite` is false, or the system refuses the write.
    """
    with atomic_file(path, overwrite) as out:
        out.writelines((data,) if isinstance(data, bytes) else data)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], nbytes: int = 0, join: bool = False) -> Iterator[Path]:
    """A new folder to fill; it becomes `path` if the `with` block raises no exception.

    Args:
        path: Destination: a name that does not exist, or an empty folder, which is replaced.
        nbytes: Size of the files that will be written; the free space is checked first.
        join: Move the new files into a folder that holds others, each in one step, JSON files last; a file of
            the same name is replaced.

    Raises:
        BadFile: The destination exists, the disk has too little space, or the system refuses the write.
    """
    target = Path(path)
    join = join and target.is_dir() and any(target.iterdir())
    if not join:
        _check_folder(target)
    check_free_space(target, nbytes)
    with _temporary_place(target) as temporary:
        try:
            temporary.mkdir()
            yield temporary
            if join:
                for file in sorted(temporary.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
                    file.replace(target / file.name)
                _sync_folder(target)
            else:
                temporary.rename(target)  # fails if anything but an empty folder has that name
            _sync_folder(target.parent)
        except OSError as error:
            raise _refusal(target, error) from None


def remove_unfinished() -> None:
    """Remove the temporary files of writes in progress; called by a process that is about to end."""
    for temporary in list(_unfinished):
        _remove(temporary)


@contextlib.contextmanager
def _temporary_place(target: Path) -> Iterator[Path]:
    """A free name beside `target`; whatever has that name when the `with` block ends is removed."""
    # 50 characters of the name are at most 200 bytes; file systems allow 255
    temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.tmp")
    _unfinished.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink()


def _check_folder(target: Path) -> None:
    hint = "name a new folder"
    try:
        if not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
            if os.path.lexists(target):
                raise BadFile(target, "exists already, and a folder is never replaced", hint)
            check_destination(target)
        elif target.is_mount() or target.samefile(Path.cwd()):
            raise BadFile(target, "is a mount point or the current folder, which cannot be replaced", hint)
    except OSError as error:
        raise _refusal(target, error) from None


def _reserve(handle: int, nbytes: int) -> None:
    """Set the size of the open file, and reserve its space on the disk if the file system can."""
    os.ftruncate(handle, nbytes)
    try:
        os.posix_fallocate(handle, 0, nbytes)
    except AttributeError:
        return  # macOS
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _claim(temporary: Path, target: Path) -> None:
    """Rename the temporary file to its final name unless that name exists."""
    try:
        os.link(temporary, target, follow_symlinks=False)
    except FileExistsError:
        raise BadFile(
            target, "exists already", "choose another name or allow overwriting (--force)"
        ) from None
    except OSError as error:
        # without hard links the check and the rename are two steps, so another process may come in between
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        check_destination(target)
        temporary.replace(target)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to open or flush a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refusal(target: Path, error: OSError) -> BadFile:
    return BadFile(target, f"could not be written ({printable(_reason(error), 100)})")


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()

"""Files that appear complete or not at all.

The bytes go to a new file in the same folder, are flushed to the disk and take the final name in one step.
A reader never sees half a file, and a failed write leaves what stood there before. SIGKILL can leave a
temporary file `.NAME.part-PID-N`; the next write of the same name removes it when that process is gone.

Work that takes minutes keeps its own temporary file (`export/unfinished.py`) and takes the last step here.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

from zimage_core.errors import BadFile

_live: set[Path] = set()  # temporary files of this process, for remove_unfinished()
_kept: dict[Path, str] = {}  # unfinished files that a later call goes on with, and what to say of them
_serial = itertools.count()  # two threads may write the same name


def check_destination(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Say before a long computation what `write_atomically` would say after it.

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


def write_atomically(
    path: str | os.PathLike[str], data: bytes | Iterable[bytes], overwrite: bool = False
) -> None:
    """Write `data` (bytes, or chunks of bytes) so that `path` holds all of it or is untouched.

    Args:
        path: Destination; a link is replaced, not followed.
        data: The content.
        overwrite: Replace an existing file. Without it the name is claimed by a hard link, so that of two
            processes writing the same name exactly one succeeds.

    Raises:
        BadFile: The destination exists and `overwrite` is false, or the system refuses the write.
    """
    check_destination(path, overwrite)
    target = Path(path)
    temporary = temporary_place(target)
    try:
        # fresh name or refusal: a planted link or an old file is never written through
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        _live.add(temporary)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as out:
            for chunk in (data,) if isinstance(data, bytes) else data:
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        publish(temporary, target, overwrite)
    except OSError as error:
        raise BadFile(target, f"could not be written ({_reason(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)
        _live.discard(temporary)


def remove_unfinished() -> list[str]:
    """Remove the temporary files of writes in progress; for a process that is about to end.

    Returns:
        A sentence for each unfinished file that stays, because the same command goes on with it.
    """
    for temporary in list(_live):
        with contextlib.suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink()
    return list(_kept.values())


def temporary_place(target: Path) -> Path:
    """A name of this process beside `target`; what dead processes left under such names is removed."""
    _remove_leftovers(target)
    return target.with_name(_temporary_name(target.name))


def publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give a finished file or folder its name in one step.

    Raises:
        BadFile: The name was taken meanwhile and `overwrite` is false.
        OSError: The system refuses.
    """
    if temporary.is_dir():
        temporary.rename(target)  # fails where anything but an empty folder stands there
    else:
        _claim(temporary, target, overwrite)
    _sync_folder(target.parent)


@contextlib.contextmanager
def unfinished(temporary: Path, remark: str = "") -> Iterator[None]:
    """While this holds, the end of the process removes `temporary`; with a remark it stays and is told of."""
    if remark:
        _kept[temporary] = remark
    else:
        _live.add(temporary)
    try:
        yield
    finally:
        _live.discard(temporary)
        _kept.pop(temporary, None)


def _claim(temporary: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target, follow_symlinks=False)
    except FileExistsError:
        raise BadFile(
            target, "exists already", "choose another name or allow overwriting (--force)"
        ) from None
    except OSError as error:
        # a file system without hard links: the check is a moment older than the rename
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        check_destination(target)
        temporary.replace(target)


def _temporary_name(name: str) -> str:
    # 255 bytes is the longest name of the usual file systems
    short = name if len(os.fsencode(name)) <= 220 else sha256(os.fsencode(name)).hexdigest()[:32]
    return f".{short}.part-{os.getpid()}-{next(_serial)}"


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files and folders of this name whose writing process no longer runs."""
    prefix = _temporary_name(target.name).rsplit("-", 2)[0]
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            match = re.fullmatch(re.escape(prefix) + r"-(\d{1,10})-\d{1,20}", path.name)
            if match and path not in _live and not _is_running(int(match[1])):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process had our number; our own files are in _live
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to open or flush a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()

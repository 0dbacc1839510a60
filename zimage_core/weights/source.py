"""Access to a model file on disk that is not trusted, and the base class of all model files.

Headers and scans are read with `pread`: if the file is cut meanwhile, the short read becomes an error.
Tensors are views of one private map of the file by default, so that loading copies nothing; the file must
then not change while they are in use (a cut file kills the process with SIGBUS, and no handler can prevent
it). `mmap=False` reads every tensor into memory of its own.

Neither torch nor NumPy is imported before the first tensor is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap as mmap_module
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from zimage_core.errors import BadArgument, BadFile, ZImageError, printable
from zimage_core.files.untrusted import why_not_opened
from zimage_core.formats import BlockFormat

if TYPE_CHECKING:
    import torch

    from zimage_core.quant.tensor import QuantTensor

AGAIN = "download it again"

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}
# Without this flag Linux counts every byte of a private writable map as memory that may be needed, and
# refuses to map a 12 GB file on an 8 GB machine although no page of it is ever copied.
_NO_RESERVE = getattr(mmap_module, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
WHOLE_FILE = 64 << 20
"""Files of up to this many bytes are hashed whole; that takes about 0.1 s."""
_SAMPLE = 1 << 20
_MOST_HOLES = 4096
_MOST_AT_ONCE = 1 << 30  # one read call moves less than 2 GiB


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Position, shape and format of a tensor in its file; its data has not been read.

    Args:
        name: Name in the file.
        shape: Shape in PyTorch's order; blocks run along the last axis.
        format: Format of the data.
        offset: Offset of the first byte from the start of the file.
        nbytes: Bytes of data, without padding.
    """

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int
    nbytes: int


def check_text(path: str, what: str, text: str, limit: int) -> str:
    """Check a key or tensor name from a file and return it.

    Raises:
        BadFile: The text is empty, longer than `limit` characters, or holds control characters.
    """
    if not text:
        raise BadFile(path, f"a {what} is empty", AGAIN)
    if len(text) > limit:
        raise BadFile(path, f"a {what} has {len(text)} characters, at most {limit} are allowed", AGAIN)
    # printable() returns harmless text unchanged; it is slow, so plain text skips it
    if not text.isprintable():
        raise BadFile(path, f"the {what} {printable(text, 60)} holds control characters", AGAIN)
    return text


class Source:
    """A regular file, open for reading at any offset.

    Args:
        path: The file; FIFOs, sockets, devices and directories are refused before they are opened.
        mmap: Hand out tensors as views of a private map instead of reading them.

    Raises:
        BadFile: The path is not a regular file that can be read, or the file is empty.
    """

    def __init__(self, path: str | PathLike[str], mmap: bool = True) -> None:
        self.path = path_text(path)
        self.mapped = mmap
        self._map: mmap_module.mmap | None = None
        self._handle = -1
        self._digests: dict[bool, str] = {}
        try:
            self._refuse_special(Path(self.path).stat().st_mode)
            # O_NONBLOCK: if the path has become a FIFO since, opening it must not block
            self._handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            status = os.fstat(self._handle)
            self._refuse_special(status.st_mode)
        except OSError as error:
            self.close()
            raise BadFile(self.path, *why_not_opened(self.path, error)) from None
        except ValueError:
            raise BadFile(self.path, "the path holds a NUL character") from None
        except ZImageError:
            self.close()
            raise
        self.size = status.st_size
        self._state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self.size == 0:
            self.close()
            raise BadFile(self.path, "the file is empty (0 bytes)", AGAIN)

    def _refuse_special(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise BadFile(self.path, f"{kind}, not a regular file", "name a model file")

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset`.

        Raises:
            BadFile: The file is too short, or cannot be read there.
            BadArgument: The file was closed.
        """
        if self._handle < 0:
            raise BadArgument(f"{printable(self.path)}: the file was closed and can no longer be read")
        done, wanted = 0, len(target)
        while done < wanted:
            try:
                part = target[done : min(wanted, done + _MOST_AT_ONCE)]
                count = os.preadv(self._handle, [part], offset + done)
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise BadFile(self.path, f"cannot be read at byte {offset + done}: {reason}") from None
            if count == 0:
                fault = f"truncated while it was read: {wanted} bytes wanted at byte {offset}, {done} found"
                raise BadFile(self.path, fault, "let no other program change it, and load it again")
            done += count

    def advise_willneed(self, offset: int, count: int) -> None:
        """Ask the system to read these bytes into its page cache; a hint that never raises."""
        self._advise(offset, count, "POSIX_FADV_WILLNEED")

    def advise_dontneed(self, offset: int, count: int) -> None:
        """Tell the system that its page cache need not keep these bytes; a hint that never raises."""
        self._advise(offset, count, "POSIX_FADV_DONTNEED")

    def _advise(self, offset: int, count: int, advice: str) -> None:
        if self._handle < 0 or not hasattr(os, "posix_fadvise"):  # macOS lacks it
            return
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._handle, offset, count, getattr(os, advice))

    def read_at(self, offset: int, count: int) -> bytearray:
        """Read `count` bytes from `offset`; the caller has checked that the file has them."""
        data = bytearray(count)
        self.read_into(offset, memoryview(data))
        return data

    def holes(self, start: int, end: int) -> list[tuple[int, int]]:
        """Stretches of at most this range, [first, last), that the disk does not hold and that read as zeros.

        A file system that cannot tell has none. The list ends after 4096 of them.
        """
        found: list[tuple[int, int]] = []
        if not hasattr(os, "SEEK_HOLE") or self._handle < 0:
            return found
        at = start
        with contextlib.suppress(OSError):
            while at < end and len(found) < _MOST_HOLES:
                hole = os.lseek(self._handle, at, os.SEEK_HOLE)
                if hole >= end:
                    break
                try:
                    at = os.lseek(self._handle, hole, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise
                    at = end  # the hole reaches to the end of the file
                found.append((hole, min(at, end)))
        return found

    def tensor(self, offset: int, count: int, alignment: int) -> torch.Tensor:
        """uint8 [count]: a view of the map, or a copy (mmap=False, or not on a multiple of `alignment`)."""
        import torch

        if count == 0:
            return torch.empty(0, dtype=torch.uint8)
        if not self.mapped or offset % alignment:
            return torch.frombuffer(self.read_at(offset, count), dtype=torch.uint8)
        if self._map is None:
            self._map = self._make_map()
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=offset, count=count)

    def _make_map(self) -> mmap_module.mmap:
        """Map the whole file copy on write, so that writing to a weight never changes the file."""
        if self._handle < 0:
            raise BadArgument(f"{printable(self.path)}: the file was closed and can no longer be read")
        self.check_unchanged()
        try:
            if _NO_RESERVE:
                private = mmap_module.MAP_PRIVATE | _NO_RESERVE
                access = mmap_module.PROT_READ | mmap_module.PROT_WRITE
                return mmap_module.mmap(self._handle, self.size, flags=private, prot=access)
            return mmap_module.mmap(self._handle, self.size, access=mmap_module.ACCESS_COPY)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise BadFile(self.path, f"cannot be mapped into memory: {reason}", "try mmap=False") from None

    def check_unchanged(self) -> None:
        """Compare size and modification time with those at opening.

        A file that was replaced or deleted is no fault: the open file exists until it is closed.

        Raises:
            BadFile: The file was written to or cut since it was opened.
        """
        try:
            status = os.fstat(self._handle) if self._handle >= 0 else Path(self.path).stat()
        except OSError:
            return
        device, inode, size, changed = self._state
        if (status.st_dev, status.st_ino) != (device, inode):
            return
        if status.st_size != size:
            fault = f"changed while in use: it had {size} bytes and now has {status.st_size}"
            raise BadFile(self.path, fault, "load it again")
        if status.st_mtime_ns != changed:
            raise BadFile(self.path, "changed while in use: it was written to meanwhile", "load it again")

    def digest(self, whole: bool) -> str:
        """SHA-256 in hexadecimal of the open file; each kind is computed once.

        Args:
            whole: Hash all data. False hashes the size as decimal text, the first MiB and the last MiB.

        Raises:
            BadFile: The file was changed, or cannot be read.
        """
        if whole not in self._digests:
            hasher = hashlib.sha256()
            if whole:
                for offset in range(0, self.size, _SAMPLE):
                    hasher.update(self.read_at(offset, min(_SAMPLE, self.size - offset)))
            else:
                sample = min(_SAMPLE, self.size)
                hasher.update(str(self.size).encode())
                hasher.update(self.read_at(0, sample))
                hasher.update(self.read_at(self.size - sample, sample))
            self.check_unchanged()
            self._digests[whole] = hasher.hexdigest()
        return self._digests[whole]

    def close(self) -> None:
        """Let the file go. Tensors that were handed out stay valid."""
        self._map = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        if getattr(self, "_handle", -1) >= 0:
            self.close()


class WeightFile:
    """Base class of model files; as a context manager it closes the file at the end.

    Attributes:
        path: Path as given.
        size: Bytes on disk.
        metadata: Key -> value, as the file states them.
        tensors: Name -> TensorInfo, in the file's order.
        alignment: Tensors start on multiples of this many bytes.
        notes, cautions: Remarks on the file as a download; loading warns of cautions.
    """

    kind = ""
    alignment = 1
    notes: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    swapped = False  # numbers are stored in the other byte order than this machine's

    def __init__(self, place: str | PathLike[str] | Source, mmap: bool = True) -> None:
        source = place if isinstance(place, Source) else Source(place, mmap)
        self.source = source
        self.path = source.path
        self.size = source.size
        self.metadata: Mapping[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}

    @property
    def sources(self) -> tuple[Source, ...]:
        """The files on disk that the model consists of."""
        return (self.source,)

    @property
    def places(self) -> tuple[str, ...]:
        """Paths of the files on disk that the model consists of."""
        return tuple(source.path for source in self.sources)

    def identity(self, full: bool = False) -> dict[str, Any]:
        """Name (never the folder), size and hash of the model that was opened, for an image's settings.

        Files of up to 64 MiB, and any file with `full`, get `sha256` of the whole. Reading 7 GB takes longer
        than some images do, so larger files get `fingerprint` instead: SHA-256 over the size as decimal text,
        the first MiB and the last MiB. That tells models apart (the header lists every tensor, the tail holds
        weights) but does not prove that nobody changed a byte in the middle. A model in shards has SHA-256
        over its files' digests in hexadecimal, the index first.

        Raises:
            BadFile: A file was changed since it was opened, or cannot be read.
        """
        wholes = [full or source.size <= WHOLE_FILE for source in self.sources]
        digests = [source.digest(whole) for source, whole in zip(self.sources, wholes, strict=True)]
        joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return {
            "name": printable(Path(self.path).name),
            "size": sum(source.size for source in self.sources),
            "sha256" if all(wholes) else "fingerprint": joined,
        }

    def source_of(self, name: str) -> Source:
        """The file on disk that holds the tensor's bytes."""
        return self.source

    def tensor(self, name: str) -> QuantTensor:
        """The tensor with its format and shape; a view of the file if mmap is on.

        Raises:
            BadFile: The file has no such tensor, or can no longer be read.
        """
        from zimage_core.quant.tensor import QuantTensor

        info = self.tensors.get(name)
        if info is None:
            fault = f"no tensor {printable(name)} among its {len(self.tensors)}"
            raise BadFile(self.path, fault, "`zimage inspect --tensors` lists them")
        largest = max(int(field.code[1:]) for field in info.format.fields)
        data = self.source_of(name).tensor(info.offset, info.nbytes, largest)
        if self.swapped:
            data = data.view(-1, largest).flip(1).contiguous()
        *rows, k = info.shape or (1,)
        return QuantTensor(data.view(*rows, info.format.row_bytes(k)), info.format, info.shape)

    def check_unchanged(self) -> None:
        """Raise BadFile if a file was written to or cut since it was opened; cheap enough for every run."""
        self.source.check_unchanged()

    def close(self) -> None:
        """Let the file go. Tensors that were handed out stay valid."""
        self.source.close()

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = printable(Path(self.path).name)
        return f"{type(self).__name__}({name!r}, {len(self.tensors)} tensors, {self.size} bytes)"


def path_text(path: object) -> str:
    """The path as text.

    Raises:
        BadArgument: It is no path, or empty.
    """
    if not isinstance(path, (str, PathLike)) or not isinstance(text := fspath(path), str):
        raise BadArgument(f"a path is {printable(repr(path), 60)}, wanted str or os.PathLike of str")
    if not text:
        raise BadArgument("a path is empty, wanted the name of a file or folder")
    return text

"""Notices downloads that are not whole: parts to be joined, unfinished files, holes and bytes left over.

What cannot be right is an error elsewhere, which `explained` completes by what the name and the folder tell.
What may still be right is a remark on the open file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import NamedTuple

from zimage_core.errors import BadFile, printable
from zimage_core.files.units import in_bytes
from zimage_core.weights.source import AGAIN, TensorInfo, WeightFile

LONG_RUN = 1 << 16
"""Bytes of zeros in a row that no trained matrix holds; a dead channel is shorter."""
SMALL = 4096
"""Smaller matrices may be all zero, and that many bytes behind the last tensor are no second download."""
_UNTRAINED_ROWS = 1024  # of an embedding: its vocabulary is padded with tokens that no text ever held

_EMBEDDINGS = ("token_embd.weight", "embed_tokens.weight")
# patterns are texts: `re` compiles and keeps those that are used, which for most files are none
_MAY_BE_ZERO = r"before_proj|after_proj|zero|control|lora|lokr|hada|\boft_|\.diff(_[bm])?$|siglip"
"""Names of adapters, ControlNets and unused branches, which begin as zeros and may stay so."""

_UNFINISHED = (
    r"\.(part|partial|filepart|crdownload|download|opdownload|incomplete|unfinished|tmp|temp|aria2|aria2__temp"
    r"|!ut|!qb|xltd|td)$"
)
_MODEL = r"\.(?:gguf|safetensors|sft)"
_PARTS = (
    r"(?P<stem>.+?)[._-](?:part|split|chunk|piece)[._-]?(?P<number>\d{1,5}|a[a-z]{1,2}|[a-h]|(?<=[._-])[a-z])"
    rf"(?:[._-]?of[._-]?(?P<total>\d{{1,5}}))?(?P<ending>{_MODEL})?",
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<ending>\.gguf)",
    r"(?P<stem>.+)\.(?P<number>\d{1,5})(?P<total>)(?P<ending>)",
    rf"(?P<stem>.+{_MODEL})[._-]?(?P<number>a[a-z]{{1,2}})(?P<total>)(?P<ending>)",
    r"(?P<stem>.+)\.(?P<number>a[a-z])(?P<total>)(?P<ending>)",
    r"(?P<stem>x)(?P<number>[a-z]{2})(?P<total>)(?P<ending>)",
)
"""Names of files that were cut by bytes, as `split`, 7-Zip and uploaders number them."""
_NUMBERED, _VAGUE = 1, 2  # the names of llama-gguf-split's own parts; from here on, names that may mean more
_ZIPPED = r"(.+)\.z\d\d"
_MOST_ENTRIES = 10_000
_MOST_NAMED = 12


class _Part(NamedTuple):
    """One part of a file that was cut by bytes.

    Args:
        whole: Name of the whole file.
        number: The part's number or letters.
        total: Number of parts, or 0 if the name does not tell.
        pattern: Index in `_PARTS`.
        frame: The name without the number, which all parts share.
    """

    whole: str
    number: str
    total: int
    pattern: int
    frame: str

    @property
    def place(self) -> int:
        """The number, or the number that letters stand for: a or aa is 0."""
        if self.number.isdigit():
            return int(self.number)
        place = 0
        for letter in self.number:
            place = 26 * place + ord(letter) - ord("a")
        return place

    def joins(self, other: _Part | None) -> bool:
        """Whether both are parts of one file; numbers with leading zeros have one width."""
        if other is None or other.frame != self.frame:
            return False
        if len(self.number) == len(other.number):
            return self.number.isdigit() == other.number.isdigit()
        return (
            self.number.isdigit() and other.number.isdigit() and "0" not in (self.number[0], other.number[0])
        )


def _part(name: str) -> _Part | None:
    for pattern, regex in enumerate(_PARTS):
        if found := re.fullmatch(regex, name, re.IGNORECASE):
            whole = found["stem"] + (found["ending"] or "")
            whole = "joined.gguf" if whole == "x" else whole
            frame = f"{name[: found.start('number')]}*{name[found.end('number') :]}"
            return _Part(whole, found["number"].lower(), int(found["total"] or 0), pattern, frame)
    return None


def explained(error: BadFile, head: bytes) -> BadFile:
    """The error of a file that could not be read, completed by what its name and its folder tell.

    Args:
        error: The error; its path is the file.
        head: The first bytes of the file.
    """
    name = Path(error.path).name
    part = _part(name)
    cut = "truncated" in error.fault
    # a header that refuses the file says more than its name; llama.cpp's own parts have one each
    headed = head[:4] == b"GGUF" or head[8:9] == b"{"
    if part is not None and not (headed and (not cut or part.pattern == _NUMBERED)):
        return _of_part(error, part) or error
    if zipped := re.fullmatch(_ZIPPED, name, re.IGNORECASE):
        whole = shlex.quote(printable(f"{zipped[1]}.zip", 120))
        return BadFile(error.path, "one part of a zip archive", f"unpack all parts together: `7z x {whole}`")
    if reason := unfinished(error.path):
        return BadFile(error.path, f"{error.fault}; {reason}", "let the download finish, or start it again")
    return error


def _of_part(error: BadFile, part: _Part) -> BadFile | None:
    """The error of a part of a file; None if its name may mean something else."""
    place = Path(error.path)
    beside = {place.name: part}
    with contextlib.suppress(OSError), os.scandir(place.parent) as entries:
        for entry in itertools.islice(entries, _MOST_ENTRIES):
            other = _part(entry.name)
            if other is not None and part.joins(other):
                beside[entry.name] = other
    # wget writes a second z.gguf as z.gguf.1, and any name may end in two digits
    vague = part.pattern >= _VAGUE and not re.search(_MODEL, part.whole, re.IGNORECASE)
    if len(beside) == 1 and (vague or (part.pattern == _VAGUE and len(part.number) == 1)):
        return None
    names = sorted(beside, key=lambda name: beside[name].place)
    places = [beside[name].place for name in names]
    complete = places[0] <= part.number.isdigit() and places == list(range(places[0], places[0] + len(names)))
    fault = "one part of a file that was cut by bytes, which is no model alone"
    target = shlex.quote(printable(part.whole, 120))
    if not complete or len(names) < max(2, part.total):
        there = "no other part is" if len(names) == 1 else f"only {', '.join(names[:_MOST_NAMED])} are"
        join = f"join them in order: `cat PARTS > {target}`"
        hint = f"{printable(there, 400)} in its folder: download all, then {join}"
    else:
        shown = [shlex.quote(printable(name, 120)) for name in names]
        if len(shown) > _MOST_NAMED:
            shown = [*shown[:2], "...", *shown[-2:]]
        hint = f"join the {len(names)} parts in order: `cat {' '.join(shown)} > {target}`"
    return BadFile(error.path, fault, hint)


def unfinished(path: str) -> str:
    """Why the file is probably still being downloaded, from its name and its folder, or ""."""
    if found := re.search(_UNFINISHED, path, re.IGNORECASE):
        return f"{printable(found[0])} is how downloads that have not finished are named"
    if os.path.lexists(f"{path}.aria2"):
        return "aria2's control file lies beside it, so its download has not finished; let it finish"
    return ""


def beside(folder: str | os.PathLike[str]) -> str:
    """What a folder holds instead of a model file, as the end of a sentence: a part or an unfinished file."""
    try:
        names = sorted(entry.name for entry in itertools.islice(Path(folder).iterdir(), _MOST_ENTRIES))
    except OSError:
        return ""
    for name in names:
        if re.search(_MODEL, name, re.IGNORECASE) and not re.search(f"{_MODEL}$", name, re.IGNORECASE):
            if _part(name) is not None:
                return f", but {printable(name, 120)}, one part of a file; name it to be told how to join all"
            if re.search(_UNFINISHED, name, re.IGNORECASE):
                return f", but {printable(name, 120)}, whose download has not finished"
    return ""


def remarks(file: WeightFile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and cautions on a file whose header is sound; takes a few system calls."""
    notes: list[str] = []
    cautions = [reason for reason in [unfinished(file.path)] if reason]
    tensors: dict[str, list[TensorInfo]] = {}
    for name, info in file.tensors.items():
        tensors.setdefault(file.source_of(name).path, []).append(info)
    for source in file.sources:
        inside = tensors.get(source.path)
        if not inside:
            continue
        end = max(info.offset + info.nbytes for info in inside)
        behind = source.size - -(-end // file.alignment) * file.alignment
        if behind > 0:
            text = f"{in_bytes(behind)} lie behind the last tensor, which no tensor uses"
            if behind > SMALL:
                why = "a download that was resumed wrongly has such bytes"
                cautions.append(f"{text}: {why}; if images are noise, {AGAIN}")
            else:
                notes.append(text)
        cautions += _holes(inside, source.holes(min(info.offset for info in inside), end))
    return tuple(notes), tuple(cautions)


def _holes(tensors: list[TensorInfo], holes: list[tuple[int, int]]) -> list[str]:
    """A caution if data of matrices was never written to the disk; none for holes that may be meant."""
    if not holes:
        return []
    starts, ends = [start for start, _ in holes], [end for _, end in holes]
    unwritten, names = 0, []
    for info in tensors:
        first, last = info.offset, info.offset + info.nbytes
        inside = holes[bisect_right(ends, first) : bisect_left(starts, last)]
        most = max((min(end, last) - max(start, first) for start, end in inside), default=0)
        if most > zeros_allowed(info):
            unwritten += most
            names.append(info.name)
    if not names:
        return []
    some = ", ".join(printable(name, 80) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return [
        f"{in_bytes(unwritten)} of {len(names)} tensors were never written to the disk and read as zeros "
        f"({some}): a download that has not finished; {AGAIN}"
    ]


def zeros_allowed(info: TensorInfo) -> int:
    """The longest run of zero bytes that a sound tensor may hold, in bytes.

    Vectors, small matrices, adapters and ControlNets may be all zero; an embedding may have zeros for tokens
    that were never trained.
    """
    wide = [size for size in info.shape if size > 1]
    if (
        len(wide) < 2
        or info.nbytes < SMALL
        or info.format.name == "BOOL"
        or re.search(_MAY_BE_ZERO, info.name)
    ):
        return info.nbytes
    allowed = LONG_RUN - 1
    if info.name.endswith(_EMBEDDINGS):
        allowed = max(allowed, _UNTRAINED_ROWS * (info.nbytes // info.shape[0]))
    return min(allowed, info.nbytes - 1)

"""Reads small text and JSON files of unknown origin: tokenizers, configs, recipes, prompts.

A path may lead to a FIFO, a device, 100 GB of zeros or JSON nested a million levels deep. Each of these
raises `BadFile`, and reading takes little more memory than the file has bytes.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import stat
from collections import Counter
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NoReturn

from zimage_core.errors import BadFile, printable

MAX_BYTES = 100_000_000  # the real files have 3 to 33 MB
MAX_DEPTH = 64
MAX_DIGITS = 40  # 2^64 has 20; transformers writes 31 for a tokenizer without a longest text

_REASONS = {
    errno.ENOENT: "no such file",
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.ELOOP: "a loop of symbolic links",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "no such file (part of the path is not a directory)",
    errno.EMFILE: "too many files are open",
}


def read_file(path: str | PathLike[str]) -> bytes:
    """Read a regular file of at most `MAX_BYTES`.

    Raises:
        BadFile: The file is missing, unreadable, not a regular file, empty or too large.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not block until there is a writer
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        reason, hint = why_not_opened(path, error)
        raise BadFile(path, f"the file cannot be opened: {reason}", hint) from None
    except ValueError:
        raise BadFile(path, "the path holds a NUL character") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}.get(
                stat.S_IFMT(status.st_mode), "a device"
            )
            raise BadFile(path, f"the path is {kind}, not a regular file")
        if status.st_size > MAX_BYTES:
            raise BadFile(path, f"the file is larger than {MAX_BYTES} bytes, no text that is read here is")
        with os.fdopen(os.dup(handle), "rb") as file:
            data = file.read(status.st_size)
    finally:
        os.close(handle)
    if not data:
        raise BadFile(path, "the file is empty, JSON or text was expected")
    return data


def why_not_opened(path: str | PathLike[str], error: OSError) -> tuple[str, str]:
    """Why a file cannot be opened, and what to do about it."""
    reason = _REASONS.get(error.errno or 0) or (error.strerror or type(error).__name__).lower()
    if isinstance(error, FileNotFoundError) and (target := _missing_target(path)):
        return (
            f"a symbolic link whose target {printable(target)!r} is missing, as an interrupted download or a "
            "cleaned cache leaves it",
            "download it again",
        )
    if isinstance(error, PermissionError):
        return reason, "allow it with `chmod u+r` or ask its owner"
    return reason, "check the path" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else ""


def _missing_target(path: str | PathLike[str]) -> str:
    """The target of a symbolic link; "" if the path is none."""
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def read_text(path: str | PathLike[str]) -> str:
    """Read a text file in UTF-8; a byte order mark is dropped.

    Raises:
        BadFile: `read_file` refuses the file, or it is not UTF-8.
    """
    data = read_file(path)
    if data.startswith(b"version https://git-lfs"):
        raise BadFile(path, "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`")
    return decode_text(path, data)


def decode_text(path: str | PathLike[str], data: bytes) -> str:
    """Text of UTF-8 bytes; a byte order mark is dropped.

    Raises:
        BadFile: The bytes are not UTF-8, or hold NUL, as UTF-16 does; the message names `path`.
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    if wide or b"\0" in data:
        fault = "text in UTF-16 or UTF-32" if wide else "binary, or text in UTF-16: it holds NUL bytes"
        raise BadFile(path, f"not JSON or text in UTF-8 but {fault}", "save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = f"not JSON or text in UTF-8: byte {error.start} is invalid"
        raise BadFile(path, fault, "save it as UTF-8") from None


def lines(text: str) -> list[str]:
    """Lines of a text, which end with LF, CRLF or CR and with nothing else.

    `str.splitlines` would also end them at form feeds and at other separators that occur within a line.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        BadFile: `read_text` refuses the file, it is not a JSON object, or it has duplicate keys, NaN,
            infinity, numbers of more than `MAX_DIGITS` digits or more than `MAX_DEPTH` levels.
    """

    def fail(fault: str) -> NoReturn:
        raise BadFile(path, fault)

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            fail(f"JSON number of {len(digits)} digits is out of range")
        return int(digits)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        for key, value in pairs:
            if (number := _not_finite(value)) is not None:
                name = "NaN" if number != number else "Infinity"
                fail(f"invalid JSON number {name} as {printable(key, 60)!r}")
        if len(table) != len(pairs):
            repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
            fail(f"duplicate JSON key {printable(repeated, 60)!r}")
        return table

    text = read_text(path)
    try:
        value = json.loads(text, parse_int=integer, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise BadFile(path, f"not valid JSON: {error.msg} at line {error.lineno}") from None
    except RecursionError:
        raise BadFile(path, f"JSON nested more than {MAX_DEPTH} deep") from None
    if not isinstance(value, dict):
        raise BadFile(path, f"a JSON object was expected, found {type(value).__name__}")
    _check_depth(value, path)
    return value


def _not_finite(value: Any) -> float | None:
    """A NaN or infinity that a value is, or that a list holds."""
    if isinstance(value, list):
        return next((found for each in value if (found := _not_finite(each)) is not None), None)
    return value if isinstance(value, float) and not math.isfinite(value) else None


def _check_depth(value: dict[str, Any], path: str | PathLike[str]) -> None:
    """Refuse deep nesting; goes level by level, because recursion would fail at such a depth."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise BadFile(fspath(path), f"JSON nested more than {MAX_DEPTH} deep")

"""Every error that the library raises on purpose.

A message is one sentence with four parts: where, what was found, what was wanted, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def printable(text: object, limit: int = 200) -> str:
    """Text from a file or a user, safe to show: control and bidi characters escaped, length capped."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text)
    )
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


class ZImageError(Exception):
    """Base of all errors of this library."""


class BadFile(ZImageError):
    """A file is damaged, truncated, or not what its header says.

    Args:
        path: The file.
        fault: What was found and what was wanted, without the file's name.
        hint: What the user can do about it.
    """

    def __init__(self, path: str | PathLike[str], fault: str, hint: str = "") -> None:
        self.path = fspath(path)
        self.fault = fault
        self.hint = hint
        super().__init__(f"{printable(self.path)}: {fault}{'; ' + hint if hint else ''}")


class WrongModel(BadFile):
    """A sound file that holds another model than the one asked for."""


class BadRows(BadFile):
    """Rows of a table cannot be drawn.

    Args:
        path: The table.
        rows: Number and reason of the first ones.
        count: How many there are.
    """

    def __init__(self, path: str | PathLike[str], rows: Sequence[tuple[int, str]], count: int) -> None:
        self.rows = rows
        self.count = count
        number, reason = rows[0]
        more = f" (and {count - 1} more)" if count > 1 else ""
        hint = "correct the table, or leave such rows out with --skip-bad (skip_bad=True)"
        super().__init__(path, f"row {number}: {reason}{more}", hint)


class BadWeights(ZImageError):
    """Tensors are missing, unexpected or misshapen, or hold values that cannot be used."""


class UnknownFormat(ZImageError):
    """A tensor type that this library does not describe."""


class BadShape(ZImageError, ValueError):
    """A tensor's shape does not fit the operation."""


class BadArgument(ZImageError, ValueError):
    """An argument is outside its range; the message names it and the range."""


class Unsupported(ZImageError):
    """A combination that is possible but not implemented; the message says what to do instead."""


class OverBudget(ZImageError):
    """A memory budget is too small for a run; the message says what would fit."""


class NonFinite(ZImageError):
    """NaN or infinity in the computation; the message names the place where it first appeared."""


class Busy(ZImageError):
    """The pipeline is running in another thread, or was called again from its own callback."""


class DeviceFault(ZImageError):
    """A GPU or its driver failed during a run."""


class RankFailed(ZImageError):
    """Another rank of a parallel run failed, ended or does not answer; the message has its reason."""


class OutOfMemory(ZImageError):
    """A GPU has too little memory for a run.

    Args:
        message: The message.
        latents: Where only the decoding failed, the finished latents of the run, [B, 16, h, w] float32 on the
            CPU, as for `output_type="latent"`, so that nothing has to be denoised again; else None.
    """

    def __init__(self, message: str, latents: Tensor | None = None) -> None:
        self.latents = latents
        super().__init__(message)

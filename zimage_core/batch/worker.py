"""The worker of a batch: it loads the model once and makes one image of each row.

A worker needs nothing but its `Spec`, which can be pickled, so the same class serves the loop in this process
and an actor on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from zimage_core.batch.loras import Switch
from zimage_core.batch.model import Model
from zimage_core.errors import Busy, DeviceFault, ZImageError, printable
from zimage_core.files import png

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline
    from zimage_core.run.result import ZImageResult


@dataclass(frozen=True)
class Spec:
    """What a worker has to know; it can be pickled.

    Args:
        model: The model and how it computes.
        threads: Threads of torch on a CPU. They are stated, since their number changes the last bits.
        metadata: Whether the settings are written into each PNG.
    """

    model: Model = field(default_factory=Model)
    threads: int = 1
    metadata: bool = True


@dataclass(frozen=True)
class Row:
    """One image that is wanted; it can be pickled.

    Args:
        number: Number of the row in the table, from 1.
        key: Hash of all that decides the image, in hexadecimal; see `batch.rows`.
        call: Arguments of the pipeline's call, with a seed; images are paths.
        loras: Files and weights of the adapters, in their order.
        kept: Further columns that go into the index as they are.
    """

    number: int
    key: str
    call: Mapping[str, Any]
    loras: tuple[tuple[str, float], ...] = ()
    kept: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """A finished image.

    Args:
        row: The row.
        png: The PNG file, as `result.save` writes it.
        settings: Settings of the run, as in the PNG.
        seconds: Time of the run.
    """

    row: Row
    png: bytes
    settings: Mapping[str, Any]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """A row that gave no image.

    Args:
        row: The row.
        reason: Why, in one sentence.
    """

    row: Row
    reason: str


class Worker:
    """Makes images of rows, one at a time. It loads the model when it is built.

    Rows of one size gain nothing from being drawn together: members of a batch run one after the other.

    Args:
        spec: The description.
        pipe: A pipeline to use instead of loading one; its adapters stay beside those of the rows.

    Raises:
        ZImageError: The model cannot be loaded.
    """

    def __init__(self, spec: Spec, pipe: ZImagePipeline | None = None) -> None:
        import torch

        self.spec = spec
        self.pipe = spec.model.load() if pipe is None else pipe
        self._lent = pipe is not None
        if self.pipe.device.type == "cpu":
            torch.set_num_threads(spec.threads)
        self._loras = Switch(self.pipe)

    def __call__(self, row: Row) -> Done | Failed:
        """Make the image of a row.

        Raises:
            DeviceFault: The GPU failed, which lasts until the process ends.
        """
        return self.finish(row, self.draw(row))

    def draw(self, row: Row) -> ZImageResult | Failed:
        """The first half: the run itself, in the thread that called.

        Raises:
            DeviceFault, Busy: Nothing that another row could change.
        """
        try:
            self._loras.use(row.loras)
            return self.pipe(**row.call)  # type: ignore[return-value]
        except (DeviceFault, Busy):
            raise
        except ZImageError as error:
            for file in self.pipe.files().values():
                file.check_unchanged()  # a model that was replaced meanwhile fails every row
            return Failed(row, str(error))
        except Exception as error:  # noqa: BLE001  one row that fails does not cost the others
            return Failed(row, f"internal error, {type(error).__name__}: {printable(error)}")

    def finish(self, row: Row, result: ZImageResult | Failed) -> Done | Failed:
        """The second half: the PNG, which another thread can make while the next row is drawn."""
        if isinstance(result, Failed):
            return result
        try:
            settings = result.metadata()
            data = png.encode(cast(Any, result.images)[0], settings if self.spec.metadata else None)
            return Done(row, data, settings, result.timings.total)
        except Exception as error:  # noqa: BLE001  as above
            return Failed(row, f"internal error, {type(error).__name__}: {printable(error)}")

    def close(self) -> None:
        """Give a pipeline that was lent its own adapters back."""
        if self._lent:
            self._loras.restore()

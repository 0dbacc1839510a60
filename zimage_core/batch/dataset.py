"""Many images from a table: `generate_dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

from zimage_core.batch.identity import context_of, identity_of, survey_of, threads_of
from zimage_core.batch.model import EDGES, Model
from zimage_core.batch.rows import Context, Faults, read_rows, sealed
from zimage_core.batch.saving import Finish, Saver
from zimage_core.batch.shards import FORMATS, PARQUET
from zimage_core.batch.tables import given_rows, import_parquet, read_table
from zimage_core.batch.worker import Done, Failed, Row, Spec, Worker
from zimage_core.batch.writer import Writer
from zimage_core.errors import BadArgument, BadFile, BadRows
from zimage_core.run import checks

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

SHARD_SIZE = 1000
"""Images of a shard: 1 to 2 GB at 1024 x 1024."""
Rows = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """What a run made.

    Args:
        out: The dataset's folder.
        rows: Rows of the table that can be drawn.
        made: Images made in this run.
        skipped: Rows that were done before, or that repeat another row.
        failed_count: Rows that gave no image.
        failed: These rows with the reasons, when the run has ended; also in failures.jsonl.
        bad: Number and reason of rows that were left out because of `skip_bad`, up to 1000.
        bad_count: How many were left out.
        seconds: Time of the run, with the loading of the model.
    """

    out: Path
    rows: int
    made: int = 0
    skipped: int = 0
    failed_count: int = 0
    failed: Sequence[Failed] = ()
    bad: Sequence[tuple[int, str]] = ()
    bad_count: int = 0
    seconds: float = 0.0

    @property
    def images_per_hour(self) -> float:
        """Images made in an hour."""
        return 3600 * self.made / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> int:
        """Rows that are neither made nor skipped nor failed."""
        return self.rows - self.made - self.skipped - self.failed_count


def generate_dataset(
    rows: Rows,
    out: str | os.PathLike[str],
    *,
    pipe: ZImagePipeline | None = None,
    format: str = "png",
    shard_size: int = SHARD_SIZE,
    ray: bool | str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    keep: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    metadata: bool = True,
    on_progress: Callable[[Report], None] | None = None,
    **model: Any,
) -> Report:
    """Make an image of every row of a table, and write them as a dataset.

    A row has any arguments of the pipeline's call, under their names or those of the options of
    `zimage generate`, and `lora`, a file or "FILE:WEIGHT" or a list of these. It needs a prompt. Without a
    seed it gets one that follows from its content. All rows are checked before a model is loaded.

    The image of a row is, to the byte of its PNG, what `pipe(...)` and `result.save` give with the same
    settings, device and number of threads. A row that was done before is skipped; it is known by the
    arguments, the contents of the images it names, its adapters, the model's files and how it computes. So a
    run that was interrupted, or killed, is started again with the same call, and nothing that was finished is
    made again.

    Args:
        rows: A table: JSON lines, CSV, Parquet or text with a prompt a line; or dicts. Paths in a table are
            relative to its folder.
        out: Folder of the dataset; new, empty, or that of an earlier run with the same format.
        pipe: A pipeline that draws; its active adapters and its ControlNets are used. Default: the one of
            the arguments in `model`.
        format: "png" for a folder of PNG files, "webdataset" for tar shards, "parquet" for Parquet files with
            the bytes of images. Each has index.jsonl, a line an image.
        shard_size: Images of a shard.
        ray: True to draw by workers of a Ray that is started here, or RAY_ADDRESS if that is set; else the
            address of a cluster: "HOST:PORT", or "auto" on one of its machines.
        workers: With `ray`: how many workers. Default: as many as the cluster has GPUs, or CPUs for.
        threads: Threads of torch on a CPU, which are part of what decides the last bits of an image. Default:
            those of torch if OMP_NUM_THREADS or MKL_NUM_THREADS is set; 1 for a small network such as the
            embedded one; else those of torch, one a core.
        limit: Draw no more than the first rows of the table.
        skip_bad: Leave rows out that cannot be drawn, and draw the others.
        keep: Columns that are no arguments, and go into the index as they are.
        defaults: Arguments for rows that do not give them.
        metadata: Write the settings into each PNG.
        on_progress: f(report so far), called after each image.
        model: Which model, as for `zimage generate`: model, variant, transformer, text_encoder, vae,
            tokenizer, siglip, dtype, compute, device, vram, ram, controlnets. Default: the embedded model.

    Returns:
        What was made. Rows that failed are listed there and do not end the run.

    Raises:
        BadRows: Rows cannot be drawn, and `skip_bad` is off; nothing was computed.
        BadArgument: An argument is out of range, or not known.
        BadFile: The table cannot be read, or the folder cannot be used or written to.
        Unsupported: A package is missing, or a network of `pipe` came from no file, so that an image could
            not be told from one of another model.
        DeviceFault: The GPU failed; what was finished is kept.
        KeyboardInterrupt: What was finished is kept.
    """
    _check(rows, out, pipe, keep, defaults, on_progress)
    checks.choice("format", format, FORMATS)
    checks.whole("shard_size", shard_size, 1, 1_000_000)
    if pipe is not None and (model or ray):
        raise BadArgument("pipe: a pipeline is in this process, and has its model; leave the others out")
    if workers is not None and not ray:
        raise BadArgument("workers: it goes with ray; one process draws one image at a time")
    if format == PARQUET:
        import_parquet()
    described = Model.of(model)
    known = described.survey() if pipe is None else survey_of(pipe)
    count = threads_of(known, threads)
    good, faults = _read(rows, context_of(described, known, pipe, defaults, keep))
    if not good and not faults.count:
        raise BadFile(
            _name(rows), "there is no row in it", "write a prompt a line, or one JSON object a line"
        )
    if faults.count and not skip_bad:
        raise BadRows(_name(rows), faults.listed, faults.count)
    if limit is not None:
        good = good[: checks.whole("limit", limit, 1, 1 << 60)]
    spec = Spec(_fitting(described, good) if pipe is None else described, count, metadata)
    with _Here(spec, pipe) if ray is None or ray is False else _on_ray(spec, ray, workers) as crew:
        good = sealed(good, identity_of(crew.spec, known, pipe))
        return _run(good, faults, Path(out), format, shard_size, crew, on_progress)


def _check(rows: Any, out: Any, pipe: Any, keep: Any, defaults: Any, on_progress: Any) -> None:
    """Refuse arguments of a wrong type before anything is read."""
    from zimage_core.pipeline import ZImagePipeline

    table = isinstance(rows, (str, os.PathLike))
    text = os.fspath(out) if isinstance(out, (str, os.PathLike)) else ""
    for name, value, right, wanted in (
        ("rows", rows, table or (isinstance(rows, Iterable) and not isinstance(rows, (bytes, Mapping))),
         "the path of a table, or dicts one after the other"),
        ("out", out, isinstance(text, str) and text != "" and "\0" not in text, "the path of a folder"),
        ("pipe", pipe, pipe is None or isinstance(pipe, ZImagePipeline), "a ZImagePipeline"),
        ("keep", keep, isinstance(keep, Collection) and not isinstance(keep, (str, bytes)),
         "a list of columns, such as ['id']"),
        ("defaults", defaults, defaults is None or isinstance(defaults, Mapping), "a dict of arguments"),
        ("on_progress", on_progress, on_progress is None or callable(on_progress), "a function"),
    ):  # fmt: skip
        if not right:
            raise BadArgument(f"{name}: got {checks.shown(value)}, wanted {wanted}")


class Crew(Protocol):
    """Who draws: this process, or workers of Ray.

    Attributes:
        spec: The description of a worker, with its device decided.
    """

    spec: Spec

    def __enter__(self) -> Crew: ...

    def __exit__(self, *_: object) -> None: ...

    def results(self, rows: Sequence[Row]) -> Iterator[Finish | Done | Failed]:
        """An outcome of each row, or what gives it, in any order."""


def _run(
    rows: Sequence[Row],
    faults: Faults,
    out: Path,
    form: str,
    shard_size: int,
    crew: Crew,
    on_progress: Callable[[Report], None] | None,
) -> Report:
    """Draw the rows that are not done yet, and write each image as soon as it is finished."""
    writer = Writer(out, form, shard_size)
    made = failed = 0
    try:
        wanted = writer.begin(rows)
        report = Report(
            out, len(rows), skipped=len(rows) - len(wanted), bad=faults.listed, bad_count=faults.count
        )
        began = perf_counter()

        def save(outcome: Done | Failed) -> None:
            nonlocal made, failed
            writer.add(outcome)
            made += isinstance(outcome, Done)
            failed += isinstance(outcome, Failed)

        def so_far() -> Report:
            return replace(report, made=made, failed_count=failed, seconds=perf_counter() - began)

        saver = Saver(save)
        try:
            for result in crew.results(wanted) if wanted else ():
                saver.put(result)
                if on_progress is not None:
                    on_progress(so_far())
        finally:
            saver.close()
            if on_progress is not None:  # also of a run that ends here: what waited was saved meanwhile
                on_progress(so_far())
        writer.finish()
        report = replace(so_far(), failed=writer.failures())
    finally:
        writer.close()
    return report


class _Here:
    """The crew in this process: one row after the other is drawn, in this thread.

    Args:
        spec: The description.
        pipe: A pipeline that is loaded already.
    """

    def __init__(self, spec: Spec, pipe: ZImagePipeline | None) -> None:
        self.spec = spec if pipe is not None else replace(spec, model=spec.model.placed())
        self._pipe = pipe
        self._worker: Worker | None = None
        self._threads = torch.get_num_threads()

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        if self._worker is not None:
            self._worker.close()

    def results(self, rows: Sequence[Row]) -> Iterator[Finish | Done | Failed]:
        """The last part of the work on each row, in their order."""
        self._worker = worker = Worker(self.spec, self._pipe)
        for row in rows:
            drawn = worker.draw(row)
            yield partial(worker.finish, row, drawn)


def _on_ray(spec: Spec, address: bool | str, workers: int | None) -> Crew:
    from zimage_core.batch.ray import Pool

    return Pool(spec, address, workers if workers is None else checks.whole("workers", workers, 1, 1 << 20))


def _read(rows: Rows, context: Context) -> tuple[list[Row], Faults]:
    if isinstance(rows, (str, os.PathLike)):
        table = Path(rows)
        folder = Path.cwd() if str(rows) == "-" else table.absolute().parent
        return read_rows(read_table(table, context.keep), replace(context, folder=folder))
    return read_rows(given_rows(rows), replace(context, folder=Path.cwd()))


def _name(rows: Rows) -> str:
    if not isinstance(rows, (str, os.PathLike)):
        return "rows"
    return "standard input" if str(rows) == "-" else str(rows)


def _fitting(model: Model, rows: Sequence[Row]) -> Model:
    """The embedded model with its ControlNet, or its Omni sibling, where the rows need them."""
    if not model.embedded:
        return model
    shown = sum("reference_images" in row.call for row in rows)
    if 0 < shown < len(rows):
        raise BadArgument(
            "reference_images: the embedded model that takes them is another one than that for text alone; "
            "put these rows into a table of their own"
        )
    if any("control_image" in row.call for row in rows) and not model.controlnets:
        model = replace(model, controlnets=(EDGES,))
    return replace(model, omni=bool(shown))

"""One case with its contestants: checked first, then timed in turn, then written as rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.records import Results
from benchmarks.timing import Call, Ceilings, Effort, Samples, measure, name_of


@dataclass(frozen=True)
class Contestant:
    """Somebody who does the work of a case.

    Args:
        name: For the table.
        call: One call on the inputs of that number; None skips it and `note` says why.
        error: Runs it once and returns the relative error of the result.
        limit: Largest error at which it is timed; NaN is above every limit.
        nbytes: Bytes that it must move at least.
        capture: Whether it may be timed inside a CUDA graph.
        timed: False checks without timing, for Triton's interpreter.
        note: For the table.
    """

    name: str
    call: Call | None = None
    error: Callable[[], float] | None = None
    limit: float = 0.0
    nbytes: float = 0.0
    capture: bool = True
    timed: bool = True
    note: str = ""


@dataclass
class Bench:
    """What all cases of a run share."""

    device: torch.device
    dtype: torch.dtype
    effort: Effort
    ceilings: Ceilings
    results: Results
    given: argparse.Namespace
    deadline: float = float("inf")
    """time.monotonic() after which no further case is begun."""

    @property
    def gpu(self) -> bool:
        """CUDA or HIP."""
        return self.device.type == "cuda"

    def limit(self, half: float, full: float) -> float:
        """An error limit for half precision or for float32."""
        return full if self.dtype == torch.float32 else half


def contest(
    bench: Bench,
    head: Mapping[str, Any],
    contestants: Sequence[Contestant],
    flops: float = 0.0,
    baseline: str = "",
    rotation: int = 1,
) -> list[dict[str, Any]]:
    """Check, time and write one case.

    Args:
        bench: The run.
        head: Columns that all rows share: what, case, format, n, k, m, count.
        contestants: In the order of the table.
        flops: Of one call.
        baseline: Whose time is the denominator of `ratio`; the first of the timed if it is not among them.
        rotation: Copies of the inputs.

    Returns:
        The rows.
    """
    head = {**head, "dtype": name_of(bench.dtype)}
    errors: dict[str, float | str] = {}
    refusals: dict[str, str] = {}
    fit = []
    for one in contestants:
        if one.call is None:
            refusals[one.name] = one.note or "skipped"
            continue
        try:
            errors[one.name] = "" if one.error is None else one.error()
            if bench.gpu:
                torch.cuda.synchronize(bench.device)
        except Exception as error:  # noqa: BLE001 - a contestant may fail in any way, the others go on
            refusals[one.name] = f"refused: {type(error).__name__}: {_first_line(error)}"
            continue
        if isinstance(errors[one.name], float) and not errors[one.name] <= one.limit:
            refusals[one.name] = f"refused: error {errors[one.name]:.2e} is above {one.limit:.0e}"
        elif one.timed:
            fit.append(one)
        else:
            refusals[one.name] = "checked in the interpreter, not timed"
    samples: dict[str, Samples] = {}
    if fit:
        calls = {one.name: one.call for one in fit}
        capture = {one.name: one.capture and bench.given.graphs for one in fit}
        try:
            with torch.no_grad():
                samples = measure(calls, bench.device, bench.effort, rotation, capture)
        except Exception as error:  # noqa: BLE001 - out of memory, say: the next case goes on
            refusals |= {
                n: f"failed while timed: {type(error).__name__}: {_first_line(error)}" for n in calls
            }
    base = baseline if baseline in samples else next(iter(samples), "")
    rows = []
    for one in contestants:
        row = {**head, "contestant": one.name, "error": errors.get(one.name, ""), "note": one.note}
        if one.name in samples:
            row |= _figures(samples[one.name], one.nbytes, flops, bench)
            if len(samples) > 1:
                row |= {"ratio": samples[one.name].ratio(samples[base]), "baseline": base}
        else:
            row["note"] = refusals[one.name]
        rows.append(row)
    bench.results.add(rows)
    return rows


def _figures(samples: Samples, nbytes: float, flops: float, bench: Bench) -> dict[str, Any]:
    median = samples.median
    floor = bench.ceilings.floor(nbytes, flops, name_of(bench.dtype))
    return {
        "how": samples.how,
        "median_us": median * 1e6,
        "p20_us": samples.quantile(0.2) * 1e6,
        "p80_us": samples.quantile(0.8) * 1e6,
        "gbps": nbytes / median / 1e9 if nbytes else "",
        "tflops": flops / median / 1e12 if flops else "",
        "of_ceiling": floor / median if floor else "",
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]

"""One case with its variants: checked first, then timed in turn, then written as rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import peers
from benchmarks.records import Results
from benchmarks.timing import Budget, Call, Ceilings, Samples, measure, name_of

UNCHECKED = "not checked"
"""Note of a row whose result nobody compared with anything."""


@dataclass(frozen=True)
class Variant:
    """One way to do the work of a case.

    Args:
        name: Its name in the table.
        call: One call on the inputs of that number; None skips it and `note` says why.
        error: Runs it once and returns the relative error of the result.
        limit: Largest error at which it is timed; NaN is above every limit.
        nbytes: Bytes that it must move at least.
        capture: Whether it may be timed inside a CUDA graph.
        timed: False checks without timing, for Triton's interpreter.
        note: What the table says beside it.
        flops: Operations of one call, where they are not those of the case.
    """

    name: str
    call: Call | None = None
    error: Callable[[], float] | None = None
    limit: float = 0.0
    nbytes: float = 0.0
    capture: bool = True
    timed: bool = True
    note: str = ""
    flops: float | None = None


@dataclass
class Bench:
    """What all cases of a run share."""

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    ceilings: Ceilings
    results: Results
    given: argparse.Namespace
    deadline: float = float("inf")
    """time.monotonic() after which no further case is begun."""

    @property
    def gpu(self) -> bool:
        """Whether the device is one of CUDA or HIP."""
        return self.device.type == "cuda"

    @property
    def deadline_passed(self) -> bool:
        """Whether the time of this part is used up."""
        return time.monotonic() > self.deadline

    @property
    def no_kernels(self) -> str:
        """Why Triton kernels do not run here, empty where they do; outside a GPU they are never timed."""
        if not peers.has("triton"):
            return "skipped: Triton is not installed"
        return "" if self.gpu or self.given.interpret else "skipped: Triton kernels need a GPU"

    def limit(self, half: float, full: float) -> float:
        """An error limit for half precision or for float32."""
        return full if self.dtype == torch.float32 else half

    def with_compiled(
        self,
        name: str,
        function: Callable[..., Any],
        inputs: Sequence[tuple[Any, ...]],
        error: Callable[[Call], float],
        **about: Any,
    ) -> list[Variant]:
        """`function` on inputs[i], and under torch.compile too where --compile asks for it."""

        def variant(label: str, run: Callable[..., Any], **more: Any) -> Variant:
            call = lambda i: run(*inputs[i % len(inputs)])  # noqa: E731
            return Variant(label, call, partial(error, call), **about | more)

        found = [variant(name, function)]
        if self.given.compile:
            found.append(variant(f"{name} compiled", torch.compile(function, dynamic=False), capture=False))
        return found


def run_case(
    bench: Bench,
    head: Mapping[str, Any],
    variants: Sequence[Variant],
    flops: float = 0.0,
    baseline: str = "",
    rotation: int = 1,
) -> list[dict[str, Any]]:
    """Check, time and write one case.

    Args:
        bench: The run.
        head: Columns that all rows share: what, case, format, n, k, m, count.
        variants: In the order of the table.
        flops: Operations of one call.
        baseline: Whose time is the denominator of `ratio` unless --baseline names another; the first of
            the timed if it is not among them.
        rotation: Copies of the inputs.

    Returns:
        The rows.
    """
    head = {**head, "dtype": name_of(bench.dtype)}
    errors: dict[str, float] = {}
    refusals: dict[str, str] = {}
    fit = []
    for one in variants:
        if one.call is None:
            refusals[one.name] = one.note or "skipped"
            continue
        try:
            if not bench.given.check:  # what cannot run is found out here, alone
                one.call(0)
            elif one.error is not None:
                errors[one.name] = one.error()
            if bench.gpu:
                torch.cuda.synchronize(bench.device)
        except Exception as error:  # noqa: BLE001 - a variant may fail in any way, the others go on
            refusals[one.name] = f"refused: {short(error)}"
            continue
        if not errors.get(one.name, 0.0) <= one.limit:
            refusals[one.name] = f"refused: error {errors[one.name]:.2e} is above {one.limit:.0e}"
        elif one.timed:
            fit.append(one)
        else:
            refusals[one.name] = "checked in the interpreter, not timed"
    samples: dict[str, Samples] = {}
    if fit:
        calls = {one.name: one.call for one in fit if one.call is not None}
        capture = {one.name: one.capture and bench.given.graphs for one in fit}
        try:
            with torch.no_grad():
                samples = measure(calls, bench.device, bench.budget, rotation, capture)
        except Exception as error:  # noqa: BLE001 - out of memory, say: the next case goes on
            refusals |= {name: f"failed while timed: {short(error)}" for name in calls}
    base = bench.given.baseline or baseline
    base = base if base in samples else next(iter(samples), "")
    rows = []
    for one in variants:
        note = one.note if bench.given.check else f"{UNCHECKED} {one.note}".rstrip()
        row = {**head, "variant": one.name, "error": errors.get(one.name, ""), "note": note}
        if one.name in samples:
            row |= timed(samples[one.name])
            median = samples[one.name].median
            work = flops if one.flops is None else one.flops
            floor = bench.ceilings.floor(one.nbytes, work, head["dtype"])
            row |= {
                "gbps": one.nbytes / median / 1e9 if one.nbytes else "",
                "tflops": work / median / 1e12 if work else "",
                "of_ceiling": floor / median if floor else "",
            }
            if len(samples) > 1:
                row |= {"ratio": samples[one.name].ratio(samples[base]), "baseline": base}
        else:
            row["note"] = refusals[one.name]
        rows.append(row)
    bench.results.add(rows)
    return rows


def timed(samples: Samples) -> dict[str, Any]:
    """The columns of a row that hold times."""
    p20, median, p80 = (samples.quantile(q) * 1e6 for q in (0.2, 0.5, 0.8))
    return {"how": samples.how, "median_us": median, "p20_us": p20, "p80_us": p80}


def short(error: Exception) -> str:
    """An exception on one line: its type and the beginning of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"

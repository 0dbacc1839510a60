"""Two models, or two settings of one, drawing the same pictures from the same noise.

A draws first. Its latents after every step are kept (1 MiB each at 1024 px), as are its pictures; the streams
between its blocks are set aside on disk, for a few steps of the first picture (see `blocks.py`; some 2 GB a
step of the 6B model at 1024 px in float32). Then A is let go and B is loaded, so that two large models are
never in memory together. B draws twice: freely, for pictures and the drift of its latents; and led, with A's
latents put in the place of its own after every step, for the error of its velocity where A was, and of its
blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zimage_core.errors import BadArgument
from zimage_core.pipeline import ZImagePipeline
from zimage_core.sampling import noise
from zimage_core.study.blocks import BlockError, BlockWatch, probes
from zimage_core.study.comparison import Comparison, PicturePair, StepError
from zimage_core.study.metrics import decibels, mean_squared_error, ssim
from zimage_core.study.spool import Spool

Model = ZImagePipeline | Callable[[], ZImagePipeline]
"""A pipeline, or what makes one when its turn comes and lets it go after."""
OnRun = Callable[[int], None]
"""(runs of the pipeline done)."""
RUNS = 3
"""Of the pipeline for each picture: A, B, B led by A."""
_OURS = ("prompt", "seed", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt",
         "callback_on_step_end", "callback_on_step_end_tensor_inputs", "debug")  # fmt: skip


@dataclass
class _Traced:
    """One run: start and latents after each step [steps + 1, C, h, w], noise levels, picture and settings."""

    latents: list[Tensor]
    sigmas: tuple[float, ...]
    picture: np.ndarray[Any, Any]
    settings: Mapping[str, Any]
    files: Mapping[str, Any]

    def velocity(self, step: int, after: Tensor | None = None) -> Tensor:
        """Slope of a step from this run's latents to its own next ones, or to those of another model."""
        after = self.latents[step + 1] if after is None else after
        return (after.double() - self.latents[step].double()) / (self.sigmas[step + 1] - self.sigmas[step])


class Reference:
    """A's side of comparisons: drawn once, then held against one or several models; a context manager.

    Args:
        model: A.
        prompts: What to draw.
        seeds: Of the noise.
        label: Name for reports.
        block_steps: In how many steps of the first picture to compare the blocks; 0 for none.
        on_run: Called after each run of the pipeline with their number so far.
        options: Arguments of the pipeline's call: size, steps, guidance.

    Raises:
        BadArgument: An argument that the comparison chooses itself, or no prompt or seed.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        seeds: Sequence[int] = (0,),
        *,
        label: str = "A",
        block_steps: int = 3,
        on_run: OnRun | None = None,
        **options: Any,
    ) -> None:
        _check(options)
        if block_steps < 0:
            raise BadArgument(f"block_steps: got {block_steps}, wanted 0 or more")
        self.jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
        if not self.jobs:
            raise BadArgument("prompts, seeds: there are none; give at least one of each")
        self.label, self.options = label, options
        self._spool = Spool()
        try:
            self._draw(model, block_steps, on_run)
        except BaseException:
            self._spool.close()
            raise

    def _draw(self, model: Model, block_steps: int, on_run: OnRun | None) -> None:
        """The pipeline dies with this call where nobody else has it."""
        began = time.perf_counter()
        pipe, options = _made(model), self.options
        steps = options.get("num_inference_steps") or len(options.get("sigmas") or ()) or pipe.limits.steps
        self._config, self._probed = pipe.transformer.config, probes(int(steps), block_steps)
        self._traces: list[_Traced] = []
        for i, (prompt, seed) in enumerate(self.jobs):
            with BlockWatch(pipe.transformer, self._probed if i == 0 else (), self._spool, compare=False):
                self._traces.append(_trace(pipe, prompt, seed, options))
            if on_run is not None:
                on_run(i + 1)
        self._seconds = time.perf_counter() - began

    def compare(
        self, model: Model, *, label: str = "B", on_run: OnRun | None = None, **options: Any
    ) -> Comparison:
        """Hold B against A.

        Args:
            model: B.
            label: Its name for reports.
            on_run: Called after each run of the pipeline with their number so far, two for each picture.
            options: Arguments of the call that are others for B.

        Raises:
            BadArgument: An argument that the comparison chooses itself, or pictures of another size.
        """
        _check(options)
        began = time.perf_counter()
        second = _Second(_made(model), self._config, self._traces, self._probed, self._spool)
        for i, (prompt, seed) in enumerate(self.jobs):
            second.draw(i, prompt, seed, {**self.options, **options})
            if on_run is not None:
                on_run(2 * i + 2)
        triples = zip(self.jobs, self._traces, second.traces, strict=True)
        first, other = self._traces[0], second.traces[0]
        return Comparison(
            (self.label, label),
            tuple(_pair(job, a, b) for job, a, b in triples),
            second.steps(),
            tuple(second.blocks),
            (first.settings, other.settings),
            (first.files, other.files),
            (self._seconds, time.perf_counter() - began),
        )

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget what was set aside on disk."""
        self._spool.close()


def compare(
    a: Model,
    b: Model,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    labels: tuple[str, str] = ("A", "B"),
    options_b: Mapping[str, Any] | None = None,
    block_steps: int = 3,
    on_run: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Comparison:
    """Draw every prompt with every seed by both, and measure how far apart they are.

    Args:
        a: The reference.
        b: What is judged. May be `a` itself, with other options.
        prompts: What to draw.
        seeds: Of the noise.
        labels: Names for reports.
        options_b: Arguments of the call that are others for B.
        block_steps: In how many steps of the first picture to compare the blocks; 0 for none.
        on_run: Called with the runs of pipelines done, and their number in all: three a picture.
        options: Arguments of the pipeline's call: size, steps, guidance.

    Raises:
        BadArgument: An argument that the comparison chooses itself, no prompt or seed, or pictures of two
            sizes.
    """
    later, count = dict(options_b or {}), len(prompts) * len(seeds)
    _check(later)  # before A draws

    def ticks(before: int) -> OnRun | None:
        return None if on_run is None else lambda done: on_run(before + done, RUNS * count)

    with Reference(
        a, prompts, seeds, label=labels[0], block_steps=block_steps, on_run=ticks(0), **options
    ) as reference:
        return reference.compare(b, label=labels[1], on_run=ticks(count), **later)


def _check(options: Mapping[str, Any]) -> None:
    if taken := [name for name in _OURS if name in options]:
        raise BadArgument(f"{taken[0]}: chosen by the comparison itself; leave it out")


def _made(model: Model) -> ZImagePipeline:
    return model if isinstance(model, ZImagePipeline) else model()


def _trace(
    pipe: ZImagePipeline, prompt: str, seed: int, options: Mapping[str, Any], output: str = "pil",
    lead: Sequence[Tensor] | None = None,
) -> _Traced:  # fmt: skip
    """One run with its latents; `lead` takes the place of them after every step."""
    latents: list[Tensor] = []

    def step_end(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any] | None:
        latents.append(tensors["latents"].cpu()[0].clone())
        return None if lead is None else {"latents": lead[step + 1][None]}

    result: Any = pipe(prompt, seed=seed, output_type=output, callback_on_step_end=step_end, **options)
    start = noise.from_seeds((1, *latents[0].shape), (seed,))[0]
    picture = np.asarray(result.images[0]) if output == "pil" else np.empty(0)
    return _Traced([start, *latents], result.sigmas, picture, result.settings[0], result.files)


class _Second:
    """B's runs beside A's.

    Args:
        pipe: B.
        config: Of A's transformer.
        lead: A's runs.
        probed: Steps in which blocks are compared.
        spool: Where A's streams are.
    """

    def __init__(
        self, pipe: ZImagePipeline, config: Any, lead: Sequence[_Traced], probed: Sequence[int], spool: Spool
    ) -> None:
        self.traces: list[_Traced] = []
        self.blocks: list[BlockError] = []
        self._pipe, self._lead, self._spool = pipe, lead, spool
        self._probed = tuple(probed) if pipe.transformer.config == config else ()
        self._velocity: list[list[tuple[float, float]]] = []  # picture, step -> |v_B - v_A|^2, |v_A|^2

    def draw(self, index: int, prompt: str, seed: int, options: Mapping[str, Any]) -> None:
        """Freely, then led by A where both have the same noise levels."""
        lead = self._lead[index]
        trace = _trace(self._pipe, prompt, seed, options)
        self.traces.append(trace)
        if trace.picture.shape != lead.picture.shape:
            raise BadArgument(
                f"B draws pictures of {_size(trace)}, A of {_size(lead)}; give both one width and height"
            )
        if trace.sigmas == lead.sigmas:
            steps = self._probed if index == 0 else ()
            with BlockWatch(self._pipe.transformer, steps, self._spool, compare=True) as watch:
                led = _trace(self._pipe, prompt, seed, options, "latent", lead.latents)
            self.blocks += watch.errors
            self._velocity.append([
                _squares(lead.velocity(i, after), lead.velocity(i)) for i, after in enumerate(led.latents[1:])
            ])  # fmt: skip

    def steps(self) -> tuple[StepError, ...]:
        """Errors of each step over all pictures."""
        if len(self._velocity) < len(self._lead):
            return ()
        sigmas = self._lead[0].sigmas
        pairs = list(zip(self.traces, self._lead, strict=True))
        return tuple(
            StepError(
                i,
                sigmas[i],
                _share([picture[i] for picture in self._velocity]),
                _share([_squares(b.latents[i + 1], a.latents[i + 1]) for b, a in pairs]),
            )
            for i in range(len(sigmas) - 1)
        )


def _squares(result: Tensor, reference: Tensor) -> tuple[float, float]:
    """|result - reference|^2 and |reference|^2."""
    wanted = reference.double()
    return float((result.double() - wanted).square().sum()), float(wanted.square().sum())


def _share(parts: Sequence[tuple[float, float]]) -> float:
    return math.sqrt(sum(far for far, _ in parts) / max(sum(size for _, size in parts), 1e-300))


def _size(trace: _Traced) -> str:
    return f"{trace.picture.shape[1]} x {trace.picture.shape[0]}"


def _pair(job: tuple[str, int], a: _Traced, b: _Traced) -> PicturePair:
    one, two = (torch.from_numpy(trace.picture.copy()).permute(2, 0, 1) / 255 for trace in (a, b))
    square = mean_squared_error(one, two)
    return PicturePair(*job, decibels(square), ssim(one, two), square, a.picture, b.picture)

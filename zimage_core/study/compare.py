"""Compares two models, or two settings of one model, on the same images from the same noise.

Model A runs first. Its images are kept, and its latents after every step (1 MiB each at 1024 px). The streams
between its blocks are kept on disk for a few steps of the first image (`blocks.py`); at 1024 px in float32
one step of the 6B model takes some 2 GB. Then A is released and B is loaded, so that two large models are
never in memory together. B runs twice: freely, for its images and the drift of its latents, and
teacher-forced, with A's latents instead of its own after every step, for the errors of its velocity and of
its blocks at A's latents.
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
from zimage_core.run.request import Request, Run, prepare
from zimage_core.sampling import noise
from zimage_core.study.blocks import BlockError, BlockWatch, Spool, probes
from zimage_core.study.comparison import Comparison, ImagePair, StepError
from zimage_core.study.metrics import decibels, mean_squared_error, ssim

Model = ZImagePipeline | Callable[[], ZImagePipeline]
"""A pipeline, or a function that makes one on demand; a pipeline made so is released after use."""
OnRun = Callable[[int], None]
"""(number of runs of the pipeline done) -> None."""
EULER = "euler"
"""The sampler whose steps tell velocities: the others use several calls for a step."""
RUNS = 3
"""Runs of pipelines for each image: A, B, B teacher-forced."""
_TAKEN = ("prompt", "seed", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt",
         "callback_on_step_end", "callback_on_step_end_tensor_inputs", "debug")  # fmt: skip


@dataclass
class _Traced:
    """One run with its latents: the noise and the latents after each step, steps + 1 of [C, h, w]."""

    latents: list[Tensor]
    sigmas: tuple[float, ...]
    image: np.ndarray[Any, Any]
    settings: Mapping[str, Any]
    files: Mapping[str, Any]

    def velocity(self, step: int, after: Tensor | None = None) -> Tensor:
        """Velocity of a step from this run's latents to `after`, by default to its own next latents."""
        after = self.latents[step + 1] if after is None else after
        return (after.double() - self.latents[step].double()) / (self.sigmas[step + 1] - self.sigmas[step])


class Reference:
    """Model A's images, generated once and compared with those of other models; a context manager.

    Args:
        model: Model A.
        prompts: The prompts.
        seeds: Seeds of the noise; each prompt is used with each seed.
        label: Name of A in reports.
        block_steps: Number of steps of the first image in which blocks are compared; 0 for none.
        on_run: Called after each run of the pipeline with the number of runs so far.
        options: Arguments of the pipeline's call: size, steps, guidance.

    Raises:
        BadArgument: An argument is one that the comparison sets itself, or there is no prompt or seed.
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
        """Generate all images; a pipeline that is made here is released when this call returns."""
        began = time.perf_counter()
        pipe, options = _made(model), self.options
        steps = (
            options.get("num_inference_steps")
            or len(options.get("sigmas") or ())
            or pipe.limits.defaults(options.get("shift")).steps
        )
        self._first = _checked(pipe, options)
        self._config = pipe.transformer.config
        self._probed = probes(int(steps), block_steps) if self._first.sampler == EULER else ()
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
        """Compare model B with A.

        Args:
            model: Model B.
            label: Name of B in reports.
            on_run: Called after each image with the number of runs so far, two for each image.
            options: Arguments of the pipeline's call that differ for B.

        Returns:
            The errors of B.

        Raises:
            BadArgument: An argument is one that the comparison sets itself, or the images differ in size.
        """
        _check(options)
        began = time.perf_counter()
        pipe = _made(model)
        other_run = _checked(pipe, {**self.options, **options})
        check_shapes(self._first, other_run)
        stepwise = self._first.sampler == other_run.sampler == EULER
        second = _Second(pipe, self._config, self._traces, self._probed, self._spool, stepwise)
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
        """Remove the tensors on disk."""
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
    """Run two models on every prompt with every seed, and measure the differences.

    Args:
        a: The reference.
        b: The model to compare; it may be `a` itself, with other options.
        prompts: The prompts.
        seeds: Seeds of the noise.
        labels: Names of A and B in reports.
        options_b: Arguments of the pipeline's call that differ for B.
        block_steps: Number of steps of the first image in which blocks are compared; 0 for none.
        on_run: Called as on_run(runs of pipelines done, runs in all); there are three for each image.
        options: Arguments of the pipeline's call: size, steps, guidance.

    Returns:
        The errors of B.

    Raises:
        BadArgument: An argument is one that the comparison sets itself, there is no prompt or seed, or the
            images differ in size.
    """
    count = len(prompts) * len(seeds)
    _check(options)  # before A runs
    _check(options_b or {})
    if isinstance(a, ZImagePipeline) and isinstance(b, ZImagePipeline):
        later = {**options, **(options_b or {})}
        check_shapes(_checked(a, options), _checked(b, later))

    def ticks(before: int) -> OnRun | None:
        return None if on_run is None else lambda done: on_run(before + done, RUNS * count)

    with Reference(
        a, prompts, seeds, label=labels[0], block_steps=block_steps, on_run=ticks(0), **options
    ) as reference:
        return reference.compare(b, label=labels[1], on_run=ticks(count), **(options_b or {}))


def _check(options: Mapping[str, Any]) -> None:
    if taken := [name for name in _TAKEN if name in options]:
        raise BadArgument(f"{taken[0]}: chosen by the comparison itself; leave it out")


def _made(model: Model) -> ZImagePipeline:
    return model if isinstance(model, ZImagePipeline) else model()


def _trace(
    pipe: ZImagePipeline, prompt: str, seed: int, options: Mapping[str, Any], output: str = "pil",
    forced: Sequence[Tensor] | None = None,
) -> _Traced:  # fmt: skip
    """One run with its latents, which are replaced by those of `forced` after every step, if given."""
    latents: list[Tensor] = []

    def step_end(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any] | None:
        latents.append(tensors["latents"].cpu()[0].clone())
        return None if forced is None else {"latents": forced[step + 1][None]}

    result: Any = pipe(prompt, seed=seed, output_type=output, callback_on_step_end=step_end, **options)
    start = noise.from_seeds((1, *latents[0].shape), (seed,))[0]
    image = np.asarray(result.images[0]) if output == "pil" else np.empty(0)
    return _Traced([start, *latents], result.sigmas, image, result.settings[0], result.files)


class _Second:
    """The runs of model B, and their errors against A's.

    Args:
        pipe: Model B.
        config: Config of A's transformer; if B's has other sizes, blocks are not compared.
        references: The runs of A.
        probed: Steps in which blocks are compared.
        spool: Storage of A's streams.
        stepwise: Whether steps and blocks are compared, where both have the same noise levels.
    """

    def __init__(
        self,
        pipe: ZImagePipeline,
        config: Any,
        references: Sequence[_Traced],
        probed: Sequence[int],
        spool: Spool,
        stepwise: bool,
    ) -> None:
        self._stepwise = stepwise
        self.traces: list[_Traced] = []
        self.blocks: list[BlockError] = []
        self._pipe, self._references, self._spool = pipe, references, spool
        self._probed = tuple(probed) if pipe.transformer.config == config else ()
        self._velocity: list[list[tuple[float, float]]] = []  # [image][step]: |v_B - v_A|^2, |v_A|^2

    def draw(self, index: int, prompt: str, seed: int, options: Mapping[str, Any]) -> None:
        """Run freely, and then teacher-forced if both models have the same noise levels."""
        reference = self._references[index]
        trace = _trace(self._pipe, prompt, seed, options)
        self.traces.append(trace)
        if self._stepwise and trace.sigmas == reference.sigmas:
            steps = self._probed if index == 0 else ()
            with BlockWatch(self._pipe.transformer, steps, self._spool, compare=True) as watch:
                forced = _trace(self._pipe, prompt, seed, options, "latent", reference.latents)
            self.blocks += watch.errors
            self._velocity.append([
                _squares(reference.velocity(i, after), reference.velocity(i))
                for i, after in enumerate(forced.latents[1:])
            ])  # fmt: skip

    def steps(self) -> tuple[StepError, ...]:
        """Errors of each step over all images; empty if the noise levels differ."""
        if len(self._velocity) < len(self._references):
            return ()
        sigmas = self._references[0].sigmas
        pairs = list(zip(self.traces, self._references, strict=True))
        return tuple(
            StepError(
                i,
                sigmas[i],
                _share([image[i] for image in self._velocity]),
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


def check_shapes(a: Run, b: Run) -> None:
    """Refuse two calls whose images or latents differ in size; nothing was drawn yet.

    Raises:
        BadArgument: The message has both sizes.
    """
    if (a.width, a.height) != (b.width, b.height):
        one, two = (f"{run.width} x {run.height}" for run in (a, b))
        raise BadArgument(f"B draws images of {two}, A of {one}; give both one width and height")
    if a.latents.shape != b.latents.shape:
        one, two = (str(list(run.latents.shape[1:])) for run in (a, b))
        raise BadArgument(f"B has latents of shape {two}, A of {one}; such models cannot be compared")


def _checked(pipe: ZImagePipeline, options: Mapping[str, Any]) -> Run:
    """A call's checked arguments, and its noise."""
    return prepare(pipe.limits, pipe.scheduler, Request(**{**options, "prompt": "", "seed": 0}))


def _pair(job: tuple[str, int], a: _Traced, b: _Traced) -> ImagePair:
    one, two = (torch.from_numpy(trace.image.copy()).permute(2, 0, 1) / 255 for trace in (a, b))
    square = mean_squared_error(one, two)
    return ImagePair(*job, decibels(square), ssim(one, two), square, a.image, b.image)

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
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zimage_core import noise
from zimage_core.errors import BadArgument
from zimage_core.pipeline import ZImagePipeline
from zimage_core.study.blocks import BlockError, BlockWatch, probes
from zimage_core.study.metrics import decibels, mean_squared_error, ssim
from zimage_core.study.spool import Spool

Model = ZImagePipeline | Callable[[], ZImagePipeline]
"""A pipeline, or what makes one when its turn comes and lets it go after."""
OnPicture = Callable[[int, int], None]
"""(runs of the pipeline done, runs in all)."""
RUNS = 3
"""Of the pipeline for each picture: A, B, B led by A."""
_OURS = ("prompt", "seed", "generator", "latents", "output_type", "return_dict", "num_images_per_prompt",
         "callback_on_step_end", "callback_on_step_end_tensor_inputs", "debug")  # fmt: skip


@dataclass(frozen=True)
class PicturePair:
    """One prompt and seed, drawn by both.

    Args:
        prompt: What was asked.
        seed: Of the noise.
        psnr: In dB; infinite if the pictures are equal.
        ssim: Mean over the channels.
        mean_square: Mean squared error of values from 0 to 1.
        a: Picture uint8 [H, W, 3] of A.
        b: Of B.
    """

    prompt: str
    seed: int
    psnr: float
    ssim: float
    mean_square: float
    a: np.ndarray[Any, Any] = field(repr=False)
    b: np.ndarray[Any, Any] = field(repr=False)


@dataclass(frozen=True)
class StepError:
    """Of one step, over all pictures.

    Args:
        step: From 0.
        sigma: Noise level at which the network was asked.
        velocity: |v_B - v_A| / |v_A| where both saw A's latents; guidance included.
        latents: |x_B - x_A| / |x_A| after the step, each on its own way.
    """

    step: int
    sigma: float
    velocity: float
    latents: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        labels: Of A and B.
        pictures: In the order of prompts, seeds within.
        steps: Empty where the two have other noise levels.
        blocks: Of the first picture; empty where not asked for, or the networks differ in size.
        settings: Of A's and B's first picture.
        files: Component -> name, size and hash of its file, for A and B.
        seconds: That A and B took, all runs.
    """

    labels: tuple[str, str]
    pictures: tuple[PicturePair, ...]
    steps: tuple[StepError, ...]
    blocks: tuple[BlockError, ...]
    settings: tuple[Mapping[str, Any], Mapping[str, Any]]
    files: tuple[Mapping[str, Any], Mapping[str, Any]]
    seconds: tuple[float, float]

    @property
    def psnr(self) -> float:
        """Of the mean squared error of all pictures."""
        return decibels(sum(p.mean_square for p in self.pictures) / len(self.pictures))

    @property
    def ssim(self) -> float:
        """Mean over pictures."""
        return sum(p.ssim for p in self.pictures) / len(self.pictures)

    @property
    def velocity(self) -> float | None:
        """Root mean square of the velocity errors of the steps; None where they could not be compared."""
        if not self.steps:
            return None
        return math.sqrt(sum(s.velocity**2 for s in self.steps) / len(self.steps))

    def to_json(self) -> dict[str, Any]:
        """Everything but the pixels; a PSNR of equal pictures is null."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        pictures = [
            {"prompt": p.prompt, "seed": p.seed, "psnr": plain(p.psnr), "ssim": p.ssim} for p in self.pictures
        ]
        return {
            "labels": list(self.labels),
            "psnr": plain(self.psnr),
            "ssim": self.ssim,
            "velocity": self.velocity,
            "pictures": pictures,
            "steps": [asdict(step) for step in self.steps],
            "blocks": [{k: plain(v) if isinstance(v, float) else v for k, v in asdict(b).items()}
                       for b in self.blocks],
            "settings": [dict(each) for each in self.settings],
            "files": [dict(each) for each in self.files],
            "seconds": list(self.seconds),
        }  # fmt: skip


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


def compare(
    a: Model,
    b: Model,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    *,
    labels: tuple[str, str] = ("A", "B"),
    options_b: Mapping[str, Any] | None = None,
    block_steps: int = 3,
    on_run: OnPicture | None = None,
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
        on_run: Called after each run of a pipeline.
        options: Arguments of the pipeline's call: size, steps, guidance.

    Raises:
        BadArgument: An argument that the comparison chooses itself, no prompt or seed, or pictures of two
            sizes.
    """
    later = {**options, **(options_b or {})}
    if taken := [name for name in _OURS if name in later]:
        raise BadArgument(f"{taken[0]}: chosen by the comparison itself; leave it out")
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    if not jobs:
        raise BadArgument("prompts, seeds: there are none; give at least one of each")
    if block_steps < 0:
        raise BadArgument(f"block_steps: got {block_steps}, wanted 0 or more")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_run is not None:
            on_run(done, RUNS * len(jobs))

    with Spool() as spool:
        began = time.perf_counter()
        traces, config, steps = _first(a, jobs, options, block_steps, spool, tick)
        middle = time.perf_counter()
        second = _Second(_made(b), config, traces, steps, spool)
        for i, (prompt, seed) in enumerate(jobs):
            second.draw(i, prompt, seed, later, tick)
    pairs = [_pair(job, mine, theirs) for job, mine, theirs in zip(jobs, traces, second.traces, strict=True)]
    return Comparison(
        labels,
        tuple(pairs),
        second.steps(),
        tuple(second.blocks),
        (traces[0].settings, second.traces[0].settings),
        (traces[0].files, second.traces[0].files),
        (middle - began, time.perf_counter() - middle),
    )


def _made(model: Model) -> ZImagePipeline:
    return model if isinstance(model, ZImagePipeline) else model()


def _first(
    model: Model,
    jobs: Sequence[tuple[str, int]],
    options: Mapping[str, Any],
    block_steps: int,
    spool: Spool,
    tick: Callable[[], None],
) -> tuple[list[_Traced], Any, tuple[int, ...]]:
    """A's runs, its config, the steps in which blocks were set aside; the pipeline dies with this call."""
    pipe = _made(model)
    traces = []
    count = options.get("num_inference_steps") or len(options.get("sigmas") or ()) or pipe.limits.steps
    steps = probes(int(count), block_steps)
    for i, (prompt, seed) in enumerate(jobs):
        with BlockWatch(pipe.transformer, steps if i == 0 else (), spool, compare=False):
            traces.append(_trace(pipe, prompt, seed, options))
        tick()
    return traces, pipe.transformer.config, steps


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

    def draw(
        self, index: int, prompt: str, seed: int, options: Mapping[str, Any], tick: Callable[[], None]
    ) -> None:
        """Freely, then led by A where both have the same noise levels."""
        lead = self._lead[index]
        trace = _trace(self._pipe, prompt, seed, options)
        self.traces.append(trace)
        if trace.picture.shape != lead.picture.shape:
            raise BadArgument(
                f"B draws pictures of {_size(trace)}, A of {_size(lead)}; give both one width and height"
            )
        tick()
        if trace.sigmas == lead.sigmas:
            steps = self._probed if index == 0 else ()
            with BlockWatch(self._pipe.transformer, steps, self._spool, compare=True) as watch:
                led = _trace(self._pipe, prompt, seed, options, "latent", lead.latents)
            self.blocks += watch.errors
            self._velocity.append([
                _squares(lead.velocity(i, after), lead.velocity(i)) for i, after in enumerate(led.latents[1:])
            ])  # fmt: skip
        tick()

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

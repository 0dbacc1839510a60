"""Denoises: runs the transformer with guidance, and the caller's callback after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.errors import BadArgument, NonFinite
from zimage_core.models.transformer import Predict, Prepared, ZImageTransformer
from zimage_core.nn.layers import has_hooks
from zimage_core.run import checks
from zimage_core.run.nonfinite import explain, watch
from zimage_core.run.request import Run
from zimage_core.sampling import samplers
from zimage_core.sampling.euler import network_time
from zimage_core.sampling.guidance import guide, scale_at
from zimage_core.sampling.noise import StepNoise


class Denoiser:
    """The function that a sampler calls: all images of a run, with the positive and the negative side.

    What the steps have in common is computed in the first step, and again after captions were replaced.

    Args:
        transformer: The network, which estimates clean - noise.
        positive: Caption features, one [L, cap_feat_dim] per image, or for Omni one list of them, a tensor
            for each piece; may be replaced between steps.
        negative: Caption features of the negative prompts; empty without guidance.
        run: The checked arguments of the call: noise levels and guidance.
        predict: Function to call instead of `transformer.predict`, such as a replayed graph.
        parallel: The `parallel.ulysses.Ulysses` of a run on several ranks.
    """

    def __init__(
        self,
        transformer: ZImageTransformer,
        positive: Sequence[Any],
        negative: Sequence[Any],
        run: Run,
        predict: Predict | None = None,
        parallel: Any = None,
    ) -> None:
        self.transformer = transformer
        self.captions: dict[str, list[Any]] = {
            "prompt_embeds": list(positive), "negative_prompt_embeds": list(negative)
        }  # fmt: skip
        self.scale = run.guidance_scale
        self.last: tuple[Tensor, Tensor, int] | None = None
        self.estimate: Tensor | None = None
        self._run, self._predict = run, predict
        self._prepared: Prepared | None = None
        self._stream: Any = transformer
        if run.references is not None:
            from zimage_core.omni.stream import OmniStream

            self._stream = OmniStream(transformer, run.references)
        self._sides: Any = map
        controls = run.controls
        if parallel is not None:
            self._stream, self._sides = parallel.stream(self._stream, run), parallel.sides
            controls = self._stream.controls(controls)
        self._controls = None
        if controls:
            from zimage_core.control.apply import Controls

            self._controls = Controls(transformer, controls)

    def replace(self, name: str, captions: list[Any]) -> None:
        """Use other caption features from now on; `name` is "prompt_embeds" or "negative_prompt_embeds"."""
        self.captions[name] = captions
        self._prepared = None

    def fitting(self, name: str, value: Any) -> list[Any]:
        """Checked caption features that may be given to `replace`.

        Raises:
            BadArgument, BadShape: There are other numbers of them, or they do not fit the transformer.
        """
        omni, now = self._run.references is not None, self.captions[name]
        check: Callable[[str, Any, int], list[Any]] = checks.pieces if omni else checks.embeds
        new = check(name, value, self.transformer.config.cap_feat_dim)
        pairs = zip(now, new, strict=False) if omni else ()
        for mine, theirs in ((now, new), *pairs):
            if len(mine) != len(theirs):
                raise BadArgument(f"{name}: the callback returned {len(theirs)}, wanted {len(mine)}")
        return new

    def __call__(self, latents: Tensor, time: Tensor, step: int) -> Tensor:
        """latents [B, C, h, w] float32, time [] float32 -> estimate of clean - noise [B, C, h, w] float32."""
        self.last = (latents, time, step)
        with self._watching((self.transformer, "transformer")) if self._run.debug else nullcontext():
            self.estimate = self._estimate(latents, time, step)
        return self.estimate

    def denoised(self) -> Tensor:
        """The clean latents [B, C, h, w] float32 that follow from the latest call."""
        if self.last is None or self.estimate is None:
            raise BadArgument("denoised: the network has not been called yet")
        latents, _, step = self.last
        return latents + self._run.sigmas[step] * self.estimate

    def _estimate(self, latents: Tensor, time: Tensor, step: int) -> Tensor:
        run = self._run
        if self._prepared is None:
            times = [float(network_time(sigma)) for sigma in run.sigmas[:-1]]
            captions = [caption for side in self.captions.values() for caption in side]
            h, w = latents.shape[-2:]
            self._prepared = self._stream.prepare(captions, times, (h, w))
        prepared, count = self._prepared, len(latents)
        members = latents.to(self.transformer.dtype)
        stream = self._stream
        # hooks see the network's own call, which prepares each step anew
        whole = stream is self.transformer and has_hooks(self.transformer)

        def one(member: Tensor, image: int, caption: int) -> Tensor:
            controls = self._controls
            after = None if controls is None else controls.after(prepared, step, image, caption)
            if not whole:
                out: Tensor = stream.step(member, prepared, step, caption, self._predict, after)
                return out
            captions = [prepared.captions[caption]]
            out = self.transformer([member[:, None]], time, captions, after=after)[0]
            return out[:, 0]

        def side(first: int) -> list[Tensor]:
            return [one(member, i, first + i).float() for i, member in enumerate(members)]

        scale = scale_at(float(time), self.scale, run.cfg_truncation)
        out, *others = self._sides(side, (0, count) if scale > 0 else (0,))
        for negative in others:
            pairs = zip(out, negative, strict=True)
            out = [guide(pos, neg, scale, run.cfg_normalization) for pos, neg in pairs]
        return torch.stack(out)

    def again(self) -> None:
        """Repeat the latest call without prepared values, graphs and ranks, to find a NaN or infinity."""
        if self.last is not None:
            self._prepared = None
            positive, negative = self.captions.values()
            plain = Denoiser(self.transformer, positive, negative, self._run)
            plain.scale = self.scale
            with self._watching():
                plain._estimate(*self.last)

    def _watching(self, *networks: tuple[nn.Module, str]) -> ExitStack:
        """Context in which these networks and the run's ControlNets are watched for NaN and infinity."""
        nets = {each.net: f"ControlNet {each.net.name}" for each in self._run.controls}
        stack = ExitStack()
        for network, name in (*networks, *nets.items()):
            stack.enter_context(watch(network, name))
        return stack


def denoise(
    pipe: Any,
    denoiser: Denoiser,
    run: Run,
    after_step: Callable[[], object],
    after_callback: Callable[[], object],
) -> Tensor:
    """Denoise the starting noise of a run over all its noise levels.

    Args:
        pipe: The pipeline, for the callback; setting its `_interrupt` ends the run after a step.
        denoiser: The denoiser, whose transformer is on the device.
        run: The checked arguments of the call: starting noise, noise levels, callback.
        after_step: Called after each step, before the caller's callback.
        after_callback: Called after the caller's callback.

    Returns:
        Latents [B, C, h, w] float32 on the transformer's device.

    Raises:
        NonFinite: NaN or infinity; the message names the step, the block and the tensor.
    """
    done = 0

    def step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        nonlocal done
        done = step + 1
        after_step()
        if run.edit is not None:
            latents = run.edit.after_step(latents, run.sigmas[step + 1])
        if run.callback is not None:
            latents = call_back(pipe, run, denoiser, step, timestep, latents)
            after_callback()
        return latents

    try:
        start = run.latents if run.edit is None else run.edit.start(run.latents, run.sigmas[0])
        start = start.to(denoiser.transformer.device)
        stochastic = samplers.SAMPLERS[run.sampler].stochastic
        more = {"noise": StepNoise(run.later_seeds)} if stochastic else {}
        sample = samplers.find(run.sampler)
        out: Tensor = sample(denoiser, start, run.sigmas, step_end, lambda: bool(pipe._interrupt), **more)
        return out
    except NonFinite as error:
        if denoiser.last is None:
            raise
        if run.debug:
            raise NonFinite(f"step {done + 1} of {run.steps}: {error}") from None
        reason = explain(denoiser.transformer, "transformer", denoiser.again)
        raise NonFinite(f"{error}; {reason}") from None


def call_back(
    pipe: Any, run: Run, denoiser: Denoiser, step: int, timestep: Tensor, latents: Tensor
) -> Tensor:
    """Call the caller's function with the tensors that it asked for, and use the tensors that it returns.

    The function runs without a lock, and the dict that it returns is only read. As in diffusers, it may set
    `pipe._guidance_scale` for the following steps.

    Raises:
        BadArgument, BadShape: It set or returned something that the run cannot use.
    """
    if run.callback is None:
        return latents
    tensors = {"latents": latents, **denoiser.captions}
    if "denoised" in run.callback_tensors:
        tensors["denoised"] = denoiser.denoised()
    out = run.callback(pipe, step, timestep, {name: tensors[name] for name in run.callback_tensors})
    denoiser.scale = checks.real("guidance_scale", pipe.guidance_scale, 0, checks.MAX_GUIDANCE)
    if denoiser.scale > 0 and not denoiser.captions["negative_prompt_embeds"]:
        raise BadArgument("guidance_scale: the callback set it above 0 in a run that began without guidance")
    if out is None:
        out = {}
    if not isinstance(out, dict):
        raise BadArgument(f"callback_on_step_end returned {checks.shown(out)}, wanted a dict or None")
    for name, now in denoiser.captions.items():
        if name in run.callback_tensors:
            denoiser.replace(name, now)  # even if the same: the function may have changed them in place
        if out.get(name) is not None and out[name] is not now:
            denoiser.replace(name, denoiser.fitting(name, out[name]))
    changed = out.get("latents")
    if changed is None or changed is latents:
        return latents
    return checks.latents(changed, tuple(latents.shape)).to(latents.device)

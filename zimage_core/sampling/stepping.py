"""Steps of a schedule by hand, with the names of diffusers' FlowMatchEulerDiscreteScheduler.

A run of the pipeline does not use this: it takes the noise levels of the schedule and follows them in
`euler`. The values are the same to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.files.atomic import write_atomically
from zimage_core.files.untrusted import read_json

Self = TypeVar("Self", bound="Stepping")

TRAINED = 1000
"""Noise levels in training; a timestep is this many times its noise level."""
CONFIG_FILE = "scheduler_config.json"


class StepOutput(NamedTuple):
    """The result of a step.

    Attributes:
        prev_sample: The sample at the next noise level, in the dtype of the model's output.
    """

    prev_sample: Tensor


class Config(dict[str, Any]):
    """The values of a scheduler_config.json; each is an item and an attribute, as in diffusers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this config has no {name!r}; it has {', '.join(self)}") from None


class Levels(Tensor):
    """Noise levels; operations on them give plain tensors.

    `scheduler.sigmas(steps)`, the form from before these were an attribute, still gives a tuple.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _stepping: Stepping

    def __call__(self, steps: int) -> tuple[float, ...]:
        """Noise levels of a run of `steps` steps: `scheduler.levels(steps)`."""
        return self._stepping.levels(steps)


@dataclass
class Walk:
    """Where a walk along the noise levels stands.

    Args:
        sigmas: Noise levels, one more than there are steps, float32.
        begin: Index of the first step, where the caller set it.
        step: Index of the next step; None before the first.
    """

    sigmas: Tensor | None = None
    begin: int | None = None
    step: int | None = None


class Stepping:
    """What diffusers' scheduler has beside its noise levels: timesteps, steps, noising and a config."""

    order = 1
    """Calls of the network for each step."""

    shift: float
    _walk: Walk

    def levels(self, steps: int) -> tuple[float, ...]:
        """Noise levels of `steps` steps, with the final 0."""
        raise NotImplementedError

    def shifted(self, levels: Sequence[float]) -> tuple[float, ...]:
        """Noise levels of the caller's own grid, with the final 0."""
        raise NotImplementedError

    @classmethod
    def from_json(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """The schedule that a scheduler_config.json describes."""
        raise NotImplementedError

    @classmethod
    def from_config(cls: type[Self], config: Mapping[str, Any], **changes: Any) -> Self:
        """The schedule of a config (that of a scheduler, of diffusers too) with changes such as shift=6.0.

        Raises:
            BadArgument: The config is no mapping.
            Unsupported: It describes a schedule that no Z-Image checkpoint uses.
        """
        if not isinstance(config, Mapping):
            raise BadArgument(f"from_config: got a {type(config).__name__}, wanted scheduler.config")
        return cls.from_json({**config, **changes})

    @classmethod
    def from_pretrained(
        cls: type[Self], folder: str | PathLike[str], subfolder: str = "", **changes: Any
    ) -> Self:
        """The schedule of the scheduler_config.json in a folder, with changes as for `from_config`.

        Raises:
            BadFile: The file cannot be read.
            Unsupported: It describes a schedule that no Z-Image checkpoint uses.
        """
        return cls.from_config(read_json(Path(folder) / subfolder / CONFIG_FILE), **changes)

    def save_pretrained(self, folder: str | PathLike[str], **_: Any) -> None:
        """Write scheduler_config.json into a folder, which is made if it does not exist.

        Raises:
            BadFile: The file cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=2) + "\n"
        write_atomically(Path(folder) / CONFIG_FILE, text.encode(), overwrite=True)

    @property
    def config(self) -> Config:
        """The schedule as a scheduler_config.json describes it."""
        return Config(
            _class_name="FlowMatchEulerDiscreteScheduler",
            num_train_timesteps=TRAINED,
            shift=self.shift,
            use_dynamic_shifting=False,
        )

    @property
    def sigmas(self) -> Any:
        """Noise levels of `set_timesteps` as a float32 tensor, one more than there are steps.

        Before the first `set_timesteps` these are all levels of the training. Called with a number of steps
        this is the method of earlier versions; `levels` is its name now.
        """
        values = self._walk.sigmas
        if values is None:
            values = torch.tensor(self.levels(TRAINED)[:-1])
        found = values.as_subclass(Levels)
        found._stepping = self
        return found

    @property
    def timesteps(self) -> Tensor:
        """1000 times the noise level of each step, float32 [steps]."""
        values = self._walk.sigmas
        values = torch.tensor(self.levels(TRAINED)) if values is None else values
        return values[:-1] * TRAINED

    @property
    def num_inference_steps(self) -> int | None:
        """Number of steps; None before `set_timesteps`."""
        return None if self._walk.sigmas is None else len(self._walk.sigmas) - 1

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first."""
        return self._walk.step

    @property
    def begin_index(self) -> int | None:
        """Index that `set_begin_index` set."""
        return self._walk.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this step, as for image to image."""
        self._walk.begin = begin_index

    def set_shift(self, shift: float) -> None:
        """Refused: a schedule is not changed, because a pipeline's defaults follow from it.

        Raises:
            Unsupported: Always.
        """
        raise Unsupported(
            "set_shift: give shift= to the call, or use FlowMatchEulerScheduler(shift=...) as the scheduler"
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the noise levels of the steps; those of N steps are the levels of the pipeline's run.

        Args:
            num_inference_steps: Number of steps.
            device: Device of `sigmas` and `timesteps`.
            sigmas: Falling noise levels in (0, 1] before the shift, without the final 0.
            mu: Has no effect, since it belongs to schedules that depend on the image's size.
            timesteps: Refused; give sigmas = timestep / 1000.

        Raises:
            BadArgument: There is no number and no list, they contradict each other, or one is out of range.
            Unsupported: timesteps are given.
        """
        if timesteps is not None:
            raise Unsupported(
                "set_timesteps: timesteps are not taken; give sigmas, which are timestep / 1000"
            )
        if sigmas is None:
            if num_inference_steps is None:
                raise BadArgument("set_timesteps: give num_inference_steps or sigmas")
            found = self.levels(num_inference_steps)
        else:
            found = self.shifted([float(level) for level in sigmas])
            if num_inference_steps not in (None, len(found) - 1):
                raise BadArgument(
                    f"set_timesteps: got {len(found) - 1} sigmas for "
                    f"{printable(num_inference_steps, 40)} steps; give one of the two"
                )
        walk = self._walk
        walk.sigmas, walk.begin, walk.step = torch.tensor(found, device=device), None, None

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Index of the step with this timestep.

        Raises:
            BadArgument: It is none of `timesteps`.
        """
        found = (self.timesteps == float(timestep)).nonzero()
        if not len(found):
            raise BadArgument(
                f"step: the timestep {float(timestep):g} is none of scheduler.timesteps; call set_timesteps, "
                "then go through scheduler.timesteps"
            )
        return int(found[0])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        per_token_timesteps: None = None,
        **_: Any,
    ) -> StepOutput:
        """One step of Euler's method.

        Args:
            model_output: d(sample)/d(sigma), which is minus the transformer's result.
            timestep: One of `timesteps`.
            sample: The sample at that noise level, of the same shape.
            return_dict: Has no effect: the result is a tuple with the name `prev_sample`.
            per_token_timesteps: Refused.

        Returns:
            The sample at the next noise level; sums are float32, the dtype is that of model_output.

        Raises:
            BadArgument: The timestep is none of the schedule's, or all steps are done.
            Unsupported: per_token_timesteps are given.
        """
        if per_token_timesteps is not None:
            raise Unsupported("step: all tokens of an image have one timestep; leave per_token_timesteps out")
        walk = self._walk
        if walk.step is None:
            walk.step = self.index_for_timestep(timestep) if walk.begin is None else walk.begin
        sigmas = walk.sigmas
        if sigmas is None or walk.step + 1 >= len(sigmas):
            what = "call set_timesteps first" if sigmas is None else "all steps are done; call set_timesteps"
            raise BadArgument(f"step: {what}")
        change = sigmas[walk.step + 1] - sigmas[walk.step]
        walk.step += 1
        return StepOutput((sample.float() + change * model_output).to(model_output.dtype))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) sample + sigma noise at the noise levels of the timesteps.

        Args:
            sample: Clean latents [B, ...].
            timestep: One of `timesteps` for each of B, or one for all.
            noise: Gaussian noise of the sample's shape.
        """
        levels = self._walk.sigmas
        levels = torch.tensor(self.levels(TRAINED)) if levels is None else levels
        places = [self.index_for_timestep(each) for each in torch.as_tensor(timestep).reshape(-1)]
        sigma = levels[places].to(sample.device, sample.dtype).reshape(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1.0 - sigma) * sample

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: this schedule does not scale the network's input."""
        return sample

    def __len__(self) -> int:
        return TRAINED

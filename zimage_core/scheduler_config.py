"""What a diffusers scheduler_config.json asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zimage_core.errors import Unsupported, printable
from zimage_core.fields import Fields

TURBO_SHIFT = 3.0
SHIFTS = (1e-3, 1e3)
"""Least and greatest shift; beyond them neighbouring noise levels become equal in float32."""

_FIXED = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
DYNAMIC = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
"""Keys that have a meaning only with use_dynamic_shifting."""
EULER = "FlowMatchEulerDiscreteScheduler"
"""diffusers' class with the sampler of this library."""
_PASS = "or pass a FlowMatchEulerScheduler as scheduler"


def scheduler_shift(values: Mapping[str, Any]) -> tuple[float, tuple[str, ...]]:
    """The shift of the noise levels that a diffusers scheduler_config.json describes.

    Returns:
        The shift, and cautions: what the file asks for and does not get, where images may still be right.

    Raises:
        Unsupported: The file describes a schedule that no Z-Image checkpoint uses.
        BadArgument: The shift is not a number in `SHIFTS`.
    """
    read = Fields("scheduler_config.json", values)
    name = _sampler(read)
    for key, wanted in _FIXED.items():
        found = read.get(key, wanted)
        if (found or None) != (wanted or None):
            raise Unsupported(
                f"scheduler_config.json: {key} is {printable(repr(found), 60)}, Z-Image schedules have "
                f"{wanted!r}; remove the key {_PASS}"
            )
    low, high = SHIFTS
    named = [key for key in ("shift", "flow_shift") if read.get(key, None) is not None]
    stated = [read.number(key, low=low, high=high) for key in named]
    if len(set(stated)) > 1:
        raise Unsupported(
            f"scheduler_config.json: shift is {stated[0]:g} and flow_shift is {stated[1]:g}, which are two "
            f"names of one number; remove one {_PASS}"
        )
    shift = stated[0] if stated else TURBO_SHIFT
    cautions = [] if stated else [f"no shift is stated, {shift:g} (Turbo's) is used"]
    known = {*_FIXED, *DYNAMIC, "shift", "flow_shift"}
    unknown = sorted(key for key in values if key not in known and not key.startswith("_"))
    if name not in (EULER, "FlowMatchEulerScheduler"):  # its other keys are known to it alone
        cautions.append(
            f"asks for {name}; Euler steps over the noise levels of shift {shift:g} are taken instead"
        )
    elif unknown:
        cautions.append(f"{printable(', '.join(unknown), 120)}: not known, without effect")
    return shift, tuple(cautions)


def _sampler(read: Fields) -> str:
    """The class that the file names; Unsupported where it is not for a flow-matching model."""
    name = read.get("_class_name", EULER)
    flow = read.get("use_flow_sigmas", False) is True or read.get("prediction_type", "") == "flow_prediction"
    if not isinstance(name, str) or not (name.startswith("FlowMatch") or flow):
        raise Unsupported(
            f"scheduler_config.json: _class_name is {printable(repr(name), 60)}, which is not for a "
            f"flow-matching model such as Z-Image, wanted '{EULER}'; get the model's own file {_PASS}"
        )
    return printable(name, 60)

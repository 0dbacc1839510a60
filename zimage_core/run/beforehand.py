"""Checks of a call's arguments that need no loaded model, for callers that load one afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zimage_core.errors import BadArgument
from zimage_core.run import checks, edits
from zimage_core.sampling import samplers
from zimage_core.sampling.schedule import MAX_STEPS, FlowMatchEulerScheduler
from zimage_core.text.prompt import MAX_LENGTH

if TYPE_CHECKING:
    from zimage_core.run.request import Limits

CONTROL_SCALE = "controlnet_conditioning_scale"
CONTROL_NUMBERS = (CONTROL_SCALE, "control_guidance_start", "control_guidance_end")
"""Numbers that belong to control images."""


def check_numbers(call: Mapping[str, Any]) -> None:
    """Check seed, guidance, shift, steps, length and variety of a call.

    Raises:
        BadArgument: The call would refuse an argument, after the model is loaded.
    """
    checks.seed(call.get("seed"), None)
    checks.guidance(call.get("guidance_scale"), call.get("cfg"), 0.0)
    FlowMatchEulerScheduler(call.get("shift", 3.0))
    if "num_inference_steps" in call:
        checks.whole("num_inference_steps", call["num_inference_steps"], 1, MAX_STEPS)
    if "max_sequence_length" in call:
        checks.whole("max_sequence_length", call["max_sequence_length"], 1, MAX_LENGTH)
    checks.real("variety", call.get("variety", 0.0), 0, checks.MAX_VARIETY)


def check_call(call: Mapping[str, Any], limits: Limits) -> None:
    """Check all arguments of a call of one prompt that need neither weights nor the contents of images.

    Args:
        call: Arguments by name.
        limits: Limits of the model, which its headers give.

    Raises:
        BadArgument: An argument is out of range, or lacks another one.
    """
    from zimage_core.run.request import Request, encoding

    check_numbers(call)
    for prompt in (call["prompt"], call.get("negative_prompt", "")):
        checks.prompts("prompt", prompt)
    checks.named("sampler", call.get("sampler"), "euler", tuple(samplers.SAMPLERS))
    checks.named("schedule", call.get("schedule"), "linear", samplers.SCHEDULES)
    if "sigmas" in call and "schedule" in call:
        raise BadArgument("sigmas and schedule both choose the noise levels: give one")
    if "sigmas" in call:
        FlowMatchEulerScheduler().shifted(checks.levels(call["sigmas"]))
    for name in ("cfg_normalization", "cfg_truncation"):
        if call.get(name) is not None:
            checks.real(name, call[name], 0, 1e6)
    request = Request(**call)
    edits.check(request)
    encoding(request)
    multiple = limits.factor * limits.patch
    sides = [limits.sample_size, limits.sample_size]
    for i, (name, most) in enumerate((("height", limits.rows), ("width", limits.cols))):
        if name in call:
            sides[i] = checks.side(name, call[name], multiple, multiple * most)
    checks.area(sides[0], sides[1], 1)
    _check_images(call)


def _check_images(call: Mapping[str, Any]) -> None:
    """Refuse numbers and choices that lack the images they belong to, and combinations without a meaning."""
    for name in (name for name in CONTROL_NUMBERS if name in call):
        if "control_image" not in call:
            raise BadArgument(f"{name}: it needs control_image, the image to follow; give both")
        low, high = 0.0, 1.0
        if name == CONTROL_SCALE:
            from zimage_core.control.inputs import MOST_SCALE

            low, high = -MOST_SCALE, MOST_SCALE
        given = call[name]
        for each in given if isinstance(given, (list, tuple)) else (given,):
            checks.real(name, each, low, high)
    if "reference_images" not in call:
        if "positions" in call:
            raise BadArgument("positions: it needs reference_images, whose places it names; give both")
        return
    for name in ("control_image", "variety", "prompt_template"):
        if call.get(name):
            raise BadArgument(f"{name}: it has no meaning with reference_images; leave one of them out")

"""Checks of a study by the headers of its files, before any weight is read or any image is drawn."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zimage_core.cli.model_options import given
from zimage_core.config import COMPONENTS, NATIVE_SIZE, AutoencoderConfig, TransformerConfig
from zimage_core.errors import BadArgument

if TYPE_CHECKING:
    from zimage_core.run.request import Run
    from zimage_core.weights.opened import Opened


def check_call(args: argparse.Namespace, call: Mapping[str, Any], prompts: Sequence[str]) -> Run:
    """Check the files of a model, and a call of its pipeline on them.

    Args:
        args: The options of `add_model`.
        call: Arguments of the call, but for the prompt.
        prompts: The prompts.

    Returns:
        The checked call of the first prompt.

    Raises:
        ZImageError: What loading or the call would raise, but for faults in the weights themselves.
    """
    from zimage_core.run.loading import find_components, stated_scheduler
    from zimage_core.run.request import Limits, Request, prepare
    from zimage_core.run.sources import embedded
    from zimage_core.sampling.schedule import FlowMatchEulerScheduler
    from zimage_core.weights.components import open_pipeline
    from zimage_core.weights.facts import facts

    parts: Mapping[str, Any] = given(args, COMPONENTS)
    scheduler = None
    if args.model is not None:
        parts, _, scheduler = find_components(args.model, parts, None, None, False, args.variant, {})
    omni = bool(getattr(args, "reference_images", None))
    opened: dict[str, Opened] = open_pipeline(parts or embedded(omni).paths)
    try:
        net, vae = opened["transformer"].card.config, opened["vae"].card.config
        if not isinstance(net, TransformerConfig) or not isinstance(vae, AutoencoderConfig):
            raise BadArgument("the size of the model cannot be told")
        known = facts(opened["transformer"])
        scheduler = scheduler or stated_scheduler(known)
        size = known.get("sample_size", NATIVE_SIZE)
        limits = Limits.of(net, vae, size, None if scheduler is None else scheduler.shift)
        scheduler = scheduler or FlowMatchEulerScheduler()
        return prepare(limits, scheduler, Request(**{**call, "prompt": prompts[0]}))
    finally:
        for part in opened.values():
            part.file.close()

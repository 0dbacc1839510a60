"""Prompts, negative prompts and embeddings of one call, matched to its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from zimage_core.errors import BadArgument
from zimage_core.run.checks import MAX_IMAGES, embeds, prompts, whole

Member = TypeVar("Member")


@dataclass(frozen=True)
class Batch:
    """Which caption belongs to which picture.

    Args:
        prompts: One per picture; None when only embeddings were given.
        negative_prompts: The same for the negative side; None without guidance or with embeddings.
        prompt_embeds: Given by the caller, one per picture; None to encode the prompts.
        negative_prompt_embeds: Given by the caller.
        images: Pictures in all.
    """

    prompts: list[str] | None
    negative_prompts: list[str] | None
    prompt_embeds: list[torch.Tensor] | None
    negative_prompt_embeds: list[torch.Tensor] | None
    images: int


def make_batch(given: Mapping[str, Any], num_images_per_prompt: Any, guided: bool, width: int) -> Batch:
    """Match prompts, negative prompts and embeddings one to one, and repeat them for several pictures each.

    Args:
        given: `prompt`, `negative_prompt`, `prompt_embeds` (take the place of the prompts) and
            `negative_prompt_embeds`, each None if not given. One negative prompt may serve all; None means
            "".
        num_images_per_prompt: Neighbours in the batch share a prompt.
        guided: Whether the negative side is needed at all.
        width: Of the caption features.
    """
    times = whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    if given["prompt"] is None and given["prompt_embeds"] is None:
        raise BadArgument("prompt: give prompt or prompt_embeds")
    words = None if given["prompt"] is None else prompts("prompt", given["prompt"])
    positive = _given_embeds("prompt_embeds", given, width)
    count = len(positive if positive is not None else words or ())
    if words is not None and len(words) != count:
        raise BadArgument(f"prompt_embeds: got {count}, wanted {len(words)}, one for each prompt")
    if count * times > MAX_IMAGES:
        raise BadArgument(
            f"num_images_per_prompt: {count * times} pictures in one call, wanted at most {MAX_IMAGES}"
        )

    against = (
        None if given["negative_prompt"] is None else prompts("negative_prompt", given["negative_prompt"])
    )
    negative = _given_embeds("negative_prompt_embeds", given, width)
    if not guided:
        against = negative = None
    elif negative is not None:
        against = None
    elif words is None and against is None:
        raise BadArgument(
            "negative_prompt_embeds: needed for guidance when prompt_embeds come without prompt"
        )
    else:
        against = against or [""]
        against = against * count if len(against) == 1 else against
    for name, members in (("negative_prompt", against), ("negative_prompt_embeds", negative)):
        if members is not None and len(members) != count:
            raise BadArgument(f"{name}: got {len(members)}, wanted {count}, one for each prompt")
    return Batch(
        _repeated(words, times),
        _repeated(against, times),
        _repeated(positive, times),
        _repeated(negative, times),
        count * times,
    )


def _given_embeds(name: str, given: Mapping[str, Any], width: int) -> list[torch.Tensor] | None:
    return None if given[name] is None else embeds(name, given[name], width)


def _repeated(members: list[Member] | None, times: int) -> list[Member] | None:
    return None if members is None else [member for member in members for _ in range(times)]

"""The captions of a call: what is encoded for each image of a run, and how it is tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from zimage_core.text.prompt import DEFAULT_LENGTH, prompt_ids
from zimage_core.text.tokenizer import Tokenizer


class Encoding(NamedTuple):
    """Options of tokenisation, in the order of `text.prompt.prompt_ids`."""

    max_sequence_length: int = DEFAULT_LENGTH
    enable_thinking: bool = True
    prompt_template: str | None = None


@dataclass(frozen=True)
class Batch:
    """The captions of each image; every list has one item per image.

    Args:
        prompts: The prompts; None if only embeddings were given.
        negative_prompts: The negative prompts; None without guidance or with embeddings.
        prompt_embeds: The caller's caption features; None to encode the prompts. Those of an Omni run are
            lists of tensors, one for each piece of the prompt.
        negative_prompt_embeds: The caller's caption features for the negative side; None to encode.
        images: Number of images.
        references: Number of reference images of each image; None for a run of text and image alone.
    """

    prompts: list[str] | None
    negative_prompts: list[str] | None
    prompt_embeds: list[Any] | None
    negative_prompt_embeds: list[Any] | None
    images: int
    references: tuple[int, ...] | None = None

    def texts(self) -> list[str]:
        """The prompts that have to be encoded, without duplicates."""
        positive = self.prompts if self.prompt_embeds is None else None
        return list(dict.fromkeys([*(positive or ()), *(self.negative_prompts or ())]))

    def given(self) -> list[torch.Tensor]:
        """The caller's caption features of both sides, one after the other."""
        members = [*(self.prompt_embeds or ()), *(self.negative_prompt_embeds or ())]
        return members if self.references is None else [piece for each in members for piece in each]

    def token_ids(self, tokenizer: Tokenizer, options: Encoding) -> dict[str, list[int]]:
        """Each text that the encoder gets, with its token ids."""
        if self.references is None:
            return {text: prompt_ids(tokenizer, text, *options) for text in self.texts()}
        from zimage_core.omni.pieces import piece_ids

        sides = (self.prompts if self.prompt_embeds is None else None, self.negative_prompts)
        wanted = {pair for side in sides if side for pair in zip(side, self.references, strict=True)}
        found: dict[str, list[int]] = {}
        for text, count in sorted(wanted):
            found |= piece_ids(tokenizer, text, count, options.max_sequence_length, options.enable_thinking)
        return found

    def sides(
        self, features: Mapping[str, torch.Tensor], options: Encoding, device: torch.device
    ) -> tuple[list[Any], list[Any]]:
        """Captions of the positive and the negative side, one for each image.

        Args:
            features: The encoder's features of each text of `token_ids`.
            options: Those of `token_ids`.
            device: Where the captions are to be.
        """
        return (
            self._side(self.prompts, self.prompt_embeds, features, options, device),
            self._side(self.negative_prompts, self.negative_prompt_embeds, features, options, device),
        )

    def _side(
        self, texts: list[str] | None, given: list[Any] | None, features: Mapping[str, torch.Tensor],
        options: Encoding, device: torch.device,
    ) -> list[Any]:  # fmt: skip
        if self.references is None:
            if given is not None:
                return [member.to(device) for member in given]
            return [features[text] for text in texts or ()]
        if given is not None:
            return [[piece.to(device) for piece in member] for member in given]
        from zimage_core.omni.pieces import pieces

        members = zip(texts, self.references, strict=True) if texts else ()
        return [
            [features[each] for each in pieces(text, count, options.enable_thinking)]
            for text, count in members
        ]

"""Runs ControlNets beside the base model: their hints are added to its tokens, layer by layer.

The control blocks depend on the base model only where they begin, so each runs when its hint is wanted, and
of the hints only one exists at a time. Source of the flow: VideoX-Fun's trainer; docs/guides/control.md has
the formulae.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zimage_core.control.model import ControlBlock, ControlNet
from zimage_core.models.transformer import After, Prepared, ZImageTransformer
from zimage_core.nn.compute import set_compute
from zimage_core.nn.layers import Rotation
from zimage_core.weights.controlnets import OWN, PLAIN

TRAINER, DIFFUSERS = "trainer", "diffusers"
HINTS = (TRAINER, DIFFUSERS)
"""Where hints for the noise refiner are added: to the base model's own tokens, as in training, or to a copy
that only the ControlNet sees, as diffusers does. They differ for Union 2.x alone."""


@dataclass(frozen=True, eq=False)
class Control:
    """One control image of a run, with the net that follows it.

    Args:
        net: The ControlNet.
        latents: Control latents [1 or images, channels, h, w] float32.
        scale: Factor of the hints.
        steps: First step in which it acts, and the first in which it does no more.
        hints: One of `HINTS`.
        settings: What an image's settings say of it.
    """

    net: ControlNet
    latents: Tensor
    scale: float
    steps: tuple[int, int]
    hints: str = TRAINER
    settings: Mapping[str, Any] = field(default_factory=dict)

    def acts(self, step: int) -> bool:
        """Whether it changes anything in a step."""
        return self.scale != 0 and self.steps[0] <= step < self.steps[1]


def place_beside(net: ControlNet, transformer: ZImageTransformer, device: torch.device | None = None) -> None:
    """Give a ControlNet the dtype and arithmetic of the base model, and its device or another one."""
    where = device or transformer.device
    if net.device != where:
        net.to(where)
    if net.dtype != transformer.dtype:
        net.to(transformer.dtype)
    if net.compute != transformer.compute:
        set_compute(net, transformer.compute, where)


class Controls:
    """The control images of a run beside its transformer.

    Args:
        transformer: The base model.
        members: The control images; those of one net run together, so that its weights are fetched once.
    """

    def __init__(self, transformer: ZImageTransformer, members: Sequence[Control]) -> None:
        self._transformer = transformer
        nets = dict.fromkeys(member.net for member in members)
        self._members = [member for net in nets for member in members if member.net is net]
        self._modulations: dict[tuple[ControlNet, tuple[float, ...]], Tensor] = {}
        self._tokens: dict[tuple[int, int], Tensor] = {}  # (member, image) -> embedded control latents

    def after(self, prepared: Prepared, step: int, image: int, caption: int) -> After | None:
        """What `ZImageTransformer.predict` calls between blocks; None where no control acts in this step.

        Args:
            prepared: What the base model's steps share.
            step: Index of the prepared time.
            image: Index of the image in the batch.
            caption: Index of the prepared caption.
        """
        acting = [(i, member) for i, member in enumerate(self._members) if member.acts(step)]
        if not acting:
            return None
        count = len(prepared.rotations[caption][0]) - len(prepared.texts[caption])
        states = [
            _State(member, self._embedded(i, image, count), self._modulation(member.net, prepared, step))
            for i, member in acting
        ]
        return _Pass(self._transformer, prepared, step, caption, states)

    def _embedded(self, number: int, image: int, count: int) -> Tensor:
        member = self._members[number]
        image = image if len(member.latents) > 1 else 0
        if (number, image) not in self._tokens:
            latents = member.latents[image].to(member.net.device)
            self._tokens[number, image] = member.net.embed(latents, self._transformer.x_pad_token, count)
        return self._tokens[number, image]

    def _modulation(self, net: ControlNet, prepared: Prepared, step: int) -> Tensor:
        """Modulations of a net's blocks in one step [blocks, 4 * dim]; all steps' are made at once."""
        key = (net, prepared.times)
        if key not in self._modulations:
            base = self._transformer
            times = torch.tensor(prepared.times, dtype=torch.float32, device=base.device)
            self._modulations[key] = net.modulate(base.t_embedder(times * base.config.t_scale, base.dtype))
        return self._modulations[key][step]


@dataclass(eq=False)
class _State:
    """One control image in one call of the base model.

    Args:
        member: The control image.
        tokens: Its tokens as far as they have come: [image, dim], then [image + caption, dim].
        modulation: Modulations of the net's blocks [blocks, 4 * dim].
        pending: Hints for the noise refiner that were not added yet, by block.
        private: In diffusers' way, the copy of the image's tokens that only this net sees.
        first: Hint of the first control layer, which runs as soon as the joint sequence is there.
    """

    member: Control
    tokens: Tensor
    modulation: Tensor
    pending: dict[int, Tensor] = field(default_factory=dict)
    private: Tensor | None = None
    first: Tensor | None = None

    def run(
        self, number: int, rope: Rotation, begin_with: Tensor | None = None, hint: bool = True
    ) -> Tensor | None:
        """Take the tokens through block `number` of the net.

        Args:
            number: Index in the net's `blocks`.
            rope: Rotation of the tokens.
            begin_with: Tokens of the base model, for the first block of a stack.
            hint: Whether to return the block's scaled hint.
        """
        block: ControlBlock = self.member.net.blocks[number]  # type: ignore[assignment]  # or a plain one
        with self.member.net.stream.block(number):
            if begin_with is not None:
                self.tokens = block.begin(self.tokens, begin_with)
            self.tokens = block(self.tokens, rope, modulation=self.modulation[number])
            return block.hint(self.tokens) * self.member.scale if hint else None


class _Pass:
    """One call of the base model with control; `ZImageTransformer.predict` calls it between blocks."""

    def __init__(
        self,
        transformer: ZImageTransformer,
        prepared: Prepared,
        step: int,
        caption: int,
        states: Sequence[_State],
    ) -> None:
        self._transformer, self._states = transformer, states
        self._text, (cos, sin) = prepared.texts[caption], prepared.rotations[caption]
        split = len(cos) - len(self._text)
        self._joint, self._image = (cos, sin), (cos[:split], sin[:split])
        self._modulations = prepared.blocks[step]
        self._refiners = len(transformer.noise_refiner)
        count = len(transformer.layers)
        self._places = {
            id(state): {place: i for i, place in enumerate(state.member.net.config.places_in(count))}
            for state in states
        }

    def __call__(self, i: int, tokens: Tensor) -> Tensor:
        """Tokens after block i of the base model, or before the first (-1) -> tokens to go on with."""
        if i < self._refiners:
            for state in self._states:
                if i < 0:
                    self._refine(state, tokens)
                if (hint := state.pending.pop(i, None)) is not None:
                    tokens = tokens + hint
            if i == self._refiners - 1:
                for state in self._states:
                    self._join(state, tokens)
            return tokens
        for state in self._states:
            place = self._places[id(state)].get(i - self._refiners)
            if place is not None:
                tokens = tokens + self._hint(state, place)
        return tokens

    def _refine(self, state: _State, image: Tensor) -> None:
        """Run the blocks over the control tokens alone, and keep their hints for the noise refiner."""
        net = state.member.net
        kind, first = net.config.refiner, len(net.control_noise_refiner)
        if kind == PLAIN:
            for number in range(first):
                state.run(number, self._image, hint=False)
            return
        stack = range(first) if kind == OWN else range(first, len(net.blocks))
        for place, number in enumerate(stack):
            begin_with = image if place == 0 else None
            hint = state.run(number, self._image, begin_with, hint=place < self._refiners)
            if hint is not None:
                state.pending[place] = hint
        if state.member.hints == DIFFUSERS:
            state.private = self._private(state, image)

    def _private(self, state: _State, image: Tensor) -> Tensor:
        """A run of the base's noise refiner of its own, with the hints, which leaves the base's untouched."""
        for i, block in enumerate(self._transformer.noise_refiner):
            with self._transformer.stream.block(i):
                image = block(image, self._image, modulation=self._modulations[i])
            if (hint := state.pending.pop(i, None)) is not None:
                image = image + hint
        return image

    def _join(self, state: _State, image: Tensor) -> None:
        """Run the first control layer over the joint sequence, whose caption part is the base's."""
        seen = image if state.private is None else state.private
        joint, first = torch.cat((seen, self._text)), len(state.member.net.control_noise_refiner)
        state.tokens = torch.cat((state.tokens, self._text))
        state.first = state.run(first, self._joint, joint)
        state.private = None

    def _hint(self, state: _State, place: int) -> Tensor:
        """The hint of control layer `place`, scaled [image + caption, dim]."""
        hint, state.first = state.first, None
        if place > 0:
            hint = state.run(len(state.member.net.control_noise_refiner) + place, self._joint)
        return hint  # type: ignore[return-value]  # `run` was asked for it

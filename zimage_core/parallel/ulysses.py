"""One image on several ranks: each has some of the tokens, and during attention some of the heads of all.

Everything but attention treats a token alone, so a rank does it for its own tokens, with the weights as they
are. Attention is between two exchanges: before it, a rank gets q, k and v of all tokens for its heads; after
it, the results of all heads for its tokens. An exchange may be uneven, so that neither tokens nor heads need
divide by the number of ranks, and nothing is padded. Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv
2309.14509.

Where a run has guidance, its two sides may be computed by two halves of the ranks ("CFG parallel").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, Unsupported
from zimage_core.models.omni import OmniPrepared, OmniSample
from zimage_core.models.transformer import After, Attention, Predict, Prepared, ZImageTransformer
from zimage_core.nn.attention import attention
from zimage_core.nn.layers import Rotation, has_hooks
from zimage_core.parallel.group import Group


def evenly(count: int, ranks: int) -> list[int]:
    """`count` things over ranks, where the first may have one more: 30 over 4 are 8, 8, 7, 7."""
    return [(count + ranks - 1 - rank) // ranks for rank in range(ranks)]


def image_tokens(ranks: int, rows: int, columns: int, pads: int) -> list[int]:
    """Tokens of an image for each rank: whole rows of patches; the last has the fewest, and the pads."""
    *others, last = (count * columns for count in evenly(rows, ranks))
    return [*others, last + pads]


def text_tokens(image: Sequence[int], text: int) -> list[int]:
    """Tokens of a caption for each rank: one at least, and more where a rank has fewer of the image."""
    own = [1] * len(image)
    for _ in range(text - len(image)):
        own[min(range(len(image)), key=lambda rank: image[rank] + own[rank])] += 1
    return own


def _sums(*counts: Sequence[int]) -> list[int]:
    return [sum(each) for each in zip(*counts, strict=True)]


class Tokens(NamedTuple):
    """How many tokens each rank has, of the image alone and of the joint sequence, which is never as long."""

    image: list[int]
    joint: list[int]


class Exchange:
    """Attention whose heads are shared by ranks; blocks call it as they would call `attention`.

    Args:
        group: The ranks.
        heads: Number of heads of the network.
        tokens: Tokens of each rank, of the image alone and of the joint sequence.
    """

    def __init__(self, group: Group, heads: int, tokens: Tokens) -> None:
        self.group = group
        self.heads = evenly(heads, group.size)
        self.tokens = {lengths[group.rank]: lengths for lengths in (tokens.image, tokens.joint)}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, in_int8: bool = False) -> Tensor:
        """q, k, v [tokens of this rank, heads, D] -> [tokens of this rank, heads * D]."""
        own, width = len(q), q.shape[-1]
        heads, mine, tokens = self.heads, self.heads[self.group.rank], self.tokens[own]
        sent, sends = q.new_empty(3 * q.numel()), [own * 3 * count * width for count in heads]
        parts = (torch.split(x, heads, 1) for x in (q, k, v))
        for part, *three in zip(torch.split(sent, sends), *parts, strict=True):
            torch.stack(three, 1, out=part.view(own, 3, -1, width))
        got = self.group.exchange(sent, sends, [count * 3 * mine * width for count in tokens])
        q, k, v = got.view(-1, 3, mine, width).unbind(1)
        out = attention(q, k, v, in_int8=in_int8)
        receives = [own * count * width for count in heads]
        back = self.group.exchange(out.flatten(), [count * mine * width for count in tokens], receives)
        return torch.cat([part.view(own, -1) for part in torch.split(back, receives)], 1)


class Stream:
    """`prepare` and `step` of a transformer whose tokens are split over ranks.

    Each rank computes its rows of patches, and all get the whole estimate, equal to the bit.

    Args:
        group: The ranks.
        alone: What has these methods on one rank: the transformer, or an `OmniStream` of it.
        nets: ControlNets beside it.

    Raises:
        Unsupported: The attention of a block was replaced by another class.
    """

    def __init__(self, group: Group, alone: Any, nets: Sequence[Any] = ()) -> None:
        self.group, self.alone = group, alone
        self.transformer: ZImageTransformer = getattr(alone, "transformer", alone)
        blocks = [block for net in (self.transformer, *nets) for block in net.blocks]
        self._attentions = [m for block in blocks for m in block.modules() if type(m) is Attention]
        if len(self._attentions) != len(blocks):
            raise Unsupported(
                "parallel: a block has an attention of another class, which would see the tokens of one rank "
                "alone; put the original back, or wrap it"
            )
        self._tokens: list[Tokens] = []

    def prepare(
        self, captions: Sequence[Any], times: Sequence[float], size: tuple[int, int]
    ) -> Prepared | OmniPrepared:
        """Compute what the steps share; each rank refines the captions and keeps its tokens of them."""
        ranks, patch = self.group.size, self.transformer.config.patch_size
        rows, columns = (side // patch for side in size)
        self._tokens = []
        whole: Prepared | OmniPrepared = self.alone.prepare(captions, times, size)
        if isinstance(whole, OmniPrepared):
            return whole._replace(samples=tuple(self._sample(each, rows, columns) for each in whole.samples))
        texts, rotations = [], []
        for text, rotation in zip(whole.texts, whole.rotations, strict=True):
            image = image_tokens(ranks, rows, columns, len(rotation[0]) - len(text) - rows * columns)
            words = text_tokens(image, len(text))
            texts.append(self._own(text, words))
            rotations.append(self._turned(rotation, image, words))
            self._tokens.append(Tokens(image, _sums(image, words)))
        return whole._replace(texts=tuple(texts), rotations=tuple(rotations))

    def _sample(self, sample: OmniSample, rows: int, columns: int) -> OmniSample:
        """A sample with this rank's tokens of everything."""
        ranks, parts = self.group.size, (*sample.images, *sample.rest)
        # the last ranks, which have fewer rows of the target, have more of these; captions reach all ranks
        noisy, clean, text, more = (evenly(len(part), ranks)[::-1] for part in parts)
        pads = len(sample.image_rotation[0]) - len(parts[0]) - len(parts[1]) - rows * columns
        target = image_tokens(ranks, rows, columns, pads)
        self._tokens.append(Tokens(_sums(target, noisy, clean), _sums(target, noisy, clean, text, more)))
        return sample._replace(
            images=(self._own(parts[0], noisy), self._own(parts[1], clean)),
            rest=(self._own(parts[2], text), self._own(parts[3], more)),
            image_rotation=self._turned(sample.image_rotation, target, noisy, clean),
            rotation=self._turned(sample.rotation, target, noisy, text, clean, more),
        )

    def _own(self, x: Tensor, *segments: list[int]) -> Tensor:
        """This rank's rows of x, whose segments have so many rows for each rank."""
        parts = torch.split(x, [count for segment in segments for count in segment])
        return torch.cat(parts[self.group.rank :: self.group.size])

    def _turned(self, rotation: Rotation, *segments: list[int]) -> Rotation:
        return self._own(rotation[0], *segments), self._own(rotation[1], *segments)

    def step(
        self,
        latent: Tensor,
        prepared: Any,
        i: int,
        caption: int = 0,
        predict: Predict | None = None,
        after: After | None = None,
    ) -> Tensor:
        """Estimate (clean - noise) of one image in step i, as `ZImageTransformer.step`; no graph is used."""
        rows = self._rows(latent)
        with self._exchanging(self._tokens[caption]):
            own = torch.split(latent, rows, 1)[self.group.rank]
            part = self.alone.step(own, prepared, i, caption, None, after)
        return self.group.gather(part.transpose(0, 1).contiguous(), rows).transpose(0, 1)

    def controls(self, members: Sequence[Any]) -> list[Any]:
        """The control images of a run with the rows of this rank alone."""

        def own(latents: Tensor) -> Tensor:
            return torch.split(latents, self._rows(latents), -2)[self.group.rank]

        return [replace(member, latents=own(member.latents)) for member in members]

    def _rows(self, latents: Tensor) -> list[int]:
        """Rows of latents of each rank."""
        patch = self.transformer.config.patch_size
        return [count * patch for count in evenly(latents.shape[-2] // patch, self.group.size)]

    @contextmanager
    def _exchanging(self, tokens: Tokens) -> Iterator[None]:
        """Context in which the blocks of a step share their heads."""
        attend = Exchange(self.group, self.transformer.config.n_heads, tokens)
        for each in self._attentions:
            each.attend = attend
        try:
            yield
        finally:
            for each in self._attentions:
                del each.attend


class Ulysses:
    """How the ranks of a run share its images.

    Args:
        sequence: The ranks between which tokens and heads are split.
        guidance: This rank and the one of the other side of guidance; None where each computes both sides.
    """

    def __init__(self, sequence: Group, guidance: Group | None = None) -> None:
        self.sequence, self.guidance = sequence, guidance

    def stream(self, alone: Any, run: Any) -> Stream:
        """What computes the steps of a run.

        Args:
            alone: What computes them on one rank.
            run: The checked arguments of the call.

        Raises:
            Unsupported: The transformer has hooks or a compiled call, or a block another attention.
            BadArgument: There are more ranks than heads, or than rows of patches.
        """
        stream = Stream(self.sequence, alone, list({each.net: None for each in run.controls}))
        if has_hooks(stream.transformer) or getattr(stream.transformer, "dynamo_ctx", None) is not None:
            raise Unsupported(
                "parallel: the transformer's own call is hooked or compiled, and ranks call its blocks; put "
                "hooks on its blocks, and compile them by compile_repeated_blocks"
            )
        config, ranks = stream.transformer.config, self.sequence.size
        heads, rows = config.n_heads, run.latents.shape[-2] // config.patch_size
        if heads < ranks:
            raise BadArgument(
                f"parallel: {ranks} ranks for {heads} heads, of which each needs one; use {heads} or fewer"
            )
        if rows < ranks:
            raise BadArgument(
                f"parallel: {ranks} ranks for an image of {rows} rows of patches (16 pixels each), of which "
                f"each needs one; use {rows} ranks or fewer, or a higher image"
            )
        return stream

    def sides(self, side: Callable[[int], list[Tensor]], firsts: Sequence[int]) -> list[list[Tensor]]:
        """Estimates of the sides of guidance, of which this rank computes one where there are two.

        Args:
            side: Function that computes the estimates of all images of a side.
            firsts: What it takes: the number of the first caption of each side.
        """
        group = self.guidance
        if group is None or len(firsts) < group.size:
            return [side(first) for first in firsts]
        own = torch.stack(side(firsts[group.rank]))
        return [list(each) for each in group.gather(own[None], [1] * group.size)]

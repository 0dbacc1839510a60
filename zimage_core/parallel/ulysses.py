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
from zimage_core.models.transformer import After, Predict, Prepared, ZImageTransformer
from zimage_core.nn.attention import attention
from zimage_core.nn.layers import Rotation, has_hooks
from zimage_core.parallel.group import Group


def evenly(count: int, ranks: int) -> list[int]:
    """`count` things over ranks, where the first may have one more: 30 over 4 are 8, 8, 7, 7."""
    return [(count + ranks - 1 - rank) // ranks for rank in range(ranks)]


class Tokens(NamedTuple):
    """How many tokens of an image and its caption each rank has.

    Args:
        image: Those of whole rows of patches; the last rank, which has the fewest, has the pads, too.
        text: Those of the caption; one at least, which tells a rank's image from its joint sequence.
    """

    image: list[int]
    text: list[int]

    @classmethod
    def over(cls, ranks: int, rows: int, columns: int, pads: int, text: int) -> Tokens:
        """Tokens of rows x columns patches, pads and a caption; the joint sequence as even as can be."""
        image = [count * columns for count in evenly(rows, ranks)]
        image[-1] += pads
        texts = [1] * ranks
        for _ in range(text - ranks):
            texts[min(range(ranks), key=lambda rank: image[rank] + texts[rank])] += 1
        return cls(image, texts)

    @property
    def joint(self) -> list[int]:
        """Tokens of the joint sequence of each rank."""
        return [image + text for image, text in zip(self.image, self.text, strict=True)]


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
        transformer: The network.
        nets: ControlNets beside it.
    """

    def __init__(self, group: Group, transformer: ZImageTransformer, nets: Sequence[Any] = ()) -> None:
        self.group, self.transformer = group, transformer
        self._attentions = [block.attention for net in (transformer, *nets) for block in net.blocks]
        self._tokens: list[Tokens] = []

    def prepare(self, captions: Sequence[Tensor], times: Sequence[float], size: tuple[int, int]) -> Prepared:
        """Compute what the steps share; each rank refines the captions and keeps its tokens of them.

        Raises:
            BadArgument: The image has fewer rows of patches than there are ranks.
        """
        whole = self.transformer.prepare(captions, times, size)
        rows, columns = (side // self.transformer.config.patch_size for side in size)
        ranks, rank = self.group.size, self.group.rank
        if rows < ranks:
            raise BadArgument(
                f"parallel: {ranks} ranks for an image of {rows} rows of patches (16 pixels each), of which "
                f"each needs one; use {rows} ranks or fewer, or a higher image"
            )

        def own(text: Tensor, rotation: Rotation) -> tuple[Tensor, Rotation]:
            image = len(rotation[0]) - len(text)
            tokens = Tokens.over(ranks, rows, columns, image - rows * columns, len(text))
            self._tokens.append(tokens)
            parts = (torch.split(table, [*tokens.image, *tokens.text]) for table in rotation)
            cos, sin = (torch.cat((part[rank], part[ranks + rank])) for part in parts)
            return torch.split(text, tokens.text)[rank], (cos, sin)

        self._tokens = []
        pairs = [own(*pair) for pair in zip(whole.texts, whole.rotations, strict=True)]
        texts, rotations = zip(*pairs, strict=True)
        return whole._replace(texts=texts, rotations=rotations)

    def step(
        self,
        latent: Tensor,
        prepared: Prepared,
        i: int,
        caption: int = 0,
        predict: Predict | None = None,
        after: After | None = None,
    ) -> Tensor:
        """Estimate (clean - noise) of one image in step i, as `ZImageTransformer.step`; no graph is used."""
        rows = self._rows(latent)
        with self._exchanging(self._tokens[caption]):
            own = torch.split(latent, rows, 1)[self.group.rank]
            part = self.transformer.step(own, prepared, i, caption, after=after)
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

    def stream(self, transformer: ZImageTransformer, run: Any) -> Stream:
        """What computes the steps of a run.

        Raises:
            Unsupported: The run has reference images, or the transformer hooks or a compiled call.
            BadArgument: There are more ranks than heads.
        """
        if run.references is not None:
            raise Unsupported("parallel: reference images are for one rank alone; leave parallelize out")
        if has_hooks(transformer) or getattr(transformer, "dynamo_ctx", None) is not None:
            raise Unsupported(
                "parallel: the transformer's own call is hooked or compiled, and ranks call its blocks; put "
                "hooks on its blocks, and compile them by compile_repeated_blocks"
            )
        heads, ranks = transformer.config.n_heads, self.sequence.size
        if heads < ranks:
            raise BadArgument(
                f"parallel: {ranks} ranks for {heads} heads, of which each needs one; use {heads} or fewer"
            )
        return Stream(self.sequence, transformer, list({each.net: None for each in run.controls}))

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

"""diffusers' transformer in Omni mode beside ours, on tiny random weights; see tests/helpers/parity.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.helpers import parity
from zimage_core.config import PAD_MULTIPLE, TransformerConfig
from zimage_core.models.omni import OmniTransformer
from zimage_core.models.sequence import pad_count

TRANSFORMER: dict[str, Any] = parity.TRANSFORMER | {"siglip_feat_dim": 12}
BLOCKS = [*parity.BLOCKS, "siglip_refiner.0", "siglip_refiner.1"]
Size = tuple[int, int]


class Sample(NamedTuple):
    """Sizes of one sample: pieces of text, images in latents (the target last), maps of features, flags."""

    pieces: Sequence[int]
    images: Sequence[Size | None]
    features: Sequence[Size | None] | None
    mask: Sequence[int]


def sample(images: int, pieces: Sequence[int], mask: Sequence[int] | None = None) -> Sample:
    """So many references of odd sizes; none gives 15, 16 or 32 tokens of image and features alike."""
    sides = [(6 + 2 * k, 10 - 2 * k) for k in range(images)]
    features: list[Size | None] = [(3 + k, 4 + 2 * k) for k in range(images)]
    flags = [0] * images + [1] if mask is None else mask
    return Sample(pieces, [*sides, (6, 10)], [*features, None] if images else None, flags)


CASES: dict[str, list[Sample]] = {
    "no image": [sample(0, [12])],
    "1 image": [sample(1, [5, 37, 3])],
    "2 images": [sample(2, [5, 2, 40, 3])],
    "3 images": [sample(3, [5, 2, 33, 70, 3])],
    "pieces of 32 and 64 tokens": [sample(2, [32, 64, 32, 32])],
    "batch of 1 and 3 images": [sample(1, [5, 37, 3]), sample(3, [7, 2, 2, 50, 4])],
    "no features": [sample(2, [5, 2, 40, 3])._replace(features=None)],
    "a missing image, missing features": [
        Sample([5, 2, 40, 3], [None, (8, 6), (6, 10)], [(3, 5), None, (2, 3)], [0, 0, 1])
    ],
    "as many pieces as images": [sample(1, [5, 37])],
    "more pieces than images": [sample(1, [5, 37, 3, 9])],
    "flags [1, 1]": [sample(1, [5, 37, 3], [1, 1])],
    "flags [0, 1, 0]": [sample(2, [5, 2, 40, 3], [0, 1, 0])],
    "flags [1, 0, 1, 0]: one more": [sample(2, [5, 2, 40, 3], [1, 0, 1, 0])],
    "flags [0, 0, 0, 0]: all clean": [sample(2, [5, 2, 40, 3], [0, 0, 0, 0])],
}


def pair(std: float = 0.06) -> tuple[Any, OmniTransformer]:
    """diffusers' transformer and ours with the same weights."""
    from diffusers import ZImageTransformer2DModel

    theirs = ZImageTransformer2DModel(**TRANSFORMER).eval()
    parity.randomise(theirs, std)
    ours = OmniTransformer(TransformerConfig.from_json(TRANSFORMER)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(samples: Sequence[Sample]) -> dict[str, Any]:
    """Arguments of a call of either, drawn anew."""
    g = torch.Generator().manual_seed(1)

    def maps(sizes: Sequence[Size | None] | None, *shape: int, width: int) -> list[Tensor | None] | None:
        if sizes is None:
            return None
        drawn = [None if s is None else parity.drawn(g, width, *shape, *s) for s in sizes]
        return drawn if shape else [None if d is None else d.permute(1, 2, 0) for d in drawn]

    times = torch.tensor([0.137, 0.625], dtype=parity.FLOAT32).to(torch.get_default_dtype())
    return {
        "x": [maps(one.images, 1, width=16) for one in samples],
        "t": times[: len(samples)],
        "cap_feats": [
            [parity.drawn(g, n, TRANSFORMER["cap_feat_dim"]) for n in one.pieces] for one in samples
        ],
        "siglip_feats": [maps(one.features, width=TRANSFORMER["siglip_feat_dim"]) for one in samples],
        "image_noise_mask": [list(one.mask) for one in samples],
    }


def orders(one: Sample) -> tuple[Tensor, Tensor]:
    """Rows of diffusers' sequences in our order: of the images, and of the joint sequence.

    Theirs is captions, images, features; ours has noisy tokens first, in each half the images and the target
    first among them.
    """

    def padded(count: int | None) -> int:
        return PAD_MULTIPLE if count is None else count + pad_count(count)

    texts = [padded(n) for n in one.pieces]
    images = [padded(None if s is None else s[0] * s[1] // 4) for s in one.images]
    features = [padded(None if s is None else s[0] * s[1]) for s in one.features or ()]
    joint = list(torch.arange(sum((*texts, *images, *features))).split([*texts, *images, *features]))
    flags = [*one.mask, *[1] * len(texts)]
    at = len(texts)
    target = len(images) - 1
    parts = [(flags[j], joint[at + j]) for j in (target, *range(target))]
    rest = [(flags[j], joint[j]) for j in range(at)]
    rest += [(flags[j], joint[at + len(images) + j]) for j in range(len(features))]
    own = torch.cat([rows - sum(texts) for flag in (1, 0) for f, rows in parts if f == flag])
    return own, torch.cat([rows for flag in (1, 0) for f, rows in (*parts, *rest) if f == flag])


def differences(case: str) -> list[parity.Difference]:
    """Every block's output and the final one, with diffusers' positions."""
    samples = CASES[case]

    @torch.no_grad()
    def run() -> parity.Outputs:
        theirs, ours = pair()
        want_blocks, got_blocks = parity.record(theirs, BLOCKS), parity.record(ours, BLOCKS)
        want = theirs(**inputs(samples), return_dict=False)[0]
        got = ours(**inputs(samples), positions="diffusers")
        pairs = {}
        for name in BLOCKS:
            mine, their = got_blocks[name], []
            for i, part in enumerate(mine):
                rows = want_blocks[name][0][i, : len(part)]
                if name.startswith(("noise_refiner", "layers")):
                    rows = rows[orders(samples[i])[name.startswith("layers")]]
                their.append(rows)
            if mine:
                pairs[name] = (torch.cat(their), torch.cat(mine))
        flat = (torch.cat([each.flatten() for each in side]) for side in (want, got))
        return {**pairs, "output": tuple(flat)}

    return parity.compare("transformer, Omni", case, run)


def all_differences() -> Iterator[parity.Difference]:
    """Of every case."""
    for case in CASES:
        yield from differences(case)

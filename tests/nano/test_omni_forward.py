"""The Omni transformer and the vision tower compute what the sibling of the embedded model was trained with.

The training has a forward pass of its own, in whole batches, on numbers that are random here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.nano.draw import Scene, sentence
from benchmarks.nano.export_omni import TOWER
from benchmarks.nano.model import TRANSFORMER
from benchmarks.nano.model_omni import FEATURES, GRID, OmniNano, Tower, second_ids
from benchmarks.nano.vocabulary import LENGTH
from zimage_core.models.omni import OmniTransformer, Reference
from zimage_core.models.vision_tower import VisionTower
from zimage_core.vision.processor import Processor, encode

PROMPTS = [
    "a star on a white background",
    "一个圆形在红色背景的左边",
    "a small ring on the left of a blue background",
]
ROUNDING = 1e-4


def random(module: nn.Module) -> nn.Module:
    """The module with matrices of a size that shows every part."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def trained() -> OmniNano:
    found = OmniNano()
    random(found)
    return found


@torch.no_grad()
@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("features", [True, False])
def test_a_batch_is_the_library_s_samples(trained: OmniNano, latent: bool, features: bool):
    library = OmniTransformer(replace(TRANSFORMER, siglip_feat_dim=FEATURES)).eval()
    library.load_state_dict(trained.transformer.state_dict())
    ids, lengths = second_ids(PROMPTS)
    g = torch.Generator().manual_seed(1)
    x, reference = (torch.randn(3, 16, 10, 10, generator=g) for _ in range(2))
    seen, t = torch.randn(3, GRID * GRID, FEATURES, generator=g), torch.tensor([0.1, 0.5, 0.9])
    hidden = trained.texts(ids, lengths)
    has = (torch.full((3,), latent), torch.full((3,), features))
    made = trained.omni(x, t, hidden, lengths, reference, seen, *has)
    for i, length in enumerate(lengths.tolist()):
        starts = ((0, len(trained.first)), (LENGTH, length), (2 * LENGTH, len(trained.third)))
        pieces: list[Tensor] = [hidden[i, start : start + count] for start, count in starts]
        given = Reference(
            reference[i] if latent else None, seen[i].view(GRID, GRID, -1) if features else None
        )
        prepared = library.prepare_omni([pieces], [(given,)], [float(t[i])], (10, 10))
        assert (library.step_omni(x[i], prepared, 0) - made[i]).abs().max() <= ROUNDING


@torch.no_grad()
def test_the_tower_is_the_library_s():
    tower = Tower()
    random(tower)
    library = VisionTower(TOWER).eval()
    library.load_state_dict({n.removeprefix("encoder."): p for n, p in tower.state_dict().items()})
    pixels = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    got = encode(library, pixels, Processor(max_num_patches=GRID * GRID))
    assert (got.flatten(0, 1) - tower(torch.from_numpy(pixels)[None])[0]).abs().max() <= ROUNDING


def test_a_sentence_leaves_out_what_it_is_told_to():
    scene, rng = Scene("red", "blue", "star"), np.random.default_rng(0)
    for chinese, ink, paper in ((False, "red", "blue"), (True, "红", "蓝")):
        for colour in (True, False):
            for background in (True, False):
                said = sentence(scene, rng, chinese, background, colour)
                assert (ink in said, paper in said) == (colour, background)

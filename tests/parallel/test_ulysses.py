"""One image on several ranks is the image of one process, and every rank has the same bits of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.ulysses import Case, cases, cases_of_two, drawn, guided_apart, heads_30, on_ranks
from tests.run.test_memory import least_ram
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.models.transformer import Attention
from zimage_core.parallel.ulysses import Ulysses, evenly, image_tokens, text_tokens

CLOSE = 1e-5
"""Largest difference of latents, which are of order 4; found are 5e-6."""
ROUNDED = {"float16": 2e-2, "bfloat16": 0.1, "embedded int8": 0.3, "Q4_K int8": 1e-3}
"""The same where numbers are rounded coarsely; float16 is found to differ by 2e-3, int8 by 6e-2."""
QUICK = {
    2: ("ControlNet 2.0", "guidance of some steps", "Q4_K int8", "NaN", "memory limit", "LoRA and ControlNet",
        "reference images", "sides apart", "sides apart, none in some steps"),
    3: ("one row of patches a rank", "batch of two", "guidance", "heun", "dpmpp_2m_sde", "inpainting",
        "Q4_K exact", "float64"),
}  # fmt: skip
"""Ranks -> cases of the default run."""


def wanted(size: int, folder: Path) -> dict[str, Case]:
    found = cases(folder)
    if size == 2:
        found |= cases_of_two(least_ram())
    return found | guided_apart() if size % 2 == 0 else found


def check(size: int, folder: Path, names: Any = None) -> None:
    """Compare what ranks draw with what one process draws, each case by itself."""
    chosen = {name: case for name, case in wanted(size, folder).items() if names is None or name in names}
    assert names is None or set(chosen) == set(names)
    ones = {name: drawn(case) for name, case in chosen.items()}
    ranks = on_ranks(size, folder, chosen)
    faults = []
    for name, one in ones.items():
        first, *others = (rank[name] for rank in ranks)
        if isinstance(one, str):
            right = all(message == one for message in (first, *others))
        elif isinstance(first, str):
            right = False
        else:
            right = all(torch.equal(first, other) for other in others)
            limit = 0.0 if name == "float64" else ROUNDED.get(name, CLOSE)
            right = right and bool(torch.isfinite(first).all()) and float((first - one).abs().max()) <= limit
        if not right:
            faults.append((name, one, first))
    assert not faults


@pytest.mark.parametrize("size", QUICK)
def test_ranks_draw_what_one_process_draws(size, tmp_path):
    check(size, tmp_path, QUICK[size])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5, 6])
def test_ranks_draw_what_one_process_draws_in_every_case(size, tmp_path):
    check(size, tmp_path)


def test_shares_are_as_even_as_they_can_be():
    assert evenly(30, 4) == [8, 8, 7, 7]
    for ranks in (1, 2, 3, 5, 6, 7, 30):
        for rows, columns, text in ((64, 64, 128), (31, 17, 32), (30, 64, 512)):
            image = image_tokens(ranks, rows, columns, pads=-rows * columns % 32)
            words = text_tokens(image, text)
            assert sum(image) == rows * columns + -rows * columns % 32
            assert sum(words) == text
            assert min(words) >= 1, "else a rank cannot tell its image from its joint sequence"
    image = image_tokens(3, 64, 64, 0)
    assert text_tokens(image, 128) == [1, 64, 63], "22, 21 and 21 rows of 64"


def ranks(size: int) -> Ulysses:
    """What rank 0 of so many has before anything is exchanged."""
    group: Any = SimpleNamespace(rank=0, size=size)
    return Ulysses(group)


def test_what_ranks_cannot_share_is_one_sentence():
    case = Case(heads_30, {"prompt": "a"})
    with pytest.raises(BadArgument, match=r"7 ranks for an image of 6 rows .* use 6 ranks or fewer"):
        drawn(case, ranks(7))
    with pytest.raises(BadArgument, match=r"3 ranks for 2 heads, .* use 2 or fewer"):
        drawn(Case(tiny.pipeline, {"prompt": "a"}), ranks(3))
    hooked = tiny.pipeline()
    hooked.transformer.register_forward_hook(lambda *_: None)
    with pytest.raises(Unsupported, match="hooked or compiled"):
        drawn(Case(lambda: hooked, {"prompt": "a"}), ranks(2))
    other = tiny.pipeline()
    other.transformer.layers[1].attention.__class__ = type("Mine", (Attention,), {})
    with pytest.raises(Unsupported, match="attention of another class"):
        drawn(Case(lambda: other, {"prompt": "a"}), ranks(2))


def test_after_an_error_in_a_step_a_run_without_ranks_is_what_it_was():
    pipe = tiny.pipeline()
    before = drawn(Case(lambda: pipe, {"prompt": "a"}))
    with pytest.raises(AttributeError):  # the stand-in of a group cannot exchange
        drawn(Case(lambda: pipe, {"prompt": "a"}), ranks(2))
    assert torch.equal(drawn(Case(lambda: pipe, {"prompt": "a"})), before)

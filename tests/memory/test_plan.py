"""A plan never exceeds its budget, counts every byte once, and gets no worse with more memory."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.model_headers import full_size, q3_k_s, q4_k_m
from tests.helpers.tree import ROOT
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import OverBudget
from zimage_core.memory import residency
from zimage_core.memory.plan import PHASES
from zimage_core.memory.planner import RING, RUNTIME, make_plan
from zimage_core.memory.rates import known
from zimage_core.memory.sizes import Block, Matrix, Part, Sizes, read_sizes
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.components import open_parts

GIB = 1 << 30
Q4_K_M, Q3_K_S = full_size(q4_k_m), full_size(q3_k_s)
FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0", "F16", "F8_E4M3", "F32")

matrix = st.builds(
    Matrix,
    st.sampled_from(FORMATS),
    st.integers(1, 40).map(lambda n: 256 * n),
    st.sampled_from((256, 2560, 3840, 10240)),
)
block_lists = st.one_of(
    st.lists(st.lists(matrix, max_size=4), min_size=1, max_size=12),
    st.tuples(st.lists(matrix, min_size=1, max_size=3), st.integers(1, 34)).map(lambda x: [x[0]] * x[1]),
)
amounts = st.integers(0, 1 << 28)


@st.composite
def any_sizes(draw):
    def part(name, config):
        blocks = tuple(Block(f"layers.{i}", tuple(found)) for i, found in enumerate(draw(block_lists)))
        return Part(name, config, blocks, draw(amounts), draw(amounts))

    net, encoder = part("transformer", TransformerConfig()), part("text_encoder", TextEncoderConfig())
    vae = Part("vae", AutoencoderConfig(), (), draw(amounts), draw(amounts))
    return Sizes(net, encoder, vae, draw(st.sampled_from(("bfloat16", "float16"))))


side = st.integers(1, 160).map(lambda n: 16 * n)
jobs = st.fixed_dictionaries(
    {
        "sizes": any_sizes(),
        "width": side,
        "height": side,
        "images": st.integers(1, 4),
        "caption_tokens": st.integers(1, 512),
        "guidance": st.booleans(),
        "steps": st.integers(1, 50),
        "rates": st.sampled_from(("sm_75", "sm_86", "sm_90", "gfx1100")).map(known),
    }
)


def without_limit(job):
    found = make_plan(**job)
    return found, max(found.floor, found.peak)


@given(jobs, st.floats(0, 1.3))
def test_a_plan_keeps_to_its_budget_or_there_is_none(job, share):
    whole, most = without_limit(job)
    budget = max(1, int(share * most))
    if budget < whole.floor:
        with pytest.raises(OverBudget):
            make_plan(**job, vram=budget)
        return
    plan = make_plan(**job, vram=budget)
    assert plan.peak <= budget, [phase.peak for phase in plan.phases]
    assert plan.floor == whole.floor
    assert [phase.name for phase in plan.phases] == list(PHASES)
    assert all(value >= 0 for phase in plan.phases for value in dataclasses.astuple(phase)[1:])


@given(jobs)
def test_the_floor_is_the_smallest_budget(job):
    floor = make_plan(**job).floor
    assert make_plan(**job, vram=floor).peak <= floor
    with pytest.raises(OverBudget):
        make_plan(**job, vram=floor - 1)


@given(jobs, st.lists(st.floats(0, 1.2), min_size=2, max_size=6))
def test_more_memory_never_streams_more_and_is_never_slower(job, shares):
    whole, most = without_limit(job)
    budgets = sorted(whole.floor + int(share * (most - whole.floor)) for share in shares)
    plans = [make_plan(**job, vram=budget) for budget in budgets]
    for less, more in pairwise([*plans, whole]):
        where = f"{less.vram} -> {more.vram}"
        for a, b in zip(less.components, more.components, strict=True):
            assert a.streamed >= b.streamed, f"{where}: {a.name}"
        for name in ("encode", "step", "decode"):
            a, b = getattr(less.times, name), getattr(more.times, name)
            assert a >= b * (1 - 1e-12), f"{where}: {name} takes {a} s, then {b} s"


@given(st.lists(st.integers(RUNTIME + RING + (256 << 20), 16 * GIB), min_size=2, max_size=5))
def test_more_host_memory_is_never_slower(amounts):
    plans = [make_plan(Q4_K_M, 1024, 1024, vram=int(2.5e9), ram=ram) for ram in sorted(amounts)]
    assert all(a.seconds >= b.seconds for a, b in pairwise(plans))


@given(jobs, st.floats(0, 1.1))
def test_every_byte_is_counted_once(job, share):
    whole, most = without_limit(job)
    plan = make_plan(**job, vram=whole.floor + int(share * (most - whole.floor)))
    sizes = job["sizes"]
    for part, component in zip(
        (sizes.text_encoder, sizes.transformer, sizes.vae), plan.components, strict=True
    ):
        assert component.name == part.name
        assert component.resident + component.streamed + component.host == part.nbytes
    part, net = plan.component("transformer"), sizes.transformer
    kept = set(part.resident_blocks)
    staying = sum(block.nbytes for i, block in enumerate(net.blocks) if i in kept)
    assert part.resident == net.always + staying + (net.host if plan.vram is None else 0)
    passing = [block.nbytes for i, block in enumerate(net.blocks) if i not in kept]
    if part.slots:
        assert part.slots in (2, 3)
        assert max(passing) <= part.slot_bytes < max(passing) + residency.GRAIN
        assert plan.phase("denoise").slots == part.slots * part.slot_bytes
    else:
        assert not passing


def test_planes_are_made_of_what_is_left_over():
    whole = make_plan(Q4_K_M, 1024, 1024)
    planes = whole.phase("encode").planes
    assert planes > 1 << 30
    # under a budget the table of tokens and the VAE's encoder stay on the host
    bare = (
        whole.peak - planes - sum(each.host for each in (Q4_K_M.text_encoder, Q4_K_M.transformer, Q4_K_M.vae))
    )
    assert make_plan(Q4_K_M, 1024, 1024, vram=bare).resident
    assert make_plan(Q4_K_M, 1024, 1024, vram=bare + planes - 1).phase("denoise").planes == 0
    assert make_plan(Q4_K_M, 1024, 1024, vram=bare + planes).phase("denoise").planes == planes
    assert not make_plan(Q4_K_M, 1024, 1024, vram=bare - 1).resident


@given(st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_residents_are_spread_evenly(numbers):
    count, chosen = numbers
    places = residency.spread(count, chosen)
    assert len(places) == chosen
    assert places == sorted(set(places))
    for found, many in ((places, chosen), (sorted(set(range(count)) - set(places)), count - chosen)):
        gaps = [(b - a) % count or count for a, b in zip(found, [*found[1:], *found[:1]], strict=True)]
        assert not gaps or max(gaps) - min(gaps) <= 1, f"{many} of {count}: gaps {gaps}"
    assert not chosen or places[0] == 0


def test_equal_blocks_are_spread_by_the_plan_too():
    plan = make_plan(Q3_K_S, 1024, 1024, vram=int(1.7e9))
    kept = plan.component("transformer").resident_blocks
    assert 5 < len(kept) < 25
    assert list(kept) == residency.spread(32, len(kept))


def test_large_blocks_stay_first_so_that_slots_are_small():
    sizes = [350 << 20] * 2 + [110 << 20] * 30
    found = residency.place(sizes, (2 * 350 + 4 * 110) << 20)
    assert found.resident[:2] == (0, 1)
    assert found.slot_bytes == 110 << 20
    assert found.slots == 3


def test_the_embedded_model_weighs_what_it_weighs_when_loaded():
    """Header arithmetic against the tensors that loading makes."""
    from zimage_core.nn.linear import Embedding, tensors_of

    pipe = ZImagePipeline.from_default(dtype="bfloat16")
    sizes = read_sizes(open_parts(ROOT / "zimage_core" / "assets" / "nano"))

    def held(module):
        return sum(tensor.nbytes for tensor in tensors_of(module))

    assert sizes.transformer.nbytes == held(pipe.transformer)
    assert sizes.text_encoder.nbytes == held(pipe.text_encoder)
    assert sizes.vae.nbytes == held(pipe.vae)
    assert sizes.vae.always == held(pipe.vae.decoder)
    tables = [module for module in pipe.text_encoder.modules() if isinstance(module, Embedding)]
    assert sizes.text_encoder.host == sum(held(table) for table in tables)
    assert len(sizes.transformer.blocks) == len(pipe.transformer.noise_refiner) + len(pipe.transformer.layers)
    plan = pipe.plan(512, 256, vram="90MB", steps=4)
    assert plan == make_plan(sizes, 512, 256, vram=90_000_000, steps=4)


def test_what_is_streamed_is_what_the_stream_streams():
    """The blocks of the plan against those that `memory.attach` makes of the loaded model."""
    import torch

    from zimage_core.memory.attach import blocks_of, maps_of
    from zimage_core.weights.load import opened_file

    pipe = ZImagePipeline.from_default(dtype="bfloat16")
    sizes = read_sizes(open_parts(ROOT / "zimage_core" / "assets" / "nano"))
    for part, model in ((sizes.transformer, pipe.transformer), (sizes.text_encoder, pipe.text_encoder)):
        found = blocks_of(model.blocks, maps_of(opened_file(model).file), torch.device("cpu"))
        assert [block.payload for block in found] == [block.nbytes for block in part.blocks]

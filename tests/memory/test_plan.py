"""A plan never exceeds its budget, counts every byte once, and gets no worse with more memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import tiny
from tests.helpers.model_headers import card_table, full_size, plain, q3_k_s, q4_k_m
from tests.helpers.tree import ROOT
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, OverBudget, Unsupported
from zimage_core.memory import residency, work
from zimage_core.memory.budget import Budget, read_bytes
from zimage_core.memory.job import LEAST_RING, PLANES_MARGIN, RING, RUNTIME, Job
from zimage_core.memory.plan import PHASES, make_plan
from zimage_core.memory.rates import PCIE, Rates, known, measure
from zimage_core.memory.sizes import (
    COMPONENTS,
    SCRATCH_BYTES,
    Block,
    Matrix,
    Part,
    Sizes,
    folder_files,
    read_sizes,
)
from zimage_core.pipeline import ZImagePipeline

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
    assert part.resident == net.always + staying + (net.host if plan.resident else 0)
    passing = [block.nbytes for i, block in enumerate(net.blocks) if i not in kept]
    if part.slots:
        assert part.slots in (2, 3)
        assert max(passing) <= part.slot_bytes < max(passing) + residency.GRAIN
        assert plan.phase("denoise").slots == part.slots * part.slot_bytes
    else:
        assert not passing


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
    from zimage_core.nn.linear import Embedding

    pipe = ZImagePipeline.from_default(dtype="bfloat16")
    sizes = read_sizes(folder_files(ROOT / "zimage_core" / "assets" / "nano"))

    def held(module):
        buffers = sum(b.numel() * b.itemsize for b in module.buffers())
        return buffers + sum(p.numel() * p.itemsize for p in module.parameters())

    assert sizes.transformer.nbytes == held(pipe.transformer)
    assert sizes.text_encoder.nbytes == held(pipe.text_encoder)
    assert sizes.vae.nbytes == held(pipe.vae)
    assert sizes.vae.always == held(pipe.vae.decoder)
    tables = [module for module in pipe.text_encoder.modules() if isinstance(module, Embedding)]
    assert sizes.text_encoder.host == sum(held(table) for table in tables)
    assert len(sizes.transformer.blocks) == len(pipe.transformer.noise_refiner) + len(pipe.transformer.layers)
    plan = pipe.plan(512, 256, vram="40MB", steps=4)
    assert plan == make_plan(sizes, 512, 256, vram=40_000_000, steps=4)


def test_a_pipeline_without_files_has_no_headers():
    with pytest.raises(Unsupported, match="came from no file"):
        tiny.pipeline().plan(vram="1GiB")


# hand arithmetic for common cards: dense 16-bit peak in TFLOP/s, seconds of compute at 70 % of it,
# link, seconds to move each quantisation once
CARDS = {
    "RTX 2060": (25.8, 3.13, PCIE[3], (0.24, 0.30, 0.41, 0.53, 1.00)),
    "RTX 3060": (25.5, 3.17, PCIE[4], (0.12, 0.15, 0.20, 0.26, 0.49)),
    "RTX 4060": (30.2, 2.68, PCIE[3], (0.23, 0.30, 0.40, 0.53, 0.98)),
    "RTX 4070": (58.3, 1.39, PCIE[4], (0.12, 0.15, 0.20, 0.26, 0.49)),
    "RTX 4090": (165, 0.49, PCIE[4], (0.12, 0.15, 0.20, 0.26, 0.49)),
    "A100": (312, 0.26, PCIE[4], (0.12, 0.15, 0.20, 0.26, 0.49)),
    "H100": (989, 0.08, PCIE[5], (0.06, 0.07, 0.10, 0.13, 0.24)),
}
FILES = (2.9e9, 3.68e9, 5.0e9, 6.58e9, 12.3e9)


@pytest.mark.parametrize("card", CARDS)
def test_the_published_arithmetic_comes_out(card):
    peak, compute, link, transfers = CARDS[card]
    flops = work.step_flops(TransformerConfig(), 128, 128, 128)
    assert flops / (0.7 * peak * 1e12) == pytest.approx(compute, rel=0.05)
    for nbytes, seconds in zip(FILES, transfers, strict=True):
        assert nbytes / link == pytest.approx(seconds, rel=0.05, abs=0.005)
    # a bandwidth without end leaves the products alone, as that table does
    rates = Rates(0.7 * peak * 1e12, peak * 1e12, 1e18, link, link)
    plan = make_plan(Q3_K_S, 1024, 1024, vram=make_plan(Q3_K_S, 1024, 1024).floor, rates=rates)
    assert plan.times.compute == pytest.approx(compute, rel=0.05)
    streamed = plan.component("transformer").streamed
    assert plan.times.transfer == pytest.approx(streamed / link)
    assert 0.88 < streamed / Q3_K_S.transformer.nbytes < 1, "context refiner and adaptive norms stay"


def test_the_published_operations_come_out():
    for px, tera in {512: 13.7, 768: 30.4, 1024: 56.6, 1536: 149, 2048: 321}.items():
        assert work.step_flops(TransformerConfig(), px // 8, px // 8, 128) == pytest.approx(
            tera * 1e12, rel=0.01
        )


@pytest.mark.parametrize(("rule", "most"), [(q4_k_m, 3.0e9), (q3_k_s, 2.5e9), (plain("Q8_0"), 2.5e9)])
def test_1024_px_need_little_and_the_transfers_hide(rule, most):
    sizes = full_size(rule)
    floor = make_plan(sizes, 1024, 1024).floor
    assert floor <= most
    for architecture in ("sm_86", "sm_75", "sm_89"):
        plan = make_plan(sizes, 1024, 1024, vram=floor, rates=known(architecture))
        assert plan.component("transformer").streamed > 2e9
        assert plan.times.hidden, f"{architecture}: {plan.times}"
        assert plan.times.step <= 1.03 * plan.times.compute


def test_a_fast_card_and_a_small_picture_wait_for_the_link():
    plan = make_plan(Q4_K_M, 512, 512, vram=int(2.3e9), rates=known("sm_89"))
    assert not plan.times.hidden
    assert "wait for the link" in " ".join(plan.reasons)


def test_a_small_budget_says_what_would_fit():
    with pytest.raises(OverBudget) as caught:
        make_plan(Q4_K_M, 1024, 1024, vram=2 * 10**9)
    text = str(caught.value)
    assert "2 GB of GPU memory are given and 1024 x 1024 px need at least 2.28 GB" in text
    assert "\n" not in text
    width = int(text.partition("a picture of ")[2].split()[0])
    assert make_plan(Q4_K_M, width, width, vram=2 * 10**9).peak <= 2 * 10**9
    with pytest.raises(OverBudget):
        make_plan(Q4_K_M, width + 16, width + 16, vram=2 * 10**9)
    assert "a quantisation of its 1.42 GB of plain matrices" in text


def test_pictures_keep_their_shape_in_the_advice():
    with pytest.raises(OverBudget, match="a picture of") as caught:
        make_plan(Q3_K_S, 2048, 1024, vram=900 << 20)
    width, _, height = str(caught.value).partition("a picture of ")[2].split()[:3]
    assert int(width) / int(height) == pytest.approx(2, rel=0.1)


def test_short_host_memory_reads_from_disk_and_too_little_is_refused():
    roomy = make_plan(Q3_K_S, 1024, 1024, vram=2 * GIB)
    tight = make_plan(Q3_K_S, 1024, 1024, vram=2 * GIB, ram=2 * GIB)
    ample = make_plan(Q3_K_S, 1024, 1024, vram=2 * GIB, ram=8 * GIB)
    assert not roomy.from_disk
    assert tight.from_disk
    assert not ample.from_disk
    assert ample.times == roomy.times
    assert tight.times.transfer == pytest.approx(roomy.times.transfer * 25 / 3.5)
    assert tight.times.hidden, "an NVMe disk is quick enough for this card"
    assert "read it from disk" in tight.reasons[-1]
    assert make_plan(Q3_K_S, 256, 256, vram=2 * GIB, ram=RUNTIME + RING).ring == LEAST_RING
    with pytest.raises(OverBudget, match="of host memory are given"):
        make_plan(Q3_K_S, 1024, 1024, vram=2 * GIB, ram=GIB // 2)


@given(st.lists(st.integers(RUNTIME + RING + (256 << 20), 16 * GIB), min_size=2, max_size=5))
def test_more_host_memory_is_never_slower(amounts):
    plans = [make_plan(Q4_K_M, 1024, 1024, vram=int(2.5e9), ram=ram) for ram in sorted(amounts)]
    assert all(a.seconds >= b.seconds for a, b in pairwise(plans))


def test_planes_are_made_of_what_is_left_over():
    whole = make_plan(Q4_K_M, 1024, 1024)
    planes = whole.phase("encode").planes
    assert planes > 1 << 30
    bare = whole.peak - planes
    assert make_plan(Q4_K_M, 1024, 1024, vram=bare).resident
    assert make_plan(Q4_K_M, 1024, 1024, vram=bare + PLANES_MARGIN).phase("denoise").planes == 0
    some = make_plan(Q4_K_M, 1024, 1024, vram=bare + PLANES_MARGIN + 1000)
    assert some.phase("denoise").planes == 1000
    assert not make_plan(Q4_K_M, 1024, 1024, vram=bare - 1).resident


def test_the_table_in_the_documentation_is_what_the_plan_says():
    """`python -m tests.helpers.model_headers` prints it."""
    texts = [path.read_text("utf-8") for path in (ROOT / "docs").glob("memory*.md")]
    assert any("\n".join(card_table()) in text for text in texts)


def test_a_plan_becomes_json():
    plan = make_plan(Q4_K_M, 1024, 768, 2, vram=6 * GIB, guidance=True)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["peak"] == plan.peak
    assert data["phases"][1]["peak"] == plan.phase("denoise").peak
    assert data["components"][0]["name"] == "text_encoder"
    assert data["seconds"] > data["times"]["encode"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 1000}, "width: got 1000, wanted a multiple of 16"),
        ({"height": 0}, "height: got 0"),
        ({"images": 0}, "images: got 0"),
        ({"caption_tokens": 0}, "caption tokens: got 0"),
        ({"steps": -1}, "steps: got -1"),
    ],
)
def test_a_wrong_number_is_named(change, words):
    with pytest.raises(BadArgument, match=words):
        make_plan(**{"sizes": Q3_K_S, "width": 512, "height": 512, **change})


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6GiB", 6 << 30), ("6GB", 6 * 10**9), ("6g", 6 << 30), ("6G", 6 << 30), (" 1.5 gib ", 3 << 29),
        ("123456", 123456), (123456, 123456), ("800MiB", 800 << 20), ("0.5TB", 5 * 10**11), ("1 k", 1024),
    ],
)  # fmt: skip
def test_bytes_as_people_write_them(text, count):
    assert read_bytes("vram", text) == count
    assert Budget.read(text, text) == Budget(count, count)


@pytest.mark.parametrize(
    "text", ["", "six", "6 gig", "-1", "1e9", "6GiB/s", "0", "9999TiB", True, None, 2**90, 0]
)
def test_bytes_that_are_none(text):
    with pytest.raises(BadArgument, match="wanted bytes"):
        read_bytes("vram", text)


@given(st.text(max_size=20))
def test_no_text_does_more_than_be_refused(text):
    with contextlib.suppress(BadArgument):
        assert 1 <= read_bytes("vram", text) <= 1 << 50


def test_rates_are_known_or_measured():
    here = measure("cpu", 0.002)
    assert all(0 < getattr(here, name) < math.inf for name in ("flops", "bandwidth", "link", "pageable"))
    assert here.source == "measured"
    assert known("sm_86").link == PCIE[4]
    assert known("sm_87", 1e9).link == 1e9
    with pytest.raises(BadArgument, match="not known"):
        known("sm_12x")
    with pytest.raises(BadArgument, match="link is"):
        known("sm_86", -1.0)


def test_numbers_that_live_beside_tensors_are_the_same_here():
    from zimage_core import accelerator
    from zimage_core.cli import sizes as shown
    from zimage_core.memory import activations, explain, stream
    from zimage_core.models import sequence

    assert (SCRATCH_BYTES, PLANES_MARGIN) == (accelerator.SCRATCH_BYTES, accelerator.PLANES_MARGIN)
    assert activations.PAD_MULTIPLE == sequence.PAD_MULTIPLE
    assert RING == stream.RING
    for count in (0, 5, 999, 12_345, 10**9):
        assert explain.in_bytes(count) == shown.in_bytes(count)


def test_what_is_streamed_is_what_the_stream_streams():
    """The blocks of the plan against those that `memory.blocks` makes of the loaded model."""
    import torch

    from zimage_core.memory.blocks import describe
    from zimage_core.weights.load import weight_file

    pipe = ZImagePipeline.from_default(dtype="bfloat16")
    sizes = read_sizes(folder_files(ROOT / "zimage_core" / "assets" / "nano"))
    for part, model in ((sizes.transformer, pipe.transformer), (sizes.text_encoder, pipe.text_encoder)):
        found = describe(model.blocks, weight_file(model), torch.device("cpu"))
        assert [block.payload for block in found] == [block.nbytes for block in part.blocks]


def test_a_plan_is_made_quickly_enough_to_be_asked_for_often():
    """Bounded by the ways that it tries, not by time: machines are busy."""
    job = Job(Q4_K_M, 1024, 1024, 1, 128, False, 8, known("sm_86"))
    assert len(job.ways()) < 20
    assert COMPONENTS == ("transformer", "text_encoder", "vae")

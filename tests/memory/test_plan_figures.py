"""What a plan says, in figures and words: operations, advice on a small budget, wrong arguments."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import tiny
from tests.helpers.model_headers import (
    card_table,
    floor_table,
    full_size,
    plain,
    q3_k_s,
    q4_k_m,
    rows_table,
    six_gb_plan,
    six_gb_table,
    stay_table,
)
from tests.helpers.tree import ROOT
from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, OverBudget, Unsupported
from zimage_core.files.units import parse_bytes
from zimage_core.memory.activations import collected_bytes
from zimage_core.memory.job import Job
from zimage_core.memory.planner import LEAST_RING, RING, RUNTIME, make_plan
from zimage_core.memory.rates import PCIE, known, measure, step_flops
from zimage_core.quant.dispatch import ARCHITECTURES

GIB = 1 << 30
Q4_K_M, Q3_K_S = full_size(q4_k_m), full_size(q3_k_s)


def test_a_pipeline_without_files_has_no_headers():
    with pytest.raises(Unsupported, match="came from no file"):
        tiny.pipeline().plan(vram="1GiB")


def test_what_is_streamed_at_the_least_budget_goes_over_the_link():
    plan = make_plan(Q3_K_S, 1024, 1024, vram=make_plan(Q3_K_S, 1024, 1024).floor)
    streamed = plan.component("transformer").each_step
    assert plan.times.transfer == pytest.approx(streamed / PCIE[4])
    assert 0.88 < streamed / Q3_K_S.transformer.nbytes < 1, "context refiner and adaptive norms stay"


def test_the_published_operations_come_out():
    for px, tera in {512: 13.7, 768: 30.4, 1024: 56.6, 1536: 149, 2048: 321}.items():
        assert step_flops(TransformerConfig(), px // 8, px // 8, 128) == pytest.approx(tera * 1e12, rel=0.01)


@pytest.mark.parametrize(("rule", "most"), [(q4_k_m, 1.45e9), (q3_k_s, 0.85e9), (plain("Q8_0"), 1.15e9)])
def test_1024_px_need_little_and_the_transfers_hide(rule, most):
    sizes = full_size(rule)
    floor = make_plan(sizes, 1024, 1024).floor
    assert floor <= most
    for architecture in ("sm_86", "sm_75", "sm_89"):
        plan = make_plan(sizes, 1024, 1024, vram=floor, rates=known(architecture))
        part = plan.component("transformer")
        assert part.each_step > 2e9
        assert plan.times.hidden, f"{architecture}: {plan.times}"
        # a block of the noise refiner, bfloat16 in a Q4_K_M, may be longer on its way than it computes
        hides = part.slot_bytes / plan.rates.link <= plan.times.compute / part.blocks
        assert plan.times.step <= (1.03 if hides else 1.04) * plan.times.compute
        assert hides or rule is q4_k_m


def test_a_fast_card_and_a_small_image_wait_for_the_link():
    plan = make_plan(Q4_K_M, 512, 512, vram=int(2.3e9), rates=known("sm_89"))
    assert not plan.times.hidden
    assert "wait for the link" in " ".join(plan.reasons)


def test_a_small_budget_says_what_would_fit():
    with pytest.raises(OverBudget) as caught:
        make_plan(Q4_K_M, 2048, 2048, vram=22 * 10**8)
    text = str(caught.value)
    assert "2.2 GB of GPU memory are given and 2048 x 2048 px need at least 2.8 GB" in text
    assert "\n" not in text
    width = int(text.partition("an image of ")[2].split()[0])
    assert make_plan(Q4_K_M, width, width, vram=22 * 10**8).peak <= 22 * 10**8
    with pytest.raises(OverBudget):
        make_plan(Q4_K_M, width + 16, width + 16, vram=22 * 10**8)
    assert "a quantisation whose blocks have at most 54.1 MB (here: 354 MB)" in text


def test_images_keep_their_shape_in_the_advice():
    with pytest.raises(OverBudget, match="an image of") as caught:
        make_plan(Q3_K_S, 2048, 1024, vram=900 << 20)
    width, _, height = str(caught.value).partition("an image of ")[2].split()[:3]
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
    table = roomy.component("text_encoder").host
    assert table > 100 << 20
    assert tight.ram_need == RUNTIME + RING + table + collected_bytes(AutoencoderConfig(), 128, 128, 1)
    assert make_plan(Q3_K_S, 256, 256, vram=2 * GIB, ram=RUNTIME + RING + table).ring == LEAST_RING
    with pytest.raises(OverBudget, match="of host memory are given"):
        make_plan(Q3_K_S, 1024, 1024, vram=2 * GIB, ram=GIB // 2)


@pytest.mark.parametrize(
    ("table", "page"),
    [
        (card_table, "explanation/streaming.md"),
        (floor_table, "guides/memory.md"),
        (stay_table, "guides/recipes.md"),
        (rows_table, "guides/int8.md"),
        (six_gb_table, "start/six-gb.md"),
        (six_gb_plan, "start/six-gb.md"),
    ],
)
def test_a_table_in_the_documentation_is_what_the_plan_says(table, page):
    """`python -m tests.helpers.model_headers` prints them."""
    assert "\n".join(table()) in (ROOT / "docs" / page).read_text("utf-8")


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
    assert parse_bytes("vram", text) == count


@pytest.mark.parametrize(
    "text", ["", "six", "6 gig", "-1", "1e9", "6GiB/s", "0", "9999TiB", True, None, 2**90, 0]
)
def test_bytes_that_are_none(text):
    with pytest.raises(BadArgument, match="wanted bytes"):
        parse_bytes("vram", text)


@given(st.text(max_size=20))
def test_no_text_does_more_than_be_refused(text):
    with contextlib.suppress(BadArgument):
        assert 1 <= parse_bytes("vram", text) <= 1 << 50


def test_rates_are_known_or_measured():
    here = measure("cpu", 0.002)
    assert all(0 < getattr(here, name) < math.inf for name in ("flops", "bandwidth", "link", "pageable"))
    assert here.source == "measured"
    assert known("sm_86").link == PCIE[4]
    assert known("sm_87", 1e9).link == 1e9
    assert all(known(name).link > 0 for name in ARCHITECTURES), "a slot for every family"
    with pytest.raises(BadArgument, match="not known"):
        known("sm_12x")
    with pytest.raises(BadArgument, match="link is"):
        known("sm_86", -1.0)


def test_a_plan_is_made_quickly_enough_to_be_asked_for_often():
    """Bounded by the ways that it tries, not by time: machines are busy."""
    job = Job(Q4_K_M, 1024, 1024)
    assert len(job.ways()) < 20

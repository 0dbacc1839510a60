"""A plan in int8 keeps to its budget, keeps rows where there is room, and says so."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.linear import quant
from tests.helpers.model_headers import full_size, plain, q4_k_m
from tests.memory.test_plan import jobs
from zimage_core.cpu import attention, capability, workspace
from zimage_core.errors import OverBudget, Unsupported
from zimage_core.memory import int8_plan
from zimage_core.memory.allocator import segment
from zimage_core.memory.job import Job
from zimage_core.memory.planner import beside, make_plan, plan_job, plan_on_cpu
from zimage_core.memory.rates import known
from zimage_core.memory.sizes import Block, Matrix
from zimage_core.nn import compute
from zimage_core.quant import gpu_int8, int8

GIB = 1 << 30
ON_CPU = full_size(q4_k_m, dtype="float32")
CPU = known("cpu")
WIDEST = Matrix("Q6_K", 1024, 10240)


def on_cpu(gib, compute="int8", **more):
    return plan_on_cpu(Job(ON_CPU, 512, 512, rates=CPU, compute=compute, **more), gib and int(gib * GIB))


@given(jobs, st.sampled_from(("cpu", "sm_75", "sm_86")), st.floats(0, 1.3))
def test_a_plan_in_int8_keeps_to_its_budget(job, architecture, share):
    job = {**job, "rates": known(architecture), "compute": "int8"}
    whole = make_plan(**job)
    budget = max(1, int(share * max(whole.floor, whole.peak)))
    if budget < whole.floor:
        with pytest.raises(OverBudget):
            make_plan(**job, vram=budget)
        return
    plan = make_plan(**job, vram=budget)
    assert plan.peak <= budget, [phase.peak for phase in plan.phases]
    assert all(value >= 0 for phase in plan.phases for value in dataclasses.astuple(phase)[1:])
    part, net = plan.component("transformer"), job["sizes"].transformer
    rows = [net.blocks[i] for i in part.int8_blocks]
    assert set(part.int8_blocks) <= set(part.resident_blocks)
    nbytes = sum(block.int8_bytes for block in rows)
    assert part.int8_rows == (nbytes if architecture == "cpu" else segment(nbytes))
    packed = sum(block.nbytes for block in rows)
    assert part.resident + packed + part.streamed + part.host == net.nbytes
    staying = part.resident + part.int8_rows
    assert plan.phase("denoise").weights in (staying, staying + part.host)


@given(st.lists(st.integers(-50, 100), max_size=30), st.integers(-100, 2000), st.integers(0, 300))
def test_more_room_keeps_more_rows(costs, room, more):
    less, chosen = (int8_plan.choose(costs, each) for each in (room, room + more))
    assert len(less) <= len(chosen)
    assert sum(costs[place] for place in chosen) <= room + more or not chosen
    assert int8_plan.choose(costs, room, some=False) in ([], list(range(len(costs))))


def test_rows_are_spread_over_the_blocks():
    assert int8_plan.choose([10] * 8, 40) == [0, 2, 4, 6]
    assert int8_plan.choose([10, -5, 10], 5) == [0, 1]


def test_on_a_cpu_memory_beyond_the_packed_weights_keeps_rows():
    kept = {gib: len(on_cpu(gib).component("transformer").int8_blocks) for gib in (6, 7, 9, None)}
    assert 0 < kept[6] < kept[7] < kept[9] == kept[None] == 32
    assert on_cpu(9).phase("denoise").peak + beside(ON_CPU) <= 9 * GIB
    rows = on_cpu(9).component("transformer").int8_rows
    assert rows == sum(m.rows * (m.width + 4) for b in ON_CPU.transformer.blocks for m in b.matrices)
    assert on_cpu(9, "exact").component("transformer").int8_rows == 0


def test_kept_rows_are_worth_more_than_an_idle_network_that_stays():
    """All networks fit beside each other as packed weights, but then no rows would."""
    packed = on_cpu(9, "exact")
    assert packed.resident
    assert not on_cpu(9).resident
    assert on_cpu(9).times.step < on_cpu(6).times.step


def test_rows_of_formats_above_8_bits_are_smaller_than_the_weights():
    job = {"sizes": full_size(plain("Q8_0"), dtype="float32"), "width": 512, "height": 512, "rates": CPU}
    tight = make_plan(**job, compute="int8").floor
    plan = make_plan(**job, compute="int8", vram=tight + GIB)
    part = plan.component("transformer")
    assert part.slots, "some blocks are streamed"
    assert part.int8_blocks == part.resident_blocks


@pytest.mark.parametrize(("gib", "blocks"), [(6, 0), (8, 32)])
def test_a_gpu_keeps_the_rows_of_all_blocks_or_of_none(gib, blocks):
    plan = make_plan(full_size(q4_k_m), 1024, 1024, vram=gib * GIB, compute="int8")
    assert len(plan.component("transformer").int8_blocks) == blocks


def test_the_reason_counts_blocks_and_bytes():
    some = on_cpu(6)
    blocks, count = len(some.component("transformer").int8_blocks), "1.42 GB"
    kept = f"int8 rows of {blocks} of 32 blocks are kept ({count}) in place of packed weights"
    assert f"{kept}; the others are made from packed weights in every step" in some.reasons
    assert (
        "int8 rows of 32 of 32 blocks are kept (5.67 GB) in place of packed weights" in on_cpu(None).reasons
    )
    few = make_plan(full_size(q4_k_m), 1024, 1024, vram=6 * GIB, compute="int8")
    assert "no int8 rows are kept: they are made from the packed weights in every step" in few.reasons
    assert not any("int8" in reason for reason in on_cpu(6, "exact").reasons)


def test_a_step_in_int8_is_expected_to_be_quicker():
    exact, kept = on_cpu(None, "exact").times, on_cpu(None).times
    assert kept.step < exact.step / 2.5
    assert kept.step < kept.first_step, "the rows are made in the first step"
    assert on_cpu(None, "bfloat16").times.step < 0.7 * exact.step


def test_int8_products_need_no_planes_and_less_scratch_on_a_gpu():
    jobs = [Job(full_size(q4_k_m), 1024, 1024, compute=how) for how in ("exact", "int8")]
    exact, inside = (plan_job(job).phase("denoise") for job in jobs)
    assert inside.planes < exact.planes / 10
    assert inside.scratch <= exact.scratch


@pytest.mark.parametrize("tokens", [32, 1056])
def test_scratch_memory_of_a_thread_is_within_the_plan(monkeypatch, tokens):
    """Rotated Q6_K rows of w2 take most: float32 rows of a chunk, its rotation, a slab, int32 sums."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(workspace._local, "by_use", {})
    weight = quant("Q6_K", 1024, 10240, torch.device("cpu"))
    with torch.no_grad():
        int8.linear(torch.ones(tokens, 10240), weight, rotated=True)
    taken = sum(each.nbytes for each in workspace._local.by_use.values())
    part = dataclasses.replace(ON_CPU.transformer, matrices=(), blocks=(Block("a", (WIDEST,)),))
    planned = int8_plan.scratch_bytes(part, tokens, "float32", "cpu", True, 1, True)
    if tokens >= int8_plan.SHORTEST:
        planned -= int8_plan._attention(tokens)  # which no product takes
    assert 0.65 * planned <= taken <= planned


def test_sizes_of_slabs_are_those_of_the_products():
    assert int8_plan.SLAB_ROWS == int8.HEIGHT
    assert int8_plan.SUM_BYTES == gpu_int8.SUM_BYTES


def test_auto_asks_the_device_the_weights_and_their_width():
    net = ON_CPU.transformer
    assert int8_plan.automatic(net, known("sm_86")) == int8_plan.automatic(net, CPU) == "int8"
    assert int8_plan.automatic(net, known("sm_70")) == "exact", "no int8 product"
    assert int8_plan.automatic(net, dataclasses.replace(CPU, int8=1.4 * CPU.flops32)) == "exact"
    assert int8_plan.automatic(full_size(plain("BF16")).transformer, CPU) == "exact"
    small = dataclasses.replace(net, matrices=(), blocks=(Block("layers.0", (Matrix("Q4_K", 9216, 512),)),))
    assert int8_plan.automatic(small, CPU) == "exact"
    text = ON_CPU.text_encoder
    assert int8_plan.automatic(text, known("sm_86")) == int8_plan.automatic(text, CPU) == "exact"
    assert (int8_plan.GAIN, int8_plan.WIDE) == (capability.INT8_GAIN, compute.WIDE)
    assert (int8_plan.QUERIES, int8_plan.SHORTEST) == (attention.QUERIES, attention.SHORTEST)


def test_a_gpu_without_int8_products_has_no_plan_in_int8():
    with pytest.raises(Unsupported, match="sm_70 multiplies no int8"):
        make_plan(full_size(q4_k_m), 1024, 1024, rates=known("sm_70"), compute="int8")


@pytest.mark.parametrize("architecture", ["cpu", "sm_86"])
def test_a_text_encoder_that_stays_exact_is_planned_so(architecture):
    sizes, rates = full_size(q4_k_m), known(architecture)
    exact, mixed, int8_only = (
        Job(sizes, 512, 512, rates=rates, compute=how, encoder_compute=encoder)
        for how, encoder in (("exact", None), ("int8", "exact"), ("int8", None))
    )
    assert mixed.encode_need == exact.encode_need != int8_only.encode_need
    assert mixed.encode_seconds() == exact.encode_seconds() != int8_only.encode_seconds()
    assert mixed.planes(mixed.encoder) == exact.planes(exact.encoder)
    assert mixed.denoise_need == int8_only.denoise_need
    assert mixed.step_seconds() == int8_only.step_seconds()

"""int8 rows in a pipeline: kept where memory allows, with or without a budget, and the image is the same."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.run.test_memory import draw, least_ram
from zimage_core.memory import int8_rows, phases
from zimage_core.memory.phases import MemoryBudget
from zimage_core.memory.planner import RUNTIME
from zimage_core.memory.rates import known
from zimage_core.nn.linear import Linear, packed_weights, tensors_of
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quant import int8

MIB = 1 << 20


def opened(**options):
    return ZImagePipeline.from_default(compute="int8", **options)


def no_rows(pipe):
    pipe._placement.rows.drop()
    return not any(int8.is_int8(m.weight) for m in pipe.transformer.modules() if isinstance(m, Linear))


@pytest.fixture(scope="module", autouse=True)
def not_measured():
    """The machine is not measured for each budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "measure", known)
        yield


@pytest.fixture(scope="module")
def wanted():
    """The image with rows that each product makes for itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_rows.page_cache, "available", lambda: None)
        pipe = opened()
        images = draw(pipe).images
        assert pipe._placement.rows.nbytes == 0
        return images


def test_rows_are_kept_from_run_to_run_and_change_no_bit(wanted):
    pipe = opened()
    assert torch.equal(draw(pipe).images, wanted)
    kept, made = pipe._placement.rows.nbytes, [*pipe._placement.rows._rows.values()]
    assert kept > 3 * MIB
    assert torch.equal(draw(pipe).images, wanted)
    assert [*pipe._placement.rows._rows.values()] == made
    assert no_rows(pipe)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.set_compute("exact"),
        lambda p: p.to(torch.float32),
        lambda p: p.dequantize_weights(1),
        lambda p: p.limit_memory(ram="2GiB"),
    ],
)
def test_rows_go_when_weights_or_arithmetic_change(change):
    pipe = opened()
    draw(pipe)
    assert pipe._placement.rows.nbytes
    change(pipe)
    assert pipe._placement.rows.nbytes == 0
    assert no_rows(pipe)


def test_exact_runs_keep_no_rows():
    pipe = ZImagePipeline.from_default()
    draw(pipe)
    assert pipe._placement.rows.nbytes == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_makes_rows_of_its_own(clone, wanted):
    pipe = opened()
    draw(pipe)
    other = clone(pipe)
    assert other._placement.rows.nbytes == 0
    assert torch.equal(draw(other).images, wanted)


def test_an_error_in_a_run_leaves_the_weights_of_the_file():
    pipe = opened()

    def stop(pipe, step, time, tensors):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(pipe, callback_on_step_end=stop)
    assert no_rows(pipe)


@pytest.fixture(scope="module")
def rams():
    """Budgets with which no block, some blocks and all blocks are rows: (bytes, blocks)."""
    memory, found = opened(ram="64GiB")._placement.memory, {}
    run = {"width": 64, "height": 48, "images": 1, "caption_tokens": 12, "guidance": False, "steps": 2}
    for ram in [*range(least_ram("int8"), RUNTIME + 160 * MIB, MIB // 4), 64 << 30]:
        memory.budget = MemoryBudget(ram=ram)
        part = memory.begin(**run).component("transformer")
        found.setdefault(len(part.int8_blocks), ram)
    counts = sorted(found)
    return [(found[count], count) for count in (counts[0], counts[len(counts) // 2], counts[-1])]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_budget_keeps_the_rows_that_it_has_room_for_and_changes_no_bit(which, rams, wanted):
    ram, blocks = rams[which]
    pipe, held = opened(ram=ram), []

    def look(pipe, step, time, tensors):
        scales = sum(w.scale.nbytes for w in packed_weights(pipe.transformer) if w.scale is not None)
        # the context refiner may have gone, too: it comes once for a caption; adaptive norms of streamed
        # blocks stay, and make this a lower bound
        streamed = [pipe.transformer.blocks[i] for i in pipe.transformer.stream.streamed]
        away = sum(
            t.nbytes for part in (*streamed, pipe.transformer.context_refiner) for t in tensors_of(part)
        )
        held.append(sum(t.nbytes for t in tensors_of(pipe.transformer)) + scales - away)

    for _ in range(2):
        result = draw(pipe, callback_on_step_end=look)
        assert torch.equal(result.images, wanted)
    plan = result.memory.plan
    assert plan.compute == "int8"
    assert len(plan.component("transformer").int8_blocks) == blocks
    assert plan.peak <= ram
    assert max(held) <= plan.phase("denoise").weights
    assert (max(held) > 0.5 * plan.phase("denoise").weights) or plan.component("transformer").slots
    pipe.limit_memory()
    assert no_rows(pipe)


def test_the_plan_of_a_pipeline_is_that_of_its_arithmetic():
    pipe = opened()
    assert pipe.plan(64, 48).compute == "int8"
    both = pipe.plan(64, 48).times.encode
    pipe.set_compute({"text_encoder": "exact"})
    assert pipe.plan(64, 48).times.encode != both
    pipe.set_compute("exact")
    assert pipe.plan(64, 48).component("transformer").int8_rows == 0


def test_rows_go_when_the_transformer_is_replaced():
    pipe = opened()
    draw(pipe)
    pipe.transformer = ZImagePipeline.from_default().transformer
    draw(pipe)
    assert pipe._placement.rows.nbytes == 0


def test_rows_that_found_no_room_are_made_when_there_is_some(monkeypatch):
    pipe = opened()
    with monkeypatch.context() as patch:
        patch.setattr(int8_rows.page_cache, "available", lambda: None)
        draw(pipe)
    assert pipe._placement.rows.nbytes == 0
    draw(pipe)
    assert pipe._placement.rows.nbytes > 3 * MIB


@pytest.mark.parametrize("dense", [False, True])
def test_rows_follow_what_is_written_into_a_weight(dense):
    pipe = opened()  # private maps, which may be written to
    layer = pipe.transformer.layers[0].feed_forward.w2
    if dense:
        layer.dequantize_weight(torch.float32)
    before = draw(pipe).images
    with torch.no_grad():
        (layer.weight if dense else layer.weight.packed).zero_()
    after = draw(pipe).images
    assert not torch.equal(after, before)
    pipe._placement.rows.drop()
    assert torch.equal(draw(pipe).images, after)

"""A run under a memory budget: the same image, its plan followed, nothing left behind."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import zimage_core
from tests.helpers import tiny
from zimage_core.errors import BadArgument, BadFile, OverBudget, Unsupported
from zimage_core.memory import phases
from zimage_core.memory.phases import MemoryBudget
from zimage_core.memory.planner import RUNTIME
from zimage_core.models.block_source import RESIDENT
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quant import dispatch

MIB = 1 << 20
SMALL = {"height": 48, "width": 64, "num_inference_steps": 2, "output_type": "pt"}


def draw(pipe, prompt="a small red circle", **more):
    return pipe(prompt, seed=4, **{**SMALL, **more})


@pytest.fixture(scope="module")
def wanted():
    return draw(ZImagePipeline.from_default()).images


def open_with(ram, compute="exact"):
    return ZImagePipeline.from_default(ram=ram, compute=compute)


def feeders():
    return [t.name for t in threading.enumerate() if t.name.startswith(("zimage-stream", "zimage-read"))]


def least_ram(compute="exact") -> int:
    """Bytes below which a run of SMALL is refused."""
    low, high = RUNTIME, RUNTIME + 400 * MIB
    while high - low > MIB // 4:
        middle = (low + high) // 2
        try:
            open_with(middle, compute)._placement.memory.begin(
                width=64, height=48, images=1, caption_tokens=40, guidance=False, steps=2
            )
            high = middle
        except OverBudget:
            low = middle
    return high


def test_streamed_and_resident_runs_are_equal_bit_for_bit(wanted):
    pipe = open_with(least_ram())
    for _ in range(2):
        result = draw(pipe)
        assert torch.equal(result.images, wanted)
        report = result.memory
        assert report.plan.component("transformer").streamed > 0
        assert report.traffic["transformer"].bytes_moved >= 2 * report.plan.component("transformer").each_step
    assert not feeders()


def test_a_wide_budget_keeps_everything_and_moves_nothing(wanted):
    pipe = open_with("64GiB")
    result = draw(pipe)
    assert torch.equal(result.images, wanted)
    assert result.memory.plan.resident
    assert all(traffic.bytes_moved == 0 for traffic in result.memory.traffic.values())


def test_guidance_batches_and_embeds_run_under_a_budget():
    pipe, plain = open_with(least_ram() + 60 * MIB), ZImagePipeline.from_default()
    options = {"guidance_scale": 2.0, "negative_prompt": "blue", "num_images_per_prompt": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(draw(pipe, **options).images, draw(plain, **options).images)
    embeds, _ = plain.encode_prompt("a green star", do_classifier_free_guidance=False)
    a, b = (draw(p, prompt=None, prompt_embeds=embeds).images for p in (pipe, plain))
    assert torch.equal(a, b)


def test_encode_prompt_alone_works_under_a_budget():
    pipe, plain = open_with("2GiB"), ZImagePipeline.from_default()
    mine, theirs = (p.encode_prompt("a green star")[0][0] for p in (pipe, plain))
    assert torch.equal(mine, theirs)


def test_too_small_a_budget_says_what_is_needed_before_anything_runs():
    pipe = open_with(RUNTIME + MIB)
    with pytest.raises(
        OverBudget, match=r"ram: .* are given and 64 x 48 px need at least 8\d\d MB; give more"
    ):
        draw(pipe)
    pipe.limit_memory(ram="4GiB")
    assert draw(pipe).memory is not None


def test_after_an_error_the_networks_are_back_and_a_run_works(wanted):
    pipe = open_with(least_ram())

    def stop(pipe, step, time, tensors):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        draw(pipe, callback_on_step_end=stop)
    assert not feeders()
    assert pipe.transformer.stream is RESIDENT
    assert torch.equal(draw(pipe).images, wanted)


def test_each_report_is_of_its_own_run():
    pipe = open_with(least_ram())
    moved = [draw(pipe).memory.traffic["transformer"].bytes_moved for _ in range(3)]
    assert moved[0] > 0
    assert max(moved) < 1.5 * min(moved)


def test_tiles_end_with_the_budget():
    pipe = open_with("2GiB")
    pipe._placement.memory.budget = MemoryBudget(ram=least_ram())
    draw(pipe)
    pipe.limit_memory()
    assert pipe.vae.tile is None


def test_only_the_decoder_is_loaded(monkeypatch):
    """The encoder of the VAE has no part in a run, and the plan does not count it."""
    pipe, loaded = open_with("2GiB"), []
    real = phases.load

    def load(modules, *rest):
        loaded.append([*modules])
        return real(loaded[-1], *rest)

    monkeypatch.setattr(phases, "load", load)
    draw(pipe)
    assert loaded == [[*pipe.vae.decoder.modules()]]


@pytest.mark.parametrize("change", [lambda p: p.dequantize_weights(1 << 30), lambda p: p.to(torch.bfloat16)])
def test_weights_that_are_not_the_files_any_more_are_refused(change):
    pipe = ZImagePipeline.from_default()
    change(pipe)
    with pytest.raises(Unsupported, match="open the pipeline anew"):
        pipe.limit_memory(ram="2GiB")


def test_times_on_a_cpu_are_those_of_the_cpu():
    report = draw(open_with("2GiB")).memory
    assert report.plan.rates.architecture == "cpu"


def test_lifting_the_budget_gives_the_plain_pipeline_back(wanted):
    pipe = open_with(least_ram())
    draw(pipe)
    pipe.limit_memory()
    result = draw(pipe)
    assert result.memory is None
    assert torch.equal(result.images, wanted)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.to("cpu"), "to: this pipeline has a memory budget"),
        (lambda p: p.dequantize_weights(1), "dequantize_weights: this pipeline has a memory budget"),
        (lambda p: p.capture(), "capture: this pipeline has a memory budget"),
        (lambda p: p.limit_memory(vram="6GiB"), "vram: it is memory of a GPU"),
        (lambda p: p.limit_memory(ram="much"), "ram: got much"),
    ],
)
def test_what_a_budget_does_not_allow_is_one_sentence(call, words):
    pipe = open_with("2GiB")
    with pytest.raises((Unsupported, BadArgument), match=words):
        call(pipe)


def test_a_budget_needs_files():
    with pytest.raises(Unsupported, match="a memory budget needs files"):
        tiny.pipeline().limit_memory(ram="2GiB")


def test_the_old_name_of_the_budget_warns():
    with pytest.warns(DeprecationWarning, match="MemoryPlan is now MemoryBudget"):
        old = zimage_core.MemoryPlan
    assert old is zimage_core.MemoryBudget is MemoryBudget


@pytest.mark.parametrize("amount", ["6 gigs", -1, 0, "", True])
def test_an_amount_that_is_none_is_refused(amount):
    with pytest.raises(BadArgument):
        MemoryBudget(vram=amount)


@pytest.mark.gpu
@pytest.mark.parametrize("vram", ["least", "auto", "1GiB"])
def test_a_budget_on_a_gpu_is_kept_and_changes_no_bit(vram, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "dequantise")  # a budget may have no room for planes
    plain = draw(ZImagePipeline.from_default(device="cuda")).images
    pipe = ZImagePipeline.from_default(device="cuda", vram=vram)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = draw(pipe)
    assert torch.equal(result.images, plain)
    assert torch.cuda.max_memory_allocated() - before <= result.memory.plan.peak


def test_the_timeline_is_written_once_and_not_over_another_file(tmp_path):
    result = draw(open_with(least_ram()))
    assert any("transformer" in line for line in result.memory.summary())
    page = tmp_path / "out.html"
    result.memory.save_timeline(page)
    assert "compute of block" in page.read_text()
    with pytest.raises(BadFile, match="exists"):
        result.memory.save_timeline(page)

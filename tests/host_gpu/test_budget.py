"""A budget holds for what the driver gives, not only for what tensors hold: full-size files, 1024 x 1024.

The driver's context, 600 MB, is no part of a budget.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.host_gpu import driven
from tests.host_gpu.sparse_models import write_controlnet, write_omni

pytestmark = pytest.mark.fake_cuda

MIB = 1 << 20
ROOMY, EXACT = "8GiB", "0"
"""What the card has beside budget and context: enough to see what is taken too much, or nothing."""
CASES = [
    ("Q4_K_M", "6GiB", ROOMY, "exact"), ("Q3_K_S", "6GiB", ROOMY, "exact"),
    ("Q8_0", "12GiB", ROOMY, "exact"), ("Q4_K_M", "24GiB", ROOMY, "exact"),
    ("Q8_0", "24GiB", EXACT, "exact"), ("Q3_K_S", "least", EXACT, "exact"),
    ("Q4_K_M", "least", EXACT, "exact"), ("Q4_K_M", "4GiB", EXACT, "exact"),
    ("Q4_K_M", "6GiB", EXACT, "exact"),
    # packed weights with scratch, rows in the steps alone, rows that stay
    ("Q4_K_M", "4GiB", EXACT, "int8"), ("Q4_K_M", "8GiB", EXACT, "int8"), ("Q4_K_M", "12GiB", EXACT, "int8"),
]  # fmt: skip
cases = pytest.mark.parametrize(("mix", "vram", "spare", "compute"), CASES)


@cache
def run(folder, vram, spare, compute):
    # maps of the VAE pass through host memory under the least budget: 30 s a run
    runs = 1 if vram == "least" else 2
    arguments = ("--files", folder, "--vram", vram, "--spare", spare, "--pixels", 1024, "--runs", runs)
    return driven.run("budget", *arguments, "--compute", compute)


def given(found):
    """Most bytes that the driver had given out at once."""
    return max(phase["given"] for run in found["runs"] for phase in run["phases"])


@cases
def test_the_driver_gives_no_more_than_the_budget(models, mix, vram, spare, compute):
    found = run(models(mix), vram, spare, compute)
    assert not any(r["error"] for r in found["runs"])
    assert given(found) <= found["vram"], f"{given(found) / MIB:.0f} MiB of {found['vram'] / MIB:.0f}"


@cases
def test_no_allocation_succeeds_only_after_the_cache_was_emptied(models, mix, vram, spare, compute):
    found = run(models(mix), vram, spare, compute)
    assert (found["retries"], found["ooms"]) == (0, 0)


@cases
def test_what_is_given_is_what_was_planned(models, mix, vram, spare, compute):
    found = run(models(mix), vram, spare, compute)
    assert found["runs"][-1]["peak"] is not None, found["runs"][-1]["error"]
    assert given(found) == pytest.approx(max(r["peak"] for r in found["runs"]), rel=0.05)


def test_a_long_caption_does_not_keep_the_memory_of_its_phase(models):
    """Where the transformer stays between runs, the captions would have stayed on the device with it."""
    arguments = ("--vram", "1500MiB", "--spare", ROOMY, "--pixels", 256, "--words", 1100)
    found = driven.run("budget", "--files", models("Q4_K_M"), *arguments)
    assert not any(r["error"] for r in found["runs"])
    assert given(found) <= found["vram"]


@pytest.mark.parametrize("setting", ["backend:cudaMallocAsync", "expandable_segments:True"])
def test_other_allocators_of_torch_keep_a_budget(setting):
    found = driven.run("budget", PYTORCH_CUDA_ALLOC_CONF=setting)
    assert [r["error"] for r in found["runs"]] == [None, None]
    assert given(found) <= found["vram"]


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory):
    return write_controlnet(tmp_path_factory.mktemp("controlnet"))


@pytest.mark.parametrize("vram", ["8GiB", "least"])
def test_a_budget_holds_with_a_controlnet_and_an_image_to_begin_from(models, controlnet, vram):
    """5.9 GB beside the transformer: whole, and block by block."""
    arguments = ("--vram", vram, "--spare", EXACT, "--pixels", 1024, "--runs", 1, "--controlnet", controlnet)
    found = driven.run("budget", "--files", models("Q4_K_M"), *arguments)
    assert [r["error"] for r in found["runs"]] == [None]
    assert given(found) <= found["vram"]
    assert (found["retries"], found["ooms"]) == (0, 0)


def test_a_budget_holds_with_a_lora_and_a_controlnet():
    found = driven.run("budget", "--controlnet", "edges", "--lora", "outline")
    assert [r["error"] for r in found["runs"]] == [None, None]
    assert given(found) <= found["vram"]


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    return write_omni(tmp_path_factory.mktemp("omni"))


def with_references(folder, vram, count, *more):
    arguments = ("--vram", vram, "--spare", EXACT, "--pixels", 1024, "--runs", 1, "--references", count)
    return driven.run("budget", "--files", folder, *arguments, *more)


@pytest.mark.parametrize(
    ("vram", "count", "compute"), [("6GiB", 1, "exact"), ("12GiB", 3, "int8"), ("14GiB", 20, "exact")]
)
def test_a_budget_holds_with_reference_images(omni, vram, count, compute):
    """Streamed, as int8 rows, and a stream of 86,000 tokens."""
    found = with_references(omni, vram, count, "--compute", compute)
    assert [r["error"] for r in found["runs"]] == [None]
    assert [phase["phase"] for phase in found["runs"][0]["phases"]][1:4] == ["image", "vision", "denoise"]
    assert given(found) <= found["vram"]
    assert (found["retries"], found["ooms"]) == (0, 0)


def test_twenty_references_are_refused_before_memory_is_taken(omni):
    found = with_references(omni, "8GiB", 20)
    assert "with 20 reference images need at least" in found["runs"][0]["error"]
    assert not found["runs"][0]["phases"]


@pytest.mark.parametrize(("vram", "streamed"), [("4GiB", False), ("2GiB", True)])
def test_a_budget_holds_for_a_language_model_that_writes(models, vram, streamed):
    """It reads its layers for each token, so they stay on the device where they fit."""
    found = driven.run("enhance", "--files", models("Q4_K_M"), "--vram", vram, "--runs", 1)
    assert [(r["error"], r["tokens"]) for r in found["runs"]] == [(None, 24)]
    assert all(r["given"] <= r["planned"] <= found["vram"] for r in found["runs"])
    assert [r["moved"] > 0 for r in found["runs"]] == [streamed]
    assert (found["retries"], found["ooms"]) == (0, 0)

"""A GPU that is full, fails, or is shared: one sentence, nothing hangs, the pipeline can be used again."""

from __future__ import annotations

import re
from functools import cache

import pytest

from tests.host_gpu import driven

pytestmark = pytest.mark.fake_cuda

FULL = ("full", "full without budget", "taken before encode", "taken before denoise", "taken before decode")
FAILING = ("copy 1", "copy 40", "launch 5", "malloc 2")


@cache
def found():
    return driven.run("faults")


@pytest.mark.parametrize("case", FULL)
def test_without_memory_the_error_says_so_and_the_next_run_works(case):
    error, later = found()[case]["errors"]
    assert error.startswith("OutOfMemory: ")
    assert later == ""


def test_an_error_says_who_holds_the_memory_and_what_to_do():
    held = r"of 85.9 GB this process holds .* and others 85.9 GB, .* are free; end programs that use this GPU"
    for case, advice in (("full", "a smaller vram="), ("full without budget", "vram='auto'")):
        error = found()[case]["errors"][0]
        assert re.search(held, error)
        assert advice in error


def test_memory_that_is_taken_before_the_decoding_does_not_cost_the_latents():
    assert "finished latents are in the attribute" in found()["taken before decode"]["errors"][0]


@pytest.mark.parametrize("case", FAILING)
def test_a_driver_that_fails_once_is_named_and_the_next_run_works(case):
    error, later = found()[case]["errors"]
    assert error.startswith("DeviceFault: cuda:0: the GPU or its driver failed (CUDA error: ")
    assert later == ""


def test_a_gpu_that_is_gone_leaves_a_pipeline_on_the_cpu():
    first, second, on_cpu = found()["for good"]["errors"]
    assert first.startswith("DeviceFault: ")
    assert second.startswith("DeviceFault: ")
    assert on_cpu == ""
    assert found()["for good"]["home"]


def test_errors_of_a_launch_by_triton_are_of_the_same_kinds():
    error, later = found()["Triton launch"]["errors"]
    assert error.startswith("DeviceFault: ")
    assert later == ""
    error, later = found()["Triton without memory"]["errors"]
    assert error.startswith("OutOfMemory: ")
    assert later == ""


def test_auto_is_within_the_part_of_the_card_that_torch_is_allowed():
    first, second, planned = found()["fraction"]["errors"]
    assert (first, second) == ("", "")
    assert planned < (80 << 30) // 64


def test_a_dense_table_of_tokens_on_the_host_stops_no_second_run():
    assert found()["dense table"]["errors"] == ["", ""]


@pytest.mark.parametrize("case", ["two in turn", "two at once"])
def test_two_pipelines_share_a_card_that_holds_both_budgets(case):
    assert found()[case]["errors"] == ["", "", "", ""]


def test_no_thread_and_no_limit_is_left():
    for case, end in found().items():
        assert (end["threads"], end["fraction"]) == ([], 1.0), case

"""A GPU where no Triton kernel can run makes images all the same, with one warning; what that costs."""

from __future__ import annotations

from functools import cache

import pytest

from tests.host_gpu import driven

pytestmark = pytest.mark.fake_cuda

SENTENCES = {
    "compiler": "there is no C compiler for Triton's launcher; install gcc or clang, or name one in CC",
    "headers": "the C compiler finds no Python.h in",
    "triton": "Triton is not installed; install 3.6 or newer",
    "new triton": "Triton 3.2 is too old",
    "launch": "a tiny kernel ends in OSError: libcuda.so.1: cannot open shared object file",
}


@cache
def run(case, kernels="auto"):
    return driven.run("fallbacks", case, ZIMAGE_KERNELS=kernels, FAKE_FAST=1)


@cache
def measured(*parts, capability=90):
    return driven.run("without_kernels", *parts, FAKE_ARCH=capability, ZIMAGE_KERNELS="off", FAKE_FAST=1)


REST = ("products", "decode", "unfused")


@pytest.mark.parametrize("case", SENTENCES)
def test_an_image_is_made_with_one_warning_that_names_what_is_missing(case):
    found = run(case)
    assert not found["error"]
    assert not found["refused"]
    assert found["ran"]
    (warned,) = found["warned"]
    assert SENTENCES[case] in warned


@pytest.mark.parametrize("case", SENTENCES)
def test_kernels_that_were_asked_for_end_the_run_in_the_same_sentence(case):
    found = run(case, "on")
    assert not found["error"]
    assert SENTENCES[case] in found["refused"]


def test_a_whole_machine_runs_kernels_and_warns_of_nothing():
    found = run("nothing")
    assert found["ran"]
    assert not found["warned"]


@pytest.mark.parametrize("capability", [61, 75])
def test_a_card_without_tensor_cores_makes_an_image(capability):
    found = driven.run("fallbacks", "nothing", FAKE_ARCH=capability, FAKE_FAST=1)
    assert found["ran"]
    assert len(found["warned"]) == (capability < 70)


def test_a_product_without_kernels_is_few_launches():
    """Q3_K has the most: 67 for each of two slabs, and the product; 2,396 in the tiles of a CPU."""
    launches = {name: count for name, (count, _, _) in measured(*REST)["products"].items()}
    assert max(launches.values()) <= 140, launches
    assert launches["Q4_K"] <= 70
    assert launches["Q8_0"] <= 12
    assert launches["F8_E4M3"] <= 2


def test_its_memory_is_what_a_plan_may_count():
    for name, (_, nbytes, planned) in measured(*REST)["products"].items():
        assert nbytes <= planned + (1 << 20), name


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 120])
def test_torch_takes_the_attention_that_doctor_prints(capability):
    for use, (way, taken, wanted) in measured("backends", capability=capability)["backends"].items():
        assert taken == wanted, use
        assert way == ("repeat" if (use, capability) == ("text encoder", 75) else "fused")


def test_without_fused_kernels_the_scores_of_a_block_stay_small():
    """Unfused they would be 2 GB for the transformer at 1024 px, and kept twice."""
    for use, nbytes in measured(*REST)["unfused"].items():
        assert nbytes <= 640 << 20, use


def test_a_decode_copies_no_maps_and_takes_what_is_planned():
    found = measured(*REST)["decode"]
    assert (found["copies"], found["mixed"]) == (1, 1), "attention alone needs its tokens in rows"
    assert found["bytes"] == pytest.approx(found["plan"], rel=0.01)
    assert found["bytes"] <= found["plan"]

"""Defends: the path of a product follows from format, GPU, rows, memory and mode, and can be taken."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_core.cpu.capability import INT8_GAIN
from zimage_core.errors import BadArgument, UnknownFormat, Unsupported
from zimage_core.formats import FORMATS
from zimage_core.quant import dispatch
from zimage_core.quant.dispatch import (
    ARCHITECTURES,
    MODES,
    Choice,
    choose,
    choose_int8,
    crossover,
    family,
    int8_gain,
    int8_product,
    largest_that_fit,
)

NO_TENSOR_CORES = ("sm_70", "sm_72", "sm_75")
ARCHS = ("cpu", *ARCHITECTURES, "sm_72", "sm_87", "sm_103", "sm_121", "gfx1151", "gfx950")
ROWS = (0, 1, 16, 300, 900, 4096, 1 << 20)

cases = st.fixed_dictionaries({
    "format_name": st.sampled_from(list(FORMATS)),
    "rows": st.sampled_from([1, 40, 3840]),
    "width": st.sampled_from([1, 32, 64, 96, 256, 320, 3840, 10240]),
    "tokens": st.sampled_from(ROWS),
    "architecture": st.sampled_from(ARCHS),
    "free_bytes": st.sampled_from([0, 1, 4096, 1 << 20, 1 << 40]),
    "mode": st.sampled_from(MODES),
    "dtype": st.sampled_from(["float16", "bfloat16", "float32"]),
    "planes": st.booleans(),
})  # fmt: skip


def answer(**case: object) -> Choice | Unsupported:
    """A choice, or the refusal; any other error is a failure."""
    try:
        return choose(**case)
    except Unsupported as refusal:
        return refusal


def dense_bytes(case: dict) -> int:
    return case["rows"] * case["width"] * (4 if case["dtype"] == "float32" else 2)


@given(case=cases)
def test_every_case_has_a_path_that_it_can_take_or_a_refusal(case):
    found = answer(**case)
    if isinstance(found, Unsupported):
        assert case["mode"] == "fused", "only what was asked for by name is refused"
        assert case["architecture"] != "cpu"
        return
    assert found.path in ("fused", "dequantise", "cpu")
    assert found.reason
    assert (found.path == "cpu") == (case["architecture"] == "cpu")
    if found.path == "fused":
        assert case["architecture"] not in NO_TENSOR_CORES
        assert case["dtype"] != "float32"
        planes = dispatch.planar_bytes(FORMATS[case["format_name"]], case["rows"], case["width"])
        assert found.nbytes == (0 if case["planes"] else planes) <= case["free_bytes"]
    elif found.path == "cpu":
        assert found.nbytes == 0
    else:
        assert found.nbytes == dense_bytes(case)
    if found.path not in ("cpu", "dequantise"):
        assert case["mode"] in ("auto", found.path)
    if case["mode"] == "dequantise":
        assert found.path in ("cpu", "dequantise")
    if found.path == "dequantise" and FORMATS[case["format_name"]].weights > 1:
        assert case["mode"] in ("auto", "dequantise")


@given(case=cases)
def test_once_dequantised_more_rows_never_go_back(case):
    case["mode"] = "auto"
    taken = [choose(**{**case, "tokens": tokens}).path for tokens in ROWS]
    assert sorted(taken, reverse=True) == taken, f"rows {ROWS} take {taken}"  # "fused" > "dequantise"


@given(case=cases)
def test_more_memory_never_takes_a_path_away(case):
    order = ("dequantise", "fused")
    taken = [
        answer(**{**case, "mode": "auto", "free_bytes": free}) for free in (0, 1 << 12, 1 << 24, 1 << 40)
    ]
    ranks = [order.index(choice.path) for choice in taken if choice.path != "cpu"]
    assert ranks == sorted(ranks)


@given(case=cases)
def test_asked_for_by_name_it_is_refused_exactly_where_it_is_never_chosen(case):
    asked = answer(**{**case, "mode": "fused"})
    chosen = choose(**{**case, "mode": "auto", "tokens": 0})
    if case["architecture"] != "cpu" and FORMATS[case["format_name"]].weights > 1:
        assert isinstance(asked, Unsupported) == (chosen.path == "dequantise")
        assert isinstance(asked, Unsupported) or asked.path == "fused"


@pytest.mark.parametrize("name", dispatch.PLANAR_BITS)
def test_memory_is_enough_to_the_byte(name):
    """Planes of 40 rows fit or they do not; planes that exist need nothing more."""
    need = dispatch.planar_bytes(FORMATS[name], 40, 256)
    arguments = (name, 40, 256, 1, "sm_90")
    assert choose(*arguments, need) == Choice("fused", choose(*arguments, need).reason, need)
    assert choose(*arguments, need - 1).path == "dequantise"
    assert choose(*arguments, 0, planes=True).path == "fused"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format_name": "IQ2_XXS"}, "IQ2_XXS has no planar layout"),
        ({"architecture": "sm_75"}, "no tensor cores to offer on sm_75"),
        ({"free_bytes": 10}, r"planes need 8524800 bytes and 10 are free"),
        ({"width": 3872}, "rows of 3872 weights are no multiple of 64"),
        ({"format_name": "Q2_0", "width": 3904}, "rows of 3904 weights are no multiple of 128"),
        ({"dtype": "float32"}, "float32 has no tensor cores"),
    ],
)
def test_a_refusal_names_what_is_in_the_way_and_what_to_do(changed, says):
    case = {
        "format_name": "Q4_K", "rows": 3840, "width": 3840, "tokens": 16, "architecture": "sm_90",
        "free_bytes": 1 << 40, "mode": "fused", **changed,
    }  # fmt: skip
    with pytest.raises(Unsupported, match=says) as caught:
        choose(**case)
    assert "; use auto" in str(caught.value)
    assert choose(**{**case, "mode": "auto"}).path == "dequantise"


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.weights == 1])
def test_plain_numbers_are_converted_whatever_is_asked_of_blocks(name):
    """A file of Q4_K has a few of them; asking for the fused path must not refuse the file."""
    for mode in ("auto", "fused", "dequantise"):
        assert choose(name, 40, 256, 1, "sm_90", 0, mode) == choose(name, 40, 256, 1, "sm_90", 1 << 40)
        assert choose(name, 40, 256, 1, "sm_90", 0, mode).path == "dequantise"


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("Q9_K", 40, 256, 1, "sm_90", 0), UnknownFormat, "Q9_K"),
        (("Q4_K", 40, 256, 1, "sm_90", 0, "fast"), BadArgument, "'fast'.*auto, fused, dequantise"),
        (("Q4_K", 40, 256, 1, "sm_30", 0), BadArgument, "'sm_30' is not known; known are cpu, sm_50"),
        (("Q4_K", 40, 256, 1, "mps", 0), BadArgument, "'mps'"),
        (("Q4_K", 0, 256, 1, "sm_90", 0), BadArgument, "no positive size"),
        (("Q4_K", 40, 0, 1, "sm_90", 0), BadArgument, "no positive size"),
        (("Q4_K", 40, 256, -1, "sm_90", 0), BadArgument, "no positive size"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        choose(*arguments)


@pytest.mark.parametrize(
    ("architecture", "low", "high"), [("sm_90", 300, 600), ("sm_89", 900, 2000), ("sm_86", 400, 900)]
)
def test_rows_up_to_which_fused_q4_k_wins(architecture, low, high):
    """A caption of 300 tokens is fused and an image of 4,096 dequantised on an H100."""
    most = crossover(FORMATS["Q4_K"], architecture)
    assert low <= most <= high
    for tokens, path in ((most, "fused"), (most + 1, "dequantise")):
        assert choose("Q4_K", 3840, 3840, tokens, architecture, 1 << 40).path == path
    assert choose("Q4_K", 3840, 3840, 4096, architecture, 1 << 40).path == "dequantise"


@pytest.mark.parametrize("architecture", NO_TENSOR_CORES)
def test_without_tensor_cores_nothing_is_fused(architecture):
    assert crossover(FORMATS["Q4_K"], architecture) == 0
    assert choose("Q4_K", 3840, 3840, 1, architecture, 1 << 40, planes=True).path == "dequantise"


def test_a_gpu_takes_the_nearest_older_one():
    known = {
        "sm_72": "sm_70", "sm_87": "sm_86", "sm_88": "sm_86", "sm_110": "sm_103",
        "sm_121": "sm_120", "sm_61": "sm_50", "gfx90a": "gfx942", "gfx950": "gfx942", "gfx1034": "gfx1030",
        "gfx1010": "gfx1030", "gfx900": "gfx906", "gfx90c": "gfx906", "gfx908": "gfx942",
        "gfx1151": "gfx1100", "gfx1200": "gfx1201",
    }  # fmt: skip
    assert {name: family(name) for name in known} == known
    assert all(family(name) == name for name in ARCHITECTURES)


@pytest.mark.parametrize("name", ["sm_61", "sm_75", "gfx906", "gfx1031"])
def test_a_gpu_without_tensor_cores_for_triton_never_takes_the_fused_kernel(name):
    for tokens in (1, 64, 4128):
        choice = choose("Q4_K", 10240, 3840, tokens, name, 1 << 40)
        assert choice.path == "dequantise"
        assert "no tensor cores" in choice.reason


@pytest.mark.parametrize("name", ["", "cpu", "sm_", "sm_37", "sm_x", "mps", "SM_90"])
def test_an_unknown_gpu_is_an_error_that_lists_the_known(name):
    with pytest.raises(BadArgument, match=r"sm_90.*gfx942"):
        family(name)


sizes = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 100), max_size=8)


@given(sizes=sizes, budget=st.integers(0, 400))
def test_what_is_dequantised_is_within_its_budget_largest_first(sizes, budget):
    chosen = largest_that_fit(sizes, budget)
    growth = [sizes[name] for name in chosen]
    assert sum(growth) <= budget
    assert growth == sorted(growth, reverse=True)
    assert len(set(chosen)) == len(chosen)
    assert chosen == largest_that_fit(dict(sizes), budget)
    left = budget - sum(growth)
    assert all(sizes[name] > left for name in set(sizes) - set(chosen)), "one more would have fitted"
    bigger = [name for name in sizes if sizes[name] == max(sizes.values()) <= budget]
    assert not bigger or chosen[0] == bigger[0]


def test_what_is_dequantised_does_not_depend_on_the_order_of_distinct_sizes():
    items = {"w1": 40, "w2": 39, "to_q": 15, "to_k": 14}
    for budget in range(0, 110, 7):
        answers = {tuple(largest_that_fit(dict(order), budget)) for order in permutations(items.items())}
        assert len(answers) == 1, f"budget {budget}: {answers}"


@pytest.mark.parametrize(("value", "on_cpu"), [("auto", False), ("off", False), ("on", True)])
def test_kernels_run_on_a_cpu_only_where_they_are_asked_for(monkeypatch, value, on_cpu):
    monkeypatch.setattr(dispatch, "KERNELS", value)
    assert dispatch.kernels_for(torch.device("cpu")) == on_cpu


def test_another_value_of_the_variable_is_refused_at_the_first_weight(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", "yes")
    with pytest.raises(BadArgument, match="ZIMAGE_KERNELS is 'yes'; it must be auto, on or off"):
        dispatch.kernels_for(torch.device("cpu"))


@pytest.mark.parametrize("value", ["resident", "fast", ""])
def test_a_wrong_path_in_the_environment_is_one_sentence(monkeypatch, value):
    monkeypatch.setattr(dispatch, "MODE", None)
    monkeypatch.setenv("ZIMAGE_MATMUL", value)
    with pytest.raises(BadArgument, match=r"ZIMAGE_MATMUL is .* must be auto, fused or dequantise"):
        dispatch.mode()


def test_the_environment_is_read_at_the_first_use_and_the_old_name_still_works(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", None)
    monkeypatch.setattr(dispatch, "MODE", None)
    monkeypatch.setenv("ZIMAGE_KERNELS", "on")
    monkeypatch.delenv("ZIMAGE_MATMUL", raising=False)
    monkeypatch.setenv("ZIMAGE_PATH", "fused")
    assert dispatch.kernels_for(torch.device("cpu"))
    with pytest.deprecated_call(match="ZIMAGE_PATH is now called ZIMAGE_MATMUL"):
        assert dispatch.mode() == "fused"
    monkeypatch.setenv("ZIMAGE_MATMUL", "dequantise")
    assert dispatch.mode() == "fused", "read once"
    monkeypatch.setattr(dispatch, "MODE", None)
    with pytest.deprecated_call():
        assert dispatch.mode() == "dequantise"


@pytest.mark.parametrize(
    ("architecture", "by", "pays"),
    [
        ("sm_75", "torch", True), ("sm_80", "triton", False), ("sm_86", "triton", True),
        ("sm_89", "triton", True), ("sm_90", "triton", False), ("sm_100", "torch", False),
        ("sm_103", "torch", False), ("sm_110", "torch", False), ("sm_120", "triton", True),
        ("sm_121", "triton", True), ("gfx942", "triton", True), ("gfx1100", "triton", False),
        ("cpu", "torch", False),
    ],
)  # fmt: skip
def test_int8_is_multiplied_where_a_card_can_and_chosen_where_it_pays(architecture, by, pays):
    assert int8_product(architecture) == by
    assert (int8_gain(architecture) > INT8_GAIN) == pays


@pytest.mark.parametrize("architecture", ["sm_61", "sm_70", "gfx906", "gfx1030"])
def test_a_card_without_int8_refuses_it(architecture):
    assert int8_gain(architecture) == 0
    with pytest.raises(Unsupported, match=f"{architecture}.*exact"):
        choose_int8("Q4_K", 3840, 3840, architecture)


def test_int8_rows_are_kept_and_other_weights_are_quantised_into_scratch():
    assert choose_int8("I8", 3840, 10240, "sm_90").path == "kept"
    assert choose_int8("I8", 3840, 10240, "sm_90").nbytes == 0
    found = choose_int8("Q4_K", 3840, 10240, "sm_90")
    assert found.path == "scratch"
    assert found.nbytes == 3840 * 10240 + 4 * 3840
    assert choose_int8("Q4_K", 1 << 20, 10240, "sm_90").nbytes == dispatch.SCRATCH_BYTES


@pytest.mark.parametrize(
    ("arch", "tokens", "head", "dtype", "taken"),
    [
        ("sm_89", 4128, 128, "bfloat16", True), ("sm_86", 512, 64, "float16", True),
        ("sm_121", 4128, 128, "bfloat16", True), ("sm_89", 511, 128, "bfloat16", False),
        ("sm_89", 4128, 96, "bfloat16", False), ("sm_89", 4128, 128, "float32", False),
        ("sm_80", 4128, 128, "bfloat16", False), ("sm_90", 4128, 128, "bfloat16", False),
        ("sm_75", 4128, 128, "float16", False), ("gfx1201", 4128, 128, "bfloat16", False),
        ("cpu", 4128, 128, "bfloat16", False),
    ],
)  # fmt: skip
def test_attention_in_int8_is_for_long_sequences_on_geforce(arch, tokens, head, dtype, taken):
    assert dispatch.int8_attention(arch, tokens, head, dtype) == taken

"""Defends: a run checks before it times, refuses what is wrong and writes what it found."""

from __future__ import annotations

import dataclasses
import itertools
import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, plots, run, timing
from benchmarks.contest import Bench, Contestant, contest
from benchmarks.records import COLUMNS, Results, read
from benchmarks.timing import Ceilings, Effort
from benchmarks.weights import dequantize_error, packed_matrix, product_error, some_rows
from zimage_core.formats import FORMATS
from zimage_core.quant.dequantize import dequantize

TINY = dataclasses.replace(
    cases.TRANSFORMER, dim=256, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=256, hidden_dim=256
)
FAST = ["--device", "cpu", "--repeats", "3", "--seconds", "0", "--most", "1", "--pixels", "32"]


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch):
    """They take a second and are the same for all."""
    found = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e10})
    monkeypatch.setattr(run, "ceilings", lambda *_: found)


def rows_of(tmp_path, what: str, *more: str) -> list[dict]:
    run.main([what, *FAST, *more, "--out", str(tmp_path)], TINY)
    (path,) = tmp_path.glob(f"{what}_cpu_*.csv")
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["machine"]["torch"] == torch.__version__
    assert about["machine"]["gpu"] is None
    assert about["ceilings"]["copy_gbps"] == 10
    assert str(tmp_path) not in json.dumps(about)
    rows = read(path)
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [row["case"] for row in rows if row["what"] == "ceiling"] == ["copy", "matmul"]
    return [row for row in rows if row["what"] != "ceiling"]


def check_times(rows: list[dict]) -> None:
    for row in rows:
        if row["median_us"] == "":
            assert row["note"].startswith(("skipped", "refused")), row
            assert row["ratio"] == ""
        else:
            assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"], row
            assert row["how"] == "wall"
            assert row["gbps"] > 0


def test_dequantising_is_exact_and_names_who_cannot_take_part(tmp_path):
    rows = rows_of(tmp_path, "dequant", "--format", "Q4_K", "IQ3_S", "--shape", "100x512")
    check_times(rows)
    by_name = {(row["format"], row["contestant"]): row for row in rows}
    for name in ("Q4_K", "IQ3_S"):
        assert by_name[name, "cpu"]["error"] == 0
        assert by_name[name, "kernel"]["note"] == "skipped: Triton kernels need a GPU"
        assert (by_name[name, "cpu"]["n"], by_name[name, "cpu"]["k"]) == (100, 512)
    assert by_name["IQ3_S", "diffusers"]["note"].startswith("skipped: ")


@pytest.mark.parity
def test_diffusers_takes_part_and_is_the_baseline(tmp_path):
    rows = rows_of(tmp_path, "dequant", "--format", "Q4_K", "Q6_K", "--shape", "100x512")
    theirs = [row for row in rows if row["contestant"] == "diffusers"]
    assert all(0 < row["error"] < 1e-2 and row["ratio"] == 1 for row in theirs)
    assert all(row["baseline"] == "diffusers" for row in rows if row["ratio"] != "")


def test_products_are_held_to_float64(tmp_path):
    rows = rows_of(tmp_path, "matmul", "--format", "Q6_K", "--shape", "100x512", "--m", "3", "9")
    check_times(rows)
    assert {row["m"] for row in rows} == {3, 9}
    for row in rows:
        if row["contestant"] in ("ops.linear", "resident"):
            assert row["error"] < 1e-6
            assert row["tflops"] > 0
            assert row["baseline"] == "resident"


def test_a_case_that_cannot_be_set_up_leaves_the_others(tmp_path, monkeypatch):
    from benchmarks import kernel_cases

    real = kernel_cases.packed_matrix

    def broken(name, *shape):
        if name == "Q4_K":
            raise RuntimeError("out of memory")
        return real(name, *shape)

    monkeypatch.setattr(kernel_cases, "packed_matrix", broken)
    rows = rows_of(tmp_path, "dequant", "--format", "Q4_K", "Q8_0", "--shape", "50x256")
    assert rows[0]["note"] == "failed: RuntimeError: out of memory"
    assert rows[0]["case"] == "Q4_K 50 256 50x256"
    assert any(row["format"] == "Q8_0" and row["median_us"] != "" for row in rows)


def test_element_wise_steps_and_attention(tmp_path):
    rows = rows_of(tmp_path, "elementwise", "--m", "5")
    check_times(rows)
    assert {row["case"] for row in rows} == set(cases.STREAMS)
    assert all(row["error"] < 1e-6 for row in rows if row["contestant"] == "torch")
    rows = rows_of(tmp_path, "attention")
    check_times(rows)
    assert {row["case"] for row in rows} == {"layers", "noise_refiner", "context_refiner"}


@pytest.mark.parametrize("what", ["block", "step"])
def test_packed_modules_are_those_of_the_dense_weights(tmp_path, what):
    rows = rows_of(tmp_path, what, "--m", "4")
    check_times(rows)
    errors = {row["contestant"]: row["error"] for row in rows}
    assert errors["packed"] < 1e-4
    assert errors["resident"] < 1e-4


def test_a_picture_of_the_embedded_model(tmp_path):
    rows = rows_of(tmp_path, "image", "--image-pixels", "32", "--image-steps", "1", "--image-repeats", "1")
    phases = {row["case"].partition(": ")[2] for row in rows}
    assert phases == {
        "open",
        "first encode",
        "first step",
        "first total",
        "encode",
        "step",
        "decode",
        "total",
    }
    assert all(row["median_us"] > 0 for row in rows)


def bench(tmp_path) -> Bench:
    device, found = torch.device("cpu"), Ceilings(1e10, {"float32": 1e11})
    given = Namespace(graphs=True, compile=False, baseline="", interpret=False)
    return Bench(device, torch.float32, Effort(3, 0, 1), found, Results("x", device, tmp_path, {}), given)


def test_a_wrong_contestant_is_refused_and_never_timed(tmp_path):
    fmt, timed = FORMATS["Q4_K"], []
    packed = packed_matrix("Q4_K", 100, 512, torch.device("cpu"))
    good = dequantize(packed, fmt.name)
    swapped = good.roll(64, 0)  # two tiles mixed up

    def wrong(i: int) -> None:
        timed.append(i)

    def failing() -> float:
        raise RuntimeError("no such device\nand more")

    rows = contest(
        bench(tmp_path),
        {"what": "dequant", "case": "planted", "format": "Q4_K"},
        [
            Contestant("good", lambda i: good.clone(), lambda: dequantize_error(good, "Q4_K"), nbytes=1),
            Contestant("wrong", wrong, lambda: dequantize_error(swapped, "Q4_K")),
            Contestant("empty", wrong, lambda: dequantize_error(torch.full_like(good, torch.nan), "Q4_K")),
            Contestant("failing", wrong, failing),
        ],
        baseline="wrong",
    )
    notes = {row["contestant"]: row["note"] for row in rows}
    assert not timed
    assert notes["good"] == ""
    assert notes["wrong"].startswith("refused: error 1.")
    assert notes["empty"].startswith("refused: error nan")
    assert notes["failing"] == "refused: RuntimeError: no such device"


@pytest.mark.parametrize("spoil", ["value", "nan", "tile"])
def test_every_element_of_a_product_counts(spoil):
    x = torch.randn(4, 512)
    weights = some_rows("Q8_0", 512)[1].repeat(3, 1)[:200]
    y = x @ weights.t()
    assert product_error(y, x, "Q8_0", 200) < 1e-6
    if spoil == "tile":
        y = torch.cat((y[:, 64:128], y[:, :64], y[:, 128:]), 1)
    else:
        y[3, 199] = torch.nan if spoil == "nan" else y[3, 199] + 100
    assert not product_error(y, x, "Q8_0", 200) < 1e-2


@pytest.mark.parametrize(("tick", "repeats"), [(1e-3, 5), (1.0, 3)], ids=["in time", "past the deadline"])
def test_contestants_take_turns_and_ratios_are_of_the_same_repeat(monkeypatch, tick, repeats):
    order = []
    calls = {name: lambda i, name=name: order.append(name) for name in ("a", "b")}
    reads = itertools.count()  # every look at the clock finds it `tick` seconds later
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: tick * next(reads)))
    found = timing.measure(calls, torch.device("cpu"), Effort(5, 0, 1))
    assert len(found["a"].seconds) == len(found["b"].seconds) == repeats
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert runs == ["a", "b"] * (1 + repeats)  # once for the first guess, then once a repeat
    slow, fast = timing.Samples((2.0, 6.0, 4.0), "wall"), timing.Samples((1.0, 2.0, 4.0), "wall")
    assert slow.ratio(fast) == 2


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    run.main(["matmul", *FAST, "--shape", "64x256", "--m", "2", "4", "--out", str(tmp_path)], TINY)
    run.main(["dequant", *FAST, "--shape", "64x256", "--out", str(tmp_path)], TINY)
    files = sorted(tmp_path.glob("*.csv"))
    plots.main([*map(str, files), "--out", str(tmp_path), "--name", "all"])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"all_roofline.png", "all_crossover.png", "all_bandwidth.png"}

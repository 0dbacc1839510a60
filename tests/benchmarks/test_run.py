"""A benchmark run checks results before it times them, refuses wrong ones, and writes rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, kernel_cases, plots, run, timing
from benchmarks.records import COLUMNS, Results, read
from benchmarks.report import ROOT
from benchmarks.timing import Budget, Ceilings
from benchmarks.variants import Bench, Variant, run_case
from benchmarks.weights import dense_matrix, dequantize_error, product_error, some_rows
from zimage_core.config import AutoencoderConfig

TINY = dataclasses.replace(
    cases.TRANSFORMER, dim=256, n_layers=1, n_refiner_layers=1, n_heads=2, cap_feat_dim=256, hidden_dim=256
)
TINY_VAE = AutoencoderConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1, norm_num_groups=8)
FAST = ["--device", "cpu", "--repeats", "3", "--seconds", "0", "--most", "1", "--pixels", "32"]
CEILINGS = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e10})


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch):
    """They take a second and are the same for all."""
    monkeypatch.setattr(run, "ceilings", lambda *_: CEILINGS)


def test_every_script_imports_what_there_is():
    """In a process of its own, since kernels must not be defined here before tests/kernels asks for that."""
    pytest.importorskip("triton")
    scripts = [path.relative_to(ROOT) for path in sorted((ROOT / "benchmarks").rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts) for path in scripts]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def rows_of(tmp_path, what: str, *more: str) -> list[dict]:
    """The rows that a run wrote, once they have passed what all rows have to pass."""
    run.main([what, *FAST, *more, "--out", str(tmp_path)], TINY, TINY_VAE)
    (path,) = tmp_path.glob(f"{what}_cpu_*.csv")
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["machine"]["torch"] == torch.__version__
    assert about["machine"]["gpu"] is None
    assert about["ceilings"]["copy_gbps"] == 10
    assert str(tmp_path) not in json.dumps(about)
    rows = read(path)
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [row["case"] for row in rows if row["what"] == "ceiling"] == ["copy", "matmul"]
    rows = [row for row in rows if row["what"] != "ceiling"]
    for row in rows:
        if row["median_us"] == "":
            assert row["note"].startswith(("skipped", "refused")), row
            assert row["ratio"] == ""
        else:
            assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"], row
            assert row["how"] == "wall"
    return rows


def test_dequantising_is_exact_and_names_who_cannot_take_part(tmp_path):
    rows = rows_of(tmp_path, "dequant", "--format", "Q4_K", "IQ3_S", "--shape", "100x512")
    by_name = {(row["format"], row["variant"]): row for row in rows}
    for name in ("Q4_K", "IQ3_S"):
        assert by_name[name, "cpu"]["error"] == 0
        assert by_name[name, "cpu"]["gbps"] > 0
        assert by_name[name, "kernel"]["note"] == "skipped: Triton kernels need a GPU"
        assert (by_name[name, "cpu"]["n"], by_name[name, "cpu"]["k"]) == (100, 512)
    assert by_name["IQ3_S", "diffusers"]["note"].startswith("skipped: ")


@pytest.mark.parity
def test_diffusers_takes_part_and_is_the_baseline(tmp_path):
    rows = rows_of(tmp_path, "dequant", "--format", "Q4_K", "Q6_K", "--shape", "100x512")
    theirs = [row for row in rows if row["variant"] == "diffusers"]
    assert all(0 < row["error"] < 1e-2 and row["ratio"] == 1 for row in theirs)
    assert all(row["baseline"] == "diffusers" for row in rows if row["ratio"] != "")


def test_products_are_held_to_float64(tmp_path):
    rows = rows_of(tmp_path, "matmul", "--format", "Q6_K", "--shape", "100x512", "--m", "3", "9")
    assert {row["m"] for row in rows} == {3, 9}
    for row in rows:
        if row["variant"] in ("ops.linear", "resident"):
            assert row["error"] < 1e-6
            assert row["tflops"] > 0
            assert row["baseline"] == "resident"


def test_a_case_that_cannot_be_set_up_leaves_the_others(tmp_path, monkeypatch):
    real = kernel_cases.packed_matrix

    def broken(name, *shape):
        if name == "Q4_K":
            raise RuntimeError("out of memory")
        return real(name, *shape)

    monkeypatch.setattr(kernel_cases, "packed_matrix", broken)
    run.main(
        ["dequant", *FAST, "--format", "Q4_K", "Q8_0", "--shape", "50x256", "--out", f"{tmp_path}/named.csv"]
    )
    rows = [row for row in read(tmp_path / "named.csv") if row["what"] == "dequant"]
    assert rows[0]["note"] == "failed: RuntimeError: out of memory"
    assert rows[0]["case"] == "Q4_K 50 256 50x256"
    assert any(row["format"] == "Q8_0" and row["median_us"] != "" for row in rows)


@pytest.mark.parametrize(
    ("what", "more", "found"),
    [
        ("elementwise", ["--m", "5"], set(cases.STREAMS)),
        ("attention", [], {"layers", "noise_refiner", "context_refiner"}),
        ("block", ["--m", "4"], {"block"}),
        ("step", [], {"1+2 blocks, 32 px, caption 32"}),
        ("parts", [], {"1+2 blocks, 32 px, caption 32"}),
        ("vae", [], {"32 px"}),
    ],
)
def test_every_variant_of_a_case_computes_the_same(tmp_path, what, more, found):
    rows = rows_of(tmp_path, what, *more)
    assert {row["case"] for row in rows} == found
    timed = [row for row in rows if row["median_us"] != ""]
    assert {row["variant"] for row in timed} >= (
        {"packed", "resident"} if what in ("block", "step") else set()
    )
    assert all(row["error"] < 1e-4 for row in timed if row["variant"] != "diffusers")
    assert not [row for row in rows if row["note"].startswith("refused")]


def test_an_image_of_the_embedded_model(tmp_path):
    rows = rows_of(tmp_path, "image", "--image-pixels", "32", "--image-steps", "1", "--image-repeats", "1")
    phases = {row["case"].partition(": ")[2] for row in rows}
    parts = ("encode", "step", "decode", "total")
    assert phases == {"open", *parts, *(f"first {part}" for part in parts)}
    assert all(row["median_us"] > 0 for row in rows)


def test_a_wrong_variant_is_refused_and_never_timed(tmp_path):
    given = Namespace(graphs=True, compile=False, baseline="", interpret=False, check=True)
    cpu = torch.device("cpu")
    bench = Bench(cpu, torch.float32, Budget(3, 0, 1), CEILINGS, Results("x", cpu, tmp_path, {}), given)
    timed = []
    good = dense_matrix("Q4_K", 100, 512, torch.float32, cpu)
    swapped = good.roll(64, 0)  # two tiles mixed up

    def wrong(i: int) -> None:
        timed.append(i)

    def failing() -> float:
        raise RuntimeError("no such device\nand more")

    rows = run_case(
        bench,
        {"what": "dequant", "case": "planted", "format": "Q4_K"},
        [
            Variant("good", lambda i: good.clone(), lambda: dequantize_error(good, "Q4_K"), nbytes=1),
            Variant("wrong", wrong, lambda: dequantize_error(swapped, "Q4_K")),
            Variant("empty", wrong, lambda: dequantize_error(torch.full_like(good, torch.nan), "Q4_K")),
            Variant("failing", wrong, failing),
        ],
        baseline="wrong",
    )
    notes = {row["variant"]: row["note"] for row in rows}
    assert not timed
    assert notes["good"] == ""
    assert notes["wrong"].startswith("refused: error 1.")
    assert notes["empty"].startswith("refused: error nan")
    assert notes["failing"] == "refused: RuntimeError: no such device"


def test_unchecked_rows_say_so_and_what_cannot_run_is_left_out(tmp_path):
    given = Namespace(graphs=True, compile=False, baseline="", interpret=False, check=False)
    cpu = torch.device("cpu")
    bench = Bench(cpu, torch.float32, Budget(3, 0, 1), CEILINGS, Results("x", cpu, tmp_path, {}), given)

    def broken(i: int) -> None:
        raise RuntimeError("no such backend")

    never = lambda: pytest.fail("compared")  # noqa: E731
    variants = [Variant("runs", lambda i: None, never), Variant("breaks", broken, never)]
    rows = {row["variant"]: row for row in run_case(bench, {"what": "parts", "case": "planted"}, variants)}
    assert rows["runs"]["median_us"] > 0
    assert (rows["runs"]["note"], rows["runs"]["error"]) == ("not checked", "")
    assert rows["breaks"]["note"] == "refused: RuntimeError: no such backend"


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
def test_variants_take_turns_and_ratios_are_of_the_same_repeat(monkeypatch, tick, repeats):
    order = []
    calls = {name: lambda i, name=name: order.append(name) for name in ("a", "b")}
    reads = itertools.count()  # every look at the clock finds it `tick` seconds later
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: tick * next(reads)))
    found = timing.measure(calls, torch.device("cpu"), Budget(5, 0, 1))
    assert len(found["a"].seconds) == len(found["b"].seconds) == repeats
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert runs == ["a", "b"] * (1 + repeats)  # once for the first guess, then once a repeat
    slow, fast = timing.Samples((2.0, 6.0, 4.0)), timing.Samples((1.0, 2.0, 4.0))
    assert slow.ratio(fast) == 2


def test_plots_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    for what, *more in (["matmul", "--m", "2", "4"], ["dequant"]):
        run.main([what, *FAST, "--shape", "64x256", *more, "--out", str(tmp_path)])
    files = sorted(tmp_path.glob("*.csv"))
    plots.main([*map(str, files), "--out", str(tmp_path), "--name", "all"])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"all_roofline.png", "all_crossover.png", "all_bandwidth.png"}

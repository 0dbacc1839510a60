"""The standing figures come from the rows of a GPU's run, and the list of a GPU runs on a CPU in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu, plots, predictions, standing, step_model
from benchmarks.records import COLUMNS, text
from benchmarks.report import ROOT
from zimage_core.formats import FORMATS


def test_every_figure_can_be_computed_and_every_computation_is_listed():
    figures = standing.load()
    assert [figure["id"] for figure in figures] == list(dict.fromkeys(figure["id"] for figure in figures))
    assert {figure["id"] for figure in figures} == set(standing.FIGURES)
    wanted = {"id", "text", "unit", "measured"}
    for figure in figures:
        assert wanted <= set(figure) <= wanted | {"least", "most"}
        assert figure["measured"] is None or set(figure["measured"]) == {"value", "gpu", "date"}


def test_every_figure_has_a_prediction_or_says_why_not():
    known, unknown = set(predictions.PREDICTIONS), set(predictions.NONE)
    assert known | unknown == set(standing.FIGURES)
    assert not known & unknown
    for name, reason in predictions.NONE.items():
        assert predictions.shown(name) == f"none: {reason}"
        assert reason
    for name, predict in predictions.PREDICTIONS.items():
        for card in step_model.GPUS.values():
            found = predict(card)
            assert 0 < found.low <= found.high < float("inf"), (name, card.name)
        assert predictions.shown(name).endswith(" (H200)")


def test_saving_changes_nothing(tmp_path):
    path = tmp_path / "standing.json"
    standing.save(standing.load(), path)
    assert path.read_bytes() == standing.DATA.read_bytes()


def row(what: str, variant: str, us: float | str, **more) -> dict:
    empty = dict.fromkeys(COLUMNS, "")
    return empty | {"what": what, "variant": variant, "median_us": us, "format": "Q4_K"} | more


def product(variant: str, m: int, us: float | str) -> dict:
    return row("matmul", variant, us, m=m, case="w13", tflops=1.5)


ROWS = [
    row("dequant", "kernel", 25.0, case="w13", of_ceiling=0.9),
    row("dequant", "kernel", 25.0, case="w13", of_ceiling=0.8, format="IQ3_S"),
    row("dequant", "kernel", 25.0, case="w13", of_ceiling=0.75, format="TQ1_0"),
    row("dequant", "kernel", "", case="w13", format="Q8_0", note="refused: error 1 is above 0"),
    *(product("fused", m, us) for m, us in ((32, 10.0), (256, 40.0), (1024, 200.0), (4128, 700.0))),
    *(product("dequantise + matmul", m, us) for m, us in ((32, 45.0), (256, 80.0), (1024, 100.0))),
    product("dequantise + matmul", 4128, 420.0),
    product("resident", 4128, 400.0),
    row("block", "packed", 2000.0, m=4128),
    row("block", "diffusers", 6000.0, m=4128),
    row("step", "packed replayed", 80000.0, m=4128),
    row("step", "packed", 88000.0, m=4128),
    row("step", "int8 replayed", 70000.0, m=4128),
    row("step", "int8 kept replayed", 60000.0, m=4128),
    row("step", "packed replayed", 20000.0, m=1056),
    row("step", "packed", 30000.0, m=1056),
    row("parts", "whole", 80100.0, m=4128),
    row("parts", "linears", 60000.0, m=4128),
    row("parts", "attention", 9000.0, m=4128),
    row("parts", "attention, cudnn", 9500.0, m=4128),
    row("parts", "attention, flash", "", m=4128, note="refused: no such backend"),
    row("parts", "dequantise", 5000.0, m=4128),
    row("parts", "element-wise", 5100.0, m=4128),
]


def test_values_come_from_the_rows_of_a_run():
    values = standing.evaluate(ROWS)
    assert values == {
        "dequantise_q4_k": 90,
        "dequantise_q4_k_us": 25,
        "dequantise_others": 75,
        "fused_32_ratio": 4.5,
        "fused_32_us": 10,
        "fused_4128_tflops": 1.5,
        "dequantise_matmul_4128": 1.05,
        "crossover": 512,  # 0.5 at 256 and 2 at 1024: 1 lies in the middle of the logarithms
        "block_diffusers": 3,
        "step_replayed": 80,
        "step_eager": 1.1,
        "int8_step": 70,
        "int8_step_kept": 60,
        "step_512_replayed": 20,
        "step_512_eager": 1.5,
        "step_linears": 60,
        "step_attention_cudnn": 9.5,
        "step_dequantise": 5,
        "step_elementwise": 5.1,
        "step_gaps": 1,  # with the attention that the step takes
    }


def test_a_part_that_was_not_measured_leaves_the_gaps_out():
    rows = [row for row in ROWS if row["variant"] != "element-wise"]
    assert "step_gaps" not in standing.evaluate(rows)


class Axes:
    """Records the bars of a plot; matplotlib is not needed."""

    def __init__(self) -> None:
        self.bars: list[tuple[list[float], list[float]]] = []

    def bar(self, labels, heights, width, bottoms, **_) -> None:
        assert len(labels) == 2
        self.bars.append((list(heights), list(bottoms)))

    def set(self, **_) -> None:
        """Titles."""


def test_the_parts_of_a_step_are_stacked_up_to_the_whole():
    axes = Axes()
    assert plots.parts(ROWS, axes)
    tops = [sum(pair) for pair in zip(*axes.bars[-1], strict=True)]
    assert tops == pytest.approx([1e3 * step_model.step().replayed().middle, 80.1])
    assert [heights[1] for heights, _ in axes.bars] == pytest.approx([60, 9, 5, 5.1, 1])
    assert not plots.parts([row for row in ROWS if row["variant"] != "whole"], Axes())


def test_a_value_is_written_with_gpu_and_date_and_a_missed_aim_is_said(tmp_path):
    path = tmp_path / "gpu_part1.csv"
    path.write_text(text(ROWS))
    about = {"machine": {"gpu": "NVIDIA H200", "date": "2026-12-01"}}
    path.with_suffix(".json").write_text(json.dumps(about))
    rows, name, date = standing.from_files([path])
    figures = standing.updated(standing.load(), standing.evaluate(rows), name, date)
    table = standing.table(figures)
    assert "| 90 % (NVIDIA H200, 2026-12-01): above the prediction |" in table
    assert "not yet measured" in table
    slow = standing.updated(figures, {"step_replayed": 95.0, "step_gaps": 1.0}, name, date)
    assert "95 ms (NVIDIA H200, 2026-12-01): missed, above the prediction |" in standing.table(slow)
    assert "1 ms (NVIDIA H200, 2026-12-01): as predicted |" in standing.table(slow)


def test_a_prediction_is_for_the_gpu_of_its_measurement():
    card, other = (
        {"id": "step_linears", "measured": {"value": 315.0, "gpu": name, "date": "2026-12-01"}}
        for name in ("NVIDIA GeForce RTX 4090", "NVIDIA L4")
    )
    assert standing.predicted(card) == "310 to 320 (RTX 4090)"
    assert standing.predicted(other) == standing.predicted(card | {"measured": None})
    assert predictions.meets("step_linears", card["measured"]["gpu"], 315.0) == "as predicted"
    assert predictions.meets("step_linears", card["measured"]["gpu"], 300.0) == "below the prediction"
    assert predictions.meets("step_linears", other["measured"]["gpu"], 315.0) == ""


def test_figures_of_a_cpu_are_not_taken_over(tmp_path):
    path = tmp_path / "gpu_part1.csv"
    path.write_text(text(ROWS))
    path.with_suffix(".json").write_text(json.dumps({"machine": {"gpu": None, "date": "2026-12-01"}}))
    with pytest.raises(SystemExit, match="of one GPU"):
        standing.from_files([path])


def test_results_that_were_not_checked_are_not_taken_over(tmp_path):
    path = tmp_path / "gpu_part1.csv"
    path.write_text(text(ROWS))
    machine = {"gpu": "NVIDIA H200", "date": "2026-12-01"}
    path.with_suffix(".json").write_text(json.dumps({"machine": machine, "arguments": {"check": False}}))
    with pytest.raises(SystemExit, match="made with --no-check"):
        standing.from_files([path])
    with pytest.raises(SystemExit):
        gpu.main(["--no-check"])


def test_the_parts_fit_into_nine_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 9 * 60 - 30


def test_a_device_that_fails_ends_the_list_with_what_is_left(monkeypatch):
    def failing(number, given, measured):
        if number == 2:
            raise RuntimeError("an illegal memory access")
        return [], None

    monkeypatch.setattr(gpu, "run_part", failing)
    with pytest.raises(SystemExit, match=r"part 2 ended early.*illegal memory access; go on with --part 3 4"):
        gpu.main(["--rehearse", "--part", "1", "2", "3", "4"])


def test_without_a_gpu_the_list_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        gpu.main(["--part", "1"])


@pytest.mark.slow  # half a minute of the interpreter
def test_a_rehearsal_starts_every_case_and_writes_nothing(tmp_path):
    """It runs in a process of its own: the interpreter has to be asked for before kernels are defined."""
    before = standing.DATA.read_bytes(), standing.README.read_bytes()
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--device", "cpu", "--update-readme"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in gpu.PARTS:
        assert f"part {number}: " in done.stdout
    bad = [line for line in done.stdout.splitlines() if "refused: " in line or "failed" in line]
    assert not bad, bad
    formats = sum(fmt.weights > 1 for fmt in FORMATS.values())
    assert done.stdout.count("checked in the interpreter") >= formats
    assert (standing.DATA.read_bytes(), standing.README.read_bytes()) == before
    assert not list(tmp_path.iterdir())

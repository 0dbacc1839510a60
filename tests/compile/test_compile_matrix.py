"""Defends: every kernel compiles for every architecture, without spills and within what a program may have.

Compiled are all cells in bfloat16, and those in float16 and float32 on three architectures: the whole matrix
takes longer than all other tests together. COMPILE_MATRIX=full compiles it; `bfloat16` and `others` are the
two parts of the usual one; `small` is bfloat16 on three architectures. The committed table has all cells.

The compiler runs in processes of its own: in this one kernels may be the interpreter's. Kernels are imported
by fixtures, not at the top: tests/kernels has to decide first how they are defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from tests.helpers.tree import ROOT
from zimage_core.formats import FORMATS

pytestmark = pytest.mark.compile

EVERY = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "gfx1201"]
BFLOAT16 = ["--dtype", "bfloat16"]
OTHERS = ["--dtype", "float16", "float32", "--target", "sm_75", "sm_80", "gfx942"]
SMALL = [*BFLOAT16, "--target", "sm_80", "sm_90", "gfx942"]
PARTS = {
    "full": ([[]], EVERY),
    "usual": ([BFLOAT16, OTHERS], EVERY),
    "bfloat16": ([BFLOAT16], EVERY),
    "others": ([OTHERS], OTHERS[4:]),
    "small": ([SMALL], SMALL[3:]),
}
"""COMPILE_MATRIX -> arguments of each part, and the targets of all of them."""
WANTED, TARGETS = PARTS[os.environ.get("COMPILE_MATRIX", "usual")]
BLOCKS = {name for name, fmt in FORMATS.items() if fmt.weights > 1}


def environment(**changes: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | changes


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    from benchmarks import compile_matrix

    return compile_matrix


@pytest.fixture(scope="module")
def run(matrix, tmp_path_factory):
    """The finished processes and the rows that they wrote."""
    out = tmp_path_factory.mktemp("matrix") / "out.csv"
    finished = []
    for part in WANTED:
        command = [sys.executable, "-m", "benchmarks.compile_matrix", "--out", str(out), "--resume", *part]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert out.exists(), done.stdout + done.stderr
        print(done.stdout)
        finished.append(done)
    return finished, matrix.read(out)


def faults(matrix, rows) -> str:
    """A line for each fault, with the cell's name."""
    return "\n".join(
        f"{matrix.name(cell)}: {fault}" for cell, row in rows.items() for fault in matrix.judge(cell, row)
    )


def test_every_cell_is_within_the_limits(matrix, run):
    finished, rows = run
    assert not faults(matrix, rows)
    assert [done.returncode for done in finished] == [0] * len(finished), finished


def test_no_cell_is_left_out(matrix, run):
    from benchmarks.compile_cell import planar_formats

    _, rows = run
    assert set(rows) == {cell for part in WANTED for cell in matrix.selected(matrix.parse(part))}
    targets = {cell.target for cell in rows}
    assert targets == set(TARGETS)
    for target in targets:
        here = [cell for cell in rows if cell.target == target]
        dequantised = {cell.format for cell in here if cell.kernel == "dequantize"}
        assert dequantised == BLOCKS, f"{target}: dequantise"
        fused = {cell.format for cell in here if cell.kernel == "matmul"}
        assert fused == (set() if target == "sm_75" else set(planar_formats())), f"{target}: fused"


def test_the_committed_matrix_has_the_cells_of_today(matrix):
    """A new tile, format or kernel needs `python -m benchmarks.compile_matrix`."""
    committed = matrix.read(matrix.OUT)
    assert set(committed) == set(matrix.cells())
    assert not faults(matrix, committed)


@pytest.mark.parametrize(
    ("kernel", "target", "change", "fault"),
    [
        ("matmul", "sm_89", {}, None),
        ("matmul", "sm_89", {"spills": 2}, "2 spills"),
        ("matmul", "gfx942", {"spills": 1}, "1 spills"),
        ("dequantize", "sm_75", {"stack": 8}, "8 bytes of stack"),
        ("matmul", "sm_89", {"shared": 99 * 1024}, None),
        ("matmul", "sm_89", {"shared": 99 * 1024 + 1}, "99 KB of shared memory, sm_89 has 99"),
        ("matmul", "sm_90", {"shared": 200 * 1024}, None),
        ("matmul", "sm_120", {"shared": 200 * 1024}, "200 KB of shared memory, sm_120 has 99"),
        ("matmul", "gfx1100", {"shared": 65 * 1024}, "65 KB of shared memory, gfx1100 has 64"),
        ("matmul", "sm_80", {"tensor_core": 0}, "no tensor-core instruction"),
        ("dequantize", "sm_80", {"tensor_core": 0}, None),
        ("attend", "sm_89", {"tensor_core": 0}, "no tensor-core instruction"),
        ("matmul", "sm_75", {}, "a fused product on sm_75"),
        ("silu_gate", "sm_90", {"failure": "OutOfResources"}, "OutOfResources"),
    ],
)
def test_the_judge_sees(matrix, kernel, target, change, fault):
    good = matrix.Row(registers=128, shared=32 << 10, tensor_core=64, instructions=900, loop=400)
    cell = matrix.Cell(kernel, "Q4_K", "bfloat16", "", target)
    assert matrix.judge(cell, replace(good, **change)) == ([fault] if fault else [])


@pytest.mark.parametrize(("spills", "status"), [(0, 0), (4, 1)])
def test_a_fault_is_named_and_ends_with_status_one(matrix, monkeypatch, capsys, spills, status):
    def compile_all(wanted, jobs, seen):
        for cell in wanted:
            seen(cell, matrix.Row(spills=spills, tensor_core=1))

    monkeypatch.setattr(matrix, "compile_all", compile_all)
    monkeypatch.setattr(matrix.tiles, "interpreted", lambda: False)
    assert matrix.main(["--kernel", "repack", "--format", "Q4_K", "--target", "sm_90"]) == status
    assert ("repack Q4_K sm_90: 4 spills" in capsys.readouterr().out) == bool(spills)


def test_a_compiler_that_fails_or_dies_is_a_row(matrix, tmp_path):
    worker = matrix.Worker(tmp_path, 0)
    cell = matrix.Cell("dequantize", "Q4_9", "float32", "", "sm_80")
    try:
        assert worker(cell).failure.startswith("KeyError")
        worker.process.kill()
        worker.process.join()
        assert worker(cell).failure.startswith("the compiler died with status -9")
        assert worker(cell).failure.startswith("KeyError"), "no new process took over"
    finally:
        worker.stop()


def test_the_interpreter_is_refused_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_matrix"],
        cwd=ROOT,
        env=environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "TRITON_INTERPRET" in done.stderr


LENGTHS = """
from benchmarks import compile_cell as cell
from unittest.mock import patch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

def kinds(each):
    kernel, args, given = cell.caught(each)
    _, special, options = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(cell.gpu(each.target)))(*args, **given)
    return [str(s) for s in special], str(options)

def at(each, length):
    real = cell.tiles_of(each.target)
    few = {name: (min(length, count), tile) for name, (count, tile) in real.items()}
    with patch.object(cell, "TOKENS", length), patch.object(cell, "tiles_of", lambda target: few):
        return kinds(each)

for kernel, tile in (("matmul", "16x64 w4 s4"), ("matmul", "16x64 w4 s4 split"), ("sum", "16x64 w4 s4"),
                     ("rms_norm_modulate", ""), ("gate_norm_residual", ""), ("qk_norm_rope", ""),
                     ("silu_gate", ""), ("quantize", "3840"), ("rms_norm_modulate_int8", "3840"),
                     ("silu_gate_int8", "10240 rotated"), ("int8_matmul", "128x128x128 d1 w8 s4"),
                     ("sum_keys", "128"), ("quantize_heads", "128"), ("attend", "128")):
    each = cell.Cell(kernel, "Q4_K" if kernel == "matmul" else "", "bfloat16", tile, "sm_90")
    found = [at(each, length) for length in (16, 13, 1)]
    assert found[0] == found[1] == found[2], (kernel, found)
    print(kernel)
"""


def test_another_length_of_x_compiles_nothing():
    """All that Triton compiles for is the same for lengths that 16 divides and that it does not."""
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.split() == [
        "matmul", "matmul", "sum", "rms_norm_modulate", "gate_norm_residual", "qk_norm_rope", "silu_gate",
        "quantize", "rms_norm_modulate_int8", "silu_gate_int8", "int8_matmul",
        "sum_keys", "quantize_heads", "attend",
    ], done.stderr  # fmt: skip

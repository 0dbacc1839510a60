"""The allowed imports between the packages; docs/architecture.md has the drawing."""

from __future__ import annotations

import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.tree import ROOT, imports, module_name, sources

# package -> packages it may import, besides itself and errors; the table has no cycle
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "formats": set(),
    "codebooks": set(),
    "fields": set(),
    "config": {"fields"},
    "scheduler_config": {"fields"},
    "files": {"config"},
    "assets": set(),
    "reference": {"formats", "codebooks"},
    "kernels": {"formats", "codebooks"},
    "cpu": {"formats", "codebooks"},
    "quant": {"formats", "cpu", "kernels"},
    "nn": {"cpu", "formats", "quant", "kernels"},
    "adapters": {"config", "cpu", "files", "nn", "quant", "weights"},
    "models": {"config", "nn"},
    "sampling": {"config", "files", "scheduler_config"},
    "text": {"config", "files"},
    "weights": {"config", "files", "formats", "models", "nn", "quant", "scheduler_config", "text"},
    "vision": {"config", "fields", "files", "models", "weights"},
    "memory": {"config", "cpu", "files", "formats", "models", "nn", "quant", "weights"},
    "control": {"assets", "config", "editing", "files", "models", "nn", "quant", "weights"},
    "editing": {"config", "files", "models", "sampling"},
    "omni": {"editing", "models", "nn", "text"},
    "language": {"config", "models", "text"},
    "run": {
        "adapters", "assets", "config", "control", "editing", "files", "language", "memory", "models", "nn",
        "omni", "quant", "sampling", "text", "vision", "weights",
    },
    "pipeline": {
        "config", "files", "memory", "models", "nn", "parallel", "run", "sampling", "text", "weights",
    },
    "image_pipelines": {"pipeline", "run"},
    "omni_pipelines": {"pipeline", "run"},
    "preview": {"config", "models", "run", "weights"},
    "control_pipelines": {"control", "pipeline", "run"},
    "parallel": {"models", "nn", "run", "sampling", "weights"},
    "batch": {"assets", "config", "cpu", "editing", "files", "memory", "pipeline", "run", "weights"},
    "quantize": {"codebooks", "cpu", "files", "formats", "quant", "weights"},
    "export": {
        "assets", "config", "files", "formats", "memory", "quant", "quantize", "text", "vision", "weights",
    },
    "parity": {
        "config", "cpu", "export", "files", "memory", "models", "nn", "pipeline", "quant", "reference", "run",
        "sampling", "weights",
    },
    "study": {
        "export", "files", "formats", "models", "nn", "pipeline", "quant", "quantize", "run", "sampling",
        "weights",
    },
}  # fmt: skip
REACH_KERNELS = {
    "zimage_core.quant.dequantize", "zimage_core.quant.gpu", "zimage_core.quant.gpu_int8",
    "zimage_core.quant.probe",
    "zimage_core.nn.elementwise",
}  # fmt: skip
EVERYTHING = {"cli", "__main__", "zimage_core"}  # may import every package; zimage_core is __init__.py
DATA_ONLY = {"errors", "formats", "codebooks", "fields", "config", "scheduler_config", "files", "cli"}
"""Packages that import only the standard library at the top; other packages inside functions."""
WITH_TENSORS = {"language", "load", "scan"}
"""The files of weights/ that compute; the others only read headers, for `zimage inspect`."""
PLANS = {
    "__init__",
    "activations",
    "allocator",
    "int8_plan",
    "job",
    "nets",
    "plan",
    "planner",
    "rates",
    "references",
    "residency",
    "sizes",
    "tower",
}
"""The files of memory/ that only plan, for `zimage plan`; the others move weights."""
NEVER = {
    "reference": {"torch", "triton"},
    "kernels": {"numpy"},
    "sampling": {"numpy", "transformers", "diffusers"},
}
TEST_ONLY = {"diffusers", "transformers", "accelerate", "tiktoken", "pytest", "hypothesis", "jinja2"}

files = pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))


def package_of(path: Path) -> str:
    parts = module_name(path).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def test_no_file_imports_itself_by_way_of_others():
    names = {module_name(path): path for path in sources()}
    graph = {}
    for name, path in names.items():
        modules = {item.module for item in imports(path)}
        found = {m if m in names else m.rpartition(".")[0] for m in modules}
        graph[name] = (found & set(names)) - {name, "zimage_core"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_table_has_no_cycle():
    order = list(TopologicalSorter(ALLOWED).static_order())
    assert set(order) == set(ALLOWED), "a package may import one that is not in the table"


@files
def test_a_file_imports_only_what_its_package_may(path):
    package = package_of(path)
    assert package in ALLOWED or package in EVERYTHING, f"{package} is new: give it a line in ALLOWED"
    for item in imports(path):
        where = f"{path.relative_to(ROOT)}:{item.line}"
        assert not item.module.startswith("."), f"{where}: write the absolute import"
        top, *rest = item.module.split(".")
        assert top not in {"kernels", "reference", "tests", "benchmarks"}, f"{where}: imports {top}"
        assert top not in TEST_ONLY, f"{where}: {top} is for tests"
        assert top not in NEVER.get(package, ()), f"{where}: {package} may not use {top}"
        if top == "zimage_core" and rest and rest[0] not in (package, "errors") and package in ALLOWED:
            assert rest[0] in ALLOWED[package], f"{where}: {package} may not import {rest[0]}"
        if top in {"triton"} or item.module.startswith("zimage_core.kernels"):
            reaches = module_name(path) in REACH_KERNELS and (item.lazy or item.typing)
            assert package == "kernels" or reaches, (
                f"{where}: only {REACH_KERNELS} reach kernels, and inside a function"
            )


@files
def test_headers_are_read_without_third_parties(path):
    package = package_of(path)
    header = package == "weights" and path.stem not in WITH_TENSORS
    if package not in DATA_ONLY and not header and not (package == "memory" and path.stem in PLANS):
        return
    for item in imports(path):
        top = item.module.partition(".")[0]
        fine = item.lazy or item.typing or top == "zimage_core" or top in sys.stdlib_module_names
        assert fine, (
            f"{path.relative_to(ROOT)}:{item.line}: move the import of {top} into the function that uses it"
        )


def test_the_checks_above_can_fail(tmp_path):
    """Planted imports of each kind are seen, with their place."""
    file = tmp_path / "planted.py"
    file.write_text(
        "import torch\nfrom zimage_core import pipeline\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import numpy\ndef f():\n    from triton import language\n"
        "if True:\n    from . import x\n"
    )
    seen = {(i.module, i.line, i.lazy, i.typing) for i in imports(file)}
    assert ("torch", 1, False, False) in seen
    assert ("zimage_core.pipeline", 2, False, False) in seen
    assert ("numpy", 5, False, True) in seen
    assert ("triton", 7, True, False) in seen
    assert (".", 9, False, False) in seen

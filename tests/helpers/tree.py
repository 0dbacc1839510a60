"""The source files of the package and their imports, found without running them."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("zimage_core", "kernels", "reference")


@dataclass(frozen=True)
class Import:
    """One imported module; `from zimage_core.nn import rope` gives `zimage_core.nn.layers`, a module."""

    module: str
    line: int
    lazy: bool  # inside a function: runs at the first call
    typing: bool  # under TYPE_CHECKING: never runs


@cache
def sources() -> tuple[Path, ...]:
    """Every Python file of the package once; those of the linked folders under their real path."""
    found: list[Path] = []
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                found.append(path)
    return tuple(found)


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control; outside a checkout, every file that is not a cache."""
    try:
        out = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        hidden = {".git", ".venv", "__pycache__", "build", "dist"}
        return tuple(p for p in sorted(ROOT.rglob("*")) if p.is_file() and not hidden & {*p.parts})
    return tuple(ROOT / name for name in out.decode().split("\0") if name)


def module_name(path: Path) -> str:
    """reference/blocks.py -> zimage_core.reference.blocks."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "zimage_core" else ("zimage_core", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[Import]:
    """All imports of a file, one item per imported name."""
    yield from _walk(ast.parse(path.read_text("utf-8")), lazy=False, typing=False)


def _walk(node: ast.AST, *, lazy: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, lazy, typing)
        elif isinstance(child, ast.ImportFrom):
            dots = "." * child.level
            for alias in child.names:
                yield Import(_target(dots + (child.module or ""), alias.name), child.lineno, lazy, typing)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _walk(child, lazy=True, typing=typing)
        elif isinstance(child, ast.If) and _is_type_checking(child.test):
            for statement in child.body:
                yield from _walk(ast.Module([statement], []), lazy=lazy, typing=True)
            for statement in child.orelse:
                yield from _walk(ast.Module([statement], []), lazy=lazy, typing=typing)
        else:
            yield from _walk(child, lazy=lazy, typing=typing)


def _target(module: str, name: str) -> str:
    """The imported module: `from package import module` names it last, `from module import name` first."""
    place = ROOT / module.replace(".", "/")
    return f"{module}.{name}" if (place / f"{name}.py").exists() or (place / name).is_dir() else module


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )

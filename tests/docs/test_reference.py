"""The pages of docs/reference/ say what the code says."""

from __future__ import annotations

import ast
import re
from itertools import chain

import pytest

import zimage_core
from benchmarks.report import with_tables
from tests.helpers import cli_page, error_messages
from tests.helpers.tree import ROOT, sources

FOLDER = ROOT / "docs" / "reference"
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")


def test_every_verb_and_option_is_on_the_page():
    page = cli_page.PAGE.read_text("utf-8")
    assert with_tables(page, {"cli": cli_page.render()}) == page, "python -m tests.helpers.cli_page"


def test_the_messages_of_errors_are_those_of_the_code():
    page = error_messages.PAGE.read_text("utf-8")
    made = with_tables(page, error_messages.messages())
    bare = error_messages.without_figures
    assert bare(made) == bare(page), "python -m tests.helpers.error_messages"


def test_every_error_class_has_a_section():
    page = error_messages.PAGE.read_text("utf-8")
    classes = {name for name in zimage_core.__all__ if isinstance(getattr(zimage_core, name), type)}
    errors = {name for name in classes if issubclass(getattr(zimage_core, name), zimage_core.ZImageError)}
    assert set(re.findall(r"^### (\w+)$", page, re.M)) == errors - {"ZImageError"}


def test_every_public_name_is_on_the_python_page_once():
    page = (FOLDER / "python.md").read_text("utf-8")
    shown = re.findall(r"^::: zimage_core\.(\w+)$", page, re.M)
    assert sorted(shown) == sorted(name for name in zimage_core.__all__ if name not in ALIASES)
    assert all(f"`{alias}`" in page for alias in ALIASES)


ALIASES = ("FlowMatchEulerDiscreteScheduler",)
"""Second names of classes."""


@pytest.mark.parametrize("page", ["python.md", "modules.md"])
def test_what_a_page_names_exists(page):
    page = (FOLDER / page).read_text("utf-8")
    for name in re.findall(r"^::: ([\w.]+)$", page, re.M):
        module, _, attribute = name.rpartition(".")
        try:
            __import__(name)
        except ModuleNotFoundError:
            assert hasattr(__import__(module, fromlist=[attribute]), attribute), name


def variables(tree: ast.Module) -> set[str]:
    """Environment variables that a module reads: names in functions and statements with os.environ."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    statements = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    found: set[str] = set()
    for part in functions + statements:
        nodes = list(ast.walk(part))
        if any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in nodes):
            named = {node.id for node in nodes if isinstance(node, ast.Name)} & set(constants)
            for node in chain(nodes, *(ast.walk(constants[name]) for name in named)):
                if isinstance(node, ast.Constant) and VARIABLE.fullmatch(str(node.value)):
                    found.add(node.value)
    return found


def test_every_environment_variable_that_the_code_reads_is_on_the_page():
    page = (FOLDER / "environment.md").read_text("utf-8")
    own = page.split("## ")[1]
    first = re.findall(r"^\| (`[^|]+`) \|", own, re.M)
    shown = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    read = set().union(*(variables(ast.parse(path.read_text("utf-8"))) for path in sources()))
    assert shown == read


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os\ndef f(): return os.environ.get('ZIMAGE_X')", {"ZIMAGE_X"}),
        (
            "import os\nNAMES = ('A_B', 'C')\ndef f(): return any(n in os.environ for n in NAMES)",
            {"A_B", "C"},
        ),
        ("def f(): return 'ZIMAGE_X'", set()),
    ],
)
def test_a_planted_variable_is_found(code, expected):
    assert variables(ast.parse(code)) == expected


def test_pages_that_messages_and_help_name_exist():
    named = set()
    for path in sources():
        named |= set(re.findall(r"(?<![\w/])docs/(?:[\w-]+/)*[\w.-]+\.md", path.read_text("utf-8")))
    assert named
    assert not [page for page in sorted(named) if not (ROOT / page).is_file()]

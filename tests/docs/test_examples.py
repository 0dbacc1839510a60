"""Every example of README.md and docs/ runs; tests/helpers/examples.py has the rules."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers import examples, stand_ins
from tests.helpers.tree import ROOT

SLOW = {"docs/explanation/claims.md", "docs/guides/quantizing.md", "docs/guides/recipes.md"}
"""Pages, by their names from the root, that take longer than the default run can give them."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_examples() -> list:
    found = []
    for page in examples.pages():
        if name(page).startswith("docs/zh/"):
            continue  # test_site.py compares the code of a translation with that of its source
        blocks = examples.blocks(page.read_text("utf-8"))
        if any(block.language in ("sh", "python") and block.not_run is None for block in blocks):
            marks = [pytest.mark.slow] if name(page) in SLOW else []
            found.append(pytest.param(page, id=name(page), marks=marks))
    return found


@pytest.fixture(scope="session")
def stand_in_files(tmp_path_factory) -> Path:
    return stand_ins.make(tmp_path_factory.mktemp("stand-ins"))


@pytest.fixture
def folder(stand_in_files, tmp_path, monkeypatch) -> Path:
    """The folder that a page's examples run in: the files by the names of the documents."""
    shutil.copytree(stand_in_files, tmp_path / "page", symlinks=True, copy_function=os.link)
    monkeypatch.chdir(tmp_path / "page")
    return tmp_path / "page"


@pytest.mark.parametrize("page", with_examples())
def test_the_examples_of_a_page_run(page, folder):
    namespace = {"__name__": "__main__"}
    with mock.patch.dict(os.environ):
        for block in examples.blocks(page.read_text("utf-8")):
            if block.not_run is not None:
                continue
            if block.language == "python":
                examples.run_python(block, name(page), namespace)
            elif block.language == "sh":
                examples.run_shell(block, name(page))


@pytest.mark.parametrize("page", examples.pages(), ids=name)
def test_blocks_are_marked_by_the_convention(page):
    for block in examples.blocks(page.read_text("utf-8")):
        where = f"{name(page)}:{block.line}"
        assert block.language, f"{where}: a block needs a language; ```text is for output"
        assert block.language not in ("bash", "shell", "console", "py", "pycon"), f"{where}: use sh or python"
        if block.not_run is not None:
            assert block.not_run in examples.REASONS, (
                f"{where}: {block.not_run!r} is not one of {examples.REASONS}"
            )
            assert block.language in ("sh", "python"), f"{where}: only sh and python run at all"


def test_slow_pages_exist():
    assert {name(page) for page in examples.pages()} >= SLOW

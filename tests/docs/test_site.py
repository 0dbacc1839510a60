"""The site: every page is in its navigation, it builds without a warning, and it needs no network."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import examples
from tests.helpers.tree import ROOT

DOCS = ROOT / "docs"
CONFIG = ROOT / "mkdocs.yml"
needs_mkdocs = pytest.mark.skipif(
    find_spec("material") is None or find_spec("mkdocstrings") is None, reason="needs zimage-core[docs]"
)


def entries(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in entries(part)]


def test_every_page_is_in_the_navigation_once():
    named = entries(yaml.safe_load(CONFIG.read_text("utf-8"))["nav"])
    assert len(named) == len(set(named))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert not pages - set(named), "mkdocs.yml: nav lacks these"
    from_outside = set(named) - pages
    assert from_outside <= places_outside(), "mkdocs.yml: nav names pages that do not exist"


def places_outside() -> set[str]:
    """Places in the site of Markdown files outside docs/, as docs/hooks.py lists them."""
    listed = re.findall(
        r'^    "([\w./-]+\.md)": "([\w./-]+\.md)",$', (DOCS / "hooks.py").read_text("utf-8"), re.M
    )
    assert listed
    return {place for source, place in listed if (ROOT / source).is_file()}


def code(page: Path) -> list[tuple[str, str]]:
    return [(block.language, block.text) for block in examples.blocks(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", sorted((DOCS / "zh").rglob("*.md")), ids=lambda page: page.name)
def test_a_translation_has_the_code_of_its_source(page):
    source = DOCS / page.relative_to(DOCS / "zh")
    assert source.is_file(), f"docs/zh/ has the names of docs/: there is no {source.relative_to(ROOT)}"
    assert code(page) == code(source)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> tuple[Path, list[str]]:
    """The built site, and what mkdocs warned of."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder, warnings = tmp_path_factory.mktemp("site"), Warnings()
    log = logging.getLogger("mkdocs")
    log.addHandler(warnings)
    try:
        config = load_config(str(CONFIG), site_dir=str(folder), strict=False)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        log.removeHandler(warnings)
    return folder, warnings.found


@needs_mkdocs
def test_the_site_builds_without_a_warning(site):
    assert not site[1]


@needs_mkdocs
def test_no_page_loads_anything_from_the_network(site):
    """Links may lead elsewhere; scripts, styles, fonts and images may not."""
    loads = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")
    pages = list(site[0].rglob("*.html"))
    assert len(pages) > 20
    found = [tag for page in pages for tag in loads.findall(page.read_text("utf-8"))]
    assert not [tag for tag in found if 'rel="canonical"' not in tag]
    styles = "".join(path.read_text("utf-8") for path in site[0].rglob("stylesheets/*.css"))
    assert not re.findall(r"url\(['\"]?https?:|@import", styles)


@needs_mkdocs
def test_no_page_has_a_diagram_that_a_script_from_elsewhere_would_draw(site):
    assert not [page for page in DOCS.rglob("*.md") if "```mermaid" in page.read_text("utf-8")]

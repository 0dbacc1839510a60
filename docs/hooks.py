"""What mkdocs does beside rendering: files from outside docs/ become pages, and links to them lead there.

The pages of docs/ have links that work on GitHub, such as `../../benchmarks/README.md` or
`../../reference/int8.py`. In the site, a Markdown file in PAGES is a page of its own, a Python file is a
page that shows it, and any other file (raw data) is copied. All are found from the links, beginning at docs/.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "benchmarks/README.md": "benchmarks/measuring.md",
    "benchmarks/nano/README.md": "benchmarks/training.md",
    "examples/README.md": "guides/examples.md",
    "kernels/README.md": "explanation/kernels-folder.md",
    "reference/README.md": "explanation/reference-folder.md",
}
"""Markdown file from the root -> its place in the site; README.md is the home page in other words."""
CODE = re.compile(r"^( *)(`{3,}).*?^\1\2\s*$|`(?:[^`\n]|\n(?!\s*\n))+`", re.S | re.M)
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?P<after>(?: \"[^\"]*\")?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside docs/ that pages link to, and those that the linked Markdown files link to."""
    for source, place in PAGES.items():
        if (ROOT / source).is_file() and files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=(ROOT / source).read_text("utf-8")))
    for page in list(files.documentation_pages()):
        for target in links(original(page.src_uri), page.content_string):
            place = in_site(target)
            if place is not None and files.get_file_from_path(place) is None:
                files.append(copied(config, target, place))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links that leave docs/ lead to the places of their targets in the site."""
    here, source = page.file.src_uri, original(page.file.src_uri)
    moved = posixpath.dirname(source) != posixpath.join("docs", posixpath.dirname(here)).rstrip("/")

    def lead(match: re.Match[str]) -> str:
        target = resolve(source, match["target"])
        place = in_site(target)
        if place is None and moved and target.startswith("docs/"):
            place = target.removeprefix("docs/")
        if place is None:
            return match[0]
        link = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{match['before']}{link}{match['anchor'] or ''}{match['after']}"

    return outside_code(markdown, lambda text: LINK.sub(lead, text))


def original(place: str) -> str:
    """The path from the root of the file that a page of the site is made of."""
    if (ROOT / "docs" / place).is_file():
        return f"docs/{place}"
    return next((source for source, page in PAGES.items() if page == place), f"docs/{place}")


def links(source: str, markdown: str) -> list[str]:
    """The paths from the root that a Markdown file links to."""
    found: list[str] = []
    outside_code(markdown, lambda text: found.extend(m["target"] for m in LINK.finditer(text)) or text)
    return [resolve(source, target) for target in found]


def resolve(source: str, target: str) -> str:
    """A link of a file as a path from the root; a folder stands for its README.md."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def in_site(path: str) -> str | None:
    """The place in the site of a file outside docs/; None for files in docs/ and what does not exist."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(("docs/", "..")) or not (ROOT / path).is_file():
        return None
    return f"source/{path}.md" if path.endswith(".py") else f"source/{path}"


def copied(config: Any, path: str, place: str) -> File:
    """A Python file as a page that shows it, or any other file as it is."""
    if not path.endswith(".py"):
        return File.generated(config, place, abs_src_path=os.fspath(ROOT / path))
    code = (ROOT / path).read_text("utf-8")
    return File.generated(config, place, content=f"# {path}\n\n````python\n{code}````\n")


def outside_code(markdown: str, change: Any) -> str:
    """The text with everything changed that is not code."""
    parts, at = [], 0
    for code in CODE.finditer(markdown):
        parts += [change(markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, change(markdown[at:])])

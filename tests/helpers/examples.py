"""The examples of README.md and docs/: how they are found and run; docs/testing.md has the convention.

Every fenced block marked `sh` or `python` runs, in the order of its page, in a folder with stand-ins for the
files that the documents name. A block that cannot run has a comment before it that names one of REASONS.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.tree import ROOT

REASONS = ("needs a GPU", "needs the network", "takes minutes", "output")
"""Why a block may stay out: the closed list."""

SKIPPED = ("pip", "hf", "git", "docker", "torchrun", "cd", "source", ".")
"""Programs whose lines install or fetch something, or start processes of their own; they do not run."""
SKIPPED_MODULES = ("venv", "pip", "pytest", "mkdocs", "torch.distributed.run")
"""The same for `python -m MODULE`."""
SHELL = ("echo", "printf", "cat", "mkdir", "ls", "cp", "head", "tail", "rm")
"""Programs that a shell runs as they are."""

MARK = re.compile(r"\s*<!-- not run: (?P<reason>[^>]*?) -->\s*")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text without the indentation, its first line's number, its mark."""

    language: str
    text: str
    line: int
    not_run: str | None


def pages() -> list[Path]:
    """The documents whose examples run: README.md and everything below docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, lines = [], text.splitlines()
    number = 0
    while number < len(lines):
        fence = re.match(r"( *)(`{3,})(\w*)", lines[number])
        if fence is None:
            number += 1
            continue
        indent, ticks, language = fence.groups()
        end = number + 1
        while end < len(lines) and lines[end].strip() != ticks:
            end += 1
        mark = MARK.fullmatch(lines[number - 1]) if number else None
        body = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : end])
        found.append(Block(language, body, number + 2, mark["reason"] if mark else None))
        number = end + 1
    return found


def run_python(block: Block, page: str, namespace: dict[str, Any]) -> None:
    """Run a block; a traceback names the page and the line in it."""
    code = compile("\n" * (block.line - 1) + block.text, page, "exec")
    with contextlib.redirect_stdout(io.StringIO()), mock.patch("PIL.Image.Image.show"):
        exec(code, namespace)


def run_shell(block: Block, page: str) -> None:
    """Run the lines of a block; the first one that fails is an error that names the page and the line."""
    for number, line in commands(block):
        try:
            run_line(line)
        except CommandError as error:
            raise AssertionError(f"{page}:{number}: {line}\n{error}") from None


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """(line number, command) of a block; lines that end in a backslash are joined."""
    number, pending = block.line, ""
    for at, line in enumerate(block.text.splitlines(), block.line):
        number = number if pending else at
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        if pending.strip() and not pending.lstrip().startswith("#"):
            yield number, pending.strip()
        pending = ""


class CommandError(Exception):
    """A command of an example failed or is one that the runner does not know."""


def run_line(line: str) -> None:
    """Run one line: commands joined by &&, each a pipeline whose last output may go into a file."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&><;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words = list(lexer)
    for command in split(words, "&&"):
        text = ""
        for stage in split(command, "|"):
            target = None
            if len(stage) > 2 and stage[-2] == ">":
                *stage, _, target = stage
            text = run_words(stage, text)
            if target is not None:
                Path(target).write_text(text, "utf-8")


def split(words: Sequence[str], at: str) -> list[list[str]]:
    """The words between the separators."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == at:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def run_words(words: Sequence[str], stdin: str) -> str:
    """Run one program; returns what it prints."""
    settings = {}
    while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0]):
        name, _, settings[name] = words[0].partition("=")
        words = words[1:]
    if words and words[0] == "export":
        os.environ.update(word.split("=", 1) for word in words[1:])  # the caller restores the environment
        return ""
    program = Path(words[0]).name
    arguments = list(words[1:])
    if program in ("python", "python3"):
        if arguments[0].startswith("examples/"):  # they have tests of their own
            return ""
        if arguments[0] == "-m" and arguments[1] in SKIPPED_MODULES:
            return ""
        if arguments[:2] == ["-m", "zimage_core"]:
            program, arguments = "zimage", arguments[2:]
    if program in SKIPPED:
        return ""
    if program == "zimage":
        return run_zimage(arguments, stdin, settings)
    if program in SHELL or (program == "python" and arguments[0] == "-c"):
        program = sys.executable if program == "python" else program
        done = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise CommandError(done.stderr)
        return done.stdout
    raise CommandError(
        f"the runner does not know {words[0]!r}; mark the block or teach tests/helpers/examples.py"
    )


def run_zimage(words: Sequence[str], stdin: str, settings: dict[str, str]) -> str:
    """Run the command in this process; returns what it prints, and raises CommandError if it fails."""
    from zimage_core.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    streams = (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err))
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream)
        stack.enter_context(mock.patch.dict(os.environ, settings))
        stack.enter_context(mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")))
        try:
            status: Any = main(list(words))
        except SystemExit as leaving:
            status = leaving.code
    if status not in (0, None):
        raise CommandError(f"exit status {status}: {err.getvalue()[-600:]}")
    return out.getvalue()

"""docs/reference/cli.md from the parsers of the verbs; run as a module, it rewrites the page."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence

from benchmarks.report import fill_tables
from tests.helpers.tree import ROOT
from zimage_core.cli.main import build_parser

PAGE = ROOT / "docs" / "reference" / "cli.md"
EVERYWHERE = ("help", "traceback")
"""Options of every verb, which the page names once."""
DOCUMENT = re.compile(r"docs/((?:[\w-]+/)*([\w-]+)\.md)")


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Verb -> its parser, in the order of `zimage --help`."""
    found = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices)


def render() -> str:
    """All verbs: a list of links, then a section each."""
    parsers = verbs()
    summary = [f"- [`zimage {verb}`](#zimage-{verb}): {first(parser)}" for verb, parser in parsers.items()]
    return "\n\n".join(["\n".join(summary), *(section(verb, parser) for verb, parser in parsers.items())])


def first(parser: argparse.ArgumentParser) -> str:
    """The first sentence of a description."""
    return prose(parser.description or "").partition(". ")[0].rstrip(".") + "."


def section(verb: str, parser: argparse.ArgumentParser) -> str:
    """A verb: what it does, how it is called, its options by group, what is said below them."""
    places = [a for a in parser._actions if not a.option_strings]
    usage = " ".join(["zimage", verb, "[OPTIONS]", *map(place, places)])
    parts = [f"## zimage {verb}", prose(parser.description or ""), f"```text\n{usage}\n```"]
    for group in parser._action_groups:
        actions = [
            a for a in group._group_actions if a.dest not in EVERYWHERE and a.help != argparse.SUPPRESS
        ]
        if actions:
            title = "Arguments" if group is parser._positionals else (group.title or "").capitalize()
            parts.append(f"**{title}.** {prose(group.description or '')}".rstrip())
            parts.append(table(parser, actions))
    if parser.epilog:
        parts.append(prose(parser.epilog))
    return "\n\n".join(parts)


def place(action: argparse.Action) -> str:
    """A positional argument as in a usage line."""
    name = metavar(action)
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name)


def metavar(action: argparse.Action) -> str:
    """The word that stands for an option's value; none for a switch."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        return action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    return "CHOICE" if action.choices else action.dest.upper()


def table(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> str:
    """A row an option: its names with the value, and its help."""
    return "\n".join(["| option | |", "|---|---|", *(row(parser, action) for action in actions)])


def row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One option; what it may be is named after the help unless the help does."""
    names = action.option_strings or [metavar(action)]
    value = f" {metavar(action)}" if action.option_strings and metavar(action) else ""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    if action.choices:
        text += "; one of " + ", ".join(f"`{choice}`" for choice in action.choices)
    return f"| `{', '.join(names)}{value}` | {prose(text)} |".replace("[:WEIGHT]", "[:WEIGHT]")


def prose(text: str) -> str:
    """Help text as Markdown: options are code, pages are links, a pipe is no column."""
    return "".join(pieces(" ".join(text.split())))


def pieces(text: str) -> Iterator[str]:
    """The text with code left alone."""
    for at, part in enumerate(text.split("`")):
        if at % 2:
            yield f"`{part}`"
            continue
        part = part.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        part = DOCUMENT.sub(r"[\2](../\1)", part)
        yield re.sub(r"(?<![\w`-])(--[a-z][a-z-]*)", r"`\1`", part)


if __name__ == "__main__":
    fill_tables(PAGE, {"cli": render()})

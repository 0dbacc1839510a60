"""Messages of the library as lines on stderr, with options in place of the arguments of Python."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from zimage_core.errors import BadFile, printable

MOST = 1000
"""Most characters of a message; a longer one, such as a warning that quotes a prompt, loses its middle."""
_ARGUMENT = re.compile(
    r"""\w\([^()]*\)|(?<![\w./'"-])(?P<name>[a-z_]+)(?!\w|[./(])"""
    r"""(?:(?P<is>=)(?P<value>'[^']*'|"[^"]*"|[\w.+-]*\w)?)?"""
)
"""A call of a function, which stays as it is, or a name that is no part of a path, with its value."""


def option_names(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Argument of the library -> the option that stores a value under its name, such as --steps."""
    found = {}
    for action in parser._actions:
        long = [text for text in action.option_strings if text.startswith("--")]
        if long:
            found[action.dest] = long[0]
    return found


def in_options(message: object, options: Mapping[str, str]) -> str:
    """A message, with the names of arguments replaced by options.

    An argument is recognised before the first colon, as `name=value` or `name=`, and anywhere where its name
    has an underscore. The path that a `BadFile` begins with stays as it is.

    Args:
        message: An error, a warning or a text.
        options: Argument -> option.
    """
    text = str(message)
    if isinstance(message, BadFile):
        path = printable(message.path)
        if text.startswith(path):
            return path + _replaced(text[len(path) :], options)
    head, colon, rest = text.partition(":")
    names = head.split(" and ")
    if colon and all(name in options for name in names):
        return " and ".join(options[name] for name in names) + colon + _replaced(rest, options)
    return _replaced(text, options)


def _replaced(text: str, options: Mapping[str, str]) -> str:
    def option(found: re.Match[str]) -> str:
        name = options.get(found["name"] or "")
        if name is None or (found["is"] is None and "_" not in found["name"]):
            return found[0]
        value = (found["value"] or "").strip("'\"").removeprefix("torch.")
        return f"{name} {value}" if value else name

    return _ARGUMENT.sub(option, text)


def line(text: str) -> str:
    """Text that is safe to show on one line, without its middle where it is long."""
    shown = printable(text, len(text) * 10)
    return shown if len(shown) <= MOST else f"{shown[: MOST - 350]} [...] {shown[-340:]}"


def say(text: str) -> None:
    """Write one line to stderr, in place of a progress bar that may stand there."""
    clear = "\r\x1b[K" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else ""
    sys.stderr.write(f"{clear}{text}\n")


@contextmanager
def warnings_as_lines(options: Mapping[str, str]) -> Iterator[None]:
    """Show each warning of the library as one line on stderr; those of other packages are for developers."""

    def show(message: Warning | str, category: type[Warning], *rest: object, **named: object) -> None:
        if issubclass(category, UserWarning):
            say(f"warning: {line(in_options(message, options))}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")  # whatever PYTHONWARNINGS says: a warning is a line, not an error
        warnings.showwarning = show
        yield

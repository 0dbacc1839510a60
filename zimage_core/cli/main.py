"""`zimage VERB ...`: finds the verb, turns errors into one line and an exit status.

Exit status: 0 done, 1 it failed, 2 the command itself was wrong, 130 interrupted, 143 terminated. Only the
standard library is loaded before a verb runs, and of that as little as possible before signals are handled.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import argparse


def process() -> NoReturn:
    """The installed command: a process of its own, with its own signals and streams."""
    _handle_signals()
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        # prompts and names are shown in a terminal of any encoding: what it lacks is escaped
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    status = main()
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        status = status or 1
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after `zimage`; None takes them from the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: From argparse: 2 for a wrong command, 0 after --help.
    """
    from zimage_core.errors import BadArgument, ZImageError

    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except BadArgument as error:
        return _report(error, args.debug, 2)
    except ZImageError as error:
        return _report(error, args.debug, 1)
    except BrokenPipeError:
        _drop_output()
        return 1
    except (OSError, MemoryError, RecursionError) as error:
        return _report(error, args.debug, 1)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001  the last door: a fault of ours is one line too
        return _report(error, args.debug, 1, f"internal error, {type(error).__name__}: ")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    import argparse

    from zimage_core import __version__
    from zimage_core.cli import (
        compare,
        convert,
        doctor,
        generate,
        imatrix,
        inspect,
        plan,
        quantize,
        sensitivity,
    )

    parser = _parser_class()(
        prog="zimage",
        description="Z-Image inference straight from GGUF files.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong command, 130 interrupted, 143 terminated.",
    )
    parser.add_argument("--version", action="version", version=f"zimage-core {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for verb in (generate, inspect, plan, quantize, convert, imatrix, sensitivity, compare, doctor):
        verb.add_parser(verbs, common)
    return parser


def _parser_class() -> type[argparse.ArgumentParser]:
    import argparse

    from zimage_core.errors import printable

    class Parser(argparse.ArgumentParser):
        """argparse that answers a wrong command with one line, its text made safe to show."""

        def __init__(self, *words: Any, **options: Any) -> None:
            # a shortened option is guessed: `--prompt "a cat"` would open a file as --prompts
            super().__init__(*words, **{"allow_abbrev": False, **options})

        def error(self, message: str) -> NoReturn:
            self.exit(2, f"error: {printable(message, 400)}; see `{self.prog} --help`\n")

    return Parser


def _report(error: BaseException, debug: bool, status: int, prefix: str = "") -> int:
    from zimage_core.errors import ZImageError, printable

    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, ZImageError):
        text = printable(error, 2000)  # printable already; once more so that it is one line for certain
    elif isinstance(error, OSError) and error.filename is not None:
        text = printable(f"{error.filename}: {(error.strerror or type(error).__name__).lower()}", 2000)
    elif isinstance(error, MemoryError):
        text = "not enough memory; take a smaller image or a smaller quantisation of the model"
    else:
        text = printable(error, 2000) or type(error).__name__
    hint = " (run it with --debug to see where)" if prefix and not debug else ""
    sys.stderr.write(f"error: {prefix}{text}{hint}\n")
    return status


def _handle_signals() -> None:
    """Ctrl-C and SIGTERM end the process at once: no traceback, no unfinished file.

    The process ends inside the handler. An exception instead would have to travel through foreign code
    (imports, callbacks, destructors) that prints or swallows it.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        try:
            # not there yet while the module is being imported: then there is nothing to remove
            clean = getattr(sys.modules.get("zimage_core.files.atomic"), "remove_unfinished", None)
            if clean is not None:
                clean()
            # past Python's buffers, which may be in use below us
            if os.isatty(2):
                os.write(2, b"\n")
        finally:
            os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)


def _open_streams() -> None:
    """Streams that the caller closed (cron, daemons) lead nowhere; no file of ours takes their number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _drop_output() -> None:
    """The reader of our output went away, as in `zimage inspect x | head`: say nothing more, nor at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    process()

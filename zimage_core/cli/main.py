"""`zimage VERB ...`: finds the verb, turns errors into one line and an exit status.

Exit status: 0 done, 1 it failed, 2 the command itself was wrong, 130 interrupted, 143 terminated,
129 hung up. The verbs
are imported once signals are handled, and none of them loads torch before it runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from zimage_core import __version__
from zimage_core.cli import ranks
from zimage_core.cli.hardware import wait_passively
from zimage_core.cli.messages import in_options, line, option_names, say, warnings_as_lines
from zimage_core.errors import BadArgument, OverBudget, ZImageError, printable


def process() -> NoReturn:
    """The installed command: a process of its own, with its own signals, streams and threads."""
    _handle_signals()
    _open_streams()
    if not ranks.first():
        ranks.keep_silent()
    wait_passively()
    status = main(own_process=True)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_output()
        status = status or 1
    if status and ranks.launched():  # a thread of torch's that waits for another rank would keep the process
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))  # the error has been shown
        sys.stderr.flush()
        ranks.part()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None, own_process: bool = False) -> int:
    """Run one command.

    Args:
        argv: Words after `zimage`; None takes them from the process.
        own_process: Whether settings of the whole process, such as the number of threads, may be changed.

    Returns:
        The exit status.

    Raises:
        SystemExit: From argparse: 2 for a wrong command, 0 after --help.
    """
    args = build_parser().parse_args(argv)
    args.own_process = own_process
    try:
        with warnings_as_lines(args.options):
            return ranks.run(args) if ranks.launched() else int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 1
    except Exception as error:  # noqa: BLE001  the last resort: a fault of ours is one line too
        return _report(error, args)


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong command with one line, its text made safe to show."""

    def __init__(self, *words: Any, **options: Any) -> None:
        # argparse would complete a shortened option: `--prompt "a cat"` would open a file as --prompts
        super().__init__(*words, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command and leave with status 2."""
        text = f"error: {printable(message, 400)}; see `{self.prog} --help`\n"
        self.exit(2, text if ranks.first() else "")


def build_parser() -> Parser:
    """The parser of all verbs."""
    from zimage_core.cli import (
        batch,
        compare,
        convert,
        doctor,
        enhance,
        generate,
        imatrix,
        inspect,
        parity,
        plan,
        quantize,
        sensitivity,
    )

    parser = Parser(
        prog="zimage",
        description="Z-Image inference straight from GGUF files.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong command, 130 interrupted, 143 terminated.",
    )
    parser.add_argument("--version", action="version", version=f"zimage-core {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    common = argparse.ArgumentParser(add_help=False)
    # not `debug`, which is an argument of the pipeline's call and means something else there
    common.add_argument(
        "--debug", dest="traceback", action="store_true", help="show the traceback of an error"
    )
    for verb in (
        generate, batch, enhance, inspect, plan, quantize, convert, imatrix, sensitivity, compare, parity,
        doctor,
    ):  # fmt: skip
        verb.add_parser(verbs, common)
    for name, each in verbs.choices.items():
        each.set_defaults(options=option_names(each), verb=name)
    return parser


def _report(error: Exception, args: argparse.Namespace) -> int:
    """Write an error as one line; returns the exit status."""
    if args.traceback:
        from traceback import print_exception

        print_exception(error, file=sys.stderr)
    text = str(error) or type(error).__name__
    if isinstance(error, ZImageError):
        text = in_options(error, args.options)
        if isinstance(error, OverBudget) and getattr(args, "device", "") == "auto" and "GPU memory" in text:
            text += "; --device cpu computes without the GPU"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for it
        text = "the GPU has too little free memory; give --vram auto, --device cpu or a smaller image"
    elif isinstance(error, MemoryError):
        text = "not enough memory; take a smaller image or a smaller quantisation of the model"
    elif not isinstance(error, (OSError, RecursionError)):
        hint = "" if args.traceback else " (run it with --debug to see where)"
        text = f"internal error, {type(error).__name__}: {text}{hint}"
    if not ranks.launched() or ranks.speaks_for(error):
        say(f"error: {line(text)}")
    return 2 if isinstance(error, BadArgument) else 1


def _handle_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end the process at once, without a traceback or an unfinished file.

    The process ends inside the handler. An exception instead would have to travel through foreign code
    (imports, callbacks, destructors) that prints or swallows it.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        try:
            # not there yet while the module is being imported: then there is nothing to remove
            clean = getattr(sys.modules.get("zimage_core.files.atomic"), "remove_unfinished", None)
            if clean is not None:
                clean()
            if number == signal.SIGTERM and ranks.launched() and ranks.first():
                os.write(2, b"error: ended by SIGTERM, which torchrun sends where another rank has ended\n")
            # past Python's buffers, which may be in use below us
            if os.isatty(2):
                os.write(2, b"\n")
        finally:
            os._exit(128 + number)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has it ignored
        signal.signal(signal.SIGHUP, leave)


def _open_streams() -> None:
    """Open the streams that the caller closed, as cron and daemons do, and let output hold any character.

    An opened stream leads nowhere and has its usual number, so that no file of ours takes that. Prompts and
    names are shown in a terminal of any encoding: what it lacks is escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115, PTH123
        if number:
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Discard what is written from now on: its reader went away, as in `zimage inspect x | head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    process()

"""Messages name options where the library names arguments, and stay on one line of bearable length."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from zimage_core.cli.main import build_parser
from zimage_core.cli.messages import in_options, line, say
from zimage_core.errors import BadFile

OPTIONS = build_parser().parse_args(["generate", "a"]).options


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("num_inference_steps: got 0", "--steps: got 0"),
        ("height and width: 9000 x 9000 are too many", "--height and --width: 9000 x 9000 are too many"),
        ("raise max_sequence_length (up to 9)", "raise --max-length (up to 9)"),
        ("give ram= alone, such as ram='4GiB'", "give --ram alone, such as --ram 4GiB"),
        ("use dtype=torch.bfloat16 or float32", "use --dtype bfloat16 or float32"),
        ("no effect at guidance_scale=0", "no effect at --guidance 0"),
        ("name it: transformer=, text_encoder= and vae=", "name it: --transformer, --text-encoder and --vae"),
        # words, paths, calls and quoted text stay
        ("the seed of width and ram", "the seed of width and ram"),
        ("in x/text_encoder, text_encoder/y and 'text_encoder'",) * 2,
        ("pass Scheduler(shift=6.0, seed=3)",) * 2,
        (BadFile("ram", "is bad", "try ram='4GiB'"), "ram: is bad; try --ram 4GiB"),
        (BadFile("text_encoder", "has no text_encoder file"), "text_encoder: has no --text-encoder file"),
    ],
)
def test_arguments_become_options(message, shown):
    assert in_options(message, OPTIONS) == shown


def test_every_verb_has_its_own_options():
    quantize = build_parser().parse_args(["quantize", "a", "b", "--type", "Q8_0"]).options
    assert in_options("size: too small", quantize) == "--size: too small"
    assert in_options("num_inference_steps: got 0", quantize) == "num_inference_steps: got 0"


def test_a_line_takes_the_place_of_a_bar(monkeypatch):
    shown = []
    stream = SimpleNamespace(isatty=lambda: True, write=shown.append)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    say("warning: a")
    monkeypatch.setenv("TERM", "dumb")
    say("error: b")
    monkeypatch.undo()
    assert shown == ["\r\x1b[Kwarning: a\n", "error: b\n"]


def test_a_long_message_keeps_its_ends():
    shown = line("begin " + "x\x1b" * 5000 + " end")
    assert shown.startswith("begin x")
    assert shown.endswith("x\\x1b end")
    assert len(shown) <= 1000

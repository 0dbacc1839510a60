"""`zimage parity`: a table or JSON, and the exit status."""

import json

import pytest

from zimage_core import parity
from zimage_core.cli.main import main
from zimage_core.parity.report import Block, Component, ParityReport

pytestmark = pytest.mark.parity


def test_the_embedded_model_is_within_tolerance(capsys):
    pytest.importorskip("diffusers")
    assert main(["parity", "default", "--json", "--only", "transformer", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert found["passes"]
    assert found["versions"]["diffusers"]
    (component,) = found["components"]
    assert component["blocks"][-1]["name"] == "output"
    assert component["blocks"][0].keys() == {
        "name", "passes", "scale", "error", "tolerance", "accumulated", "error_float64"
    }  # fmt: skip


def test_a_block_outside_its_tolerance_is_status_1_and_named(monkeypatch, capsys):
    blocks = (Block("layers.0", 2.0, 1e-7, 1e-6), Block("layers.1", 2.0, 1e-3, 1e-6, 1e-3))
    component = Component("transformer", "diffusers 0.42.1 X", "Q4_K", True, "two tokens", blocks)
    report = ParityReport("x.gguf", "diffusers", {"torch": "2"}, (component,), {"vae": "no file"})
    monkeypatch.setattr(parity, "compare_with", lambda *_, **__: report, raising=False)
    assert main(["parity", "x.gguf"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "outside tolerance, first: transformer: layers.1"
    assert sum("OUTSIDE" in line for line in lines) == 1
    assert "vae: not compared: no file" in lines


@pytest.mark.parametrize("words", [[], ["default", "--against", "comfy"], ["default", "--steps", "-1"]])
def test_a_wrong_command_is_status_2(words, capsys):
    try:
        status = main(["parity", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert "Traceback" not in capsys.readouterr().err

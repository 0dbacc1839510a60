"""`torchrun ... -m zimage_core`: one rank speaks and writes, and every failure ends all of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import ranks as helper
from zimage_core.cli import hardware, ranks
from zimage_core.cli.main import main

DRAW = ["generate", "a red circle", "--seed", "3", "--steps", "3"]
COMMAND = ["-m", "zimage_core"]


def pixels(path: Any) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_two_ranks_write_one_file_and_rank_0_alone_speaks(tmp_path):
    first, second = helper.ended(helper.start([*COMMAND, *DRAW, "--json"], 2, tmp_path))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert second[1:] == ("", "")
    assert "ranks: 2, for each image" in first[2]
    assert [file.name for file in tmp_path.iterdir()] == ["zimage-3.png"]
    [record] = json.loads(first[1])
    assert record["settings"]["ranks"] == 2
    assert main([*DRAW, "--quiet", "-o", str(tmp_path / "one.png")]) == 0
    assert np.abs(pixels(tmp_path / "zimage-3.png") - pixels(tmp_path / "one.png")).max() <= 1


@pytest.mark.slow
def test_a_seed_that_is_drawn_and_prompts_of_standard_input_are_those_of_rank_0(tmp_path):
    words = ["generate", "-", "--steps", "2", "--cfg", "3", "--negative", "blue"]
    started = helper.start([*COMMAND, *words], 2, tmp_path)
    found = helper.ended(started, text="a red circle\n")
    assert [code for code, _, _ in found] == [0, 0], found
    [file] = tmp_path.iterdir()
    assert re.fullmatch(r"zimage-\d+\.png", file.name)
    assert json.loads(Image.open(file).info["zimage"])["guidance_ranks"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "status", "wanted"),
    [
        (["generate", "a", "--width", "17"], 2, "error: --width"),
        (["generate", "a", "--seed", "3", "-o", "there.png"], 1, "there.png"),
        (["generate", "a", "--device", "cuda:0"], 2, "error: --device cuda:0: each rank takes the GPU of"),
        (["generate", "a", "--nonsense"], 2, "error: unrecognized arguments"),
        (["plan"], 0, "ranks: only generate uses several; rank 0 runs plan alone"),
    ],
)  # fmt: skip
def test_an_error_is_shown_once_and_is_the_exit_status(words, status, wanted, tmp_path):
    (tmp_path / "there.png").write_bytes(b"")
    found = helper.ended(helper.start([*COMMAND, *words], 2, tmp_path))
    assert found[0][0] == status, found
    assert (found[1][0] == 0) == (status == 0), found
    shown = "".join(err for _, _, err in found)
    assert shown.count(wanted) == 1, shown
    assert shown.count("error:") == (status > 0)
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_ends_the_others_with_one_sentence(lost, number, tmp_path):
    words = [*COMMAND, "generate", "a circle", "--steps", "900", "-o", "x.png"]
    started = helper.start(words, 2, tmp_path, {"ZIMAGE_RANK_TIMEOUT": "4"})
    time.sleep(12)  # they draw
    os.kill(started[lost].pid, number)
    code, out, err = helper.ended(started, but=lost)[1 - lost]
    assert (code, out) == (1, "")
    assert err.count("error:") == 1
    assert f"rank {lost}" in err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_torchrun_itself_ends_with_an_error_where_a_rank_does(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(helper.ROOT)}
    environment.pop("OMP_NUM_THREADS", None)

    def run(*words: str) -> Any:
        command = [*torchrun, *COMMAND, *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )

    drawn = run(*DRAW)
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout == "zimage-3.png\n"
    refused = run("generate", "a", "--width", "17")
    assert refused.returncode != 0
    assert refused.stderr.count("error: --width") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["zimage-3.png"]


def test_a_rank_takes_its_share_of_the_cores_where_no_number_is_given(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.threads() is None
    for name, value in helper.environment(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "cores", lambda: 8)
    assert ranks.threads() == 4, "torchrun sets OMP_NUM_THREADS to 1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert ranks.threads() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "20")
    assert ranks.threads() == 1
    assert hardware.ranks is ranks


def test_guidance_ranks_without_torchrun_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = [*DRAW, "--quiet", "--guidance-ranks", "2", "-o", str(tmp_path / "x.png")]
    assert main(words) == 2
    assert "--guidance-ranks goes with torchrun" in capsys.readouterr().err

"""Processes that make one image together, and what becomes of those whose neighbour fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN = """
import os, signal, sys, time, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from zimage_core import RankFailed, ZImageError, ZImagePipeline
rank = int(os.environ["RANK"])
def show(error):
    print(f"{type(error).__name__}: {error}", flush=True)
"""
"""What the programs of ranks begin with."""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "FATAL",
        "COVERAGE_PROCESS_START": "",
    }  # fmt: skip


def start(
    words: list[str], size: int, folder: Path, more: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start `python WORDS` as so many ranks, as torchrun does, but each with its own streams."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *words], env={**environment(rank, size, port), **(more or {})}, cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(
    ranks: list[subprocess.Popen[str]], but: int | None = None, text: str = ""
) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each rank; rank `but` is killed once the others have ended.

    Rank 0 gets `text` as standard input, and all others get none.

    Raises:
        subprocess.TimeoutExpired: A rank hangs.
    """
    try:
        found = {}
        for number, rank in enumerate(ranks):
            if number != but:
                out, err = rank.communicate(text if number == 0 else "", timeout=100)
                found[number] = (rank.returncode, out, err)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.kill(rank.pid, signal.SIGKILL)
    if but is not None:
        out, err = ranks[but].communicate()
        found[but] = (ranks[but].returncode, out, err)
    return [found[number] for number in range(len(ranks))]


def run(
    program: str, size: int, folder: Path, but: int | None = None, more: Mapping[str, str] | None = None
) -> list[tuple[int, str, str]]:
    """What so many ranks of a program print, as `ended`."""
    return ended(start(["-c", BEGIN + program], size, folder, more), but)

"""A tiny model on disk, and the command line run in process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import tiny
from zimage_core.cli.main import main


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr of a command that failed."""
        lines = self.err.splitlines()
        assert len(lines) == 1, f"one line was promised: {lines}"
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A diffusers folder of random weights."""
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def zimage(capsys):
    """main() with words -> status and output."""

    def run(*words: object) -> Outcome:
        try:
            status = main([str(word) for word in words])
        except SystemExit as leaving:
            status = leaving.code
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return run

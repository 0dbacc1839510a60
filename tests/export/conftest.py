"""Models to quantise and convert."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.wide import wide_state, write_wide


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """Transformer folder, bfloat16, width 256 (2 heads of 128)."""
    return write_wide(tmp_path_factory.mktemp("wide") / "transformer", wide_state())


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """The tiny pipeline as a diffusers folder, float32."""
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny")

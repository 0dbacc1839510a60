"""Full-size model files of holes, for all tests under the driver that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.host_gpu.sparse_models import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Mix -> folder with its three files."""
    folder = tmp_path_factory.mktemp("sparse")
    return lambda mix: write_models(folder, mix)

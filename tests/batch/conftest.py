"""The embedded model, loaded once, and rows that it draws in a moment."""

from __future__ import annotations

import pytest

from zimage_core.batch.worker import Done, Row
from zimage_core.pipeline import ZImagePipeline

SMALL = {"width": 32, "height": 32, "num_inference_steps": 1}


@pytest.fixture(scope="session")
def pipe() -> ZImagePipeline:
    return ZImagePipeline.from_default()


@pytest.fixture
def done():
    """A finished image of row i, made of nothing."""

    def make(number: int, data: bytes | None = None) -> Done:
        row = Row(number, f"{number:064x}", {"prompt": f"p{number}", "seed": number})
        settings = {"prompt": f"p{number}", "seed": number, "width": 32, "height": 32}
        return Done(row, data or b"\x89PNG %d" % number, settings, 0.1)

    return make

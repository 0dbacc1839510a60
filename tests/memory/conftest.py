"""Small packed models to stream, and the check that no stream leaves a thread behind."""

from __future__ import annotations

import gc

import pytest

from tests.helpers.streamed import draw, encoder_file, our_threads, transformer_file
from zimage_core.memory.attach import unstream
from zimage_core.weights.load import load_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streamed")


@pytest.fixture(scope="module")
def dit_path(folder):
    return transformer_file(folder)


@pytest.fixture(scope="module")
def encoder_path(folder):
    return encoder_file(folder)


@pytest.fixture(scope="module")
def wanted(dit_path):
    return draw(load_transformer(dit_path), images=2)


@pytest.fixture(scope="module")
def single(dit_path):
    return draw(load_transformer(dit_path))


@pytest.fixture
def dit(dit_path):
    model = load_transformer(dit_path)
    yield model
    unstream(model)


@pytest.fixture
def no_thread_is_left():
    yield
    gc.collect()
    assert not our_threads(), our_threads()

"""The tables are those that files are made with, for every installed version of gguf."""

import dataclasses
import sys
from itertools import pairwise

import numpy as np
import pytest

from zimage_core import codebooks
from zimage_core.codebooks import CODEBOOK_NAMES, codebook
from zimage_core.errors import Unsupported

MAGNITUDES = {
    "iq2_xxs": {8, 25, 43},
    "iq2_xs": {8, 25, 43},
    "iq2_s": {8, 25, 43},
    "iq3_xxs": {4, 12, 20, 28, 36, 44, 52, 62},
    "iq3_s": {1, 3, 5, 7, 9, 11, 13, 15},
    "iq1": {-1, 0, 1},
    "e2m1": {0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12},
}


@pytest.fixture
def fresh_cache():
    codebook.cache_clear()
    yield
    codebook.cache_clear()


def _table(name):
    book = codebook(name)
    return np.frombuffer(book.values, np.int8).reshape(book.shape)


@pytest.mark.parametrize("name", CODEBOOK_NAMES)
def test_table_has_its_shape_and_is_kept(name):
    book = codebook(name)
    assert len(book.values) == book.entries * book.width
    assert codebook(name) is book


@pytest.mark.parametrize("name", MAGNITUDES)
def test_grid_holds_only_its_levels(name):
    assert set(_table(name).ravel().tolist()) == MAGNITUDES[name]


@pytest.mark.parametrize("name", [name for name in CODEBOOK_NAMES if codebook(name).width > 1])
def test_rows_of_a_grid_differ(name):
    table = _table(name)
    assert len(np.unique(table, axis=0)) == len(table)


def test_levels_of_iq4_rise():
    assert all(low < high for low, high in pairwise(_table("iq4_nl").ravel().tolist()))


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("name", CODEBOOK_NAMES)
def test_another_table_in_the_gguf_package_is_refused(name, monkeypatch):
    source = dataclasses.replace(codebooks._SOURCES[name], sha256="0" * 64)
    monkeypatch.setitem(codebooks._SOURCES, name, source)
    with pytest.raises(Unsupported, match=f"the table {name} in the installed gguf package is not the one"):
        codebook(name)


@pytest.mark.usefixtures("fresh_cache")
def test_one_changed_level_is_noticed(monkeypatch):
    import gguf.quants

    levels = list(gguf.quants.IQ4_NL.kvalues)
    levels[3] += 1
    monkeypatch.setattr(gguf.quants.IQ4_NL, "kvalues", tuple(levels))
    with pytest.raises(Unsupported, match="iq4_nl"):
        codebook("iq4_nl")


@pytest.mark.usefixtures("fresh_cache")
def test_a_missing_gguf_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(Unsupported, match="could not be read from the gguf package"):
        codebook("iq1")


def test_an_unknown_table_is_the_callers_mistake():
    with pytest.raises(KeyError):
        codebook("iq5")

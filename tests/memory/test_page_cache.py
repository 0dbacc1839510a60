"""What the page cache is asked to keep, to drop and to read ahead."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.streamed import draw, streamed, transformer_file
from zimage_core.errors import BadArgument
from zimage_core.formats import by_name
from zimage_core.memory import page_cache
from zimage_core.memory.attach import unstream
from zimage_core.memory.device import Device, Ring
from zimage_core.memory.stream import Block, Segment, Stored
from zimage_core.memory.traffic import Meter
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.load import load_transformer
from zimage_core.weights.opened import open_weights
from zimage_core.weights.source import Source

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is cached")


def cached(path) -> float:
    """Share of a file's pages that are in the page cache."""
    libc, size = ctypes.CDLL(None), path.stat().st_size
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) / len(pages)


@pytest.fixture
def path(tmp_path):
    return transformer_file(tmp_path)


def settled(path):
    """The file on disk, so that its pages may be dropped; skips where the file system keeps them anyway."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    if cached(path) > 0.1:
        pytest.skip("this file system drops nothing")
    return path


@given(st.lists(st.integers(0, 100), max_size=40), st.one_of(st.none(), st.integers(0, 3000)))
def test_what_is_kept_fits_and_nothing_is_dropped_in_vain(sizes, room):
    dropped = page_cache.to_drop(sizes, room)
    kept = sum(size for place, size in enumerate(sizes) if place not in dropped)
    if room is None or sum(sizes) <= room:
        assert not dropped
    else:
        assert kept <= room
        assert dropped <= set(range(len(sizes)))


def test_dropped_blocks_are_spread():
    assert page_cache.to_drop([1] * 12, 6) == {1, 3, 5, 7, 9, 11}
    assert page_cache.to_drop([1] * 4, 0) == {0, 1, 2, 3}


@linux
def test_free_memory_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < page_cache.available() <= total


def test_a_control_group_counts_if_it_has_less(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    monkeypatch.setattr(page_cache, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(page_cache, "_GROUP", tmp_path)
    assert page_cache.available() == 500 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50000\nactive_file 20000\n")
    assert page_cache.available() == 500 * 1024
    (tmp_path / "memory.max").write_text("400000\n")
    assert page_cache.available() == 170000
    monkeypatch.setattr(page_cache, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(page_cache, "_GROUP", tmp_path / "none")
    assert page_cache.available() is None


def test_the_images_are_the_same_whatever_is_cached(path):
    want = draw(load_transformer(path))
    for room in (0, 1 << 20, None):
        model = load_transformer(path)
        with closing(streamed(model, (), page_cache=room)) as stream:
            assert torch.equal(draw(model), want)
            kept = sum(block.payload for block in stream._blocks.values() if block.cached)
            assert room is None or kept <= room
        unstream(model)


@linux
@pytest.mark.parametrize("kept", [True, False])
def test_a_block_that_is_not_kept_leaves_the_page_cache(tmp_path, kept):
    fmt = by_name("Q8_0")
    nbytes = fmt.row_bytes(1024) * 2048
    path = tmp_path / "matrix"
    path.write_bytes(os.urandom(nbytes))
    source = Source(settled(path))
    packed = source.tensor(0, nbytes, 1).view(2048, -1)
    linear = Linear(1024, 2048)
    linear.assign(QuantTensor(packed, fmt, (2048, 1024)))
    stored = Stored(packed.view(-1), source, 0)
    block = Block(0, [Segment(linear, linear.weight, stored, None, 0)], cached=kept)
    slot, device = torch.empty(block.nbytes, dtype=torch.uint8), Device()
    stored.read(0, slot[:nbytes])
    assert cached(path) == 1
    block.load(Ring(device, 1 << 20), slot, 0.0, Meter(device))
    assert cached(path) == (1 if kept else 0)
    assert slot[:nbytes].numpy().tobytes() == path.read_bytes()


def end_of_read_ahead():
    for thread in threading.enumerate():
        if thread.name == "zimage-read-ahead":
            thread.join(120)


@linux
def test_read_ahead_fills_the_page_cache(path):
    with open_weights(settled(path)) as file:
        before = cached(path)
        with page_cache.reading_ahead(file):
            end_of_read_ahead()
        assert before < 0.9, "the header's neighbourhood alone"
        for _ in range(2400):  # the system reads on its own
            if cached(path) > 0.99:
                return
            time.sleep(0.05)
        raise AssertionError(f"{before} of the file were cached, {cached(path)} are")


@linux
def test_read_ahead_leaves_alone_what_does_not_fit(path, monkeypatch):
    with open_weights(settled(path)) as file:
        before = cached(path)
        monkeypatch.setattr(page_cache, "available", lambda: 1000)
        with page_cache.reading_ahead(file):
            end_of_read_ahead()
        time.sleep(0.2)
        assert cached(path) == before < 0.9


def test_hints_on_a_closed_file_do_nothing(path):
    with open_weights(path) as file:
        source = file.source_of(next(iter(file.tensors)))
    source.advise_willneed(0, 100)
    source.advise_dontneed(0, 100)
    with pytest.raises(BadArgument, match="closed"):
        source.read_at(0, 1)

"""Files of importance matrices: ours and llama.cpp's are read, false ones are refused in one sentence."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.gguf_writer import GGUFWriter
from zimage_core.errors import BadArgument, BadFile, WrongModel, ZImageError
from zimage_core.quantize.imatrix import Imatrix, Sums, read_imatrix, write_imatrix

NAME = "layers.0.feed_forward.w2.weight"


def example() -> Imatrix:
    squares = torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4000
    entries = {NAME: Sums(squares, 4000), "blk.0.attn_q.weight": Sums(torch.ones(4, dtype=torch.float64), 5)}
    return Imatrix(entries, ("prompts.txt", "more.txt"), 10)


def legacy(entries, chunks=None, dataset=None) -> bytes:
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += np.asarray(values, "<f4").tobytes()
    if chunks is not None:
        out += struct.pack("<i", chunks)
    if dataset is not None:
        out += struct.pack("<i", len(dataset)) + dataset.encode()
    return out


def test_gguf_comes_back(tmp_path):
    before = example()
    write_imatrix(tmp_path / "a.gguf", before)
    after = read_imatrix(tmp_path / "a.gguf")
    assert (after.datasets, after.chunks) == (before.datasets, before.chunks)
    assert set(after.entries) == set(before.entries)
    for name, sums in before.entries.items():
        assert after.entries[name].count == sums.count
        # one rounding to float32
        torch.testing.assert_close(after.entries[name].squares, sums.squares, rtol=2**-24, atol=0)


def test_legacy_keeps_the_means(tmp_path):
    before = example()
    write_imatrix(tmp_path / "a.dat", before)
    after = read_imatrix(tmp_path / "a.dat")
    assert (after.datasets, after.chunks) == (("more.txt",), 10)
    for name in before.entries:
        # sums / rows * calls, then / calls: three roundings of float32
        torch.testing.assert_close(after.importance(name), before.importance(name), rtol=2**-21, atol=0)
    assert after.entries[NAME].count == 10  # calls of 400 rows


def test_gguf_has_the_keys_and_tensors_of_llama_cpp(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_imatrix(tmp_path / "a.gguf", example())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: f.contents() for name, f in reader.fields.items() if "." in name and f.data}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["prompts.txt", "more.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (10, 400)
    tensors = {t.name: t for t in reader.tensors}
    assert set(tensors) == {f"{n}{end}" for n in example().entries for end in (".in_sum2", ".counts")}
    assert tensors[NAME + ".in_sum2"].shape.tolist() == [6, 1]
    assert tensors[NAME + ".counts"].data.tolist() == [[4000.0]]
    assert all(len(n) < 64 for n in tensors), "ggml refuses longer names"


def test_a_file_of_llama_imatrix_is_read(tmp_path):
    """Its legacy file: sums of calls, no trailer in the oldest ones; names of stable-diffusion.cpp."""
    path = tmp_path / "old.dat"
    path.write_bytes(legacy([("model.diffusion_model." + NAME, 4, [4.0, 8.0]), ("x", 0, [3.0])]))
    imatrix = read_imatrix(path)
    assert imatrix.importance(NAME).tolist() == [1.0, 2.0]
    assert imatrix.importance("x").tolist() == [3.0]
    assert (imatrix.datasets, imatrix.chunks) == ((), 0)


def test_the_name_decides_the_kind_unless_it_is_given(tmp_path):
    write_imatrix(tmp_path / "a.imatrix", example())
    assert (tmp_path / "a.imatrix").read_bytes()[:4] == b"GGUF"
    write_imatrix(tmp_path / "a.imatrix", example(), format="dat", overwrite=True)
    assert (tmp_path / "a.imatrix").read_bytes()[:4] == struct.pack("<i", 2)
    with pytest.raises(BadArgument, match="format: got npz, wanted gguf or dat"):
        write_imatrix(tmp_path / "b", example(), format="npz")
    with pytest.raises(BadFile, match="exists already"):
        write_imatrix(tmp_path / "a.imatrix", example())
    with pytest.raises(BadArgument, match="nothing was collected"):
        write_imatrix(tmp_path / "c", Imatrix())


LEGACY_LIES = {
    "no entries": (struct.pack("<i", 0), "0 entries in 4 bytes"),
    "negative count": (struct.pack("<i", -1) + bytes(64), "-1 entries"),
    "2^31 entries": (struct.pack("<i", 2**31 - 1) + bytes(64), "2147483647 entries in 68 bytes"),
    "name of 2 GB": (struct.pack("<ii", 1, 2**31 - 1) + bytes(64), "name of entry 1 has 2147483647 bytes"),
    "negative name": (struct.pack("<ii", 1, -5) + bytes(64), "needs -5 bytes"),
    "name cut": (struct.pack("<ii", 1, 100) + b"abc" + bytes(20), "needs 100 bytes, 23 remain"),
    "empty name": (struct.pack("<ii", 1, 0) + bytes(64), "tensor name is empty"),
    "escape codes": (legacy([("\x1b[2J", 1, [1.0])]), r"\\x1b\[2J holds control"),
    "2^31 values": (
        struct.pack("<iici", 1, 1, b"a", 1) + struct.pack("<i", 2**31 - 1) + bytes(64),
        "needs 8589934588 bytes, 64 remain",
    ),
    "negative values": (
        struct.pack("<iici", 1, 1, b"a", 1) + struct.pack("<i", -1) + bytes(8),
        "a has -1 values",
    ),
    "name twice": (legacy([("a", 1, [1.0]), ("a", 1, [1.0])]), "a comes twice"),
    "NaN": (legacy([("a", 1, [1.0, float("nan")])]), "a holds a number that is negative or not finite"),
    "infinity": (legacy([("a", 1, [float("inf")])]), "negative or not finite"),
    "below zero": (legacy([("a", 1, [-1.0])]), "negative or not finite"),
    "dataset of 2 GB": (legacy([("a", 1, [1.0])], 1) + struct.pack("<i", 2**31 - 1), "2147483647 bytes"),
    "a zip": (b"PK\x03\x04" + bytes(64), "a zip archive"),
    "text": (b"a red circle on a white background\n" * 4, "not an importance matrix"),
}


@pytest.mark.parametrize("case", LEGACY_LIES)
def test_a_lie_in_a_legacy_file_is_named(case, tmp_path):
    data, words = LEGACY_LIES[case]
    path = tmp_path / "lie.dat"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(BadFile, match=words) as caught:
            read_imatrix(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def gguf(**changes) -> GGUFWriter:
    writer = GGUFWriter().key("general.type", "imatrix").key("imatrix.datasets", ["x"])
    tensors = {
        "a.in_sum2": np.ones((1, 4), np.float32),
        "a.counts": np.ones((1, 1), np.float32),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    for name, value in tensors.items():
        if value is not None:
            writer.tensor(name, value)
    return writer


GGUF_LIES = {
    "no counts": (gguf(a__counts=None), "a.counts is missing, F32 is wanted"),
    "float16": (gguf(a__in_sum2=np.ones((1, 4), np.float16)), "a.in_sum2 is F16, F32 is wanted"),
    "experts": (gguf(a__in_sum2=np.ones((2, 4), np.float32)), "matrices of experts"),
    "counts of experts": (gguf(a__counts=np.ones((2, 1), np.float32)), "has 2 counts, 1 wanted"),
    "NaN": (gguf(a__in_sum2=np.full((1, 4), np.nan, np.float32)), "a holds a number that is negative or"),
    "negative count": (gguf(a__counts=-np.ones((1, 1), np.float32)), "negative or not finite"),
}


@pytest.mark.parametrize("case", GGUF_LIES)
def test_a_lie_in_a_gguf_file_is_named(case, tmp_path):
    writer, words = GGUF_LIES[case]
    with pytest.raises(BadFile, match=words):
        read_imatrix(writer.write(tmp_path / "lie.gguf"))


def test_noise_levels_that_earlier_versions_wrote_are_passed_over(tmp_path):
    writer = gguf(a__in_sum2_levels=np.ones((2, 4), np.float32), a__counts_levels=np.ones((2, 1), np.float32))
    writer.key("zimage.imatrix.edges", [0.5], "f64")
    assert set(read_imatrix(writer.write(tmp_path / "a.gguf")).entries) == {"a"}


def test_a_model_is_not_taken_for_an_imatrix(tmp_path):
    writer = GGUFWriter().key("general.architecture", "lumina2").tensor("a.weight", np.ones(4, np.float32))
    with pytest.raises(WrongModel, match="a GGUF file of lumina2 without sums of squares"):
        read_imatrix(writer.write(tmp_path / "model.gguf"))


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_every_cut_is_refused_or_harmless(suffix, tmp_path):
    """Cut at every byte: an error of ours, or (legacy, whose end is optional) the whole of the entries."""
    path = tmp_path / f"a.{suffix}"
    write_imatrix(path, example())
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with contextlib.suppress(ZImageError):
            assert set(read_imatrix(path).entries) == set(example().entries), size


@given(st.binary(max_size=120))
def test_any_bytes_are_refused_with_an_error_of_ours(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "a"
    path.write_bytes(data)
    with contextlib.suppress(ZImageError):
        assert read_imatrix(path).entries

"""Written headers are read back correctly by our strict readers and by other libraries."""

from __future__ import annotations

import json
import math

import gguf
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zimage_core import FORMATS, BadArgument, Unsupported, open_weights
from zimage_core.export import safetensors_file
from zimage_core.weights import gguf_writer
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.gguf_writer import TypedArray
from zimage_core.weights.safetensors import SafetensorsFile

NAMES = st.text(st.sampled_from("abc.0_é"), min_size=1, max_size=12)
NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-(1 << 31), (1 << 64) - 1),
    st.text(max_size=20),
    st.floats(width=32, allow_nan=False),
)
ARRAYS = st.one_of(
    st.lists(st.text(max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(-5, 1 << 20), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=1, max_size=4),
)
PACKED = [f for f in FORMATS.values() if f.ggml_type is not None and f.weights <= 256]
SHARED = [FORMATS[name] for name in ("F32", "F16", "BF16", "F64", "I8")]


@st.composite
def tensors(draw, formats):
    rows = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)):
        fmt = draw(st.sampled_from(formats))
        shape = (*draw(st.lists(st.integers(1, 4), max_size=2)), fmt.weights * draw(st.integers(1, 3)))
        rows[name] = (shape, fmt)
    return rows


quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def fill(place, layout):
    """The header, then each tensor's bytes as its number."""
    data = bytearray(layout.nbytes)
    data[: len(layout.header)] = layout.header
    for number, (offset, nbytes) in enumerate(layout.places.values()):
        data[offset : offset + nbytes] = bytes([number]) * nbytes
    place.write_bytes(data)


@quick
@given(st.dictionaries(NAMES, st.one_of(NUMBERS, ARRAYS), max_size=5), tensors(PACKED))
def test_a_gguf_is_read_as_it_was_meant(tmp_path, keys, rows):
    place = tmp_path / "a.gguf"
    layout = gguf_writer.lay_out(keys, [(name, *row) for name, row in rows.items()])
    fill(place, layout)
    with open_weights(place) as file:
        assert isinstance(file, GGUFFile)
        assert (file.version, file.alignment) == (3, 32)
        found = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in file.metadata.items()}
        assert found == keys
        assert gguf_writer.raw_keys(file).keys() == keys.keys()
        again = gguf_writer.lay_out(gguf_writer.raw_keys(file), [(n, *row) for n, row in rows.items()])
        assert again.header == layout.header, "types of keys survive"
        assert {n: (t.shape, t.format) for n, t in file.tensors.items()} == rows
        for number, name in enumerate(rows):
            data = file.source.read_at(file.tensors[name].offset, file.tensors[name].nbytes)
            assert set(data) == {number}
    known = {t.value for t in gguf.GGMLQuantizationType}
    if all(fmt.ggml_type in known for _, fmt in rows.values()):
        theirs = {t.name: t for t in gguf.GGUFReader(place).tensors}
        for name, (shape, fmt) in rows.items():
            assert tuple(theirs[name].shape[::-1]) == shape
            assert theirs[name].n_bytes == math.prod(shape[:-1]) * fmt.row_bytes(shape[-1])


@quick
@given(tensors(SHARED))
def test_a_safetensors_file_is_read_as_it_was_meant(tmp_path, rows):
    place = tmp_path / "a.safetensors"
    layout = safetensors_file.lay_out({"format": "pt"}, [(name, *row) for name, row in rows.items()])
    fill(place, layout)
    with SafetensorsFile(place) as file:
        assert {n: (t.shape, t.format) for n, t in file.tensors.items()} == rows
        assert all(t.offset % t.format.nbytes == 0 for t in file.tensors.values()), "views need no copy"
        assert file.metadata == {"format": "pt"}
    with safetensors.safe_open(place, "np") as theirs:
        assert set(theirs.keys()) == set(rows)


@given(tensors(SHARED), st.integers(1, 500))
def test_shards_hold_every_tensor_once_and_stay_small(rows, limit):
    table = [(name, *row) for name, row in rows.items()]
    parts = safetensors_file.shards(table, limit)
    assert [row for part in parts for row in part] == table
    for part in parts:
        assert len(part) == 1 or sum(map(safetensors_file.nbytes_of, part)) <= limit
    index = json.loads(safetensors_file.index_text("m", parts))
    assert set(index["weight_map"]) == set(rows)


def test_what_a_container_cannot_hold_is_refused():
    with pytest.raises(Unsupported, match="GGUF has no place for F8_E4M3"):
        gguf_writer.lay_out({}, [("a", (4,), FORMATS["F8_E4M3"])])
    with pytest.raises(Unsupported, match="GGUF has no place for F32"):
        gguf_writer.lay_out({}, [("a", (1,) * 5, FORMATS["F32"])])
    with pytest.raises(Unsupported, match="safetensors cannot hold"):
        safetensors_file.lay_out({}, [("a", (32,), FORMATS["Q8_0"])])
    with pytest.raises(BadArgument, match="no type for"):
        gguf_writer.lay_out({"a": None}, [])
    with pytest.raises(BadArgument, match="several types"):
        gguf_writer.lay_out({"a": [1, "b"]}, [])
    with pytest.raises(BadArgument, match="no type for"):
        gguf_writer.lay_out({"a": 1 << 64}, [])


def test_an_empty_array_keeps_the_type_that_was_asked_for(tmp_path):
    layout = gguf_writer.lay_out({"merges": TypedArray([], "string"), "types": TypedArray([1], "i32")}, [])
    fill(tmp_path / "a.gguf", layout)
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert file.metadata["merges"].item_type == "string"
        assert file.metadata["types"].item_type == "i32"

"""The safetensors reader gives back what was written, and accepts one reading of a header only."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from zimage_core.errors import BadArgument, BadFile
from zimage_core.weights import safetensors, safetensors_header
from zimage_core.weights.opened import open_weights
from zimage_core.weights.safetensors import DTYPES, SafetensorsFile, ShardedSafetensors
from zimage_core.weights.safetensors_header import HeaderParser

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """name -> (dtype, shape, bytes), laid out in order; the data starts where the header happens to end."""
    header, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    path.write_bytes(raw(header, b"".join(data for *_, data in tensors.values())))
    return path


def entry(dtype="F32", shape=(4,), offsets=(0, 16), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize("mmap", [True, False])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, mmap):
    assert set(TORCH) == set(DTYPES)
    rng = torch.Generator().manual_seed(0)
    wanted = {
        name: torch.randint(0, 2, (3, 8), dtype=torch.uint8, generator=rng).to(dtype)
        for name, dtype in TORCH.items()
    }
    path = tmp_path / "a.safetensors"
    save_file(wanted, path, {"format": "pt", "ключ": 'quote " and \\ slash'})
    with open_weights(path, mmap=mmap) as file:
        assert isinstance(file, SafetensorsFile)
        assert file.metadata == {"format": "pt", "ключ": 'quote " and \\ slash'}
        assert set(file.tensors) == set(wanted)
        for name, tensor in wanted.items():
            got = file.tensor(name)
            assert got.shape == (3, 8)
            assert got.format is DTYPES[name]
            assert torch.equal(got.packed, tensor.view(torch.uint8).view(3, -1))


def test_scalars_empty_tensors_and_unaligned_data(tmp_path):
    numbers = struct.pack("<3f", 1.5, -2, 3)
    tensors = {
        "byte": ("U8", [1], b"x"),
        "s": ("F32", [], numbers[:4]),
        "z": ("F32", [0, 4], b""),
        "w": ("F32", [2], numbers[4:]),
    }
    with open_weights(write_safetensors(tmp_path / "a", tensors)) as file:
        assert file.tensors["w"].offset % 4, "the case that needs a copy"
        assert file.tensor("w").packed.view(torch.float32).tolist() == [-2, 3]
        assert file.tensor("s").shape == ()
        assert file.tensor("s").packed.view(torch.float32).tolist() == [1.5]
        assert file.tensor("z").shape == (0, 4)
        assert file.tensor("z").packed.shape == (0, 16)


def test_header_order_is_free(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(raw({"b": entry(offsets=(16, 32)), "a": entry()}, bytes(range(32))))
    with open_weights(path) as file:
        assert list(file.tensors) == ["b", "a"]
        assert file.tensor("b").packed[0] == 16


@given(st.data())
def test_white_space_and_field_order_change_nothing(data):
    shape = data.draw(st.lists(st.integers(0, 10**19), max_size=8))
    offsets = [data.draw(st.integers(0, 10**19)) for _ in range(2)]
    fields = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
    usual = json.dumps({"näme": fields}, separators=(",", ":"), ensure_ascii=data.draw(st.booleans()))
    shuffled = {key: fields[key] for key in data.draw(st.permutations(sorted(fields)))}
    spaced = json.dumps({"näme": shuffled}, indent=data.draw(st.integers(0, 3)))
    for text in (usual, spaced):
        got = HeaderParser("file", bytearray(text.encode())).parse()
        assert got == ({}, {"näme": ("BF16", shape, offsets)})


@given(st.text(), st.booleans())
def test_strings_are_read_as_json_reads_them(text, escaped):
    encoded = json.dumps({"__metadata__": {"k": text}}, ensure_ascii=escaped)
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(BadFile):
            HeaderParser("file", bytearray(encoded.encode("utf-8", "surrogatepass"))).parse()
        return
    assert HeaderParser("file", bytearray(encoded.encode())).parse()[0] == {"k": text}


HEADERS = {
    "truncated: 7 bytes": b"\x10" + bytes(6),
    "header of length 9223372036854775808": raw({"a": entry()}, length=1 << 63),
    "truncated or damaged: header of length": raw({"a": entry()}, length=1000),
    "header of length 0": b"\0" * 8 + b"{}",
    "JSON must begin with {": raw(b"[1,2,3]", bytes(16)),
    "JSON must begin with {, found b'hello": raw(b"hello, world", bytes(16)),
    r"found b'\\xef": raw(b"\xef\xbb\xbf{}"),
    "extra bytes are trailing": raw(b'{"a":1}'.replace(b'"a":1', b"") + b"x"),
    "4 extra bytes are trailing": raw(json.dumps({"a": entry()}).encode() + bytes(4), bytes(16)),
    "is not UTF-8": raw(b'{"\xff\xfe":{}}'),
    "Unterminated string": raw(b'{"a":{"dtype":"F32'),
    "invalid JSON at character 19": raw(b'{"a":{"dtype":"F32"'),
    "the shape of tensor a holds NaN": raw({"a": entry(shape=[math.nan])}, bytes(16)),
    "JSON nested too deep": raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "duplicate tensor name a": raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(16)),
    "duplicate field shape": raw(b'{"a":{"dtype":"F32","shape":[4],"shape":[2,2],"data_offsets":[0,16]}}'),
    "duplicate __metadata__": raw(b'{"__metadata__":{},"__metadata__":{}}'),
    "duplicate key k": raw(b'{"__metadata__":{"k":"1","k":"2"}}'),
    "values of __metadata__ are strings": raw({"__metadata__": {"a": 1}}),
    "to open __metadata__": raw({"__metadata__": [1]}),
    "holds 9{27}...": raw(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,16]}}' % (b"9" * 100_000)),
    "is missing dtype and data_offsets": raw({"a": {"shape": [4]}}),
    "unknown field evil": raw({"a": entry(evil="x")}, bytes(16)),
    "unknown dtype F33": raw({"a": entry("F33")}, bytes(16)),
    "unknown dtype f32": raw({"a": entry("f32")}, bytes(16)),
    "as the dtype of tensor a": raw({"a": entry(7)}, bytes(16)),
    "its offsets give 16": raw({"a": entry(shape=[8])}, bytes(16)),
    "ends at 0, before its start at 16": raw({"a": entry(shape=[0], offsets=(16, 0))}, bytes(16)),
    "need .* bytes by their offsets, the file": raw({"a": entry(shape=[64], offsets=(0, 256))}, bytes(16)),
    "leaves a hole": raw({"a": entry(), "b": entry(offsets=(32, 48))}, bytes(48)),
    "leaves a hole before it": raw({"a": entry(offsets=(16, 32))}, bytes(32)),
    "overlaps the one before": raw({"a": entry(), "b": entry(offsets=(8, 24))}, bytes(24)),
    "z overlaps": raw({"a": entry(), "z": entry(shape=[0], offsets=(8, 8))}, bytes(16)),
    "48 bytes after the last tensor": raw({"a": entry()}, bytes(64)),
    "8 bytes after the last tensor": raw({}, bytes(8)),
    "data_offsets of tensor a holds -16": raw({"a": entry(offsets=(-16, 0))}, bytes(16)),
    'data_offsets of tensor a holds "0"': raw({"a": entry(offsets=("0", "16"))}, bytes(16)),
    "has length 1, 2 is wanted": raw({"a": entry(offsets=(0,))}, bytes(16)),
    "data_offsets of tensor a has more than 2": raw({"a": entry(offsets=(0, 16, 16))}, bytes(16)),
    "holds 4\\.0": raw({"a": entry(shape=[4.0])}, bytes(16)),
    "invalid JSON at character 30": raw(b'{"a":{"dtype":"F32","shape":[04]}}', bytes(16)),
    "shape whose size exceeds any file": raw({"a": entry(shape=[1 << 32, 1 << 32, 4])}, bytes(16)),
    "a has a shape whose size exceeds": raw({"a": entry(shape=[0, 1 << 62, 1 << 62], offsets=(0, 0))}),
    "shape of tensor a has more than 8": raw({"a": entry(shape=[1] * 10_000 + [4])}, bytes(16)),
    "tensor name .* holds control characters": raw({"\x1b[2J\n": entry()}, bytes(16)),
    "a tensor name is empty": raw({"": entry()}, bytes(16)),
    "a tensor name has 2000 characters": raw({"n" * 2000: entry()}, bytes(16)),
    "string as a tensor name is not UTF-8 text": raw({"\ud800x": entry()}, bytes(16)),
    r"Invalid \\escape": raw(b'{"\\q":{}}'),
    "Invalid control character": raw(b'{"a\nb":{}}'),
    "tensor a holds 1e5": raw(b'{"a":{"dtype":"F32","shape":[1e5],"data_offsets":[0,16]}}', bytes(16)),
    "the shape of tensor a holds true": raw({"a": entry(shape=[True])}, bytes(16)),
    r"to open the shape of tensor a, found \{": raw({"a": entry(shape=[]) | {"shape": {}}}, bytes(16)),
    "it has more than 500000 lists": raw(b'{"a":[' + b"[]," * 500_000 + b"[]]}"),
    "it has more than 2000000 texts": raw(b'{"a":[' + b'"",' * 2_000_000 + b'""]}'),
    "tensor count exceeds": raw(b'{"a":[' + b"1," * 1_000_001 + b"1]}"),
    "the tensor count exceeds 100000": raw(b"{" + b'"a":{},' * 100_002 + b'"a":{}}'),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEADERS, ids=lambda fault: fault[:40])
def test_a_damaged_header_is_refused_and_the_fault_named(tmp_path, fault):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[fault])
    with pytest.raises(BadFile, match=fault) as caught:
        open_weights(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


def test_escapes_cannot_smuggle_tensors_past_the_count(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 1000)
    item = '"t%d":{"dtype":"F32","shape":[0],"data\\u005foffsets":[0,0]}'
    path = tmp_path / "a"
    path.write_bytes(raw(("{" + ",".join(item % i for i in range(1001)) + "}").encode()))
    with pytest.raises(BadFile, match="the tensor count exceeds 1000"):
        open_weights(path)


def test_a_header_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(100_000_100)  # sparse
    with pytest.raises(BadFile, match="header of length 100000001, from 2 to 100000000"):
        open_weights(path)


def test_a_header_length_that_reads_as_a_brace_is_no_index(tmp_path):
    header = json.dumps({"a": entry()}).encode()
    path = tmp_path / "a"
    path.write_bytes(raw(header + b" " * (ord("{") - len(header)), bytes(16)))
    assert path.read_bytes()[:1] == b"{"
    with open_weights(path) as file:
        assert list(file.tensors) == ["a"]


# ----- shards -----


@pytest.fixture
def shards(tmp_path):
    """Two shards and an index, as diffusers writes them."""
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.arange(4.0), "b": torch.ones(2, 3)},
        "model-00002-of-00002.safetensors": {"c": torch.full((5,), 7, dtype=torch.bfloat16)},
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / name, {"format": "pt"})
    places = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    write_index(tmp_path, places)
    return tmp_path, {key: value for tensors in parts.values() for key, value in tensors.items()}


def write_index(folder, places, **more):
    document = {"metadata": {"total_size": 50}, "weight_map": places, **more}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


@pytest.mark.parametrize("which", ["folder", "index"])
def test_shards_read_as_one_file(shards, which):
    folder, wanted = shards
    path = folder if which == "folder" else folder / "model.safetensors.index.json"
    with open_weights(path) as file:
        assert isinstance(file, ShardedSafetensors)
        assert file.metadata == {"format": "pt"}
        assert list(file.tensors) == ["a", "b", "c"]
        assert file.size == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        for name, tensor in wanted.items():
            assert torch.equal(
                file.tensor(name).packed, tensor.view(torch.uint8).view(*tensor.shape[:-1], -1)
            )
        file.check_unchanged()
        os.truncate(folder / "model-00002-of-00002.safetensors", 20)
        with pytest.raises(BadFile, match=r"model-00002-of-00002.* changed while in use"):
            file.check_unchanged()
    with pytest.raises(BadArgument, match="closed"):
        file.shards["model-00001-of-00002.safetensors"].source.read_at(0, 1)


def test_a_missing_or_cut_shard_is_named(shards):
    folder, _ = shards
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(BadFile, match=r"model-00002-of-00002.*truncated: the tensors need"):
        open_weights(folder)
    second.unlink()
    with pytest.raises(
        BadFile, match=r"the shard model-00002-of-00002.safetensors is missing, which holds 1"
    ):
        open_weights(folder)


def test_one_shard_alone_is_refused_also_when_renamed(shards):
    folder, _ = shards
    first = folder / "model-00001-of-00002.safetensors"
    with pytest.raises(BadFile, match="shard 1 of 2, incomplete"):
        open_weights(first)
    with pytest.raises(
        BadFile, match=r"incomplete: exactly one of the 2 shards of model\.safetensors\.index\.json"
    ):
        open_weights(first.rename(folder / "model.safetensors"))


def test_a_whole_file_beside_an_index_is_fine(shards):
    folder, wanted = shards
    save_file(wanted, folder / "whole.safetensors")
    with open_weights(folder / "whole.safetensors") as file:
        assert set(file.tensors) == set(wanted)


def test_a_damaged_index_beside_a_whole_file_is_not_its_fault(shards):
    folder, wanted = shards
    save_file(wanted, folder / "whole.safetensors")
    (folder / "model.safetensors.index.json").write_text("{")
    open_weights(folder / "whole.safetensors").close()


def test_an_index_has_a_size_limit(shards, monkeypatch):
    monkeypatch.setattr(safetensors, "MAX_INDEX", 10)
    with pytest.raises(BadFile, match=r"an index of \d+ bytes, at most 10 are allowed"):
        open_weights(shards[0])


def test_index_and_shards_must_agree(shards):
    folder, _ = shards
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(folder, {"a": first, "b": first, "c": second, "d": second})
    with pytest.raises(BadFile, match=r"00002.*: tensor d and 0 more of the index are missing"):
        open_weights(folder)
    write_index(folder, {"a": first, "c": second})
    with pytest.raises(BadFile, match=r"00001.*: holds tensor b, which the index does not place in it"):
        open_weights(folder)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", ".x.safetensors", "", "x", 7, None,
     "a\0.safetensors", "C:x.safetensors", "n" * 300 + ".safetensors"],
)  # fmt: skip
def test_an_index_entry_is_a_file_name_in_the_same_folder(shards, shard):
    folder, _ = shards
    write_index(folder, {"a": shard})
    with pytest.raises(BadFile, match=r"the index places a tensor in .* a name in its own folder is wanted"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"', "index is not valid JSON"),
        ("{" + '"a":{' * 50_000, "index is JSON nested too deep|not valid JSON"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "duplicate key"),
        ('{"metadata": {}}', "not an index of shards: no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a\\n": "x.safetensors"}}', "holds control characters"),
        (json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(1001)}}), "lists 1001 shards"),
        (json.dumps({"weight_map": {f"t{i}": "x.safetensors" for i in range(100_001)}}), "100001 tensors"),
        ('{"x": ' + "9" * 100_000 + "}", "no weight_map"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, text, fault):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(BadFile, match=fault):
        open_weights(path)


def test_numpy_bits_agree_with_the_packed_view(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_file({"w": torch.from_numpy(array)}, tmp_path / "a.safetensors")
    with open_weights(tmp_path / "a.safetensors") as file:
        assert np.array_equal(file.tensor("w").dequantize().numpy(), array)

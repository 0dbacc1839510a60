"""Nothing in a file gets past the readers: they refuse with one sentence, or what they accept is sound.

Each structured case is one lie in an otherwise honest file, with the words that must name it; cuts are tried
at every byte.
"""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

from tests.helpers.gguf_writer import GGUFWriter, Packed, Raw, random_packed
from tests.weights.test_safetensors import entry, raw
from zimage_core.errors import BadFile, UnknownFormat
from zimage_core.formats import FORMATS
from zimage_core.weights import cursor
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.opened import open_weights
from zimage_core.weights.scan import scan

HUGE = (1 << 64) - 1
DEEPER = struct.pack("<IQ", 9, 1)  # an array of one array
ONES = np.ones(32, np.float32)


def base():
    """A small honest file with keys of several types and tensors of several formats."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter().key("general.architecture", "lumina2").key("x.eps", 1e-5).key("x.flag", True)
    writer.key("x.words", ["a", "bc", ""]).key("x.dims", [1, 2, 3], "i32")
    writer.tensor("x_embedder.bias", np.ones(8, np.float32))
    writer.tensor("layers.0.w1.weight", random_packed("Q8_0", (8, 64), rng))
    return writer.tensor("layers.0.w2.weight", random_packed("Q4_K", (4, 256), rng))


def sized(kind: int, count: int, body: bytes = b"\1" * 64) -> Raw:
    """An array that claims `count` items."""
    return Raw(struct.pack("<IQ", kind, count) + body)


def key(name, value, kind=None, **lies):
    return lambda writer: writer.key(name, value, kind, **lies)


def tensor(content=ONES, name="t", **lies):
    return lambda writer: writer.tensor(name, content, **lies)


def header(**lies):
    def lie(writer):
        for name, value in lies.items():
            setattr(writer, name, value)

    return lie


def string(length):
    return key("x.s", Raw(struct.pack("<Q", length) + b"abc"), "str")


def dims(*sizes):
    return tensor(dims=sizes)


@contextmanager
def memory():
    """A list that holds the peak of Python's memory in bytes once the block is left."""
    peak: list[int] = []
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()


SIZE = "truncated"
CASES = {
    # header
    "version 0": (header(version=0), "GGUF version 0 cannot be read, versions 2 and 3 can"),
    "version 1": (header(version=1), "GGUF version 1 cannot.*convert the model again"),
    "version 4": (header(version=4), "GGUF version 4 "),
    "2^64 tensors": (header(tensor_count=HUGE), f"count of {HUGE} tensors needs"),
    "one tensor more": (header(tensor_count=4), "a tensor name is empty"),
    "70000 tensors": (lambda w: [w.tensor(f"t{i}", ONES[:1]) for i in range(65_600)], "count of 65603"),
    "2^64 keys": (header(key_count=HUGE), f"count of {HUGE} keys needs"),
    "one key more": (header(key_count=6), "name is empty|type"),
    "one key less": (header(key_count=4), "truncated|tensor|name"),
    "70000 keys": (lambda w: [w.key(f"k{i}", 1) for i in range(65_600)], "a count of 65605 metadata keys"),
    # keys
    "key of 2^63 bytes": (key("k", 1, length=1 << 63), "a metadata key"),
    "key of 70000 bytes": (key("k" * 70_000, 1), "a metadata key is a string of 70000 bytes"),
    "empty key": (key("", 1), "a metadata key is empty"),
    "key with NUL": (key("gen\0eral", 1), r"metadata key gen\\x00eral holds control characters"),
    "key with escape codes": (key("\x1b[2J\nerror:", 1), r"metadata key \\x1b\[2J\\nerror: holds control"),
    "key not UTF-8": (key(b"\xff", 1), "a metadata key is not UTF-8"),
    "duplicate key": (key("x.eps", 1.0), "duplicate metadata key x.eps"),
    "value type 13": (key("x.t", Raw(bytes(8)), 13), "key x.t has the unknown value type 13"),
    "value type 2^32-1": (key("x.t", Raw(bytes(8)), (1 << 32) - 1), "unknown value type 4294967295"),
    "bool 2": (key("x.b", Raw(b"\2"), "bool"), "key x.b is a bool of value 2"),
    "string of 2^64-1": (string(HUGE), rf"the value of x.s \(a string of {HUGE} bytes\)"),
    "string of 2^63": (string(1 << 63), "a string of 9223372036854775808 bytes"),
    "string not UTF-8": (key("x.s", b"\xff", "str"), "the value of x.s is not UTF-8 text"),
    "array of 2^64-1 bytes": (key("x.a", sized(0, HUGE), "array"), f"array x.a of {HUGE} items needs"),
    "array of 2^62 u32": (key("x.a", sized(4, 1 << 62), "array"), f"array x.a of {1 << 62} items needs"),
    "array of 2^61 strings": (key("x.a", sized(8, 1 << 61), "array"), f"array x.a of {1 << 61} items"),
    "string in array too long": (
        key("x.a", sized(8, 1, struct.pack("<Q", HUGE)), "array"),
        f"a string of array x.a needs {HUGE} bytes",
    ),
    "array of type 99": (key("x.a", sized(99, 0), "array"), "array x.a has the unknown item type 99"),
    "array nested 9 deep": (key("x.a", Raw(DEEPER * 8 + sized(0, 1)), "array"), "arrays deeper"),
    "array nested 10^5 deep": (
        key("x.a", Raw(DEEPER * 100_000 + sized(0, 1)), "array"),
        "key x.a nests arrays deeper than 8",
    ),
    "65537 arrays": (key("x.a", sized(9, 65_537, bytes(12) * 65_537), "array"), "more than 65536 arrays"),
    "17 Mi items": (
        key("x.a", sized(0, 17 << 20, bytes(17 << 20)), "array"),
        "array x.a has 17825792 items, at most 16777216",
    ),
    "alignment 0": (key("general.alignment", 0), "general.alignment is 0"),
    "alignment 1": (key("general.alignment", 1), "general.alignment is 1 "),
    "alignment 33": (key("general.alignment", 33), "general.alignment is 33"),
    "alignment 2^31": (key("general.alignment", 1 << 31), "general.alignment is 2147483648"),
    "alignment as u64": (key("general.alignment", 32, "u64"), r"alignment is 32 \(value type 10\); a u32"),
    "alignment as text": (key("general.alignment", "32"), r"general.alignment is 32 \(value type 8\)"),
    "alignment as array": (key("general.alignment", [32]), r"alignment is LazyArray.* \(value type 9\)"),
    "alignment twice": (
        lambda w: w.key("general.alignment", 32).key("general.alignment", 64),
        "duplicate metadata key general.alignment",
    ),
    "alignment 64, data at 32": (key("general.alignment", 64), "offset 32 of tensor .* not aligned to 64"),
    "architecture no text": (
        lambda w: w.keys.__setitem__(0, ("general.architecture", 9, Raw(w._array("str", ["a"])), None)),
        "general.architecture has value type 9, a string is wanted",
    ),
    "part 2 of 5": (
        lambda w: w.key("split.no", 1, "u16").key("split.count", 5, "u16"),
        "part 2 of 5 of a split model.*llama-gguf-split --merge",
    ),
    # tensors
    "name of 2^64-1 bytes": (tensor(name_length=HUGE), "a tensor name"),
    "name of 2000 bytes": (tensor(name="n" * 2000), "a tensor name is a string of 2000 bytes, at most 1024"),
    "empty name": (tensor(name=""), "a tensor name is empty"),
    "name not UTF-8": (tensor(name=b"\xff\xfe"), "a tensor name is not UTF-8 text"),
    "name with escape codes": (tensor(name="\x1b[2J\nOK"), r"the tensor name \\x1b\[2J\\nOK holds control"),
    "name that turns the text": (tensor(name="a\u202eb"), r"the tensor name a\\u202eb holds control"),
    "duplicate name": (tensor(name="x_embedder.bias"), "duplicate tensor name x_embedder.bias"),
    "5 dimensions": (tensor(np.ones((2, 2, 2, 2, 2), np.float32)), "tensor t has 5 dimensions, at most 4"),
    "2^31 dimensions": (tensor(dim_count=1 << 31), "tensor t has 2147483648 dimensions"),
    "dimension 0": (dims(0, 4), r"tensor t has the shape \(4, 0\) with a dimension of zero"),
    "dimension 0, huge": (dims(0, 1 << 62, 1 << 62), "with a dimension of zero"),
    "2^64-1 items": (dims(HUGE), SIZE),
    "2^63 items": (dims(1 << 63), SIZE),
    "2^32 x 2^32": (dims(1 << 32, 1 << 32), SIZE),
    "wraps to 0": (dims(*[1 << 16] * 4), SIZE),
    "wraps to 32": (dims(0x123456789ABCDEF1, 32 * pow(0x123456789ABCDEF1, -1, 1 << 64) % (1 << 64)), SIZE),
    "bytes wrap to 32": (dims((1 << 62) + 8), SIZE),
    "padding wraps": (dims((1 << 62) - 1), SIZE),
    "sizes wrap": (
        lambda w: [w.tensor(n, ONES, dims=[(1 << 63) - 64], number=24) for n in ("a", "b")],
        SIZE,
    ),
    "1 TiB": (dims(1 << 20, 1 << 18), "truncated: needs 109951162.* bytes, the file has"),
    "8 GiB": (dims(1 << 16, 1 << 15), SIZE),
    "row of 33 in Q8_0": (tensor(number=8, dims=[33, 32]), "rows of 33, its type Q8_0 stores blocks of 32"),
    "row of 128 in Q4_K": (tensor(number=12, dims=[128, 2]), "rows of 128, its type Q4_K stores blocks of"),
    "row of 32 in type 42": (tensor(number=42), "has rows of 32, its type Q2_0 stores blocks of 64"),
    "type 4": (tensor(number=4), "tensor t: GGUF tensor type 4 "),
    "type 2^32-1": (tensor(number=(1 << 32) - 1), "tensor t: GGUF tensor type 4294967295 "),
    "offset 1": (tensor(offset=1), "the offset 1 of tensor t is not aligned to 32 bytes"),
    "same bytes": (tensor(offset=0), "tensors .* and .* overlap"),
    "partly the same bytes": (tensor(offset=64), "tensors .* overlap"),
    "offset 2^40": (tensor(offset=1 << 40), SIZE),
    "offset 2^63": (tensor(offset=1 << 63), SIZE),
    "offset wraps": (tensor(offset=(1 << 64) - 32), SIZE),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_lie_is_refused_and_named(tmp_path, case):
    lie, words = CASES[case]
    writer = base()
    lie(writer)
    path = writer.write(tmp_path / "model.gguf")
    with memory() as peak, pytest.raises((BadFile, UnknownFormat), match=words) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 600
    assert peak[0] < 64 << 20


def test_an_offset_that_wraps_to_the_header_is_refused(tmp_path):
    writer = base().tensor("t", ONES, offset=0)
    data = bytearray(writer.build())
    struct.pack_into("<Q", data, writer.marks["tensor3.offset"], (1 << 64) - writer.marks["data"])
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=r"not aligned|truncated"):
        open_weights(path)


def test_values_that_look_dangerous_are_only_text(tmp_path):
    writer = base().key("general.name", "\x1b[2J\x1b]0;pwn\x07\nOK: fake")
    writer.key("tokenizer.chat_template", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    writer.tensor("../../../../tmp/x", ONES).tensor("/etc/passwd", ONES).tensor("a.__class__.__init__", ONES)
    with open_weights(writer.write(tmp_path / "model.gguf")) as file:
        assert file.metadata["general.name"].startswith("\x1b")
        assert "/etc/passwd" in file.tensors
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("build", "megabytes"),
    [
        (lambda w: w.key("x.a", sized(0, 4 << 20, b"\1" * (4 << 20)), "array"), 8),
        (lambda w: w.key("x.a", sized(8, 1 << 18, bytes(2 << 20)), "array"), 4),
        (lambda w: [w.key(f"k{i}", i) for i in range(5000)], 8),
        (lambda w: [w.tensor(f"layers.{i}.w", ONES[:8]) for i in range(5000)], 8),
    ],
    ids=["4 Mi bytes", "256 Ki empty strings", "5000 keys", "5000 tensors"],
)
def test_large_but_honest_headers_take_little_memory(tmp_path, build, megabytes):
    writer = base()
    build(writer)
    path = writer.write(tmp_path / "model.gguf")
    del writer
    with memory() as peak, open_weights(path) as file:
        assert len(file.tensors) >= 3
    assert peak[0] < megabytes << 20


def test_a_gguf_cut_at_any_byte_says_so(tmp_path):
    writer = base()
    data = writer.build()
    path = tmp_path / "model.gguf"
    last = len(data)
    header_end = writer.marks["data"]
    for size in [*range(header_end), *range(header_end, last, 97), last - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(BadFile) as caught:
            open_weights(path)
        message = str(caught.value)
        assert "truncated" in message or size == 0, f"cut at {size}: {message}"
        assert "download it again" in message
    assert f"needs {last} bytes, the file has {last - 1}" in message


def test_a_safetensors_cut_at_any_byte_says_so(tmp_path):
    data = raw(
        {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(offsets=(16, 32))}, bytes(range(1, 33))
    )
    path = tmp_path / "model.safetensors"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(BadFile) as caught:
            open_weights(path)
        message = str(caught.value)
        assert "truncated" in message or size == 0, f"cut at {size}: {message}"
    assert f"need {len(data)} bytes by their offsets, the file has {len(data) - 1}" in message


def test_the_honest_file_is_accepted(tmp_path):
    """The lies above are what is refused, not the file that carries them."""
    with open_weights(base().write(tmp_path / "model.gguf")) as file:
        assert len(file.tensors) == 3
        assert scan(file) == []
    writer = base().tensor("t", Packed(FORMATS["Q2_0"], (1, 64), bytes(18)))
    with open_weights(writer.write(tmp_path / "other.gguf")) as file:
        assert file.tensors["t"].format.name == "Q2_0"


def test_limits_that_only_large_files_reach(tmp_path, monkeypatch):
    path = base().key("x.long", ["word" * 100]).write(tmp_path / "model.gguf")
    monkeypatch.setattr(cursor, "MAX_STRING", 300)
    with pytest.raises(BadFile, match=r"array x\.long holds a string of 400 bytes, at most 300"):
        open_weights(path)
    monkeypatch.setattr(cursor, "MAX_HEADER", 100)
    with pytest.raises(BadFile, match=r"the header exceeds 100 bytes at .*; no known model needs that"):
        open_weights(path)


def test_a_reader_called_by_name_checks_the_magic_itself(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw({"a": entry()}, bytes(16)))
    with pytest.raises(BadFile, match=r"not a GGUF file: magic b'.*', b'GGUF' is wanted"):
        GGUFFile(path)


def test_an_original_shape_is_a_short_array(tmp_path):
    writer = base().key("comfy.gguf.orig_shape.t", 7).tensor("t", ONES)
    with pytest.raises(BadFile, match=r"comfy\.gguf\.orig_shape\.t is not a shape"):
        open_weights(writer.write(tmp_path / "model.gguf"))

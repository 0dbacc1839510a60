"""The GGUF reader gives back what was written, bit for bit and without copies, and stays light."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.helpers.gguf_writer import GGUFWriter, Packed, Raw, bfloat16, random_packed, write_gguf
from zimage_core.errors import BadArgument, BadFile, UnknownFormat
from zimage_core.formats import FORMATS
from zimage_core.weights.cursor import LazyArray
from zimage_core.weights.gguf import GGUFFile

VALUES = {
    "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 4294967295, "i32": -2147483648,
    "f32": 0.5, "bool": True, "str": "山水 🏞️", "u64": 2**64 - 1, "i64": -(2**63), "f64": 1e-300,
}  # fmt: skip
GGUF_FORMATS = [fmt for fmt in FORMATS.values() if fmt.ggml_type is not None]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type_comes_back_typed(tmp_path, order, version):
    writer = GGUFWriter(order=order, version=version)
    for kind, value in VALUES.items():
        writer.key(f"x.{kind}", value, kind).key(f"x.{kind}s", [value, value], kind).key(
            f"x.{kind}0", [], kind
        )
    with GGUFFile(writer.write(tmp_path / "a.gguf")) as file:
        assert file.version == version
        for kind, value in VALUES.items():
            assert file.metadata[f"x.{kind}"] == value
            assert type(file.metadata[f"x.{kind}"]) is type(value)
            items = file.metadata[f"x.{kind}s"]
            assert items.tolist() == [value, value]
            assert type(items[0]) is type(value)
            assert items.item_type in (kind, "string")
            assert file.metadata[f"x.{kind}0"].tolist() == []


@pytest.mark.parametrize("mmap", [True, False])
def test_every_format_comes_back_bit_for_bit(tmp_path, rng, mmap):
    wanted = {f"t.{fmt.name}": random_packed(fmt, (3, 2, 2 * fmt.weights), rng) for fmt in GGUF_FORMATS}
    path = write_gguf(tmp_path / "a.gguf", wanted)
    with GGUFFile(path, mmap=mmap) as file:
        assert list(file.tensors) == list(wanted)
        for name, packed in wanted.items():
            tensor = file.tensor(name)
            assert tensor.format is packed.format
            assert tensor.shape == file.tensors[name].shape == packed.shape
            assert tensor.packed.dtype == torch.uint8
            assert tensor.packed.shape == (3, 2, packed.format.row_bytes(packed.shape[-1]))
            assert tensor.packed.numpy().tobytes() == packed.data


def test_a_file_of_ggufs_own_writer_is_read_alike(tmp_path, rng):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "lumina2")
    writer.add_uint32("general.file_type", 7)
    writer.add_token_list(["a", "bé", ""])
    dense = rng.standard_normal((5, 64)).astype(np.float32)
    writer.add_tensor("dense", dense)
    quant = gguf.quants.quantize(dense, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("quant", quant, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        assert file.metadata["general.architecture"] == "lumina2"
        assert list(file.metadata["tokenizer.ggml.tokens"]) == ["a", "bé", ""]
        assert np.array_equal(file.tensor("dense").packed.view(torch.float32).numpy(), dense)
        assert file.tensors["quant"].shape == (5, 64)
        assert np.array_equal(file.tensor("quant").packed.numpy(), quant)


def test_big_endian_numbers_are_swapped_and_blocks_refused(tmp_path, rng):
    values = rng.standard_normal((3, 8))
    tensors = {name: values.astype(name) for name in ("float64", "float32", "float16")}
    path = write_gguf(tmp_path / "a.gguf", tensors, order=">")
    with GGUFFile(path) as file:
        for name, wanted in tensors.items():
            assert np.array_equal(file.tensor(name).packed.view(getattr(torch, name)).numpy(), wanted)
    path = write_gguf(tmp_path / "b.gguf", {"w": random_packed("Q8_0", (1, 32), rng)}, order=">")
    with pytest.raises(BadFile, match="Q8_0, which cannot be read from a big-endian file"):
        GGUFFile(path)


def test_tensors_are_views_of_one_map_and_writing_to_them_leaves_the_file_alone(tmp_path, rng):
    path = write_gguf(tmp_path / "a.gguf", {"w": rng.standard_normal((4, 8)).astype(np.float32)})
    before = path.read_bytes()
    with GGUFFile(path) as file:
        first, second = file.tensor("w"), file.tensor("w")
        assert first.packed.data_ptr() == second.packed.data_ptr()
        first.packed.fill_(7)
        assert second.packed[0, 0] == 7
    assert first.packed[0, 0] == 7, "a tensor outlives its file"
    assert path.read_bytes() == before
    with GGUFFile(path, mmap=False) as file:
        assert file.tensor("w").packed.data_ptr() != file.tensor("w").packed.data_ptr()


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment_order_gaps_padding_and_tail_are_free(tmp_path, rng, alignment):
    writer = GGUFWriter(alignment=alignment, pad=b"\xaa", tail=b"tail", prefix="model.diffusion_model.")
    arrays = [rng.standard_normal((n, 3)).astype(np.float32) for n in (1, 5, 2)]
    for i, array in enumerate(arrays):
        writer.tensor(f"t{i}", array, gap=4 * alignment if i == 1 else 0)
    path = tmp_path / "a.gguf"
    path.write_bytes(writer.build(data_order=[2, 0, 1]))
    with GGUFFile(path) as file:
        assert file.alignment == alignment
        for i, array in enumerate(arrays):
            tensor = file.tensor(f"model.diffusion_model.t{i}")
            assert np.array_equal(tensor.packed.view(torch.float32).numpy(), array)


def test_a_scalar_and_no_tensors_at_all(tmp_path):
    with GGUFFile(write_gguf(tmp_path / "a.gguf", {"s": np.array(1.5, np.float32)})) as file:
        assert file.tensor("s").shape == ()
        assert file.tensor("s").dequantize().item() == 1.5
    with GGUFFile(write_gguf(tmp_path / "b.gguf", {}, {"x.y": 1})) as file:
        assert not file.tensors
        assert dict(file.metadata) == {"x.y": 1}


def test_bfloat16_numbers(tmp_path):
    with GGUFFile(write_gguf(tmp_path / "a.gguf", {"w": bfloat16(np.array([[1.0, -2.5]]))})) as file:
        assert file.tensor("w").packed.view(torch.bfloat16).tolist() == [[1.0, -2.5]]


@pytest.mark.parametrize("name", ["Q2_0", "Q2_0_128"])
def test_the_two_blocks_under_type_42_are_told_apart_by_size(tmp_path, rng, name):
    tensors = {"small": random_packed(name, (2, 128), rng), "large": random_packed(name, (64, 256), rng)}
    with GGUFFile(write_gguf(tmp_path / "a.gguf", tensors)) as file:
        for key, packed in tensors.items():
            assert file.tensors[key].format.name == name
            assert file.tensor(key).packed.numpy().tobytes() == packed.data


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """As many tokens and merges as Qwen3 has."""
    tokens = [f"token{i}Ġ" for i in range(151_936)]
    merges = [f"a{i} b{i}" for i in range(151_387)]
    writer = GGUFWriter().key("tokenizer.ggml.tokens", tokens).key("tokenizer.ggml.merges", merges)
    writer.key("tokenizer.ggml.token_type", [1] * len(tokens), "i32").tensor("w", np.ones((2, 4), np.float32))
    return writer.write(tmp_path_factory.mktemp("vocabulary") / "qwen.gguf"), tokens, merges


def test_a_qwen_vocabulary_is_not_turned_into_strings_until_asked_for(vocabulary):
    path, tokens, merges = vocabulary
    tracemalloc.start()
    try:
        with GGUFFile(path) as file:
            assert len(file.metadata["tokenizer.ggml.tokens"]) == 151_936
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size  # the strings alone are 60 bytes each, four times the file
    with GGUFFile(path) as file:
        assert file.metadata["tokenizer.ggml.tokens"].tolist() == tokens
        assert list(file.metadata["tokenizer.ggml.merges"]) == merges
        assert sum(file.metadata["tokenizer.ggml.token_type"]) == 151_936


def test_lazy_arrays_behave_as_lists_and_need_the_file(vocabulary):
    path, tokens, _ = vocabulary
    file = GGUFFile(path)
    lazy, untouched = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    assert isinstance(lazy, LazyArray)
    assert (lazy[0], lazy[-1], lazy[5:7]) == (tokens[0], tokens[-1], tokens[5:7])
    assert repr(lazy) == "LazyArray(tokenizer.ggml.tokens: 151936 x string)"
    lazy.tolist().clear()
    file.close()
    assert lazy[3] == tokens[3], "what was read stays"
    with pytest.raises(BadArgument, match=r"qwen\.gguf: the file was closed"):
        untouched.tolist()


def test_nested_arrays(tmp_path):
    inner = b"".join(GGUFWriter()._array("u8", items) for items in ([1, 2], []))
    value = Raw((9).to_bytes(4, "little") + (2).to_bytes(8, "little") + inner)
    with GGUFFile(GGUFWriter().key("x.n", value, "array").write(tmp_path / "a.gguf")) as file:
        assert [part.tolist() for part in file.metadata["x.n"]] == [[1, 2], []]


def test_reading_headers_loads_neither_torch_nor_numpy(vocabulary):
    code = (
        "import sys; from zimage_core.weights.opened import open_weights; file = open_weights(sys.argv[1]);"
        "list(file.metadata['tokenizer.ggml.tokens']); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(vocabulary[0])],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert out.stdout.strip() == "[]"


def test_a_change_under_an_open_file_is_reported_and_a_replacement_is_not(tmp_path, rng):
    def fresh():
        return GGUFFile(write_gguf(path, {"w": rng.standard_normal((64, 64)).astype(np.float32)}))

    path = tmp_path / "a.gguf"
    file = fresh()
    file.check_unchanged()
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadFile, match="changed while in use: it was written to"):
        file.check_unchanged()
    file = fresh()
    os.truncate(path, 4096)
    with pytest.raises(BadFile, match=r"changed while in use: it had \d+ bytes and now has 4096"):
        file.check_unchanged()
    with pytest.raises(BadFile, match="changed while in use"):
        file.tensor("w")  # not SIGBUS
    file.close()
    with pytest.raises(BadFile, match="changed while in use"):
        file.check_unchanged()
    path.unlink()
    file = fresh()
    wanted = file.tensor("w").packed.clone()
    other = tmp_path / "other"
    other.write_bytes(b"not a model any more")
    other.replace(path)
    file.check_unchanged()
    assert torch.equal(file.tensor("w").packed, wanted)
    path.unlink()
    file.check_unchanged()
    file.close()
    file.check_unchanged()


def test_a_file_cut_while_it_is_read_is_an_error_not_a_signal(tmp_path, rng):
    path = write_gguf(tmp_path / "a.gguf", {"w": rng.standard_normal((64, 64)).astype(np.float32)})
    with GGUFFile(path, mmap=False) as file:
        os.truncate(path, 4096)
        with pytest.raises(BadFile, match="truncated while it was read: 16384 bytes wanted"):
            file.tensor("w")


def test_an_array_rewritten_under_an_open_file_is_not_believed(tmp_path):
    writer = GGUFWriter().key("x.words", ["some", "words"])
    path = writer.write(tmp_path / "a.gguf")
    with GGUFFile(path) as file:
        data = bytearray(path.read_bytes())
        data[writer.marks["key0.value"] + 12] = 200  # the length of "some"
        path.write_bytes(data)
        with pytest.raises(BadFile, match=r"array x\.words changed"):
            file.metadata["x.words"].tolist()


def test_an_array_item_that_is_not_utf8_is_named(tmp_path):
    path = GGUFWriter().key("x.words", ["a", b"\xff"], "str").write(tmp_path / "a.gguf")
    with GGUFFile(path) as file, pytest.raises(BadFile, match=r"item 1 of array x\.words is not UTF-8"):
        file.metadata["x.words"].tolist()


def test_an_unknown_tensor_is_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {"w": np.ones(4, np.float32)})
    with GGUFFile(path) as file, pytest.raises(BadFile, match="no tensor v among its 1"):
        file.tensor("v")


def test_no_descriptor_is_left_behind(tmp_path):
    good = write_gguf(tmp_path / "a.gguf", {"w": np.ones((4, 4), np.float32)})
    bad = tmp_path / "b.gguf"
    bad.write_bytes(good.read_bytes()[:-8])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(40):
        with GGUFFile(good) as file:
            file.tensor("w")
        GGUFFile(good)  # dropped without closing
        with pytest.raises(BadFile):
            GGUFFile(bad)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.parametrize("number", [4, 5, 9, 15, 31, 36, 43, 99, 255, 1 << 31])
def test_types_that_ggml_dropped_or_never_had_are_refused_with_file_and_tensor(tmp_path, number):
    path = GGUFWriter().tensor("w", np.ones(64, np.float32), number=number).write(tmp_path / "a.gguf")
    with pytest.raises(UnknownFormat, match=rf"a\.gguf: tensor w: GGUF tensor type {number} "):
        GGUFFile(path)


def test_a_reshaped_tensor_of_comfyui_notes_its_true_shape(tmp_path):
    def file(shape):
        writer = GGUFWriter().key("comfy.gguf.orig_shape.w", shape, "i32")
        return writer.tensor("w", np.ones((6, 4), np.float32)).write(tmp_path / "a.gguf")

    with GGUFFile(file([2, 3, 4])) as opened:
        assert opened.metadata["comfy.gguf.orig_shape.w"].tolist() == [2, 3, 4]
    with pytest.raises(
        BadFile, match=r"orig_shape\.w is the shape \[5, 5\], the tensor has the shape \[6, 4\]"
    ):
        GGUFFile(file([5, 5]))


def test_packed_is_what_the_writer_takes_for_blocks(tmp_path):
    packed = Packed(FORMATS["Q8_0"], (1, 32), bytes(34))
    with GGUFFile(write_gguf(tmp_path / "a.gguf", {"w": packed})) as file:
        assert repr(file) == f"GGUFFile('a.gguf', 1 tensors, {file.size} bytes)"
        assert not file.tensor("w").packed.any()

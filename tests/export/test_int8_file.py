"""`quantize` to int8 rows: the integers of the reference, in the layout that ComfyUI reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.helpers import convrot
from tests.helpers.wide import wide_state, write_wide
from zimage_core import convert_file, quantize_file
from zimage_core.errors import BadArgument, BadFile, BadWeights, Unsupported
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.quant import int8
from zimage_core.reference import int8 as reference
from zimage_core.weights.inspection import inspect_file
from zimage_core.weights.load import load_text_encoder, load_transformer
from zimage_core.weights.opened import open_weights

QKV = "layers.0.attention.qkv.weight"
PARTS = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def read(path):
    """Tensors, as NumPy arrays where NumPy has the type, by the package safetensors."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def dense(source):
    """What the tensors of a source mean, in the names of the single file."""
    with Checkpoint(source) as checkpoint:
        return {
            t.name: torch.cat(list(checkpoint.dense(t))).reshape(t.shape) for t in checkpoint.targets("fused")
        }


def close(values, wanted, rotated):
    """Integers are equal; of a rotation's, few differ by one, where float32 sums decide a tie."""
    off = np.abs(values.numpy().astype(int) - wanted)
    assert off.max() <= rotated
    assert off.mean() <= 1e-3


@pytest.mark.parametrize("type", ["INT8_ROW", "INT8_CONVROT"])
def test_the_file_holds_the_integers_of_the_reference(wide, tmp_path, type):
    done = quantize_file(wide, tmp_path / "a.safetensors", type)
    tensors, metadata = read(done.path)
    source, rotated = dense(wide), type == "INT8_CONVROT"
    blocks = [name.removesuffix(".attention_norm1.weight") for name in source if "attention_norm1" in name]
    layers = {f"{block}.{part}" for block in blocks for part in PARTS}
    assert {name.removesuffix(".comfy_quant") for name in tensors if name.endswith("comfy_quant")} == layers
    for stem in layers:
        weight = source[stem + ".weight"].numpy()
        group = 256 if rotated and weight.shape[1] == 256 else 0  # rows of w2 have 682 numbers
        values, scale = reference.quantize_rows(weight, group)
        close(tensors[stem + ".weight"], values, bool(group))
        got = tensors[stem + ".weight_scale"]
        assert (got.shape, got.dtype) == ((len(weight), 1), torch.float32)
        np.testing.assert_allclose(got[:, 0].numpy(), scale, rtol=1e-6 if group else 0)
        stated = json.loads(bytes(tensors[stem + ".comfy_quant"].tolist()))
        wanted = {"format": "int8_tensorwise"}
        assert stated == (wanted | {"convrot": True, "convrot_groupsize": 256} if group else wanted)
    for name in source.keys() - {f"{stem}.weight" for stem in layers}:
        assert tensors[name].dtype == torch.bfloat16
        assert torch.equal(tensors[name].float().view(-1), source[name].view(-1)), name
    assert done.types == {"I8": len(layers), "BF16": len(source) - len(layers)}
    assert metadata["format"] == "pt"


def test_the_text_beside_a_weight_is_comfyuis_byte_for_byte(wide, tmp_path):
    """Comfy-Org's file of Z-Image-Turbo has 202 of these, of 14,544 bytes together."""
    tensors, _ = read(quantize_file(wide, tmp_path / "a.safetensors", "INT8_CONVROT").path)
    text = bytes(tensors[QKV.replace("weight", "comfy_quant")].tolist())
    assert text == b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    assert len(text) == 14544 / 202


def test_it_loads_and_multiplies_by_what_was_written(wide, tmp_path):
    path = quantize_file(wide, tmp_path / "a.safetensors", "INT8_CONVROT").path
    model, tensors = load_transformer(path, compute="int8"), read(path)[0]
    layer = model.layers[0].attention.to_k
    assert torch.equal(layer.weight.packed.view(torch.int8), tensors[QKV][256:512])
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    rows = int8.quantize_rows(x, 256)
    scale = tensors[QKV.replace("weight", "weight_scale")]
    wanted = reference.product(
        rows.values.numpy(), rows.scale.numpy(), tensors[QKV][256:512].numpy(), scale[256:512, 0].numpy()
    )
    np.testing.assert_array_equal(layer(x).numpy(), wanted)
    found = inspect_file(path)
    assert found.usable
    assert any(note.startswith("INT8, rotated by blocks of 256") for note in found.notes)


def test_it_is_what_the_independent_script_writes(wide, tmp_path):
    """Shapes and texts agree; integers but for ties, scales but for the last digits."""
    path = quantize_file(wide, tmp_path / "a.safetensors", "INT8_CONVROT").path
    source = {name: value.numpy() for name, value in dense(wide).items()}
    parts = tuple(f"{part}.weight" for part in PARTS if "w2" not in part)
    rows = {name: value for name, value in source.items() if name.endswith(parts)}
    mine = read(path)[0]
    for name, tensor in convrot.tensors_of(rows, lambda _: True, 256).items():
        assert mine[name].shape == tensor.shape
        if tensor.dtype == np.float32:
            np.testing.assert_allclose(mine[name].numpy(), tensor, rtol=1e-6)
        else:
            close(mine[name], tensor, tensor.dtype == np.int8)


def test_comfyuis_own_arithmetic_makes_and_reads_the_same(wide, tmp_path):
    """Where the package comfy-kitchen is installed (tried with 0.2.40)."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    path = quantize_file(wide, tmp_path / "a.safetensors", "INT8_CONVROT").path
    tensors, model = read(path)[0], load_transformer(path, compute="int8")
    values, scale = tensors[QKV], tensors[QKV.replace("weight", "weight_scale")]
    theirs, their_scale = kitchen.quantize_int8_convrot_weight(dense(wide)[QKV], 256)
    close(values, theirs.numpy(), True)
    torch.testing.assert_close(scale, their_scale, rtol=1e-6, atol=0)
    wanted = kitchen.dequantize_int8_convrot_weight(values, scale, 256)
    torch.testing.assert_close(dense(path)[QKV], wanted, rtol=1e-5, atol=1e-6)
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    product = kitchen.int8_linear(x, values, scale, None, torch.float32, True, 256)[:, :256]
    mine = model.layers[0].attention.to_q(x)
    assert float((mine - product).norm() / product.norm()) < 1e-4


def test_every_layout_of_a_model_gives_the_same_file_twice(wide, tmp_path):
    """But for the name of its source in the metadata."""
    convert_file(wide, tmp_path / "m.gguf")
    convert_file(wide, tmp_path / "m.safetensors")
    made = []
    for number, source in enumerate((wide, wide, tmp_path / "m.safetensors", tmp_path / "m.gguf")):
        path = tmp_path / f"{number}.safetensors"
        quantize_file(source, path, "INT8_CONVROT")
        made.append(path)
    assert made[0].read_bytes() == made[1].read_bytes()
    first = read(made[0])[0]
    for path in made[2:]:
        other = read(path)[0]
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name].float(), value.float()) for name, value in first.items())


@pytest.mark.parametrize("kind", ["Q4_K_S", "Q8_0", "INT8_CONVROT", "INT8_ROW"])
def test_any_quantised_source_is_taken_if_asked_for(wide, tmp_path, kind):
    source = tmp_path / f"source.{'safetensors' if 'INT8' in kind else 'gguf'}"
    quantize_file(wide, source, kind)
    out = tmp_path / "a.safetensors"
    with pytest.raises(Unsupported, match="quantised already"):
        quantize_file(source, out, "INT8_ROW")
    quantize_file(source, out, "INT8_ROW", requantize=True)
    values, scale = reference.quantize_rows(dense(source)[QKV].numpy())
    tensors = read(out)[0]
    assert np.array_equal(tensors[QKV].numpy(), values)
    assert np.array_equal(tensors[QKV.replace("weight", "weight_scale")][:, 0].numpy(), scale)


def test_int8_becomes_a_gguf_or_floats_by_its_numbers(wide, tmp_path):
    path = quantize_file(wide, tmp_path / "a.safetensors", "INT8_CONVROT").path
    wanted, original = dense(path)[QKV], dense(wide)[QKV]
    assert float((wanted - original).norm() / original.norm()) < 0.01
    with pytest.raises(Unsupported, match=r"I8.*--dequantize"):
        convert_file(path, tmp_path / "b.safetensors")
    convert_file(path, tmp_path / "b.safetensors", dequantize="f32")
    assert torch.equal(dense(tmp_path / "b.safetensors")[QKV], wanted)
    quantize_file(path, tmp_path / "b.gguf", "Q8_0", requantize=True)
    with open_weights(tmp_path / "b.gguf") as file:
        got = file.tensor(QKV).dequantize()
    assert float((got - wanted).norm() / wanted.norm()) < 0.01


def test_a_text_encoder_has_comfyuis_names(model, tmp_path):
    done = quantize_file(model, tmp_path / "te.safetensors", "INT8_CONVROT", component="text_encoder")
    tensors, _ = read(done.path)
    stem = "model.layers.0.self_attn.q_proj"
    assert tensors[f"{stem}.weight"].dtype == torch.int8
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert not any("norm" in name and name.endswith("comfy_quant") for name in tensors)
    assert any("--tokenizer" in remark for remark in done.remarks)
    assert load_text_encoder(done.path).layers[0].self_attn.q_proj.weight.format.name == "I8"


def test_float32_becomes_16_bits_where_it_is_a_matrix(tmp_path):
    folder = write_wide(tmp_path / "transformer", wide_state(torch.float32))
    tensors, _ = read(quantize_file(folder, tmp_path / "a.safetensors", "INT8_CONVROT").path)
    assert tensors["cap_embedder.1.weight"].dtype == torch.bfloat16
    assert {tensors[name].dtype for name in ("x_pad_token", "layers.0.ffn_norm1.weight")} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_unless_allowed(tmp_path, value):
    state = wide_state()
    state["layers.0.attention.to_k.weight"][3, 5] = value
    folder, out = write_wide(tmp_path / "transformer", state), tmp_path / "a.safetensors"
    with pytest.raises(BadWeights, match=r"qkv\.weight has 1 numbers that are NaN or infinite.*\[259, 5\]"):
        quantize_file(folder, out, "INT8_CONVROT")
    assert not out.exists()
    done = quantize_file(folder, out, "INT8_CONVROT", allow_nonfinite=True)
    assert any("0 stands for NaN" in remark for remark in done.remarks)
    assert bool(read(out)[0][QKV.replace("weight", "weight_scale")].isfinite().all())


def test_arguments_that_make_no_sense_are_refused(wide, tmp_path):
    with pytest.raises(BadArgument, match=r"INT8_CONVROT is written as safetensors; .*ends in \.safetensors"):
        quantize_file(wide, tmp_path / "a.gguf", "INT8_CONVROT")
    with pytest.raises(BadArgument, match="a GGUF is written"):
        quantize_file(wide, tmp_path / "a.safetensors", "Q8_0")
    with pytest.raises(BadArgument, match="int8 rows are rounded to nearest"):
        quantize_file(wide, tmp_path / "a.safetensors", "INT8_ROW", imatrix="x.gguf")
    for name in ("a.gguf", "a.safetensors"):
        with pytest.raises(BadArgument, match=r"unknown type 'INT8'; known are .*INT8_CONVROT"):
            quantize_file(wide, tmp_path / name, "INT8")
    (tmp_path / "a.safetensors").write_bytes(b"precious")
    with pytest.raises(BadFile, match="exists already"):
        quantize_file(wide, tmp_path / "a.safetensors", "int8_row")


def test_progress_counts_every_weight(wide, tmp_path):
    seen = []
    quantize_file(wide, tmp_path / "a.safetensors", "INT8_ROW", progress=lambda *found: seen.append(found))
    done = [count for count, _, _ in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][1] == sum(value.numel() for value in dense(wide).values())


def test_a_call_that_fails_leaves_the_old_file(wide, tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"precious")

    def stop(done, total, name):
        if name == QKV:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(wide, out, "INT8_CONVROT", overwrite=True, progress=stop)
    assert out.read_bytes() == b"precious"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

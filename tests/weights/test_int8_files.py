"""Int8 files: ComfyUI's, rotated (ConvRot) or not, and plain ones with a scale beside each weight.

The files come from tests/helpers/convrot.py, which uses nothing of the library.
"""

from __future__ import annotations

import json
import re
from contextlib import closing
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import convrot
from tests.helpers.headers import dit, header
from tests.helpers.loaded import FUSED, SPLIT, assert_same, split_names, weights
from tests.helpers.model_files import TOY_DIT, stored, write_json, write_safetensors
from tests.helpers.streamed import DIT, draw, ringed, streamed
from zimage_core.errors import BadWeights, WrongModel
from zimage_core.formats import FORMATS
from zimage_core.memory.sizes import part_of
from zimage_core.quant import int8
from zimage_core.quant.tensor import QuantTensor
from zimage_core.reference import int8 as reference
from zimage_core.weights import comfy, names
from zimage_core.weights.components import open_component
from zimage_core.weights.identify import identify
from zimage_core.weights.inspection import inspect_file
from zimage_core.weights.load import _unpermuted, load_transformer

LAYER = "layers.0.feed_forward.w1"
WAY = "get the same model as GGUF, or as bf16 or fp8"


def in_a_block(name: str) -> bool:
    return bool(re.search(r"\.(attention\.(qkv|out|to_.*)|feed_forward\.w\d)\.weight$", name))


def with_modulation(name: str) -> bool:
    return in_a_block(name) or name.endswith("adaLN_modulation.0.weight")


def state(shapes=FUSED, seed=0):
    return {name: value.numpy() for name, value in stored(shapes, seed=seed).values().items()}


@cache
def _made(quantised, group):
    return convrot.tensors_of(state(), quantised, group)


def made(quantised, group):
    """The tensors of a small transformer's file, in a table of one's own."""
    return dict(_made(quantised, group))


def meant(tensors, group):
    """What the tensors of a file mean, in float32."""
    found = {}
    for name, value in tensors.items():
        if value.dtype == np.int8:
            scale = tensors[name + "_scale"]
            found[name] = torch.from_numpy(convrot.dense(value, scale, group))
        elif value.dtype == np.float32 and not name.endswith("_scale"):
            found[name] = torch.from_numpy(value)
    return found


@pytest.mark.parametrize("group", [256, 64, 0])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_an_independent_script_gives_its_numbers(tmp_path, group, prefix):
    """Integers bit for bit; dense numbers within the rounding of a rotation in float32."""
    tensors = made(with_modulation, group)
    path = convrot.write(tmp_path / "a.safetensors", {prefix + n: t for n, t in tensors.items()})
    model = load_transformer(path)
    got, wanted = weights(model), split_names(meant(tensors, group))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=2e-6 * float(value.abs().max()))
    d = TOY_DIT.dim
    stack = model.layers[1]
    for part, layer in enumerate((stack.attention.to_q, stack.attention.to_k, stack.attention.to_v)):
        rows = slice(part * d, part * d + d)
        weight = layer.weight
        assert (weight.format, weight.rotation) == (FORMATS["I8"], group)
        stem = "layers.1.attention.qkv.weight"
        assert np.array_equal(weight.packed.numpy().view(np.int8), tensors[stem][rows])
        assert np.array_equal(weight.scale.numpy(), tensors[stem + "_scale"][rows, 0])


@pytest.mark.parametrize("group", [256, 0])
def test_products_in_int8_use_the_stored_integers(tmp_path, group):
    tensors = made(in_a_block, group)
    model = load_transformer(convrot.write(tmp_path / "a.safetensors", tensors), compute="int8")
    layer = model.layers[0].feed_forward.w1
    x = torch.randn(5, TOY_DIT.dim, generator=torch.Generator().manual_seed(1))
    rows = int8.quantize_rows(x, group)
    wanted = reference.product(
        rows.values.numpy(),
        rows.scale.numpy(),
        tensors[LAYER + ".weight"],
        tensors[LAYER + ".weight_scale"][:, 0],
    )
    np.testing.assert_array_equal(layer(x).numpy(), wanted)
    # and the reference's integers of x, but for ties that a rotation's rounding decides
    theirs, _ = reference.quantize_rows(x.numpy(), group)
    assert np.abs(theirs.astype(int) - rows.values.numpy()).max() <= (1 if group else 0)


@pytest.mark.parametrize("group", [256, 0])
def test_exact_products_are_those_of_the_dense_numbers(tmp_path, group):
    tensors = made(with_modulation, group)
    model = load_transformer(convrot.write(tmp_path / "a.safetensors", tensors))
    layer = model.layers[0].feed_forward.w1
    x = torch.randn(5, TOY_DIT.dim, generator=torch.Generator().manual_seed(1))
    dense = meant(tensors, group)[LAYER + ".weight"]
    torch.testing.assert_close(layer(x), x @ dense.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["column", "row", "one"])
@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("suffix", [".weight_scale", ".scale_weight"])
def test_plain_int8_with_a_scale_of_any_form(tmp_path, shape, kind, suffix):
    """As compressed-tensors and others write it, in diffusers' names, without a word of ComfyUI's."""
    content = stored(SPLIT, matrix="F32")
    wanted = content.values()
    rng = np.random.default_rng(2)
    for name, (_, _, size) in list(content.tensors.items()):
        if in_a_block(name):
            values = rng.integers(-127, 128, size).astype(np.int8)
            n = 1 if shape == "one" else size[0]
            scale = rng.uniform(0.5, 2, n).astype(np.float32)
            scale = (scale.view(np.uint32) & 0xFFFF0000).view(np.float32)  # exact in bfloat16
            held = scale if kind == "F32" else (scale.view(np.uint32) >> 16).astype(np.uint16)
            form = {"column": (n, 1), "row": (n,), "one": ()}[shape]
            content.tensors[name] = ("I8", values.view(np.uint8), size)
            content.tensors[name.removesuffix(".weight") + suffix] = (kind, held.view(np.uint8), form)
            wanted[name] = torch.from_numpy(values.astype(np.float32) * scale.reshape(-1, 1))
    path = write_safetensors(tmp_path / "model.safetensors", content)
    model = load_transformer(path)
    assert_same(model, wanted)
    assert model.layers[0].feed_forward.w2.weight.scale.shape == (TOY_DIT.dim,)
    assert inspect_file(path).usable


def test_int8_that_compressed_tensors_states_is_no_news(tmp_path, recwarn):
    tensors = convrot.tensors_of(state(SPLIT), in_a_block, 0)
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("comfy_quant")}
    convrot.write(tmp_path / "model.safetensors", plain)
    method = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    stated = {
        "_class_name": "ZImageTransformer2DModel", "dim": 256, "n_layers": 2, "n_refiner_layers": 1,
        "n_heads": 4, "cap_feat_dim": 256, "axes_dims": [16, 24, 24], "quantization_config": method,
    }  # fmt: skip
    write_json(tmp_path / "config.json", stated)
    load_transformer(tmp_path)
    assert not [w for w in recwarn if "quantised" in str(w.message)]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_the_metadata_states_of_all_layers_counts_as_well(tmp_path, prefix):
    """As newer files have it; the names there may lack the prefix of the model."""
    tensors = made(in_a_block, 64)
    texts = {name: t for name, t in tensors.items() if name.endswith("comfy_quant")}
    layers = {n.removesuffix(".comfy_quant"): json.loads(bytes(t)) for n, t in texts.items()}
    held = {prefix + name: tensor for name, tensor in tensors.items() if name not in texts}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    path = convrot.write(tmp_path / "a.safetensors", held, metadata)
    assert load_transformer(path).layers[0].attention.to_out[0].weight.rotation == 64
    assert any("rotated by blocks of 64" in note for note in inspect_file(path).notes)


def test_rows_of_a_llama_move_with_their_scales():
    values = torch.arange(8 * 4, dtype=torch.uint8).view(8, 4)
    weight = QuantTensor(values, FORMATS["I8"], (8, 4), torch.arange(1.0, 9), rotation=4)
    moved = _unpermuted(weight, 2)
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(moved.packed, values[order])
    assert torch.equal(moved.scale, weight.scale[order])
    assert moved.rotation == 4


def test_inspect_names_int8_and_its_blocks(tmp_path):
    tensors = made(in_a_block, 256)
    ada = made(with_modulation, 0)
    tensors |= {name: t for name, t in ada.items() if "adaLN_modulation.0" in name}
    found = inspect_file(convrot.write(tmp_path / "a.safetensors", tensors))
    assert found.usable
    blocks = 2 * TOY_DIT.n_refiner_layers + TOY_DIT.n_layers
    ada = blocks - TOY_DIT.n_refiner_layers
    assert f"INT8, rotated by blocks of 256: {5 * blocks} matrices, 8.11 bits a weight" in found.notes
    assert f"INT8, not rotated: {ada} matrices, 8.12 bits a weight" in found.notes
    counted = {entry.format: entry for entry in found.types}
    assert counted["I8"].nbytes == counted["I8"].weights


def test_the_published_file_is_identified():
    """Comfy-Org's z_image_turbo_int8_convrot: 857 tensors, of which 202 are I8, 453 F32 and 202 U8."""
    shapes = dit("fused")
    layers = [name.removesuffix(".weight") for name in shapes if with_modulation(name)]
    shapes |= {f"{stem}.weight_scale": (shapes[stem + ".weight"][0], 1) for stem in layers}
    shapes |= {stem + ".comfy_quant": (72,) for stem in layers}
    types = {stem + ".weight": "I8" for stem in layers} | {stem + ".comfy_quant": "U8" for stem in layers}
    file = header(shapes, fmt=lambda name: types.get(name, "F32"))
    file.source_of = lambda name: SimpleNamespace(read_at=lambda offset, count: comfy.layer_text(256))
    assert (len(file.tensors), len(layers)) == (857, 202)
    card = identify(file)
    assert card.sound
    assert card.title == "a Z-Image transformer (width 3840, 30 layers)"
    assert card.notes[0].startswith("INT8, rotated by blocks of 256: 202 matrices")


@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_streamed_blocks_keep_scales_and_rotation(tmp_path, compute):
    shapes = names.checkpoint_shapes(names.transformer_table(DIT, "fused"))
    tensors = convrot.tensors_of(state(shapes), in_a_block, 256)
    model = load_transformer(convrot.write(tmp_path / "a.safetensors", tensors), compute=compute)
    wanted = draw(model)
    with closing(streamed(model, (1, 4), **ringed(slots=2))):
        assert torch.equal(draw(model), wanted)


def test_the_plan_counts_integers_and_scales(tmp_path):
    tensors = made(with_modulation, 256)
    opened = open_component(convrot.write(tmp_path / "a.safetensors", tensors), "transformer")
    part = part_of("transformer", opened, "float32")
    opened.file.close()
    held = [t for name, t in tensors.items() if not name.endswith("comfy_quant")]
    assert part.nbytes == sum(tensor.nbytes for tensor in held)
    assert part.streamable == sum(
        t.size
        for name, t in tensors.items()
        if t.dtype == np.int8 and not ("ada" in name or "context" in name)
    )


# --- faults ------------------------------------------------------------------------------


def broken(tmp_path, change, name="a"):
    tensors = made(in_a_block, 256)
    change(tensors)
    return convrot.write(tmp_path / f"{name}.safetensors", tensors)


def text(value):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return {LAYER + ".comfy_quant": np.frombuffer(data, np.uint8)}


INT8 = {"format": "int8_tensorwise"}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (b'{"format": "int8_tensorwise", "convrot": tr', "comfy_quant that is not JSON"),
        (b"\xff\xfe{", "comfy_quant that is not JSON"),
        (b"[" * 4000, "comfy_quant that is not JSON"),
        (b" " * 5000, "comfy_quant of 5000 bytes"),
        ([INT8], "ComfyUI as 'None'"),
        ({"format": "nvfp4"}, "ComfyUI as 'nvfp4'"),
        ({"format": "convrot_w4a4"}, "ComfyUI as 'convrot_w4a4'"),
        ({}, "ComfyUI as 'None'"),
        ({"format": "float8_e4m3fn"}, "is I8, and ComfyUI states that it is float8_e4m3fn"),
        (INT8 | {"convrot": 1}, "convrot 1, wanted true or false"),
        (INT8 | {"convrot": True, "convrot_groupsize": 128}, "blocks of 128, wanted 4, 16, 64 or 256"),
        (INT8 | {"convrot": True, "convrot_groupsize": 1024}, "blocks of 1024, wanted"),
        (INT8 | {"convrot": True, "convrot_groupsize": "256"}, "blocks of 256, wanted"),
        (INT8 | {"convrot": True, "convrot_groupsize": -4}, "blocks of -4, wanted"),
        (INT8 | {"convrot": True, "convrot_groupsize": 10**3000}, "blocks of 1000"),
        (INT8 | {"convrot": True, "convrot_groupsize": True}, "blocks of True, wanted"),
        (INT8 | {"convrot": True, "convrot_groupsize": float("nan")}, "blocks of nan, wanted"),
        (INT8 | {"zero_point": 3}, "'zero_point', which is not known of int8"),
        (INT8 | {"params": {"smooth": [1]}}, "'smooth', which is not known of int8"),
    ],
)
def test_what_comfyui_states_and_cannot_be_is_refused_in_a_sentence(tmp_path, stated, message):
    path = broken(tmp_path, lambda tensors: tensors.update(text(stated)))
    with pytest.raises(WrongModel, match=f"{re.escape(message)}.*{WAY}"):
        load_transformer(path)
    assert message in inspect_file(path).problem


@pytest.mark.parametrize(
    "stated",
    [
        INT8 | {"convrot": True, "convrot_groupsize": 256, "full_precision_matrix_mult": True},
        INT8 | {"convrot": True},  # 256 unless it says otherwise
        INT8 | {"params": {"convrot": True, "convrot_groupsize": 256}},
        INT8 | {"convrot": True, "convrot_groupsize": 256, "per_row": True, "orig_dtype": "torch.bfloat16"},
        {"convrot": True, "convrot_groupsize": 256, "per_row": True},  # ComfyUI-INT8-Fast
        INT8 | {"convrot": True, "zero_point": None},
    ],
)
def test_other_ways_to_state_the_same(tmp_path, stated):
    path = broken(tmp_path, lambda tensors: tensors.update(text(stated)))
    assert load_transformer(path).layers[0].feed_forward.w1.weight.rotation == 256


def without_scale(tensors):
    del tensors[LAYER + ".weight_scale"]


def scale_of(*shape, value=1.0):
    return lambda tensors: tensors.update({LAYER + ".weight_scale": np.full(shape, value, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_scale, f"{LAYER}.weight is int8 without a scale, {LAYER}.weight_scale"),
        (
            lambda tensors: tensors.pop(LAYER + ".comfy_quant"),
            f"{LAYER}.weight is int8 without a comfy_quant, which noise_refiner.0.attention.qkv.weight has",
        ),
        (scale_of(7), "has a scale of shape (7,), wanted one number or one a row"),
        (scale_of(512, 2), "has a scale of shape (512, 2)"),
        (scale_of(1, 512), "has a scale of shape (1, 512)"),
        (scale_of(0, 1), "has a scale of shape (0, 1)"),
    ],
)
def test_what_lies_beside_a_weight_and_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(WrongModel, match=re.escape(message)):
        load_transformer(broken(tmp_path, change))


def test_a_scale_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(BadWeights, match=r"w1\.weight has a scale that is NaN"):
        load_transformer(broken(tmp_path, scale_of(512, 1, value=np.inf)))


def test_blocks_that_do_not_divide_the_rows_are_refused(tmp_path):
    shapes = {name: (s if s[-1:] != (512,) else (s[0], 510)) for name, s in FUSED.items()}
    shapes |= {name: (510, 256) for name in FUSED if re.search(r"feed_forward\.w[13]", name)}
    tensors = convrot.tensors_of(state(shapes), lambda name: in_a_block(name) and ".w2." not in name, 256)
    values = convrot.layer(state(shapes)["layers.0.feed_forward.w2.weight"], 0)
    tensors |= {f"layers.0.feed_forward.w2.{end}": tensor for end, tensor in values.items()}
    tensors["layers.0.feed_forward.w2.comfy_quant"] = tensors[LAYER + ".comfy_quant"]
    with pytest.raises(
        WrongModel, match=r"blocks of 256, which do not divide rows of its shape \(256, 510\)"
    ):
        load_transformer(convrot.write(tmp_path / "a.safetensors", tensors))


def test_whole_numbers_in_place_of_a_bias_are_refused(tmp_path):
    name = "layers.0.adaLN_modulation.0.bias"
    path = broken(tmp_path, lambda tensors: tensors.update({name: np.ones(4 * TOY_DIT.dim, np.int8)}))
    with pytest.raises(BadWeights, match=f"{name} is I8 without a scale"):
        load_transformer(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["format", "convrot", "convrot_groupsize", "params", "per_row", "x"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES | st.just("int8_tensorwise") | st.just(256), max_size=5))
def test_whatever_is_stated_gives_a_sentence_or_a_known_rotation(data):
    found = comfy._read(data)
    assert found.rotation in (0, *comfy.GROUPS)
    said = [found.format, found.style, found.fault]
    assert sum(map(bool, said)) == 1
    assert all(len(text) < 200 and text.isprintable() for text in said)

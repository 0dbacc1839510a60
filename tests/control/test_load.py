"""ControlNet files: every layout and packing loads, variants are told apart, other files are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import controls, tiny
from tests.helpers.model_files import Stored, write_gguf
from zimage_core import ZImageControlNetModel, inspect_file, load_controlnet, load_transformer
from zimage_core.control.load import control_table
from zimage_core.errors import BadArgument, BadWeights, WrongModel
from zimage_core.formats import FORMATS
from zimage_core.models.transformer import TransformerBlock
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import encode
from zimage_core.weights.names import checkpoint_shapes

WIDE = {**controls.BASE, "dim": 256, "n_heads": 2, "axes_dims": [32, 48, 48]}
"""Wide enough for blocks of 256 weights."""


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", controls.VARIANTS)
def test_every_variant_loads_with_split_and_fused_names(tmp_path, variant, prefix):
    net = controls.controlnet(variant)
    split = controls.write(tmp_path / "split.safetensors", net, prefix)
    joined = {prefix + k: v.contiguous() for k, v in controls.fused(net.state_dict()).items()}
    save_file(joined, tmp_path / "fused.safetensors")
    for path in (split, tmp_path / "fused.safetensors"):
        found = load_controlnet(path)
        assert found.config == net.config
        assert found.config.variant.split()[0] == variant.split()[0]
        for name, value in net.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name


def test_packed_weights_stay_packed(tmp_path):
    net = controls.controlnet("1.0", WIDE)
    content = Stored()
    for name, value in controls.fused(net.state_dict()).items():
        fmt = "Q8_0" if value.ndim == 2 and value.shape[1] % 32 == 0 and "adaLN" not in name else "F32"
        content.tensors[name] = (fmt, encode(value, fmt).numpy(), tuple(value.shape))
    found = load_controlnet(write_gguf(tmp_path / "net.gguf", content, {"general.architecture": "lumina2"}))
    weight = found.control_layers[1].attention.to_k.weight
    assert isinstance(weight, QuantTensor)
    assert weight.format is FORMATS["Q8_0"]
    wanted = net.control_layers[1].attention.to_k.weight
    assert float((weight.dequantize() - wanted).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("layers", "places"), [(6, range(0, 30, 5)), (15, range(0, 30, 2)), (3, (0, 10, 20))]
)
def test_places_of_the_released_nets(layers, places):
    config = controls.config("1.0")
    assert type(config)(**{**config.__dict__, "n_layers": layers}).places_in(30) == tuple(places)


def test_a_file_may_state_its_places(tmp_path):
    net = controls.controlnet("2.1 lite")
    path = controls.write(tmp_path / "net.safetensors", net, metadata={"places": "0,2,5"})
    assert load_controlnet(path).config.places_in(6) == (0, 2, 5)
    for wrong in ("0,2", "2,2,3", "a,b,c", "0,2,3,4", "-1,2,3"):
        path = controls.write(tmp_path / "wrong.safetensors", net, metadata={"places": wrong})
        with pytest.raises(BadWeights, match=r"metadata 'places' .*wanted 3 rising numbers"):
            load_controlnet(path)
    path = controls.write(tmp_path / "far.safetensors", net, metadata={"places": "0,2,6"})
    with pytest.raises(BadWeights, match=r"steers 3 layers .*the transformer has 6"):
        load_controlnet(path).config.places_in(6)


def test_a_folder_of_diffusers_states_its_places(tmp_path):
    net = controls.controlnet("2.1 lite")
    controls.write(tmp_path / "diffusion_pytorch_model.safetensors", net)
    stated = {"_class_name": "ZImageControlNetModel", "control_layers_places": [0, 2, 5]}
    tiny.write_json(tmp_path / "config.json", stated)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        assert ZImageControlNetModel.from_pretrained(path).config.places_in(6) == (0, 2, 5)
    tiny.write_json(tmp_path / "config.json", {"control_layers_places": [0, 2, 5]})
    assert load_controlnet(tmp_path).config.places_in(6) == (0, 2, 4)


@pytest.mark.parametrize("zero", ["before_proj", "after_proj"])
def test_a_refiner_whose_projections_are_zero_makes_a_file_one_of_version_2_0(tmp_path, zero):
    net = controls.controlnet("2.1")
    with torch.no_grad():
        net.control_noise_refiner[0].get_submodule(zero).weight.zero_()
    path = controls.write(tmp_path / "net.safetensors", net)
    found = load_controlnet(path)
    assert found.config.refiner == "control_layers"
    assert len(found.control_noise_refiner) == 0
    assert "(2.0, 6 control layers, 33 control channels)" in inspect_file(path).title


@pytest.mark.parametrize("variant", controls.VARIANTS)
def test_inspect_names_the_variant_and_takes_the_file(tmp_path, variant):
    found = inspect_file(controls.write(tmp_path / "net.safetensors", controls.controlnet(variant)))
    assert found.kind == "controlnet"
    assert found.usable
    assert f"a Z-Image ControlNet ({variant}, " in found.title


def test_tables_have_the_counts_of_the_released_files():
    real = {"1.0": (6, 16, 136, 1_550_778_368), "2.0": (15, 33, 259, 2_950_156_800),
            "2.1": (15, 33, 295, 3_356_225_792), "2.1 lite": (3, 33, 91, 1_008_308_480)}  # fmt: skip
    for variant, (layers, channels, tensors, weights) in real.items():
        sizes = {**controls.BASE, "dim": 3840, "n_heads": 30, "n_refiner_layers": 2}
        small = controls.config(variant, sizes)
        config = type(small)(**{**small.__dict__, "n_layers": layers, "channels": channels})
        shapes = checkpoint_shapes(control_table(config, "split"))
        assert (len(shapes), sum(np.prod(shape) for shape in shapes.values())) == (tensors, weights), variant


def changed(tmp_path, change):
    path = controls.write(tmp_path / "net.safetensors", controls.controlnet("2.1"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


FAULTS = {
    "missing": (
        lambda t: t.pop("control_layers.3.after_proj.bias"),
        "1 missing: control_layers.3.after_proj",
    ),
    "unexpected": (lambda t: t.update({"control_layers.0.extra": torch.zeros(2)}), "1 unexpected: .*extra"),
    "misshapen": (
        lambda t: t.update({"control_layers.2.attention_norm1.weight": torch.zeros(9)}),
        r"1 misshapen: .* is \(9,\), wanted \(48,\)",
    ),
    "not finite": (lambda t: t["control_layers.1.ffn_norm1.weight"].fill_(float("nan")), "holds 48 NaN"),
    "no layers": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("control_layers.")],
        "'control_layers.0.feed_forward.w1.weight' is missing",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, fault):
    change, message = FAULTS[fault]
    with pytest.raises(BadWeights, match=message) as raised:
        load_controlnet(changed(tmp_path, change))
    assert "\n" not in str(raised.value)


def test_other_models_are_refused_by_name(tmp_path):
    save_file({"controlnet_blocks.0.weight": torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    other = {"controlnet_cond_embedding.conv_in.weight": torch.zeros(2, 2)}
    save_file(other, tmp_path / "sdxl.safetensors")
    base = tiny.folder(tmp_path / "base") / "transformer" / "diffusion_pytorch_model.safetensors"
    for path, title in {
        tmp_path / "flux.safetensors": "a ControlNet of FLUX.1",
        tmp_path / "sdxl.safetensors": "a ControlNet of Stable Diffusion",
        base: "a Z-Image transformer",
    }.items():
        with pytest.raises(WrongModel, match=f"this is {title}.*, where a Z-Image ControlNet is wanted"):
            load_controlnet(path)
    net = controls.write(tmp_path / "net.safetensors", controls.controlnet("1.0"))
    with pytest.raises(WrongModel, match=r"this is a Z-Image ControlNet .*where a Z-Image transformer is"):
        load_transformer(net)
    with pytest.raises(BadArgument, match="dtype is"):
        load_controlnet(net, torch.int8)
    with pytest.raises(BadArgument, match="compute is"):
        load_controlnet(net, compute="int4")


def test_int8_reaches_the_blocks_and_leaves_the_projections_exact(tmp_path):
    path = controls.write(tmp_path / "net.safetensors", controls.controlnet("2.1"))
    net = load_controlnet(path, compute="int8")
    modes = {
        name.split(".", 2)[-1]: layer.arithmetic.mode
        for name, layer in net.named_modules()
        if hasattr(layer, "arithmetic")
    }
    assert isinstance(net.control_layers[0], TransformerBlock)
    assert modes["attention.to_q"] == modes["feed_forward.w2"] == "int8"
    assert modes["after_proj"] == modes["before_proj"] == modes["adaLN_modulation.0"] == "exact"

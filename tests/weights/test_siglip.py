"""Files of vision towers: every naming, what is beside the tower in them, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.model_files import stored, write_gguf, write_json, write_safetensors
from tests.helpers.vision import CONFIG, PREFIX, mmproj_content, mmproj_keys, safetensors_file, their_tower
from zimage_core.config import TransformerConfig, VisionConfig
from zimage_core.errors import BadArgument, BadWeights, WrongModel
from zimage_core.models.vision_tower import VisionTower
from zimage_core.weights import names
from zimage_core.weights.card import check_compatible, check_fits
from zimage_core.weights.components import open_component
from zimage_core.weights.load import load_siglip, load_vae
from zimage_core.weights.siglip import FIXED_GRIDS

JSON = {
    "model_type": "siglip2_vision_model", "hidden_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 96, "patch_size": 4, "num_patches": 64,
}  # fmt: skip
HF = names.checkpoint_shapes(names.vision_table(CONFIG, "hf"))
REST = {
    "vision_model.head.probe": torch.zeros(1, 1, 48),
    "vision_model.head.mlp.fc1.weight": torch.zeros(96, 48),
    "text_model.encoder.layers.0.layer_norm1.weight": torch.zeros(48),
    "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(96, 48),
    "logit_scale": torch.zeros(1),
    "logit_bias": torch.zeros(1),
}
"""What a whole SigLIP2 has beside the tower."""


def card_of(path, stated=JSON):
    if stated is not None:
        write_json(path.parent / "config.json", stated)
    opened = open_component(path)
    opened.file.close()
    return opened.card


def same_numbers(tower: VisionTower, state: dict[str, torch.Tensor]) -> bool:
    own = dict(tower.named_parameters())
    wanted = {name.removeprefix(PREFIX).removeprefix("encoder."): value for name, value in state.items()}
    return own.keys() == wanted.keys() and all(torch.equal(own[n], wanted[n]) for n in own)


@pytest.mark.parametrize("prefix", ["", PREFIX, "siglip.vision_model."], ids=repr)
@pytest.mark.parametrize("whole", [False, True], ids=["tower", "whole model"])
def test_a_file_of_transformers_is_a_tower_under_any_prefix(tmp_path, prefix, whole):
    model = their_tower()
    path = safetensors_file(tmp_path / "x.safetensors", model, prefix, **(REST if whole else {}))
    card = card_of(path)
    assert (card.kind, card.config, card.prefix) == ("siglip", CONFIG, prefix)
    if whole and prefix != PREFIX:
        return  # no such file exists: its head and its tower have different prefixes
    assert card.sound, card
    assert not card.cautions
    assert same_numbers(load_siglip(path), model.state_dict())


def test_the_config_of_a_whole_model_is_read_by_its_vision_part(tmp_path):
    path = safetensors_file(tmp_path / "x.safetensors", their_tower(), **REST)
    card = card_of(path, {"model_type": "siglip2", "vision_config": JSON})
    assert card.sound
    assert card.config == CONFIG


@pytest.mark.parametrize("layout", names.VISION_LAYOUTS[1:])
def test_every_naming_of_an_mmproj_gives_the_same_numbers(tmp_path, layout):
    plain = mmproj_content("F32")
    values = plain.values()
    shapes = names.checkpoint_shapes(names.vision_table(CONFIG, layout))
    content = stored(shapes, matrix="F32", other="F32")
    by_module = {e.module: values[e.checkpoint] for e in names.vision_table(CONFIG, "mmproj")}
    for entry in names.vision_table(CONFIG, layout):
        value = by_module[entry.module]
        if entry.conv:
            value = value.view(48, 4, 4, 3).permute(0, 3, 1, 2)
        fmt, _, shape = content.tensors[entry.checkpoint]
        content.tensors[entry.checkpoint] = (fmt, value.contiguous().numpy(), shape)
    path = write_gguf(tmp_path / "mmproj.gguf", content, mmproj_keys())
    card = card_of(path, None)
    assert (card.kind, card.layout, card.sound) == ("siglip", layout, True)
    own = dict(load_siglip(path).named_parameters())
    assert own.keys() == by_module.keys()
    assert all(torch.equal(own[name], by_module[name]) for name in own)


def test_the_projector_in_an_mmproj_is_ignored(tmp_path):
    content = mmproj_content("F32")
    content.tensors |= stored({"mm.1.weight": (8, 48), "mm.1.bias": (8,)}).tensors
    card = card_of(write_gguf(tmp_path / "m.gguf", content, mmproj_keys()), None)
    assert card.sound
    assert not card.cautions


@pytest.mark.parametrize("size", [*FIXED_GRIDS - {(32, 8)}, (14, 27), (14, 64)], ids=str)
def test_an_mmproj_of_siglip_1_is_refused_by_name(tmp_path, size):
    config = replace(CONFIG, patch_size=size[0], num_patches=size[1] ** 2)
    content = mmproj_content("F16", "mmproj conv", config)
    path = write_gguf(tmp_path / "m.gguf", content, mmproj_keys(config))
    with pytest.raises(WrongModel, match=f"a table of {size[1] ** 2} positions: SigLIP 1"):
        load_siglip(path)


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=repr)
def test_a_siglip_1_of_transformers_is_refused_by_name(tmp_path, prefix):
    shapes = {prefix + name: shape for name, shape in HF.items()}
    shapes[f"{prefix}embeddings.patch_embedding.weight"] = (48, 3, 14, 14)
    path = write_safetensors(tmp_path / "x.safetensors", stored(shapes))
    with pytest.raises(WrongModel, match="convolution of 14 x 14 and a table of 64 positions: SigLIP 1"):
        load_siglip(path)


def test_an_mmproj_of_qwen_vl_is_none_of_siglip(tmp_path):
    content = mmproj_content("F16", "mmproj conv")
    content.tensors |= stored({"v.patch_embd.weight.1": (48, 3, 4, 4)}).tensors
    assert card_of(write_gguf(tmp_path / "m.gguf", content, mmproj_keys()), None).kind == "other"


def test_a_clip_tower_is_none_of_siglip(tmp_path):
    shapes = {PREFIX + name: shape for name, shape in HF.items()}
    shapes |= {f"{PREFIX}embeddings.class_embedding": (48,), "visual_projection.weight": (8, 48)}
    assert (
        card_of(write_safetensors(tmp_path / "x.safetensors", stored(shapes)), None).family == "clip-vision"
    )


def test_faults_are_listed(tmp_path):
    shapes = {PREFIX + name: shape for name, shape in HF.items()}
    del shapes[f"{PREFIX}encoder.layers.1.mlp.fc2.bias"]
    shapes[f"{PREFIX}post_layernorm.weight"] = (49,)
    shapes[f"{PREFIX}encoder.layers.0.strange.weight"] = (4,)
    path = write_safetensors(tmp_path / "x.safetensors", stored(shapes | {"vision_model.head.probe": (48,)}))
    write_json(tmp_path / "config.json", JSON)
    with pytest.raises(BadWeights) as raised:
        load_siglip(path)
    for said in ("1 missing: vision_model.encoder.layers.1.mlp.fc2.bias", "1 unexpected", "is (49,), wanted"):
        assert said in str(raised.value)


def test_the_heads_of_a_tower_of_unknown_width_must_be_stated(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", stored(HF))
    with pytest.raises(WrongModel, match="number of attention heads cannot be told"):
        load_siglip(path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"clip.use_silu": True}, "another activation"),
        ({"clip.vision.block_count": 4}, "the metadata says 4 layers, the tensors hold 3"),
        ({"clip.vision.attention.head_count": 5}, "5 heads do not divide"),
    ],
    ids=str,
)
def test_keys_that_ask_for_another_tower_are_refused(tmp_path, keys, said):
    path = write_gguf(tmp_path / "m.gguf", mmproj_content("F32"), {**mmproj_keys(), **keys})
    with pytest.raises(WrongModel, match=said):
        load_siglip(path)


def test_a_tower_where_another_network_is_wanted_says_what_it_is(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", mmproj_content("F32"), mmproj_keys())
    with pytest.raises(WrongModel, match=r"this is a SigLIP2 vision tower .*pass it as the siglip"):
        load_vae(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "siglip_vision_model"),
        ("hidden_act", "gelu"),
        ("patch_size", [4, 8]),
        ("num_patches", 60),
    ],
)
def test_a_config_that_needs_other_arithmetic_is_refused_by_the_field(field, value):
    with pytest.raises(BadArgument, match=field):
        VisionConfig.from_json({**JSON, field: value})


def test_a_config_leaves_out_what_is_transformers_default():
    from transformers import Siglip2VisionConfig

    assert VisionConfig.from_json({}) == VisionConfig.from_json(Siglip2VisionConfig().to_dict())
    assert VisionConfig.from_json({**JSON, "patch_size": [4, 4]}) == CONFIG


def test_a_tower_must_fit_the_transformer():
    omni = replace(TransformerConfig(), siglip_feat_dim=1152)
    check_compatible(omni, siglip=VisionConfig())
    with pytest.raises(WrongModel, match="width 48; the Z-Image transformer needs 1152"):
        check_fits(CONFIG, omni)
    with pytest.raises(WrongModel, match="takes text alone"):
        check_fits(VisionConfig(), TransformerConfig())


@pytest.mark.parametrize("prefix", ["text_model.", "cond_stage_model.transformer.text_model."])
def test_a_text_encoder_of_clip_is_no_tower(tmp_path, prefix):
    layer = ("layer_norm1", "layer_norm2", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    names = [f"encoder.layers.0.{name}" for name in layer]
    names += ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm"]
    state = {f"{prefix}{name}.weight": torch.zeros(8) for name in names}
    save_file(state, tmp_path / "clip_l.safetensors")
    assert card_of(tmp_path / "clip_l.safetensors", None).title == "a CLIP text encoder"

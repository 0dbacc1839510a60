"""Adapters are told by their own names, for the right model, and nothing is promised for them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.headers import dit, header
from zimage_core.cli.main import main
from zimage_core.weights.identify import identify

Q = "layers.0.attention.to_q"


def card(*leaves, module=Q, beside=(), rank=4):
    """The card of a file with tensors MODULE.LEAF; a leaf may have a shape."""
    shapes = {}
    for leaf in leaves:
        name, shape = leaf if isinstance(leaf, tuple) else (leaf, None)
        down = any(word in name for word in ("_A", "down", "_a"))
        shapes[f"{module}.{name}"] = shape or ((rank, 64) if down else (64, rank))
    return identify(header(shapes | dict.fromkeys(beside, ())))


PREFIXES = (
    "", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.",
    "base_model.model.transformer.", "model.", "unet.", "dit.", "lycoris_", "lora_unet_", "lora_transformer_",
    "lora_prior_unet_", "lora_dit_", "whatever_",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_says_nothing_about_the_model(prefix):
    target = prefix + (Q.replace(".", "_") if prefix.endswith("_") else Q)
    found = card("lora_down.weight", "lora_up.weight", module=target, beside=[f"{target}.alpha"])
    assert (found.kind, found.family, found.prefix, found.problem) == ("lora", "z-image", prefix, "")
    assert found.title == "a LoRA for Z-Image (rank 4, 1 layer)"


OFT = ("oft_blocks", (4, 16, 16))
KINDS = {
    "a LoRA": ["lora_A.weight", "lora_B.weight"],
    "a LoRA ": ["lora_A.my-adapter.weight", "lora_B.my-adapter.weight"],
    "a LoRA and its DoRA magnitudes": ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
    "a LoRA and its DoRA magnitudes ": ["lora_down.weight", "lora_up.weight", "dora_scale"],
    "a LoRA and full differences of a fine-tune": ["lora_down.weight", "lora_up.weight", "diff_b"],
    "a LoKr adapter": ["lokr_w1", "lokr_w2_a", "lokr_w2_b"],
    "a LoHa adapter": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
    "an OFT adapter": [OFT],
    "an OFT adapter ": ["oft_R.default.weight"],
    "a BOFT adapter": [("oft_blocks", (2, 4, 16, 16))],
    "a BOFT adapter ": ["boft_R", "boft_s"],
    "a GLoRA adapter": ["a1.weight", "a2.weight", "b1.weight", "b2.weight"],
    "an IA3 adapter": ["ia3_l"],
    "full differences of a fine-tune": ["diff", "diff_b"],
    "weights that a fine-tune sets": ["set_weight"],
    "differences of norms": ["w_norm", "b_norm"],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_each_kind_has_its_name(kind, prefix):
    module = prefix + (Q.replace(".", "_") if prefix.endswith("_") else Q)
    found = card(*KINDS[kind], module=module, beside=[f"{module}.alpha"])
    assert found.kind in ("lora", "adapter")
    assert found.title.startswith(f"{kind.strip()} for Z-Image (")
    assert found.problem == ""


def test_differences_of_norms_and_embedders_are_for_z_image_too():
    names = (
        "layers.3.attention_norm1", "layers.3.ffn_norm2", "cap_embedder.1", "final_layer.linear",
        "context_refiner.0.attention.norm_q", "all_x_embedder.2-1", "x_pad_token",
    )  # fmt: skip
    found = identify(header({f"diffusion_model.{name}.diff": (64,) for name in names}))
    assert (found.kind, found.family, found.problem) == ("adapter", "z-image", "")


LANGUAGE = "a LoRA for a text encoder or language model"


@pytest.mark.parametrize(
    ("module", "title"),
    [
        ("lora_te_layers_0_self_attn_q_proj", LANGUAGE),
        ("text_encoders.qwen3_4b.transformer.model.layers.0.mlp.up_proj", LANGUAGE),
        ("base_model.model.model.layers.0.self_attn.v_proj", LANGUAGE),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "a LoRA for another model"),
        ("double_blocks.0.img_attn.qkv", "a LoRA for another model"),
        ("control_layers.0.attention.to_q", "a LoRA for another model"),
    ],
)
def test_loras_of_other_networks_are_told(module, title):
    assert card("lora_down.weight", "lora_up.weight", module=module).title.startswith(title)


def test_a_lora_of_llama_cpp_is_told():
    shapes = {"blk.0.attn_q.weight.lora_a": (4, 64), "blk.0.attn_q.weight.lora_b": (64, 4)}
    assert identify(header(shapes)).title.startswith("a LoRA for a text encoder or language model (rank 4")


@pytest.mark.parametrize(
    "leaf", ["lora.{}.weight", "lora_linear_layer.{}.weight", "processor.to_q_lora.{}.weight"]
)
def test_old_names_of_diffusers_are_known(leaf):
    module = "layers.0.attention" if "processor" in leaf else Q
    found = card(leaf.format("down"), leaf.format("up"), module=module)
    assert (found.title, found.problem) == ("a LoRA for Z-Image (rank 4, 1 layer)", "")


def test_a_lora_of_both_networks_counts_them_apart():
    shapes = {}
    for module in ("lora_unet_layers_0_attention_qkv", "lora_te_layers_0_mlp_up_proj"):
        shapes |= {f"{module}.lora_down.weight": (4, 64), f"{module}.lora_up.weight": (64, 4)}
    found = identify(header(shapes))
    assert found.title == "a LoRA for Z-Image (rank 4, 1 layer, 1 of the text encoder)"
    assert found.problem == ""


def test_a_few_such_tensors_do_not_make_a_model_an_adapter():
    assert identify(header(dit() | {"extra.lora_A.weight": (4, 64), "y.diff": (4,)})).kind == "transformer"


def test_an_adapter_is_shown_with_how_to_use_it(tmp_path, capsys):
    factors = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
    strange = {f"other.{name.replace('to_q', 'xyz')}": value.clone() for name, value in factors.items()}
    save_file({**factors, **strange}, tmp_path / "lora.safetensors")
    assert main(["inspect", str(tmp_path / "lora.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "a LoRA for Z-Image" in shown
    assert "--lora FILE[:WEIGHT]" in shown
    assert "1 layers that Z-Image lacks are not used: other.layers.0.attention.xyz" in shown

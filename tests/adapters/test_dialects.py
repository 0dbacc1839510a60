"""An adapter does the same under the names of every program; names of other models match nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import adapters, tiny
from tests.helpers.gguf_writer import GGUFWriter
from zimage_core.adapters.dialects import Target, match, targets_of
from zimage_core.adapters.kinds import dense_of
from zimage_core.adapters.reading import read_adapter
from zimage_core.config import TextEncoderConfig, TransformerConfig
from zimage_core.errors import Unsupported
from zimage_core.weights import names

CONFIGS = {
    "transformer": TransformerConfig.from_json(tiny.TRANSFORMER),
    "text_encoder": TextEncoderConfig.from_json(tiny.TEXT_ENCODER),
}
LAYERS = (
    "layers.1.attention.to_q", "layers.0.attention.to_out.0", "noise_refiner.0.feed_forward.w1",
    "context_refiner.0.feed_forward.w2", "layers.1.adaLN_modulation.0", "cap_embedder.1", "t_embedder.mlp.2",
    "all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1",
)  # fmt: skip


def flat(name):
    return name.replace(".", "_").replace("-", "_")


def native(name):
    """A name of the original code, for layers that are not fused."""
    for ours, theirs in (("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer"),
                         ("attention.to_out.0", "attention.out")):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


DIALECTS = {
    "diffusers": (lambda n: f"transformer.{n}", "lora_A.weight", "lora_B.weight"),
    "peft": (lambda n: f"base_model.model.{n}", "lora_A.weight", "lora_B.weight"),
    "peft with the adapter's name": (lambda n: n, "lora_A.default.weight", "lora_B.default.weight"),
    "a default prefix": (lambda n: f"default.{n}", "lora_A.weight", "lora_B.weight"),
    "ai-toolkit": (lambda n: f"diffusion_model.{n}", "lora_A.weight", "lora_B.weight"),
    "comfyui": (lambda n: f"diffusion_model.{native(n)}", "lora_A.weight", "lora_B.weight"),
    "checkpoints": (lambda n: f"model.diffusion_model.{native(n)}", "lora_down.weight", "lora_up.weight"),
    "kohya": (lambda n: f"lora_unet_{flat(n)}", "lora_down.weight", "lora_up.weight"),
    "kohya native": (lambda n: f"lora_unet_{flat(native(n))}", "lora_down.weight", "lora_up.weight"),
    "onetrainer": (lambda n: f"lora_transformer_{flat(n)}", "lora_down.weight", "lora_up.weight"),
    "lycoris": (lambda n: f"lycoris_{flat(n)}", "lora_down.weight", "lora_up.weight"),
    "dots": (lambda n: n, "lora.down.weight", "lora.up.weight"),
    "dots split everywhere": (lambda n: n.replace("to_q", "to.q"), "lora.down.weight", "lora.up.weight"),
    "old diffusers": (lambda n: n, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "bare": (lambda n: n, "lora_A.weight", "lora_B.weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    return {"transformer": tiny.transformer(), "text_encoder": tiny.text_encoder()}


def factors(layer, seed=0):
    return adapters.random(3, layer.in_features, seed=seed), adapters.random(
        layer.out_features, 3, seed=seed + 1
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_names_the_same_layers(dialect, networks):
    rename, down, up = DIALECTS[dialect]
    wanted = {name: factors(networks["transformer"].get_submodule(name), i) for i, name in enumerate(LAYERS)}
    tensors = {}
    for name, (a, b) in wanted.items():
        tensors |= {f"{rename(name)}.{down}": a, f"{rename(name)}.{up}": b}
    found = read_adapter(tensors, "x", networks)
    assert found.facts.unmatched == ()
    assert found.facts.tensors == 2 * len(LAYERS)
    changes = found.parts["transformer"].changes
    assert set(changes) == set(LAYERS)
    for name, (a, b) in wanted.items():
        assert torch.equal(changes[name].down, a)
        assert torch.equal(changes[name].up, b)


@pytest.mark.parametrize(
    "prefix", ["lora_unet_layers_0_attention_qkv", "diffusion_model.layers.0.attention.qkv"]
)
def test_a_fused_layer_is_cut_in_three_with_one_first_factor(prefix, networks):
    a, b = adapters.random(3, 32), adapters.random(96, 3, seed=1)
    tensors = {
        f"{prefix}.lora_down.weight": a,
        f"{prefix}.lora_up.weight": b,
        f"{prefix}.alpha": torch.tensor(1.5),
    }
    changes = read_adapter(tensors, "x", networks).parts["transformer"].changes
    for i, part in enumerate("qkv"):
        own = changes[f"layers.0.attention.to_{part}"]
        assert torch.equal(own.down, a)
        assert torch.equal(own.up, b[32 * i : 32 * (i + 1)] * 0.5)


def test_fused_factors_beside_split_ones_are_left_out(networks):
    split = {}
    for i, part in enumerate("qkv"):
        a, b = adapters.random(3, 32, seed=i), adapters.random(32, 3, seed=i + 5)
        split |= {
            f"layers.0.attention.to_{part}.lora.down.weight": a,
            f"layers.0.attention.to_{part}.lora.up.weight": b,
        }
    fused = {"layers.0.attention.qkv.lora.down.weight": adapters.random(3, 32),
             "layers.0.attention.qkv.lora.up.weight": adapters.random(96, 3)}  # fmt: skip
    both = read_adapter({**fused, **split}, "x", networks).parts["transformer"].changes
    alone = read_adapter(split, "x", networks).parts["transformer"].changes
    assert {name: own.up.sum() for name, own in both.items()} == {
        name: own.up.sum() for name, own in alone.items()
    }


ENCODERS = ("text_encoder.model.", "text_encoder.", "lora_te_", "lora_te1_", "lora_te_model_",
            "base_model.model.model.", "text_encoders.qwen3_4b.transformer.model.", "model.")  # fmt: skip


@pytest.mark.parametrize("prefix", ENCODERS)
def test_the_text_encoder_is_changed_under_each_prefix(prefix, networks):
    name = "layers.1.self_attn.q_proj"
    shown = prefix + (flat(name) if prefix.endswith("_") else name)
    layer = networks["text_encoder"].get_submodule(name)
    a, b = factors(layer)
    found = read_adapter({f"{shown}.lora_A.weight": a, f"{shown}.lora_B.weight": b}, "x", networks)
    assert set(found.parts) == {"text_encoder"}
    assert torch.equal(found.parts["text_encoder"].changes[name].down, a)


def test_the_last_layer_of_the_text_encoder_is_passed_over_in_silence(networks):
    first, last = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"
    a, b = factors(networks["text_encoder"].layers[0].mlp.up_proj)
    tensors = {
        f"{n}.{leaf}": t for n in (first, last) for leaf, t in (("lora_A.weight", a), ("lora_B.weight", b))
    }
    found = read_adapter(tensors, "x", networks)
    assert set(found.parts["text_encoder"].changes) == {"layers.0.mlp.up_proj"}
    assert found.facts.unmatched == ()


def test_a_gguf_lora_of_llama_cpp_is_read_with_its_alpha(tmp_path, networks):
    a, b = factors(networks["text_encoder"].layers[1].self_attn.q_proj)
    writer = GGUFWriter()
    writer.key("general.architecture", "qwen3").key("adapter.lora.alpha", 6.0)
    writer.tensor("blk.1.attn_q.weight.lora_a", a.numpy())
    writer.tensor("blk.1.attn_q.weight.lora_b", b.numpy())
    writer.write(tmp_path / "lora.gguf")
    own = read_adapter(tmp_path / "lora.gguf", "x", networks).parts["text_encoder"].changes
    assert torch.allclose(own["layers.1.self_attn.q_proj"].up, 2 * b)


def test_every_matrix_of_both_networks_has_exactly_one_place():
    found = targets_of(CONFIGS)
    places = {target for targets in found.values() for target in targets}
    for component, config in CONFIGS.items():
        table = names.transformer_table if component == "transformer" else names.text_encoder_table
        for entry in table(config, "split" if component == "transformer" else "hf"):
            if not entry.module.endswith(".bias"):
                assert Target(component, entry.module.removesuffix(".weight")) in places


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "siglip_refiner.0.attention.to_q.lora_A.weight",
        "layers.9.attention.to_q.lora_A.weight",
        "layers.0.attention.to_q.weight",
    ],
)
def test_layers_of_other_models_match_nothing(name):
    assert match([name], CONFIGS).unmatched == [name]


def test_metadata_of_diffusers_and_a_folder_of_peft_give_the_scale(tmp_path, networks):
    name = "layers.0.attention.to_q"
    a, b = factors(networks["transformer"].get_submodule(name))
    tensors = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    config = {"transformer.r": 3, "transformer.lora_alpha": 6, "text_encoder.lora_alpha": 60}
    save_file(tensors, tmp_path / "one.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    tiny.write_json(folder / "adapter_config.json", {"r": 3, "lora_alpha": 6})
    save_file(tensors, folder / "other.safetensors")
    other = read_adapter(folder / "other.safetensors", "x", networks).parts["transformer"].changes[name]
    assert torch.equal(other.up, b), "the configuration is that of adapter_model"
    for path in (tmp_path / "one.safetensors", folder / "adapter_model.safetensors"):
        own = read_adapter(path, "x", networks).parts["transformer"].changes[name]
        assert torch.equal(own.up, 2 * b)


@pytest.mark.parametrize("kind", ["loha", "lokr half", "lokr full"])
def test_alpha_of_other_kinds_of_peft_counts(kind, networks, tmp_path):
    layer = networks["transformer"].layers[0].attention.to_q
    leaves = adapters.kind(kind, layer.out_features, layer.in_features)[0]
    leaves.pop("alpha")
    save_file(
        adapters.file_of({"base_model.model.layers.0.attention.to_q": leaves}), tmp_path / "a.safetensors"
    )
    config = {"peft_type": "LOHA" if kind == "loha" else "LOKR", "r": 2, "alpha": 6}

    def delta():
        found = read_adapter(tmp_path, "x", networks).parts["transformer"].changes
        return dense_of(found["layers.0.attention.to_q"])

    without = delta()
    tiny.write_json(tmp_path / "adapter_config.json", config)
    assert torch.allclose(delta(), 3 * without)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"init_lora_weights": "pissa_niter_4"}, "weights that pissa_niter_4 changed; convert it by PEFT"),
     ({"num_cayley_neumann_terms": 7}, "series of 7 terms, wanted 5")],
)  # fmt: skip
def test_configurations_that_ask_for_more_than_is_applied_are_refused(config, message, networks, tmp_path):
    pair = adapters.split_lora(32, 32)[0]
    save_file(adapters.file_of({"layers.0.attention.to_q": pair}), tmp_path / "a.safetensors")
    tiny.write_json(tmp_path / "adapter_config.json", config)
    with pytest.raises(Unsupported, match=f"a.safetensors: .*{message}"):
        read_adapter(tmp_path, "x", networks)


def test_norms_pad_tokens_and_biases_are_changed_by_their_differences(networks):
    norm, pad, bias = adapters.random(32), adapters.random(1, 32), adapters.random(128)
    found = read_adapter(
        {"lora_unet_layers_0_attention_norm1.w_norm": norm, "diffusion_model.x_pad_token.diff": pad,
         "diffusion_model.layers.0.adaLN_modulation.0.diff_b": bias,
         "diffusion_model.layers.0.attention.q_norm.set_weight": adapters.random(16)}, "x", networks,
    )  # fmt: skip
    values = found.parts["transformer"].values
    names = ["layers.0.adaLN_modulation.0.bias", "layers.0.attention.norm_q.weight"]
    assert sorted(values) == [*names, "layers.0.attention_norm1.weight", "x_pad_token"]
    assert values["layers.0.attention.norm_q.weight"][1] is True

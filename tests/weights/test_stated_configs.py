"""What a config states is obeyed or refused by name, whatever kind of value it has."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.helpers.headers import encoder, header, vae
from tests.helpers.model_files import encoder_metadata, toy_encoder
from tests.helpers.tiny import TEXT_ENCODER, TRANSFORMER, VAE
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument
from zimage_core.weights.identify import identify

KINDS = {
    TransformerConfig: TRANSFORMER | {"siglip_feat_dim": None},
    TextEncoderConfig: TEXT_ENCODER
    | {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None, "layer_types": None}
    | {"max_window_layers": 3, "rope_scaling": None, "rope_parameters": None, "mlp_bias": False}
    | {"partial_rotary_factor": 1.0, "is_causal": True, "attn_logit_softcapping": None},
    AutoencoderConfig: VAE
    | {"act_fn": "silu", "mid_block_add_attention": True, "latents_mean": None, "latents_std": None},
}
FIELDS = [(kind, name) for kind, data in KINDS.items() for name in data if name != "_class_name"]
STRANGE: list[Any] = [None, "word", "", [], [None], ["x"], {}, {"a": 1}, True, False]
STRANGE += [0, -1, 1.5, math.nan, math.inf, 1e300, 10**30]


def refusal(kind, change):
    """Why a config with a changed field is refused; "" if it is not."""
    try:
        kind.from_json(KINDS[kind] | change)
    except BadArgument as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_field_of_any_kind_is_read_or_named(kind, field):
    for value in STRANGE:
        message = refusal(kind, {field: value})
        assert not message or value is None or field in message, value
        assert message.isprintable()


REFUSED = [
    (TransformerConfig, {"qk_norm": False}, "qk_norm is False, wanted True"),
    (TransformerConfig, {"all_patch_size": [2, 4]}, "all_patch_size"),
    (TransformerConfig, {"all_f_patch_size": [2]}, "all_f_patch_size"),
    (TransformerConfig, {"axes_dims": [4, 6, 6, 0]}, "axes_dims"),
    (TextEncoderConfig, {"hidden_act": "gelu"}, "hidden_act is 'gelu', wanted 'silu' or 'swish'"),
    (TextEncoderConfig, {"use_sliding_window": True, "sliding_window": 8}, "sliding_window is 8"),
    (TextEncoderConfig, {"use_sliding_window": True}, "sliding_window is None"),
    (TextEncoderConfig, {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}, "sliding_window"),
    (TextEncoderConfig, {"layer_types": ["linear_attention"] * 3}, "layer_types"),
    (TextEncoderConfig, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    (TextEncoderConfig, {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
    (TextEncoderConfig, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
    (TextEncoderConfig, {"rope_parameters": {"rope_theta": 1e6}}, r"not both 10000\.0 and 1000000\.0"),
    (TextEncoderConfig, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    (TextEncoderConfig, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (TextEncoderConfig, {"mlp_bias": True}, "mlp_bias"),
    (TextEncoderConfig, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (TextEncoderConfig, {"is_causal": False}, "is_causal"),
    (AutoencoderConfig, {"act_fn": "gelu"}, "act_fn is 'gelu', wanted 'silu' or 'swish'"),
    (
        AutoencoderConfig,
        {"use_quant_conv": True},
        "use_quant_conv is True, wanted false; FLUX.1's",
    ),
    (AutoencoderConfig, {"mid_block_add_attention": False}, "mid_block_add_attention"),
    (AutoencoderConfig, {"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types"),
    (AutoencoderConfig, {"latents_mean": [0.5] * 16}, "latents_mean"),
    (AutoencoderConfig, {"scaling_factor": 0}, "scaling_factor is 0, wanted a number from 0.0001"),
]


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_other_arithmetic_is_refused_by_name(kind, change, message):
    with pytest.raises(BadArgument, match=message):
        kind.from_json(KINDS[kind] | change)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (TransformerConfig, {"n_kv_heads": 1}),  # diffusers ignores it
        (TransformerConfig, {"n_kv_heads": "x"}),
        (TextEncoderConfig, {"sliding_window": 8, "max_window_layers": 28}),  # not in use, as in Qwen2.5
        (TextEncoderConfig, {"use_sliding_window": True, "sliding_window": 4096}),  # longer than any prompt
        (TextEncoderConfig, {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}),  # never run
        (TextEncoderConfig, {"rope_scaling": {"rope_type": "default"}, "hidden_act": "swish"}),
        (TextEncoderConfig, {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}}),
        (TextEncoderConfig, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
        (TextEncoderConfig, {"attention_dropout": 0.5, "tie_word_embeddings": False}),
        (AutoencoderConfig, {"force_upcast": True, "sample_size": 64, "act_fn": "swish"}),
    ],
    ids=str,
)
def test_what_changes_no_number_is_accepted(kind, change):
    assert kind.from_json(KINDS[kind] | change) == kind.from_json(KINDS[kind])


def test_qwen2_has_its_biases_whatever_its_config_says():
    stated = TEXT_ENCODER | {"model_type": "qwen2", "attention_bias": False}
    assert TextEncoderConfig.from_json(stated).attention_bias


ENCODER = toy_encoder()


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("attention.sliding_window", 8, "attention.sliding_window is 8"),
        ("attention.sliding_window", "x", "attention.sliding_window is x"),
        ("rope.scaling.type", "yarn", "rope.scaling is 'yarn'"),
        ("rope.scaling.factor", 4.0, "by 4.0"),
        ("rope.scale_linear", 4.0, "by 4.0"),
        ("rope.dimension_count", 64, "'qwen3.rope.dimension_count' is 64, wanted 128"),
        ("attention.value_length", 64, "wanted 128"),
        ("attention.head_count_kv", 4, "wanted 2"),
        ("attention.causal", False, "attention.causal"),
        ("attention.scale", 0.5, "attention.scale"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        ("embedding_scale", 12.0, "embedding_scale"),
        ("expert_count", 8, "expert_count"),
    ],
)
def test_keys_of_a_gguf_encoder_that_ask_for_other_arithmetic(key, value, shown):
    metadata = encoder_metadata(ENCODER) | {f"qwen3.{key}": value}
    assert shown in identify(header(encoder("gguf", ENCODER), metadata), "text_encoder").problem


def test_keys_of_a_gguf_encoder_that_ask_for_nothing():
    keys = {
        "attention.sliding_window": 0, "rope.scaling.type": "none", "rope.scaling.factor": 4.0,
        "rope.dimension_count": 128, "attention.value_length": 128, "attention.causal": True,
        "attention.scale": 128**-0.5, "embedding_scale": 1.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    metadata = encoder_metadata(ENCODER) | {f"qwen3.{key}": value for key, value in keys.items()}
    for stated in (metadata, {key: str(value) for key, value in metadata.items()}):  # texts in safetensors
        assert identify(header(encoder("gguf", ENCODER), stated)).sound


def test_a_vae_with_quant_conv_is_refused_with_the_reason():
    card = identify(header(vae() | {"post_quant_conv.weight": (16, 16, 1, 1)}), "vae")
    assert "quant_conv" in card.title

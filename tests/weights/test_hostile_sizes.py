"""False shapes, metadata and configs are refused with one of our errors before anything is built."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.headers import dit, encoder, header, vae
from tests.helpers.model_files import stored, toy_encoder, write_safetensors
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadWeights, WrongModel, ZImageError
from zimage_core.weights.card import require
from zimage_core.weights.identify import identify
from zimage_core.weights.load import load_text_encoder, load_transformer, load_vae


def changed(shapes, **new):
    return shapes | {n.replace("__", "."): s for n, s in new.items()}


@pytest.mark.parametrize(
    ("shapes", "metadata", "component", "message"),
    [
        (
            dit() | {"layers.4294967295.x.weight": (2,)},
            {},
            "transformer",
            "no model has more than 512 layers",
        ),
        (
            dit() | {"layers.00000000009.x.weight": (2,)},
            {},
            "transformer",
            "no model has more than 512 layers",
        ),
        (
            encoder() | {"blk.99999.attn_q.weight": (2, 2)},
            {},
            "text_encoder",
            "no model has more than 512 layers",
        ),
        (
            dit() | {"layers.0.attention.q_norm.weight": (100,)},
            {},
            "transformer",
            "heads of 100 channels do not divide",
        ),
        (dit() | {"layers.0.attention.q_norm.weight": (1,)}, {}, "transformer", "1"),
        (dit() | {"x_embedder.weight": (3840, 63)}, {}, "transformer", "63 numbers a patch"),
        (dit() | {"x_embedder.weight": (3840, 64, 2, 2)}, {}, "transformer", "wanted 2 axes"),
        (dit() | {"x_embedder.weight": (1 << 60, 64)}, {}, "transformer", "sane length"),
        (dit() | {"x_embedder.weight": (0, 64)}, {}, "transformer", "sane length"),
        (dit() | {"t_embedder.mlp.0.weight": (1024, 128)}, {}, "transformer", "reads 128 channels"),
        (dit(), {"zimage.axes_dims": [1, 2]}, "transformer", "array of three"),
        (dit(), {"zimage.axes_dims": [32, 48, 50]}, "transformer", "add up to 130"),
        (dit(), {"zimage.axes_dims": [-32, 80, 80]}, "transformer", "array of three"),
        (dit(), {"zimage.norm_eps": float("nan")}, "transformer", "wanted a number"),
        (dit(), {"zimage.norm_eps": 7.0}, "transformer", "wanted 0 to 0.1"),
        (
            encoder(),
            {"general.architecture": "qwen3", "qwen3.block_count": 4294967295},
            "text_encoder",
            "block_count",
        ),
        (
            encoder(),
            {"general.architecture": "qwen3", "qwen3.block_count": 12},
            "text_encoder",
            "says 12 layers",
        ),
        (
            encoder(),
            {"general.architecture": "qwen3", "qwen3.attention.head_count": 31},
            "text_encoder",
            "31 heads",
        ),
        (
            encoder(),
            {"general.architecture": "qwen3", "qwen3.attention.head_count": 2.5},
            "text_encoder",
            "whole number",
        ),
        (
            encoder(),
            {"general.architecture": "qwen3", "qwen3.attention.head_count": [1]},
            "text_encoder",
            "wanted a number",
        ),
        (encoder(), {"general.architecture": "llama"}, "text_encoder", "has no norms on q and k"),
        (
            encoder(config=toy_encoder("llama")),
            {"general.architecture": "llama"},
            "text_encoder",
            "do not tell their head count",
        ),
        (
            encoder(config=toy_encoder("llama")) | {"rope_freqs.weight": (64,)},
            {"general.architecture": "llama"},
            "text_encoder",
            "scales its rotary frequencies",
        ),
        (encoder() | {"blk.0.attn_k_norm.weight": (64,)}, {}, "text_encoder", r"\(64,\), wanted \(128,\)"),
        (encoder() | {"blk.0.attn_k.weight": (1000, 2560)}, {}, "text_encoder", "1000 key rows"),
        (vae() | {"encoder.down.0.block.0.conv1.weight": (127, 128, 3, 3)}, {}, "vae", "misshapen"),
        (vae(), {"zimage.norm_num_groups": "7"}, "vae", "does not divide into 7"),
        (vae(), {"zimage.scaling_factor": "x" * 99}, "vae", "wanted a number"),
        (vae() | {"decoder.conv_in.weight": (512, 16, 3, 3, 3)}, {}, "vae", "video VAE"),
    ],
)
def test_sizes_that_lie_are_refused_with_a_sentence(shapes, metadata, component, message):
    card = identify(header(shapes, metadata), component)
    with pytest.raises((WrongModel, BadWeights), match=message):
        require(card, component, "x")


def test_a_config_of_no_heads_is_refused():
    """Its head_dim would be a division by zero."""
    stated = {"model_type": "qwen3", "hidden_size": 2560, "num_attention_heads": 0, "num_hidden_layers": 36}
    card = identify(header(encoder()), "text_encoder", stated)
    assert card.problem.startswith("config.json does not fit: text encoder config: num_attention_heads is 0")


def test_many_strange_names_are_counted_and_a_few_are_shown():
    shapes = dit() | {f"x{i}.weight": (1,) for i in range(60_000)}
    card = identify(header(shapes))
    assert len(card.unexpected) == 60_000
    assert len(card.faults()) < 1000


TINY = {
    "transformer": (
        load_transformer,
        dit("fused", TransformerConfig(32, 1, 1, 2, cap_feat_dim=8, hidden_dim=16, axes_dims=(4, 6, 6))),
    ),
    "text_encoder": (
        load_text_encoder,
        encoder(
            "hf", toy_encoder(hidden_size=16, num_layers=2, head_dim=4, intermediate_size=16, vocab_size=8)
        ),
    ),
    "vae": (
        load_vae,
        vae("bfl", AutoencoderConfig((4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=4)),
    ),
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("component", TINY)
@given(data=st.data())
def test_no_mutilation_gets_past_our_own_errors(tmp_path_factory, component, data):
    """Rename, drop, reshape, swap tensors, change config fields: it loads, or a ZImageError says why not."""
    load, shapes = TINY[component]
    shapes = dict(shapes)
    pick = st.sampled_from(sorted(shapes))
    for _ in range(data.draw(st.integers(0, 4))):
        name = data.draw(pick)
        old = shapes.pop(name, (2,))
        match data.draw(st.sampled_from(["drop", "rename", "reshape", "swap", "renumber"])):
            case "rename":
                shapes[data.draw(st.text("abw.01_", min_size=1, max_size=12))] = old
            case "reshape":
                shapes[name] = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 16, 32, 40]), max_size=5)))
            case "swap":
                other = data.draw(pick)
                shapes[name], shapes[other] = shapes.get(other, old), old
            case "renumber":
                shapes[name.replace(".0.", f".{data.draw(st.integers(0, 10**6))}.")] = old
    folder = tmp_path_factory.mktemp("m")
    path = write_safetensors(folder / "model.safetensors", stored(shapes))
    if data.draw(st.booleans()):
        fields = {**asdict(TransformerConfig()), **asdict(TextEncoderConfig()), **asdict(AutoencoderConfig())}
        config = data.draw(st.dictionaries(st.sampled_from(sorted(fields)), JSON, max_size=6))
        (folder / "config.json").write_text(json.dumps({**fields, **config}))
        path = folder
    with contextlib.suppress(ZImageError):
        load(path)

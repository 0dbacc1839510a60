"""Language models from files of every layout, and files that lack a part of one."""

import json

import pytest
import torch

from tests.helpers.loaded import hf_to_gguf, weights
from tests.helpers.model_files import (
    Stored,
    encoder_metadata,
    stored,
    toy_encoder,
    write_gguf,
    write_safetensors,
)
from zimage_core.errors import BadWeights, Unsupported, WrongModel
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.weights import names
from zimage_core.weights.components import open_component
from zimage_core.weights.language import load_language_model, max_positions
from zimage_core.weights.load import load_text_encoder, opened_file

IDS = torch.arange(9)


def whole(arch="qwen3", matrix="F32", head=False, **changes):
    """The config and the tensors of a whole language model, with transformers' names without "model."."""
    config = toy_encoder(arch, **changes)
    table = (*names.text_encoder_table(config, "hf"), *names.ending_table(config, "hf"))
    shapes = names.checkpoint_shapes(table)
    if head:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return config, stored(shapes, matrix=matrix)


def gguf(path, config, content, **metadata):
    file = hf_to_gguf(config, content, permute=config.arch == "llama")
    if "lm_head.weight" in file.tensors:
        file.tensors["output.weight"] = file.tensors.pop("lm_head.weight")
    return write_gguf(path, file, {**encoder_metadata(config), **metadata})


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("matrix", ["F32", "Q4_K"])
@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
def test_a_gguf_gives_the_tensors_that_transformers_names(tmp_path, arch, matrix, head):
    config, content = whole(arch, matrix, head)
    ours, values = load_language_model(gguf(tmp_path / "x.gguf", config, content)), content.values()
    got = weights(ours.ending)
    want = {f"layer.{n.removeprefix('layers.2.')}": v for n, v in values.items() if n.startswith("layers.2.")}
    want["norm.weight"] = values["norm.weight"]
    want["head.weight"] = values["lm_head.weight" if head else "embed_tokens.weight"]
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert ours.ending.tied is not head


@pytest.mark.parametrize("prefix", ["", "model.", "text_encoders.qwen3_4b.transformer.model."])
def test_safetensors_may_have_any_prefix_and_the_head_beside_it(tmp_path, prefix):
    _, content = whole()
    _, full = whole(head=True)
    tied = load_language_model(write_safetensors(tmp_path / "a.safetensors", content.prefixed(prefix)))
    assert tied.ending.tied
    own = full.prefixed(prefix)
    own.tensors[f"{prefix.removesuffix('model.')}lm_head.weight"] = own.tensors.pop(f"{prefix}lm_head.weight")
    found = load_language_model(write_safetensors(tmp_path / "b.safetensors", own))
    assert torch.equal(weights(found.ending)["head.weight"], full.values()["lm_head.weight"])


def test_an_encoder_that_is_loaded_gives_the_rest_from_its_own_file(tmp_path):
    config, content = whole()
    path = gguf(tmp_path / "x.gguf", config, content)
    encoder = load_text_encoder(path)
    path.rename(tmp_path / "moved.gguf")
    ours = load_language_model(encoder)
    assert ours.encoder is encoder
    with torch.no_grad():
        assert torch.equal(ours(IDS), load_language_model(tmp_path / "moved.gguf")(IDS))
    opened = open_component(tmp_path / "moved.gguf", "text_encoder")
    assert opened_file(load_language_model(opened).encoder) is opened


@pytest.mark.parametrize("layout", ["gguf", "safetensors"])
@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (("layers.2.",), r"its last layer \(number 2, counted from 0\)"),
        (("layers.2.mlp.up_proj",), r"its last layer \(number 2, counted from 0\)"),
        (("norm.weight",), "its final norm"),
        (("layers.2.", "norm.weight"), "its last layer .* and its final norm"),
    ],
)
def test_a_file_that_lacks_a_part_says_which_and_what_to_give(tmp_path, layout, lacking, words):
    config, content = whole()
    cut = Stored({name: t for name, t in content.tensors.items() if not name.startswith(lacking)})
    if layout == "gguf":
        path = gguf(tmp_path / "x.gguf", config, cut)
    else:
        path = write_safetensors(tmp_path / "x.safetensors", cut)
        (tmp_path / "config.json").write_text(json.dumps(JSON))
    load_text_encoder(path)  # which draws as ever
    with pytest.raises(
        WrongModel, match=rf"cannot write text: its file lacks {words}, .*; give a whole Qwen3"
    ):
        load_language_model(path)


JSON = {
    "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 512, "vocab_size": 64,
    "rope_theta": 1e6, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize("stated", [True, False, None])
def test_a_head_that_is_stated_to_be_apart_must_be_there(tmp_path, stated):
    _, content = whole()
    path = write_safetensors(tmp_path / "x.safetensors", content)
    own = {} if stated is None else {"tie_word_embeddings": stated}
    (tmp_path / "config.json").write_text(json.dumps({**JSON, **own}))
    if stated is False:
        with pytest.raises(WrongModel, match=r"lacks its head \(lm_head.weight\)"):
            load_language_model(path)
    else:
        assert load_language_model(path).ending.tied


def test_a_wide_model_without_head_was_cut(tmp_path):
    config, content = whole(hidden_size=3584, num_heads=2, num_kv_heads=1, intermediate_size=64)
    with pytest.raises(WrongModel, match=r"lacks its head \(output.weight\)"):
        load_language_model(gguf(tmp_path / "x.gguf", config, content))


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    config, content = whole()
    content.tensors["norm.weight"] = stored({"x": (255,)}).tensors["x"]
    with pytest.raises(BadWeights, match=r"output_norm.weight is \(255,\), wanted \(256,\)"):
        load_language_model(gguf(tmp_path / "x.gguf", config, content))


def test_an_encoder_built_in_memory_has_no_rest():
    with pytest.raises(Unsupported, match="came from no file"):
        load_language_model(TextEncoder(toy_encoder()))


@pytest.mark.parametrize(
    ("metadata", "most"),
    [
        ({}, 40960),
        ({"qwen3.context_length": 512}, 512),
        ({"qwen3.context_length": 8192, "qwen3.attention.sliding_window": 2048}, 2048),
        ({"qwen3.context_length": 0}, 40960),
    ],
)
def test_the_longest_text_is_what_the_file_says(tmp_path, metadata, most):
    config, content = whole()
    path = gguf(tmp_path / "x.gguf", config, content, **metadata)
    assert max_positions(open_component(path, "text_encoder")) == most


def test_the_longest_text_is_what_a_config_says(tmp_path):
    _, content = whole()
    path = write_safetensors(tmp_path / "x.safetensors", content)
    (tmp_path / "config.json").write_text(json.dumps(JSON))
    assert load_language_model(path).max_positions == 4096

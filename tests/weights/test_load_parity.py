"""Files that diffusers and transformers wrote themselves load into the same numbers as their models give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import parity
from tests.helpers.loaded import hf_to_gguf
from tests.helpers.model_files import Stored, encoder_metadata, write_gguf
from zimage_core.config import TextEncoderConfig
from zimage_core.weights.load import load_text_encoder, load_transformer, load_vae

pytestmark = pytest.mark.parity


def as_stored_rows(values: dict[str, torch.Tensor]) -> Stored:
    """Rows of bytes, as the permutation wants them."""
    return Stored(
        {
            n: ("F32", np.ascontiguousarray(v.detach().numpy()).view(np.uint8).copy(), tuple(v.shape))
            for n, v in values.items()
        }
    )


@torch.no_grad()
def test_transformer_folder_of_diffusers(tmp_path):
    theirs, _ = parity.transformer_pair()
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    model = load_transformer(tmp_path)
    parity.widen(theirs)
    parity.widen(model)
    with parity.in_float64():
        x, t, caption = parity.transformer_inputs([(6, 10)], [5])
        wanted = theirs([x[0]], t, [caption[0]], return_dict=False)[0][0]
        assert parity.apart(model(x, t, caption)[0], wanted) <= parity.WIDE


@torch.no_grad()
def test_vae_folder_of_diffusers(tmp_path):
    theirs, _ = parity.autoencoder_pair()
    theirs.save_pretrained(tmp_path / "vae")
    model = load_vae(tmp_path / "vae")
    assert model.config.norm_num_groups == 8  # only config.json tells
    assert model.config.scaling_factor == theirs.config.scaling_factor
    parity.widen(theirs)
    parity.widen(model)
    with parity.in_float64():
        z = torch.randn(1, 16, 3, 4, generator=torch.Generator().manual_seed(0))
        assert parity.apart(model.decode(z), theirs.decode(z).sample) <= parity.WIDE


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "llama"])
@torch.no_grad()
def test_text_encoder_folder_and_gguf(tmp_path, arch):
    """The same llama weights come permuted in a GGUF and straight in safetensors."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in parity.ENCODERS[arch])
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 100,
    }  # fmt: skip
    if arch == "qwen3":
        sizes["head_dim"] = 16
    theirs = model_class(config_class(**sizes)).eval()
    parity.randomise(theirs, 0.08)
    ids = torch.randint(0, 100, (9,), generator=torch.Generator().manual_seed(2))

    theirs.save_pretrained(tmp_path / "text_encoder")
    from_folder = load_text_encoder(tmp_path / "text_encoder")
    config = TextEncoderConfig.from_json(theirs.config.to_dict())
    file = hf_to_gguf(config, as_stored_rows(theirs.state_dict()), permute=arch == "llama")
    from_gguf = load_text_encoder(write_gguf(tmp_path / "x.gguf", file, encoder_metadata(config)))
    assert from_gguf.config == from_folder.config
    assert torch.equal(from_gguf(ids), from_folder(ids))

    parity.widen(theirs)
    parity.widen(from_folder)
    with parity.in_float64():
        wanted = theirs(ids[None], output_hidden_states=True).hidden_states[-2][0]
        assert parity.apart(from_folder(ids), wanted) <= parity.WIDE

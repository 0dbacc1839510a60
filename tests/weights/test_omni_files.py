"""Omni transformers in files: packed, streamed, planned, adapted and saved with their vision branch."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from tests.helpers import adapters, tiny
from tests.helpers import omni_transformer as omni
from tests.helpers.loaded import split_names
from tests.helpers.model_files import TOY_DIT, stored, write_gguf, write_safetensors
from tests.helpers.streamed import ringed, streamed
from zimage_core import ZImagePipeline, load_transformer, quantize_file
from zimage_core.export.saving import save_network
from zimage_core.memory.attach import unstream
from zimage_core.memory.sizes import read_sizes
from zimage_core.models.omni import OmniTransformer
from zimage_core.nn.linear import tensors_of
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights import names
from zimage_core.weights.components import open_parts

CONFIG = replace(TOY_DIT, siglip_feat_dim=96)
SHAPES = names.checkpoint_shapes(names.transformer_table(CONFIG, "fused"))
CALL = omni.call(width=256, features=96).arguments


@pytest.fixture(scope="module")
def content():
    return stored(SHAPES, matrix="Q8_0")


@pytest.fixture(scope="module")
def packed(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("omni") / "omni.gguf"
    return write_gguf(path, content, {"general.architecture": "lumina2"})


@torch.no_grad()
def test_a_packed_omni_is_its_dense_twin(packed, content):
    model = load_transformer(packed)
    assert isinstance(model, OmniTransformer)
    assert isinstance(model.siglip_refiner[0].feed_forward.w2.weight, QuantTensor)
    assert model.opened.card.variant == "omni"
    dense = OmniTransformer(CONFIG)
    dense.load_state_dict(split_names(content.values()))
    torch.testing.assert_close(model(**CALL)[0], dense(**CALL)[0], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("refiner_stays", [True, False])
def test_a_streamed_omni_is_the_resident_one_to_the_bit(packed, refiner_stays):
    model = load_transformer(packed)
    wanted = model(**CALL)[0]
    block = model.siglip_refiner[0].feed_forward.w1
    home, seen = block.weight.packed.data_ptr(), []
    block.register_forward_hook(lambda module, *_: seen.append(module.weight.packed.data_ptr()))
    with closing(streamed(model, (), refiner_stays=refiner_stays, **ringed(slots=2))):
        assert torch.equal(model(**CALL)[0], wanted)
        assert seen != [home], "it was brought from the map"
        assert (block.weight.packed.data_ptr() == home) != refiner_stays, "and taken away again"
    unstream(model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder whose transformer is Omni."""
    path = tiny.folder(tmp_path_factory.mktemp("omni") / "tiny")
    save_network(omni.transformer(), path / "transformer", overwrite=True)
    return path


def test_a_saved_omni_is_read_by_diffusers_and_by_us(folder):
    import diffusers

    ours = load_transformer(folder / "transformer")
    theirs = diffusers.ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    wanted = omni.transformer().state_dict()
    assert isinstance(ours, OmniTransformer)
    assert theirs.config.siglip_feat_dim == omni.WIDTH
    for found in (ours.state_dict(), theirs.state_dict()):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_an_edit_of_the_vision_branch_is_saved(folder, tmp_path):
    model = load_transformer(folder / "transformer")
    model.siglip_refiner[0].ffn_norm1.weight.data.fill_(0.25)
    save_network(model, tmp_path / "out")
    again = load_transformer(tmp_path / "out")
    assert bool((again.siglip_refiner[0].ffn_norm1.weight == 0.25).all())


@torch.no_grad()
def test_a_quantised_omni_keeps_its_vision_branch(tmp_path):
    path = write_safetensors(tmp_path / "omni.safetensors", stored(SHAPES, matrix="BF16"))
    quantize_file(path, tmp_path / "omni.gguf", "Q4_0")
    source, model = load_transformer(path), load_transformer(tmp_path / "omni.gguf")
    assert model.layers[0].feed_forward.w1.weight.format.name == "Q4_0"
    name = "siglip_refiner.0.feed_forward.w1"
    kept, before = (net.get_submodule(name).weight.dequantize(torch.float32) for net in (model, source))
    assert torch.equal(kept, before), "refiners keep the type of the source"
    wanted, got = source(**CALL)[0], model(**CALL)[0]
    assert float((got - wanted).norm() / wanted.norm()) < 0.2  # 4 bits a number


def test_a_plan_counts_the_vision_branch(folder):
    model = load_transformer(folder / "transformer")
    part = read_sizes(open_parts(folder), "float32").transformer
    assert part.nbytes == sum(tensor.nbytes for tensor in tensors_of(model))
    once = [
        sum(t.nbytes for t in tensors_of(refiner))
        for refiner in (model.context_refiner, model.siglip_refiner)
    ]
    assert list(part.once) == once


@torch.no_grad()
def test_a_lora_of_the_vision_refiner_is_applied(folder):
    pipe = ZImagePipeline.from_pretrained(folder)
    plain = pipe.transformer(**omni.call().arguments)[0]
    tensors, deltas = {}, {}
    for i, name in enumerate(
        ("siglip_refiner.0.attention.to_q", "siglip_refiner.0.feed_forward.w2", "siglip_embedder.1")
    ):
        layer = pipe.transformer.get_submodule(name)
        tensors[name], delta = adapters.kind("lora", layer.out_features, layer.in_features, i)
        deltas[name] = [(delta, 0.7)]
    pipe.load_lora(adapters.file_of(tensors, lambda name: f"diffusion_model.{name}"), weight=0.7)
    merged = omni.transformer()
    adapters.merge(merged, deltas)
    got, wanted = (net(**omni.call().arguments)[0] for net in (pipe.transformer, merged))
    assert float((got - wanted).abs().max()) < 2e-5
    assert float((got - plain).abs().max()) > 1e-3

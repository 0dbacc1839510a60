"""`compute=`: which layers take part, what `auto` decides, and that models need not know."""

from __future__ import annotations

import copy
import types

import numpy as np
import pytest
import torch
from torch import nn

from zimage_core import ZImagePipeline
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.nn import compute
from zimage_core.nn.compute import automatic, set_compute
from zimage_core.nn.linear import Linear, ready
from zimage_core.quant import int8
from zimage_core.quant.arithmetic import MODES, Arithmetic, arithmetic_of

CPU = torch.device("cpu")
PROMPT = "a small red circle on the left of a blue background"


@pytest.fixture(scope="module")
def pipe():
    return ZImagePipeline.from_default()


def image(pipe, **others):
    return pipe(PROMPT, seed=1, output_type="pt", num_inference_steps=2, **others).images


def psnr(a, b):
    return float(-10 * torch.log10((a - b).square().mean()))


def test_only_the_projections_of_the_blocks_take_part(pipe):
    chosen = {
        name.split(".", 2)[-1]: arithmetic_of(name, "int8")
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, Linear) and arithmetic_of(name, "int8").mode == "int8"
    }
    plain, rotated = Arithmetic("int8"), Arithmetic("int8", rotated=True)
    names = {"attention.to_q", "attention.to_k", "attention.to_v", "feed_forward.w1", "feed_forward.w3"}
    assert chosen == {
        **dict.fromkeys(names, plain),
        "attention.to_out.0": rotated,
        "feed_forward.w2": rotated,
    }
    for name in (
        "t_embedder.mlp.0",
        "layers.0.adaLN_modulation.0",
        "cap_embedder.1",
        "all_final_layer.2-1.linear",
    ):
        assert arithmetic_of(name, "int8") == Arithmetic()


@pytest.mark.parametrize("mode", ["bfloat16", "int8"])
def test_an_image_in_fewer_bits_is_near_the_exact_one(pipe, mode):
    exact = image(pipe)
    pipe.set_compute(mode)
    try:
        assert pipe.compute == pipe.text_encoder.compute == mode
        result = image(pipe)
        assert 40 < psnr(result, exact) < 90
    finally:
        pipe.set_compute("exact")
    assert torch.equal(image(pipe), exact)


def test_the_mode_is_in_the_settings_and_in_a_copy(pipe):
    other = copy.deepcopy(pipe)
    other.set_compute({"transformer": "int8"})
    twin = copy.deepcopy(other)
    assert torch.equal(image(twin), image(other))
    result = twin(PROMPT, seed=1, num_inference_steps=1)
    assert result.settings[0]["compute"] == "int8"
    assert result.settings[0]["text_encoder_compute"] == "exact"
    assert pipe.compute == "exact"


def test_members_of_a_batch_are_what_they_are_alone():
    fast = ZImagePipeline.from_default(compute="int8")
    both = fast([PROMPT, "a green star"], seed=1, output_type="pt", num_inference_steps=1).images
    assert torch.equal(both[:1], fast(PROMPT, seed=1, output_type="pt", num_inference_steps=1).images)


@torch.no_grad()
def test_int8_rows_are_shared_and_other_layers_take_them_back():
    a, b, c = Linear(64, 8), Linear(64, 8), Linear(64, 8)
    x = torch.randn(3, 64)
    assert ready(x, a, b) is x
    for layer in (a, b):
        layer.arithmetic = Arithmetic("int8")
    rows = ready(x, a, b)
    assert isinstance(rows, int8.Int8Rows)
    torch.testing.assert_close(a(rows), a(x), rtol=0, atol=0)
    assert ready(x, a, c) is x
    torch.testing.assert_close(c(rows), c(x), rtol=0.05, atol=0.05)
    b.arithmetic = Arithmetic("int8", rotated=True)
    assert ready(x, a, b) is x
    torch.testing.assert_close(b(rows), b(x), rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_layer_with_hooks_gets_numbers():
    layer, seen = Linear(64, 8), []
    layer.arithmetic = Arithmetic("int8")
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 64)
    layer(ready(x, layer))
    handle.remove()
    assert seen[0] is x


def test_a_network_remembers_what_was_asked_for(pipe):
    """`auto` is exact for a text encoder's prompts, and chooses anew for the tokens that it writes."""
    encoder = pipe.text_encoder
    assert set_compute(encoder, "auto", CPU) == "exact"
    assert (encoder.asked, encoder.compute) == ("auto", "exact")
    set_compute(encoder, "exact", CPU)
    assert encoder.asked == "exact"


def test_auto_is_exact_for_small_and_for_unpacked_networks(pipe):
    assert automatic(pipe.transformer, CPU) == ("exact", "the network is too small to gain from int8")
    dense = copy.deepcopy(pipe.transformer)
    for module in dense.modules():
        if isinstance(module, Linear):
            module.dequantize_weight(torch.float32)
    assert automatic(dense, CPU)[1] == "the weights are not packed"


@pytest.mark.parametrize(("gain", "mode"), [(4.6, "int8"), (1.4, "exact"), (0.03, "exact")])
def test_auto_asks_what_the_device_gains(pipe, monkeypatch, gain, mode):
    monkeypatch.setattr(compute, "WIDE", 1)
    monkeypatch.setattr(compute, "gain_of", lambda device: (gain, "a device"))
    network = copy.deepcopy(pipe.transformer)
    assert set_compute(network, "auto", CPU) == network.compute == mode
    assert "a device" in automatic(network, CPU)[1]


def test_auto_leaves_the_text_encoder_exact(pipe, monkeypatch):
    monkeypatch.setattr(compute, "WIDE", 1)
    monkeypatch.setattr(compute, "gain_of", lambda device: (4.6, "a device"))
    assert automatic(pipe.text_encoder, CPU)[0] == "exact"
    assert automatic(pipe.text_encoder, torch.device("cuda"))[0] == "exact"


def test_a_wrong_mode_is_refused(pipe):
    for wrong in ("fp8", 8, ["int8"], np.array(["int8", "exact"]), {"vae": "int8"}, {"transformer": "fast"}):
        with pytest.raises(BadArgument, match="compute"):
            pipe.set_compute(wrong)
        with pytest.raises(BadArgument, match="compute"):
            ZImagePipeline.from_default(compute=wrong)
    for wrong in ("INT8", None, ["int8"]):
        with pytest.raises(BadArgument, match=", ".join(MODES)):
            tiny_loader(compute=wrong)


def tiny_loader(**options):
    from zimage_core import load_transformer
    from zimage_core.run.sources import embedded

    return load_transformer(embedded().paths["transformer"], **options)


def test_a_loaded_network_computes_in_the_mode():
    network = tiny_loader(compute="int8")
    assert network.compute == "int8"
    assert network.layers[0].feed_forward.w2.arithmetic == Arithmetic("int8", rotated=True)


def test_a_budget_keeps_its_mode():
    limited = ZImagePipeline.from_default(compute="int8", ram="2GiB")
    assert limited.compute == "int8"
    with pytest.raises(Unsupported, match="budget"):
        limited.set_compute("exact")


def test_gradients_are_refused_in_int8():
    layer = Linear(64, 8)
    layer.arithmetic = Arithmetic("int8")
    with pytest.raises(Unsupported, match="gradients"):
        layer(torch.randn(2, 64, requires_grad=True))
    with pytest.raises(Unsupported, match="gradients"):
        ready(torch.randn(2, 64, requires_grad=True), layer)
    with pytest.raises(Unsupported, match="gradients"):  # of the weight
        layer(ready(torch.randn(2, 64), layer))


def test_a_layer_takes_no_mode_that_is_not_known():
    for mode in ("auto", "INT8", "fp8"):
        with pytest.raises(BadArgument, match=f"got '{mode}', wanted one of exact, bfloat16, int8"):
            Arithmetic(mode)


def test_a_printed_layer_says_how_it_multiplies():
    layer = Linear(192, 8)
    assert "int8" not in repr(layer)
    layer.arithmetic = Arithmetic("int8")
    assert repr(layer).endswith(", int8)")
    layer.arithmetic = Arithmetic("int8", rotated=True)
    assert repr(layer).endswith(", int8 rotated by 64)")
    odd = Linear(682, 8)
    odd.arithmetic = layer.arithmetic
    assert repr(odd).endswith(", int8)"), "no power of four divides 682"


def test_int8_under_the_compiler_is_one_operator():
    layer = Linear(64, 8)
    layer.arithmetic = Arithmetic("int8", rotated=True)
    layer.requires_grad_(False)
    x = torch.randn(2, 64)
    with torch.no_grad():
        compiled = torch.compile(nn.Sequential(layer), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["a subclass", "another forward"])
@pytest.mark.parametrize("place", ["attention.to_q", "feed_forward.w2", "attention"])
def test_code_of_others_is_given_floats(pipe, place, how):
    """A layer or branch that was extended sees x as it is, and the image has the same bits."""
    other = copy.deepcopy(pipe)
    other.set_compute("int8")
    wanted, seen = image(other), []
    module = other.transformer.layers[0].get_submodule(place)
    usual = type(module).forward

    def forward(self, x, *rest):
        seen.append(x)
        return usual(self, x * 1.0, *rest)

    if how == "a subclass":
        module.__class__ = type("Extended", (type(module),), {"forward": forward})
    else:
        module.forward = types.MethodType(forward, module)
    assert torch.equal(image(other), wanted)
    assert {type(x) for x in seen} == {torch.Tensor}

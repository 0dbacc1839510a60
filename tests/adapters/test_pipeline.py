"""Adapters on a whole pipeline: images as of merged weights, switched between runs, shared and copied."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import adapters, tiny
from zimage_core import ZImagePipeline
from zimage_core.adapters.reading import read_adapter
from zimage_core.errors import BadArgument, Busy, Unsupported
from zimage_core.quant.tensor import QuantTensor

RUN = {"num_inference_steps": 2, "output_type": "pt", "seed": 1}
LAYERS = (
    "layers.0.attention.to_q", "layers.1.feed_forward.w2", "layers.0.adaLN_modulation.0",
    "context_refiner.0.attention.to_out.0", "cap_embedder.1",
)  # fmt: skip
ROUNDING = 5e-6
"""Largest difference of pixels in [0, 1] that float32 may make in two steps of the tiny model."""


def made(pipe, kind="lora", seed=0, layers=LAYERS):
    """Tensors of an adapter with kohya's names, and the deltas of its layers."""
    tensors, deltas = {}, {}
    for i, name in enumerate(layers):
        layer = pipe.transformer.get_submodule(name)
        own, deltas[name] = adapters.kind(kind, layer.out_features, layer.in_features, seed + 10 * i)
        tensors[name] = own
    return adapters.file_of(tensors, lambda n: "lora_unet_" + n.replace(".", "_")), deltas


def merged(*pairs):
    """Images of a pipeline whose dense weights have the deltas, each with its weight."""
    pipe = tiny.pipeline()
    summed = {}
    for deltas, weight in pairs:
        for name, delta in deltas.items():
            summed.setdefault(name, []).append((delta, weight))
    adapters.merge(pipe.transformer, summed)
    return pipe("a", **RUN).images


def images(pipe):
    return pipe("a", **RUN).images


@pytest.fixture(scope="module")
def plain():
    return images(tiny.pipeline())


@pytest.fixture
def pipe():
    return tiny.pipeline()


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_images_are_those_of_merged_weights_and_afterwards_the_old_ones(kind, pipe, plain):
    tensors, deltas = made(pipe, kind)
    pipe.load_lora(tensors, weight=0.7)
    got = images(pipe)
    assert float((got - merged((deltas, 0.7))).abs().max()) < ROUNDING
    assert float((got - plain).abs().max()) > 100 * ROUNDING
    pipe.unload_lora()
    assert torch.equal(images(pipe), plain)


def test_several_are_used_at_once_and_switched_between_runs(pipe, plain):
    (one, first), (two, second) = made(pipe), made(pipe, "lokr half", seed=77)
    pipe.load_lora(one, name="one")
    pipe.load_lora(two, weight=-0.5, name="two")
    both = images(pipe)
    assert float((both - merged((first, 1.0), (second, -0.5))).abs().max()) < ROUNDING
    pipe.set_adapters("two", 2.0)
    assert float((images(pipe) - merged((second, 2.0))).abs().max()) < ROUNDING
    pipe.set_adapters(["one", "two"], [1.0, -0.5])
    assert torch.equal(images(pipe), both)
    pipe.set_adapters(["one"], 0.0)
    assert torch.equal(images(pipe), plain)
    pipe.set_adapters([])
    assert torch.equal(images(pipe), plain)
    pipe.unload_lora("one")
    assert [each.name for each in pipe.loras] == ["two"]


def test_norms_pads_and_the_text_encoder_are_changed_and_put_back(pipe, plain):
    names = ("layers.0.attention_norm1.diff", "x_pad_token.diff", "cap_embedder.1.diff_b")
    tensors = {name: adapters.random(32) for name in names}
    q = pipe.text_encoder.layers[0].self_attn.q_proj
    pair = adapters.split_lora(q.out_features, q.in_features)[0]
    tensors |= adapters.file_of({"lora_te_layers_0_self_attn_q_proj": pair})
    before = {**pipe.transformer.state_dict()}
    pipe.load_lora(tensors, weight=0.5)
    assert pipe.loras[0].layers == {"transformer": 3, "text_encoder": 1}
    norm = pipe.transformer.layers[0].attention_norm1.weight
    wanted = before["layers.0.attention_norm1.weight"] + 0.5 * tensors["layers.0.attention_norm1.diff"]
    assert torch.equal(norm, wanted)
    assert not torch.equal(images(pipe), plain)
    pipe.disable_lora()
    assert torch.equal(images(pipe), plain)
    pipe.enable_lora()
    pipe.delete_adapters("lora")
    assert torch.equal(images(pipe), plain)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


def test_what_is_loaded_is_told(pipe, tmp_path):
    tensors, _ = made(pipe)
    save_file(
        {**tensors, "lora_unet_layers_7_attention_to_q.alpha": torch.tensor(1.0)},
        tmp_path / "style.safetensors",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'style'"):
            pipe.load_lora(tmp_path / "style.safetensors")
    assert pipe.loras == ()
    with pytest.warns(UserWarning, match=r"'style': 1 of its tensors match no layer.*layers_7"):
        assert pipe.load_lora(tmp_path / "style.safetensors", 0.25) == "style"
    (own,) = pipe.loras
    assert (own.name, own.weight, own.ranks, own.kinds) == ("style", 0.25, (3, 3), ("low rank",))
    assert (own.layers, own.tensors, own.fused) == ({"transformer": 5}, 10, False)
    assert own.unmatched == ("lora_unet_layers_7_attention_to_q.alpha",)
    assert own.nbytes == sum(value.nbytes for value in tensors.values())
    (settings,) = pipe("a", **RUN).settings
    assert settings["loras"] == [{"name": "style", "weight": 0.25, "sha256": own.file["sha256"]}]
    pipe.set_adapters("style", 0)
    assert "loras" not in pipe("a", **RUN).settings[0]
    (tmp_path / "style.safetensors").unlink()  # it was read, and is not needed any more
    pipe.set_adapters("style")
    images(pipe)


def test_names_are_made_free_or_refused(pipe):
    tensors, _ = made(pipe)
    assert [pipe.load_lora(tensors) for _ in range(3)] == ["lora", "lora-2", "lora-3"]
    with pytest.raises(BadArgument, match=r"name: got 'lora', wanted one that is not taken \(lora, lora-2"):
        pipe.load_lora(tensors, name="lora")
    with pytest.raises(BadArgument, match="there is no adapter 'x'; loaded are lora, lora-2, lora-3"):
        pipe.unload_lora("x")
    with pytest.raises(BadArgument, match="there is no adapter None; loaded are"):
        pipe.set_adapters(None)
    with pytest.raises(BadArgument, match="a name occurs twice in lora, lora"):
        pipe.set_adapters(["lora", "lora"], [1, 2])


def test_pipelines_that_share_a_transformer_share_its_adapters(pipe, plain):
    other = ZImagePipeline.from_pipe(pipe)
    tensors, _ = made(pipe)
    pipe.load_lora(tensors, name="style")
    assert [each.name for each in other.loras] == ["style"]
    assert torch.equal(images(other), images(pipe))
    other.unload_lora()
    assert pipe.loras == ()
    assert torch.equal(images(pipe), plain)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"]
)
def test_a_copy_has_adapters_of_its_own(pipe, copied, plain):
    pipe.load_lora(made(pipe)[0])
    images(pipe)
    second = copied(pipe)
    assert torch.equal(images(second), images(pipe))
    second.unload_lora()
    assert torch.equal(images(second), plain)
    assert not torch.equal(images(pipe), plain)


def test_fused_weights_give_the_same_images_and_are_put_back_to_the_bit(pipe, plain):
    one, two = made(pipe, "dora")[0], made(pipe, "lora", seed=50)[0]
    pipe.load_lora(one, 0.5, name="one")
    pipe.load_lora(two, name="two")
    beside = images(pipe)
    pipe.fuse_lora(adapter_names=["one"])
    assert pipe.fused_loras == {"one"}
    assert pipe.num_fused_loras == 1
    assert float((images(pipe) - beside).abs().max()) < ROUNDING
    pipe.fuse_lora(adapter_names=["two"])
    assert float((images(pipe) - beside).abs().max()) < ROUNDING
    assert all(m.branch is None for m in pipe.transformer.modules() if hasattr(m, "branch"))
    for call in (lambda: pipe.set_adapters("one", 2), lambda: pipe.unload_lora("one"), pipe.fuse_lora,
                 pipe.disable_lora):  # fmt: skip
        with pytest.raises(Unsupported, match=r"is merged into the weights; call unfuse_lora\(\) first"):
            call()
    pipe.unfuse_lora()
    assert torch.equal(images(pipe), beside)
    pipe.fuse_lora(lora_scale=2.0)
    assert not torch.equal(images(pipe), beside)
    pipe.unfuse_lora()
    pipe.unload_lora()
    assert torch.equal(images(pipe), plain)


def test_merged_adapters_stay_in_the_weights_when_all_are_unloaded(pipe):
    pipe.load_lora(made(pipe)[0], merge=True)
    merged_in = images(pipe)
    pipe.unload_lora()
    assert pipe.loras == ()
    result = pipe("a", **RUN)
    assert torch.equal(result.images, merged_in)
    assert result.settings[0]["loras"] == [{"name": "lora", "weight": 1.0}]


def test_only_adapters_that_have_an_effect_are_merged(pipe, plain):
    pipe.load_lora(made(pipe)[0], name="a")
    pipe.disable_lora()
    with pytest.raises(Unsupported, match=r"no effect since disable_lora\(\); call enable_lora\(\) first"):
        pipe.fuse_lora()
    pipe.enable_lora()
    pipe.set_adapters([])
    with pytest.raises(BadArgument, match=r"'a' is not active; call set_adapters\(\) with it first"):
        pipe.fuse_lora(adapter_names=["a"])
    assert pipe.fused_loras == set()
    assert torch.equal(images(pipe), plain)


def test_what_is_loaded_while_adapters_are_disabled_waits_in_both_networks(pipe, plain):
    pipe.load_lora(made(pipe)[0], name="a")
    pipe.disable_lora()
    q = pipe.text_encoder.layers[0].self_attn.q_proj
    pair = adapters.split_lora(q.out_features, q.in_features)[0]
    both = made(pipe, seed=50)[0] | adapters.file_of({"lora_te_layers_0_self_attn_q_proj": pair})
    pipe.load_lora(both, name="b")
    assert torch.equal(images(pipe), plain)


def test_weights_come_back_in_the_dtype_that_the_network_has_then(pipe):
    pipe.load_lora(made(pipe)[0])
    pipe.fuse_lora()
    pipe.to(torch.bfloat16)
    pipe.unfuse_lora()
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}


def test_packed_weights_are_dequantised_only_where_that_is_asked_for(pipe):
    layer = pipe.transformer.layers[0].attention.to_q
    packed = layer.weight.detach().to(torch.bfloat16).view(torch.uint8)
    from zimage_core.formats import FORMATS

    layer.weight = QuantTensor(packed, FORMATS["BF16"], (32, 32))
    before = images(pipe)
    pipe.load_lora(made(pipe)[0])
    beside = images(pipe)
    with pytest.raises(
        Unsupported, match=r"1 layers of the transformer have packed weights.*dequantize=True"
    ):
        pipe.fuse_lora()
    assert torch.equal(images(pipe), beside)
    pipe.fuse_lora(dequantize=True)
    assert float((images(pipe) - beside).abs().max()) < ROUNDING
    pipe.unfuse_lora()
    assert isinstance(layer.weight, QuantTensor)
    pipe.unload_lora()
    assert torch.equal(images(pipe), before)


def test_no_adapter_is_changed_while_another_pipeline_runs_with_it(pipe):
    pipe.load_lora(made(pipe)[0])
    other, stranger = ZImagePipeline.from_pipe(pipe), tiny.pipeline()

    def callback(*_):
        with pytest.raises(Busy, match="while a pipeline with the same networks runs"):
            other.unload_lora()
        stranger.load_lora(made(stranger)[0])

    pipe("a", callback_on_step_end=callback, **RUN)
    assert len(stranger.loras) == 2
    other.unload_lora()
    assert pipe.loras == ()


def test_no_adapter_is_changed_if_a_run_began_while_it_was_read(pipe, monkeypatch):
    def read(*args):
        pipe._running["run"] = object()
        return read_adapter(*args)

    monkeypatch.setattr("zimage_core.adapters.reading.read_adapter", read)
    with pytest.raises(Busy, match="while the pipeline runs"):
        pipe.load_lora(made(pipe)[0])
    assert pipe.loras == ()
    assert all(m.branch is None for m in pipe.transformer.modules() if hasattr(m, "branch"))


def test_no_adapter_is_changed_while_the_pipeline_runs(pipe):
    pipe.load_lora(made(pipe)[0])
    found = []

    def callback(pipe, step, time, tensors):
        for call in (pipe.unload_lora, lambda: pipe.set_adapters("lora", 0.5), pipe.disable_lora):
            with pytest.raises(Busy, match="adapters cannot be changed while the pipeline runs"):
                call()
        found.append(step)

    pipe("a", **RUN, callback_on_step_end=callback)
    assert found == [0, 1]


def test_moved_networks_take_their_adapters_along(pipe, plain):
    pipe.load_lora({**made(pipe)[0], "layers.0.attention_norm1.diff": adapters.random(32)})
    exact = images(pipe)
    pipe.to(torch.bfloat16)
    assert float((images(pipe) - exact).abs().mean()) < 0.02
    assert pipe.transformer.layers[0].attention_norm1.weight.dtype == torch.bfloat16
    pipe.unload_lora()
    assert pipe.transformer.layers[0].attention_norm1.weight.dtype == torch.bfloat16
    assert float((images(pipe) - plain).abs().mean()) < 0.02

"""diffusers' converter and PEFT's formula give what adapters give here; diffusers' own LoRA tests, as ours.

PEFT is no dependency of the tests: its formula, W x + B (A x), is applied to diffusers' transformer with the
factors that diffusers' own converter makes of each dialect.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import adapters, parity, tiny
from zimage_core import ZImagePipeline
from zimage_core.adapters.applied import Applied, State
from zimage_core.adapters.reading import read_adapter
from zimage_core.errors import BadArgument, BadWeights, Unsupported, WrongModel

RUN = {"num_inference_steps": 2, "output_type": "pt", "seed": 1}
LAYERS = ("layers.0.attention.to_q", "layers.1.feed_forward.w2", "context_refiner.0.attention.to_out.0",
          "noise_refiner.0.attention.to_v", "layers.2.adaLN_modulation.0")  # fmt: skip


def underscored(name):
    return name.replace(".", "_")


DIALECTS = {
    "ai-toolkit": lambda n: (f"diffusion_model.{n}", "lora_A.weight", "lora_B.weight"),
    "kohya": lambda n: (f"lora_unet_{underscored(n)}", "lora_down.weight", "lora_up.weight"),
    "default": lambda n: (f"default.{n}", "lora_down.weight", "lora_up.weight"),
    "dots": lambda n: (f"diffusion_model.{n.replace('to_q', 'to.q').replace('to_v', 'to.v')}",
                       "lora.down.weight", "lora.up.weight"),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("dialect", DIALECTS)
@torch.no_grad()
def test_velocities_are_those_of_diffusers_with_its_own_converter(dialect):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers

    theirs, ours = parity.transformer_pair()
    tensors = {}
    for i, name in enumerate(LAYERS):
        module = ours.get_submodule(name)
        stem, down, up = DIALECTS[dialect](name)
        own, _ = adapters.split_lora(module.out_features, module.in_features, seed=7 * i)
        tensors |= {f"{stem}.{down}": own["lora_down.weight"], f"{stem}.{up}": own["lora_up.weight"]}
        if dialect != "dots":
            tensors[f"{stem}.alpha"] = torch.tensor(1.5)
    if dialect == "kohya":  # fused q, k and v
        own, _ = adapters.split_lora(3 * 48, 48, seed=99)
        tensors |= {f"lora_unet_layers_2_attention_qkv.lora.{leaf}.weight": own[f"lora_{leaf}.weight"]
                    for leaf in ("down", "up")}  # fmt: skip
    x, t, captions = parity.transformer_inputs([(6, 10)], [5])
    before = ours(x, t, captions)[0].clone()
    found = read_adapter(dict(tensors), "x", {"transformer": ours})
    ours.adapted = Applied(ours)
    ours.adapted.use(State({"x": found.parts["transformer"]}, {"x": 0.8}))()
    converted = _convert_non_diffusers_z_image_lora_to_diffusers(dict(tensors))
    for key, down in converted.items():
        if key.endswith("lora_A.weight"):
            layer = theirs.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            layer.weight += 0.8 * converted[key.replace("lora_A", "lora_B")] @ down
    got, want = ours(x, t, captions)[0], theirs(x, t, captions, return_dict=False)[0][0]
    assert float((got - want).abs().max()) <= 1e-4
    assert float((got - before).abs().max()) > 0.01


# --- the behaviour that diffusers' own tests of LoRA for Z-Image ask for ---


@pytest.fixture
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def plain():
    return images(tiny.pipeline())


def images(pipe):
    return pipe("a", **RUN).images


def lora(pipe, seed=0, parts=("to_q", "to_k", "to_v", "to_out.0"), rank=4, encoder=False):
    """A LoRA of every attention, by diffusers' names."""
    networks = {"transformer": pipe.transformer, **({"text_encoder": pipe.text_encoder} if encoder else {})}
    found = {}
    for component, network in networks.items():
        ends = parts if component == "transformer" else ("q_proj", "v_proj")
        for i, (name, module) in enumerate(network.named_modules()):
            if name.endswith(ends):
                own, _ = adapters.split_lora(
                    module.out_features, module.in_features, seed=seed + i, rank=rank
                )
                stem = f"{component}.{name}"
                found |= {f"{stem}.lora_A.weight": own["lora_down.weight"],
                          f"{stem}.lora_B.weight": own["lora_up.weight"]}  # fmt: skip
    return found


def test_a_lora_changes_the_image_and_unloading_brings_the_old_one_back(pipe, plain):
    pipe.load_lora_weights(lora(pipe), "default")
    assert not torch.allclose(images(pipe), plain, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), plain)


def test_a_lora_of_the_text_encoder_alone_and_of_both(pipe, plain):
    both = lora(pipe, encoder=True)
    text = {key: value for key, value in both.items() if key.startswith("text_encoder")}
    pipe.load_lora_weights(text, "text")
    assert pipe.get_list_adapters() == {"text_encoder": ["text"]}
    only_text = images(pipe)
    assert not torch.allclose(only_text, plain, atol=1e-3)
    pipe.load_lora_weights(both, "both")
    assert not torch.allclose(images(pipe), only_text, atol=1e-3)
    assert pipe.get_list_adapters() == {"transformer": ["both"], "text_encoder": ["text", "both"]}


def test_a_part_of_the_layers_is_enough(pipe, plain):
    pipe.load_lora_weights({k: v for k, v in lora(pipe).items() if "layers.0.attention.to_q" in k})
    assert not torch.allclose(images(pipe), plain, atol=1e-4)


def test_saved_files_load_by_path_folder_and_weight_name(pipe, tmp_path):
    tensors = lora(pipe)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    pipe.load_lora_weights(tensors)
    wanted = images(pipe)
    for how in (
        lambda: pipe.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors"),
        lambda: pipe.load_lora_weights(tmp_path),
        lambda: pipe.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors"),
        lambda: pipe.load_lora_weights(tmp_path.parent, subfolder=tmp_path.name, low_cpu_mem_usage=True),
    ):
        pipe.unload_lora_weights()
        how()
        assert torch.equal(images(pipe), wanted)


def test_names_and_active_adapters_are_diffusers(pipe):
    for _ in range(2):
        pipe.load_lora_weights(lora(pipe))
    assert pipe.get_active_adapters() == ["default_1"]
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1"]}
    pipe.set_adapters(["default_0", "default_1"])
    assert pipe.get_active_adapters() == ["default_0", "default_1"]
    pipe.delete_adapters("default_0")
    assert pipe.get_list_adapters() == {"transformer": ["default_1"]}
    pipe.delete_adapters(["default_1"])
    assert pipe.get_list_adapters() == {}


def test_several_adapters_alone_together_and_disabled(pipe, plain):
    one, two = lora(pipe), lora(pipe, seed=50)
    pipe.load_lora_weights(one, "one")
    pipe.load_lora_weights(two, "two")
    seen = []
    for chosen in ("one", "two", ["one", "two"]):
        pipe.set_adapters(chosen)
        seen.append(images(pipe))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(seen, [*seen[1:], plain], strict=True))
    pipe.disable_lora()
    assert torch.equal(images(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(images(pipe), seen[2])
    pipe.delete_adapters("one")
    assert torch.allclose(images(pipe), seen[1], atol=1e-6)
    pipe.delete_adapters("two")
    assert torch.equal(images(pipe), plain)


def test_weights_of_several_adapters(pipe):
    pipe.load_lora_weights(lora(pipe), "one")
    pipe.load_lora_weights(lora(pipe, seed=50), "two")
    seen = []
    for weights in ([1, 0], [0.5, 0.6], 0.6, None):
        pipe.set_adapters(["one", "two"], weights)
        seen.append(images(pipe))
    pipe.set_adapters("one")
    assert torch.equal(images(pipe), seen[0])
    assert not torch.allclose(seen[1], seen[2], atol=1e-4)
    with pytest.raises(Unsupported, match="weights for single blocks"):
        pipe.set_adapters(["one", "two"], [{"layers": 0.5}, 1.0])
    with pytest.raises(BadArgument, match="got 3 weights for 2 names"):
        pipe.set_adapters(["one", "two"], [1, 2, 3])


def test_a_wrong_name_is_an_error_and_changes_nothing(pipe):
    pipe.load_lora_weights(lora(pipe), "one")
    before = images(pipe)
    with pytest.raises(BadArgument, match="there is no adapter 'test'"):
        pipe.set_adapters("test")
    with pytest.raises(BadArgument, match="there is no adapter 'test'"):
        pipe.delete_adapters("test")
    assert torch.equal(images(pipe), before)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_fused_lora_gives_the_image_of_that_scale(pipe, plain, scale):
    pipe.load_lora_weights(lora(pipe), "one")
    pipe.set_adapters("one", scale)
    beside = images(pipe)
    pipe.set_adapters("one")
    pipe.fuse_lora(lora_scale=scale, safe_fusing=True)
    assert torch.allclose(images(pipe), beside, atol=1e-4)
    pipe.unfuse_lora()
    pipe.set_adapters("one", scale)
    assert torch.equal(images(pipe), beside)
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), plain)


def test_several_are_fused_one_after_the_other_and_counted(pipe):
    pipe.load_lora_weights(lora(pipe), "one")
    pipe.load_lora_weights(lora(pipe, seed=50), "two")
    pipe.set_adapters(["one", "two"])
    together = images(pipe)
    pipe.fuse_lora(components=["transformer"], adapter_names=["one"])
    assert pipe.num_fused_loras == 1
    assert torch.allclose(images(pipe), together, atol=1e-4)
    pipe.fuse_lora(components=["transformer"], adapter_names=["two"])
    assert pipe.fused_loras == {"one", "two"}
    assert torch.allclose(images(pipe), together, atol=1e-4)
    pipe.unfuse_lora(components=["transformer"])
    assert pipe.num_fused_loras == 0
    assert torch.equal(images(pipe), together)


def test_fusing_what_is_not_finite_is_refused(pipe):
    pipe.load_lora_weights(lora(pipe), "one")
    pipe.to(torch.float16)
    before = images(pipe)
    pipe.set_adapters("one", 0)
    pipe.transformer.layers[0].attention.to_q.weight.data[0, 0] = torch.inf
    pipe.set_adapters("one")
    with pytest.raises(BadWeights, match=r"layers\.0\.attention\.to_q.*not finite"):
        pipe.fuse_lora(safe_fusing=True)
    assert pipe.num_fused_loras == 0
    assert before.isfinite().all()


def test_what_is_loaded_while_loras_are_disabled_has_no_effect_yet(pipe, plain):
    tensors = lora(pipe, encoder=True)
    pipe.load_lora({k: v for k, v in tensors.items() if k.startswith("transformer")}, name="one")
    pipe.disable_lora()
    pipe.load_lora({k: v for k, v in tensors.items() if k.startswith("text")}, name="two")
    assert torch.equal(images(pipe), plain)
    pipe.enable_lora()
    together = images(pipe)
    pipe.unload_lora()
    pipe.load_lora(tensors)
    assert torch.equal(images(pipe), together)


def test_loading_deleting_and_loading_again_gives_the_same_image(pipe):
    pipe.load_lora_weights(lora(pipe), "one")
    first = images(pipe)
    pipe.delete_adapters("one")
    pipe.load_lora_weights(lora(pipe), "one")
    assert torch.equal(images(pipe), first)


def test_hotswap_replaces_an_adapter_and_keeps_its_weight(pipe):
    pipe.load_lora_weights(lora(pipe, seed=50), "one")
    pipe.set_adapters("one", 0.5)
    wanted = images(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora(pipe), "one")
    pipe.set_adapters("one", 0.5)
    pipe.load_lora_weights(lora(pipe, seed=50), "one", hotswap=True)
    assert torch.equal(images(pipe), wanted)
    assert [(each.name, each.weight) for each in pipe.loras] == [("one", 0.5)]


def test_ranks_may_differ_by_layer(pipe):
    tensors = lora(pipe, parts=("to_q",), rank=2) | lora(pipe, parts=("to_v",), rank=5)
    pipe.load_lora_weights(tensors)
    assert pipe.loras[0].ranks == (2, 5)


def test_metadata_gives_alpha(pipe, tmp_path):
    tensors, config = lora(pipe), {"transformer.r": 4, "transformer.lora_alpha": 8}
    pipe.load_lora_weights(tensors)
    pipe.set_adapters("default_0", 2.0)
    wanted = images(pipe)
    pipe.unload_lora_weights()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert torch.allclose(images(pipe), wanted, atol=1e-6)


def test_dora_changes_the_image(pipe, plain):
    tensors = lora(pipe)
    for key in [key for key in tensors if "lora_B" in key]:
        rows = len(tensors[key])
        tensors[key.replace("lora_B.weight", "lora_magnitude_vector")] = torch.full((rows,), 0.9)
    pipe.load_lora_weights(tensors)
    assert not torch.allclose(images(pipe), plain, atol=1e-3)


def test_missing_and_unexpected_keys(pipe):
    tensors = lora(pipe)
    missing = next(key for key in tensors if "lora_B" in key)
    with pytest.raises(BadWeights, match="has no up"):
        pipe.load_lora_weights({key: value for key, value in tensors.items() if key != missing})
    beside = {f"transformer.unexpected.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    with pytest.warns(UserWarning, match=r"2 of its tensors match no layer.*unexpected"):
        pipe.load_lora_weights(tensors | beside)


def test_a_dict_without_any_lora_is_refused(pipe):
    with pytest.raises(WrongModel, match="a LoRA was wanted"):
        pipe.load_lora_weights({"a.weight": torch.ones(2, 2)})


def test_a_bias_of_the_second_factor_is_refused_rather_than_dropped(pipe):
    tensors = lora(pipe)
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key.replace("weight", "bias")] = torch.ones(len(tensors[key]))
    with pytest.raises(Unsupported, match=r"is a LoRA with a bias \(lora_B\.bias\), which is not applied"):
        pipe.load_lora_weights(tensors)


def test_lora_and_offload_go_together(pipe, plain):
    own = ZImagePipeline(**pipe.components)
    own.load_lora_weights(lora(own))
    beside = images(own)
    own.enable_model_cpu_offload()
    assert torch.equal(images(own), beside)
    assert not torch.equal(beside, plain)


def test_networks_say_who_loads_adapters(pipe):
    for name in ("load_lora_adapter", "add_adapter", "set_adapters"):
        with pytest.raises(Unsupported, match=rf"^{name}: .*pipe\.load_lora"):
            getattr(pipe.transformer, name)
    with pytest.raises(Unsupported, match="adapters are not trained here"):
        _ = pipe.save_lora_weights

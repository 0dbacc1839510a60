"""A damaged or foreign adapter is refused by one sentence, and the pipeline is as it was before."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import adapters, tiny
from zimage_core.cli.adapters import read_loras
from zimage_core.errors import BadArgument, BadFile, BadWeights, Unsupported, WrongModel, ZImageError

Q = "transformer.layers.0.attention.to_q"
RUN = {"num_inference_steps": 1, "output_type": "latent", "seed": 1}


def lora(module=Q, n=32, k=32, rank=2, **beside):
    pair = {"lora_A.weight": adapters.random(rank, k), "lora_B.weight": adapters.random(n, rank, seed=1)}
    return {f"{module}.{leaf}": value for leaf, value in {**pair, **beside}.items()}


def of(leaves, module=Q):
    return {f"{module}.{leaf}": value for leaf, value in leaves.items()}


# the messages are longer than a line may be
# ruff: noqa: E501
R = adapters.random
NAN = torch.full((2, 32), torch.nan)
CASES = {
    "rank mismatch": (lora() | {f"{Q}.lora_B.weight": R(32, 3)}, BadWeights, "ranks that mismatch: down 2, up 3"),
    "half a pair": ({f"{Q}.lora_A.weight": R(2, 32)}, BadWeights, "has no up, only down, so that it is incomplete"),
    "no numbers": (lora() | {f"{Q}.lora_A.weight": NAN}, BadWeights, "to_q.lora_A.weight' holds NaN or infinite"),
    "a wild alpha": (lora(alpha=torch.tensor(torch.inf)), BadWeights, "alpha' holds NaN or infinite numbers"),
    "a long alpha": (lora(alpha=torch.ones(3)), BadWeights, r"alpha of shape \(3,\), wanted one number"),
    "an absurd rank": (lora(rank=1025), BadWeights, "rank 1025, wanted 1 to 1024"),
    "no rank": (lora(rank=0), BadWeights, "rank 0, wanted 1 to 1024"),
    "a convolution": (of({"lora_down.weight": R(2, 32, 3, 3), "lora_up.weight": R(32, 2)}), BadWeights, "two axes"),
    "tucker": (lora(**{"lora_mid.weight": R(2, 2)}), Unsupported, "a LoRA of a convolution"),
    "twice": (lora() | {f"diffusion_model.{Q[12:]}.lora_down.weight": R(2, 32)}, BadWeights, "same part of one layer"),
    "Lumina-Image-2": (lora(n=2304, k=2304), BadWeights, "2304 x 2304, this model's has 32 x 32.*Lumina-Image-2"),
    "the full size": (lora(n=3840, k=3840), BadWeights, "made for another model, perhaps Z-Image at its full size"),
    "FLUX": (lora("transformer.single_transformer_blocks.0.attn.to_q"), WrongModel, "FLUX.*get a LoRA for Z-Image"),
    "FLUX by kohya": (lora("lora_unet_double_blocks_0_img_attn_qkv"), WrongModel, "which changes FLUX"),
    "Qwen-Image": (lora("transformer_blocks.0.img_mlp.net.2"), WrongModel, "which changes Qwen-Image"),
    "SDXL": (lora("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q")
             | lora("lora_te2_text_model_encoder_layers_0_mlp_fc1"), WrongModel, "Stable Diffusion XL"),
    "Wan": (lora("diffusion_model.blocks.0.cross_attn.k"), WrongModel, "which changes Wan"),
    "nothing of ours": (lora("some.thing"), WrongModel, "none of its layers is one of this pipeline's"),
    "no adapter": ({"layers.0.attention.to_q.weight": R(32, 32)}, WrongModel, "a LoRA was wanted, tensors of no adapter"),
    "LoKr of a huge product": (
        of({"lokr_w1_a": R(300000, 1), "lokr_w1_b": R(1, 300000), "lokr_w2": R(1, 1)}), BadWeights, "300000 x 300000"),
    "a ControlNet's": (lora("control_layers.0.attention.to_q"), WrongModel, "none of its layers is one of this"),
    "IA3": (of({"ia3_l": R(32)}), Unsupported, "an IA3 adapter"),
    "VeRA": (of({"vera_lambda_b": R(32)}), Unsupported, "a VeRA adapter"),
    "BOFT": (of({"oft_blocks": R(2, 4, 8, 8)}), Unsupported, "a BOFT adapter"),
    "GLoRA": (of({f"{leaf}.weight": R(2, 2) for leaf in ("a1", "a2", "b1", "b2")}), Unsupported, "a GLoRA adapter"),
    "old OFT": (of({"oft_r": R(2, 4, 4)}), Unsupported, "an OFT adapter of PEFT before 0.16"),
    "OFT of other blocks": (of({"oft_blocks": R(3, 8, 8)}), BadWeights, "this layer has 32 outputs"),
    "OFT of no triangle": (of({"oft_R.weight": R(8, 5)}), BadWeights, "fits no block of its inputs"),
    "OFT over q, k and v": (
        of({"oft_blocks": R(2, 48, 48)}, "layers.0.attention.qkv"), Unsupported, "do not fit q, k and v"),
    "DoRA of another size": (lora(dora_scale=R(31, 1)), BadWeights, "31 DoRA magnitudes for a weight of 32 x 32"),
    "DoRA over inputs of q, k and v": (
        lora("layers.0.attention.qkv", 96, dora_scale=R(1, 32)), Unsupported, "fused q, k and v"),
    "two kinds": (lora(diff=R(32, 32)), BadWeights, "holds tensors of several kinds: diff, down, up"),
    "alpha alone": (lora() | {"layers.1.attention.to_q.alpha": torch.tensor(1.0)}, BadWeights, "only alpha"),
    "a bias": (of({"diff_b": R(32)}), BadWeights, "has a diff_b, and that layer has no bias"),
    "a norm of another size": (of({"diff": R(31)}, "layers.0.attention_norm1"), BadWeights, "31 numbers in its diff"),
    "a LoRA of a norm": (lora("layers.0.attention_norm1"), BadWeights, "is a norm or pad token and has a down"),
    "no tensor": ({f"{Q}.lora_A.weight": [1.0]}, BadArgument, "lora_A.weight': list, wanted names with torch"),
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline()
    pipe.load_lora(lora("layers.1.attention.to_v"), 0.5, name="good")
    return pipe


@pytest.fixture(scope="module")
def before(pipe):
    return pipe("a", **RUN).images


@pytest.mark.parametrize("case", CASES)
def test_a_refused_adapter_changes_nothing(case, pipe, before):
    tensors, error, message = CASES[case]
    with pytest.raises(error, match=message) as caught:
        pipe.load_lora(tensors, name="bad")
    assert "\n" not in str(caught.value)
    assert [(each.name, each.weight) for each in pipe.loras] == [("good", 0.5)]
    assert torch.equal(pipe("a", **RUN).images, before)


def test_the_file_is_named(tmp_path, pipe):
    for case in ("rank mismatch", "FLUX", "old OFT"):
        tensors, error, message = CASES[case]
        path = tmp_path / f"{case}.safetensors"
        save_file(tensors, path)
        with pytest.raises(error, match=f"^{path}: .*{message}"):
            pipe.load_lora(path)


def test_files_that_are_none(tmp_path, pipe):
    (tmp_path / "pickle.pt").write_bytes(b"PK\x03\x04" + b"\0" * 99)
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.safetensors"
    save_file(lora(), cut)
    cut.write_bytes(cut.read_bytes()[:-7])
    for name, message in (("pickle.pt", "zip|pickle|PyTorch"), ("empty", "no LoRA"), ("cut.safetensors", "truncated"),
                          ("none.safetensors", "no such file|does not exist")):  # fmt: skip
        with pytest.raises(BadFile, match=message):
            pipe.load_lora(tmp_path / name)
    save_file(tiny.vae().state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(WrongModel, match="a LoRA was wanted, this is"):
        pipe.load_lora(tmp_path / "vae.safetensors")
    for wrong in (None, 3, ""):
        with pytest.raises(BadArgument, match="wanted a path or a dict of tensors"):
            pipe.load_lora(wrong)


@pytest.mark.parametrize("config", ["{", json.dumps({"lora_alpha": "x"}), json.dumps({"lora_alpha": [1]})])
def test_metadata_that_says_nothing_sensible(tmp_path, pipe, config):
    save_file(lora(), tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": config})
    with pytest.raises(BadFile, match=r"not valid JSON|for alpha, wanted a number"):
        pipe.load_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 101, "1", None])
def test_a_weight_is_a_number_of_reasonable_size(pipe, weight):
    with pytest.raises(BadArgument, match="weight"):
        pipe.load_lora(lora(), weight)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.set_adapters("x"),
        lambda p: p.set_adapters(["good"], [1, 2]),
        lambda p: p.set_adapters("good", {"layers": 1}),
        lambda p: p.set_adapters("good", float("nan")),
        lambda p: p.delete_adapters(["good", "x"]),
        lambda p: p.fuse_lora(["unet"]),
        lambda p: p.fuse_lora(adapter_names=["x"]),
        lambda p: p.load_lora_weights(lora(), subsystem=3),
        lambda p: p.load_lora_weights("x", weight_name="../y"),
        lambda p: p.load_lora(lora(), name="good"),
    ],
)
def test_calls_with_wrong_arguments_change_nothing(call, pipe, before):
    with pytest.raises(ZImageError):
        call(pipe)
    assert [(each.name, each.weight) for each in pipe.loras] == [("good", 0.5)]
    assert torch.equal(pipe("a", **RUN).images, before)


def test_options_are_files_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:2", "c"):
        (tmp_path / name).touch()
    wanted = {"a.safetensors": ("a.safetensors", 1.0), "a.safetensors:0.8": ("a.safetensors", 0.8),
              "c:-1e-1": ("c", -0.1), "b:2": ("b:2", 1.0), "b:2:0.5": ("b:2", 0.5),
              f"{tmp_path}/c:2": (f"{tmp_path}/c", 2.0)}  # fmt: skip
    assert read_loras(list(wanted)) == list(wanted.values())
    for text in ("c:x", "c:", "c:nan", "c:inf", "c:1e9"):
        with pytest.raises(BadArgument, match=r"is no number from -100 to 100; write FILE:0\.8"):
            read_loras([text])
    for text in ("d", "d:1", r"C:\d\e.safetensors", "", "\0"):
        with pytest.raises(BadArgument, match=r"there is no such file|name of a file is empty"):
            read_loras([text])

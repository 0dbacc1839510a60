"""The library computes what the LoRA and the ControlNet were trained with, to rounding.

The training has forward passes of its own, in whole batches and on dense weights. Both sides start from the
same noise here and take the same eight steps.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.nano import model
from benchmarks.nano.draw import Scene, coverage, edges
from benchmarks.nano.restore import dense
from benchmarks.nano.train_control import Edges
from benchmarks.nano.train_lora import LoRA
from benchmarks.nano.train_vae import to_tensor
from benchmarks.nano.tune import base
from zimage_core import ZImagePipeline, load_controlnet
from zimage_core.assets import PARTS

PROMPT, SEED = "a red star on a blue background", 3
ROUNDING = 1e-4
"""Largest difference of latents of unit variance after eight steps in float32."""


@pytest.fixture
def nano(monkeypatch: pytest.MonkeyPatch):
    """The shipped model as it is trained, in float32."""
    monkeypatch.setattr(model, "mixed_precision", nullcontext)
    monkeypatch.setattr(model.transformer, "attention", model.short_attention)
    return base()


def latents(pipe: ZImagePipeline, **arguments) -> torch.Tensor:
    return pipe(PROMPT, seed=SEED, output_type="latent", **arguments).images


def test_a_run_with_control_is_the_trained_one(nano):
    network, vae = nano
    mask = coverage(Scene("red", "blue", "star", "left", "small"), np.random.default_rng(0))
    part = Edges(network)
    part.load_state_dict(dense(load_controlnet(PARTS["edges"]), ""))
    with torch.no_grad():
        control = part.condition(vae.latents(to_tensor(edges(mask)[None])), 0.8)
    want = model.sample(network, [PROMPT], SEED, control)
    pipe = ZImagePipeline.from_default()
    pipe.load_controlnet(PARTS["edges"])
    plain = latents(pipe, control_image=Image.fromarray(edges(mask)), controlnet_conditioning_scale=0.0)
    got = latents(pipe, control_image=Image.fromarray(edges(mask)), controlnet_conditioning_scale=0.8)
    assert (got - want).abs().max() <= ROUNDING
    assert (got - plain).abs().max() > 0.5


def test_a_run_with_a_lora_is_the_trained_one(nano):
    network, _ = nano
    lora, found = LoRA(network), load_file(PARTS["outline"])
    for name, tensor in lora.tensors().items():
        assert tensor.shape == found[name].shape
    for name, branch in lora.branches.items():
        for half in ("lora_A", "lora_B"):
            getattr(branch, half).weight.data.copy_(found[f"transformer.{name}.{half}.weight"].float())
    want = model.sample(network, [PROMPT], SEED)
    pipe = ZImagePipeline.from_default()
    plain = latents(pipe)
    pipe.load_lora(PARTS["outline"])
    got = latents(pipe)
    assert (got - want).abs().max() <= ROUNDING
    assert (got - plain).abs().max() > 0.5

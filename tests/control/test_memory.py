"""Runs with control under a memory budget: the same image, nets counted, streamed where they do not fit."""

from __future__ import annotations

from copy import copy
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import controls
from zimage_core import ZImagePipeline
from zimage_core.control.config import ControlConfig
from zimage_core.control.model import ControlNet
from zimage_core.errors import OverBudget
from zimage_core.memory.beside import weighed
from zimage_core.memory.nets import Beside, net_of
from zimage_core.memory.planner import beside
from zimage_core.models.block_source import RESIDENT
from zimage_core.weights.components import open_component
from zimage_core.weights.controlnets import OWN, SHARED

MIB = 1 << 20
SMALL = {"height": 48, "width": 64, "num_inference_steps": 2, "seed": 4, "output_type": "pt"}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def write(folder, refiner):
    """A ControlNet for the embedded model."""
    config = ControlConfig(
        dim=256, n_heads=2, hidden_dim=682, channels=33, n_layers=4,
        n_refiner_layers=0 if refiner == SHARED else 1, refiner=refiner,
    )  # fmt: skip
    return controls.write(folder / "net.safetensors", controls.draw(ControlNet(config), 1, 0.03))


def draw(pipe, **more):
    return pipe("a small red circle", **{**SMALL, "control_image": PICTURE, **more})


@pytest.mark.parametrize("refiner", [OWN, SHARED])
def test_a_net_is_kept_or_streamed_and_the_image_is_the_same(tmp_path, refiner):
    path = write(tmp_path, refiner)
    plain, wide = ZImagePipeline.from_default(), ZImagePipeline.from_default(ram="64GiB")
    for pipe in (plain, wide):
        pipe.load_controlnet(path)
    images = [PICTURE, PICTURE]
    wanted = draw(plain, control_image=images)
    kept = draw(wide, control_image=images)
    assert torch.equal(kept.images, wanted.images)
    assert kept.memory.traffic["controlnet net"].bytes_moved == 0

    job, nets = wide._placement.memory._job, Beside(tuple(map(weighed, wide.controlnets.values())), 2)
    several = copy(job)
    several.images = 3
    assert nets.live(several) > nets.live(job), "each image may have control latents of its own"
    spare = nets.weights(streamed=False) - nets.weights(streamed=True)
    assert spare > 2 * MIB
    least = beside(job.sizes) + job.floor() + nets.least(job)
    narrow = ZImagePipeline.from_default(ram=least + spare // 2)
    narrow.load_controlnet(path)
    for _ in range(2):
        streamed = draw(narrow, control_image=images)
        assert torch.equal(streamed.images, wanted.images)
        assert streamed.memory.traffic["controlnet net"].bytes_moved > 0
        assert narrow.controlnets["net"].stream is RESIDENT, "the net is put away after the steps"

    short = ZImagePipeline.from_default(ram=least - MIB)
    short.load_controlnet(path)
    with pytest.raises(
        OverBudget, match=r"of the budget are for the ControlNets; of the rest ram: .* need at"
    ):
        draw(short, control_image=images)
    short.unload_controlnet()
    assert draw(short, control_image=None).memory is not None


@pytest.mark.parametrize("refiner", [OWN, SHARED])
def test_headers_tell_what_a_loaded_net_weighs(tmp_path, refiner):
    path, pipe = write(tmp_path, refiner), ZImagePipeline.from_default()
    opened = open_component(path)
    told, loaded = net_of(opened, "float32"), weighed(pipe.load_controlnet(path))
    opened.file.close()
    assert told.always + sum(told.blocks) == pytest.approx(loaded.always + sum(loaded.blocks), rel=1e-3)
    assert sorted(told.blocks) == sorted(loaded.blocks)


def test_a_plan_counts_what_is_loaded():
    pipe = ZImagePipeline.from_default()
    peaks = [pipe.plan().phase("denoise").peak]
    for load in (partial(pipe.load_controlnet, "edges"), partial(pipe.load_lora, "outline")):
        load()
        peaks.append(pipe.plan().phase("denoise").peak)
    assert peaks[0] + (1 << 20) < peaks[1] < peaks[2]
    assert any("ControlNets take" in reason for reason in pipe.plan().reasons)

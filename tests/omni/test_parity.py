"""End to end against diffusers' ZImageOmniPipeline on one checkpoint: same noise, same latents.

In float64 the two agree to rounding; in float32 they differ by less than float32 moves diffusers itself.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.helpers import omni_pipeline
from tests.helpers.omni_pipeline import CASES, both, difference, images, picture
from tests.helpers.parity import apart
from zimage_core.omni.references import open_references

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return omni_pipeline.make_pairs(tmp_path_factory.mktemp("omni"))


@pytest.mark.parametrize("case", CASES)
def test_latents_after_the_last_step_match(pairs, case):
    found = difference(pairs, case)
    assert found.passes, found
    assert found.float32 <= 1e-4, found


def test_cases_differ_from_each_other(pairs):
    """Each reference changes the result, so that a case above cannot pass by ignoring it."""
    call = {"height": 64, "width": 64, "latents": torch.ones(1, 16, 8, 8).clone}
    shown = [(), ((96, 64),), ((96, 64), (64, 80)), ((64, 80), (96, 64)), ((96, 80),)]
    given = [{"image": images(*sizes)} if sizes else {} for sizes in shown]
    results = [both(pairs.narrow, **call, **each)[1] for each in given]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert apart(a, b) > 1e-2


@pytest.mark.parametrize("size", [(1600, 800), (800, 1601), (1200, 1200), (1023, 1026), (101, 75), (64, 513)])
@pytest.mark.parametrize("area", [None, 512 * 512])
def test_references_are_resized_and_cropped_to_the_bit(size, area):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    theirs, image = Flux2ImageProcessor(vae_scale_factor=16), picture(*size)
    (member,), _ = open_references([image], 2, area, 16, (8192, 8192))
    resized = image
    if image.width * image.height > 1024 * 1024:
        resized = theirs._resize_to_target_area(image, area or 1024 * 1024)
    assert resized.tobytes() == member.image.tobytes()
    height, width = member.size
    assert (width, height) == (resized.width // 16 * 16, resized.height // 16 * 16)
    wanted = theirs.preprocess(resized, height=height, width=width, resize_mode="crop")
    assert torch.equal(member.canvas(), wanted)


def test_every_argument_of_diffusers_exists_with_its_place_and_default(pairs):
    theirs, ours = (list(inspect.signature(type(p).__call__).parameters.values()) for p in pairs.narrow)
    ours_alone = {"num_inference_steps", "guidance_scale", "callback_on_step_end_tensor_inputs"}
    for a, b in zip(theirs, ours, strict=False):
        assert a.name == b.name
        assert a.default == b.default or a.name in ours_alone, a.name


def test_prompt_embeds_are_those_of_diffusers(pairs):
    theirs, ours = pairs.narrow
    embeds, negative = theirs.encode_prompt(["a"], negative_prompt=["b"], num_condition_images=2)
    own = ours.encode_prompt(["a"], negative_prompt=["b"], num_condition_images=2)
    assert max(map(apart, (*embeds[0], *negative[0]), (*own[0][0], *own[1][0]))) <= 1e-5
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(0))
    call = {"image": images((64, 64), (64, 80)), "guidance_scale": 2.0, "latents": noise.clone}
    texts = both(pairs.narrow, prompt=lambda: ["a"], negative_prompt=lambda: ["b"], **call)[1]
    given = both(
        pairs.narrow, prompt=None, prompt_embeds=lambda: embeds, negative_prompt_embeds=lambda: negative,
        **call,
    )  # fmt: skip
    assert apart(*given) <= 1e-4
    assert apart(texts, given[1]) <= 1e-4

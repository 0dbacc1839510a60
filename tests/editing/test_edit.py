"""Runs that begin from an image, as a caller sees them; diffusers' latents are in test_parity."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import tiny
from zimage_core import BadArgument, BadFile, BadShape, ZImagePipeline
from zimage_core.editing.edit import Given, make_edit
from zimage_core.files.png import read_metadata
from zimage_core.sampling.samplers import SAMPLERS

H, W = 48, 64
FEW = {"num_inference_steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def picture(seed=0, size=(H, W)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def stroke(size=(H, W)):
    mask = np.zeros(size, np.uint8)
    mask[9:37, 13:50] = 255
    return mask


KEPT = stroke() == 0


# --- what stays and what changes ---


def test_pixels_outside_of_the_mask_come_back_to_the_bit(pipe):
    image = picture()
    got = np.asarray(pipe("a", image=image, mask_image=stroke(), **FEW).images[0])
    assert np.array_equal(got[KEPT], np.asarray(image)[KEPT])
    assert (got != np.asarray(image))[~KEPT].mean() > 0.5


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_arrays_hold_the_same_values_outside(pipe, output_type):
    pixels = torch.rand(3, H, W, generator=torch.Generator().manual_seed(3))
    got = pipe("a", image=pixels, mask_image=stroke(), output_type=output_type, **FEW).images[0]
    got = torch.as_tensor(got)
    got = got.permute(2, 0, 1) if output_type == "np" else got
    assert torch.equal(got[:, KEPT], pixels[:, KEPT])


def test_latents_outside_of_the_mask_are_those_of_the_image(pipe):
    seen = []
    options = {"image": picture(), "output_type": "latent", "generator": torch.Generator().manual_seed(1)}
    pipe("a", mask_image=stroke(), num_inference_steps=3, **options,
         callback_on_step_end=lambda _, i, t, x: seen.append(x["latents"].clone()))  # fmt: skip
    clean = pipe("a", mask_image=np.zeros((H, W)), num_inference_steps=1,
                 **{**options, "generator": torch.Generator().manual_seed(1)}).images  # fmt: skip
    outside = torch.from_numpy(KEPT[::8, ::8])
    assert torch.equal(seen[-1][..., outside], clean[..., outside])
    assert not torch.equal(seen[0][..., outside], clean[..., outside]), "it has no noise yet"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_keeps_what_is_outside(pipe, sampler):
    image, seen = picture(), []
    options = {"sampler": sampler, "image": image, "num_inference_steps": 4, "seed": 2}
    got = np.asarray(pipe("a", mask_image=stroke(), **options).images[0])
    assert np.array_equal(got[KEPT], np.asarray(image)[KEPT])
    pipe("a", strength=0.5, output_type="latent", **options,
         callback_on_step_end=lambda _, i, t, x: seen.append(float(t)))  # fmt: skip
    assert len(seen) == 2


def test_the_callback_comes_after_the_mixing_and_its_latents_count(pipe):
    def zero(_, i, t, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    got = pipe(
        "a", image=picture(), mask_image=stroke(), output_type="latent", callback_on_step_end=zero, **FEW
    )
    assert not got.images.any()


def test_a_soft_edge_leaves_what_is_far_untouched_and_blends_the_rest(pipe):
    image = picture()
    options = {"image": image, "mask_image": stroke(), **FEW}
    soft = np.asarray(pipe("a", mask_blur=6, **options).images[0])
    hard = np.asarray(pipe("a", **options).images[0])
    near = np.zeros((H, W), bool)
    near[9 - 6 : 37 + 6, 13 - 6 : 50 + 6] = True
    assert np.array_equal(soft[~near], np.asarray(image)[~near])
    assert np.array_equal(soft[~KEPT], hard[~KEPT])
    assert (soft != hard)[near & KEPT].any()


def test_a_black_mask_gives_the_image_back_and_a_white_one_all_new(pipe):
    image = picture()
    with pytest.warns(UserWarning, match="black everywhere"):
        black = pipe("a", image=image, mask_image=np.zeros((H, W), np.uint8), **FEW).images[0]
    assert np.array_equal(np.asarray(black), np.asarray(image))
    with pytest.warns(UserWarning, match="white everywhere"):
        white = pipe("a", image=image, mask_image=np.ones((H, W), bool), **FEW).images[0]
    alone = pipe("a", height=H, width=W, num_inference_steps=3, generator=torch.Generator().manual_seed(1))
    assert np.asarray(white).shape == np.asarray(alone.images[0]).shape


def resizes(pipe, image, **options):
    """What a run warns of that concerns the size of its image."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe("a", image=image, num_inference_steps=1, seed=1, output_type="latent", **options)
    return [str(each.message) for each in caught if "resized" in str(each.message)]


def test_an_image_that_cannot_stay_to_the_bit_is_warned_of(pipe):
    said = resizes(pipe, picture(size=(50, 70)), mask_image=stroke((50, 70)))
    assert said == [
        "image is 70 x 50 pixels and was resized to 64 x 48, so that its pixels do not stay to the bit; "
        "give an image of 64 x 48"
    ]
    assert not resizes(pipe, picture(), mask_image=stroke())
    assert not resizes(pipe, picture(size=(37, 50)), outpaint=(20, 0, 0, 9))


def test_an_image_that_is_stretched_is_warned_of(pipe):
    said = resizes(pipe, picture(), width=32, strength=0.5)
    assert said == [
        "image is 64 x 48 pixels and was resized to 32 x 48, which stretches it; crop it to that shape"
    ]
    assert not resizes(pipe, picture(size=(96, 128)), width=64, height=48, strength=0.5)
    assert "16 x 80 pixels" in resizes(pipe, [picture(), picture(size=(80, 16))], num_images_per_prompt=2)[0]


def test_a_photograph_that_is_drawn_in_full_is_warned_of():
    """A run of that size takes hours."""
    for height, warned in ((2048, False), (2064, True)):
        given = Given.open(np.zeros((height, 2048, 3), np.uint8), None, None, 16, 8, 16)
        shape, generator = (1, 16, height // 8, 256), torch.Generator()
        said = make_edit(given, shape, generator, True, None, 0.5, 8, 0.0).remarks()
        assert ["makes a run of 2048 x 2064" in each for each in said] == [True] * warned


def test_an_image_grows_and_stays_inside(pipe):
    image = picture(size=(37, 50))
    got = pipe("a", image=image, outpaint=(20, 0, 0, 9), **FEW).images[0]
    assert got.size == (80, 48)
    assert np.array_equal(np.asarray(got)[:37, 30:], np.asarray(image))
    other = pipe("a", image=image, outpaint=[20, 0, 0, 9], num_inference_steps=3, seed=2).images[0]
    assert (np.asarray(other) != np.asarray(got))[:, :30].mean() > 0.5


def test_a_strength_near_zero_gives_nearly_the_image(pipe):
    """Through the VAE alone: the latents after the last of 50 steps are near those of the image."""
    calls = {}
    for strength in (0.02, 0.9):
        options = {"image": picture(), "strength": strength, "num_inference_steps": 50, "seed": 1}
        calls[strength] = pipe("a", output_type="latent", **options).images
    clean = pipe("a", image=picture(), mask_image=np.zeros((H, W)), seed=1, output_type="latent",
                 num_inference_steps=1).images  # fmt: skip
    near, far = (float((calls[s] - clean).abs().mean()) for s in (0.02, 0.9))
    assert near < 0.5 * far


# --- batches and seeds ---


def test_each_image_of_a_batch_is_what_it_is_alone(pipe):
    images = [picture(0), picture(1)]
    for masked in (False, True):
        mask = {"mask_image": stroke()} if masked else {}
        both = pipe(["a", "b"], image=images, output_type="latent", **FEW, **mask).images
        for i, prompt in enumerate("ab"):
            alone = pipe(
                prompt, image=images[i], output_type="latent", num_inference_steps=3, seed=1 + i, **mask
            )
            assert torch.equal(both[i : i + 1], alone.images)


def test_one_image_serves_many_and_two_serve_their_prompts(pipe):
    got = pipe("a", image=picture(), num_images_per_prompt=3, **FEW)
    assert got.seeds == (1, 2, 3)
    two = pipe(
        ["a", "b"], image=[picture(0), picture(1)], mask_image=stroke(), num_images_per_prompt=2, **FEW
    )
    for i, image in enumerate(two.images):
        assert np.array_equal(np.asarray(image)[KEPT], np.asarray(picture(i // 2))[KEPT])


def test_latents_are_an_image_too(pipe):
    latents = pipe("a", height=H, width=W, output_type="latent", **FEW).images
    got = pipe.img2img("b", latents, strength=0.5, **FEW).images[0]
    assert got.size == (W, H)


def test_the_size_is_the_images_rounded_down_and_within_the_limits(pipe):
    assert pipe("a", image=picture(size=(47, 81)), output_type="pt", **FEW).images.shape == (1, 3, 32, 80)
    assert pipe("a", image=picture(size=(3, 40)), output_type="pt", **FEW).images.shape == (1, 3, 16, 32)
    limits = pipe.limits
    most = 16 * limits.rows
    tall = picture(size=(2 * most, 64))
    from zimage_core.run.request import Request, prepare

    run = prepare(limits, pipe.scheduler, Request(prompt="a", image=tall, seed=1))
    assert (run.height, run.width) == (most, 32)
    assert pipe("a", 32, 48, image=picture(), output_type="pt", **FEW).images.shape == (1, 3, 32, 48)


# --- the pipeline around it ---


def test_a_run_without_an_image_is_as_before(pipe):
    before = pipe("a", output_type="latent", **FEW).images
    pipe("a", image=picture(), mask_image=stroke(), **FEW)
    assert torch.equal(pipe("a", output_type="latent", **FEW).images, before)


def test_settings_say_what_was_done_and_hold_no_path(tmp_path):
    pipe, path = tiny.pipeline(), tmp_path / "secret name.png"
    picture().save(path)
    result = pipe(
        "a", image=path, mask_image=stroke(), strength=0.5, mask_blur=3, num_inference_steps=4, seed=1
    )
    result.save(tmp_path / "out.png")
    text = read_metadata(tmp_path / "out.png")
    assert "secret" not in json.dumps(text.settings) + str(text.parameters)
    assert text.settings["strength"] == 0.5
    assert text.settings["steps"] == 4
    assert text.settings["mask_blur"] == 3
    assert len(text.settings["image_sha256"]) == len(text.settings["mask_sha256"]) == 64
    assert "Steps: 4" in text.parameters
    assert "Denoising strength: 0.5" in text.parameters
    assert "strength" not in pipe("a", **FEW).settings[0]


def bad(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    return {
        "strength 0": {"image": picture(), "strength": 0},
        "strength 1.1": {"image": picture(), "strength": 1.1},
        "strength nan": {"image": picture(), "strength": float("nan")},
        "strength alone": {"strength": 0.5},
        "mask alone": {"mask_image": stroke()},
        "margins alone": {"outpaint": (16, 0, 0, 0)},
        "blur alone": {"image": picture(), "mask_blur": 3},
        "blur below 0": {"image": picture(), "mask_image": stroke(), "mask_blur": -1},
        "broken": {"image": tmp_path / "broken.png"},
        "broken mask": {"image": picture(), "mask_image": tmp_path / "broken.png"},
        "missing": {"image": tmp_path / "none.png"},
        "no image": {"image": 3},
        "no margins": {"image": picture(), "outpaint": (0, 0, 0, 0)},
        "three margins": {"image": picture(), "outpaint": (1, 0, 0)},
        "negative margin": {"image": picture(), "outpaint": (1, 0, 0, -1)},
        "margins and size": {"image": picture(), "outpaint": (16, 0, 0, 0), "width": 64},
        "huge margins": {"image": picture(), "outpaint": (8192, 8192, 8192, 8192)},
        "two images": {"image": [picture(), picture()]},
        "two masks": {"image": picture(), "mask_image": np.zeros((2, H, W), np.uint8)},
        "two generators": {"image": picture(), "generator": [torch.Generator(), torch.Generator()]},
        "odd size": {"image": picture(), "width": 50},
        "latents and mask": {"image": torch.zeros(1, 16, 6, 8), "mask_image": stroke()},
        "odd latents": {"image": torch.zeros(1, 16, 5, 8)},
        "latents with NaN": {"image": torch.full((1, 16, 6, 8), torch.nan)},
    }


def test_bad_input_is_one_sentence_before_any_weight_is_used(pipe, tmp_path, monkeypatch):
    before = pipe("a", output_type="latent", **FEW).images
    for name, options in bad(tmp_path).items():
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe), "_tokenize", lambda *_: pytest.fail("the run began"))
            arguments = {"num_inference_steps": 3, **options}
            with pytest.raises((BadArgument, BadShape, BadFile)) as error:
                pipe("a", **arguments)
        assert "\n" not in str(error.value), name
        assert len(str(error.value)) < 300, name
    assert torch.equal(pipe("a", output_type="latent", **FEW).images, before)


def test_what_is_probably_a_mistake_is_said(pipe):
    with pytest.warns(UserWarning, match="the image has no effect"):
        pipe("a", image=picture(), strength=1, **FEW)
    with pytest.warns(UserWarning, match="mask_image is 32 x 20 pixels and was resized"):
        pipe("a", image=picture(), mask_image=stroke((20, 32)) + 255, **FEW)


def test_a_pipeline_without_a_vae_says_so():
    pipe = tiny.pipeline()
    pipe.vae = None
    with pytest.raises(Exception, match="VAE"):
        pipe("a", image=picture(), output_type="latent", **FEW)


@pytest.mark.parametrize("tight", [False, True])
def test_a_memory_budget_holds_and_gives_the_same(tight):
    options = {"image": picture(), "mask_image": stroke(), "output_type": "pt", **FEW}
    want = ZImagePipeline.from_default()("a red circle", **options).images
    pipe = ZImagePipeline.from_default(ram="4GiB")
    if tight:
        floor = pipe._placement.memory.begin(
            width=W, height=H, images=1, caption_tokens=20, guidance=False, steps=3, image=True
        ).floor  # fmt: skip
        from zimage_core.memory.planner import beside

        pipe.limit_memory(ram=beside(pipe._placement.memory._sizes) + 2 * floor)
    encoder = pipe.vae.encoder.conv_in.weight
    got = pipe("a red circle", **options)
    assert float((got.images - want).abs().max()) <= 1e-4
    assert pipe.vae.encoder.conv_in.weight is encoder, "the encoder was not put back"
    assert got.memory is not None


def test_a_plan_counts_the_encoder_and_the_given_image():
    pipe = ZImagePipeline.from_default(ram="4GiB")
    run = {"width": 512, "height": 512, "images": 1, "caption_tokens": 20, "guidance": False, "steps": 3}
    plain, edited = (
        pipe._placement.memory.begin(**run, image=image).phase("decode") for image in (False, True)
    )
    assert edited.peak > plain.peak + 2 * 3 * 512 * 512 * 4 - 1


# --- calls by name ---


def test_the_calls_by_name_are_the_call(pipe):
    image, mask, options = picture(), stroke(), {"output_type": "pt", **FEW}
    pairs = [
        (pipe.img2img("a", image, 0.5, **options), {"strength": 0.5}),
        (pipe.inpaint("a", image, mask, **options), {"mask_image": mask}),
        (
            pipe.outpaint("a", image, (16, 0, 0, 0), mask_blur=2, **options),
            {"outpaint": (16, 0, 0, 0), "mask_blur": 2},
        ),
    ]
    for got, arguments in pairs:
        assert torch.equal(got.images, pipe("a", image=image, **arguments, **options).images)
    for call in (pipe.img2img, pipe.inpaint, pipe.outpaint):
        with pytest.raises(BadArgument, match="missing"):
            call("a", **FEW)
    with pytest.raises(TypeError, match="strenth"):
        pipe.img2img("a", image, strenth=0.5)


def test_hires_makes_a_large_image_of_a_small_one(pipe):
    got = pipe.hires("a", scale=1.5, strength=0.5, height=32, width=48, num_inference_steps=4, seed=3)
    assert got.images[0].size == (64, 48)
    assert len(got.timings.steps) == 4 + 2
    assert got.settings[0]["hires"] == 1.5
    assert got.settings[0]["hires_from"] == "48x32"
    again = pipe.hires("a", scale=1.5, strength=0.5, height=32, width=48, num_inference_steps=4, seed=3)
    assert np.array_equal(np.asarray(got.images[0]), np.asarray(again.images[0]))
    assert pipe.hires("a", height=32, width=32, output_type="latent", **FEW).images.shape == (1, 16, 8, 8)
    assert pipe.hires("a", height=32, width=32, num_inference_steps=1, return_dict=False)[0][0].size == (
        64,
        64,
    )


def test_hires_is_two_passes_with_one_seed(pipe):
    from zimage_core.editing.edit import enlarged

    options = {"num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    small = pipe("a", 32, 32, **options).images
    want = pipe("a", image=enlarged(small, 8, 8), strength=0.6, **options).images
    assert torch.equal(pipe.hires("a", height=32, width=32, **options).images, want)


@pytest.mark.parametrize(
    "options", [{"scale": 0.5}, {"scale": 9}, {"strength": 0}, {"image": 1}, {"height": 33}, {"steps": 0},
                {"scale": 8, "height": 8192, "width": 8192}],
)  # fmt: skip
def test_hires_refuses_before_the_first_pass(pipe, options, monkeypatch):
    monkeypatch.setattr(type(pipe), "_tokenize", lambda *_: pytest.fail("the run began"))
    with pytest.raises(BadArgument):
        pipe.hires("a", **options)


def test_hires_that_is_interrupted_gives_the_small_image(pipe):
    def stop(pipe, i, t, x):
        pipe._interrupt = True

    got = pipe.hires("a", height=32, width=32, callback_on_step_end=stop, **FEW)
    assert got.interrupted
    assert got.images[0].size == (32, 32)

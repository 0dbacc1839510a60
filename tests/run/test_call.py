"""What a call returns and accepts: output types, callbacks, embeddings, cancelling, the lines people copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from zimage_core import ZImagePipeline
from zimage_core.errors import BadArgument, BadShape, Unsupported
from zimage_core.sampling.schedule import FlowMatchEulerScheduler


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def base():
    """Guidance by default, and none of the warnings of a distilled checkpoint."""
    return tiny.pipeline(shift=6.0)


def test_the_lines_of_articles_run(tmp_path):
    """Nothing but import and path differs from what is written for diffusers."""
    folder = tiny.folder(tmp_path / "m")
    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float16, low_cpu_mem_usage=False)
    pipe.enable_model_cpu_offload()
    pipe.enable_vae_slicing()
    with pytest.warns(UserWarning, match="guidance_scale=1"):
        image = pipe(
            prompt="a cat", height=768 // 16, width=768 // 16, num_inference_steps=8, guidance_scale=1.0
        ).images[0]
    assert image.size == (48, 48)
    assert pipe.dtype == torch.float16
    pipe.enable_sequential_cpu_offload()
    pipe.enable_vae_tiling()
    pipe.set_progress_bar_config(disable=True)
    assert pipe.to("cpu") is pipe
    assert pipe.to("cpu", torch.bfloat16).dtype == torch.bfloat16


def test_output_types_are_one_image(pipe):
    made = {
        kind: pipe("a", seed=1, width=48, output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    }
    assert made["pil"][0].mode == "RGB"
    assert made["np"].shape == (1, 32, 48, 3)
    assert made["np"].dtype == np.float32
    assert made["pt"].shape == (1, 3, 32, 48)
    assert made["latent"].shape == (1, 16, 4, 6)
    assert np.array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(made["pil"][0]), (made["np"][0] * 255).round().astype(np.uint8))
    assert 0 <= made["np"].min() < made["np"].max() <= 1
    z = made["latent"] / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    assert torch.equal((pipe.vae.decode(z) / 2 + 0.5).clamp(0, 1), made["pt"])


def test_a_tuple_without_return_dict(pipe):
    out = pipe("a", seed=1, num_inference_steps=1, return_dict=False)
    assert isinstance(out, tuple)
    assert len(out) == 1
    assert len(out[0]) == 1


def test_the_result_says_how_it_was_made(pipe):
    result = pipe(["a", "b"], seed=5, num_inference_steps=3)
    assert result[0] is result.images
    assert (result.seed, result.seeds) == (5, (5, 6))
    assert result.sigmas == pipe.scheduler.sigmas(3)
    times = result.timings
    assert len(times.steps) == 3
    assert all(t > 0 for t in (times.encode, *times.steps, times.decode))
    assert times.encode + sum(times.steps) + times.decode <= times.total
    assert 50e6 < result.peak_memory < 50e9
    assert not result.interrupted
    assert [s["prompt"] for s in result.settings] == ["a", "b"]


def test_time_in_the_callback_is_not_counted_as_a_step(pipe, monkeypatch):
    now = [0.0]

    def callback(*_):
        now[0] += 1.0

    monkeypatch.setattr("zimage_core.run.result.perf_counter", lambda: now[0])
    result = pipe("a", num_inference_steps=2, callback_on_step_end=callback)
    assert result.timings.steps == (0, 0)
    assert result.timings.total == 2


def test_lists_of_the_caller_are_not_modified(base):
    prompts, negative, sigmas, names = ["a", "b"], ["c", "d"], [1.0, 0.5], ["latents", "prompt_embeds"]
    latents = torch.randn(2, 16, 4, 4)
    embeds = base.encode_prompt(prompts, negative_prompt=negative)
    copies = [*embeds[0], *embeds[1]]
    kept = [t.clone() for t in [latents, *copies]]
    returned = {}

    def note(pipe, i, t, tensors):
        returned[i] = {"latents": tensors["latents"]}
        return returned[i]

    base(prompts, negative_prompt=negative, sigmas=sigmas, latents=latents, callback_on_step_end=note,
         callback_on_step_end_tensor_inputs=names)  # fmt: skip
    base(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], latents=latents, num_inference_steps=2)
    assert prompts == ["a", "b"]
    assert negative == ["c", "d"]
    assert sigmas == [1.0, 0.5]
    assert names == ["latents", "prompt_embeds"]
    assert len(embeds[0]) == len(embeds[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, [latents, *copies], strict=True))
    assert all(set(out) == {"latents"} for out in returned.values())


def test_embeddings_in_place_of_prompts_give_the_same_image(base):
    words = {"prompt": ["a", "long" * 20], "negative_prompt": "no"}
    positive, negative = base.encode_prompt(**words)
    frame = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    for features, prompt in zip(positive, words["prompt"], strict=True):
        assert len(features) == len(base.tokenizer.encode(frame.format(prompt)))
    kwargs = {"seed": 3, "num_inference_steps": 2, "output_type": "latent"}
    want = base(**words, **kwargs).images
    got = base(prompt_embeds=positive, negative_prompt_embeds=negative, **kwargs).images
    assert torch.equal(want, got)
    mixed = base(**words, prompt_embeds=positive, **kwargs)
    assert torch.equal(want, mixed.images)


def test_encode_prompt_gives_two_lists(base):
    positive, negative = base.encode_prompt("a")
    assert len(positive) == len(negative) == 1
    assert positive[0].shape[1] == 24
    assert not positive[0].requires_grad
    assert base.encode_prompt("a", do_classifier_free_guidance=False)[1] == []
    assert torch.equal(negative[0], base.encode_prompt("")[0][0])
    with pytest.raises(BadArgument, match="max_sequence_length"):
        base.encode_prompt("a", max_sequence_length=0)


def test_thinking_and_templates_change_the_caption(base):
    lengths = [
        len(base.encode_prompt("a", do_classifier_free_guidance=False, **options)[0][0])
        for options in ({}, {"enable_thinking": False}, {"prompt_template": "{prompt}"})
    ]
    assert lengths[1] > lengths[0] > lengths[2] == 1
    with pytest.raises(BadArgument, match="template"):
        base.encode_prompt("a", prompt_template="no place")
    with pytest.raises(BadArgument, match="prompt: an empty one"):
        base.encode_prompt("a", prompt_template="{prompt}")


def test_a_prompt_over_the_limit_warns_with_what_is_lost(base):
    options = {"max_sequence_length": 9, "do_classifier_free_guidance": False}
    with pytest.warns(UserWarning, match="lost.*xyz"):
        assert len(base.encode_prompt("ab xyz", **options)[0][0]) == 9


def test_the_callback_gets_what_it_asked_for_and_may_replace_it(base):
    seen = []

    def note(pipe, i, t, tensors):
        assert pipe is base
        assert pipe.num_timesteps == 3
        assert pipe.guidance_scale == 2.0
        assert pipe.do_classifier_free_guidance
        seen.append((i, float(t), sorted(tensors)))
        return {"negative_prompt_embeds": tensors["prompt_embeds"]} if i == 0 else None

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    kwargs = {"seed": 1, "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    got = base(
        "a",
        negative_prompt="b",
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=names,
        **kwargs,
    )
    assert seen == [(i, pytest.approx(1000 * s), sorted(names)) for i, s in enumerate(got.sigmas[:-1])]
    assert not torch.equal(got.images, base("a", negative_prompt="b", **kwargs).images)
    # with the negative side equal to the positive one, guidance has nothing to add from the second step on
    unguided = base("a", negative_prompt="a", **kwargs).images
    assert not torch.equal(got.images, unguided)


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (5, "dict or None"),
        ({"latents": torch.ones(1, 16, 2, 2)}, "latents"),
        ({"latents": torch.full((1, 16, 4, 4), float("nan"))}, "latents"),
        ({"prompt_embeds": []}, "prompt_embeds"),
        ({"prompt_embeds": [torch.ones(3, 24)] * 2}, "returned 2, wanted 1"),
    ],
)
def test_what_a_callback_returns_is_checked(pipe, out, error):
    with pytest.raises((BadArgument, BadShape), match=error):
        pipe("a", callback_on_step_end=lambda *_: out)


def test_a_callback_can_stop_the_run(pipe):
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = i == 2
        return {}

    got = pipe("a", seed=1, output_type="latent", callback_on_step_end=stop)
    assert len(seen) == 3
    assert got.interrupted
    assert torch.equal(got.images, seen[-1])
    again = pipe("a", seed=1, output_type="latent")
    assert not again.interrupted
    assert len(again.timings.steps) == 8


def test_latents_of_the_caller_are_the_starting_noise(pipe):
    start = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(8))
    a = pipe("a", latents=start, output_type="latent")
    b = pipe("a", seed=8, output_type="latent")
    assert a.seeds == (None,)
    assert torch.equal(a.images, b.images)
    half = pipe("a", latents=start.half(), output_type="latent").images
    assert half.dtype == torch.float32


def test_negative_prompts_matter_only_with_guidance(base):
    kwargs = {"seed": 1, "num_inference_steps": 2, "output_type": "latent"}
    plain = base("a", guidance_scale=0, **kwargs).images
    assert not torch.equal(base("a", negative_prompt="b", **kwargs).images, base("a", **kwargs).images)
    with pytest.warns(UserWarning, match="no effect"):
        assert torch.equal(base("a", negative_prompt="b", guidance_scale=0, **kwargs).images, plain)


def test_sizes_that_are_not_square(pipe):
    image = pipe("a", height=16, width=80, num_inference_steps=1).images[0]
    assert image.size == (80, 16)


def test_parts_are_reachable_by_the_public_names(pipe):
    assert pipe.tokenizer.encode("a<think>") == [pipe.tokenizer.encode("a")[0], 259]
    x, caption = torch.randn(16, 1, 4, 4), pipe.encode_prompt("a")[0][0]
    out = pipe.transformer([x], torch.tensor([0.5]), [caption])
    assert out[0].shape == x.shape
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert pipe.vae.decode(pipe.vae.encode(image)).shape == image.shape
    assert pipe.scheduler.shift == 3.0
    assert pipe.text_encoder(torch.tensor([1, 2])).shape == (2, 24)


def test_the_callback_cannot_begin_guidance(pipe):
    def begin(pipe, step, timestep, tensors):
        pipe._guidance_scale = 4.0

    with pytest.raises(BadArgument, match="began without guidance"):
        pipe("a", height=32, width=32, seed=1, callback_on_step_end=begin)


def test_devices_and_dtypes_by_name():
    pipe = tiny.pipeline()
    assert pipe.to(device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    for device in ("mps", "meta"):
        with pytest.raises(Unsupported, match=f"device: {device} is not supported"):
            pipe.to(device)


def test_the_parts_make_a_second_pipeline(pipe):
    second = ZImagePipeline(**pipe.components)
    assert second.transformer is pipe.transformer
    assert second.limits == pipe.limits


def test_a_scheduler_of_another_shift_changes_no_default(pipe):
    pipe = ZImagePipeline(**pipe.components)
    pipe.scheduler = FlowMatchEulerScheduler(shift=7.0)
    assert (pipe.limits.steps, pipe.limits.guidance) == (8, 0.0)
    assert ZImagePipeline(**{**pipe.components, "scheduler": FlowMatchEulerScheduler(6.0)}).limits.steps == 50


def test_the_answer_is_also_a_dict_as_in_diffusers(pipe):
    result = pipe("a", height=32, width=32, seed=1, num_inference_steps=1)
    assert result["images"] is result.images


def test_too_many_pixels_in_one_call_are_refused_before_any_noise(pipe, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *_, **__: pytest.fail("noise was drawn"))
    with pytest.raises(BadArgument, match="1024 images of 4096 x 4096 in one call, wanted at most 16"):
        pipe("a", height=4096, width=4096, num_images_per_prompt=1024)


def test_what_drew_the_image_is_recorded(pipe):
    embeds = pipe.encode_prompt("b")[0]
    options = {"height": 32, "width": 32, "seed": 1, "num_inference_steps": 1}
    assert "prompt" not in pipe("a", prompt_embeds=embeds, **options).settings[0]
    assert pipe("a", prompt_template="x {prompt}", **options).settings[0]["prompt_template"] == "x {prompt}"
    with pytest.raises(BadArgument, match="seed and latents"):
        pipe("a", latents=torch.zeros(1, 16, 4, 4), **options)

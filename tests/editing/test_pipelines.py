"""What diffusers' own tests of its image-to-image and inpainting pipelines ask, for ours of the same names.

Rewritten from their behaviour (tests/pipelines/z_image there): each test runs for both pipelines. What needs
another library or a GPU is left out: DDUF files, device maps, layerwise casting, group offloading, xformers.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from tests.helpers import tiny
from zimage_core import BadArgument, ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline

pytestmark = pytest.mark.filterwarnings("ignore:guidance_scale=3", "ignore:mask_image is")
KINDS = {"img2img": ZImageImg2ImgPipeline, "inpaint": ZImageInpaintPipeline}
SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("model"), 3.0)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def pipe(kind, folder):
    return kind.from_pretrained(folder)


def inputs(kind, seed=0, size=SIZE, **changes):
    """The arguments of diffusers' dummy inputs."""
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(1, 1, size, size)
    mask[:, :, size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1.0
    masked = {"mask_image": mask, "strength": 1.0} if kind is ZImageInpaintPipeline else {"strength": 0.6}
    return {
        "prompt": "dance monkey", "negative_prompt": "bad quality", "image": image,
        "generator": torch.Generator().manual_seed(seed), "num_inference_steps": 2, "guidance_scale": 3.0,
        "cfg_normalization": False, "cfg_truncation": 1.0, "height": size, "width": size,
        "max_sequence_length": 16, "output_type": "np", **masked, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def usual(pipe, kind):
    return pipe(**inputs(kind)).images


def test_the_image_has_its_shape(usual):
    assert usual.shape == (1, SIZE, SIZE, 3)
    assert np.isfinite(usual).all()


def test_the_call_takes_what_diffusers_requires(kind):
    found = inspect.signature(kind.__call__).parameters
    for name in ("prompt", "image", "height", "width", "guidance_scale", "negative_prompt", "prompt_embeds",
                 "negative_prompt_embeds", "strength", "num_inference_steps", "generator", "latents",
                 "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs"):  # fmt: skip
        assert name in found
    assert ("mask_image" in found) == (kind is ZImageInpaintPipeline)
    assert all(each.default is not inspect.Parameter.empty for name, each in found.items()
               if name not in ("self", "more"))  # fmt: skip


def test_arguments_by_place_are_those_by_name(pipe, kind, usual):
    given = inputs(kind)
    first = [given.pop("prompt"), given.pop("image")]
    if kind is ZImageInpaintPipeline:
        first += [given.pop("mask_image"), None]
    assert np.array_equal(pipe(*first, given.pop("strength"), **given).images, usual)


def test_save_and_load(pipe, kind, usual, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved")
    assert np.abs(again(**inputs(kind)).images - usual).max() < 1e-4


def test_save_and_load_a_variant(pipe, kind, usual, tmp_path):
    pipe.save_pretrained(tmp_path / "saved", variant="fp16")
    again = kind.from_pretrained(tmp_path / "saved", variant="fp16")
    assert np.abs(again(**inputs(kind)).images - usual).max() < 1e-4
    with pytest.raises(Exception, match="bf16"):
        kind.from_pretrained(tmp_path / "saved", variant="bf16")


def test_components_make_the_same_pipeline(pipe, kind, usual):
    assert np.array_equal(kind(**pipe.components)(**inputs(kind)).images, usual)


def test_from_pipe_in_both_directions(pipe, kind, usual):
    text = ZImagePipeline.from_pipe(pipe)
    back = kind.from_pipe(text)
    assert back.transformer is text.transformer is pipe.transformer
    assert np.array_equal(back(**inputs(kind)).images, usual)
    assert np.array_equal(text(**inputs(kind)).images, usual)
    for other in KINDS.values():
        made = other.from_pipe(pipe)
        assert made(**inputs(other)).images.shape == usual.shape


def test_the_methods_of_the_pipeline_work_here_too(pipe, kind):
    given = inputs(kind)
    for name in ("prompt", "image", "strength", "mask_image"):
        given.pop(name, None)
    image = inputs(kind)["image"]
    mask = inputs(ZImageInpaintPipeline)["mask_image"]
    for got in (pipe.img2img("a", image, **given), pipe.inpaint("a", image, mask, **given)):
        assert got.images.shape == (1, SIZE, SIZE, 3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_of_any_size(pipe, kind, size):
    given = inputs(kind)
    batch = {name: [given[name]] * size for name in ("prompt", "negative_prompt", "image")}
    if kind is ZImageInpaintPipeline:
        batch["mask_image"] = [given["mask_image"]] * size
    generators = [torch.Generator().manual_seed(i) for i in range(size)]
    got = pipe(**{**given, **batch, "generator": generators}).images
    assert got.shape == (size, SIZE, SIZE, 3)


def test_a_batch_holds_what_one_gives_alone(pipe, kind, usual):
    given = inputs(kind)
    given |= {"prompt": [given["prompt"], "b", "c d"], "negative_prompt": ["bad quality"] * 3}
    given["generator"] = [torch.Generator().manual_seed(i) for i in range(3)]
    given["image"] = [given["image"], *(torch.rand(1, 3, SIZE, SIZE) for _ in range(2))]
    assert np.array_equal(pipe(**given).images[0], usual[0])


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("each", [1, 2])
def test_images_per_prompt(pipe, kind, prompts, each):
    given = inputs(kind)
    given |= {name: prompts * [given[name]] for name in ("prompt", "image")}
    assert pipe(**given, num_images_per_prompt=each)[0].shape[0] == prompts * each


def test_a_tuple_holds_the_same(pipe, kind, usual):
    (got,) = pipe(**inputs(kind), return_dict=False)
    assert np.array_equal(got, usual)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(pipe, kind, output_type, usual):
    got = pipe(**inputs(kind, output_type=output_type)).images
    if output_type == "latent":
        assert got.shape == (1, 16, SIZE // 8, SIZE // 8)
    elif output_type == "pil":
        assert np.array_equal(np.asarray(got[0]), (usual[0] * 255).round().astype(np.uint8))
    else:
        assert np.array_equal(np.asarray(got).reshape(-1)[:3] >= 0, [True] * 3)
        assert np.prod(got.shape) == usual.size


def test_move_and_cast(kind, folder, usual):
    pipe = kind.from_pretrained(folder).to("cpu")
    assert np.array_equal(pipe(**inputs(kind)).images, usual)
    pipe.to(torch.bfloat16)
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    got = pipe(**inputs(kind)).images
    assert np.isfinite(got).all()
    assert 0 < np.abs(got - usual).max() < 0.5


def test_a_dtype_for_each_component(kind, folder):
    pipe = kind.from_pretrained(folder, torch_dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32


def test_attention_slicing_changes_nothing(pipe, kind, usual):
    for size in (1, 2):
        pipe.enable_attention_slicing(slice_size=size)
        assert np.array_equal(pipe(**inputs(kind)).images, usual)


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_changes_nothing(pipe, kind, usual, way):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    getattr(pipe, way)()
    for _ in range(2):
        assert np.array_equal(pipe(**inputs(kind)).images, usual)


def test_tiles_change_little(kind, folder):
    pipe = kind.from_pretrained(folder)
    whole = pipe(**inputs(kind, size=64)).images
    pipe.vae.enable_tiling(tile=4)
    tiled = pipe(**inputs(kind, size=64)).images
    assert 0 < np.abs(whole - tiled).max() < 1e-2


def test_guidance_counts(pipe, kind, usual):
    assert np.abs(pipe(**inputs(kind, guidance_scale=0.0)).images - usual).max() > 1e-3
    assert np.abs(pipe(**inputs(kind, negative_prompt="x")).images - usual).max() > 1e-4


def test_a_callback_gets_what_it_asks_for(pipe, kind):
    names = pipe._callback_tensor_inputs
    for asked in (["latents"], [name for name in names if name in ("latents", "prompt_embeds")]):
        seen = []
        pipe(**inputs(kind), callback_on_step_end_tensor_inputs=asked,
             callback_on_step_end=lambda _, i, t, x, seen=seen: seen.append(set(x)))  # fmt: skip
        assert seen == [set(asked)] * 2
    with pytest.raises(BadArgument, match="callback_on_step_end_tensor_inputs"):
        pipe(**inputs(kind), callback_on_step_end_tensor_inputs=["nothing"])


def test_a_callback_changes_the_latents(pipe, kind):
    def zeros(pipe, i, t, tensors):
        if i == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    got = pipe(**inputs(kind, output_type="latent"), callback_on_step_end=zeros).images
    assert got.abs().sum() == 0


def test_a_callback_changes_the_guidance(pipe, kind, usual):
    def more(pipe, i, t, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    got = pipe(**inputs(kind), callback_on_step_end=more)
    assert pipe.guidance_scale == 5.0
    assert not np.array_equal(got.images, usual)


def test_a_prompt_encoded_apart_is_the_same(pipe, kind, usual):
    given = inputs(kind)
    positive, negative = pipe.encode_prompt(
        given.pop("prompt"), negative_prompt=given.pop("negative_prompt"), max_sequence_length=16
    )
    got = pipe(**given, prompt_embeds=positive, negative_prompt_embeds=negative).images
    assert np.array_equal(got, usual)


def test_strengths_differ(pipe, kind):
    low, high = (pipe(**inputs(kind, strength=strength)).images for strength in (0.2, 0.8))
    assert not np.allclose(low, high, atol=1e-3)


@pytest.mark.parametrize("strength", [-0.1, 1.5, 0.0])
def test_a_bad_strength_is_a_value_error(pipe, kind, strength):
    with pytest.raises(ValueError, match="strength"):
        pipe(**inputs(kind, strength=strength))


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_what_is_missing_is_named(pipe, kind, name):
    given = inputs(kind)
    if name in given:
        with pytest.raises(BadArgument, match=name):
            pipe(**{**given, name: None})


def test_the_mask_says_where(pipe, kind):
    if kind is ZImageInpaintPipeline:
        one, none = (pipe(**inputs(kind, mask_image=make((1, 1, SIZE, SIZE)))).images
                     for make in (torch.ones, torch.zeros))  # fmt: skip
        assert not np.allclose(one, none, atol=1e-3)
        assert np.array_equal(none[0], inputs(kind)["image"][0].permute(1, 2, 0).numpy())


def test_a_seed_is_ours_alone(pipe, kind):
    given = inputs(kind)
    del given["generator"]
    assert np.array_equal(pipe(**given, seed=3).images, pipe(**given, seed=3).images)
    with pytest.raises(TypeError, match="sead"):
        pipe(**given, sead=3)

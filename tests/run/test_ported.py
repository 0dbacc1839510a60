"""Code written for diffusers: what its tests of ZImagePipeline check for text to image, and its names."""

from __future__ import annotations

import copy
import pickle
import types

import diffusers
import pytest
import tokenizers
import torch
import transformers

import zimage_core
from tests.helpers import tiny
from zimage_core import BadArgument, FlowMatchEulerScheduler, Unsupported, ZImagePipeline
from zimage_core.models.ported import REFUSED
from zimage_core.run.adapted import Adapted

THEIR_TOKENIZER = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE())
)
RUN = {"num_inference_steps": 2, "seed": 0, "output_type": "pt"}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("ported") / "m")


def test_components_are_diffusers_and_the_size_survives(pipe):
    assert set(pipe.components) == {"scheduler", "vae", "text_encoder", "tokenizer", "transformer"}
    for again in (ZImagePipeline(**pipe.components), ZImagePipeline.from_pipe(pipe)):
        assert again.sample_size == pipe.sample_size == tiny.SIZE
        assert torch.equal(again("a", **RUN).images, pipe("a", **RUN).images)
    other = ZImagePipeline.from_pipe(pipe, scheduler=FlowMatchEulerScheduler(6.0))
    assert other.limits.steps == 50
    with pytest.raises(BadArgument, match="from_pipe: got int"):
        ZImagePipeline.from_pipe(3)


def test_what_costs_memory_only_changes_no_bit(pipe):
    plain = pipe("a", **RUN).images
    pipe.enable_attention_slicing(slice_size=1)
    pipe.enable_attention_slicing("max")
    pipe.disable_attention_slicing()
    pipe.enable_vae_slicing()
    pipe.vae.enable_slicing()
    pipe.enable_xformers_memory_efficient_attention()
    pipe.set_progress_bar_config(disable=True)
    pipe.maybe_free_model_hooks()
    assert torch.equal(pipe("a", **RUN).images, plain)


def test_tiles_are_set_by_pipeline_or_vae(pipe):
    plain = pipe("a", **RUN, height=64, width=64).images
    for on, off in (
        (lambda: pipe.enable_vae_tiling(tile=4), pipe.disable_vae_tiling),
        (lambda: pipe.vae.enable_tiling(tile=4), pipe.vae.disable_tiling),
    ):
        on()
        assert pipe.vae.tile == 4
        assert float((pipe("a", **RUN, height=64, width=64).images - plain).abs().max()) < 1e-5
        off()
        assert torch.equal(pipe("a", **RUN, height=64, width=64).images, plain)
    pipe.vae.enable_tiling(False)
    assert pipe.vae.tile is None


def test_a_component_that_is_none_is_missed_only_where_it_is_needed(pipe):
    given = {**pipe.components, "text_encoder": None, "tokenizer": None}
    part = ZImagePipeline(**given)
    embeds = pipe.encode_prompt("a", do_classifier_free_guidance=False)[0]
    assert torch.equal(part(prompt_embeds=embeds, **RUN).images, pipe("a", **RUN).images)
    with pytest.raises(Unsupported, match=r"no text encoder.*prompt_embeds"):
        part("a", **RUN)
    part = ZImagePipeline(**{**pipe.components, "vae": None})
    latents = part("a", **{**RUN, "output_type": "latent"}).images
    assert torch.equal(latents, pipe("a", **{**RUN, "output_type": "latent"}).images)
    with pytest.raises(Unsupported, match=r"no VAE.*output_type='latent'"):
        part("a", **RUN)
    alone = ZImagePipeline(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    assert torch.equal(alone.encode_prompt("a")[0][0], embeds[0])
    for call in (lambda: alone("a"), lambda: alone.capture(), lambda: alone.limit_memory(ram="4GiB"),
                 lambda: alone.dequantize_weights(), lambda: alone.plan()):  # fmt: skip
        with pytest.raises(Unsupported, match="no transformer"):
            call()
    alone.to("cpu", torch.bfloat16)
    assert alone.text_encoder.dtype == torch.bfloat16
    alone.to(torch.float32)


def test_from_pretrained_takes_objects_and_none(folder, pipe):
    mine = tiny.transformer(seed=9)
    loaded = ZImagePipeline.from_pretrained(folder, transformer=mine, text_encoder=None, vae=None)
    assert loaded.transformer is mine
    assert loaded.vae is loaded.text_encoder is loaded.tokenizer is None
    encoder = tiny.text_encoder()
    assert ZImagePipeline.from_pretrained(folder, text_encoder=encoder).encode_prompt("a")[0][0].any()
    with pytest.raises(BadArgument, match="vae: got 3, wanted the path"):
        ZImagePipeline.from_pretrained(folder, vae=3)
    with pytest.raises(
        BadArgument, match="transformer: got Autoencoder, wanted a zimage_core ZImageTransformer"
    ):
        ZImagePipeline.from_pretrained(folder, transformer=pipe.vae)
    single = ZImagePipeline.from_single_file(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        text_encoder=tiny.text_encoder(), vae=tiny.vae(), tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    assert torch.equal(single.transformer.x_pad_token, tiny.transformer().x_pad_token)
    with pytest.raises(Unsupported, match="config="):
        ZImagePipeline.from_single_file("x", config="y")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("scheduler", 3, "got 3, wanted a zimage_core FlowMatchEulerScheduler"),
        ("scheduler", diffusers.FlowMatchEulerDiscreteScheduler(), "of diffusers.*FlowMatchEulerScheduler"),
        ("vae", torch.nn.Linear(1, 1), "got Linear.*load_vae"),
        ("transformer", "x.gguf", "got 'x.gguf'.*load_transformer"),
        ("tokenizer", THEIR_TOKENIZER, "of transformers.*load_tokenizer"),
        ("text_encoder", tiny.vae(), "got Autoencoder.*load_text_encoder"),
    ],
)
def test_a_component_of_another_kind_is_one_sentence(pipe, name, value, words):
    with pytest.raises(BadArgument, match=f"{name}: {words}" if words[0] == "g" else words):
        ZImagePipeline(**{**pipe.components, name: value})
    changed = ZImagePipeline(**pipe.components)
    if name == "scheduler":
        changed.scheduler = value
        with pytest.raises(BadArgument, match=words):
            changed("a", **RUN)
    with pytest.raises(BadArgument):
        changed.register_modules(**{name: value})


def test_dtypes_by_component(folder):
    pipe = ZImagePipeline.from_pretrained(
        folder, torch_dtype={"transformer": torch.bfloat16, "default": "float32"}
    )
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32)
    assert bool(torch.isfinite(pipe("a", height=32, width=32, **RUN).images).all())
    for wrong, error in (({"unet": "float32"}, BadArgument), ({"vae": "float16"}, Unsupported),
                         ({"default": "int8"}, BadArgument)):  # fmt: skip
        with pytest.raises(error, match="dtype"):
            ZImagePipeline.from_pretrained(folder, dtype=wrong)
    with pytest.raises(Unsupported, match=r'device_map.*device="cuda"'):
        ZImagePipeline.from_pretrained(folder, device_map="auto")


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_not_here_says_what_to_do(pipe, name):
    loras = name in vars(Adapted)  # the pipeline's; a network has none of them
    for owner in (pipe.transformer,) if loras else (pipe, pipe.transformer):
        assert not hasattr(owner, name)
        with pytest.raises(Unsupported, match=f"^{name}: ") as caught:
            getattr(owner, name)
        assert isinstance(caught.value, AttributeError)
        assert str(caught.value).endswith(REFUSED[name])


def test_any_other_name_is_an_attribute_error(pipe):
    for owner in (pipe, pipe.transformer, pipe.vae):
        with pytest.raises(AttributeError, match="unet"):
            _ = owner.unet


def test_callbacks_may_ask_for_every_tensor_of_diffusers_list(pipe):
    seen = []

    def end(pipe, step, timestep, tensors):
        seen.append(set(tensors))
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = pipe._callback_tensor_inputs
    out = pipe("a", **{**RUN, "output_type": "latent"}, callback_on_step_end=end,
               callback_on_step_end_tensor_inputs=list(names))  # fmt: skip
    assert seen == [set(names)] * 2
    assert not out.images.any()


def test_batches_tuples_and_prompts(pipe):
    one = pipe("a", **RUN).images
    assert torch.equal(pipe(["b", "a"], **{**RUN, "seed": 2**64 - 1}).images[1:], one)
    many = pipe("a", **RUN, num_images_per_prompt=2)
    assert torch.equal(many.images[:1], one)
    assert torch.equal(pipe("a", **RUN, return_dict=False)[0], one)
    assert torch.equal(many[0], many["images"])


@pytest.mark.parametrize("shift", [6, 2.5])
def test_the_shift_of_a_call_is_used_and_written(pipe, shift):
    result = pipe("a", **RUN, shift=shift)
    assert result.sigmas == FlowMatchEulerScheduler(shift).levels(2)
    assert result.settings[0]["shift"] == shift
    assert pipe("a", **RUN).settings[0]["shift"] == 3.0
    assert pipe("a", output_type="latent", shift=shift).settings[0]["steps"] == 8, "the scheduler was given"


def test_where_no_schedule_is_stated_a_shift_of_6_means_the_base_model(pipe):
    loose = ZImagePipeline(**{**pipe.components, "scheduler": None})
    assert (loose.scheduler.shift, loose.limits.steps) == (3.0, 8)
    settings = loose("a", shift=6, seed=0, output_type="latent").settings[0]
    assert (settings["steps"], settings["guidance_scale"]) == (50, 4.0)
    for wrong in ("x", True, 0, -1, float("nan"), float("inf")):
        with pytest.raises(BadArgument, match="shift: got"):
            loose("a", shift=wrong)


def test_the_vae_answers_as_diffusers_does(pipe):
    vae, image = pipe.vae, torch.rand(1, 3, 16, 16) * 2 - 1
    posterior = vae.encode(image).latent_dist
    assert torch.equal(posterior.mode(), vae.encode(image))
    assert torch.equal(vae.encode(image, return_dict=False)[0].mean, posterior.mean)
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(drawn, vae.encode(image, torch.Generator().manual_seed(1)))
    assert torch.equal(posterior.var, posterior.std**2) or torch.allclose(posterior.var, posterior.std**2)
    z = posterior.mode()
    assert torch.equal(vae.decode(z).sample, vae.decode(z))
    assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z))
    with pytest.raises(BadArgument, match="return_dict by its name"):
        vae.decode(z, False)
    assert (vae.device.type, vae.dtype) == ("cpu", torch.float32)
    assert vae.config.scaling_factor == pytest.approx(0.3611)


def test_the_transformer_answers_as_diffusers_does(pipe):
    net = pipe.transformer
    call = ([torch.randn(16, 1, 4, 4)] * 2, torch.tensor([0.1, 0.9]), [torch.randn(3, 24)] * 2)
    out = net(*call, joint_attention_kwargs=None, patch_size=2, f_patch_size=1)
    assert all(torch.equal(a, b) for a, b in zip(out.sample, net(*call, return_dict=False)[0], strict=True))
    assert [tuple(each.shape) for each in out] == [(16, 1, 4, 4)] * 2
    with pytest.raises(Unsupported, match="patch_size"):
        net(*call, patch_size=4)
    dense = sum(p.numel() for p in net.parameters())
    assert net.num_parameters() == dense
    assert net.num_parameters(only_trainable=True) == 0


def test_packed_weights_are_counted():
    net = ZImagePipeline.from_default().transformer
    assert sum(p.numel() for p in net.parameters()) < 100_000
    assert net.num_parameters() > 5_000_000


def test_public_names_of_scheduler_and_tokenizer(folder):
    tokenizer = zimage_core.load_tokenizer(folder / "tokenizer")
    assert isinstance(tokenizer, zimage_core.Tokenizer)
    assert tokenizer.fingerprint == tiny.tokenizer().fingerprint
    assert zimage_core.FlowMatchEulerDiscreteScheduler is FlowMatchEulerScheduler
    with pytest.raises(BadArgument, match="path"):
        zimage_core.load_tokenizer(3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_pipeline_is_copied_but_not_its_budget(pipe, copied):
    assert torch.equal(copied(pipe)("a", **RUN).images, pipe("a", **RUN).images)
    limited = ZImagePipeline.from_default(ram="2GiB")
    with pytest.raises(Unsupported, match=r"call limit_memory\(\) without arguments"):
        copied(limited)


def test_other_kinds_of_images_are_pillows(pipe, tmp_path):
    result = pipe("a", num_inference_steps=1, seed=0)
    with pytest.raises(BadArgument, match=r"not as \.JPG"):
        result.save(tmp_path / "a.JPG")
    result.images[0].save(tmp_path / "a.jpg")
    for _ in range(2):
        result.save(tmp_path / "a.v2", force=True)
    assert (tmp_path / "a.v2").read_bytes().startswith(b"\x89PNG")


def test_a_folder_given_by_name_is_checked_before_anything_is_loaded(monkeypatch, folder):
    monkeypatch.setattr("zimage_core.run.loading.open_pipeline", types.SimpleNamespace)
    with pytest.raises(BadArgument, match="scheduler"):
        ZImagePipeline.from_pretrained(folder, scheduler="euler")


def test_repeated_blocks_are_compiled_alone():
    pipe = tiny.pipeline()
    plain = pipe("a", **RUN).images
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True, dynamic=True)
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
    assert torch.equal(pipe("a", **RUN).images, plain)
    with pytest.raises(Unsupported, match="no stack of equal blocks"):
        pipe.vae.compile_repeated_blocks()

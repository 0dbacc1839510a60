"""Runs with reference images: a batch is its members, each argument has its effect, settings say all."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import omni, tiny
from tests.helpers.omni import draw, picture
from zimage_core import ZImageImg2ImgPipeline, ZImageOmniPipeline
from zimage_core.nn.layers import has_hooks

A, B, C = picture(48, 32, 0), picture(32, 48, 1), picture(64, 32, 2)


@pytest.fixture
def pipe():
    return omni.pipeline()


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_batch_with_different_numbers_of_references_is_its_members_to_the_bit(pipe, guidance):
    shown, prompts = [[A, B], [], [C]], ["a", "a longer prompt of more than thirty-two tokens", "c"]
    call = {"height": 32, "width": 64, "guidance_scale": guidance, "num_images_per_prompt": 2}
    batch = draw(pipe, prompts, reference_images=shown, **call)
    call["num_images_per_prompt"] = 1
    for i, member in enumerate(batch):
        alone = draw(pipe, prompts[i // 2], reference_images=shown[i // 2], **call | {"seed": 4 + i})
        assert torch.equal(member, alone[0])


@pytest.mark.parametrize("shown", [[], [A], [A, B]], ids=len)
def test_a_prompt_can_be_encoded_before_its_run(pipe, shown):
    other, call = ZImageOmniPipeline.from_pipe(pipe), {"guidance_scale": 2.0, "image": shown or None}
    texts = other.encode_prompt("a", negative_prompt="b", num_condition_images=len(shown))
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), texts, strict=True))
    assert torch.equal(draw(other, None, **given, **call), draw(other, "a", negative_prompt="b", **call))


def test_the_default_of_the_omni_class_sees_references():
    assert ZImageOmniPipeline.from_default().siglip is not None


def test_prompts_share_the_references_of_one_list(pipe):
    both = draw(pipe, ["a", "b"], reference_images=[A, B])
    assert both.shape == (2, 16, 6, 4), "the size is that of the last reference"
    assert torch.equal(both[1:], draw(pipe, "b", reference_images=[A, B], seed=5))


def test_image_means_a_reference_where_a_tower_is_and_editing_where_it_is_asked_for(pipe):
    wanted = draw(pipe, reference_images=[A, B])
    assert torch.equal(draw(pipe, image=[A, B]), wanted)
    call = {"prompt": "a red circle", "seed": 4, "num_inference_steps": 2, "guidance_scale": 0.0}
    other = ZImageOmniPipeline.from_pipe(pipe)
    assert torch.equal(other([A, B], **call, output_type="latent").images, wanted)
    edited = ZImageImg2ImgPipeline.from_pipe(pipe)(image=A, **call)
    assert edited.settings[0]["strength"] == 0.6
    assert "reference_images" not in edited.settings[0]
    assert "reference_images" not in pipe(image=A, strength=0.5, **call).settings[0]
    plain = omni.pipeline(siglip=None)
    assert "strength" in plain(image=A, **call).settings[0], "without a tower image is an image to begin from"


def test_without_references_two_streams_differ_and_the_basic_one_is_that_of_the_trunk(pipe):
    basic, stream = draw(pipe), draw(pipe, reference_images=[])
    without = ZImageOmniPipeline.from_pipe(omni.pipeline(siglip=None))
    assert torch.equal(stream, draw(without))
    assert not torch.equal(basic, stream)
    trunk = tiny.pipeline()
    trunk.transformer.load_state_dict(
        {k: v for k, v in pipe.transformer.state_dict().items() if not k.startswith("siglip_")}
    )
    assert torch.equal(basic, draw(trunk))


@pytest.mark.filterwarnings("ignore:image is")
@pytest.mark.parametrize(
    "change",
    [
        {"reference_images": [B, A]}, {"reference_images": [A]}, {"positions": "diffusers"},
        {"enable_thinking": False}, {"max_sequence_length": 10}, {"guidance_scale": 2.0},
        {"image": C, "strength": 0.5}, {"prompt": "another"}, {"height": 64, "width": 32},
    ],
    ids=lambda change: " ".join(change),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the prompt has")
def test_every_argument_changes_the_image(pipe, change):
    call = {"reference_images": [A, B], "height": 32, "width": 32}
    base = draw(pipe, **call)
    changed = draw(pipe, **{**call, **change})
    assert changed.shape != base.shape or float((changed - base).abs().max()) > 1e-4


def test_the_same_image_in_any_kind_is_the_same_reference(pipe, tmp_path):
    A.save(tmp_path / "a.png")
    array = np.asarray(A)
    kinds = [
        A,
        tmp_path / "a.png",
        array,
        array.astype(np.float32) / 255,
        torch.tensor(array).permute(2, 0, 1),
    ]
    first, *others = [draw(pipe, reference_images=kind) for kind in kinds]
    assert all(torch.equal(first, other) for other in others)


def test_settings_tell_the_references_and_no_path(pipe, tmp_path):
    path = tmp_path / "cat.png"
    A.save(path)
    result = pipe("a", reference_images=[path, C], seed=1, num_inference_steps=1, guidance_scale=0.0)
    result.save(tmp_path / "out.png")
    found = json.loads(Image.open(tmp_path / "out.png").text["zimage"])
    shown = found["reference_images"]
    assert [(each["width"], each["height"]) for each in shown] == [(48, 32), (64, 32)]
    assert shown[0]["name"] == "cat.png"
    assert "name" not in shown[1]
    assert shown[0]["sha256"] != shown[1]["sha256"]
    assert found["positions"] == "trained"
    assert str(tmp_path) not in json.dumps(found)


def test_callbacks_see_pieces_and_may_replace_them(pipe):
    seen, call = [], {"reference_images": [A, B], "guidance_scale": 2.0}

    def note(pipe, step, time, tensors):
        seen.append(tensors)
        return {"prompt_embeds": [[piece * 2 for piece in each] for each in tensors["prompt_embeds"]]}

    names = ("latents", "prompt_embeds", "negative_prompt_embeds", "denoised")
    changed = draw(pipe, **call, callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    assert not torch.equal(changed, draw(pipe, **call))
    assert [len(each) for each in seen[0]["prompt_embeds"]] == [4], "before, between, with the prompt, after"
    assert torch.equal(seen[1]["prompt_embeds"][0][1], 2 * seen[0]["prompt_embeds"][0][1])
    assert seen[0]["denoised"].shape == changed.shape


def test_embeds_in_pieces_give_what_their_texts_give(pipe):
    kept = []

    def keep(pipe, step, time, tensors):
        kept.append(tensors)

    names = ("prompt_embeds", "negative_prompt_embeds")
    call = {"reference_images": [A], "guidance_scale": 2.0}
    wanted = draw(pipe, **call, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names)
    assert torch.equal(draw(pipe, None, **call, **{name: kept[0][name] for name in names}), wanted)


def test_hooks_on_the_transformer_see_its_own_call(pipe):
    wanted, calls = draw(pipe, reference_images=[A, B]), []
    hook = pipe.transformer.register_forward_hook(lambda m, given, out: calls.append(given))
    assert has_hooks(pipe.transformer)
    assert torch.allclose(draw(pipe, reference_images=[A, B]), wanted, atol=1e-5)
    assert len(calls) == 2
    hook.remove()


def test_a_compiled_transformer_sees_references_too(pipe):
    wanted = draw(pipe, reference_images=[A])
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.equal(draw(pipe, reference_images=[A]), wanted)


def test_an_interrupt_decodes_what_there_is(pipe):
    def stop(pipe, step, time, tensors):
        pipe._interrupt = True

    result = pipe("a", reference_images=[A], seed=1, callback_on_step_end=stop, guidance_scale=0.0)
    assert result.interrupted
    assert len(result.timings.steps) == 1
    assert result.images[0].size == A.size


def test_a_folder_opens_as_it_was_saved(tmp_path, pipe):
    folder = omni.folder(tmp_path / "omni")
    loaded = ZImageOmniPipeline.from_pretrained(folder)
    assert loaded.siglip.config == pipe.siglip.config
    assert set(loaded.components) == {*tiny.pipeline().components, "siglip"}
    parts = {name: folder / name for name in ("transformer", "text_encoder", "vae", "siglip", "tokenizer")}
    files = ZImageOmniPipeline.from_files(**parts)
    assert torch.equal(draw(loaded, image=[A, B]), draw(files, image=[A, B]))
    assert torch.equal(draw(deepcopy(loaded), image=[A, B]), draw(files, image=[A, B]))
    result = loaded(A, "a", seed=1, num_inference_steps=1, guidance_scale=0.0)
    assert set(result.files) == {"transformer", "text_encoder", "vae", "siglip"}
    without = loaded(prompt="a", height=32, width=32, num_inference_steps=1, guidance_scale=0.0)
    assert "siglip" not in without.files
    assert ZImageOmniPipeline.from_pretrained(folder, siglip=None).siglip is None


def test_a_saved_pipeline_opens_again_and_its_processor_in_transformers(tmp_path):
    pipe = ZImageOmniPipeline.from_pretrained(omni.folder(tmp_path / "omni"))
    pipe.save_pretrained(tmp_path / "saved")
    again = ZImageOmniPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(draw(again, image=[A, B]), draw(pipe, image=[A, B]))
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "ZImageOmniPipeline"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved" / "siglip_processor")
    found = theirs(images=[picture(101, 75)], return_tensors="pt")
    patches, grid = again.siglip.processor.patches(np.asarray(picture(101, 75)))
    assert grid == tuple(found.spatial_shapes[0].tolist())
    assert torch.equal(found.pixel_values[0][: len(patches)], patches)

"""What cannot be run is one sentence that names the argument, before a weight is used."""

from __future__ import annotations

import re

import pytest
import torch

from tests.helpers import omni, tiny
from tests.helpers.omni import picture
from zimage_core import ZImageOmniPipeline, ZImagePipeline
from zimage_core.cli.main import main
from zimage_core.errors import BadArgument, BadFile, BadShape, Unsupported, WrongModel, ZImageError

A = picture()


@pytest.fixture(scope="module")
def pipe():
    pipe = omni.pipeline()

    def fail(*_):
        pytest.fail("a network ran")

    for part in (pipe.transformer, pipe.text_encoder, pipe.vae, pipe.siglip):
        part.register_forward_pre_hook(fail)
    return pipe


E = torch.ones(3, 24)
BAD = {
    "too small": ({"reference_images": picture(15, 40)}, BadArgument, "15 x 40 .* too small.*16 pixels"),
    "extreme": ({"reference_images": picture(1, 4000)}, BadArgument, "1 x 4000 pixels is too small"),
    "small after resize": ({"reference_images": picture(20, 60000)}, BadArgument, "made smaller"),
    "too long": ({"reference_images": picture(16, 4112)}, BadArgument, "16 x 4112 pixels is too long.*4096"),
    "prompt": ({"reference_images": [A] * 60, "prompt": "x" * 1400, "max_sequence_length": 1504},
               BadArgument, "61 images, two positions each, reach position .*give fewer reference images"),
    "no image": ({"reference_images": [A, 5]}, BadArgument, r"reference_images\[1\]: got a int"),
    "no file": ({"reference_images": "nothing.png"}, BadFile, "nothing.png"),
    "None": ({"reference_images": [None]}, BadArgument, r"reference_images\[0\]: got a NoneType"),
    "channels": ({"reference_images": torch.ones(2, 8, 8)}, BadShape, "reference_images"),
    "too many": ({"reference_images": [A] * 257}, BadArgument, "got 257 images, wanted at most 256"),
    "lists": ({"reference_images": [[A], [A]]}, BadArgument, "2 lists and 0 images for 1 prompts"),
    "mixed": ({"reference_images": [[A], A], "prompt": ["a", "b"]}, BadArgument, "1 lists and 1 images"),
    "sizes": ({"reference_images": [[A], [picture(64, 64)]], "prompt": ["a", "b"]}, BadArgument,
              "height and width: the last references .* 48 x 32 and 64 x 64"),
    "positions": ({"reference_images": A, "positions": "new"}, BadArgument, "positions: got 'new'.*trained"),
    "positions alone": ({"positions": "trained"}, BadArgument, "positions: it needs reference_images"),
    "variety": ({"reference_images": A, "variety": 0.1}, Unsupported, "variety: it has no meaning"),
    "control": ({"reference_images": A, "control_image": A}, Unsupported, "control_image: it has no meaning"),
    "template": ({"reference_images": A, "prompt_template": "{prompt}"}, Unsupported, "prompt_template"),
    "height": ({"reference_images": A, "height": 33, "width": 32}, BadArgument, "height: got 33"),
    "flat embeds": ({"reference_images": A, "prompt": None, "prompt_embeds": [E]}, BadArgument,
                    "prompt_embeds: wanted a list of 1 to 1024 lists of tensors"),
    "pieces": ({"reference_images": A, "prompt": None, "prompt_embeds": [[E, E]]}, BadArgument,
               "got 2 tensors for a prompt with 1 reference images, wanted 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reference_is_a_sentence_that_names_the_argument(pipe, name):
    call, kind, words = BAD[name]
    with pytest.raises(kind, match=words) as caught:
        pipe(**{"prompt": "a", "guidance_scale": 0.0, **call})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_empty_list_of_images_is_refused(pipe):
    with pytest.raises(BadArgument, match="image: got an empty list"):
        ZImageOmniPipeline.from_pipe(pipe)([], "a")
    with pytest.raises(BadArgument, match="image: got 0 images"):
        pipe("a", image=[])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"reference_images": A}, "reference_images: here it is called image"),
        ({"strength": 0.5}, "strength: here image is a reference; use ZImagePipeline"),
    ],
)
def test_the_class_of_diffusers_refuses_other_meanings_of_image(pipe, more, words):
    other = ZImageOmniPipeline.from_pipe(pipe)
    with pytest.raises(BadArgument, match=words):
        other(A, "a", **more)
    with pytest.raises(TypeError, match=r"ZImageOmniPipeline\(\) got an unexpected .*'steps'"):
        other(A, "a", steps=3)


def test_hires_makes_its_own_image(pipe):
    with pytest.raises(BadArgument, match="leave reference_images out"):
        pipe.hires("a", reference_images=A)


def test_a_text_only_checkpoint_says_what_it_lacks():
    with pytest.raises(
        Unsupported, match=r"siglip_embedder, siglip_refiner and siglip_pad_token; get an Omni"
    ):
        tiny.pipeline()("a", reference_images=[A])
    with pytest.raises(BadArgument, match=r"image: got 2 .*Omni checkpoint are reference_images="):
        tiny.pipeline()("a", image=[A, A])
    with pytest.raises(Unsupported, match="takes text alone"):
        ZImageOmniPipeline.from_pipe(tiny.pipeline())(A, "a")


def test_without_the_tower_an_omni_call_names_the_argument_and_text_to_image_runs():
    pipe = omni.pipeline(siglip=None)
    with pytest.raises(Unsupported, match=r"no vision tower to see them; give siglip="):
        pipe("a", reference_images=[A])
    assert omni.draw(pipe).shape == (1, 16, 4, 4)


def test_a_run_without_a_vae_says_so():
    with pytest.raises(Unsupported, match="no VAE to encode them; give vae="):
        omni.pipeline(vae=None)("a", reference_images=[A], output_type="latent")


def test_a_tower_of_another_width_is_refused_when_the_pipeline_is_built():
    with pytest.raises(WrongModel, match="width 32; the Z-Image transformer needs 24"):
        omni.pipeline(siglip=omni.tower(32))
    with pytest.raises(WrongModel, match=r"the transformer takes text alone; leave siglip= out"):
        ZImagePipeline(**tiny.pipeline().components, siglip=omni.tower())
    with pytest.raises(BadArgument, match=r"siglip: got .*wanted a zimage_core VisionTower; get one by"):
        ZImagePipeline(**tiny.pipeline().components, siglip=tiny.vae())


def test_a_tower_of_another_width_that_replaces_the_first_is_refused_in_a_call(pipe):
    other = omni.pipeline()
    other.transformer, other.siglip = pipe.transformer, omni.tower(32)
    with pytest.raises(WrongModel, match="width 32; the Z-Image transformer needs 24"):
        other("a", reference_images=[A])


def test_a_tokenizer_without_the_tokens_of_images_is_refused():
    pipe = omni.pipeline()
    pipe.tokenizer = tiny.tokenizer(without=("<|vision_end|>",))
    with pytest.raises(Unsupported, match=r"no token <\|vision_end\|>"):
        pipe("a", reference_images=A)


def test_a_callback_that_gives_other_pieces_is_refused():
    def cut(pipe, step, time, tensors):
        return {"prompt_embeds": [each[:1] for each in tensors["prompt_embeds"]]}

    with pytest.raises(BadArgument, match="prompt_embeds: the callback returned 1, wanted 3"):
        omni.draw(omni.pipeline(), reference_images=A, callback_on_step_end=cut,
                  callback_on_step_end_tensor_inputs=("prompt_embeds",))  # fmt: skip


COMMANDS = {
    ("--model", "default", "--reference", "x.png"): "--reference: leave --model out",
    ("--siglip", "x"): "--siglip goes with --model",
    ("--positions", "trained"): "--positions: it needs reference images",
    ("--model", "DIR", "--reference", "x.png"): "x.png",
    ("--model", "DIR", "--reference", "A", "--variety", "0.1"): "--variety has no meaning",
    ("--model", "DIR", "--reference", "A", "--hires", "2"): "--hires makes its own image",
}


@pytest.mark.parametrize("options", COMMANDS, ids=" ".join)
def test_the_command_line_refuses_before_it_loads(options, tmp_path, capsys):
    A.save(tmp_path / "a.png")
    places = {"DIR": str(tmp_path), "A": str(tmp_path / "a.png")}
    code = main(["generate", "a", "-o", str(tmp_path / "o.png"), *(places.get(o, o) for o in options)])
    assert code
    assert COMMANDS[options] in capsys.readouterr().err


def test_the_command_line_shows_references(tmp_path, capsys):
    folder = omni.folder(tmp_path / "omni")
    A.save(tmp_path / "a.png")
    shown = str(tmp_path / "a.png")
    out = str(tmp_path / "o.png")
    call = [
        "generate",
        "a",
        "--model",
        str(folder),
        "--steps",
        "1",
        "--guidance",
        "0",
        "--seed",
        "3",
        "--quiet",
    ]
    assert main([*call, "--reference", shown, "--reference", shown, "-o", out, "--json"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall('"name": "a.png"', printed)) == 2
    assert main([*call, "--image", shown, "-o", out, "--force", "--json"]) == 0
    assert '"strength": 0.6' in capsys.readouterr().out, "--image is an image to begin from, with a tower too"


def test_errors_are_of_this_library():
    assert all(issubclass(kind, ZImageError) for _, kind, _ in BAD.values())

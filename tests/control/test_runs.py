"""Runs of a pipeline with control: when it acts, what it leaves alone, bad input, what images say of it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import controls, tiny
from zimage_core import ZImageControlNetInpaintPipeline, ZImageControlNetPipeline, ZImagePipeline
from zimage_core.control.inputs import ControlImage, steps_between
from zimage_core.errors import BadArgument, BadFile, BadWeights, NonFinite, Unsupported, WrongModel

pytestmark = pytest.mark.filterwarnings("ignore:guidance_scale:UserWarning", "ignore:the ControlNet")
STEPS = 4


def picture(seed=1, size=(48, 32)):
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def net(variant="1.0", seed=7):
    return controls.controlnet(variant, controls.TINY, seed)


def pipeline(variant="1.0", dtype=torch.float32):
    pipe = tiny.pipeline(dtype=dtype)
    pipe.load_controlnet(net(variant), "edges")
    return pipe


def run(pipe, **call):
    usual = {"prompt": "a", "height": 32, "width": 48, "num_inference_steps": STEPS, "seed": 0}
    return pipe(**{**usual, "output_type": "latent", **call})


def test_a_run_without_control_image_is_what_it_was():
    plain = run(tiny.pipeline()).images
    pipe = pipeline()
    with pytest.warns(UserWarning, match="the ControlNet edges has no effect without control_image"):
        assert torch.equal(run(pipe).images, plain)
    controlled = run(pipe, control_image=picture()).images
    assert not torch.equal(controlled, plain)
    assert torch.equal(run(pipe, control_image=picture(), controlnet_conditioning_scale=0).images, plain)
    pipe.unload_controlnet("edges")
    assert torch.equal(run(pipe).images, plain)


def test_outside_its_steps_the_net_is_not_run():
    pipe, calls = pipeline(), []
    for block in pipe.controlnets["edges"].control_layers:
        block.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    pipe(
        "a", height=32, width=48, num_inference_steps=STEPS, seed=0, output_type="latent",
        control_image=picture(), control_guidance_start=0.25, control_guidance_end=0.75, guidance_scale=2.0,
        callback_on_step_end=lambda p, i, t, k: seen.append(len(calls)) or k,
    )  # fmt: skip
    layers = len(pipe.controlnets["edges"].control_layers)
    assert seen == [0, 2 * layers, 4 * layers, 4 * layers], "both sides of guidance, in two of four steps"


@pytest.mark.parametrize(
    ("start", "end", "steps", "acting"),
    [(0, 1, 8, (0, 8)), (0, 0.5, 8, (0, 4)), (0.5, 1, 9, (5, 9)), (0.3, 0.7, 4, (2, 2)), (0, 0.5, 1, (0, 0))],
)
def test_steps_are_chosen_as_in_diffusers(start, end, steps, acting):
    kept = [i for i in range(steps) if not (i / steps < start or (i + 1) / steps > end)]
    first, stop = steps_between(start, end, steps)
    assert list(range(first, stop)) == kept == list(range(*acting))


def test_several_images_add_up_and_two_nets_follow_one_each():
    pipe = pipeline()
    once = run(pipe, control_image=picture(), controlnet_conditioning_scale=0.8).images
    twice = run(pipe, control_image=[picture(), picture()], controlnet_conditioning_scale=[0.4, 0.4]).images
    assert torch.allclose(once, twice, atol=1e-4), "1.0 is linear in the scale"
    pipe.load_controlnet(net("2.1", seed=9), "depth")
    both = run(pipe, control_image=[picture(1), picture(2)], controlnet_conditioning_scale=[0.5, 0.7])
    named = {"depth": picture(2), "edges": picture(1)}
    other = run(pipe, control_image=named, controlnet_conditioning_scale=[0.7, 0.5])
    assert torch.allclose(both.images, other.images, atol=1e-4)
    assert [each["controlnet"] for each in both.settings[0]["controls"]] == ["edges", "depth"]
    assert list(pipe.controlnets) == ["edges", "depth"]


def test_members_of_a_batch_have_control_images_of_their_own():
    pipe = pipeline("2.1")
    tensor = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    batch = run(pipe, prompt=["a", "b"], control_image=tensor).images
    alone = [run(pipe, prompt=p, control_image=tensor[i], seed=i).images for i, p in enumerate("ab")]
    assert torch.equal(batch, torch.cat(alone))


def test_settings_and_files_name_the_control(tmp_path):
    pipe = tiny.pipeline()
    pipe.load_controlnet(controls.write(tmp_path / "canny.safetensors", net("2.1")), hints="diffusers")
    found = run(pipe, control_image=picture(), control_guidance_end=0.5, controlnet_conditioning_scale=0.6)
    (said,) = found.settings[0]["controls"]
    assert len(said.pop("image_sha256")) == 64
    assert said == {"controlnet": "canny", "scale": 0.6, "start": 0.0, "end": 0.5, "hints": "diffusers"}
    assert found.metadata()["files"]["controlnet canny"]["name"] == "canny.safetensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    wide = run(pipeline("2.1"), control_image=picture()).images
    narrow = run(pipeline("2.1", dtype), control_image=picture()).images
    assert float((wide - narrow).abs().mean()) < 0.25 * float(wide.std())


def test_compute_compile_and_capture_go_with_control():
    pipe = pipeline()
    exact = run(pipe, control_image=picture()).images
    pipe.set_compute("int8")
    int8 = run(pipe, control_image=picture()).images
    assert pipe.controlnets["edges"].control_layers[0].attention.to_q.arithmetic.mode == "int8"
    assert 0 < float((exact - int8).abs().mean()) < 0.25 * float(exact.std())
    pipe.set_compute("exact")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert torch.equal(run(pipe, control_image=picture()).images, exact)


def test_hooks_of_the_network_see_its_own_call():
    pipe, seen = pipeline(), []
    exact = run(pipe, control_image=picture()).images
    pipe.transformer.register_forward_hook(lambda *_: seen.append(1))
    found = run(pipe, control_image=picture()).images
    assert torch.allclose(found, exact, atol=1e-3)  # times are embedded one by one
    assert len(seen) == STEPS


def test_inpaint_channels_hold_the_kept_mask_and_the_masked_image():
    pipe, seen = pipeline("2.1"), []
    mask = Image.new("L", (48, 32), 0)
    mask.paste(255, (0, 0, 24, 32))  # the left half is painted anew
    pipe.controlnets["edges"].control_all_x_embedder["2-1"].register_forward_hook(
        lambda _, args, out: seen.append(args[0])
    )
    run(pipe, control_image=ControlImage(None, picture(2), mask))
    (tokens,) = seen
    cells = tokens.reshape(2, 3, 2, 2, 33).permute(4, 0, 2, 1, 3).reshape(33, 4, 6)
    assert float(cells[:16].abs().max()) == 0, "no control image is zeros, as in the trainer"
    assert torch.equal(cells[16], torch.tensor([0, 0, 0, 1, 1, 1.0]).expand(4, 6))
    pixels = torch.from_numpy(np.array(picture(2))).permute(2, 0, 1).float() / 127.5 - 1
    pixels[:, :, :24] = 0
    config = pipe.vae.config
    wanted = (pipe.vae.moments(pixels[None])[0][0] - config.shift_factor) * config.scaling_factor
    assert torch.allclose(cells[17:], wanted, atol=1e-4)


@pytest.mark.parametrize("debug", [False, True])
def test_a_number_that_is_not_finite_is_found_in_the_net(debug):
    pipe = pipeline("2.1")
    pipe.controlnets["edges"].control_layers[1].after_proj.weight[3, 4] = float("nan")
    place = r"ControlNet edges: first in control_layers.1.after_proj .*1.after_proj.weight holds NaN"
    with pytest.raises(NonFinite, match=place):
        run(pipe, control_image=picture(), debug=debug)


def test_control_goes_with_image_to_image_and_inpainting():
    pipe = pipeline("2.1")
    mask = Image.new("L", (48, 32), 0)
    mask.paste(255, (0, 0, 24, 32))
    options = {"image": picture(5), "mask_image": mask, "strength": 0.7, "output_type": "np"}
    plain, found = run(pipe, **options), run(pipe, control_image=picture(), **options)
    kept = np.array(picture(5))[:, 24:].astype(np.float32) / 255
    assert np.array_equal(found.images[0][:, 24:], kept)
    assert not np.array_equal(found.images[0][:, :24], plain.images[0][:, :24])
    assert {"image_sha256", "init_sha256", "mask_sha256"} < found.settings[0]["controls"][0].keys()


BAD = {
    "no net": (lambda p: p.unload_controlnet(), {}, BadArgument, "no ControlNet is loaded; call"),
    "scale": (None, {"controlnet_conditioning_scale": float("nan")}, BadArgument, "got nan, wanted a number"),
    "scale text": (None, {"controlnet_conditioning_scale": "1"}, BadArgument, "wanted a number from -10"),
    "scales": (None, {"controlnet_conditioning_scale": [1, 2]}, BadArgument, "got 2 numbers"),
    "order": (None, {"control_guidance_start": 0.5, "control_guidance_end": 0.5}, BadArgument, "start < end"),
    "end": (None, {"control_guidance_end": 1.5}, BadArgument, "control_guidance_end: got 1.5"),
    "image": (None, {"control_image": 3}, BadArgument, "control_image: got a int, wanted a path"),
    "file": (None, {"control_image": "/nowhere.png"}, BadFile, "is not a file that control_image"),
    "empty": (None, {"control_image": []}, BadArgument, "got an empty list"),
    "name": (None, {"control_image": {"pose": picture()}}, BadArgument, "got 'pose', wanted names"),
    "batch": (
        None, {"control_image": torch.zeros(3, 3, 32, 48)}, BadArgument, "got 3 for a run of 1 images"
    ),
    "numbers that do not go together": (
        lambda p: p.load_controlnet(net("2.1"), "edges"),
        {"prompt": ["a"] * 6,
         "control_image": ControlImage(None, torch.zeros(2, 3, 32, 48), torch.ones(3, 1, 32, 48))},
        BadArgument, "got 2 and 3 for a run of 6 images",
    ),
    "too few": (lambda p: p.load_controlnet(net(), "b"), {}, BadArgument, r"1 for 2 ControlNets"),
    "mask": (
        None, {"control_image": ControlImage(None, picture(), picture())}, BadArgument,
        r"'edges' \(1.0\) has no channels for a mask",
    ),
    "no VAE": (lambda p: setattr(p, "vae", None), {}, Unsupported, "no VAE, which encodes it"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(case):
    change, call, error, message = BAD[case]
    pipe, vae = pipeline(), None
    usual = run(pipe, control_image=picture()).images
    if change is not None:
        vae = pipe.vae
        change(pipe)
    with pytest.raises(error, match=message) as raised:
        run(pipe, **{"control_image": picture(), **call})
    assert "\n" not in str(raised.value)
    pipe.vae = vae or pipe.vae
    pipe.unload_controlnet()
    pipe.load_controlnet(net(), "edges")
    assert torch.equal(run(pipe, control_image=picture()).images, usual)


def test_a_net_of_another_transformer_is_refused_and_not_kept(tmp_path):
    pipe = tiny.pipeline()
    for other, error, message in (
        (controls.controlnet("1.0"), WrongModel, "has width 48, this transformer needs 32"),
        (controls.controlnet("1.0", {**controls.TINY, "n_layers": 6, "n_heads": 4}), WrongModel, "heads 4"),
        (controls.controlnet("2.0", {**controls.TINY, "n_layers": 6}), BadWeights, "steers 6 layers"),
    ):
        for given in (other, controls.write(tmp_path / "net.safetensors", other)):
            with pytest.raises(error, match=message):
                pipe.load_controlnet(given)
    with pytest.raises(BadArgument, match="hints: got 'mine', wanted one of trainer, diffusers"):
        pipe.load_controlnet(net(), hints="mine")
    with pytest.raises(BadArgument, match="there is no ControlNet 'x'; loaded: none is loaded"):
        pipe.unload_controlnet("x")
    assert not pipe.controlnets


def test_images_of_another_shape_are_stretched_with_a_warning():
    with pytest.warns(UserWarning, match="control_image: 40 x 40 pixels are stretched to 48 x 32"):
        run(pipeline(), control_image=picture(1, (40, 40)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(pipeline(), control_image=picture(1, (96, 64)))


def test_the_names_of_diffusers_share_components_and_nets():
    base = tiny.pipeline()
    pipe = ZImageControlNetPipeline.from_pipe(base, controlnet=net("2.1"))
    assert isinstance(pipe, ZImagePipeline)
    assert pipe.transformer is base.transformer
    assert not base.controlnets
    second = ZImageControlNetInpaintPipeline.from_pipe(pipe)
    assert second.controlnet is pipe.controlnet
    images = run(pipe, control_image=picture()).images
    base.load_controlnet(net("2.1"))
    assert torch.equal(run(base, control_image=picture()).images, images)
    with pytest.raises(BadArgument, match="control_image: this pipeline follows one; give it"):
        run(pipe)
    with pytest.raises(BadArgument, match="this pipeline inpaints; give both"):
        run(second, control_image=picture())
    with pytest.raises(WrongModel, match=r"\(1.0\) has no channels for a mask"):
        ZImageControlNetInpaintPipeline.from_pipe(base, controlnet=net("1.0"))
    with pytest.raises(WrongModel, match=r"\(1.0\) has no channels for a mask"):
        second.load_controlnet(net("1.0"), pipe.controlnet.name)
    assert second.controlnet is pipe.controlnet


def test_a_net_that_is_loaded_again_is_renamed():
    pipe = pipeline("2.1")
    pipe.load_controlnet(pipe.controlnets["edges"], "other", hints="diffusers")
    assert list(pipe.controlnets) == ["other"]


def test_files_of_one_name_are_two_nets(tmp_path):
    pipe = tiny.pipeline()
    for folder in "abb":
        (tmp_path / folder).mkdir(exist_ok=True)
        pipe.load_controlnet(controls.write(tmp_path / folder / "net.safetensors", net()))
    assert list(pipe.controlnets) == ["net", "net-2"]

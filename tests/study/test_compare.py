"""A comparison finds no difference where there is none, and one in the right place where there is."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny
from zimage_core.errors import BadArgument, BadFile
from zimage_core.study import report
from zimage_core.study.blocks import Spool, probes
from zimage_core.study.compare import compare

PROMPTS = ["a red circle", "a blue star"]
OPTIONS = {"height": 32, "width": 48, "num_inference_steps": 3}


def changed(part: str):
    """The tiny pipeline with half the rows of one weight scaled; all of them the norm behind would undo."""
    pipe = tiny.pipeline()
    pipe.transformer.get_submodule(part).weight[::2] *= 1.2
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def found(pipe):
    """One block of B has another matrix."""
    return compare(
        pipe, changed("layers.1.feed_forward.w2"), PROMPTS, (3, 4), labels=("tiny", "<w2>"), **OPTIONS
    )


def test_equal_models_are_equal_to_the_bit(pipe):
    same = compare(pipe, tiny.pipeline(), PROMPTS[:1], (3,), **OPTIONS)
    assert same.psnr == math.inf
    assert (same.ssim, same.velocity) == (pytest.approx(1.0, abs=1e-12), 0.0)
    assert [step.latents for step in same.steps] == [0.0] * 3
    assert {(b.own, b.stream) for b in same.blocks} == {(0.0, 0.0)}
    assert json.loads(json.dumps(same.to_json(), allow_nan=False))["psnr"] is None


def test_the_images_are_those_of_the_pipelines(pipe, found):
    for pair in found.images:
        drawn = pipe(pair.prompt, seed=pair.seed, output_type="np", **OPTIONS).images[0]
        assert abs(pair.a / 255 - drawn).max() <= 0.5 / 255 + 1e-6
    assert [(p.prompt, p.seed) for p in found.images] == [(p, s) for p in PROMPTS for s in (3, 4)]


def test_only_the_changed_block_has_an_error_of_its_own(found):
    own = {(b.block, b.step): b.own for b in found.blocks}
    assert {name for (name, _), error in own.items() if error} == {"layers.1"}
    assert all(own["layers.1", step] > 0 for step in range(3))
    assert all(b.stream == 0 for b in found.blocks if b.block != "layers.1")
    assert {b.block for b in found.blocks} == {"context_refiner.0", "noise_refiner.0", "layers.0", "layers.1"}


def test_a_fault_in_an_early_block_goes_on_in_the_stream(pipe):
    early = compare(pipe, changed("layers.0.attention.to_v"), PROMPTS[:1], **OPTIONS)
    errors = {b.block: b for b in early.blocks if b.step == 1}
    assert errors["layers.0"].own > 0
    assert errors["layers.1"].own == 0
    assert errors["layers.1"].stream > 0


def test_the_velocity_is_the_networks_on_the_latents_of_a(pipe, found):
    """Step 1 of the first image, both networks called by hand on the noise."""
    from zimage_core.sampling.noise import from_seeds

    errors = []
    other = changed("layers.1.feed_forward.w2")
    for prompt in PROMPTS:
        (caption,), _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
        for seed in (3, 4):
            start = from_seeds((1, 16, 4, 6), (seed,))[0][:, None]
            a, b = (
                net([start], torch.zeros(1), [caption])[0] for net in (pipe.transformer, other.transformer)
            )
            errors.append((float((b - a).square().sum()), float(a.square().sum())))
    wanted = math.sqrt(sum(e for e, _ in errors) / sum(s for _, s in errors))
    # (x' - x) / (level' - level) in float32 latents: about 1e-6 of the velocity, against an error of 1e-3
    assert found.steps[0].velocity == pytest.approx(wanted, rel=5e-3)
    assert found.steps[0].sigma == 1.0


def test_other_settings_of_one_model(pipe):
    stronger = compare(
        pipe, pipe, PROMPTS[:1], guidance_scale=0.0, options_b={"guidance_scale": 3.0}, **OPTIONS
    )
    assert stronger.velocity > 0
    assert all(b.own == 0 for b in stronger.blocks)  # the positive side is the same
    longer = compare(pipe, pipe, PROMPTS[:1], options_b={"num_inference_steps": 4}, **OPTIONS)
    assert (longer.steps, longer.blocks, longer.velocity) == ((), (), None)
    assert math.isfinite(longer.psnr)


@pytest.mark.parametrize(("a", "b"), [("heun", "heun"), ("euler", "dpmpp_2m")])
def test_steps_of_other_samplers_tell_no_velocity(pipe, a, b):
    options = OPTIONS | {"num_inference_steps": 4}
    found = compare(pipe, pipe, PROMPTS[:1], (3,), options_b={"sampler": b}, sampler=a, **options)
    assert (found.steps, found.blocks, found.velocity) == ((), (), None)
    assert (found.psnr == math.inf) == (a == b)


def test_a_is_let_go_before_b_is_loaded():
    made: list[weakref.ref] = []

    def first():
        one = tiny.pipeline()
        made.append(weakref.ref(one.transformer))
        return one

    def second():
        gc.collect()
        assert made[0]() is None
        return tiny.pipeline()

    compare(first, second, PROMPTS[:1], **OPTIONS)


def test_hooks_and_files_go_after_an_error(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())

    def fail(done, total):
        assert list(tmp_path.iterdir())
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pipe, pipe, PROMPTS[:1], on_run=fail, **OPTIONS)
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())
    assert after == before
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_is_an_error_of_ours():
    with Spool() as spool:
        folder = Path(spool._folder.name)
        (folder / "0").symlink_to("/dev/full")
        with pytest.raises(BadFile, match=r"blocks could not be set aside \(no space left on device\)"):
            spool.put((0, "layers.0"), torch.zeros(3))
    assert not folder.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_spool_gives_back_what_it_got(dtype):
    x = torch.randn(3, 5).to(dtype)
    with Spool() as spool:
        spool.put((1, "a"), x[1:])
        assert (1, "a") in spool
        assert (2, "a") not in spool
        assert torch.equal(spool.get((1, "a")), x[1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 1}, "seed: chosen by the comparison itself"),
        ({"options_b": {"latents": 1}}, "latents: chosen by"),
        ({"prompts": []}, "there are none"),
        ({"block_steps": -1}, "block_steps: got -1"),
        ({"options_b": {"width": 32}}, "B draws images of 32 x 32, A of 48 x 32"),
    ],
)
def test_arguments_are_checked(pipe, options, words):
    with pytest.raises(BadArgument, match=words):
        compare(pipe, pipe, **{"prompts": PROMPTS[:1], **OPTIONS, **options})


def test_probed_steps_are_spread_from_first_to_last():
    assert probes(8, 3) == (0, 4, 7)
    assert probes(8, 1) == (0,)
    assert probes(2, 3) == (0, 1)
    assert probes(8, 0) == ()


def test_the_report_is_one_page_with_everything_in_it(found):
    page = report.html(found)
    assert page.count("data:image/png;base64,") == 3 * len(found.images)
    assert page.count("<svg") == 3  # steps, own, stream
    assert "&lt;w2&gt; against tiny" in page
    assert "<w2>" not in page
    for outside in ("http", 'src="/', "<script", "<link"):
        assert outside not in page


def test_the_sheet_has_a_row_a_image(found):
    sheet = report.contact_sheet(found)
    scale = -(-report.SMALLEST // 48)
    width = 3 * (48 * scale + report.MARGIN) + report.MARGIN
    assert sheet.size == (width, report.BAND + 4 * (32 * scale + 2 * report.BAND + report.MARGIN))
    corner = sheet.getpixel((report.MARGIN, report.BAND))
    assert corner == tuple(found.images[0].a[0, 0])
    assert report.sheet_png(found)[:4] == b"\x89PNG"


def test_equal_images_have_a_grey_difference(pipe):
    same = compare(pipe, pipe, PROMPTS[:1], block_steps=0, **OPTIONS)
    assert (report.difference(same.images[0]) == 128).all()
    assert "No difference." in report.html(same)

"""A memory budget counts references: the same image, figures in the refusal, formulas against a count."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import omni
from tests.helpers.live_bytes import LiveBytes, as_the_kernels, meta, on_meta
from tests.helpers.omni import picture
from zimage_core.config import TransformerConfig, VisionConfig
from zimage_core.errors import OverBudget, Unsupported
from zimage_core.memory.activations import denoise_bytes
from zimage_core.memory.references import References
from zimage_core.memory.tower import Tower
from zimage_core.models.block_source import RESIDENT
from zimage_core.models.omni import OmniTransformer, Reference
from zimage_core.models.vision_tower import VisionTower
from zimage_core.weights.components import open_component

CONFIG = TransformerConfig(n_layers=2, siglip_feat_dim=1152)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_the_stream_of_a_run_is_counted(count, dtype, monkeypatch):
    """Prepared values of two samples and a step of full width, by the formulas of a plain run."""
    own, rows, cols, times = getattr(torch, dtype), 64, 96, [0.1] * 8
    net = on_meta(lambda: OmniTransformer(CONFIG), own)
    sizes, lengths = ([(64, 64), (128, 96), (40, 40)] * 14)[:count], (3, *[2] * count, 70)[-count - 2 :]
    kept = sum(height * width for height, width in sizes), 256 * count
    planned = References(tuple(sizes), (256,) * count, lengths if count else (70,), 2, kept)
    with as_the_kernels(monkeypatch), torch.no_grad(), LiveBytes() as counted:
        counted.ignore(*net.parameters())
        shown = tuple(Reference(meta(16, *size, dtype=own), meta(16, 16, 1152, dtype=own)) for size in sizes)
        pieces = [[meta(n, 2560, dtype=own) for n in planned.pieces] for _ in range(2)]
        prepared = net.prepare_omni(pieces, [shown, shown], times, (rows, cols))
        latent = meta(16, rows, cols, dtype=own)
        for sample in range(2):
            net.step_omni(latent, prepared, 0, sample)
    stream = planned.stream(CONFIG, rows, cols)
    formula = denoise_bytes(CONFIG, *stream, dtype, 1, 2, 8) + planned.beside(CONFIG, rows, cols, dtype)
    assert 1 <= formula / counted.peak <= 1.2, (formula, counted.peak)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_vision_tower_is_counted(dtype, monkeypatch):
    config = VisionConfig(num_layers=2)
    tower = on_meta(lambda: VisionTower(config), getattr(torch, dtype))
    patches = meta(256, config.patch_dim, dtype=torch.float32)
    with as_the_kernels(monkeypatch), torch.no_grad(), LiveBytes() as counted:
        counted.ignore(patches, *tower.parameters())
        tower(patches, (16, 16))
    live = Tower(config, 0, (), 256, dtype, 0).live
    assert 1 <= live / counted.peak <= 3.5, (live, counted.peak)


SHOWN = [picture(48, 32, 0), picture(64, 64, 1)]


def open_with(folder, **budget):
    from zimage_core import ZImageOmniPipeline

    return ZImageOmniPipeline.from_pretrained(folder, **budget)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return omni.folder(tmp_path_factory.mktemp("omni"))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_run_in_a_budget_gives_the_same_image(folder, guidance):
    call = {
        "image": [[SHOWN[0]], SHOWN],
        "prompt": ["a", "b"],
        "height": 32,
        "width": 48,
        "guidance_scale": guidance,
    }
    wanted, pipe = omni.draw(open_with(folder), **call), open_with(folder, ram="64GiB")
    for _ in range(2):
        assert torch.equal(omni.draw(pipe, **call), wanted)
        plan = pipe._placement.report().plan
        assert [phase.name for phase in plan.phases] == ["encode", "vision", "denoise", "decode"]
        assert plan.component("siglip").blocks == 3
        assert any("the vision tower" in reason for reason in plan.reasons)
    assert torch.equal(omni.draw(pipe), omni.draw(open_with(folder))), "without references as before"
    assert [phase.name for phase in pipe._placement.report().plan.phases] == ["encode", "denoise", "decode"]


def test_a_tower_that_is_added_to_a_budget_is_refused(folder):
    pipe = open_with(folder, siglip=None, ram="64GiB")
    pipe.siglip = omni.tower()
    with pytest.raises(Unsupported, match=r"siglip: it was replaced or added .*call limit_memory again"):
        omni.draw(pipe, image=SHOWN)
    pipe.limit_memory(ram="64GiB")
    assert omni.draw(pipe, image=SHOWN).shape == (1, 16, 8, 8)


def test_the_tower_is_streamed_layer_by_layer_where_it_does_not_fit(folder, monkeypatch):
    call = {"image": SHOWN, "height": 32, "width": 48}
    wanted, pipe = omni.draw(open_with(folder), **call), open_with(folder, ram="64GiB")
    omni.draw(pipe, **call)
    real = Tower.need
    monkeypatch.setattr(
        Tower, "need", lambda self, job, streamed: real(self, job, streamed) + (0 if streamed else 1 << 60)
    )
    for _ in range(2):
        assert torch.equal(omni.draw(pipe, **call), wanted)
        report = pipe._placement.report()
        assert report.plan.component("siglip").slots == 3
        assert report.traffic["siglip"].bytes_moved >= 3 * report.plan.component("siglip").slot_bytes
        assert pipe.siglip.stream is RESIDENT
    assert report.traffic["transformer"].bytes_moved == 0, "there was room beside it"


def test_what_stays_makes_room_for_the_tower(folder, monkeypatch):
    call = {"image": SHOWN, "height": 32, "width": 48}
    wanted, pipe = omni.draw(open_with(folder), **call), open_with(folder, ram="64GiB")
    omni.draw(pipe, **call)
    assert pipe._placement.memory._loaded
    room = pipe._placement.memory._plan.vram
    monkeypatch.setattr(Tower, "need", lambda self, job, streamed: room)
    inside = []
    monkeypatch.setattr(
        VisionTower,
        "forward",
        lambda self, *given, real=VisionTower.forward: (
            inside.append([*pipe._placement.memory._loaded]) or real(self, *given)
        ),
    )
    assert torch.equal(omni.draw(pipe, **call), wanted)
    assert inside == [[], []]


def test_twenty_references_are_planned_or_refused_with_figures(folder):
    many = [picture(512, 512, i) for i in range(20)]
    pipe = open_with(folder, ram="64GiB")
    omni.draw(pipe, image=SHOWN, height=32, width=32)
    few = pipe._placement.report().plan
    pipe.limit_memory(ram="830MB")
    with pytest.raises(
        OverBudget,
        match=r"830 MB of host memory are given and 32 x 32 px with 20 reference images need at least \d.*"
        "of fewer references",
    ):
        omni.draw(pipe, image=many, height=32, width=32)
    plans = [pipe.plan(32, 32, references=count).phase("denoise").peak for count in (0, 1, 2)]
    assert plans == sorted(plans)
    assert plans[0] < plans[2]
    assert few.floor < pipe.plan(32, 32, references=20).floor


def test_headers_tell_what_the_tower_weighs(folder):
    from zimage_core.memory.beside import tower_of

    pipe, opened = open_with(folder), open_component(folder / "siglip", "siglip")
    references = References.usual(2, 4, 4, 10, 1)
    told, loaded = Tower.of_file(opened, "float32", 256), tower_of(pipe.siglip, references)
    opened.file.close()
    assert told.blocks == loaded.blocks
    assert told.always == pytest.approx(loaded.always, rel=0.01)
    assert told.tokens == loaded.tokens


def test_the_verb_plan_counts_references(folder, capsys):
    from zimage_core.cli.main import main

    def printed(*options):
        assert main(["plan", "--model", str(folder), "-W", "64", "-H", "64", "--vram", "4GiB", *options]) == 0
        return capsys.readouterr().out

    plain, shown = printed(), printed("--references", "3")
    assert "vision" not in plain
    assert "vision" in shown
    assert "the vision tower" in shown
    parts = [f"--{name.replace('_', '-')}={folder / name}" for name in ("transformer", "text_encoder", "vae")]
    assert main(["plan", *parts, "--references", "1", "--vram", "4GiB"]) == 0
    assert "vision tower is not counted; give --siglip" in capsys.readouterr().out
    assert main(["plan", "--model", str(folder), "--siglip", "nothing", "--vram", "4GiB"])
    assert "--siglip: it sees reference images" in capsys.readouterr().err
    assert main(["plan", "--model", "default", "--references", "2", "--vram", "4GiB"])
    assert "takes text alone" in capsys.readouterr().err

"""`parallelize`: what ranks agree on; a rank that fails is an error on every other, never a hang."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import ranks as helper
from tests.helpers.tiny import pipeline
from zimage_core import BadArgument, Unsupported, ZImagePipeline
from zimage_core.models.vae_tiles import layout
from zimage_core.parallel import group, ranks
from zimage_core.parallel.marks import mark, marks_of
from zimage_core.parallel.ranks import Ranks
from zimage_core.parallel.vae import Strip
from zimage_core.run.request import Request

LIMIT = {"ZIMAGE_RANK_TIMEOUT": "4"}

AGREE = """
from pathlib import Path
import pickle
import numpy as np
pipe = ZImagePipeline.from_default()
pipe.parallelize()
print(pipe.ranks)
call = dict(seed=3, num_inference_steps=2, output_type="np")
def stop(pipe, step, timestep, tensors):
    pipe._interrupt = rank == 1
def raised(*_):
    raise ValueError("a fault")
def refused(function):
    try:
        function()
    except (ZImageError, ValueError) as error:
        show(error)
refused(lambda: pipe("a circle" if rank else "a square", **call))
refused(lambda: pipe("a circle", width=17))
refused(lambda: pipe("a circle", image=f"missing-{rank}.png"))
if rank == 1:
    pipe.text_encoder.forward = raised
refused(lambda: pipe("a circle", **call))
if rank == 1:
    del pipe.text_encoder.forward
refused(lambda: pickle.dumps(pipe))
stopped = pipe("a red circle", **{**call, "num_inference_steps": 4}, callback_on_step_end=stop)
drawn = pipe("a red circle", output_type="np", num_inference_steps=2)
small = pipe("a red circle", **call)
large = pipe("a red circle", 256, 256, **{**call, "num_inference_steps": 1})
two = pipe.hires("a red circle", scale=1.5, num_inference_steps=2, output_type="np")
latents = torch.randn(1, 16, 10, 10, generator=torch.Generator().manual_seed(1))
later = pipe("a red circle", latents=latents, sampler="euler_ancestral", output_type="np")
def returned(pipe, step, timestep, tensors):
    return tensors
same = pipe("a red circle", **call, callback_on_step_end=returned if rank else None)
print(np.array_equal(same.images, small.images))
def changed(pipe, step, timestep, tensors):
    return {"latents": tensors["latents"] * (1 + rank)}
refused(lambda: pipe("a red circle", **call, callback_on_step_end=changed))
print(stopped.interrupted, len(stopped.timings.steps), drawn.seed, two.seed, small.settings[0]["ranks"])
Path(f"{rank}.pkl").write_bytes(pickle.dumps([each.images for each in (small, large, drawn, two, later)]))
pipe.parallelize(False)
print(pipe.ranks)
"""


def test_two_ranks_agree_on_everything_and_refuse_what_they_cannot_share(tmp_path):
    """One pair of processes, since each takes seconds to start."""
    out = helper.run(AGREE, 2, tmp_path)
    assert [code for code, _, _ in out] == [0, 0], out
    first, second = (text.splitlines() for _, text, _ in out)
    assert first[0] == "Ranks(rank 0 of 2: ranks 2; cpu)"
    assert second[0] == "Ranks(rank 1 of 2: ranks 2; cpu)"
    other = (
        "BadArgument: parallel: rank 1 has another prompt than rank 0; call all ranks with the same arguments"
    )
    assert first[1] == second[1] == other
    assert first[2] == second[2]
    assert first[2].startswith("BadArgument: width: got 17")
    assert "rank 1 has another image than rank 0" in first[3]
    assert (first[4], second[4]) == ("RankFailed: rank 1 failed: ValueError a fault", "ValueError: a fault")
    assert first[5].startswith("Unsupported: a pipeline on several ranks is not copied or pickled")
    assert first[6:] == second[6:]
    assert first[6] == "True", "a callback that returns what it got changes nothing"
    assert first[7].startswith("BadArgument: callback_on_step_end: rank 1 changed tensors")
    stopped, steps, _, _, ranks = first[8].split()
    assert (stopped, steps, ranks, first[9]) == ("True", "1", "2", "None")
    mine, theirs = (pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in (0, 1))
    for a, b in zip(mine, theirs, strict=True):
        assert np.array_equal(a, b)
    pipe = ZImagePipeline.from_default()
    call: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "output_type": "np"}
    one = pipe("a red circle", **call)
    large = pipe("a red circle", 256, 256, **{**call, "num_inference_steps": 1})
    assert np.abs(one.images - mine[0]).max() < 1e-4
    assert np.abs(large.images - mine[1]).max() < 1e-4, "decoded in strips"
    assert "ranks" not in one.settings[0]


FAIL = """
pipe = ZImagePipeline.from_default()
pipe.parallelize()
def stage(pipe, step, timestep, tensors):
    if step == 1 and rank == 1:
        FAULT
def raised(*_):
    raise ValueError("a fault")
if rank == 1:
    PLANT
try:
    pipe("a circle", 256, 256, num_inference_steps=3, seed=1, callback_on_step_end=stage)
    print("no error")
except Exception as error:
    show(error)
    try:
        pipe("a circle", seed=1, num_inference_steps=1)
        print("works again")
    except ZImageError as error:
        show(error)
    sys.exit(1)
"""
PLACES = {
    "text": ("pass", "pipe.text_encoder.forward = raised"),
    "step": ("pass", "pipe.transformer.predict = raised"),
    "callback": ("raised()", "pass"),
    "decode": ("pass", "pipe.vae.decoder.up_blocks[2].resnets[0].conv1.forward = raised"),
}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if place == "step" else pytest.mark.slow) for place in PLACES]
)
def test_what_a_rank_raises_is_raised_on_the_others(place, tmp_path):
    fault, plant = PLACES[place]
    program = FAIL.replace("FAULT", fault).replace("PLANT", plant)
    first, second = helper.run(program, 2, tmp_path, more=LIMIT)
    assert (first[0], second[0]) == (1, 1)
    assert first[1].startswith("RankFailed: rank 1 failed: ValueError a fault\n"), first
    assert second[1].startswith("ValueError: a fault\n"), second
    assert first[1].splitlines()[1].startswith("RankFailed: rank 1 failed"), "the ranks cannot go on"


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 ended, or its connection broke; see"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSTOP)", "rank 1 did not come within 4 s; see",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_rank_that_ended_or_hangs_is_an_error_on_the_others(fault, wanted, tmp_path):
    """The fault is inside of a step, so that the others wait for a tensor, or at its end."""
    plant = f"pipe.transformer.layers[1].register_forward_hook(lambda *_: {fault})"
    if "STOP" in fault:
        plant = "pass"
    program = FAIL.replace("FAULT", fault).replace("PLANT", plant)
    first, _ = helper.run(program, 2, tmp_path, but=1, more=LIMIT)
    assert first[0] == 1
    assert first[1].startswith(f"RankFailed: {wanted}"), first
    assert len(first[1].splitlines()) == 2


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_step_is_an_error_on_the_others_even_if_it_holds_the_store(tmp_path):
    for stopped in (0, 1):
        stop = "lambda *_: os.kill(os.getpid(), signal.SIGSTOP)"
        plant = f"pipe.transformer.layers[1].register_forward_hook({stop})"
        program = (
            FAIL.replace("rank == 1", f"rank == {stopped}").replace("FAULT", "pass").replace("PLANT", plant)
        )
        found = helper.run(program, 2, tmp_path, but=stopped, more=LIMIT)
        for number, (code, out, _) in enumerate(found):
            if number != stopped:
                assert code == 1
                assert out.startswith("RankFailed: "), out
                assert f"rank {stopped}" in out.splitlines()[0]


@pytest.mark.slow
def test_another_model_on_a_rank_is_named(tmp_path):
    program = """
pipe = ZImagePipeline.from_default(dtype="bfloat16" if rank else "float32")
pipe.parallelize()
try:
    pipe("a circle", seed=1)
except ZImageError as error:
    show(error)
"""
    for _, out, _ in helper.run(program, 2, tmp_path):
        assert "rank 1 has another dtype than rank 0" in out


def test_marks_differ_where_arguments_do():
    pipe = pipeline()
    networks = {"transformer": pipe.transformer}
    same = marks_of(Request(prompt="a", seed=1, callback_on_step_end=print), pipe, networks)
    assert same == marks_of(Request(prompt="a", seed=1), pipe, networks)
    differ = marks_of(Request(prompt="a", seed=2, latents=torch.zeros(1, 2)), pipe, networks)
    assert {name for name in same if same[name] != differ[name]} == {"seed", "latents"}
    values = (
        None,
        0,
        0.0,
        "",
        "0",
        [0],
        [[0]],
        torch.zeros(1),
        torch.zeros(2),
        np.zeros(2),
        torch.Generator(),
    )
    assert len({mark(value) for value in values}) == len(values)
    assert mark(torch.Generator().manual_seed(1)) != mark(torch.Generator().manual_seed(2))


def test_a_world_of_one_rank_is_no_parallel_run(monkeypatch):
    for name, value in helper.environment(0, 1, helper.free_port()).items():
        monkeypatch.setenv(name, value)
    pipe = pipeline()
    try:
        pipe.parallelize()
    finally:
        torch.distributed.destroy_process_group()
    assert pipe.ranks is None


def test_wrong_arguments_are_one_sentence(monkeypatch):
    pipe = pipeline()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadArgument, match="start the program with torchrun"):
        pipe.parallelize()
    with pytest.raises(BadArgument, match="timeout: got -1, wanted seconds above 0"):
        pipe.parallelize(timeout=-1)
    monkeypatch.setenv("ZIMAGE_RANK_TIMEOUT", "soon")
    with pytest.raises(BadArgument, match="ZIMAGE_RANK_TIMEOUT: got 'soon'"):
        pipe.parallelize()
    monkeypatch.delenv("ZIMAGE_RANK_TIMEOUT")
    for name, value in {**helper.environment(0, 2, 1), "RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadArgument, match="RANK: got '2', wanted a whole number from 0 to 1"):
        pipe.parallelize()
    assert pipe.ranks is None


def test_marks_read_image_files_whose_names_may_mean_others_on_another_machine(tmp_path):
    pipe, path = pipeline(), tmp_path / "a.png"
    found = []
    for contents in (b"1", b"2", b"2"):
        path.write_bytes(contents)
        found.append(marks_of(Request(prompt="a", reference_images=[str(path)]), pipe, {}))
    assert found[0] != found[1] == found[2]


def test_numbers_of_a_mesh_must_rise(monkeypatch):
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)

    def grid(numbers):
        names = ("guidance", "sequence")[-len(np.shape(numbers)) :]
        return ranks._grid(SimpleNamespace(mesh=torch.tensor(numbers), mesh_dim_names=names), None)

    assert grid([2, 0, 1]) == [[0, 1, 2]]
    assert grid([[3, 1], [2, 0]]) == [[0, 2], [1, 3]]
    with pytest.raises(BadArgument, match="wanted numbers of ranks that rise"):
        grid([[0, 3], [1, 2]])


@pytest.mark.parametrize("rows", [(33, 21), (5, 70), (64, 64)])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_strips_cover_each_row_once(rows, size):
    h, w = rows
    strips = [Strip(SimpleNamespace(rank=rank, size=size), h, w, 16) for rank in range(size)]  # type: ignore[arg-type]
    assert sum(strip.own for strip in strips) == h
    whole = torch.arange(h).view(1, 1, h, 1).expand(1, 1, h, w)
    for rank, strip in enumerate(strips):
        part, first = strip.part(whole), sum(strip.rows[:rank])
        covered = torch.zeros(part.shape[2:])
        for tile in strip.tiles:
            covered[tile.new] += 1
        inner = covered[strip.above : strip.above + strip.own]
        assert (inner == 1).all()
        assert covered.sum() == inner.sum()
        assert part[0, 0, strip.above, 0] == first
    assert len(layout(h, w, 16)) > 0


def test_settings_name_the_ranks():
    made = object.__new__(Ranks)
    made.sequence = SimpleNamespace(size=3)  # type: ignore[assignment]
    made.guidance = SimpleNamespace(size=2)  # type: ignore[assignment]
    assert made.settings == {"ranks": 3, "guidance_ranks": 2}
    with pytest.raises(Unsupported, match="not copied or pickled"):
        pickle.dumps(made)
    assert json.dumps(made.settings)
    assert group.FIRST > 1


MESH = """
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
pipe = ZImagePipeline.from_default()
def refused(function):
    try:
        function()
    except ZImageError as error:
        show(error)
call = dict(seed=3, num_inference_steps=2, output_type="np", guidance_scale=2.0, negative_prompt="blue")
pipe.parallelize(init_device_mesh("cpu", (2, 1), mesh_dim_names=("guidance", "sequence")))
print(pipe.ranks)
images = [pipe("a red circle", **call).images]
refused(lambda: pipe.parallelize(init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))))
refused(lambda: pipe.parallelize(guidance=3))
refused(lambda: pipe.parallelize("all"))
pipe.parallelize(DeviceMesh("cpu", [1, 0]))
images.append(pipe("a red circle", **call).images)
torch.save([torch.from_numpy(each) for each in images], f"{rank}.pt")
"""


@pytest.mark.slow
def test_a_mesh_of_one_or_two_dimensions_says_what_each_rank_does(tmp_path):
    out = helper.run(MESH, 2, tmp_path)
    assert [code for code, _, _ in out] == [0, 0], out
    lines = out[0][1].splitlines()
    assert lines[0] == "Ranks(rank 0 of 2: ranks 1, guidance_ranks 2; cpu)"
    assert "mesh: got 2 dimensions named ('a', 'b')" in lines[1]
    assert "guidance: got 3 for 2 ranks" in lines[2]
    assert "mesh: got 'all'" in lines[3]
    call: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "output_type": "np"}
    one = ZImagePipeline.from_default()("a red circle", guidance_scale=2.0, negative_prompt="blue", **call)
    for rank in (0, 1):
        for image in torch.load(tmp_path / f"{rank}.pt"):
            assert np.abs(image.numpy() - one.images).max() < 1e-4

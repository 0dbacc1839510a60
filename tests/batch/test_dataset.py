"""A dataset holds, byte for byte, what single calls make; a run that ends in any way goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from tests.batch.conftest import SMALL
from tests.helpers import tiny
from tests.helpers.tree import ROOT
from zimage_core import BadArgument, BadFile, BadRows, DeviceFault, NonFinite, Unsupported
from zimage_core.assets import PARTS
from zimage_core.batch import Report, generate_dataset
from zimage_core.batch.shards import FORMATS
from zimage_core.pipeline import ZImagePipeline

forms = pytest.mark.parametrize("form", FORMATS)
THREADS = torch.get_num_threads()


def make(rows, out, pipe=None, **others):
    return generate_dataset([{**SMALL, **row} for row in rows], out, pipe=pipe, threads=THREADS, **others)


def images(out):
    """Row -> bytes of its PNG, from any kind of dataset."""
    found = {}
    for line in (out / "index.jsonl").read_text().splitlines():
        record = json.loads(line)
        name = f"{record['row']:08d}-{record['key'][:16]}"
        path = out / record["file"]
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                data = tar.extractfile(f"{name}.png").read()
        elif path.suffix == ".parquet":
            table = parquet.read_table(path).to_pylist()
            data = next(row["image"]["bytes"] for row in table if row["key"] == record["key"])
        else:
            data = path.read_bytes()
        found[record["row"]] = data
    return found


def saved(pipe, path, row):
    call = {**SMALL, **row}
    pipe(call.pop("prompt"), **call).save(path, force=True)
    return path.read_bytes()


@forms
def test_images_are_those_of_single_calls(form, pipe, tmp_path):
    rows = [
        {"prompt": "red circle", "seed": 5},
        {"prompt": "青", "seed": 2, "guidance_scale": 1.5, "width": 48},
    ]
    report = make(rows, tmp_path / "out", pipe, format=form, shard_size=1)
    assert (report.rows, report.made, report.skipped, report.failed) == (2, 2, 0, ())
    for number, row in enumerate(rows, 1):
        assert images(tmp_path / "out")[number] == saved(pipe, tmp_path / "one.png", row)


def test_a_model_of_arguments_is_loaded_and_drawn_with(tmp_path):
    folder = tiny.folder(tmp_path / "tiny")
    make([{"prompt": "a", "seed": 5}], tmp_path / "out", model=folder, device="cpu")
    alone = saved(ZImagePipeline.from_pretrained(folder), tmp_path / "one.png", {"prompt": "a", "seed": 5})
    assert images(tmp_path / "out") == {1: alone}


def test_adapters_change_from_row_to_row(tmp_path):
    """Each image is that of a fresh pipeline with its row's adapters, whatever came before."""
    second = tmp_path / "second.safetensors"
    shutil.copy(PARTS["outline"], second)
    os.mkdir(tmp_path / "other")  # noqa: PTH102
    shutil.copy(PARTS["edges"].parent / "outline.safetensors", tmp_path / "other" / "second.safetensors")
    cells = ["outline:0.8", None, ["outline:0.8", f"{second}:0.5"], [f"{second}:0.5", "outline:0.8"],
             f"{tmp_path}/other/second.safetensors:0.5", "outline:-1", None]  # fmt: skip
    rows = [{"prompt": "a red circle", "seed": 3, "lora": cell} for cell in cells]
    report = generate_dataset([{**SMALL, **row} for row in rows], tmp_path / "out", threads=THREADS)
    assert not report.failed
    found = images(tmp_path / "out")
    assert sorted(found) == [1, 2, 3, 4, 5, 6], "the last row repeats the second"
    for number, data in found.items():
        cell = cells[number - 1]
        fresh = ZImagePipeline.from_default()
        for text in [] if cell is None else [cell] if isinstance(cell, str) else cell:
            path, _, weight = text.rpartition(":")
            fresh.load_lora(path, float(weight))
        assert data == saved(fresh, tmp_path / "one.png", {"prompt": "a red circle", "seed": 3})


def test_a_pipeline_that_was_lent_keeps_its_own_adapters(tmp_path):
    own = ZImagePipeline.from_default()
    own.load_lora("outline", 0.5, "mine")
    before = saved(own, tmp_path / "one.png", {"prompt": "a", "seed": 1})
    make([{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": 1, "lora": "outline:2"}], tmp_path / "out", own)
    assert images(tmp_path / "out")[1] == before
    assert [(lora.name, lora.weight) for lora in own.loras] == [("mine", 0.5)]
    assert saved(own, tmp_path / "one.png", {"prompt": "a", "seed": 1}) == before


def test_rows_with_images_and_control_are_drawn(tmp_path):
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    rows = [{"prompt": "a", "image": picture, "num_inference_steps": 2}, {"prompt": "a", "control": picture}]
    report = make(rows, tmp_path / "out")
    assert (report.made, report.failed) == (2, ())
    report = make([{"prompt": "a", "reference": [picture]}], tmp_path / "omni")
    assert (report.made, report.failed) == (1, ())
    with pytest.raises(BadArgument, match="a table of their own"):
        make([{"prompt": "a", "reference": [picture]}, {"prompt": "a"}], tmp_path / "mixed")


def test_rows_that_are_done_are_skipped_wherever_they_stand(pipe, tmp_path, monkeypatch):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    make(rows, tmp_path, pipe)
    before = images(tmp_path)
    monkeypatch.setattr(ZImagePipeline, "__call__", None)
    report = make(rows[::-1], tmp_path, pipe)
    assert (report.made, report.skipped, report.left) == (0, 3, 0)
    assert images(tmp_path) == before


def test_a_changed_model_makes_new_images(tmp_path):
    folder = tiny.folder(tmp_path / "tiny")
    rows, words = [{"prompt": "a", "seed": 5}], {"model": folder, "device": "cpu"}
    assert make(rows, tmp_path / "out", **words).made == 1
    assert make(rows, tmp_path / "out", **words).made == 0
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # a bit of the last weight
    file.write_bytes(data)
    assert make(rows, tmp_path / "out", **words).made == 1


def test_a_row_that_fails_costs_no_other(pipe, tmp_path, monkeypatch):
    real = ZImagePipeline.__call__

    def call(self, **words):
        if words["prompt"] == "b":
            raise NonFinite("the b is not finite")
        return real(self, **words)

    with monkeypatch.context() as patch:
        patch.setattr(ZImagePipeline, "__call__", call)
        report = make([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], tmp_path, pipe)
    assert (report.made, report.failed_count) == (2, 1)
    assert [(each.row.number, each.reason) for each in report.failed] == [(2, "the b is not finite")]
    assert sorted(images(tmp_path)) == [1, 3]
    assert make([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], tmp_path, pipe).made == 1


@pytest.mark.parametrize("error", [DeviceFault("the GPU is gone"), KeyboardInterrupt()])
def test_what_ends_the_run_keeps_what_was_finished(error, pipe, tmp_path, monkeypatch):
    real = ZImagePipeline.__call__

    def call(self, **words):
        if words["prompt"] == "c":
            raise error
        return real(self, **words)

    with monkeypatch.context() as patch:
        patch.setattr(ZImagePipeline, "__call__", call)
        with pytest.raises(type(error)):
            make([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], tmp_path, pipe)
    assert sorted(images(tmp_path)) == [1, 2]
    report = make([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}], tmp_path, pipe)
    assert (report.made, report.skipped) == (1, 2)


def test_bad_rows_end_it_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(ZImagePipeline, "from_default", None)
    rows = [{"prompt": "a"}, {"seed": 3}, {"prompt": "a", "seed": -1}]
    with pytest.raises(BadRows, match=r"row 2: prompt: it is missing or empty \(and 1 more\)") as caught:
        generate_dataset(rows, tmp_path / "out")
    assert [number for number, _ in caught.value.rows] == [2, 3]
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadFile, match="no row"):
        generate_dataset([], tmp_path / "out")


def test_bad_rows_can_be_left_out(pipe, tmp_path):
    report = make([{"prompt": "a"}, {"seed": -1}], tmp_path, pipe, skip_bad=True)
    assert (report.made, report.bad_count, [number for number, _ in report.bad]) == (1, 1, [2])


def test_paths_in_a_table_are_relative_to_it(pipe, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "a.png")
    table = tmp_path / "in" / "rows.csv"
    table.write_text("prompt,image,steps\na,a.png,2\n")
    assert generate_dataset(table, tmp_path / "out", pipe=pipe, limit=5).made == 1


def test_progress_is_told_after_each_image(pipe, tmp_path):
    told: list[Report] = []
    make([{"prompt": "a"}, {"prompt": "b"}], tmp_path, pipe, on_progress=told.append)
    assert told[-1].made == 2
    assert all(before.left >= after.left for before, after in pairwise(told))
    assert told[-1].images_per_hour > 0


def test_threads_follow_from_the_network_and_are_given_back(tmp_path, monkeypatch):
    from zimage_core.batch.identity import threads_of
    from zimage_core.batch.model import Model
    from zimage_core.cpu.threads import VARIABLES

    known = Model.of({}).survey()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert threads_of(known, None) == 1, "the embedded model is small"
    assert threads_of(known, 3) == 3
    with monkeypatch.context() as user:
        user.setenv("OMP_NUM_THREADS", "7")
        user.setattr(torch, "get_num_threads", lambda: 7)
        assert threads_of(known, None) == 7
    seen = []
    report = generate_dataset([{"prompt": "a", **SMALL}], tmp_path, threads=THREADS + 1,
                              on_progress=lambda _: seen.append(torch.get_num_threads()))  # fmt: skip
    assert report.made == 1
    assert (seen[0], torch.get_num_threads()) == (THREADS + 1, THREADS)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"format": "zip"}, BadArgument), ({"shard_size": 0}, BadArgument), ({"threads": 0}, BadArgument),
        ({"limit": 0}, BadArgument), ({"transfomer": "a"}, BadArgument), ({"transformer": "a"}, BadArgument),
        ({"defaults": {"prompt": "a"}}, BadArgument), ({"model": "none/of/these"}, BadArgument),
        ({"defaults": {"stepz": 1}}, BadArgument),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_before_anything_is_written(words, error, tmp_path):
    with pytest.raises(error):
        generate_dataset([{"prompt": "a"}], tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()


def test_a_pipeline_built_in_memory_is_refused(tmp_path):
    with pytest.raises(Unsupported, match="came from no file"):
        generate_dataset([{"prompt": "a"}], tmp_path / "out", pipe=tiny.pipeline())


@pytest.mark.parametrize(
    "form", ["webdataset", *(pytest.param(form, marks=pytest.mark.slow) for form in ("png", "parquet"))]
)
def test_a_run_that_was_killed_goes_on_to_the_same_files(form, pipe, tmp_path):
    """SIGKILL in mid-run: what was finished stays, the rest is made, nothing is made twice."""
    rows = [{"prompt": f"circle {i}", **SMALL} for i in range(12)]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "killed"
    code = (
        "import time, sys\nfrom zimage_core.batch import generate_dataset\n"
        f"generate_dataset({str(table)!r}, {str(out)!r}, format={form!r}, shard_size=3, threads={THREADS}, "
        "on_progress=lambda report: time.sleep(0.2))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    work = out / ".zimage-batch"
    while process.poll() is None and len(finished(out)) < 5:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(out)
    assert 5 <= len(before) < 12
    report = generate_dataset(table, out, format=form, shard_size=3, threads=THREADS)
    assert report.made <= 12 - len(before), "nothing that was finished is made again"
    assert report.made + report.skipped == 12
    generate_dataset(table, tmp_path / "whole", format=form, shard_size=3, threads=THREADS)
    whole, mended = ({p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
                     for folder in (tmp_path / "whole", out))  # fmt: skip
    assert whole == mended
    assert sorted(path.name for path in work.iterdir()) == ["dataset.json", "lock"]


def finished(out):
    """Rows whose images a run that stopped here would keep."""
    index = out / "index.jsonl"
    rows = {json.loads(line)["row"] for line in index.read_text().splitlines()} if index.exists() else set()
    return rows | {int(path.stem[:8]) for path in out.rglob("*-*.png") if not path.name.startswith(".")}

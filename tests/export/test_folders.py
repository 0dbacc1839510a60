"""A converted folder appears complete or not at all, and replaces nothing but an empty folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.wide import wide_state
from zimage_core import BadFile, convert_file


class Stopped(Exception):
    """What ends a conversion at its first step."""


def stop(done, total, name):
    raise Stopped


def assert_whole(folder: Path) -> None:
    found = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in wide_state().items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in wide_state().items())
    assert (folder / "config.json").exists()


def test_an_empty_folder_is_taken_and_survives_a_failure(wide, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Stopped):
        convert_file(wide, out, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not any(out.iterdir())
    convert_file(wide, out)
    assert_whole(out)


@pytest.mark.parametrize("place", [".", "mount", "here", "link", "file", "none/out", "a\0b"])
def test_a_place_that_no_folder_can_take_is_told_in_a_sentence(wide, tmp_path, monkeypatch, place):
    (tmp_path / "here").mkdir()
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to("mount")
    (tmp_path / "file").write_bytes(b"precious")
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mount")
    monkeypatch.chdir(tmp_path / "here")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(BadFile):
        convert_file(wide, place if place == "." else tmp_path / place, "diffusers", progress=stop)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_two_conversions_to_one_folder_do_not_touch_each_other(wide, tmp_path):
    """The second one starts and ends while the first one writes; the first to finish has the name."""
    started = []

    def meanwhile(done, total, name):
        if not started:
            started.append(True)
            with pytest.raises(Stopped):
                convert_file(wide, tmp_path / "out", progress=stop)

    convert_file(wide, tmp_path / "out", progress=meanwhile)
    assert started
    assert_whole(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(wide, tmp_path):
    def meanwhile(done, total, name):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "precious").write_text("x")

    with pytest.raises(BadFile, match="could not be written"):
        convert_file(wide, tmp_path / "out", progress=meanwhile)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "precious"]

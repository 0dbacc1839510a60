"""Name, size and hash are those of the file that was opened, even if its path holds another by now."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import tiny
from zimage_core.errors import BadFile
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights import source
from zimage_core.weights.opened import open_weights


def write(path, value=0.0):
    save_file({"w": torch.full((8,), value)}, path)
    return path


def test_small_files_are_hashed_whole(tmp_path):
    path = write(tmp_path / "x.safetensors")
    with open_weights(path) as file:
        assert file.identity() == {
            "name": "x.safetensors",
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }


def test_large_files_get_a_fingerprint_unless_the_hash_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "WHOLE_FILE", 16)
    monkeypatch.setattr(source, "_SAMPLE", 64)
    seen = set()
    for value in (0.0, 1.0):
        path = write(tmp_path / f"{value}.safetensors", value)
        with open_weights(path) as file:
            assert set(file.identity()) == {"name", "size", "fingerprint"}
            assert file.identity(full=True)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            seen.add(file.identity()["fingerprint"])
    assert len(seen) == 2


def test_a_model_in_shards_is_known_by_all_of_them(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "m-1.safetensors"}}))
    shard = write(tmp_path / "m-1.safetensors")
    with open_weights(index) as file:
        first = file.identity()
    assert first["name"] == index.name
    assert first["size"] == index.stat().st_size + shard.stat().st_size
    write(shard, 2.0)
    with open_weights(index) as file:
        assert file.identity()["sha256"] != first["sha256"]


def test_a_file_written_to_since_is_refused(tmp_path):
    path = write(tmp_path / "x.safetensors")
    with open_weights(path) as file:
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(BadFile, match="changed while in use"):
            file.identity()


def test_a_run_after_the_folder_was_deleted_tells_of_what_was_opened(tmp_path):
    folder = tiny.folder(tmp_path / "model")
    pipe = ZImagePipeline.from_pretrained(folder)
    want = {name: file.identity(full=True) for name, file in pipe.files().items()}
    before = pipe("a", seed=1, num_inference_steps=1)
    shutil.rmtree(folder)
    result = pipe("a", seed=1, num_inference_steps=1)
    assert result.files == before.files == want
    assert result.metadata(full_hash=True)["files"] == want
    result.save(tmp_path / "after.png")


def test_a_run_after_a_file_was_replaced_tells_of_what_was_opened(tmp_path):
    folder = tiny.folder(tmp_path / "model")
    pipe = ZImagePipeline.from_pretrained(folder)
    want = pipe("a", seed=1, num_inference_steps=1).files["vae"]
    for path in (folder / "vae").glob("*.safetensors"):
        path.unlink()
        write(path)
    assert pipe("a", seed=1, num_inference_steps=1).files["vae"] == want

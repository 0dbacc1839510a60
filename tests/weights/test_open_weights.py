"""Other files are recognised by their content, never by their name, and refused in one sentence."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.gguf_writer import write_gguf
from zimage_core.errors import BadArgument, BadFile
from zimage_core.weights import source as source_module
from zimage_core.weights.gguf import GGUFFile
from zimage_core.weights.opened import open_weights
from zimage_core.weights.safetensors import SafetensorsFile
from zimage_core.weights.source import Source

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 3858800000\n"
CONTENTS = {
    "the file is empty (0 bytes); download it again": b"",
    "truncated: 1 bytes": b"G",
    "truncated: 3 bytes": b"GGU",
    "truncated: 4 bytes, a GGUF header has at least 24; download it again": b"GGUF",
    "starts with 512 zero bytes, no magic: an unfinished download; download it again": bytes(65536),
    "magic b'\\x93\\xcd\\x01\\xff\\xee\\xee\\xee\\xee' is neither": b"\x93\xcd\x01\xff" + b"\xee" * 60,
    "a Git LFS pointer, not the file itself": LFS,
    "not a GGUF or safetensors file; fetch it with `git lfs pull`": LFS,
    "an HTML page, not a model": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    "an HTML page": b"\n\n  <HTML><body>Access to model is restricted</body></html>",
    "an XML page": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "a zip archive (a PyTorch checkpoint is one, and holds a pickle)": b"PK\x03\x04" + bytes(60),
    "a pickle, which could run code and is never opened": b"\x80\x02cposix\nsystem\n(S'touch x'\ntR."
    + bytes(32),
    "a gzip archive, not a GGUF or safetensors file; unpack it": b"\x1f\x8b\x08\x00" + b"\1" * 60,
    "a PNG image": b"\x89PNG\r\n\x1a\n" + bytes(60),
    "a JPEG image": b"\xff\xd8\xff\xe0" + bytes(60),
    "an ELF program": b"\x7fELF\x02\x01\x01" + bytes(60),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(60),
    "a NumPy array": b"\x93NUMPY\1\0v\0{'descr'" + bytes(60),
    "a script": b"#!/bin/sh\nrm -rf /\n",
    "a legacy ggml model (magic ggjt)": b"ggjt" + bytes(60),
    "a legacy ggml model (magic lmgg)": b"lmgg" + bytes(60),
    "a legacy ggml adapter (magic GGLA)": b"GGLA" + bytes(60),
    "its bytes swapped (magic FUGG)": b"FUGG" + bytes(60),
    "not an index of shards: no weight_map": b'{"error": "not found"}',
}


@pytest.mark.parametrize("sentence", CONTENTS, ids=lambda s: s[:30])
def test_each_kind_of_wrong_file_is_named(tmp_path, sentence):
    path = tmp_path / "z_image_turbo-Q4_K_M.gguf"
    path.write_bytes(CONTENTS[sentence])
    with pytest.raises(BadFile) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert sentence in message
    assert message.isprintable()


@pytest.fixture
def models(tmp_path):
    write_gguf(tmp_path / "a", {"w": np.ones((2, 4), np.float32)}, {"general.architecture": "lumina2"})
    save_file({"w": torch.ones(2, 4)}, tmp_path / "b")
    return tmp_path


def test_the_name_of_a_file_says_nothing(models):
    (models / "a").rename(models / "a.safetensors")
    (models / "b").rename(models / "b.ckpt")
    with open_weights(models / "a.safetensors") as file:
        assert isinstance(file, GGUFFile)
        assert file.kind == "gguf"
    with open_weights(str(models / "b.ckpt")) as file:
        assert isinstance(file, SafetensorsFile)
        assert file.kind == "safetensors"


def test_a_file_is_opened_once_so_a_replacement_changes_nothing(models, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest))
    source = Source(models / "a")
    (models / "other").write_bytes(b"not a model any more" * 100)
    (models / "other").replace(models / "a")
    with open_weights(source) as file:
        assert (file.tensor("w").dequantize() == 1).all()
        file.check_unchanged()
    open_weights(models / "b").close()
    assert opened == [str(models / "a"), str(models / "b")]


def test_a_source_is_closed_when_its_content_is_refused(models):
    source = Source(models / "a")
    os.truncate(models / "a", 50)
    with pytest.raises(BadFile, match="truncated"):
        open_weights(source)
    with pytest.raises(BadArgument, match="was closed"):
        source.read_at(0, 1)


def test_a_folder_with_one_model_stands_for_it(models):
    with pytest.raises(BadFile, match=r"a directory without model file: no \*\.safetensors\.index\.json"):
        open_weights(models)
    (models / "a").rename(models / "a.gguf")
    with open_weights(models) as file:
        assert file.path == str(models / "a.gguf")
    write_gguf(models / "b.gguf", {"w": np.ones(4, np.float32)})
    with pytest.raises(BadFile, match=r"a directory with 2 models: a\.gguf, b\.gguf; name one of them"):
        open_weights(models)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (os.mkfifo, "a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "a character device, not a regular file"),
        (lambda path: path.symlink_to(path.name), "a loop of symbolic links"),
        (
            lambda path: path.symlink_to("nothing"),
            "symbolic link whose target 'nothing' is missing.*; download it again",
        ),
        (lambda path: None, "no such file; check the path"),
    ],
    ids=["fifo", "device", "loop", "dangling", "missing"],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make, fault):
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(BadFile, match=fault):
        open_weights(path)  # a FIFO that waited for a writer would never come back


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's address has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(BadFile, match="s: a socket, not a regular file"):
            open_weights("s")


def test_odd_paths(tmp_path):
    with pytest.raises(BadFile, match="the path holds a NUL character"):
        open_weights("a\0b")
    with pytest.raises(BadFile, match="the name is too long"):
        open_weights(tmp_path / ("n" * 300))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(BadFile, match="part of the path is not a directory"):
        open_weights(tmp_path / "file" / "model.gguf")
    odd = tmp_path / "a\n\x1b[2J.gguf"
    odd.write_bytes(LFS)
    with pytest.raises(BadFile) as caught:
        open_weights(odd)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(models):
    (models / "a").chmod(0)
    with pytest.raises(BadFile, match="no permission to read it; allow it with `chmod u\\+r`"):
        open_weights(models / "a")


def test_an_input_error_is_named(models, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    with open_weights(models / "a", mmap=False) as file:
        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(BadFile, match=r"cannot be read at byte \d+: Input/output error"):
            file.tensor("w")


def test_short_reads_are_put_together(models, monkeypatch):
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, offset: read(fd, [parts[0][:3]], offset))
    with open_weights(models / "a", mmap=False) as file:
        assert (file.tensor("w").dequantize() == 1).all()


def test_a_map_that_the_system_refuses_names_the_way_round(models, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(source_module.mmap_module, "mmap", fails)
    with (
        open_weights(models / "a") as file,
        pytest.raises(BadFile, match="cannot be mapped into memory: Cannot allocate memory; try mmap=False"),
    ):
        file.tensor("w")


def test_other_systems_map_copy_on_write_too(models, monkeypatch):
    monkeypatch.setattr(source_module, "_NO_RESERVE", 0)
    before = (models / "a").read_bytes()
    with open_weights(models / "a") as file:
        file.tensor("w").packed.zero_()
        assert not file.tensor("w").dequantize().any()
    assert (models / "a").read_bytes() == before
    with pytest.raises(BadArgument, match="was closed"):
        file.tensor("w")


def test_a_folder_that_cannot_be_listed_is_named(models, monkeypatch):
    def fails(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(BadFile, match="a directory that cannot be read: permission denied"):
        open_weights(models)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "HTML page"),
    ],
)
def test_a_shard_that_is_something_else_is_named(tmp_path, start, words):
    (tmp_path / "m-1.safetensors").write_bytes(start + b" " * 80)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "m-1.safetensors"}}')
    with pytest.raises(BadFile, match=words):
        open_weights(index)

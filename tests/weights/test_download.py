"""A download that is not whole is told: parts, unfinished files, bytes left over, holes, missing targets."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import zeros

from tests.helpers.gguf_writer import GGUFWriter, write_gguf
from tests.helpers.model_files import TOY_DIT, stored, write_json
from tests.helpers.model_files import write_gguf as write_model
from zimage_core.assets import NANO
from zimage_core.errors import BadArgument, BadFile
from zimage_core.files.untrusted import read_text
from zimage_core.run.sources import find
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights import names
from zimage_core.weights.components import open_component
from zimage_core.weights.download import zeros_allowed
from zimage_core.weights.identify import identify
from zimage_core.weights.inspection import inspect_file
from zimage_core.weights.load import load_transformer, load_vae
from zimage_core.weights.opened import open_weights

RNG = np.random.default_rng(0)
SOUND = GGUFWriter().tensor("a.weight", RNG.normal(size=(64, 64)).astype(np.float32)).build()


@pytest.fixture
def model(tmp_path):
    """A small transformer in a file of its own."""
    shapes = names.checkpoint_shapes(names.transformer_table(TOY_DIT, "fused"))
    return write_model(tmp_path / "z.gguf", stored(shapes, "Q8_0"))


def refusal(path):
    with pytest.raises(BadFile) as caught:
        open_weights(path)
    return str(caught.value)


# --- parts ---------------------------------------------------------------------------------

PARTS = [
    ("z.gguf.part1of2", "z.gguf.part2of2"),
    ("z.gguf.part-0", "z.gguf.part-1"),
    ("z.gguf.part1", "z.gguf.part2"),
    ("z.gguf.partaa", "z.gguf.partab"),
    ("z.gguf-split-a", "z.gguf-split-b"),
    ("z.gguf.001", "z.gguf.002"),
    ("z.gguf.1", "z.gguf.2"),
    ("z.gguf.aa", "z.gguf.ab"),
    ("z.ggufaa", "z.ggufab"),
    ("z-part1.gguf", "z-part2.gguf"),
    ("z.gguf.chunk_00", "z.gguf.chunk_01"),
    ("Z.GGUF.PART1", "Z.GGUF.PART2"),
]


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: parts[0])
def test_parts_name_the_command_that_joins_them(tmp_path, parts):
    for part, content in zip(parts, (SOUND[:9000], SOUND[9000:]), strict=True):
        (tmp_path / part).write_bytes(content)
    for part in parts:
        text = refusal(tmp_path / part)
        assert "one part of a file" in text
        command = text.split("`")[1]
        assert command.startswith(f"cat {' '.join(parts)} > z") or parts[0].isupper()
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    with open_weights(tmp_path / command.split("> ")[1]) as file:
        assert set(file.tensors) == {"a.weight"}


def test_parts_come_in_the_order_of_their_numbers_and_gaps_are_told(tmp_path):
    for number in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9):
        (tmp_path / f"z.gguf.part{number}").write_bytes(b"\xd7\xbc|\xbd(<\x1c<")
    for other in ("z.gguf.partaa", "y.gguf.part3", "z.gguf.part001", "z.gguf.part"):
        (tmp_path / other).write_bytes(b"\xd7")
    text = refusal(tmp_path / "z.gguf.part2")
    assert f"cat {' '.join(f'z.gguf.part{n}' for n in range(1, 11))} > z.gguf`" in text
    (tmp_path / "z.gguf.part4").unlink()
    assert "download all, then join them in order: `cat PARTS > z.gguf`" in refusal(tmp_path / "z.gguf.part2")
    assert "no other part is in its folder" in refusal(tmp_path / "z.gguf.part001")


def test_a_name_like_a_parts_is_no_fault(tmp_path):
    path = tmp_path / "z.gguf.part1of2"
    path.write_bytes(SOUND)
    with open_weights(path) as file:
        assert file.cautions == ()
    for name in ("z-party.gguf", "z.parts.gguf", "z-split-files.gguf", "z.bak", "v1.2", "z.tar"):
        (tmp_path / name).write_bytes(SOUND[:9000])
        assert "truncated" in refusal(tmp_path / name)
    # wget's name of a second download, and a part of llama-gguf-split with a header of its own
    (tmp_path / "y.gguf.1").write_bytes(SOUND[:9000])
    assert "truncated" in refusal(tmp_path / "y.gguf.1")
    for number in "12":  # shards with an error of their own
        shard = tmp_path / f"m-0000{number}-of-00002.safetensors"
        save_file({"a": zeros(4)}, shard)
    assert "shard 2 of 2" in refusal(shard)
    shard.write_bytes(shard.read_bytes() + b"x")
    assert "1 bytes after the last tensor" in refusal(shard)
    split = GGUFWriter().key("split.count", 3, "u16").key("split.no", 1, "u16")
    split.write(tmp_path / "q-00002-of-00003.gguf")
    assert "`llama-gguf-split --merge q-00001-of-00003.gguf OUT.gguf`" in refusal(
        tmp_path / "q-00002-of-00003.gguf"
    )


def test_names_of_parts_cannot_forge_a_command(tmp_path):
    for number in "12":
        (tmp_path / f"a; rm -rf $HOME\x1b[2J.gguf.part{number}").write_bytes(b"\xd7\xbc|\xbd(<\x1c<")
    text = refusal(tmp_path / "a; rm -rf $HOME\x1b[2J.gguf.part1")
    assert "\x1b" not in text
    assert "'a; rm -rf $HOME" in text


# --- unfinished ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".part", ".crdownload", ".incomplete", ".tmp", ".!qB", ".aria2"])
def test_an_unfinished_download_is_told_by_its_name(tmp_path, ending):
    path = tmp_path / f"z.gguf{ending}"
    path.write_bytes(SOUND[:9000])
    assert "let the download finish, or start it again" in refusal(path)


def test_a_file_that_aria2_still_writes_is_told(tmp_path, model):
    shutil.copy(model, tmp_path / "y.gguf")
    (tmp_path / "y.gguf.aria2").write_bytes(b"\0\1")
    with pytest.warns(UserWarning, match="aria2's control file lies beside it"):
        load_transformer(tmp_path / "y.gguf")
    assert any("aria2" in note for note in inspect_file(tmp_path / "y.gguf").notes)
    (tmp_path / "y.gguf").write_bytes(SOUND[:9000])
    assert "aria2's control file" in refusal(tmp_path / "y.gguf")


def test_a_link_of_a_cache_without_its_blob_is_told(tmp_path):
    snapshot = tmp_path / "snapshots/abc/vae"
    snapshot.mkdir(parents=True)
    (snapshot / "diffusion_pytorch_model.safetensors").symlink_to("../../../blobs/123")
    wanted = r"a symbolic link whose target '../../../blobs/123' is missing.*download it again"
    for path in (snapshot / "diffusion_pytorch_model.safetensors", snapshot):
        with pytest.raises(BadFile, match=wanted):
            load_vae(path)
        with pytest.raises(BadFile, match=wanted):
            inspect_file(path)
    (snapshot / "tokenizer.json").symlink_to("../../../blobs/456")
    with pytest.raises(BadFile, match="blobs/456' is missing"):
        read_text(snapshot / "tokenizer.json")
    # a config that was not downloaded is not the same as none
    shutil.copy(NANO / "vae.safetensors", tmp_path / "snapshots/abc/vae/v.safetensors")
    (snapshot / "diffusion_pytorch_model.safetensors").unlink()
    (snapshot / "config.json").symlink_to("../../../blobs/789")
    with pytest.raises(BadFile, match=r"config\.json: not a JSON object"):
        open_component(snapshot, "vae")


def test_texts_of_a_cache_without_their_blobs_are_told(tmp_path):
    """None of them counts as a file that the model never had."""
    for folder, name in (("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).symlink_to("../../blobs/1")
    with pytest.raises(BadFile, match=r"tokenizer\.json: .*blobs/1' is missing"):
        Tokenizer.from_folder(tmp_path / "tokenizer")
    with pytest.raises(BadFile, match=r"tokenizer\.json: .*blobs/1' is missing"):
        inspect_file(tmp_path / "tokenizer")
    for name in ("transformer.gguf", "text_encoder.gguf", "vae.safetensors"):
        (tmp_path / name).symlink_to(NANO / name)
    with pytest.raises(BadFile, match=r"scheduler_config\.json: .*blobs/1' is missing"):
        find(tmp_path)
    (tmp_path / "model_index.json").symlink_to("../../blobs/2")
    with pytest.raises(BadFile, match=r"model_index\.json: .*blobs/2' is missing"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [("z.gguf.part1of2", "z.gguf.part1of2, one part"), ("z.safetensors.crdownload", "has not finished")],
)
def test_a_folder_tells_what_lies_there_instead(tmp_path, name, words):
    (tmp_path / name).write_bytes(SOUND[:9000])
    for function in (open_weights, inspect_file, load_vae):
        with pytest.raises(BadFile, match=words):
            function(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Access to model x/y is restricted.\nPlease log in.", "a text, not a model.*restricted"),
        ("Zugriff auf dieses Modell ist nicht erlaubt: ü".encode(), "a text, not a model"),
        (b"Entry not found", "a text, not a model.*'Entry not found'"),
        (b'{"error": "Invalid credentials"}', "an error message that a download saved"),
        (b"PK\x07\x08PK\x03\x04" + bytes(60), "zip archive in parts"),
        (b"z.gguf" + bytes(94) + b"0000644\0" + bytes(149) + b"ustar\0" + bytes(300), "a tar archive"),
    ],
)
def test_what_a_server_sent_instead_is_named(tmp_path, content, words):
    path = tmp_path / "z.gguf"
    path.write_bytes(content)
    with pytest.raises(BadFile, match=words):
        open_weights(path)


# --- bytes behind ------------------------------------------------------------------------------


def test_many_bytes_behind_the_last_tensor_are_a_caution_and_few_a_note(model):
    whole = model.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*assumed")
        load_transformer(model)
        for few in (bytes(100), b"x" * 4096):
            model.write_bytes(whole + few)
            load_transformer(model)
            assert any("behind the last tensor" in note for note in inspect_file(model).notes)
    model.write_bytes(whole + whole[:50_000])
    with pytest.warns(UserWarning, match="50 kB lie behind the last tensor.*download it again"):
        load_transformer(model)
    model.write_bytes(whole[: len(whole) * 2 // 5] + whole)
    assert any("behind the last tensor" in note for note in inspect_file(model).notes)


def test_padding_to_the_alignment_is_no_remark(tmp_path):
    padded = GGUFWriter(alignment=4096).tensor("a", np.ones(3, np.float32))
    path = tmp_path / "a.gguf"
    path.write_bytes(padded.build() + bytes(4084))
    with open_weights(path) as file:
        assert (file.notes, file.cautions) == ((), ())


def test_bytes_behind_a_safetensors_file_are_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": zeros(4)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + whole)
    refusal(path)
    path.write_bytes(whole + whole[:5])
    assert "5 bytes after the last tensor" in refusal(path)


# --- holes --------------------------------------------------------------------------------------


def with_hole(path, start, nbytes):
    """Make a stretch of the file one that the disk does not hold; skips where it cannot have one."""
    content = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        file.write(content[:start])
        file.seek(start + nbytes)
        file.write(content[start + nbytes :])
    if not hasattr(os, "SEEK_HOLE"):
        pytest.skip("this system does not tell holes")
    with path.open("rb") as file:
        if os.lseek(file.fileno(), start, os.SEEK_HOLE) >= start + nbytes:
            pytest.skip("this file system has no holes")


def test_a_stretch_that_was_never_written_is_a_caution(model):
    with open_weights(model) as file:
        info = file.tensors["layers.0.feed_forward.w1.weight"]
        assert file.cautions == ()
    with_hole(model, -(-info.offset // 4096) * 4096, 1 << 16)
    with pytest.warns(
        UserWarning, match=r"65.5 kB of 1 tensors were never written .*layers\.0\.feed_forward"
    ):
        load_transformer(model)
    assert any("never written" in note for note in inspect_file(model).notes)


def test_a_hole_where_zeros_may_be_is_none(tmp_path):
    """Copies made with holes leave them out of pad tokens and of rows of tokens that were never trained."""
    rows = RNG.normal(size=(4096, 64)).astype(np.float32)
    path = write_gguf(tmp_path / "a.gguf", {"pad": rows.ravel(), "token_embd.weight": rows})
    with open_weights(path) as file:
        pad, table = file.tensors.values()
    with_hole(path, -(-pad.offset // 4096) * 4096, 1 << 19)
    with_hole(path, -(-table.offset // 4096) * 4096, 1 << 17)
    with open_weights(path) as file:
        assert file.source.holes(0, file.size)
        assert file.cautions == ()


def test_zeros_are_allowed_where_a_sound_model_has_them(tmp_path):
    tensors = {
        "layers.0.w": np.ones((512, 512), np.float32),
        "model.diffusion_model.layers.0.w": np.ones((512, 512), np.float32),
        "x.diff": np.ones((512, 512), np.float32),
        "layers.0.bias": np.ones(1 << 18, np.float32),
        "x_pad_token": np.ones((1, 1 << 16), np.float32),
        "small": np.ones((16, 16), np.float32),
        "control_layers.0.after_proj.weight": np.ones((512, 512), np.float32),
        "x.lora_B.weight": np.ones((512, 512), np.float32),
        "token_embd.weight": np.ones((4096, 64), np.float32),
    }
    with open_weights(write_gguf(tmp_path / "a.gguf", tensors)) as file:
        allowed = {name: zeros_allowed(info) / info.nbytes for name, info in file.tensors.items()}
    checked = {name for name, share in allowed.items() if share < 1}
    assert checked == {"layers.0.w", "model.diffusion_model.layers.0.w", "token_embd.weight"}
    assert allowed["token_embd.weight"] == 1 / 4
    assert allowed["layers.0.w"] == 65535 / (512 * 512 * 4)


# --- paths that are none ------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, 3, b"x.gguf", ""])
@pytest.mark.parametrize("function", [open_weights, inspect_file, load_vae, open_component])
def test_a_path_that_is_none_is_refused_in_one_sentence(function, path):
    with pytest.raises(BadArgument, match=r"^a path is .*, wanted "):
        function(path)


def test_remarks_are_made_once_for_all_who_identify_the_file(model):
    model.write_bytes(model.read_bytes() + bytes(5000))
    with open_weights(model) as file:
        assert len(file.cautions) == 1
        assert identify(file).cautions[-1:] == file.cautions
    write_json(model.parent / "config.json", {"_class_name": "Other"})
    with open_component(model, "transformer").file as file:
        assert len(file.cautions) == 1

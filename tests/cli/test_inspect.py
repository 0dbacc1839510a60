"""`zimage inspect` says what a file is in its own words, never in the file's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import tiny
from tests.helpers.tree import ROOT
from zimage_core.errors import BadFile
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.inspection import inspect_file
from zimage_core.weights.load import load_vae


def test_a_folder_of_all_parts_lacks_nothing(zimage, model):
    outcome = zimage("inspect", model)
    assert outcome.status == 0
    assert "all parts of a Z-Image pipeline" in outcome.out
    assert "nothing is missing" in outcome.out


@pytest.mark.parametrize(
    ("part", "kind", "needs"),
    [
        ("transformer", "transformer", {"text_encoder", "vae", "tokenizer"}),
        ("text_encoder", "text_encoder", {"transformer", "vae"}),
        ("vae", "vae", {"transformer", "text_encoder", "tokenizer"}),
        ("tokenizer", "tokenizer", {"transformer", "text_encoder", "vae"}),
    ],
)
def test_a_part_says_what_else_it_takes(model, part, kind, needs):
    found = inspect_file(model / part)
    (inside,) = found.parts
    assert inside.kind == kind
    assert set(inside.needs) == needs


def test_types_are_counted_with_their_bytes(model):
    (found,) = inspect_file(model / "vae").parts
    (entry,) = found.types
    assert entry.format == "F32"
    assert entry.tensors == len(found.tensors)
    assert entry.nbytes == 4 * entry.weights == sum(nbytes for *_, nbytes in found.tensors.values())


def test_config_beside_the_tensors_is_used(model):
    """Shapes alone would assume 8 groups."""
    (found,) = inspect_file(model / "vae").parts
    assert found.config["norm_num_groups"] == 4


def test_tensors_are_listed_on_demand(zimage, model):
    file = next((model / "transformer").glob("*.safetensors"))
    assert "layers.0.attention.to_q.weight" not in zimage("inspect", file).out
    lines = zimage("inspect", file, "--tensors").out.splitlines()
    (line,) = [line for line in lines if "layers.0.attention.to_q.weight" in line]
    assert line.split()[1:] == ["F32", "[32,", "32]", "4.1", "kB"]


def test_json_is_one_object_for_one_file_and_a_list_for_two(zimage, model):
    file = next((model / "vae").glob("*.safetensors"))
    single = json.loads(zimage("inspect", "--json", file).out)
    assert single["kind"] == "vae"
    assert "tensors" not in single
    double = json.loads(zimage("inspect", "--json", "--tensors", file, model).out)
    assert [item["kind"] for item in double] == ["vae", "pipeline"]
    assert double[0]["tensors"]["decoder.conv_in.weight"] == ["F32", [16, 16, 3, 3], 9216]


def test_one_bad_file_does_not_hide_the_others(zimage, model, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\3\0\0\0")
    outcome = zimage("inspect", bad, model / "vae")
    assert outcome.status == 1
    assert str(bad) in outcome.error
    assert "Flux-style VAE" in outcome.out


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("page.gguf", b"<!DOCTYPE html><html>Sign in</html>", "HTML"),
        ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "LFS"),
        ("archive.ckpt", b"PK\x03\x04" + bytes(100), "zip"),
        ("empty.gguf", b"", "empty"),
        ("zeros.gguf", bytes(5000), "zero bytes"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "longer than the file"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "Unigram"),
        ("tokenizer.json", b"[]", "object"),
        ("x.json", b'{"foo": [1]}', "JSON without any field of a tokenizer.json; it has foo"),
        ("tokenizer.json", b"hello", "JSON"),
    ],
)
def test_what_is_not_a_model_is_named(zimage, tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    outcome = zimage("inspect", tmp_path / name)
    assert outcome.status == 1
    assert name in outcome.error
    assert what in outcome.error


def test_a_folder_without_models_is_named(zimage, tmp_path):
    assert "directory without model files" in zimage("inspect", tmp_path).error
    assert zimage("inspect", tmp_path / "absent.gguf").status == 1


def test_a_file_name_cannot_forge_output(zimage, tmp_path):
    evil = tmp_path / "a\nerror: fake\x1b[31m.gguf"
    outcome = zimage("inspect", evil)
    assert "\x1b" not in outcome.error
    evil.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    shown = zimage("inspect", evil).out
    assert "\x1b" not in shown
    assert not [line for line in shown.splitlines() if line.startswith("error: fake")]


def test_parts_that_do_not_belong_together_are_told(model, tmp_path):
    from safetensors.torch import save_file

    from tests.helpers import tiny
    from zimage_core.config import TextEncoderConfig
    from zimage_core.models.text_encoder import TextEncoder

    for part in ("transformer", "vae", "tokenizer"):
        (tmp_path / part).symlink_to(model / part)
    config = {**tiny.TEXT_ENCODER, "hidden_size": 40}
    state = TextEncoder(TextEncoderConfig.from_json(config)).state_dict()
    last = {n.replace("layers.0.", "layers.2."): t for n, t in state.items() if n.startswith("layers.0.")}
    (tmp_path / "text_encoder").mkdir()
    save_file(
        {f"model.{n}": t.clone() for n, t in (state | last).items()}, tmp_path / "text_encoder/m.safetensors"
    )
    tiny.write_json(tmp_path / "text_encoder" / "config.json", config)
    found = inspect_file(tmp_path)
    assert found.kind == "collection"
    assert "width 40" in found.problem
    assert "width 24" in found.problem


def test_full_reads_the_data_and_warns(zimage, tmp_path):
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "bad.safetensors"
    save_file({"a": torch.tensor([1.0, float("nan")]), "b": torch.tensor([1e6]), "c": torch.ones(3)}, file)
    assert "warning" not in zimage("inspect", file).out
    outcome = zimage("inspect", "--full", file)
    assert outcome.status == 0
    warnings = [line for line in outcome.out.splitlines() if line.startswith("  warning")]
    assert len(warnings) == 2
    assert "NaN" in warnings[0]
    assert "float16" in warnings[1]
    assert "all data was read: see the warnings" in outcome.out
    save_file({"c": torch.ones(3)}, file)
    assert "all data was read: no NaN, no infinity" in zimage("inspect", "--full", file).out


@pytest.mark.parametrize("name", ["a.imatrix", "a.dat"])
def test_an_importance_matrix_is_named(zimage, tmp_path, name):
    import torch

    from zimage_core.quantize.imatrix import Imatrix, write_imatrix
    from zimage_core.quantize.imatrix_files import Sums

    sums = Sums(torch.ones(64, dtype=torch.float64), 7)
    write_imatrix(tmp_path / name, Imatrix({"blk.0.attn_q.weight": sums, "blk.0.attn_k.weight": sums}))
    outcome = zimage("inspect", tmp_path / name)
    assert outcome.status == 0
    assert "an importance matrix of 2 weight matrices" in outcome.out
    assert "zimage quantize --imatrix" in outcome.out
    assert "to run" not in outcome.out
    with pytest.raises(BadFile, match="an importance matrix"):
        load_vae(tmp_path / name)


def test_settings_of_a_image_come_back(zimage, model, tmp_path):
    target = tmp_path / "a.png"
    zimage("generate", "a\x1b[31m red", "--model", model, "-W", 32, "-H", 32, "--seed", 4, "-o", target)
    shown = zimage("inspect", target).out
    assert "Seed: 4" in shown
    assert "\x1b" not in shown
    data = json.loads(zimage("inspect", "--json", target).out)
    assert data["metadata"]["zimage"]["prompt"] == "a\x1b[31m red"


def test_headers_are_read_without_torch_and_numpy(model):
    """That is what makes it start at once; the time itself is not asserted, machines are busy."""
    code = (
        "import sys; from zimage_core.weights.inspection import inspect_file; "
        "inspect_file(sys.argv[1]); print(' '.join(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, model], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {"torch", "numpy", "PIL", "tokenizers", "gguf", "safetensors"} & set(run.stdout.split())


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(BadFile, match="NUL"):
        inspect_file("a\0b")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(BadFile, match="loop"):
        inspect_file(loop)


def test_a_loose_file_beside_an_index_is_seen(zimage, model, tmp_path):
    source = model / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(source)
    names = sorted(state)
    half = len(names) // 2
    where = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        shard = f"m-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / shard)
        where |= dict.fromkeys(part, shard)
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    shutil.copy(model / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "ae.safetensors")
    found = json.loads(zimage("inspect", "--json", tmp_path).out)
    assert sorted(part["kind"] for part in found["parts"]) == ["transformer", "vae"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 0}', "a vocab.json"),
        ('{"model_type": "qwen3"}', "the config of a model"),
        ('{"_class_name": "ZImagePipeline"}', "the list of the parts of a pipeline"),
        ('{"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3}', "the config of a scheduler"),
        ('{"added_tokens_decoder": {}}', "a tokenizer_config.json"),
        ('{"error": "Repository not found"}', "an error message that a download saved"),
        ('{"nodes": [], "links": []}', "a workflow of ComfyUI"),
        ('{"kind": "zimage_core sensitivity 1", "costs": {}}', "costs of types, measured by"),
        ("# bits\n*.w2.weight [first 1/8] = Q6_K\n* = source\n", "a recipe of 2 rules"),
        ("#version: 0.2\na b\n", "a merges.txt"),
    ],
)
def test_what_lies_beside_models_is_named(zimage, tmp_path, text, words):
    (tmp_path / "x.json").write_text(text)
    outcome = zimage("inspect", tmp_path / "x.json")
    assert outcome.status == 0
    assert f"x.json: {words}" in outcome.out
    assert "to run" not in outcome.out
    if text.startswith("{"):
        with pytest.raises(BadFile, match=f"this is {words}.*, not a tokenizer.json"):
            Tokenizer.from_json(tmp_path / "x.json")


def test_a_tokenizer_that_a_run_refuses_is_missing(zimage, tmp_path):
    """inspect once called a folder whole whose tokenizer no run could read."""
    damages = {
        "merges.txt": lambda file: (file.unlink(), file.symlink_to("../../blobs/gone")),
        "vocab.json": lambda file: file.write_text("{}"),
        "tokenizer_config.json": lambda file: file.unlink(),
    }
    for name, damage in damages.items():
        model = tiny.folder(tmp_path / name)
        assert "nothing is missing" in zimage("inspect", model).out
        damage(model / "tokenizer" / name)
        outcome = zimage("inspect", model)
        assert "nothing is missing" not in outcome.out
        assert "problem" in outcome.out

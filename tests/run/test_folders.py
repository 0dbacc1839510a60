"""A folder means the same to every verb: what `inspect` calls whole is what a pipeline loads."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import tiny
from tests.helpers.gguf_writer import write_gguf
from zimage_core.cli.main import main
from zimage_core.errors import BadFile, ZImageError
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.memory.sizes import read_sizes
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.components import open_component, open_parts
from zimage_core.weights.inspection import inspect_file
from zimage_core.weights.load import load_transformer, load_vae
from zimage_core.weights.opened import open_weights

COMPONENTS = ("transformer", "text_encoder", "vae")
PREFIX = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "vae": "vae.",
}
FILE = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}

pytestmark = pytest.mark.filterwarnings("ignore:.*assumed")  # loose files lack the config of these odd sizes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("saved") / "m", shift=6.0)


@pytest.fixture(scope="module")
def states(saved):
    return {part: load_file(saved / part / f"{FILE[part]}.safetensors") for part in COMPONENTS}


def merged(states, *parts: str) -> dict[str, torch.Tensor]:
    return {PREFIX[part] + name: value for part in parts for name, value in states[part].items()}


@pytest.fixture
def beside(saved, tmp_path):
    """A folder with tokenizer and schedule, to which a test adds weights."""
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "m"))


def latents(source) -> torch.Tensor:
    """Latents of one step; read into memory, since the last bits of float32 sums depend on alignment."""
    pipe = (
        source if isinstance(source, ZImagePipeline) else ZImagePipeline.from_pretrained(source, mmap=False)
    )
    return pipe("a", height=32, width=32, seed=1, num_inference_steps=1, output_type="latent").images


@pytest.fixture(scope="module")
def want(saved):
    return latents(saved)


@pytest.fixture(scope="module")
def want_loose(states, saved, tmp_path_factory):
    """The image of loose files, which state no sizes of rotary axes and norm groups."""
    folder = tmp_path_factory.mktemp("loose")
    for part in COMPONENTS:
        save_file(merged(states, part), folder / f"{part}.safetensors")
    shutil.copytree(saved / "tokenizer", folder / "tokenizer")
    shutil.copytree(saved / "scheduler", folder / "scheduler")
    return latents(folder)


def half(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half() for name, value in values.items()}


def shards(folder: Path, state: dict[str, torch.Tensor], pattern: str, numbers=(1, 2)) -> None:
    """Two shards without an index, of which `numbers` are written."""
    names = sorted(state)
    for number in numbers:
        save_file({name: state[name] for name in names[number - 1 :: 2]}, folder / pattern.format(number))


# --- one file with several components


@pytest.mark.parametrize("name", ["all.safetensors", "ALL.SAFETENSORS", "all.sft", "all.gguf", "ALL.GGUF"])
def test_one_file_serves_every_component(beside, states, want_loose, name):
    everything = merged(states, *COMPONENTS)
    if name.lower().endswith("gguf"):  # as stable-diffusion.cpp writes it
        arrays = {key: value.numpy() for key, value in everything.items()}
        write_gguf(beside / name, arrays, {"general.architecture": "lumina2"})
    else:
        save_file(everything, beside / name)
    assert inspect_file(beside).kind == "pipeline"
    assert torch.equal(latents(beside), want_loose)
    assert torch.equal(latents(beside / name), want_loose)
    by_option = ZImagePipeline.from_files(**dict.fromkeys(COMPONENTS, beside / name))
    by_option.scheduler = ZImagePipeline.from_pretrained(beside).scheduler
    assert by_option.text_encoder.config.hidden_size == 24
    assert (
        read_sizes(open_parts(beside)).nbytes == read_sizes(dict.fromkeys(COMPONENTS, beside / name)).nbytes
    )


def test_a_component_in_a_file_of_its_own_comes_before_one_that_lies_beside_another(
    beside, states, want_loose
):
    wrong = {name: -value for name, value in states["vae"].items()}
    save_file(merged({**states, "vae": wrong}, "transformer", "vae"), beside / "baked.safetensors")
    save_file(merged(states, "vae"), beside / "ae.safetensors")
    save_file(merged(states, "text_encoder"), beside / "qwen.safetensors")
    with open_component(beside, "vae").file as file:
        assert Path(file.path).name == "ae.safetensors"
    assert torch.equal(latents(beside), want_loose)


def test_what_lies_beside_a_component_is_named_and_ignored(beside, states, want_loose):
    everything = merged(states, *COMPONENTS)
    for name in (
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "my.own.x",
    ):
        everything[name] = torch.ones(2, 2)
    save_file(everything, beside / "all.safetensors")
    with pytest.warns(
        UserWarning, match=r"1 tensors of the file belong to no part of Z-Image .*: my\.own\.x"
    ):
        assert torch.equal(latents(beside), want_loose)


def test_a_transformer_without_prefix_is_no_foreign_content_of_the_others(beside, states, want_loose):
    bare = {**states["transformer"], **merged(states, "vae")}
    save_file(
        bare | {f"cond_stage_model.{n}": v for n, v in states["text_encoder"].items()}, beside / "a.sft"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*belong to no part")
        assert torch.equal(latents(beside), want_loose)


def test_a_damaged_component_leaves_the_others_usable(beside, states):
    broken = {
        **states,
        "text_encoder": {n: v for n, v in states["text_encoder"].items() if "q_proj" not in n},
    }
    save_file(merged(broken, *COMPONENTS), beside / "all.safetensors")
    assert load_vae(beside / "all.safetensors").config.latent_channels == 16
    assert load_transformer(beside).config.dim == 32
    with pytest.raises(ZImageError):
        ZImagePipeline.from_pretrained(beside)
    found = inspect_file(beside)
    assert found.kind == "collection"
    assert any("text_encoder too, which cannot be used" in note for note in found.parts[-1].notes)


def test_a_language_model_with_a_vision_tower_is_another_model(states, tmp_path):
    names = {f"model.language_model.{n.removeprefix('model.')}": v for n, v in states["text_encoder"].items()}
    save_file(
        names | {"model.visual.blocks.0.attn.qkv.weight": torch.ones(2, 2)}, tmp_path / "vl.safetensors"
    )
    assert "vision-language" in open_component(tmp_path / "vl.safetensors", "text_encoder").card.title


def test_a_file_that_lacks_a_component_says_which(beside, states):
    save_file(merged(states, "transformer", "vae"), beside / "baked.safetensors")
    with pytest.raises(BadFile, match=r"is a Z-Image transformer .* without text encoder, and no folder"):
        ZImagePipeline.from_pretrained(beside / "baked.safetensors")


# --- variants and shards


def both_variants(folder: Path, state, name: str) -> None:
    save_file(half(state), folder / f"{name}.fp16.safetensors")


def variant_in_shards(folder: Path, state, name: str) -> None:
    shards(folder, half(state), f"{name}.fp16-0000{{}}-of-00002.safetensors")


def variant_in_shards_of_old_names(folder: Path, state, name: str) -> None:
    shards(folder, half(state), f"{name}-0000{{}}-of-00002.fp16.safetensors")


def variant_with_an_index(folder: Path, state, name: str) -> None:
    variant_in_shards(folder, state, name)
    where = {key: f"{name}.fp16-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(sorted(state))}
    (folder / f"{name}.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize(
    "add", [both_variants, variant_in_shards, variant_in_shards_of_old_names, variant_with_an_index]
)
def test_files_without_a_variant_count_unless_one_is_wished(copy, states, want, add: Callable[..., None]):
    for part in COMPONENTS:
        add(copy / part, states[part], FILE[part])
    assert inspect_file(copy).kind == "pipeline"
    assert torch.equal(latents(copy), want)
    pipe = ZImagePipeline.from_pretrained(copy, variant="fp16")
    assert "fp16" in pipe.files()["transformer"].path
    assert (latents(pipe) - want).abs().max() > 0


def test_a_variant_that_only_some_components_have(copy, states):
    both_variants(copy / "transformer", states["transformer"], FILE["transformer"])
    names = {
        part: Path(f.path).name
        for part, f in ZImagePipeline.from_pretrained(copy, variant="fp16").files().items()
    }
    assert names["transformer"] == "diffusion_pytorch_model.fp16.safetensors"
    assert names["vae"] == "diffusion_pytorch_model.safetensors"
    with pytest.raises(BadFile, match="no files of the variant 'bf16'; it has one without a variant, fp16"):
        ZImagePipeline.from_pretrained(copy, variant="bf16")


def test_a_folder_with_the_variant_alone(copy, states):
    for part in COMPONENTS:
        (copy / part / f"{FILE[part]}.safetensors").rename(copy / part / f"{FILE[part]}.fp16.safetensors")
    assert inspect_file(copy).kind == "pipeline"
    assert ZImagePipeline.from_pretrained(copy).transformer.config.dim == 32


@pytest.mark.parametrize(
    "pattern", ["diffusion_pytorch_model-0000{}-of-00002.safetensors", "z-0000{}-of-00002.SFT"]
)
def test_shards_without_an_index_are_one_model(copy, states, want, pattern):
    (copy / "transformer/diffusion_pytorch_model.safetensors").unlink()
    shards(copy / "transformer", states["transformer"], pattern)
    assert torch.equal(latents(copy), want)
    assert inspect_file(copy).kind == "pipeline"
    assert len(open_weights(copy / "transformer").sources) == 2
    identity = ZImagePipeline.from_pretrained(copy).files()["transformer"].identity()
    assert identity["size"] == sum(
        p.stat().st_size for p in (copy / "transformer").iterdir() if "-of-" in p.name
    )


def test_a_shard_that_is_missing_is_named(copy, states):
    (copy / "transformer/diffusion_pytorch_model.safetensors").unlink()
    shards(copy / "transformer", states["transformer"], "z-0000{}-of-00002.safetensors", numbers=(2,))
    with pytest.raises(
        BadFile, match=r"one of 2 shards, of which 1 are missing: z-00001-of-00002\.safetensors"
    ):
        load_transformer(copy)
    assert inspect_file(copy).kind == "collection"


def test_shards_that_hold_a_tensor_twice_are_refused(states, tmp_path):
    for number in (1, 2):
        save_file(states["vae"], tmp_path / f"m-0000{number}-of-00002.safetensors")
    with pytest.raises(BadFile, match="is in an earlier shard, too"):
        open_weights(tmp_path)


def test_diffusers_own_name_comes_before_a_guest_in_its_folder(copy, states, want):
    arrays = {name: value.numpy().astype(np.float32) for name, value in states["transformer"].items()}
    write_gguf(copy / "transformer" / "z.gguf", arrays, {"general.architecture": "lumina2"})
    save_file(states["transformer"], copy / "transformer" / "backup.safetensors")
    assert torch.equal(latents(copy), want)


# --- what inspect says is what a run finds


def broken_config(folder: Path) -> None:
    (folder / "transformer/config.json").write_text("{")


def other_pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


def two_transformers(folder: Path) -> None:
    for name in ("model_index.json", "transformer/config.json"):
        (folder / name).unlink()
    own = folder / "transformer/diffusion_pytorch_model.safetensors"
    shutil.copy(own, own.with_name("b.safetensors"))
    own.rename(own.with_name("a.safetensors"))


def no_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def cut_vae(folder: Path) -> None:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def no_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def damaged_index(folder: Path) -> None:
    own = folder / "transformer/diffusion_pytorch_model.safetensors"
    own.rename(own.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    own.with_name("diffusion_pytorch_model.safetensors.index.json").write_text("{}")


def linked(folder: Path) -> None:
    (folder / "vae").rename(folder.parent / "elsewhere")
    (folder / "vae").symlink_to(folder.parent / "elsewhere")


def loose(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    for part in COMPONENTS:
        (folder / part / f"{FILE[part]}.safetensors").rename(folder / f"{part}.safetensors")
        shutil.rmtree(folder / part)


def resource_forks(folder: Path) -> None:
    for part in COMPONENTS:
        (folder / part / f"._{FILE[part]}.safetensors").write_bytes(b"\0\5\x16\7Mac OS X")


def a_broken_file_beside(folder: Path) -> None:
    (folder / "old.gguf").write_bytes(b"GGUF\3\0\0\0")


CHANGES = [broken_config, other_pipeline, two_transformers, no_vae, cut_vae, no_tokenizer, damaged_index,
           linked, loose, resource_forks, a_broken_file_beside]  # fmt: skip
DRAWN = {linked, loose, resource_forks, a_broken_file_beside}


@pytest.mark.parametrize("change", CHANGES)
def test_inspect_calls_whole_what_a_pipeline_loads(copy, change):
    change(copy)
    try:
        ZImagePipeline.from_pretrained(copy)
        drawn = True
    except ZImageError:
        drawn = False
    found = inspect_file(copy)
    assert (found.kind == "pipeline") == drawn == (change in DRAWN)
    assert drawn or found.problem or found.needs


def test_a_component_is_found_whatever_else_the_folder_holds(copy):
    two_transformers(copy)
    assert load_vae(copy).config.latent_channels == 16
    chosen = copy / "transformer" / "a.safetensors"
    assert ZImagePipeline.from_pretrained(copy, transformer=chosen).transformer.config.dim == 32
    with pytest.raises(BadFile, match=r"has 2 files that are a Z-Image transformer: a\.safetensors, b\."):
        load_transformer(copy)


def test_any_component_of_a_folder_is_its_transformer(copy):
    assert open_component(copy).card.kind == "transformer"
    loose(copy)
    assert open_component(copy).card.kind == "transformer"
    (copy / "transformer.safetensors").unlink()
    (copy / "text_encoder.safetensors").unlink()
    assert open_component(copy).card.kind == "vae"


def test_a_component_below_a_folder_with_another_model_is_found(copy):
    loose(copy)
    (copy / "vae").mkdir()
    (copy / "sub").mkdir()
    (copy / "vae.safetensors").rename(copy / "sub" / "ae.safetensors")
    (copy / "text_encoder.safetensors").unlink()
    assert load_vae(copy).config.latent_channels == 16


@pytest.mark.parametrize("verb", ["plan", "convert", "quantize"])
def test_every_verb_takes_a_file_with_all_components_and_a_variant(copy, states, beside, verb, tmp_path):
    save_file(merged(states, *COMPONENTS), beside / "all.safetensors")
    for part in COMPONENTS:
        both_variants(copy / part, states[part], FILE[part])
    out = {
        "plan": (),
        "convert": (tmp_path / "o.safetensors",),
        "quantize": (tmp_path / "o.gguf", "--type", "Q8_0"),
    }
    for words in ((beside / "all.safetensors",), (copy, "--variant", "fp16")):
        force = () if verb == "plan" else ("--force", "--quiet")
        named = ("--model", *words) if verb == "plan" else (words[0], *out[verb], *words[1:])
        assert main([verb, *map(str, (*named, *force))]) == 0
    with pytest.raises(BadFile, match="no files of the variant 'bf8'"):
        Checkpoint(copy, variant="bf8")


def test_a_path_that_is_not_there_is_no_directory(tmp_path):
    with pytest.raises(BadFile, match="absent: no such file; check the path"):
        open_parts(tmp_path / "absent")


def test_a_component_whose_download_goes_on_is_told(copy):
    own = copy / "transformer/diffusion_pytorch_model.safetensors"
    own.rename(own.with_name(own.name + ".part"))
    with pytest.raises(BadFile, match=r"its folder transformer holds no model file.*\.part"):
        ZImagePipeline.from_pretrained(copy)

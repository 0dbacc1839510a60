"""Pipelines from files, folders and repositories; each refusal names the part and the next step."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import tiny
from zimage_core.assets import NANO
from zimage_core.errors import BadArgument, BadFile, NonFinite, Unsupported, WrongModel, ZImageError
from zimage_core.files import hub
from zimage_core.pipeline import ZImagePipeline
from zimage_core.run import sources
from zimage_core.run.checks import read_dtype
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.weights.folder import loose_models
from zimage_core.weights.inspection import inspect_file

FILE = {"transformer": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors",
        "vae": "diffusion_pytorch_model.safetensors"}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("saved") / "m", shift=6.0)


def latents(pipe):
    return pipe("a", height=32, width=32, seed=1, num_inference_steps=2, output_type="latent").images


@pytest.fixture(scope="module")
def want():
    return latents(tiny.pipeline(shift=6.0))


def parts(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in FILE}


def test_a_diffusers_folder(saved, want):
    pipe = ZImagePipeline.from_pretrained(saved)
    assert torch.equal(latents(pipe), want)
    assert torch.equal(latents(ZImagePipeline.from_pretrained(str(saved))), want)
    assert pipe.scheduler == FlowMatchEulerScheduler(6.0)
    assert pipe.sample_size == 1024
    assert set(pipe.files()) == set(FILE)


@pytest.mark.parametrize("mmap", [True, False])
def test_single_files_and_component_folders(saved, want, mmap):
    shift = FlowMatchEulerScheduler(6.0)
    by_folder = ZImagePipeline.from_files(**parts(saved), scheduler=shift, mmap=mmap)
    assert torch.equal(latents(by_folder), want)
    files = {name: saved / name / FILE[name] for name in FILE}
    by_file = ZImagePipeline.from_files(**files, scheduler=shift, tokenizer=saved / "tokenizer", mmap=mmap)
    assert torch.equal(latents(by_file), want)


def test_parts_of_a_folder_can_be_replaced(saved, want, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(BadFile, match="vae"):
        ZImagePipeline.from_pretrained(folder)
    assert torch.equal(latents(ZImagePipeline.from_pretrained(folder, vae=saved / "vae")), want)


def test_a_folder_of_another_pipeline_is_named(saved, tmp_path):
    tiny.write_json(tmp_path / "model_index.json", {"_class_name": "FluxPipeline"})
    with pytest.raises(WrongModel, match="FluxPipeline"):
        ZImagePipeline.from_pretrained(tmp_path)


def test_another_sampler_of_a_folder_is_told_and_the_callers_own_is_taken(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    index = json.loads((folder / "model_index.json").read_text())
    heun = ["diffusers", "FlowMatchHeunDiscreteScheduler"]
    tiny.write_json(folder / "model_index.json", index | {"scheduler": heun})
    with pytest.warns(UserWarning, match="asks for FlowMatchHeunDiscreteScheduler"):
        assert ZImagePipeline.from_pretrained(folder).scheduler.shift == 6.0
    tiny.write_json(folder / "scheduler/scheduler_config.json", {"use_dynamic_shifting": True})
    with pytest.raises(Unsupported, match=r"use_dynamic_shifting is True.*as scheduler"):
        ZImagePipeline.from_pretrained(folder)
    assert "use_dynamic_shifting is True" in inspect_file(folder).problem
    mine = FlowMatchEulerScheduler(4.0)
    assert ZImagePipeline.from_pretrained(folder, scheduler=mine).scheduler is mine


def test_swapped_files_are_named(saved):
    with pytest.raises(WrongModel, match=r"vae=|transformer"):
        ZImagePipeline.from_files(saved / "vae", saved / "text_encoder", saved / "transformer")


def test_parts_that_do_not_fit_are_refused_before_they_run(saved):
    pipe = tiny.pipeline()
    config = {**tiny.TEXT_ENCODER, "hidden_size": 40}
    other = tiny.TextEncoder(tiny.TextEncoderConfig.from_json(config))
    with pytest.raises(WrongModel, match=r"width 40.*needs width 24"):
        ZImagePipeline(pipe.scheduler, pipe.vae, other, pipe.tokenizer, pipe.transformer)
    small = tiny.TextEncoder(tiny.TextEncoderConfig.from_json({**tiny.TEXT_ENCODER, "vocab_size": 100}))
    with pytest.raises(WrongModel, match="knows 100 tokens, the tokenizer has 263"):
        ZImagePipeline(pipe.scheduler, pipe.vae, small, pipe.tokenizer, pipe.transformer)


def test_a_missing_tokenizer_says_what_to_pass(saved, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(BadFile, match="tokenizer="):
        ZImagePipeline.from_pretrained(folder)
    assert ZImagePipeline.from_pretrained(folder, tokenizer=tiny.tokenizer()).tokenizer.encode("a")
    with pytest.raises(ZImageError):
        ZImagePipeline.from_pretrained(folder, tokenizer=tmp_path / "absent.json")


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "/absent/folder", "org/repo:", "", "org/re po", "a\nb/c"]
)
def test_what_is_neither_folder_nor_repository_is_said_so(name):
    with pytest.raises(ZImageError) as caught:
        ZImagePipeline.from_pretrained(name)
    assert "\n" not in str(caught.value)
    assert "folder" in str(caught.value)


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(BadFile, match="transformer=, text_encoder= and vae="):
        ZImagePipeline.from_pretrained(saved / "model_index.json")


def test_devices_and_dtypes_are_checked(saved):
    cpu = torch.device("cpu")
    assert read_dtype(None, None, cpu) == torch.float32
    assert read_dtype("bfloat16", None, cpu) == read_dtype(None, torch.bfloat16, cpu) == torch.bfloat16
    assert read_dtype(None, None, torch.device("cuda")) == torch.bfloat16
    for bad in ("float64", torch.float64, "x", 5):
        with pytest.raises(BadArgument, match="float32, float16, bfloat16"):
            read_dtype(bad, None, cpu)
    with pytest.raises(BadArgument, match="one argument"):
        read_dtype("float16", torch.float32, cpu)
    with pytest.raises(BadArgument, match="device"):
        ZImagePipeline.from_pretrained(saved, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(Unsupported, match="no GPU"):
            tiny.pipeline().to("cuda")


def test_the_embedded_model_loads_draws_and_is_told_apart_by_content():
    pipe = ZImagePipeline.from_default()
    image = pipe("a big red circle on a blue background", seed=1, num_inference_steps=1).images[0]
    assert image.size == (pipe.sample_size, pipe.sample_size) == (80, 80)
    loose = sources.find(NANO)
    assert {name: path.name for name, path in loose.paths.items()} == {
        "transformer": "transformer.gguf", "text_encoder": "text_encoder.gguf", "vae": "vae.safetensors",
    }  # fmt: skip
    # a GGUF serves as the tokenizer's file as well
    other = sources.find_tokenizer(NANO / "text_encoder.gguf", None)
    assert other.encode("red 红色") == pipe.tokenizer.encode("red 红色")


def test_a_bad_number_in_a_packed_weight_is_named():
    """Half a block's scale: the bytes of a NaN, in a copy that only this process sees."""
    pipe = ZImagePipeline.from_default()
    weight = pipe.transformer.layers[0].attention.to_q.weight
    assert weight.format.name == "Q8_0"
    weight.packed.view(-1)[:2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)
    with pytest.raises(NonFinite, match=r"weight layers\.0\.attention\.to_q\.weight holds NaN"):
        pipe("a", num_inference_steps=1)
    ZImagePipeline.from_default()("a", seed=1, num_inference_steps=1)


# --- repositories -------------------------------------------------------------------------------------------


DIFFUSERS = ["model_index.json", "README.md", "transformer/config.json", "transformer/a.safetensors",
             "vae/diffusion_pytorch_model.bin", "vae/b.safetensors", "tokenizer/merges.txt",
             "assets/x.png"]  # fmt: skip
QUANTS = ["z-Q4_K_M.gguf", "z-Q8_0.gguf", "z-UD-IQ2_XXS.gguf", "README.md", "config.json"]


def test_of_a_diffusers_repository_the_components_are_fetched():
    assert hub.select(DIFFUSERS, None, "o/r") == [
        "model_index.json", "transformer/config.json", "transformer/a.safetensors", "vae/b.safetensors",
        "tokenizer/merges.txt",
    ]  # fmt: skip


def test_of_several_variants_one_is_fetched():
    rest = ["model_index.json", "vae/config.json"]
    plain = ["vae/model.safetensors", "transformer/model.safetensors.index.json",
             "transformer/model-00001-of-00002.safetensors"]  # fmt: skip
    fp16 = ["vae/model.fp16.safetensors", "transformer/model.safetensors.index.fp16.json",
            "transformer/model.fp16-00001-of-00002.safetensors"]  # fmt: skip
    alone = ["text_encoder/model.safetensors"]
    assert hub.select([*rest, *plain, *fp16, *alone], None, "o/r") == [*rest, *plain, *alone]
    assert hub.select([*rest, *plain, *fp16, *alone], None, "o/r", "fp16") == [*rest, *fp16, *alone]


def test_of_many_quantisations_the_named_one_is_fetched():
    assert hub.select(QUANTS, "q4_k_m", "o/r") == ["z-Q4_K_M.gguf", "config.json"]
    with pytest.raises(BadArgument, match=r"choose one, e.g. o/r:Q4_K_M; Q4_K_M, Q8_0, UD-IQ2_XXS"):
        hub.select(QUANTS, None, "o/r")
    with pytest.raises(BadArgument, match="no file of quantisation Q5_0; it has Q4_K_M"):
        hub.select(QUANTS, "Q5_0", "o/r")
    complete = ["z-Q4_K_M.gguf", "z-Q8_0.gguf", "qwen-Q4_K_M.gguf", "ae.safetensors"]
    assert hub.select(complete, "Q4_K_M", "o/r") == ["z-Q4_K_M.gguf", "qwen-Q4_K_M.gguf", "ae.safetensors"]


@pytest.mark.parametrize(
    ("name", "tag"),
    [("z_image_turbo-Q4_K_M.gguf", "Q4_K_M"), ("z-image-turbo.Q8_0.gguf", "Q8_0"), ("ae.safetensors", None),
     ("z_image_turbo_bf16.safetensors", "BF16"), ("Qwen3-4B-UD-IQ3_XXS.gguf", "UD-IQ3_XXS"),
     ("q.gguf", None)],
)  # fmt: skip
def test_tags_are_read_from_names(name, tag):
    assert hub.quant_tag(name) == tag


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_offline_and_not_cached_is_a_sentence(cache):
    with pytest.raises(BadFile, match=r"no such folder here, .* cache and HF_HUB_OFFLINE is set; unset it"):
        ZImagePipeline.from_pretrained("org/repo")


def test_offline_and_cached_is_loaded(cache, saved, want):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--org--repo"
    shutil.copytree(saved, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert torch.equal(latents(ZImagePipeline.from_pretrained("org/repo")), want)


def test_a_folder_of_that_name_comes_first(cache, saved, want, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "org" / "repo")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(latents(ZImagePipeline.from_pretrained("org/repo")), want)


def test_online_the_chosen_files_are_downloaded(cache, saved, monkeypatch):
    import huggingface_hub

    asked = {}

    class Api:
        def model_info(self, repo, revision, token, timeout):
            asked["from"] = (revision, token)
            names = [str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()]
            return SimpleNamespace(
                siblings=[SimpleNamespace(rfilename=name) for name in (*names, "extra/x.safetensors")]
            )

    def download(repo, allow_patterns, token, revision, cache_dir):
        asked[repo] = allow_patterns
        assert asked["from"] == (revision, token)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert ZImagePipeline.from_pretrained("org/repo").scheduler.shift == 6.0
    assert "transformer/diffusion_pytorch_model.safetensors" in asked["org/repo"]
    assert not any("extra" in name for name in asked["org/repo"])
    ZImagePipeline.from_pretrained("org/repo", revision="v1", token="t", variant=None, use_safetensors=True)
    assert asked["from"] == ("v1", "t")


def test_what_means_nothing_here_is_refused_by_name(saved):
    with pytest.raises(Unsupported, match="revive='x' means nothing here; leave it out"):
        ZImagePipeline.from_pretrained(saved, revive="x")
    assert ZImagePipeline.from_pretrained(pretrained_model_name_or_path=saved, low_cpu_mem_usage=False)


def test_only_what_is_cached_is_read_when_asked(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(BadFile, match="local_files_only is set"):
        ZImagePipeline.from_pretrained("org/repo", local_files_only=True)


@pytest.mark.parametrize("path", [None, b"x", 3, ""])
def test_a_path_that_is_none_is_a_bad_argument(saved, path):
    with pytest.raises(BadArgument, match="text_encoder: "):
        ZImagePipeline.from_files(**{**parts(saved), "text_encoder": path})
    with pytest.raises(BadArgument, match="tokenizer: got int"):
        ZImagePipeline.from_files(**parts(saved), tokenizer=3)


def test_parts_that_do_not_fit_are_refused_before_one_is_loaded(saved, tmp_path, monkeypatch):
    from zimage_core.run import loading

    wide = tmp_path / "text_encoder"
    shutil.copytree(saved / "text_encoder", wide)
    config = json.loads((wide / "config.json").read_text())
    state = load_file(wide / FILE["text_encoder"])
    for name, value in state.items():  # twice as wide, with nothing else changed
        if value.shape[-1] == config["hidden_size"]:
            value = torch.cat((value, value), -1)
        if value.ndim == 2 and value.shape[0] == config["hidden_size"]:
            value = torch.cat((value, value), 0)
        state[name] = value.contiguous()
    save_file(state, wide / FILE["text_encoder"])
    config["hidden_size"] *= 2
    (wide / "config.json").write_text(json.dumps(config))

    def untouched(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "load_network", untouched)
    with pytest.raises(WrongModel, match="the Z-Image transformer needs width"):
        ZImagePipeline.from_files(**{**parts(saved), "text_encoder": wide})


@pytest.mark.parametrize(
    "name", ["zimge", "models/zimge", "./zimge", "models/zimge:Q4_K_M", "../zimge", "models/a/zimge"]
)
def test_a_misspelt_path_is_no_repository(saved, tmp_path, monkeypatch, name):
    """Its parent is here, so nothing is asked of the Hub."""
    (tmp_path / "models" / "zimage").mkdir(parents=True)
    (tmp_path / "models" / "a" / "zimage").mkdir(parents=True)
    (tmp_path / "zimage").mkdir()
    monkeypatch.chdir(tmp_path / "models" if name.startswith("../") else tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(BadFile, match=r"there is no such folder.*; did you mean .*zimage\?$"):
        sources.find(name)


def test_the_embedded_model_has_a_name(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    pipe = ZImagePipeline.from_pretrained("default", vae=saved.parent / "m" / "vae")
    assert pipe.sample_size == 80
    assert {Path(file.path).parent for file in pipe.files().values()} == {NANO, saved / "vae"}
    shutil.copytree(saved, "default")
    assert ZImagePipeline.from_pretrained("default").sample_size == 1024, "a folder comes first"


def test_a_failing_network_is_a_sentence(cache, monkeypatch):
    import huggingface_hub

    class Api:
        def model_info(self, repo, revision, token, timeout):
            raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(
        BadFile, match=r"as a repository .* cannot be asked for: no route; check the path, or"
    ):
        ZImagePipeline.from_pretrained("org/repo")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Unsupported, match=r"pip install zimage_core\[hub\]"):
        ZImagePipeline.from_pretrained("org/repo")


# --- loose files --------------------------------------------------------------------------------------------


def test_a_folder_without_models_says_what_is_missing(tmp_path):
    (tmp_path / "notes.gguf").write_text("hello, this is no model at all")
    with pytest.raises(
        BadFile, match=r"no file that is a Z-Image transformer and .*unreadable: .*notes\.gguf"
    ):
        sources.find(tmp_path)


def test_shards_are_one_candidate(tmp_path):
    tiny.write_json(tmp_path / "m.safetensors.index.json", {"weight_map": {"a": "m-1.safetensors"}})
    for name in ("m-1.safetensors", "m-2.safetensors", "._m-2.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    found = [model.name for model in loose_models(tmp_path)]
    assert found == ["m-2.safetensors", "m.safetensors.index.json"]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_one_file_of_the_pair_stands_for_both(saved, tmp_path, name):
    for file, text in (("vocab.json", '{"a": 0, "b": 1, "ab": 2}'), ("merges.txt", "a b\n")):
        (tmp_path / file).write_text(text)
    assert sources.find_tokenizer(tmp_path / name, None).encode("ab") == [2]

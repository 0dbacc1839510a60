"""What a file knows of its model beyond its tensors passes through every conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import transformers
from safetensors.torch import load_file, save_file

from tests.helpers import small_tokenizer, tiny
from tests.helpers.model_files import encoder_metadata, stored, toy_encoder, write_gguf
from zimage_core import BadWeights, ZImagePipeline, convert_file, open_weights, quantize_file
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights import names
from zimage_core.weights.components import open_component
from zimage_core.weights.facts import facts

KNOWN = {"sample_size": 48, "shift": 6.0}
TEXT = "it's <|im_start|>hé<think> 123\n\n猫"


@pytest.fixture(scope="module")
def knowing(tmp_path_factory) -> Path:
    """The tiny pipeline, which draws 48 px by default and has the base checkpoint's shift."""
    folder = tiny.folder(tmp_path_factory.mktemp("knowing") / "tiny", shift=6.0)
    config = {**tiny.TRANSFORMER, "_zimage": {"sample_size": 48}}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder


def known(place: Path) -> dict[str, object]:
    return facts(open_component(place, "transformer"))


def plain(value: object) -> object:
    """The value of a key, an array as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


# --- size and schedule ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        ("a.gguf",),
        ("a.safetensors", "b.gguf"),
        ("a.gguf", "folder", "b.safetensors"),
        ("shards", "a.safetensors", "folder", "b.gguf"),
    ],
    ids=" ".join,
)
def test_size_and_shift_pass_through_every_layout(knowing, tmp_path, way):
    place = knowing
    for name in way:
        shard = 30_000 if name == "shards" else None
        convert_file(place, tmp_path / name, component="transformer", shard_bytes=shard)
        place = tmp_path / name
        assert known(place) == KNOWN, name
    quantize_file(place, tmp_path / "q.gguf", "Q8_0", component="transformer")
    assert known(tmp_path / "q.gguf") == KNOWN
    parts = {part: knowing / part for part in ("text_encoder", "vae")}
    pipe = ZImagePipeline.from_files(tmp_path / "q.gguf", **parts)
    assert (pipe.sample_size, pipe.scheduler.shift) == (48, 6.0)
    assert pipe.limits.steps == 50, "the defaults of the base checkpoint"


def test_a_header_holds_them_as_other_programs_read_them(knowing, tmp_path):
    convert_file(knowing, tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["zimage.sample_size"].contents() == 48
    assert reader.fields["zimage.shift"].contents() == 6.0
    convert_file(knowing, tmp_path / "a.safetensors")
    with open_weights(tmp_path / "a.safetensors") as file:
        assert {k: v for k, v in file.metadata.items() if k in ("format", "zimage.sample_size")} == {
            "format": "pt", "zimage.sample_size": "48",
        }  # fmt: skip


def test_a_scheduler_s_file_comes_before_what_the_weights_say(knowing, tmp_path):
    convert_file(knowing, tmp_path / "t.gguf")
    turbo = tiny.folder(tmp_path / "turbo", shift=3.0)
    shutil.rmtree(turbo / "transformer")
    shutil.move(tmp_path / "t.gguf", turbo)
    assert ZImagePipeline.from_pretrained(turbo).scheduler.shift == 3.0
    convert_file(turbo, tmp_path / "again.gguf")
    assert known(tmp_path / "again.gguf") == {"sample_size": 48, "shift": 3.0}


def test_a_transformer_from_elsewhere_keeps_its_own_schedule(knowing, tmp_path):
    """Also the folder that it lies in counts: it is not the schedule of the folder with the other parts."""
    turbo = tiny.folder(tmp_path / "turbo", shift=3.0)
    convert_file(knowing, tmp_path / "t.gguf")
    for place in (tmp_path / "t.gguf", knowing / "transformer"):
        assert ZImagePipeline.from_pretrained(turbo, transformer=place).scheduler.shift == 6.0
        parts = (place, turbo / "text_encoder", turbo / "vae")
        assert ZImagePipeline.from_files(*parts).scheduler.shift == 6.0
    own = FlowMatchEulerScheduler(4.0)
    assert ZImagePipeline.from_pretrained(turbo, transformer=place, scheduler=own).scheduler is own
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(next((knowing / "transformer").glob("*.safetensors"))), silent)
    assert ZImagePipeline.from_pretrained(turbo, transformer=silent).scheduler.shift == 3.0


def test_a_schedule_of_another_kind_is_not_forgotten(tmp_path):
    model = tiny.folder(tmp_path / "m")
    place = model / "scheduler" / "scheduler_config.json"
    stated = {**json.loads(place.read_text()), "use_karras_sigmas": True, "max_shift": 1.15, "_x": 1}
    place.write_text(json.dumps(stated))
    convert_file(model, tmp_path / "a.gguf")
    convert_file(tmp_path / "a.gguf", tmp_path / "b.safetensors")
    assert known(tmp_path / "b.safetensors") == {"shift": 3.0, "scheduler": {"use_karras_sigmas": True}}


def test_nothing_is_made_up(wide, tmp_path):
    convert_file(wide, tmp_path / "a.gguf")
    assert known(tmp_path / "a.gguf") == {}


@pytest.mark.parametrize(
    ("key", "value"), [("sample_size", 50), ("sample_size", "large"), ("shift", -1.0), ("scheduler", "[1")]
)
def test_a_value_that_cannot_be_is_named(knowing, tmp_path, key, value):
    state = load_file(knowing / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "a.safetensors", metadata={f"zimage.{key}": str(value)})
    with pytest.raises(BadWeights, match=f"a.safetensors: .*zimage.{key}"):
        known(tmp_path / "a.safetensors")


# --- sizes that shapes do not tell ---------------------------------------------------------


def test_a_single_file_states_what_its_shapes_do_not_tell(model, tmp_path):
    """Without them the file would be drawn with rotary axes, a theta or norm groups that it never had."""
    for part, changes in {
        "transformer": {"rope_theta": 128.0, "axes_dims": [8, 4, 4]},
        "text_encoder": {"rope_theta": 5000.0, "rms_norm_eps": 1e-5},
        "vae": {"norm_num_groups": 2, "scaling_factor": 0.5},
    }.items():
        folder = tmp_path / part
        shutil.copytree(model / part, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        convert_file(folder, tmp_path / f"{part}.safetensors")
        wanted = open_component(folder, part).card.config
        found = open_component(tmp_path / f"{part}.safetensors", part).card
        assert found.config == wanted
        assert not found.cautions
        if part != "vae":
            convert_file(tmp_path / f"{part}.safetensors", tmp_path / f"{part}.gguf")
            assert open_component(tmp_path / f"{part}.gguf", part).card.config == wanted


# --- provenance ----------------------------------------------------------------------------


def test_where_a_model_comes_from_is_carried_and_what_is_stale_is_not(wide, tmp_path):
    state = load_file(wide / "diffusion_pytorch_model.safetensors")
    metadata = {
        "format": "pt", "modelspec.title": "Turbo of a friend", "modelspec.author": "A. Friend",
        "modelspec.hash_sha256": "0xabc", "license": "apache-2.0", "ss_note": "a é\n猫",
        "_quantization_metadata": "{}", "general.tags": '["a", "b"]',
    }  # fmt: skip
    save_file(state, tmp_path / "in.safetensors", metadata=metadata)
    stale = ("modelspec.hash_sha256", "_quantization_metadata")
    kept = {key: value for key, value in metadata.items() if key not in (*stale, "format")}
    quantize_file(tmp_path / "in.safetensors", tmp_path / "q.gguf", "Q8_0")
    with open_weights(tmp_path / "q.gguf") as file:
        found = {k: plain(v) for k, v in file.metadata.items()}
        assert found["general.name"] == "Turbo of a friend"
        assert found["general.tags"] == ["a", "b"]
        assert {**kept, "general.tags": ["a", "b"]}.items() <= found.items()
        assert not found.keys() & {*stale, "format"}
        assert found["zimage.source"] == "in.safetensors"
        assert len(found["zimage.source_sha256"]) == 64
    convert_file(tmp_path / "q.gguf", tmp_path / "back", dequantize="bf16")
    with open_weights(tmp_path / "back" / "diffusion_pytorch_model.safetensors") as file:
        assert kept.items() <= file.metadata.items()
        assert file.metadata["zimage.source"] == "q.gguf"
        gone = ("general.file_type", "zimage.recipe", "general.architecture", "general.alignment")
        assert not file.metadata.keys() & {*gone, *stale}


def test_a_gguf_s_own_words_pass_through_a_folder(tmp_path):
    config = toy_encoder()
    shapes = names.checkpoint_shapes(names.text_encoder_table(config, "gguf"))
    words = {
        "general.name": "Qwen of a friend", "general.author": "A. Friend", "general.license": "mit",
        "general.base_model.0.name": "Qwen3", "qwen3.context_length": 1234, "general.file_type": 0,
    }  # fmt: skip
    write_gguf(tmp_path / "a.gguf", stored(shapes), {**encoder_metadata(config), **words})
    convert_file(tmp_path / "a.gguf", tmp_path / "folder")
    stated = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert stated["max_position_embeddings"] == 1234
    convert_file(tmp_path / "folder", tmp_path / "b.gguf")
    with open_weights(tmp_path / "b.gguf") as file:
        assert words.items() <= file.metadata.items()


# --- tokenizer -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A text encoder as GGUF with a tokenizer, roles, flags and two chat templates."""
    folder = tiny.folder(tmp_path_factory.mktemp("encoder") / "m")
    place = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(place.read_text())
    templates = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
    config |= {"eos_token": {"content": "<think>"}, "pad_token": "<|endoftext|>", "add_bos_token": True}
    place.write_text(json.dumps({**config, "chat_template": templates}))
    quantize_file(folder, folder / "te.gguf", "Q8_0", component="text_encoder")
    return folder / "te.gguf"


def test_a_folder_s_tokenizer_goes_into_the_gguf_with_all_it_states(encoder):
    with open_weights(encoder) as file:
        keys, tokens = file.metadata, list(file.metadata["tokenizer.ggml.tokens"])
        assert tokens[keys["tokenizer.ggml.eos_token_id"]] == "<think>"
        assert tokens[keys["tokenizer.ggml.padding_token_id"]] == "<|endoftext|>"
        assert keys["tokenizer.ggml.add_bos_token"] is True
        assert keys["tokenizer.ggml.pre"] == "qwen2"
        assert keys["tokenizer.chat_template"] == "{{ a }}"
        assert keys["tokenizer.chat_template.tool_use"] == "{{ b }}"


def test_a_gguf_s_tokenizer_becomes_files_that_others_read(encoder, tmp_path):
    with open_weights(encoder) as file:
        wanted = Tokenizer.from_gguf(file)
        keys = {k: plain(v) for k, v in file.metadata.items() if k.startswith("tokenizer.")}
    assert not convert_file(encoder, tmp_path / "out").remarks
    assert Tokenizer.from_folder(tmp_path / "out").fingerprint == wanted.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT, add_special_tokens=False).input_ids == wanted.encode(TEXT)
    assert (theirs.eos_token, theirs.pad_token) == ("<think>", "<|endoftext|>")
    convert_file(tmp_path / "out", tmp_path / "again.gguf")
    with open_weights(tmp_path / "again.gguf") as file:
        assert {k: plain(v) for k, v in file.metadata.items() if k.startswith("tokenizer.")} == keys


def test_a_tokenizer_goes_from_folder_to_folder_unchanged(model, tmp_path):
    convert_file(model, tmp_path / "out", component="text_encoder")
    for file in (model / "tokenizer").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    ZImagePipeline.from_files(model / "transformer", tmp_path / "out", model / "vae")


def test_a_single_file_says_where_its_tokenizer_is(model, encoder, tmp_path):
    done = convert_file(model, tmp_path / "a.safetensors", component="text_encoder")
    assert f"--tokenizer {model / 'tokenizer'}" in " ".join(done.remarks)
    done = convert_file(encoder, tmp_path / "b.safetensors")
    assert f"--tokenizer {encoder}" in " ".join(done.remarks)


def test_an_encoder_without_tokenizer_is_told(tmp_path):
    (tmp_path / "in").mkdir()
    state = {name: tensor.clone() for name, tensor in tiny.text_encoder_state().items()}
    save_file(state, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(tiny.TEXT_ENCODER))
    done = quantize_file(tmp_path / "in", tmp_path / "a.gguf", "Q8_0")
    assert any("no tokenizer" in remark for remark in done.remarks)


def test_a_tokenizer_that_a_gguf_cannot_name_is_told_and_left_out(model, tmp_path):
    """Qwen2's words that skip the merges if they are tokens: no name of a pre-tokenizer stands for that."""
    folder = tmp_path / "in"
    shutil.copytree(model / "text_encoder", folder)
    document = small_tokenizer.changed("model.ignore_merges", True)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    done = quantize_file(folder, tmp_path / "a.gguf", "F16")
    assert any("tokenizer" in r and str(folder / "tokenizer.json") in r for r in done.remarks)
    with open_weights(tmp_path / "a.gguf") as file:
        assert not any(key.startswith("tokenizer.") for key in file.metadata)


def test_the_embedded_model_s_tokenizer_and_size_pass(tmp_path):
    convert_file("default", tmp_path / "te", component="text_encoder", dequantize="f32")
    convert_file("default", tmp_path / "t", dequantize="bf16", component="transformer")
    assert known(tmp_path / "t")["sample_size"] == 80
    embedded = ZImagePipeline.from_default()
    vae = embedded.vae.opened.file.path
    pipe = ZImagePipeline.from_files(tmp_path / "t", tmp_path / "te", vae)
    assert pipe.tokenizer.fingerprint == embedded.tokenizer.fingerprint
    assert pipe.sample_size == 80

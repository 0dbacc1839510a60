"""Prompts written anew by a pipeline: the same text for a seed, in the image's settings, within a budget."""

import threading

import pytest
import torch

from tests.helpers import tiny
from zimage_core.errors import BadArgument, BadFile, Busy, OverBudget, Unsupported
from zimage_core.language.enhance import Enhanced
from zimage_core.memory.planner import RUNTIME
from zimage_core.memory.writing import beside_encoder
from zimage_core.models.block_source import RESIDENT
from zimage_core.nn import decoding
from zimage_core.pipeline import ZImagePipeline
from zimage_core.run.sources import embedded
from zimage_core.weights.load import opened_file

pytestmark = pytest.mark.filterwarnings("ignore:the new prompt was cut", "ignore:the thought was ended")
MIB = 1 << 20
DRAW = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("enhancing") / "tiny")


@pytest.fixture(scope="module")
def pipe(model):
    return ZImagePipeline.from_pretrained(model)


def enhance(pipe, prompt="a cat", **more):
    return pipe.enhance_prompt(prompt, **{"seed": 3, "max_new_tokens": 24, **more})


@pytest.fixture(scope="module")
def wanted(pipe):
    return enhance(pipe)


def test_a_seed_decides_and_another_one_gives_other_text(pipe, model, wanted):
    assert isinstance(wanted, str)
    assert enhance(pipe) == wanted == enhance(ZImagePipeline.from_text_encoder(model / "text_encoder"))
    assert enhance(pipe, seed=4) != wanted
    assert enhance(pipe, temperature=0) == enhance(pipe, temperature=0, seed=4)


def test_without_a_seed_torchs_own_decides_and_it_is_kept(pipe):
    torch.manual_seed(8)
    one = enhance(pipe, seed=None)
    torch.manual_seed(8)
    assert enhance(pipe, seed=None) == one == enhance(pipe, seed=one.settings["enhanced"]["seed"])


def test_an_image_has_both_prompts_in_its_settings(pipe, wanted):
    settings = pipe(wanted, seed=1, **DRAW).settings[0]
    assert (settings["prompt"], settings["original_prompt"]) == (str(wanted), "a cat")
    assert settings["enhanced"]["instructions"] == "own, English"
    assert type(settings["prompt"]) is str
    both = pipe([wanted, "a dog"], seed=1, **DRAW).settings
    assert "original_prompt" in both[0]
    assert "original_prompt" not in both[1]


def test_a_run_after_it_is_the_run_without_it(model):
    fresh, used = (ZImagePipeline.from_pretrained(model) for _ in range(2))
    enhance(used)
    assert torch.equal(used("a", seed=2, **DRAW).images, fresh("a", seed=2, **DRAW).images)


def test_the_adapters_of_the_text_encoder_count(model, wanted):
    own = ZImagePipeline.from_pretrained(model)
    width, seed = tiny.TEXT_ENCODER["hidden_size"], torch.Generator().manual_seed(0)
    layer = "text_encoder.layers.0.mlp.down_proj"
    own.load_lora(
        {
            f"{layer}.lora_A.weight": torch.randn(2, tiny.TEXT_ENCODER["intermediate_size"], generator=seed),
            f"{layer}.lora_B.weight": torch.randn(width, 2, generator=seed),
        },
        name="loud",
    )
    assert enhance(own) != wanted
    own.unload_lora()
    assert enhance(own) == wanted


def test_it_works_in_half_precision(model):
    own = ZImagePipeline.from_text_encoder(model / "text_encoder", dtype="bfloat16")
    assert enhance(own) == enhance(own)
    own.to(torch.float16)
    assert enhance(own)


def test_a_budget_changes_nothing_and_leaves_nothing(model, wanted):
    own = ZImagePipeline.from_pretrained(model, ram="4GiB")
    assert enhance(own) == wanted
    image = own("a", seed=2, **DRAW)
    assert enhance(own) == wanted
    assert torch.equal(image.images, ZImagePipeline.from_pretrained(model)("a", seed=2, **DRAW).images)
    own.limit_memory()
    assert own.text_encoder.stream is RESIDENT
    assert enhance(own) == wanted
    names = [t.name for t in threading.enumerate()]
    assert not [name for name in names if name.startswith(("zimage-stream", "zimage-read"))]


def test_the_cache_is_planned_and_a_budget_too_small_for_it_is_refused(model, wanted):
    opened = opened_file(ZImagePipeline.from_pretrained(model).text_encoder)
    short, long = (beside_encoder(opened, tokens, "float32", on_cpu=True) for tokens in (700, 2000))
    # 4 layers with the one that grows, keys and values of 16 channels in whole chunks of 256
    assert long - short == 4 * 2 * (2048 - 768) * 16 * 4
    own = ZImagePipeline.from_pretrained(model, ram=RUNTIME + short)
    with pytest.raises(OverBudget, match=r"^enhance: .* for the language model's end and its memory of"):
        enhance(own, max_new_tokens=1000)
    own.limit_memory(ram=RUNTIME + 8 * MIB)
    assert enhance(own) == wanted


def test_a_text_encoder_that_replaced_that_of_the_budget_is_refused(model):
    own = ZImagePipeline.from_pretrained(model, ram="4GiB")
    own.text_encoder = ZImagePipeline.from_text_encoder(model / "text_encoder").text_encoder
    with pytest.raises(Unsupported, match="text_encoder: it was replaced or added after the memory"):
        enhance(own)


def test_streamed_layers_write_the_same(model, wanted):
    own = ZImagePipeline.from_pretrained(model, ram="4GiB")
    from zimage_core.memory.attach import stream_model, unstream

    own.limit_memory()
    stream = stream_model(own.text_encoder, opened_file(own.text_encoder).file)
    assert enhance(own) == wanted
    assert stream.streamed == (0, 1)
    unstream(own.text_encoder)


def test_what_is_missing_is_one_sentence(model, tmp_path):
    with pytest.raises(Unsupported, match=r"embedded model .* give a Qwen3 text encoder, .* text_encoder="):
        ZImagePipeline.from_default().enhance_prompt("a cat")
    by_hand = ZImagePipeline.from_text_encoder(embedded().paths["text_encoder"])
    with pytest.raises(Unsupported, match="embedded model"):
        by_hand.enhance_prompt("a cat")
    with pytest.raises(Unsupported, match="has no text encoder"):
        ZImagePipeline(tokenizer=tiny.tokenizer()).enhance_prompt("a cat")
    with pytest.raises(Unsupported, match="came from no file"):
        tiny.pipeline().enhance_prompt("a cat")


@pytest.mark.parametrize(
    "bad", [{"prompt": ""}, {"prompt": 3}, {"seed": -1}, {"top_p": 2}, {"max_new_tokens": 0}, {"top_k": 1.5}]
)
def test_bad_arguments_are_refused_before_anything_is_loaded(bad, monkeypatch):
    own = ZImagePipeline.from_default()
    monkeypatch.setattr(own, "_enhance", None)
    with pytest.raises(BadArgument):
        enhance(own, **bad)
    assert not own._running


def test_instructions_and_prompt_longer_than_the_model_are_refused(pipe):
    with pytest.raises(BadArgument, match="at most 2048; shorten it"):
        enhance(pipe, prompt="a" * 3000)


def test_one_run_at_a_time(pipe):
    seen = []

    def again(_text, _is_thought):
        with pytest.raises(Busy):
            enhance(pipe)
        seen.append(True)

    enhance(pipe, on_text=again)
    assert seen
    assert not pipe._running


def test_adapters_of_a_shared_encoder_wait_until_it_has_written(pipe):
    other, seen = ZImagePipeline(**pipe.components), []

    def change(_text, _is_thought):
        with pytest.raises(Busy):
            other.unload_lora()
        seen.append(True)

    enhance(pipe, on_text=change)
    assert seen


def test_what_cannot_be_called_is_refused(pipe):
    with pytest.raises(BadArgument, match="on_text: got int, wanted a function"):
        enhance(pipe, on_text=3)


def test_a_file_that_was_changed_is_refused(model, tmp_path):
    import shutil

    shutil.copytree(model / "text_encoder", tmp_path / "text_encoder")
    shutil.copytree(model / "tokenizer", tmp_path / "tokenizer")
    own = ZImagePipeline.from_text_encoder(tmp_path / "text_encoder", mmap=False)
    enhance(own)
    with (tmp_path / "text_encoder" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BadFile, match="changed"):
        enhance(own)


def test_a_prompt_is_a_str_with_what_it_came_from():
    text = Enhanced("new", "old", "hm", "new", 3, {"original_prompt": "old"})
    assert (text, text.upper(), f"{text}") == ("new", "NEW", "new")
    assert Enhanced("plain").settings == {}


@pytest.mark.parametrize(
    ("compute", "tokens", "mode"),
    [("auto", 8, "auto"), ("exact", 8, "exact"), ("int8", 8, "int8"), ("auto", 7, None)],
)
def test_tokens_are_multiplied_as_compute_says_where_it_pays(model, monkeypatch, compute, tokens, mode):
    """A few tokens are not worth the making of forms."""
    made = []

    class Recorded(decoding.ReadyWeights):
        def __init__(self, network, mode, budget):
            made.append((mode, budget))
            super().__init__(network, mode, budget)

    monkeypatch.setattr(decoding, "ReadyWeights", Recorded)
    enhance(ZImagePipeline.from_pretrained(model, compute=compute), max_new_tokens=tokens)
    ((asked, budget),) = made
    assert (asked, budget > 0) == (mode or compute, mode is not None)

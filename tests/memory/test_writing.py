"""What a language model takes beside its text encoder is what was planned for it."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.live_bytes import LiveBytes
from tests.helpers.model_headers import full_size
from tests.weights.test_language_files import gguf, whole
from zimage_core.language.generate import generate
from zimage_core.memory import phases
from zimage_core.memory.activations import encode_bytes
from zimage_core.memory.job import Job
from zimage_core.memory.phases import OUTSIDE_A_RUN
from zimage_core.memory.planner import plan_job
from zimage_core.memory.writing import beside_encoder, repeated, writing
from zimage_core.models.kv_cache import CHUNK
from zimage_core.nn import decoding
from zimage_core.nn.linear import tensors_of
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quant import few_rows
from zimage_core.weights.language import load_language_model
from zimage_core.weights.load import opened_file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", [False, True])
def test_the_plan_holds_what_is_alive_while_it_writes(tmp_path, head, dtype):
    config, content = whole(head=head)
    ours = load_language_model(gguf(tmp_path / "x.gguf", config, content), getattr(torch, dtype))
    prompt, new = CHUNK - 4, 8  # so that the cache grows
    weights = sum(each.nbytes for each in tensors_of(ours.ending.layer))
    weights += ours.ending.norm.weight.nbytes + (ours.ending.head.weight.nbytes if head else 0)
    planned = beside_encoder(opened_file(ours.encoder), prompt + new, dtype, on_cpu=True)
    activations = encode_bytes(config, prompt, dtype)
    with LiveBytes() as seen:
        seen.ignore(*tensors_of(ours))
        generate(ours, [1] * prompt, 1)
        # what a thread keeps for dequantising is of the size that the tests before asked for
        seen.peak = kept = seen.live
        generate(ours, [1] * prompt, new)
    assert seen.peak - kept <= planned - weights + activations
    # keys and values are most of it, so that a plan without them would be too small
    assert seen.peak - kept > activations


def test_a_gpu_gets_a_copy_of_a_tied_head(tmp_path):
    config, content = whole(matrix="Q4_K")
    opened = opened_file(load_language_model(gguf(tmp_path / "x.gguf", config, content)).encoder)
    on_gpu, on_cpu = (beside_encoder(opened, 10, "float16", on_cpu=cpu) for cpu in (False, True))
    assert on_gpu - on_cpu == opened.file.tensors["token_embd.weight"].nbytes


MIB = 1 << 20
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 2048, "num_layers": 6}


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A language model of 4-bit weights whose forms pay, and one thread, so that all tensors are seen."""
    monkeypatch.setattr(few_rows, "int4_pays", lambda: True)
    monkeypatch.setattr(decoding, "MAKING", MIB)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_language_model(gguf(tmp_path / "x.gguf", *whole(matrix="Q4_K", **WIDE)), torch.bfloat16)
    torch.set_num_threads(threads)


@pytest.fixture
def memory(ours):
    pipe = ZImagePipeline.from_default(dtype="bfloat16")
    networks = {"text_encoder": ours.encoder, "transformer": pipe.transformer, "vae": pipe.vae}
    opened = {name: opened_file(network) for name, network in networks.items()}
    found = phases.PhaseManager(networks, opened, torch.device("cpu"), phases.MemoryBudget(ram="4GiB"))
    extra = beside_encoder(opened["text_encoder"], 16, "bfloat16", on_cpu=True)
    found.begin(**SHORT, beside_encoder=extra)
    yield found
    found.close()


SHORT = {**OUTSIDE_A_RUN, "caption_tokens": 4}


def write(ours, memory, monkeypatch, new=3):
    """Write within a budget -> the plan, and the forms that were made."""
    made, real = [], decoding.ReadyWeights
    with monkeypatch.context() as patch:
        patch.setattr("zimage_core.memory.writing.PAYS_FROM", 3)
        patch.setattr(decoding, "ReadyWeights", lambda *args: made.append(real(*args)) or made[-1])
        with writing(memory, ours, opened_file(ours.encoder), 4, 4 + new):
            assert len(generate(ours, [1] * 4, new).ids) == new
    return memory.report().plan, made[0]


def test_forms_take_what_a_budget_leaves_and_no_more(ours, memory, monkeypatch):
    plan = memory.report().plan
    least, wanted = (4 << 30) - plan.vram + plan.floor, decoding.forms_bytes(ours, "bfloat16")[0]
    found = []
    with LiveBytes() as seen:
        seen.ignore(*(each for net in (ours, *memory._networks.values()) for each in tensors_of(net)))
        with decoding.ready_for_decoding(ours, "bfloat16", MIB):
            generate(ours, [1] * 4, 2)
        kept = seen.live  # what a thread keeps for dequantising is a part of the runtime's memory
        for spare in (0, 6, 12, 16, 200):
            memory.budget = phases.MemoryBudget(ram=least + spare * MIB)
            memory.begin(**SHORT)
            with memory.phase("denoise"):  # the transformer stays afterwards, if it may
                pass
            seen.peak = kept
            plan, made = write(ours, memory, monkeypatch)
            encode = plan.phase("encode")
            assert seen.peak - kept <= plan.vram
            assert encode.peak <= plan.vram
            assert made.nbytes <= max(0, encode.planes - 2 * MIB)
            found.append(made.nbytes)
            del made
    assert found == sorted(found)
    assert found[0] == 0
    assert any(0 < nbytes < wanted for nbytes in found)
    assert found[-1] == wanted


def test_a_few_tokens_are_written_without_forms(ours, memory, monkeypatch):
    _, made = write(ours, memory, monkeypatch, new=2)
    assert not made.nbytes


@pytest.mark.parametrize(("gib", "stay"), [(1.5, 0.1), (2, 0.4), (4, 1), (6, 1)])
def test_layers_stay_on_a_gpu_as_far_as_they_fit_without_the_transformer(gib, stay):
    job, room = Job(full_size(), 16, 16, caption_tokens=300), int(gib * (1 << 30))
    plan = repeated(job, plan_job(job, room))
    part, blocks = plan.component("text_encoder"), job.encoder.block_bytes
    assert plan.phase("encode").peak <= room
    assert part.resident + part.streamed == job.encoder.always + sum(blocks)
    assert len(part.resident_blocks) >= stay * len(blocks)
    assert not plan.component("transformer").kept


def test_a_plan_that_keeps_everything_is_not_changed():
    job = Job(full_size(), 16, 16, caption_tokens=300)
    plan = plan_job(job, 24 << 30)
    assert repeated(job, plan) is plan

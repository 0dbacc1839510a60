"""What a language model takes beside its text encoder is what was planned for it."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.live_bytes import LiveBytes
from tests.weights.test_language_files import gguf, whole
from zimage_core.language.generate import generate
from zimage_core.memory.activations import encode_bytes
from zimage_core.memory.writing import beside_encoder
from zimage_core.models.kv_cache import CHUNK
from zimage_core.nn.linear import tensors_of
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
        generate(ours, [1] * prompt, new)
    assert seen.peak <= planned - weights + activations
    # keys and values are most of it, so that a plan without them would be too small
    assert seen.peak > activations


def test_a_gpu_gets_a_copy_of_a_tied_head(tmp_path):
    config, content = whole(matrix="Q4_K")
    opened = opened_file(load_language_model(gguf(tmp_path / "x.gguf", config, content)).encoder)
    on_gpu, on_cpu = (beside_encoder(opened, 10, "float16", on_cpu=cpu) for cpu in (False, True))
    assert on_gpu - on_cpu == opened.file.tensors["token_embd.weight"].nbytes

"""Errors of a GPU reach the caller of a pipeline as one sentence, others as they are."""

from __future__ import annotations

import pytest
import torch

from zimage_core.errors import DeviceFault, OutOfMemory
from zimage_core.pipeline import ZImagePipeline

CASES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"), OutOfMemory, "vram='auto'"),
    (RuntimeError("CUDA error: out of memory"), OutOfMemory, "vram='auto'"),
    (RuntimeError("CUDA error: an illegal memory access\nmore"), DeviceFault, "in a new one"),
    (RuntimeError("Triton Error [CUDA]: launch failed"), DeviceFault, "in a new one"),
    (RuntimeError("mine"), RuntimeError, "mine"),
]
CALLS = {"a run": lambda pipe: pipe("a", seed=1), "encode_prompt": lambda pipe: pipe.encode_prompt("a")}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("raised", "kind", "words"), CASES)
def test_what_torch_raises_is_explained(call, raised, kind, words, monkeypatch):
    pipe = ZImagePipeline.from_default()

    def fail(ids):
        raise raised

    monkeypatch.setattr(pipe.text_encoder, "forward", fail)
    with pytest.raises(kind, match=words) as caught:
        CALLS[call](pipe)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    if kind is not RuntimeError:
        assert caught.value.__context__ is None, "torch's error would keep the memory that its frames hold"

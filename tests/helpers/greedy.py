"""Tokens that transformers chooses greedily, beside ours, with the same weights.

Used by tests/parity and tests/weights (which assert) and by benchmarks/greedy.py (which writes the table).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.helpers.parity import apart, randomise
from tests.helpers.tiny import write_json
from zimage_core.language.generate import generate
from zimage_core.models.language_model import LanguageModel
from zimage_core.weights.language import load_language_model

TOKENS = 200
PROMPT = tuple(range(3, 40, 5))
KINDS = {
    "Qwen3, tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3, untied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "llama, untied": ("Llama", {"tie_word_embeddings": False}),
}
"""Name -> transformers' class and what its config has beside the sizes."""

SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 160, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip


@dataclass(frozen=True)
class Greedy:
    """How far two sequences of tokens agree.

    Args:
        name: Of the model.
        equal: Tokens until they part.
        different: Different tokens among those that transformers chose.
        logits: Largest difference of logits over the tokens that transformers chose.
        gap: Between the two best logits where they part, or the smallest of all where they do not.
    """

    name: str
    equal: int
    different: int
    logits: float
    gap: float

    @property
    def passes(self) -> bool:
        """All tokens are equal, or they part where the best two are nearer than the logits themselves."""
        return self.equal == TOKENS or self.gap <= 2 * self.logits


def tiny_folder(where: Path, name: str) -> tuple[Any, Path]:
    """transformers' random model, and a folder that it was written to."""
    import transformers

    arch, own = KINDS[name]
    config = getattr(transformers, f"{arch}Config")(**SIZES, **own, initializer_range=0.3)
    theirs = getattr(transformers, f"{arch}ForCausalLM")(config).eval()
    randomise(theirs, 0.3)
    theirs.tie_weights()
    tied = own["tie_word_embeddings"]
    state = {k: v.clone() for k, v in theirs.state_dict().items() if not (tied and k == "lm_head.weight")}
    where.mkdir(parents=True, exist_ok=True)
    save_file(state, where / "model.safetensors", metadata={"format": "pt"})
    write_json(where / "config.json", config.to_dict())
    return theirs, where


@torch.no_grad()
def tokens(theirs: Any, prompt: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """The 200 tokens that transformers' model writes, with its cache, and their logits [200, vocab]."""
    found, logits, ids, past = [], [], torch.tensor([prompt]), None
    for _ in range(TOKENS):
        out = theirs(ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits[0, -1])
        found.append(int(logits[-1].argmax()))
        ids = torch.tensor([[found[-1]]])
    return found, torch.stack(logits)


@torch.no_grad()
def compare(name: str, theirs: Any, ours: LanguageModel, prompt: Sequence[int]) -> Greedy:
    """Both write 200 tokens, each following its own."""
    wanted, logits = tokens(theirs, prompt)
    got = generate(ours, prompt, TOKENS).ids
    equal = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), TOKENS)
    best = logits.topk(2).values
    gaps = best[:, 0] - best[:, 1]
    forced = ours(torch.tensor([*prompt, *wanted[:-1]]))[len(prompt) - 1 :]
    gap = float(gaps.min() if equal == TOKENS else gaps[equal])
    return Greedy(name, equal, len(set(wanted)), apart(forced, logits), gap)


def tiny(where: Path, name: str) -> Greedy:
    """The comparison for one of `KINDS`."""
    theirs, folder = tiny_folder(where, name)
    return compare(name, theirs, load_language_model(folder), PROMPT)

"""A language model that writes a given text, with a tokenizer of bytes."""

from __future__ import annotations

import torch

from tests.helpers import tiny
from zimage_core.models.kv_cache import KVCache

TOKENIZER = tiny.tokenizer()


class Scripted:
    """Chooses the tokens of a text one after the other, then <|im_end|> for ever.

    It looks like a `LanguageModel` to what writes with it, and notes what it was given to read.
    """

    def __init__(self, text: str, max_positions: int = 10_000) -> None:
        self.script = [*TOKENIZER.encode(text)]
        self.max_positions = max_positions
        self.read: list[int] = []
        self.calls = 0
        self._rows = len(TOKENIZER) + 3

    def new_cache(self) -> KVCache:
        return KVCache(1)

    def __call__(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        none = torch.zeros(len(ids), 1, 1)
        cache.layers[0].extend(none, none)
        self.read += ids.tolist()
        end = TOKENIZER.added_tokens["<|im_end|>"]
        logits = torch.zeros(1, self._rows)
        logits[0, self.script[self.calls] if self.calls < len(self.script) else end] = 50.0
        self.calls += 1
        return logits

    @property
    def text(self) -> str:
        """All that it has read."""
        return TOKENIZER.decode(self.read)

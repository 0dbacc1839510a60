"""Keys and values of the tokens that a language model has seen, so that each new token is computed alone."""

from __future__ import annotations

from torch import Tensor

CHUNK = 256
"""Tokens by which the memory grows."""


class LayerCache:
    """Keys and values of one layer, [L, H_kv, D] each.

    Memory grows by whole chunks, so that few tokens are copied and hardly more is taken than is used. Nothing
    is taken before the first token, whose device and dtype it has.
    """

    def __init__(self) -> None:
        self.length = 0
        self._memory: Tensor | None = None  # both in one piece, [2, capacity, H_kv, D]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens, [L, H_kv, D] each -> views of all so far, in order."""
        start, stop = self.length, self.length + len(k)
        memory = self._memory
        if memory is None or memory.shape[1] < stop:
            memory = k.new_empty(2, capacity(stop), *k.shape[1:])
            if self._memory is not None:
                memory[:, :start] = self._memory[:, :start]
            self._memory = memory
        memory[0, start:stop], memory[1, start:stop] = k, v
        self.length = stop
        return memory[0, :stop], memory[1, :stop]


class KVCache:
    """The caches of all layers of one text.

    Args:
        layers: Number of layers.
    """

    def __init__(self, layers: int) -> None:
        self.layers = tuple(LayerCache() for _ in range(layers))

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""
        return self.layers[-1].length


def capacity(tokens: int) -> int:
    """Tokens that memory is taken for where so many are held."""
    return -(-tokens // CHUNK) * CHUNK


def cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, itemsize: int) -> int:
    """Most bytes of a cache that reaches so many tokens, with one layer held twice while it grows.

    Args:
        layers: Number of layers.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        tokens: Tokens.
        itemsize: Bytes of a number.
    """
    return (layers + 1) * 2 * capacity(tokens) * kv_heads * head_dim * itemsize

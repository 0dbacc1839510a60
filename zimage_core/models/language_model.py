"""A language model around a text encoder: the same layers, then the last one, the final norm and the head.

The encoder is the caller's own object, so that weights, streams, adapters and arithmetic are those of the
caption's encoder. What it leaves out is an `Ending`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zimage_core.config import TextEncoderConfig
from zimage_core.errors import BadArgument, BadShape
from zimage_core.models.kv_cache import KVCache
from zimage_core.models.text_encoder import Layer, TextEncoder
from zimage_core.nn.layers import RMSNorm
from zimage_core.nn.linear import Linear


class Ending(nn.Module):
    """The last layer of a language model, its final norm and the head that gives a number for each token.

    Args:
        config: The config of the whole model.
        tied: Whether the head's matrix is the table of token embeddings, which `LanguageModel` hands it.
    """

    def __init__(self, config: TextEncoderConfig, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.layer = Layer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)


class LanguageModel(nn.Module):
    """Token ids to a number (logit) for each token that may come next.

    Args:
        encoder: The text encoder, which is shared and not copied.
        ending: What follows its layers.
        max_positions: Most tokens of a text that the model was made for.
    """

    def __init__(self, encoder: TextEncoder, ending: Ending, max_positions: int) -> None:
        super().__init__()
        self.encoder, self.ending, self.max_positions = encoder, ending, max_positions
        self.share()

    @property
    def config(self) -> TextEncoderConfig:
        """The sizes of the model."""
        return self.encoder.config

    def new_cache(self) -> KVCache:
        """An empty cache for one text."""
        return KVCache(self.config.num_layers)

    def share(self) -> None:
        """Let the ending be what the encoder is now: device, dtype, arithmetic, and the table of a tied head.

        The encoder may have been moved or cast since; weights that are in place already are not touched.
        """
        self.tie()
        encoder, ending = self.encoder, self.ending
        weight: Tensor = ending.norm.weight
        if weight.device != encoder.device or weight.dtype != encoder.dtype:
            ending.layer.to(encoder.device, encoder.dtype)
            ending.norm.to(encoder.device, encoder.dtype)
            if not ending.tied:
                ending.head.to(encoder.device, encoder.dtype)

    def tie(self) -> None:
        """Let the last layer multiply as the encoder's do, and a tied head read the encoder's table."""
        encoder, ending = self.encoder, self.ending
        if ending.tied:  # the packed rows themselves: moved once, with the encoder
            ending.head.set_weight(encoder.embed_tokens.weight)
        last: nn.Module = encoder.layers[-1]
        for name, module in ending.layer.named_modules():
            if isinstance(module, Linear):
                like = last.get_submodule(name)
                module.arithmetic = getattr(like, "arithmetic", module.arithmetic)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the token after each of some tokens.

        Args:
            ids: Integers [L], L >= 1: all of a text, or those that follow the tokens in the cache.
            cache: What `new_cache` gave, or None to compute a text without keeping anything. It is added to.

        Returns:
            [L, vocab_size] float32 without a cache; with one [1, vocab_size], after the last token.

        Raises:
            BadShape: ids is not one row of at least one token.
            BadArgument: An id is outside the vocabulary, or the text would be longer than max_positions.
        """
        if ids.ndim != 1 or len(ids) == 0:
            raise BadShape(f"language model: got ids of shape {tuple(ids.shape)}, wanted [L] with L >= 1")
        start = 0 if cache is None else cache.length
        if start + len(ids) > self.max_positions:
            raise BadArgument(
                f"language model: {start + len(ids)} tokens, this model was made for {self.max_positions}; "
                "shorten the text"
            )
        if start == 0:
            x = self._last_hidden(ids, cache)
            return self._logits(x if cache is None else x[-1:])
        for token in ids[:-1]:  # attention knows the first tokens of a text or a single one after them
            self._last_hidden(token[None], cache)
        return self._logits(self._last_hidden(ids[-1:], cache))

    def _last_hidden(self, ids: Tensor, cache: KVCache | None) -> Tensor:
        """The residual stream after the last layer, [L, hidden_size]."""
        start, own = (0, None) if cache is None else (cache.length, cache.layers[-1])
        x = self.encoder(ids, cache)
        rope = self.encoder.rotation(len(ids), start)
        out: Tensor = self.ending.layer(x, rope, self.encoder.dtype, own)
        return out

    def _logits(self, x: Tensor) -> Tensor:
        """The head of hidden states [L, hidden_size] -> [L, vocab_size] float32."""
        head = self.ending.head
        x = self.ending.norm(x).to(self.encoder.dtype)
        # a tied table may stay on the host while the layers are on a GPU
        logits: Tensor = head(x.to(head.device))
        return logits.to(torch.float32)

"""The nano model's tokeniser: byte-level BPE of Qwen's kind, trained on the words of the prompts.

Chinese has no spaces, so the words are given one by one: merges then never run across a word's edge
and a sentence falls apart into words that were all seen in training, whatever their order. Single
characters are given first and often, so that they are merged before words are.
"""

from __future__ import annotations

import functools

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from benchmarks.nano.draw import GLYPHS, ZH, describe, random_scene

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<think>", "</think>")
"""Added tokens that are no control tokens, as in Qwen3."""
VISION = ("<|vision_start|>", "<|vision_end|>")
"""Control tokens around an image (Omni), added after the model was trained: the last ids of all."""
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
LENGTH = 32
"""Tokens of a caption with its template, padded."""
SMALL_WORDS = ("背景", "一个", "有", "在", "的", "上", "上有", "，", "字母", "数字", "汉字")  # noqa: RUF001
SHAPE_WORDS = ("圆", "方", "三角", "星", "十字", "环")


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokeniser, trained anew and always alike: its only randomness has fixed seeds."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    words = [*ZH.values(), *SMALL_WORDS, *SHAPE_WORDS]
    corpus = [
        c for c in sorted(set("".join(words)) | {g for g in GLYPHS if not g.isascii()}) for _ in range(20000)
    ]
    corpus += [w for w in sorted(set(words)) for _ in range(2000)]
    corpus += ["user\n", "assistant\n"] * 2000
    rng = np.random.default_rng(7)
    corpus += [describe(random_scene(rng, False), rng, chinese=False, omit=0.1) for _ in range(8000)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, min_frequency=50, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in VISION])
    return made


def encode(prompt: str) -> list[int]:
    """Token ids of the prompt in its chat template."""
    ids: list[int] = tokenizer().encode(TEMPLATE.format(prompt=prompt)).ids
    return ids

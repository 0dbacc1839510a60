"""Prompts written anew by the pipeline's own text encoder.

`Enhancing` is a base of the pipeline. Its methods import `language/` when they are called, so that a pipeline
that draws alone pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zimage_core.assets import NANO
from zimage_core.errors import BadArgument, Busy, Unsupported, WrongModel, ZImageError
from zimage_core.run.components import networks, require
from zimage_core.run.placement import Placement
from zimage_core.run.sharing import note_run
from zimage_core.sampling.noise import fresh_seed
from zimage_core.weights.load import opened_file

if TYPE_CHECKING:
    from zimage_core.language.enhance import Enhanced, OnText, Wish
    from zimage_core.models.language_model import LanguageModel

EMBEDDED = (
    "enhance: the embedded model reads prompts of a few words and is no language model; give a Qwen3 text "
    "encoder, such as Qwen3-4B-Q4_K_M.gguf, as text_encoder="
)


class Enhancing:
    """The methods of `ZImagePipeline` that write prompts."""

    _placement: Placement
    _running: dict[str, object]

    def enhance_prompt(
        self,
        prompt: str,
        instructions: str | None = None,
        think: bool = True,
        max_new_tokens: int = 1024,
        seed: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        keep_thought: bool = False,
        on_text: OnText | None = None,
    ) -> Enhanced:
        """Let the text encoder, which is a language model, write a prompt anew.

        Nothing is loaded but the last layer and the final norm of the text encoder's own file, and its head
        if it has one. Adapters of the text encoder count. docs/guides/enhance.md has examples.

        Args:
            prompt: What is to be drawn. Control tokens in it, such as <|im_end|>, are read as text here.
            instructions: What the model is told to do with it; default: ours, in English or Chinese.
            think: Whether the model thinks first, in a block that begins with <think>.
            max_new_tokens: Most tokens that are written, thought included. A thought that leaves too few for
                the prompt is ended.
            seed: Seed of the choices; the same seed gives the same text on the same machine. Default: drawn
                from torch's global generator.
            temperature: Divides the logits, 0 to 100; 0 takes the most likely token each time. Default: what
                Qwen3's model card recommends, 0.6 with thinking and 0.7 without.
            top_p: Share of the probability that is chosen from; default: 0.95 with thinking, 0.8 without.
            top_k: Number of tokens that are chosen from; default 20; 0 for all.
            min_p: Least probability, as a share of that of the most likely token; default 0.
            keep_thought: Put the thought before the prompt, so that it becomes a part of the caption.
            on_text: Called with each piece of text as it is written, and whether it is thought.

        Returns:
            The new prompt. It is a str, and knows `original`, `thought`, `answer`, `tokens` and `settings`;
            an image that is made from it has both prompts in its settings.

        Raises:
            BadArgument: An argument is outside its range.
            WrongModel: The text encoder's file lacks the last layer, the final norm or the head.
            Unsupported: There is no text encoder or tokenizer, the tokenizer lacks tokens of Qwen3's
                template, or no prompt was written.
            OverBudget: The memory budget is too small.
            Busy: A run has not ended.
        """
        from zimage_core.language.enhance import Wish

        wish = Wish.of(
            prompt, instructions, think, max_new_tokens, keep_thought, temperature=temperature, top_p=top_p,
            top_k=top_k, min_p=min_p, seed=fresh_seed() if seed is None else seed,
        )  # fmt: skip
        if on_text is not None and not callable(on_text):
            raise BadArgument(f"on_text: got {type(on_text).__name__}, wanted a function (text, is_thought)")
        token = object()
        if self._running.setdefault("run", token) is not token:
            raise Busy("this pipeline is already running, in another thread or around this callback; wait")
        try:
            return self._enhance(wish, on_text)
        finally:
            if self._running.get("run") is token:
                del self._running["run"]

    def _enhance(self, wish: Wish, on_text: OnText | None) -> Enhanced:
        from zimage_core.language.enhance import enhance
        from zimage_core.language.generate import stop_ids

        pipe: Any = self
        note_run(pipe)
        require("text_encoder", pipe.text_encoder)
        require("tokenizer", pipe.tokenizer)
        model = self._language_model()
        opened = opened_file(model.encoder)
        stop = stop_ids(pipe.tokenizer, None if opened is None else opened.file.metadata)
        try:
            with torch.no_grad(), self._writing(model, wish):
                return enhance(model, pipe.tokenizer, wish, stop, on_text)
        except RuntimeError as error:
            fault: ZImageError = pipe._explained(error)
        raise fault

    def _language_model(self) -> LanguageModel:
        """The language model around the present text encoder; its own part is loaded for each prompt."""
        from zimage_core.weights.language import load_language_model

        pipe: Any = self
        encoder = getattr(pipe.text_encoder, "_orig_mod", pipe.text_encoder)
        try:
            return load_language_model(encoder)
        except WrongModel as error:
            if Path(error.path).resolve().parent == NANO.resolve():
                raise Unsupported(EMBEDDED) from None
            raise

    @contextmanager
    def _writing(self, model: LanguageModel, wish: Wish) -> Iterator[None]:
        """Inside, the language model is ready on the device of the computation."""
        pipe: Any = self
        memory, encoder, opened = self._placement.memory, model.encoder, opened_file(model.encoder)
        if opened is not None:
            opened.file.check_unchanged()
        if memory is not None and opened is not None:
            from zimage_core.language.enhance import CLOSED
            from zimage_core.memory.writing import writing

            memory.check_networks(networks(pipe))
            prompt, most = len(wish.ids(pipe.tokenizer)), wish.max_new_tokens
            tokens = min(prompt + most + len(pipe.tokenizer.encode(CLOSED)), model.max_positions)
            with writing(memory, model, opened, prompt, tokens):
                yield
            return
        from zimage_core.memory.int8_rows import free_for_rows
        from zimage_core.nn.decoding import PAYS_FROM, mode_of, ready_for_decoding

        model.share()
        pays = encoder.device.type == "cpu" and wish.max_new_tokens >= PAYS_FROM
        room = free_for_rows([encoder], encoder.device, 0)[0] if pays else 0
        with self._placement.phase("encode", encoder), ready_for_decoding(model, mode_of(encoder), room):
            yield

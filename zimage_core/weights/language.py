"""Loads what a text encoder leaves out of its file: the last layer, the final norm and the head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch

from zimage_core.config import TextEncoderConfig
from zimage_core.errors import BadWeights, Unsupported, WrongModel, printable
from zimage_core.models.language_model import Ending, LanguageModel
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.weights import names
from zimage_core.weights.card import require, text_encoder_name
from zimage_core.weights.components import open_component
from zimage_core.weights.infer import squeezed
from zimage_core.weights.load import fill, load_network, opened_file, unfilled
from zimage_core.weights.opened import Opened
from zimage_core.weights.source import WeightFile

GET = "give a whole Qwen3-4B with its last layer, such as Qwen3-4B-Q4_K_M.gguf, as text_encoder="
POSITIONS = {"qwen3": 40960, "qwen2": 32768, "llama": 2048}
"""Most tokens of a text where the file does not say it."""
UNTIED_FROM = 3584
"""Width from which on Qwen and Llama models have a head of their own; smaller ones use the token table."""


def load_language_model(
    source: str | PathLike[str] | Opened | TextEncoder,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mmap: bool = True,
) -> LanguageModel:
    """Load a Qwen3, Qwen2 or llama language model that continues texts.

    Args:
        source: A file or folder, as for `load_text_encoder`; the open file; or a loaded text encoder, whose
            own open file gives the rest, so that nothing is read twice.
        dtype: The dtype of the computation; that of a text encoder counts where one is given.
        device: Device of the model, in the same way.
        mmap: Use the weights in place, as views of the file.

    Raises:
        BadFile, UnknownFormat: The file cannot be opened.
        WrongModel: It holds another model, or lacks the last layer, the final norm or the head.
        BadWeights: Tensors are misshapen, or hold NaN or infinity in norms or biases.
        Unsupported: The text encoder was built in memory.
    """
    if isinstance(source, TextEncoder):
        found = opened_file(source)
        if found is None:
            raise Unsupported(
                "language model: this text encoder came from no file, so its last layer is nowhere; load it "
                "from one by zimage_core.load_text_encoder(path)"
            )
        return LanguageModel(source, load_ending(found, source.dtype), max_positions(found))
    opened = open_component(source, "text_encoder", mmap)
    try:
        require(opened.card, "text_encoder", opened.file.path)
        ending = load_ending(opened, dtype)
        return LanguageModel(load_network(TextEncoder, opened, dtype, device), ending, max_positions(opened))
    except BaseException:
        if opened is not source:
            opened.file.close()
        raise


def load_ending(opened: Opened, dtype: torch.dtype) -> Ending:
    """Load the last layer, the final norm and the head from the open file of a text encoder.

    Args:
        opened: The file, which passed `weights.card.require`.
        dtype: The dtype of the computation.

    Returns:
        The ending on the host; a tied head is empty until `LanguageModel` gives it the table.

    Raises:
        WrongModel: The file lacks a part; the message names it.
        BadWeights: Tensors are misshapen, or hold NaN or infinity in norms or biases.
    """
    file, card = opened.file, opened.card
    config, rest, head, place = parts_of(opened)
    ending = unfilled(partial(Ending, config, head is None), dtype)
    fill(ending, file, rest, card.prefix, dtype)
    if head is not None:
        fill(ending, file, (head,), place, dtype)
    return ending


def parts_of(opened: Opened) -> tuple[TextEncoderConfig, names.Table, names.Entry | None, str]:
    """Where the last layer, the norm and the head are in a file, without reading them.

    Returns:
        The config; the table of layer and norm; the head, None where it is the table of token embeddings; and
        the prefix of the head's name.

    Raises:
        WrongModel: The file lacks a part; the message names it.
        BadWeights: A tensor has another shape than the config wants.
    """
    file, card = opened.file, opened.card
    config = card.config
    if not isinstance(config, TextEncoderConfig):
        raise BadWeights(f"{printable(file.path)}: its size cannot be told")
    rest = names.ending_table(config, card.layout)
    head, place = names.head_entry(config, card.layout), card.prefix
    for prefix in (card.prefix, card.prefix.removesuffix("model.")):  # lm_head lies beside "model."
        if prefix + head.checkpoint in file.tensors:
            place = prefix
    has_head = place + head.checkpoint in file.tensors
    wanted = {card.prefix + name: shape for name, shape in names.checkpoint_shapes(rest).items()}
    lacking = _lacking(config, [name for name in wanted if name not in file.tensors])
    if not has_head and not _tied(config, opened.stated):
        lacking.append(f"its head ({head.checkpoint})")
    if lacking:
        raise WrongModel(
            file.path,
            f"this {text_encoder_name(config)} text encoder cannot write text: its file lacks "
            f"{' and '.join(lacking)}, which images do not need",
            GET,
        )
    if has_head:
        wanted[place + head.checkpoint] = head.shape
    _check_shapes(file, wanted)
    return config, rest, head if has_head else None, place


def max_positions(opened: Opened) -> int:
    """Most tokens of a text that the model in a file was made for."""
    config, metadata, stated = opened.card.config, opened.file.metadata, opened.stated or {}
    arch = config.arch if isinstance(config, TextEncoderConfig) else "qwen3"
    usual = POSITIONS[arch]
    found: Any = stated.get("max_position_embeddings", metadata.get(f"{arch}.context_length"))
    longest = found if type(found) is int and found > 0 else usual
    # a window that is longer than any prompt was accepted; a text beyond it would need other attention
    windows: list[Any] = [metadata.get(f"{arch}.attention.sliding_window")]
    if stated.get("use_sliding_window") or "sliding_attention" in (stated.get("layer_types") or ()):
        windows.append(stated.get("sliding_window"))
    return min([longest, *(n for n in windows if type(n) is int and n > 0)])


def _tied(config: TextEncoderConfig, stated: Mapping[str, Any] | None) -> bool:
    """Whether the head of a file without one is the table of token embeddings."""
    found = (stated or {}).get("tie_word_embeddings")
    return found if isinstance(found, bool) else config.hidden_size < UNTIED_FROM


def _lacking(config: TextEncoderConfig, missing: list[str]) -> list[str]:
    """What tensors that are not there belong to, in words."""
    number = config.num_layers - 1
    in_layer = [f".{number}." in name for name in missing]
    found = [f"its last layer (number {number}, counted from 0)"] if any(in_layer) else []
    return found if all(in_layer) else [*found, "its final norm"]


def _check_shapes(file: WeightFile, wanted: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in wanted.items():
        has = file.tensors[name].shape
        if squeezed(has) != squeezed(shape):
            raise BadWeights(
                f"{printable(file.path)}: {printable(name, 120)} is {has}, wanted {shape}; download it again"
            )

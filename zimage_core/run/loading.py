"""The components of a pipeline, loaded from files: opened once, checked together, then built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from zimage_core.config import COMPONENTS
from zimage_core.errors import Unsupported, WrongModel
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.run import sources
from zimage_core.run.checks import read_path, shown
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.load import load_network
from zimage_core.weights.opened import Opened, open_pipeline
from zimage_core.weights.source import WeightFile

NATIVE_SIZE = 1024
SIZE_KEY = "zimage.sample_size"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
ALWAYS = ("low_cpu_mem_usage", "use_safetensors")
"""Arguments of diffusers whose wish is always met."""

PathLike = str | os.PathLike[str]


def load_components(
    paths: Mapping[str, PathLike | Opened],
    tokenizer: PathLike | Tokenizer | None,
    scheduler: FlowMatchEulerScheduler | None,
    dtype: torch.dtype,
    device: torch.device,
    mmap: bool,
) -> dict[str, Any]:
    """Load what `ZImagePipeline` is made of.

    Args:
        paths: "transformer", "text_encoder" and "vae" -> file, folder, or the file that is open already.
        tokenizer: See `ZImagePipeline.from_files`.
        scheduler: None for shift 3.
        dtype: The dtype of transformer and text encoder; the VAE is always float32.
        device: Where the networks are put.
        mmap: Use weights in place.

    Returns:
        Arguments of `ZImagePipeline` by name.

    Raises:
        BadArgument: A path is none; BadFile: a file cannot be read; WrongModel, BadWeights: it is another
            model or a damaged one.
    """
    for name, path in paths.items():
        if not isinstance(path, Opened):
            read_path(name, path)
    opened = open_pipeline({name: paths[name] for name in COMPONENTS}, mmap)
    try:
        encoder = load_network(TextEncoder, opened["text_encoder"], dtype, device)
        return {
            "text_encoder": encoder,
            "tokenizer": sources.find_tokenizer(tokenizer, opened["text_encoder"].file),
            "transformer": load_network(ZImageTransformer, opened["transformer"], dtype, device),
            "vae": load_network(Autoencoder, opened["vae"], torch.float32, device),
            "scheduler": scheduler or FlowMatchEulerScheduler(),
            "sample_size": _sample_size(opened["transformer"].file),
        }
    except BaseException:
        for part in opened.values():
            part.file.close()
        raise


def find_components(
    source: PathLike,
    given: Mapping[str, PathLike],
    tokenizer: PathLike | Tokenizer | None,
    scheduler: FlowMatchEulerScheduler | None,
    mmap: bool,
    others: Mapping[str, Any],
) -> tuple[dict[str, PathLike | Opened], PathLike | Tokenizer | None, FlowMatchEulerScheduler | None]:
    """Find the files of a folder or repository, for `ZImagePipeline.from_pretrained`.

    Args:
        source: Folder or repository.
        given: Components from elsewhere.
        tokenizer: The caller's; without it the folder's, if its text encoder is used too.
        scheduler: The caller's; without it the folder's.
        mmap: Use weights in place.
        others: Further arguments: those of the Hub, and diffusers' whose wish is always met.

    Returns:
        Paths, tokenizer and scheduler, as `load_components` takes them.

    Raises:
        BadArgument, BadFile, WrongModel: See `sources.find`.
        Unsupported: An argument of diffusers that means nothing here; the message names it.
    """
    for name, value in others.items():
        if value is not None and name not in (*ALWAYS, *HUB_OPTIONS):
            raise Unsupported(f"from_pretrained: {name}={shown(value)} means nothing here; leave it out")
    hub_options = {name: others[name] for name in HUB_OPTIONS if others.get(name) is not None}
    found = sources.find(source, given, hub_options, mmap)
    if tokenizer is None and "text_encoder" not in given:
        tokenizer = found.tokenizer
    return {**found.paths, **given}, tokenizer, scheduler or found.scheduler


def check_tokenizer(tokenizer: Tokenizer, encoder: TextEncoder, path: str) -> None:
    """Refuse a tokenizer that has more tokens than the text encoder.

    Raises:
        WrongModel: The message names the text encoder by `path`.
    """
    rows = encoder.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise WrongModel(
            path,
            f"it knows {rows} tokens, the tokenizer has {tokenizer.vocab_size}",
            "give the tokenizer that belongs to it",
        )


def _sample_size(file: WeightFile) -> int:
    size = file.metadata.get(SIZE_KEY)
    return size if isinstance(size, int) and 16 <= size <= 8192 and size % 16 == 0 else NATIVE_SIZE

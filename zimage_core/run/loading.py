"""Loads the components of a pipeline: files are opened once, checked together, then built into networks."""

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
from zimage_core.weights.components import open_component, open_pipeline
from zimage_core.weights.facts import facts
from zimage_core.weights.load import load_network
from zimage_core.weights.opened import Opened

NATIVE_SIZE = 1024
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
ALWAYS = ("low_cpu_mem_usage", "use_safetensors")
"""Arguments of diffusers that are ignored, because the library always does what they ask for."""

PathLike = str | os.PathLike[str]


def load_components(
    paths: Mapping[str, PathLike | Opened],
    tokenizer: PathLike | Tokenizer | None,
    scheduler: FlowMatchEulerScheduler | None,
    dtype: torch.dtype,
    device: torch.device,
    mmap: bool,
) -> dict[str, Any]:
    """Load the components of a pipeline.

    Args:
        paths: "transformer", "text_encoder" and "vae" -> file, folder, or the file that is open already.
        tokenizer: Path or object, as for `ZImagePipeline.from_files`; None finds the text encoder's own.
        scheduler: The schedule; None for the one that the transformer's file or folder states, else shift 3.
        dtype: The dtype of transformer and text encoder; the VAE is always float32.
        device: Device of the networks.
        mmap: Use the weights in place, as views of the files.

    Returns:
        Keyword arguments of `ZImagePipeline`.

    Raises:
        BadArgument: A path is no path.
        BadFile: A file cannot be read.
        WrongModel, BadWeights: A file is another model or a damaged one.
    """
    for name, path in paths.items():
        if not isinstance(path, Opened):
            read_path(name, path)
    opened = open_pipeline({name: paths[name] for name in COMPONENTS}, mmap)
    try:
        known = facts(opened["transformer"], beside=scheduler is None)
        encoder = load_network(TextEncoder, opened["text_encoder"], dtype, device)
        return {
            "text_encoder": encoder,
            "tokenizer": sources.find_tokenizer(tokenizer, opened["text_encoder"].file),
            "transformer": load_network(ZImageTransformer, opened["transformer"], dtype, device),
            "vae": load_network(Autoencoder, opened["vae"], torch.float32, device),
            "scheduler": scheduler or schedule_of(known),
            "sample_size": known.get("sample_size", NATIVE_SIZE),
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
    variant: str | None,
    others: Mapping[str, Any],
) -> tuple[dict[str, PathLike | Opened], PathLike | Tokenizer | None, FlowMatchEulerScheduler | None]:
    """Find the files of a folder or repository, for `ZImagePipeline.from_pretrained`.

    Args:
        source: Folder or repository.
        given: Components that the caller passes as paths of their own.
        tokenizer: The caller's tokenizer; if None, the folder's is used together with its text encoder.
        scheduler: The caller's scheduler; None uses the folder's, but for a transformer from elsewhere that
            states its own.
        mmap: Use the weights in place, as views of the files.
        variant: The variant of the files, such as "fp16"; None for those without one.
        others: Further arguments: those of the Hub, and those of diffusers that can be ignored.

    Returns:
        Paths, tokenizer and scheduler, in the form that `load_components` takes.

    Raises:
        BadArgument, BadFile, WrongModel: `sources.find` refuses the folder or repository.
        Unsupported: An argument of diffusers is not supported; the message names it.
    """
    for name, value in others.items():
        if value is not None and name not in (*ALWAYS, *HUB_OPTIONS):
            raise Unsupported(f"from_pretrained: {name}={shown(value)} means nothing here; leave it out")
    hub_options = {name: others[name] for name in HUB_OPTIONS if others.get(name) is not None}
    elsewhere = (*given, "scheduler") if scheduler is not None else tuple(given)
    found = sources.find(source, elsewhere, hub_options, mmap, variant)
    if tokenizer is None and "text_encoder" not in given:
        tokenizer = found.tokenizer
    if scheduler is None and not _states_schedule(given.get("transformer")):
        scheduler = found.scheduler
    return {**found.paths, **given}, tokenizer, scheduler


def _states_schedule(transformer: PathLike | None) -> bool:
    """Whether a transformer's file, or the folder that it lies in, states a schedule."""
    if transformer is None:
        return False
    opened = open_component(read_path("transformer", transformer), "transformer", mmap=False)
    try:
        return "shift" in facts(opened)
    finally:
        opened.file.close()


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


def schedule_of(known: Mapping[str, Any]) -> FlowMatchEulerScheduler:
    """The schedule that the facts of a transformer state; shift 3 where they state none."""
    if not known.keys() & {"shift", "scheduler"}:
        return FlowMatchEulerScheduler()
    shift = known.get("shift", FlowMatchEulerScheduler.shift)
    return FlowMatchEulerScheduler.from_json({**known.get("scheduler", {}), "shift": shift})

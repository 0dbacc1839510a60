"""Loads the components of a pipeline: files are opened once, checked together, then built into networks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from zimage_core.config import COMPONENTS, NATIVE_SIZE
from zimage_core.errors import Unsupported
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.run import sources
from zimage_core.run.checks import read_path, shown
from zimage_core.run.components import SIGLIP, check_kind, is_network
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.card import require
from zimage_core.weights.components import open_component, open_pipeline
from zimage_core.weights.facts import facts
from zimage_core.weights.load import load_network, opened_file
from zimage_core.weights.opened import Opened

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
ALWAYS = ("low_cpu_mem_usage", "use_safetensors")
"""Arguments of diffusers that are ignored, because the library always does what they ask for."""

INSTEAD = {
    "device_map": 'give device="cuda", and vram= or ram= for a limit of memory',
    "max_memory": "give vram= and ram=",
    "offload_folder": "weights that do not fit are read from their own files; give vram= or ram=",
    "offload_state_dict": "weights that do not fit are read from their own files; give vram= or ram=",
    "quantization_config": "write a GGUF with zimage_core.quantize_file and give it as transformer=",
    "custom_pipeline": "code is never loaded with a model; leave it out",
    "trust_remote_code": "code is never loaded with a model; leave it out",
}
"""Argument of diffusers -> what to do instead."""

PathLike = str | os.PathLike[str]
CLASSES: dict[str, Any] = {
    "text_encoder": TextEncoder, "transformer": ZImageTransformer, "vae": Autoencoder
}  # fmt: skip


def class_of(name: str) -> Any:
    """The class of a component; that of a vision tower is imported where there is one."""
    if name != SIGLIP:
        return CLASSES[name]
    from zimage_core.models.vision_tower import VisionTower

    return VisionTower


def load_components(
    paths: Mapping[str, Any],
    tokenizer: PathLike | Tokenizer | None,
    scheduler: FlowMatchEulerScheduler | None,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    mmap: bool,
) -> dict[str, Any]:
    """Load the components of a pipeline.

    Args:
        paths: "transformer", "text_encoder" and "vae" -> file, folder, the file that is open already, a
            network, or None for none; and "siglip" where there is one.
        tokenizer: Path or object, as for `ZImagePipeline.from_files`; None finds the text encoder's own.
        scheduler: The schedule; None for the one that the transformer's file or folder states, else shift 3.
        dtypes: The dtypes of "transformer", "text_encoder" and "siglip"; the VAE is always float32.
        device: Device of the networks.
        mmap: Use the weights in place, as views of the files.

    Returns:
        Keyword arguments of `ZImagePipeline`.

    Raises:
        BadArgument: A path is no path.
        BadFile: A file cannot be read.
        WrongModel, BadWeights: A file is another model or a damaged one.
    """
    check_kind("scheduler", scheduler)
    objects = {name: value for name, value in paths.items() if value is None or is_network(value)}
    for name, value in paths.items():
        if name in objects:
            check_kind(name, value)
        elif not isinstance(value, Opened):
            read_path(name, value)
    opened = open_pipeline({name: paths[name] for name in COMPONENTS if name not in objects}, mmap)
    try:
        if SIGLIP in paths and SIGLIP not in objects:
            opened[SIGLIP] = part = open_component(paths[SIGLIP], SIGLIP, mmap)
            require(part.card, SIGLIP, part.file.path)
        found = {name: None if value is None else value.to(device) for name, value in objects.items()}
        for name, part in opened.items():
            found[name] = load_network(class_of(name), part, dtypes.get(name, torch.float32), device)
        if SIGLIP in opened:
            from zimage_core.vision.processor import processor_of

            tower: Any = found[SIGLIP]
            tower.processor = processor_of(tower)  # a copy of it has no file
        encoder = found["text_encoder"]
        if encoder is not None or tokenizer is not None:
            own = None if encoder is None else opened_file(encoder)
            tokenizer = sources.find_tokenizer(tokenizer, None if own is None else own.file)
        return {**found, "tokenizer": tokenizer, "scheduler": scheduler}
    except BaseException:
        for part in opened.values():
            part.file.close()
        raise


def find_components(
    source: PathLike,
    given: Mapping[str, Any],
    tokenizer: PathLike | Tokenizer | None,
    scheduler: FlowMatchEulerScheduler | None,
    mmap: bool,
    variant: str | None,
    others: Mapping[str, Any],
) -> tuple[dict[str, Any], PathLike | Tokenizer | None, FlowMatchEulerScheduler | None]:
    """Find the files of a folder or repository, for `ZImagePipeline.from_pretrained`.

    Args:
        source: Folder or repository.
        given: Components that the caller passes: a path, a network, or None for none.
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
            advice = INSTEAD.get(name, "leave it out")
            raise Unsupported(f"from_pretrained: {name}={shown(value)} means nothing here; {advice}")
    hub_options = {name: others[name] for name in HUB_OPTIONS if others.get(name) is not None}
    elsewhere = (*given, "scheduler") if scheduler is not None else tuple(given)
    found = sources.find(source, elsewhere, hub_options, mmap, variant)
    encoder = given.get("text_encoder")
    fileless = is_network(encoder) and opened_file(encoder) is None  # it has no tokenizer of its own
    if tokenizer is None and (fileless or "text_encoder" not in given):
        tokenizer = found.tokenizer
    if scheduler is None and not _states_schedule(given.get("transformer")):
        scheduler = found.scheduler
    return {**found.paths, **given}, tokenizer, scheduler


def _states_schedule(transformer: PathLike | torch.nn.Module | None) -> bool:
    """Whether a transformer's file, or the folder that it lies in, states a schedule."""
    if transformer is None or is_network(transformer):
        return "shift" in known_of(transformer)
    opened = open_component(read_path("transformer", transformer), "transformer", mmap=False)
    try:
        return "shift" in facts(opened)
    finally:
        opened.file.close()


def keep_sample_size(transformer: ZImageTransformer | None, sample_size: int | None) -> int:
    """Default height and width of a pipeline, which its transformer keeps for pipelines that share it.

    Args:
        transformer: The transformer; None if there is none.
        sample_size: The caller's size; None uses the size that the transformer or its file states, else 1024.
    """
    if sample_size is None and transformer is not None:
        sample_size = transformer.sample_size or known_of(transformer, schedule=False).get("sample_size")
    if transformer is not None:
        transformer.sample_size = sample_size
    return sample_size or NATIVE_SIZE


def stated_scheduler(known: Mapping[str, Any]) -> FlowMatchEulerScheduler | None:
    """The schedule among the facts of a transformer; None if they state none."""
    if not known.keys() & {"shift", "scheduler"}:
        return None
    shift = known.get("shift", FlowMatchEulerScheduler.shift)
    return FlowMatchEulerScheduler.from_json({**known.get("scheduler", {}), "shift": shift})


def known_of(transformer: torch.nn.Module | None, schedule: bool = True) -> dict[str, Any]:
    """The facts that a transformer's file and the configs beside it state.

    Args:
        transformer: The network; None, and one that was built in memory, state nothing.
        schedule: Whether a scheduler_config.json beside the file is read.
    """
    part = None if transformer is None else opened_file(transformer)
    return {} if part is None else facts(part, beside=schedule)

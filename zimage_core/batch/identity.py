"""What tells images of one model, computed in one way, from those of another: a part of every row's key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zimage_core.assets import embedded_files, embedded_part
from zimage_core.batch.columns import argument, read_cell
from zimage_core.batch.model import EDGES, Model, Survey, hash_of, is_small, nameless
from zimage_core.batch.rows import Context
from zimage_core.batch.worker import Spec
from zimage_core.config import COMPONENTS
from zimage_core.cpu.threads import chosen
from zimage_core.errors import BadArgument, Unsupported
from zimage_core.run import checks
from zimage_core.weights.load import opened_file

if TYPE_CHECKING:
    from zimage_core.pipeline import ZImagePipeline

NO_CONTROL = "control_image: it needs a ControlNet for this model; give --controlnet FILE (controlnets=)"
NO_VISION = (
    "reference_images: this transformer takes text alone; it needs an Omni checkpoint and its vision tower"
)


def survey_of(pipe: ZImagePipeline) -> Survey:
    """What is known of a pipeline that is loaded."""
    files = {name: file.identity() for name, file in pipe.files().items()}
    return Survey(pipe.limits, files, is_small(pipe.transformer.config, pipe.limits))


def threads_of(known: Survey, threads: int | None) -> int:
    """Threads of torch: those asked for, else by a rule that does not depend on who calls the workers."""
    if threads is not None:
        return checks.whole("threads", threads, 1, 4096)
    return 1 if known.small and not chosen() else torch.get_num_threads()


def context_of(
    model: Model,
    known: Survey,
    pipe: ZImagePipeline | None,
    defaults: Mapping[str, Any] | None,
    keep: Collection[str],
) -> Context:
    """What rows are checked by.

    Raises:
        BadArgument: A default is no argument of a call.
        BadFile, WrongModel: A ControlNet cannot be read.
    """
    usual: dict[str, Any] = {}
    for name, value in (defaults or {}).items():
        target = argument(name)
        if target in ("prompt", "seed", "lora") or target.endswith(("image", "images")):
            raise BadArgument(f"defaults: {name} belongs into a row")
        if value is not None:
            usual[target] = read_cell(target, value, False, Path())
    extras: dict[str, Any] = {"control_image": NO_CONTROL, "reference_images": NO_VISION}
    if pipe is not None:
        nets = [opened_file(net) for net in pipe.controlnets.values()]
        hashes = [net and nameless(net.file.identity()) for net in nets]
    else:
        named = model.controlnets or ((EDGES,) if model.embedded else ())
        hashes = [hash_of(embedded_part(net) or net) for net in named]
    if hashes:
        extras["control_image"] = hashes
    if known.limits.vision:
        extras["reference_images"] = nameless(known.files.get("siglip", {}))
    elif pipe is None and model.embedded:
        extras["reference_images"] = [hash_of(path) for path in embedded_files(omni=True).values()]
    return Context(known.limits, extras, usual, keep=keep)


def identity_of(spec: Spec, known: Survey, pipe: ZImagePipeline | None) -> dict[str, Any]:
    """What tells this model and its arithmetic from others; the device must be decided.

    Raises:
        Unsupported: A network of the pipeline came from no file.
    """
    if missing := [name for name in COMPONENTS if name not in known.files]:
        raise Unsupported(
            f"pipe: its {' and '.join(missing)} came from no file, so that images could not be told from "
            "those of another model; save it, and load it from there"
        )
    hashes = {name: nameless(known.files[name]) for name in COMPONENTS}
    device, dtype, compute = spec.model.device.partition(":")[0], spec.model.dtype, spec.model.compute
    if pipe is not None:
        device, dtype, compute = pipe.device.type, str(pipe.dtype).removeprefix("torch."), pipe.compute
    found: dict[str, Any] = {"files": hashes, "dtype": dtype, "compute": compute, "device": device}
    if device == "cpu":
        found["threads"] = spec.threads
    loras = () if pipe is None else pipe.loras
    if active := [(nameless(lora.file) or lora.name, lora.weight) for lora in loras if lora.weight]:
        found["loras"] = active
    return found

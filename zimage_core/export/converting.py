"""Converts a checkpoint from one layout to another, exactly.

The layouts are diffusers' folder, ComfyUI's single safetensors file, and GGUF. Tensors are renamed, and fused
or split at row boundaries; their bytes are copied, also those of packed blocks. GGUF readers expect norms,
biases and pad tokens in float32, so these are widened, which is exact, and converted back to their old type
in the other direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from zimage_core.errors import BadArgument, Unsupported, printable
from zimage_core.export import safetensors_file
from zimage_core.export.checkpoint import PREFIXES, Checkpoint, Target, is_small
from zimage_core.export.configs import config_json
from zimage_core.export.folders import SHARD_BYTES, write_component, write_layout
from zimage_core.export.metadata import gguf_metadata, safetensors_metadata
from zimage_core.export.mixes import MIXES
from zimage_core.export.quantizing import refuse_same_file
from zimage_core.export.streaming import Job, Log, Progress
from zimage_core.export.vocabularies import (
    TOKENS_KEY,
    copied_files,
    tell_of_tokenizer,
    tokenizer_files,
    tokenizer_place,
)
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights import gguf_writer

LAYOUTS = {
    "transformer": {"diffusers": "split", "single": "fused", "gguf": "fused"},
    "text_encoder": {"diffusers": "hf", "single": "hf", "gguf": "gguf"},
    "vae": {"diffusers": "diffusers", "single": "bfl"},
    "siglip": {"diffusers": "hf", "single": "hf", "gguf": "mmproj"},
}
"""Component -> kind of file -> layout of weights/names.py."""
KINDS = ("diffusers", "single", "gguf")
FLOATS = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""Value of `dequantize` -> type that packed weights are dequantised to."""
NARROW_KEY = "zimage.float_type"
"""Key of a GGUF: the type that its F32 norms, biases and pad tokens had before they were widened."""


@dataclass(frozen=True)
class Converted:
    """What `convert_file` wrote.

    Args:
        path: The file or folder.
        nbytes: Size of the files of weights in bytes.
        types: Format -> number of tensors.
        remarks: The messages that were passed to `log`.
    """

    path: str
    nbytes: int
    types: dict[str, int]
    remarks: tuple[str, ...]


_ENDINGS = {".gguf": "gguf", ".safetensors": "single", ".sft": "single"}
_OTHER_ENDINGS = (
    *(".bin", ".ckpt", ".h5", ".json", ".mlmodel", ".msgpack", ".npz", ".onnx", ".pickle", ".pkl", ".pt"),
    *(".pt2", ".pth", ".tar", ".zip"),
)


def kind_of(out: str | PathLike[str]) -> str:
    """The kind of file that a name stands for: .gguf, .safetensors (or .sft), or else a folder.

    Raises:
        BadArgument: The name ends like a file of a kind that is not written.
    """
    ending = Path(out).suffix.lower()
    if ending in _OTHER_ENDINGS and not Path(out).is_dir():
        raise BadArgument(f"{printable(fspath(out))}: {ending} is not written; wanted {_WANTED}")
    return _ENDINGS.get(ending, "diffusers")


_WANTED = "a name that ends in .gguf or .safetensors, or that of a folder"


def convert_file(
    source: str | PathLike[str],
    out: str | PathLike[str],
    to: str | None = None,
    *,
    component: str | None = None,
    variant: str | None = None,
    dequantize: str | None = None,
    prefix: str = "",
    shard_bytes: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    log: Log | None = None,
) -> Converted:
    """Write a checkpoint in another layout.

    Args:
        source: A checkpoint in any layout that the library reads.
        out: The file to write, or for "diffusers" a folder, which must be empty or not exist yet.
        to: "diffusers", "single" or "gguf"; None decides by the name of `out`.
        component: "transformer", "text_encoder", "vae" or "siglip", for a folder or file that holds several.
        variant: In a folder, the variant of the files, such as "fp16"; None for those without one.
        dequantize: "bf16", "f16" or "f32": the type of floats that packed weights become.
        prefix: Text before each name of a single file, such as "model.diffusion_model.".
        shard_bytes: Most bytes of one file of a diffusers folder; None for 5 GB.
        overwrite: Replace an existing file (never a folder).
        progress: Called as progress(weights done, weights in all, tensor).
        log: Called with messages for the user.

    Returns:
        Path, size, types and remarks of the file.

    Raises:
        BadArgument: A kind or type is unknown, `out` ends like another kind of file, or an option is given
            that the kind does not have: a prefix (single file) or the size of shards (diffusers folder).
        BadFile: The source cannot be read; `out` exists, is the source, or cannot be written.
        Unsupported: The source has packed weights, `out` is safetensors, and `dequantize` is missing; or a
            VAE is to become a GGUF; or the parts of one tensor have different types.
        WrongModel, BadWeights: The source is another model or a damaged one.
    """
    if to is not None and to not in KINDS:
        raise BadArgument(f"to: got {printable(to, 40)!r}, wanted one of {', '.join(KINDS)}")
    named = kind_of(out)
    to = to or named
    if to != named:
        raise BadArgument(f"{printable(fspath(out))}: no name for a file of kind {to}; wanted {_WANTED}")
    if dequantize is not None and dequantize not in FLOATS:
        raise BadArgument(f"dequantize: got {printable(dequantize, 40)!r}, wanted one of {', '.join(FLOATS)}")
    if prefix and to != "single":
        raise BadArgument("prefix: only a single file has one")
    if shard_bytes is not None and (to != "diffusers" or shard_bytes < 1):
        raise BadArgument("shard_bytes (--shard-size): 1 or more, and only a folder of diffusers has shards")
    remarks: list[str] = []

    def say(text: str) -> None:
        remarks.append(text)
        if log is not None:
            log(text)

    with Checkpoint(source, component, variant) as checkpoint:
        layout = LAYOUTS[checkpoint.component].get(to)
        if layout is None:
            where = printable(checkpoint.file.path)
            raise Unsupported(f"{where}: a VAE is not kept as GGUF; write it as safetensors")
        refuse_same_file(checkpoint, out)
        others: dict[str, bytes] = {}
        if to != "gguf":
            prefix = prefix or PREFIXES.get(checkpoint.component, "")
            if checkpoint.component == "text_encoder":
                others = _tokenizer(checkpoint, to, say)
        targets = checkpoint.targets(layout, prefix)
        if dequantize is not None and all(_is_plain(checkpoint, target) for target in targets):
            say("nothing is packed, so every number keeps its type: dequantising changes nothing")
        make = _gguf_job if to == "gguf" else _safetensors_job
        jobs = [make(checkpoint, target, dequantize) for target in targets]
        rows = [(job.target.name, job.target.shape, job.format) for job in jobs]
        if to == "diffusers":
            config = config_json(checkpoint, jobs, _is_changed(checkpoint, jobs))
            metadata = safetensors_metadata(checkpoint)
            nbytes = write_component(
                checkpoint,
                jobs,
                checkpoint.component,
                config,
                metadata,
                out,
                shard_bytes=shard_bytes or SHARD_BYTES,
                others=others,
                progress=progress,
                log=say,
            )
        else:
            if to == "gguf":
                laid_out = gguf_writer.lay_out(_gguf_keys(checkpoint, jobs, say), rows)
            else:
                laid_out = safetensors_file.lay_out(safetensors_metadata(checkpoint), rows)
            nbytes = write_layout(checkpoint, jobs, laid_out, out, overwrite, progress, say)
    types = Counter(job.format.name for job in jobs)
    return Converted(fspath(out), nbytes, dict(types), tuple(remarks))


def _is_plain(source: Checkpoint, target: Target) -> bool:
    """Whether a tensor is stored as floats of one type, without a scale."""
    stored = source.format_of(target)
    return stored is not None and stored.is_float and not source.is_scaled(target)


def _float(source: Checkpoint, target: Target, dequantize: str | None) -> BlockFormat | None:
    """The float type that a tensor must be converted to, or None if its bytes can be copied."""
    stored = source.format_of(target)
    if _is_plain(source, target):
        return None
    if dequantize is not None:
        return FORMATS[FLOATS[dequantize]]
    if stored is not None and stored.ggml_type is not None and not source.is_scaled(target):
        return None
    found = " and ".join(sorted(source.formats_of(target)))
    raise Unsupported(
        f"{printable(source.file.path)}: {printable(target.name, 120)} is stored as {found}, which cannot be "
        "carried over as it is; dequantise it (--dequantize bf16 or f32), or use `zimage quantize`"
    )


def _gguf_job(source: Checkpoint, target: Target, dequantize: str | None) -> Job:
    stored = source.format_of(target)
    if is_small(target):
        return Job(target, FORMATS["F32"])
    return Job(target, _float(source, target, dequantize) or stored or FORMATS["F32"])


def _safetensors_job(source: Checkpoint, target: Target, dequantize: str | None) -> Job:
    stored = source.format_of(target)
    narrow = source.file.metadata.get(NARROW_KEY)
    if is_small(target) and stored == FORMATS["F32"] and narrow in FLOATS.values():
        return Job(target, FORMATS[str(narrow)])
    fmt = _float(source, target, dequantize) or stored
    if fmt is None or not fmt.is_float:
        raise Unsupported(
            f"{printable(source.file.path)}: its weights are packed ({fmt.name if fmt else 'mixed'}), which "
            "safetensors cannot hold; dequantise them (--dequantize bf16 or f32)"
        )
    return Job(target, fmt)


def _gguf_keys(source: Checkpoint, jobs: Sequence[Job], log: Log) -> dict[str, Any]:
    """The metadata of a converted GGUF."""
    metadata = gguf_metadata(source, file_type=_file_type(source, jobs), log=log)
    if not _same_types(source, jobs):
        for key in ("zimage.recipe_name", "zimage.recipe"):
            metadata.pop(key, None)
    widened = Counter(name for job in jobs if is_small(job.target) for name in source.formats_of(job.target))
    if len(widened) == 1 and next(iter(widened)) in ("F16", "BF16"):
        metadata[NARROW_KEY] = next(iter(widened))
    elif len(widened) > 1:
        log("norms, biases and pad tokens of several types all become F32")
    return metadata


def _file_type(source: Checkpoint, jobs: Sequence[Job]) -> int | None:
    """llama.cpp's number of the mix: the source's own, or that of the most frequent type of its matrices."""
    stated = source.file.metadata.get("general.file_type")
    if isinstance(stated, int) and _same_types(source, jobs):
        return stated
    matrices = Counter(job.format.name for job in jobs if not is_small(job.target))
    mix = MIXES.get(matrices.most_common(1)[0][0]) if matrices else None
    return None if mix is None else mix.file_type


def _same_types(source: Checkpoint, jobs: Sequence[Job]) -> bool:
    """Whether every matrix keeps its type."""
    return all(is_small(job.target) or source.format_of(job.target) == job.format for job in jobs)


def _is_changed(source: Checkpoint, jobs: Sequence[Job]) -> bool:
    """Whether the type of any tensor changes."""
    return any(source.format_of(j.target) != j.format or source.is_scaled(j.target) for j in jobs)


def _tokenizer(source: Checkpoint, to: str, log: Log) -> dict[str, bytes]:
    """The files of the tokenizer for a folder; what is not carried over is logged."""
    place = tokenizer_place(source.file, source.folder)
    if to == "single":
        tell_of_tokenizer(place, log)
        return {}
    try:
        if TOKENS_KEY in source.file.metadata:
            return tokenizer_files(Tokenizer.from_gguf(source.file), source.file.metadata)
        return {} if place is None else copied_files(place)
    except Unsupported as error:
        log(f"the tokenizer is not in the output: {error}")
        return {}

"""Writes a component as diffusers keeps it: shards, their index and config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from zimage_core.errors import BadArgument, BadFile, printable
from zimage_core.export import safetensors_file
from zimage_core.export.streaming import Job, Log, Progress, TensorSource, write_tensors
from zimage_core.files.atomic import atomic_file, atomic_folder, write_atomically
from zimage_core.weights.gguf_writer import Layout

STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | dict.fromkeys(
    ("text_encoder", "siglip"), "model"
)
"""Component -> beginning of the names of its files."""
SHARD_BYTES = 5 * 10**9
_VARIANT = re.compile(r"[A-Za-z]\w{0,31}", re.ASCII)


def write_layout(
    source: TensorSource,
    jobs: Sequence[Job],
    layout: Layout,
    out: str | PathLike[str],
    overwrite: bool = False,
    progress: Progress | None = None,
    log: Log | None = None,
) -> int:
    """Write one file, NaN and infinity as they are; return its size in bytes."""
    with atomic_file(out, overwrite, layout.nbytes) as file:
        write_tensors(source, jobs, layout, file, "keep", progress, log)
    return layout.nbytes


def write_component(
    source: TensorSource,
    jobs: Sequence[Job],
    component: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    out: str | PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    variant: str | None = None,
    overwrite: bool = False,
    others: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> int:
    """Write the folder of a component; it appears complete or not at all.

    Args:
        source: Where the tensors come from.
        jobs: The tensors, all of types that safetensors has.
        component: "transformer", "text_encoder" or "vae".
        config: Content of config.json.
        metadata: Texts for the header of every file.
        out: The folder: new or empty; with `variant` or `overwrite` also one with other files, which stay.
        shard_bytes: Most bytes of one file.
        variant: The word before the endings of the files, such as "fp16".
        overwrite: Replace the files of the same component and variant in a folder that exists.
        others: Further files: name -> content.
        progress: Called as progress(weights done, weights in all, tensor).
        log: Called with messages for the user.

    Returns:
        The size of the files of weights in bytes.

    Raises:
        BadArgument: The variant is no plain word.
        BadFile: The folder cannot be written, or holds files that may not be replaced.
    """
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise BadArgument(f"variant: got {printable(variant, 40)!r}, wanted a word such as fp16")
    plain, total = STEMS[component], sum(job.target.weights for job in jobs)
    stem = plain if variant is None else f"{plain}.{variant}"
    index = (
        f"{plain}.safetensors.index.json" if variant is None else f"{plain}.safetensors.index.{variant}.json"
    )
    by_name = {job.target.name: job for job in jobs}
    parts = safetensors_file.shards(((j.target.name, j.target.shape, j.format) for j in jobs), shard_bytes)
    names = [safetensors_file.shard_name(stem, i, len(parts)) for i in range(1, len(parts) + 1)]
    place, join = Path(out), variant is not None or overwrite
    stale = _present(place, stem, index) if join else set()
    if stale and not overwrite:
        raise BadFile(min(stale), "exists already", "choose another folder or allow overwriting")
    before = nbytes = 0
    wanted = sum(safetensors_file.nbytes_of(row) for part in parts for row in part)
    with atomic_folder(place, wanted, join) as folder:
        for name, part in zip(names, parts, strict=True):
            mine = [by_name[row[0]] for row in part]
            layout = safetensors_file.lay_out(metadata, part)
            tell = None if progress is None else shifted(progress, before, total)
            nbytes += write_layout(source, mine, layout, folder / name, False, tell, log)
            before += sum(job.target.weights for job in mine)
        if len(parts) > 1:
            names.append(index)
            write_atomically(folder / index, safetensors_file.index_text(stem, parts).encode())
        write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        for name, content in (others or {}).items():
            write_atomically(folder / name, content)
    for path in stale - {place / name for name in names}:
        path.unlink(missing_ok=True)
    return nbytes


def _present(folder: Path, stem: str, index: str) -> set[Path]:
    """The files of one variant that a folder holds: weights, shards and their index."""
    pattern = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    files = folder.iterdir() if folder.is_dir() else ()
    return {path for path in files if path.name == index or pattern.fullmatch(path.name)}


def shifted(progress: Progress, before: int, total: int) -> Progress:
    """Convert the progress of one shard into that of the whole folder."""
    return lambda done, _, name: progress(before + done, total, name)

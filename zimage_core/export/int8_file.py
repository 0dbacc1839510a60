"""Writes a network with int8 rows as one safetensors file, in ComfyUI's layout.

Each projection X of a block becomes three tensors:

    X.weight        int8 [N, K]       rotated by blocks of K (INT8_CONVROT) or as it is (INT8_ROW)
    X.weight_scale  float32 [N, 1]    one scale for each row
    X.comfy_quant   uint8             a JSON text that says so (weights/comfy.py)

The layers are those that `compute="int8"` multiplies in int8 (quant/arithmetic.py); all others keep their
floats, of which matrices get 16 bits. ComfyUI reads any choice of layers, since each has its own text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from typing import IO

import torch

from zimage_core.errors import BadWeights, printable
from zimage_core.export import safetensors_file
from zimage_core.export.checkpoint import PREFIXES, Checkpoint, Target, is_small, table_of
from zimage_core.export.folders import shifted
from zimage_core.export.metadata import safetensors_metadata
from zimage_core.export.streaming import FiniteCheck, Job, Log, NonFinite, Progress, write_tensors
from zimage_core.export.vocabularies import tell_of_tokenizer, tokenizer_place
from zimage_core.files.atomic import atomic_file
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quant.arithmetic import arithmetic_of
from zimage_core.quant.int8 import I8, quantize_weight
from zimage_core.weights import comfy, names
from zimage_core.weights.gguf_writer import Layout
from zimage_core.weights.safetensors import DTYPES

LAYOUTS = {"transformer": ("fused", "")} | {name: ("hf", prefix) for name, prefix in PREFIXES.items()}
"""Component -> layout of weights/names.py, and the prefix of its names in a file for ComfyUI."""
ENDING = ".safetensors"


def write_int8_file(
    source: Checkpoint,
    targets: Sequence[Target],
    rotated: bool,
    out: str | PathLike[str],
    overwrite: bool = False,
    nonfinite: NonFinite = "raise",
    progress: Progress | None = None,
    log: Log | None = None,
) -> tuple[int, dict[str, int]]:
    """Write the file, one tensor at a time; it appears complete or not at all.

    Args:
        source: The checkpoint.
        targets: Its tensors in the layout of LAYOUTS.
        rotated: Whether rows are rotated before they are quantised.
        out: The file.
        overwrite: Replace an existing file.
        nonfinite: What to do about NaN and infinity, "raise" or "replace".
        progress: Called as progress(weights done, weights in all, tensor).
        log: Called with messages: where the tokenizer is, and NaN and infinity that were allowed.

    Returns:
        Its size in bytes, and format -> number of weights' tensors.

    Raises:
        BadFile: The source cannot be read, or `out` exists or cannot be written.
        BadWeights: NaN or infinity that is not allowed, or numbers beyond the range of a scale.
    """
    if source.component == "text_encoder" and log is not None:
        tell_of_tokenizer(tokenizer_place(source.file, source.folder), log)
    chosen = _projections(source)
    plain, layers = [], []
    rows: list[safetensors_file.Row] = []
    for target in targets:
        if target.name in chosen:
            layer = _Layer(target, rotated)
            layers.append(layer)
            rows += layer.rows
        else:
            plain.append(Job(target, _kept(source, target)))
            rows.append((target.name, target.shape, plain[-1].format))
    layout = safetensors_file.lay_out(safetensors_metadata(source), rows)
    total, done = sum(target.weights for target in targets), sum(job.target.weights for job in plain)

    def tell(before: int) -> Progress | None:
        return None if progress is None else shifted(progress, before, total)

    with atomic_file(out, overwrite, layout.nbytes) as file:
        write_tensors(source, plain, layout, file, nonfinite, tell(0), log)
        for layer in layers:
            layer.write(source, layout, file, nonfinite, tell(done), log)
            done += layer.target.weights
        source.check_unchanged()
    types = Counter([*(job.format.name for job in plain), *(I8.name for _ in layers)])
    return layout.nbytes, dict(types)


def _projections(source: Checkpoint) -> set[str]:
    """Names of the tensors that become int8 rows."""
    layout, prefix = LAYOUTS[source.component]
    table = names.sources(table_of(source.component, source.config, layout))
    return {
        prefix + name
        for name, entries in table.items()
        if arithmetic_of(entries[0].module.removesuffix(".weight"), "int8").mode == "int8"
    }


def _kept(source: Checkpoint, target: Target) -> BlockFormat:
    """The type of a tensor that stays in floats: its own, but no matrix has more than 16 bits."""
    stored, small = source.format_of(target), is_small(target)
    plain = stored is not None and not source.is_scaled(target)
    if plain and stored is not None and stored.name in ("F16", "BF16", *(("F32",) if small else ())):
        return stored
    return FORMATS["F32" if small else "BF16"]


class _Layer:
    """The three tensors of one projection.

    Args:
        target: Its weight.
        rotated: Whether its rows are rotated.
    """

    def __init__(self, target: Target, rotated: bool) -> None:
        self.target = target
        self.rotation = comfy.group_for(target.columns) if rotated else 0
        self.text = comfy.layer_text(self.rotation)
        stem = target.name.removesuffix(".weight")
        self.scale, self.stated = f"{stem}.weight_scale", stem + comfy.SUFFIX
        self.rows: list[safetensors_file.Row] = [
            (target.name, target.shape, I8),
            (self.scale, (target.rows, 1), FORMATS["F32"]),
            (self.stated, (len(self.text),), DTYPES["U8"]),
        ]

    def write(
        self,
        source: Checkpoint,
        layout: Layout,
        out: IO[bytes],
        nonfinite: NonFinite,
        progress: Progress | None,
        log: Log | None,
    ) -> None:
        """Write them at their places, slab by slab; arguments and errors are those of `write_int8_file`."""
        target, scales, done = self.target, [], 0
        check = FiniteCheck(source.path, Job(target, I8), nonfinite)
        slabs = source.dense(target)
        out.seek(layout.places[target.name][0])
        for slab in slabs:
            if not check.passes(slab):
                check.rest(slabs)
                check.report(None)
            found = quantize_weight(check.replaced(slab), self.rotation)
            out.write(found.packed.numpy().data)
            scales.append(found.scale)
            done += slab.numel()
            if progress is not None:
                progress(done, target.weights, target.name)
        check.report(log, "0 stands for NaN, the largest float16 for infinity")
        scale = torch.cat([part for part in scales if part is not None])
        if not bool(scale.isfinite().all()):
            where = f"{printable(source.path)}: {printable(target.name, 120)}"
            raise BadWeights(f"{where} has numbers whose rotation exceeds float32; write INT8_ROW")
        out.seek(layout.places[self.scale][0])
        out.write(scale.numpy().data)
        out.seek(layout.places[self.stated][0])
        out.write(self.text)

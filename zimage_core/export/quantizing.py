"""Quantises a checkpoint of any layout into a GGUF or an int8 safetensors file, one tensor at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from zimage_core.errors import BadArgument, BadFile, Unsupported, printable
from zimage_core.export import int8_file
from zimage_core.export.checkpoint import Checkpoint, Target
from zimage_core.export.metadata import gguf_metadata
from zimage_core.export.mixes import INT8, mix_name, refuse_idle_rules, standard_mix
from zimage_core.export.recipes import Recipe, choose_formats, read_recipe
from zimage_core.export.sensitivity import Sensitivity, read_sensitivity
from zimage_core.export.sizing import recipe_for_size
from zimage_core.export.streaming import Job, Log, NonFinite, Progress, write_tensors
from zimage_core.files.atomic import atomic_file, check_destination
from zimage_core.formats import FORMATS, BlockFormat
from zimage_core.quantize.imatrix import Imatrix, read_imatrix
from zimage_core.weights import gguf_writer

LAYOUTS = {"transformer": "fused", "text_encoder": "gguf", "siglip": "mmproj"}
"""Component -> layout of a GGUF in weights/names.py."""

BLIND = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K")
"""Types that lose much without an importance matrix."""


@dataclass(frozen=True)
class Quantized:
    """What `quantize_file` wrote.

    Args:
        path: The file.
        nbytes: Its size in bytes.
        types: Format -> number of tensors.
        recipe: The recipe that was applied; without rules for int8 rows.
        remarks: The messages that were passed to `log`.
        seconds: Wall time.
    """

    path: str
    nbytes: int
    types: dict[str, int]
    recipe: Recipe
    remarks: tuple[str, ...]
    seconds: float


def quantize_file(
    source: str | PathLike[str],
    out: str | PathLike[str],
    type: str | None = None,
    *,
    recipe: Recipe | str | PathLike[str] | None = None,
    size: int | None = None,
    sensitivity: Sensitivity | str | PathLike[str] | None = None,
    imatrix: Imatrix | str | PathLike[str] | None = None,
    component: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
    requantize: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    log: Log | None = None,
) -> Quantized:
    """Quantise a transformer, text encoder or vision tower into a GGUF, or int8 safetensors for ComfyUI.

    Memory is bounded for models of any size. `out` appears complete or not at all: a call that fails or is
    interrupted leaves the previous file, and the next call starts from the beginning.

    Args:
        source: A checkpoint in any layout that the library reads: diffusers folder, single file, GGUF.
        out: The file to write: a GGUF, or safetensors for int8.
        type: A standard mix ("Q4_K_M"), or "INT8_CONVROT" or "INT8_ROW" (export/int8_file.py); exactly one of
            type, recipe and size is given.
        recipe: A Recipe, or the path of a recipe file.
        size: Bytes that the file may have; types are chosen by `sensitivity`, or by a rule of thumb
            (export/sizing.py).
        sensitivity: Measured costs for `size`, or the path of their file.
        imatrix: An importance matrix, or the path of its file.
        component: "transformer", "text_encoder" or "siglip", for a folder or file that holds several.
        variant: In a folder, the variant of the files, such as "fp16"; None for those without one.
        overwrite: Replace an existing file.
        requantize: Accept a source that is quantised already.
        allow_nonfinite: Encode NaN as 0 and infinity as the largest float16, instead of refusing them.
        progress: Called as progress(weights done, weights in all, tensor).
        log: Called with messages for the user, such as fallbacks.

    Returns:
        Path, size, types, recipe, remarks and time of the file.

    Raises:
        BadArgument: Not exactly one of type, recipe and size is given; `out` does not end in .gguf
            (.safetensors for int8); a type is unknown; the recipe has no rule for some tensor, or a rule for
            none; an imatrix is given for int8.
        BadFile: The source cannot be read; `out` exists, is the source, or cannot be written.
        BadWeights: The weights hold NaN or infinity (the message names tensor, count and position), or the
            model is incomplete.
        OverBudget: `size` is below the smallest possible size, which the message states.
        Unsupported: The source is quantised and `requantize` is not set, or it is a VAE.
        WrongModel: The source is another model, or the imatrix belongs to another model.
    """
    if sum(choice is not None for choice in (type, recipe, size)) != 1:
        raise BadArgument("wanted exactly one of type (--type), recipe (--recipe) and size (--size)")
    if sensitivity is not None and size is None:
        raise BadArgument("sensitivity chooses types for a size (--size); give that too, or leave it out")
    rows = INT8.get((type or "").upper())
    if type is not None and rows is None:
        mix_name(type)
    _check_name(out, type if rows is not None else None)
    if rows is not None and imatrix is not None:
        raise BadArgument("imatrix (--imatrix): int8 rows are rounded to nearest without one; leave it out")
    started = time.perf_counter()
    remarks: list[str] = []

    def say(text: str) -> None:
        remarks.append(text)
        if log is not None:
            log(text)

    matrix = imatrix if imatrix is None or isinstance(imatrix, Imatrix) else read_imatrix(imatrix)
    costs = (
        sensitivity
        if sensitivity is None or isinstance(sensitivity, Sensitivity)
        else read_sensitivity(sensitivity)
    )
    check_destination(out, overwrite)
    with Checkpoint(source, component, variant) as checkpoint:
        refuse_same_file(checkpoint, out)
        targets = _targets(checkpoint, requantize, rows is not None)
        for caution in checkpoint.card.cautions:
            say(caution)
        nonfinite: NonFinite = "replace" if allow_nonfinite else "raise"
        if rows is not None:
            nbytes, found = int8_file.write_int8_file(
                checkpoint, targets, rows, out, overwrite, nonfinite, progress, say
            )
            seconds = time.perf_counter() - started
            chosen = Recipe((type or "").upper(), ())
            return Quantized(fspath(out), nbytes, found, chosen, tuple(remarks), seconds)
        if type is not None:
            chosen = standard_mix(type, checkpoint.component, {t.name: t for t in targets})
        elif size is not None:
            chosen = recipe_for_size(checkpoint, targets, size, costs)
        else:
            chosen = recipe if isinstance(recipe, Recipe) else read_recipe(fspath(recipe or ""))
        formats = choose_formats(checkpoint, targets, chosen, say)
        if recipe is not None:
            refuse_idle_rules(chosen, [target.name for target in targets])
        jobs = _jobs(targets, formats, matrix, say)
        label = matrix.path or "given as an object" if matrix is not None else ""
        metadata = gguf_metadata(checkpoint, chosen, label, chosen.file_type, say)
        layout = gguf_writer.lay_out(metadata, [(j.target.name, j.target.shape, j.format) for j in jobs])
        with atomic_file(out, overwrite, layout.nbytes) as file:
            write_tensors(checkpoint, jobs, layout, file, nonfinite, progress, say)
    types = Counter(job.format.name for job in jobs)
    seconds = time.perf_counter() - started
    return Quantized(fspath(out), layout.nbytes, dict(types), chosen, tuple(remarks), seconds)


def refuse_same_file(source: Checkpoint, out: str | PathLike[str]) -> None:
    """Refuse to overwrite the source.

    Raises:
        BadFile: `out` is one of the source's files, possibly under another name.
    """
    for place in source.file.places:
        if Path(out).exists() and Path(out).samefile(place):
            raise BadFile(out, "is the source itself", "name another file")


def _check_name(out: str | PathLike[str], int8: str | None) -> None:
    """Refuse a name that ends like another kind of file; `int8` is the type of int8 rows."""
    wanted, kind = (int8_file.ENDING, "safetensors") if int8 is not None else (".gguf", "a GGUF")
    if Path(out).suffix.lower() != wanted:
        made = f"{printable(int8, 40)} is written as {kind}" if int8 is not None else f"{kind} is written"
        raise BadArgument(f"{printable(fspath(out))}: {made}; give it a name that ends in {wanted}")


def _targets(source: Checkpoint, requantize: bool, int8: bool) -> list[Target]:
    """The tensors of the file; refuses a source that should not be quantised."""
    path = printable(source.file.path)
    if source.component == "vae":
        raise Unsupported(
            f"{path}: a VAE stays as it is: it is small, and its convolutions suffer most; "
            "`zimage convert` changes its layout"
        )
    layout = int8_file.LAYOUTS[source.component] if int8 else (LAYOUTS[source.component],)
    targets = source.targets(*layout)
    found = Counter(name for t in targets for name in source.formats_of(t) if not FORMATS[name].is_float)
    if found and not requantize:
        listed = ", ".join(f"{name} {count}" for name, count in found.most_common(4))
        raise Unsupported(
            f"{path}: its tensors are quantised already ({listed}), and a second rounding adds to the first; "
            "take the original, or allow it (--requantize)"
        )
    return targets


def _jobs(
    targets: Sequence[Target], formats: dict[str, BlockFormat], imatrix: Imatrix | None, log: Log
) -> list[Job]:
    coded = {t.name: t.columns for t in targets if not formats[t.name].is_float}
    blind = sum(formats[name].name in BLIND for name in coded)
    if imatrix is None:
        if blind:
            log(f"{blind} tensors get few bits; an importance matrix (--imatrix) would help them much")
        return [Job(target, formats[target.name]) for target in targets]
    imatrix.check_fits(coded)
    missing = imatrix.missing(coded)
    if missing:
        shown = printable(missing[0], 80)
        log(f"the imatrix knows nothing of {len(missing)} of {len(coded)} tensors, {shown} for one")
    return [Job(t, formats[t.name], imatrix.importance(t.name) if t.name in coded else None) for t in targets]

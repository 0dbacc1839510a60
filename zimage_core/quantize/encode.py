"""Encodes float weights into any block format, slab by slab.

A search makes tens of passes over its weights. A slab of a quarter of a million weights stays in a core's
cache, and the scratch memory is some megabytes for a tensor of any size. Blocks are independent of each
other, so the boundaries of slabs and the choice of thread do not change the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zimage_core.cpu.pool import in_parallel
from zimage_core.errors import BadArgument, BadShape, BadWeights, Unsupported, printable
from zimage_core.formats import BlockFormat, by_name
from zimage_core.quantize import float_types, i_quants, iq4, k_quants, legacy, small
from zimage_core.quantize.blocks import F16_MAX, Encoder

ENCODERS: dict[str, Encoder] = {
    **float_types.ENCODERS,
    **legacy.ENCODERS,
    **k_quants.ENCODERS,
    **small.ENCODERS,
    **i_quants.ENCODERS,
    **iq4.ENCODERS,
}

SLAB = 1 << 18
"""Weights in a slab on a CPU."""
GPU_SLAB = 1 << 22
"""Weights in a slab on a GPU, where a launch costs as much as a million weights."""
SLABS_PER_BATCH = 16
"""Slabs that are encoded before Ctrl-C is noticed."""

Box = tuple[slice, slice]
"""Rows and columns of a slab."""


def encode(weights: Tensor, fmt: BlockFormat | str, importance: Tensor | None = None) -> Tensor:
    """Encode rows of weights into a block format; `zimage_core.dequantize` is the inverse.

    The encoder searches for bytes that make sum(importance * (weights - decoded)^2) small. Without
    importance, the legacy formats (Q4_0 to Q8_0), TQ1_0, TQ2_0, MXFP4 and plain floats are not searched: they
    have the bytes of `gguf.quants.quantize` (docs/explanation/encoders.md). Magnitudes beyond the largest
    value of a block are encoded as that value.

    Args:
        weights: Floats of any type, [..., K], on any device; they are converted to float32 first.
        fmt: A format of `zimage_core.FORMATS`, or its name such as "Q4_K".
        importance: Floats [K], finite and not negative: the cost of an error in each input channel. Only
            their ratios matter. None means equal costs.

    Returns:
        uint8 [..., row bytes] on the device of `weights`. The bits of a row do not depend on other rows.

    Raises:
        UnknownFormat: There is no format of that name.
        Unsupported: The format has no encoder (integers, fp8).
        BadShape: K is not a whole number of blocks, or importance is not [K].
        BadArgument: weights or importance are not floats, or importance is negative or not finite.
        BadWeights: The weights hold NaN or infinity, or for F16 a number that it cannot hold.
    """
    fmt = fmt if isinstance(fmt, BlockFormat) else by_name(fmt)
    encoder = ENCODERS.get(fmt.name)
    if encoder is None:
        raise Unsupported(f"{fmt.name} has no encoder; use one of {', '.join(ENCODERS)}")
    given = {"weights": weights} if importance is None else {"weights": weights, "importance": importance}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise BadArgument(
                f"{name} must be a torch.Tensor of floats, not {printable(type(tensor).__name__)}"
            )
    if not weights.is_floating_point():
        raise BadArgument(
            f"{fmt.name}: weights must be floating point, not {weights.dtype}; convert them first"
        )
    if not weights.ndim:
        raise BadShape(f"{fmt.name}: weights need at least one axis, found a scalar")
    k = weights.shape[-1]
    row_bytes = fmt.row_bytes(k)
    costs = _checked_importance(importance, k, weights.device, fmt)
    out = torch.empty((*weights.shape[:-1], row_bytes), dtype=torch.uint8, device=weights.device)
    if not out.numel():
        return out
    with torch.no_grad():
        _encode_all(weights.detach().reshape(-1, k), out.view(-1, row_bytes), fmt, encoder, costs)
    return out


def _checked_importance(
    importance: Tensor | None, k: int, device: torch.device, fmt: BlockFormat
) -> Tensor | None:
    """Float32 [1, K], or None."""
    if importance is None:
        return None
    if importance.shape != (k,):
        raise BadShape(
            f"{fmt.name}: importance must have one number for each of the {k} weights of a row, "
            f"not the shape {tuple(importance.shape)}; it may belong to another tensor"
        )
    if not importance.is_floating_point():
        raise BadArgument(f"{fmt.name}: importance must be floating point, not {importance.dtype}")
    costs = importance.detach().to(device, torch.float32)
    bad = ~(costs.isfinite() & (costs >= 0))
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise BadArgument(
            f"{fmt.name}: importance must be finite and not negative; {int(bad.sum())} of {k} numbers "
            f"are not, the first is {float(costs[first])} at index {first}; collect it again"
        )
    return costs[None]


def _encode_all(
    rows: Tensor,
    out: Tensor,
    fmt: BlockFormat,
    encoder: Encoder,
    costs: Tensor | None,
) -> None:
    """rows [n, K] -> out [n, row bytes]."""
    on_cpu = rows.device.type == "cpu"
    boxes = _boxes(rows.shape, fmt, SLAB if on_cpu else GPU_SLAB)
    limit = F16_MAX + 16 if fmt.name == "F16" else float("inf")  # 65520 is the first that rounds to infinity

    def encode_box(box: Box) -> None:
        x = rows[box].to(torch.float32).contiguous()
        if not (x.abs().amax() < limit):  # NaN too
            raise _bad_weights(rows, limit, fmt)
        columns = box[1]
        packed = encoder(x, None if costs is None else costs[:, columns])
        out[box[0], fmt.row_bytes(columns.start) : fmt.row_bytes(columns.stop)] = packed

    for first in range(0, len(boxes), SLABS_PER_BATCH):
        batch = boxes[first : first + SLABS_PER_BATCH]

        def encode_range(start: int, stop: int, batch: list[Box] = batch) -> None:
            for box in batch[start:stop]:
                encode_box(box)

        if on_cpu:
            in_parallel(encode_range, len(batch), multiple=1)
        else:
            encode_range(0, len(batch))


def _boxes(shape: torch.Size, fmt: BlockFormat, slab: int) -> list[Box]:
    """Slabs of about `slab` weights: whole rows, or whole blocks of a row if it is longer than a slab."""
    n, k = shape
    width = min(k, max(slab // fmt.weights, 1) * fmt.weights)
    height = max(slab // width, 1)
    return [
        (slice(r, min(r + height, n)), slice(c, min(c + width, k)))
        for r in range(0, n, height)
        for c in range(0, k, width)
    ]


def _bad_weights(rows: Tensor, limit: float, fmt: BlockFormat) -> BadWeights:
    """The error with the number of values that no block can hold, counted row by row to save memory."""
    count, first = 0, ""
    for i, row in enumerate(rows):
        bad = ~(row.to(torch.float32).abs() < limit)
        found = int(bad.sum())
        if found and not count:
            j = int(bad.nonzero()[0, 0])
            first = f"{float(row[j])} in row {i}, column {j}"
        count += found
    if limit < float("inf") and bool(rows.to(torch.float32).isfinite().all()):
        return BadWeights(
            f"{count} of {rows.numel()} weights are beyond the range of {fmt.name}, the first is {first}; "
            "use BF16"
        )
    return BadWeights(
        f"{count} of {rows.numel()} weights are NaN, infinite or beyond float32, the first is {first}; "
        f"{fmt.name} cannot hold them, so mend the source"
    )

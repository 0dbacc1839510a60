"""What adapters do to a layer: a branch beside its product; the weight stays as it is, packed or dense.

Every kind of adapter is brought to one form, `Change`, that is linear in the adapter's weight w:

    W' = W + w (gain W + turn_out W + W turn_in + up down + w1 (x) w2 + dense)

`Branch` computes W' x by the product W x alone and small products beside it. Several adapters add up, and
their low-rank factors are joined to one pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from zimage_core.cpu.rotation import rotate
from zimage_core.nn.linear import Linear
from zimage_core.quant import ops
from zimage_core.quant.int8 import Int8Rows

Product = Callable[[Any], Tensor]
"""The layer's own product with its bias, of a Tensor or an `Int8Rows`."""

ROWS = 128
"""Rows of int8 activations that are made floats at a time on a CPU: they stay in the cache."""


@dataclass(frozen=True, eq=False)
class Change:
    """What one adapter of weight 1 does to a weight W [N, K]; None where it does no such thing.

    Args:
        down: First low-rank factor [R, K].
        up: Second low-rank factor [N, R], which includes the scale alpha / rank.
        w1: Left factor [A, B] of a Kronecker product, which includes the scale.
        w2: Right factor [C, D] of it, with A C = N and B D = K.
        w2_up: [C, r], for a right factor w2_up w2.
        dense: [N, K].
        gain: [N]: row n of W is added gain[n] times.
        turn_in: [blocks, k, k]: block-diagonal, so that x turn_in is added to x.
        scale_in: [K]: x scale_in is added to x.
        turn_out: [blocks, n, n]: block-diagonal, (W x) turn_out is added to W x.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    w1: Tensor | None = None
    w2: Tensor | None = None
    w2_up: Tensor | None = None
    dense: Tensor | None = None
    gain: Tensor | None = None
    turn_in: Tensor | None = None
    scale_in: Tensor | None = None
    turn_out: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        for each in fields(self):
            if (value := getattr(self, each.name)) is not None:
                yield value

    @property
    def rank(self) -> int:
        """Rank of the low-rank part; 0 if there is none."""
        return 0 if self.down is None else len(self.down)


@dataclass(eq=False)
class _Parts:
    """Factors of all active changes in one dtype on one device."""

    device: torch.device
    dtype: torch.dtype
    down: Tensor | None = None  # [R, K]
    up: Tensor | None = None  # [R, N], with the weights of the adapters
    krons: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    dense: list[tuple[Tensor, float]] = field(default_factory=list)
    gain: Tensor | None = None
    scale_in: Tensor | None = None
    turns_in: list[Tensor] = field(default_factory=list)
    turns_out: list[Tensor] = field(default_factory=list)
    rotated: tuple[int, Tensor] | None = None  # block of a rotation, and `down` rotated by it

    def down_for(self, rotation: int) -> Tensor:
        """`down` for activations that were rotated: A x is (A R)(R x)."""
        down = self.down
        if down is None or rotation <= 1:
            return down  # type: ignore[return-value]
        if self.rotated is None or self.rotated[0] != rotation:
            self.rotated = rotation, rotate(down.float(), rotation).to(down.dtype)
        return self.rotated[1]


class Branch:
    """The branch of one layer: W' x for the active adapters and their weights. No module, and not registered.

    Its factors are made for the dtype and device of x when x comes, or before by `prepare`.

    Args:
        layer: The layer, whose bias is not part of what adapters change.
        changes: Change of each active adapter, with the adapter's weight.
        biased: Whether the products that it is given hold the layer's bias.
    """

    def __init__(self, layer: Linear, changes: Sequence[tuple[Change, float]], biased: bool = True) -> None:
        self.layer, self.changes, self._biased = layer, tuple(changes), biased and layer.bias is not None
        self._parts: _Parts | None = None

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, which make their own factors."""
        return {**self.__dict__, "_parts": None}

    def nbytes(self, dtype: torch.dtype) -> int:
        """Most bytes of the factors for x of a dtype."""
        tensors = [tensor for change, _ in self.changes for tensor in change.tensors()]
        twice = sum(each.down.numel() for each, _ in self.changes if each.down is not None)
        return dtype.itemsize * twice + sum(t.numel() * max(dtype.itemsize, t.itemsize) for t in tensors)

    def row_bytes(self) -> int:
        """Bytes of temporary tensors for each row of x, in float32."""
        rank = sum(change.rank for change, _ in self.changes)
        wide = any(
            part is not None
            for change, _ in self.changes
            for part in (
                change.w1,
                change.dense,
                change.gain,
                change.turn_in,
                change.turn_out,
                change.scale_in,
            )
        )
        return 4 * (rank + 2 * wide * (self.layer.in_features + self.layer.out_features))

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the factors for x of a dtype on a device, unless they are there."""
        parts = self._parts
        if parts is None or parts.device != device or parts.dtype != dtype:
            self._parts = self._made(device, dtype)

    def release(self) -> None:
        """Drop the factors; the next x makes them again."""
        self._parts = None

    def _made(self, device: torch.device, dtype: torch.dtype) -> _Parts:
        parts = _Parts(device, dtype)
        low = [(change, weight) for change, weight in self.changes if change.down is not None]
        if low:
            ups = [change.up.float() * weight for change, weight in low if change.up is not None]
            downs = [change.down.float() for change, _ in low if change.down is not None]
            parts.down = torch.cat(downs).to(device, dtype)
            parts.up = torch.cat(ups, dim=1).t().contiguous().to(device, dtype)
        for change, weight in self.changes:
            if change.w1 is not None and change.w2 is not None:
                w1 = (change.w1.float() * weight).to(device, dtype)
                up = None if change.w2_up is None else change.w2_up.to(device, dtype)
                parts.krons.append((w1, change.w2.to(device, dtype), up))
            if change.dense is not None:
                # a CPU multiplies by the numbers as they are stored
                dense = change.dense.to(device, change.dense.dtype if device.type == "cpu" else dtype)
                parts.dense.append((dense, weight))
            if change.turn_in is not None:
                parts.turns_in.append((change.turn_in.float() * weight).to(device, dtype))
            if change.turn_out is not None:
                parts.turns_out.append((change.turn_out.float() * weight).to(device, dtype))
            for name in ("gain", "scale_in"):
                own = getattr(change, name)
                if own is not None:
                    before = getattr(parts, name)
                    more = (own.float() * weight).to(device)
                    setattr(parts, name, more if before is None else before + more)
        return parts

    def __call__(self, product: Product, x: Tensor | Int8Rows) -> Tensor:
        """x [..., K] -> W' x + bias [..., N] in x's dtype."""
        parts = self._parts
        if parts is None or parts.device != x.device or parts.dtype != x.dtype:
            self._parts = parts = self._made(x.device, x.dtype)
        plain = parts.gain is None and parts.scale_in is None
        if plain and not (parts.krons or parts.dense or parts.turns_in or parts.turns_out):
            return _add_low_rank(product(x), x, parts)
        own = x if isinstance(x, Tensor) else x.dequantize()
        entering = bool(parts.turns_in) or parts.scale_in is not None
        y = product(_entering(own, parts) if entering else x)
        if parts.gain is not None or parts.turns_out:
            # they are those of W x, whatever other adapters do to x
            y = y + self._leaving(product(x) if entering else y, parts)
        for w1, w2, w2_up in parts.krons:
            y.add_(_kronecker(own, w1, w2, w2_up))
        for dense, weight in parts.dense:
            y.add_(ops.linear(own, dense), alpha=weight)
        return _add_low_rank(y, own, parts)

    def _leaving(self, y: Tensor, parts: _Parts) -> Tensor:
        """What gains and turns of the outputs add to W x + bias."""
        bias = self.layer.bias if self._biased else None
        base = y if bias is None else y - bias.to(y.dtype)
        more = torch.zeros_like(base) if parts.gain is None else (base * parts.gain).to(y.dtype)
        for turn in parts.turns_out:
            more.add_(_turned(base, turn))
        return more


def _add_low_rank(y: Tensor, x: Tensor | Int8Rows, parts: _Parts) -> Tensor:
    """y + up down x, in place."""
    if parts.down is None or parts.up is None:
        return y
    inner = _times_down(x, parts)
    if torch.is_grad_enabled() and (y.requires_grad or inner.requires_grad):
        return y + torch.mm(inner, parts.up).view(y.shape)
    y.view(-1, y.shape[-1]).addmm_(inner, parts.up)
    return y


def _times_down(x: Tensor | Int8Rows, parts: _Parts) -> Tensor:
    """x [..., K] -> x down^T [M, R]."""
    if not isinstance(x, Tensor):
        # the sums of int8 numbers may exceed float16
        if x.dtype != torch.float16:
            return _from_int8(x, parts.down_for(x.rotation))
        x = x.dequantize()
    down: Tensor = parts.down  # type: ignore[assignment]
    return torch.mm(x.reshape(-1, x.shape[-1]), down.t())


def _from_int8(x: Int8Rows, down: Tensor) -> Tensor:
    """Int8 rows times down^T [M, R]; on a CPU in slabs of rows, so that the floats stay in the cache."""
    if x.device.type != "cpu":
        return torch.mm(x.values.to(down.dtype), down.t()) * x.scale.unsqueeze(1).to(down.dtype)
    out = torch.empty(len(x.values), len(down), dtype=down.dtype)
    buffer = torch.empty(min(ROWS, len(out)), x.values.shape[1], dtype=down.dtype)
    for start in range(0, len(out), ROWS):
        values = x.values[start : start + ROWS]
        torch.mm(buffer[: len(values)].copy_(values), down.t(), out=out[start : start + ROWS])
    return out.mul_(x.scale.unsqueeze(1))


def _entering(x: Tensor, parts: _Parts) -> Tensor:
    """x with what turns and scales of the inputs add."""
    out = x if parts.scale_in is None else x + (x * parts.scale_in).to(x.dtype)
    for turn in parts.turns_in:
        out = out + _turned(x, turn)
    return out


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [..., blocks * k] times a block-diagonal matrix [blocks, k, k]."""
    blocks, size, _ = turn.shape
    return torch.einsum("...bk,bkc->...bc", x.reshape(*x.shape[:-1], blocks, size), turn).flatten(-2)


def _kronecker(x: Tensor, w1: Tensor, w2: Tensor, w2_up: Tensor | None) -> Tensor:
    """(w1 (x) w2) x for x [..., B D] -> [..., A C], without the large matrix."""
    inner = torch.matmul(x.reshape(*x.shape[:-1], w1.shape[1], w2.shape[1]), w2.t())
    if w2_up is not None:
        inner = torch.matmul(inner, w2_up.t())
    return torch.matmul(w1, inner).flatten(-2)

"""The kinds of adapters: the tensors of one layer in a file become one `Change` for each layer of a network.

Sources: PEFT's layers of lora and oft; LyCORIS' modules lokr, loha, diag_oft, full and norms; DoRA's paper,
arXiv 2402.09353; ComfyUI's weight_adapter. Scales are alpha / rank, and a missing alpha is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zimage_core.adapters.change import Change
from zimage_core.adapters.dialects import Target
from zimage_core.errors import BadWeights, Unsupported, printable
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.adapters import MAX_LORA_RANK

LORA = ("down", "up")
DORA_SLAB = 1 << 22
"""Numbers of a weight that are dense at a time while the norms of DoRA are taken."""
NEUMANN_TERMS = 5
"""Terms of the series for the Cayley transform in PEFT's OFT, as trained by default."""
_NOT_BUILT = {
    "lora_mid": "a LoRA of a convolution (lora_mid)",
    "lokr_t1": "a LoKr adapter of a convolution (lokr_t1)",
    "lokr_t2": "a LoKr adapter of a convolution (lokr_t2)",
    "hada_t1": "a LoHa adapter of a convolution (hada_t1)",
    "hada_t2": "a LoHa adapter of a convolution (hada_t2)",
    "ia3_l": "an IA3 adapter",
    "on_input": "an IA3 adapter",
    "vera_lambda_b": "a VeRA adapter",
    "vera_lambda_d": "a VeRA adapter",
    "vera_A": "a VeRA adapter",
    "vera_B": "a VeRA adapter",
    "boft_R": "a BOFT adapter",
    "boft_P": "a BOFT adapter",
    "boft_s": "a BOFT adapter",
    "boft_blocks": "a BOFT adapter",
    "oft_r": "an OFT adapter of PEFT before 0.16 (oft_r)",
    "oft_s": "an OFT adapter of PEFT before 0.16 (oft_s)",
    "oft_diag": "an OFT adapter of another form (oft_diag)",
    "lora_embedding_A": "a LoRA of the table of tokens",
    "lora_embedding_B": "a LoRA of the table of tokens",
    "reshape_weight": "an adapter that changes a layer's size",
    "bias": "a LoRA with a bias (lora_B.bias)",
    "diff_m": "differences of an unknown kind (diff_m)",
}
"""Tensors of kinds that are refused -> what they are."""


@dataclass(frozen=True)
class Scaling:
    """What the file states of the scales, beside its tensors.

    Args:
        alpha: Layer's name in the file -> alpha; None for the rank.
        root: Whether the scale is alpha / sqrt(rank) (rsLoRA).
        whole: Scale of a LoKr of two whole matrices: alpha / rank in PEFT, and 1 elsewhere.
        neumann: Whether OFT's Cayley transform is the series that PEFT takes by default.
    """

    alpha: Callable[[str], float | None] = lambda _: None
    root: bool = False
    whole: float = 1.0
    neumann: bool = True


def not_built(tensors: Mapping[str, Tensor | tuple[int, ...]]) -> str:
    """What kind of adapter the tensors of a layer are, if it is one that is not applied; else ""."""
    for leaf, tensor in tensors.items():
        shape = tensor if isinstance(tensor, tuple) else tuple(tensor.shape)
        if leaf == "oft_blocks" and len(shape) != 3:
            return "a BOFT adapter" if len(shape) == 4 else "an OFT adapter in a packed form"
        if leaf in _NOT_BUILT:
            return _NOT_BUILT[leaf]
    return ""


def change_of(
    name: str, tensors: Mapping[str, Tensor], target: Target, layer: Linear, scaling: Scaling
) -> Change:
    """The change of one layer.

    Args:
        name: Name of the layer in the file, for messages.
        tensors: Which tensor -> numbers, all finite.
        target: The layer, and which rows of the file's layer it is.
        layer: The layer.
        scaling: What the file states beside its tensors.

    Raises:
        BadWeights: Tensors are missing or do not fit each other or the layer.
        Unsupported: The kind is not built for such a layer.
    """
    if kind := not_built(tensors):
        raise Unsupported(
            f"{printable(name, 100)!r} is {kind}, which is not applied; merge it by the program that made it"
        )
    one = _Layer(name, tensors, target, layer, scaling)
    made = [build for leaf, build in _KINDS.items() if leaf in tensors]
    if not made:
        raise one.fault(f"holds only {', '.join(sorted(tensors))}, from which nothing can be made")
    if len(set(made)) > 1:
        raise one.fault(f"holds tensors of several kinds: {', '.join(sorted(tensors))}")
    change = made[0](one)
    return _decomposed(one, change) if "dora" in tensors else change


class _Layer:
    """The tensors of one layer, and what all kinds ask of them."""

    def __init__(
        self, name: str, tensors: Mapping[str, Tensor], target: Target, layer: Linear, scaling: Scaling
    ) -> None:
        self.name, self.tensors, self.target, self.layer, self.scaling = name, tensors, target, layer, scaling
        self.columns = layer.in_features
        self.rows = target.total or layer.out_features
        start, stop = target.rows or (0, self.rows)
        self.start, self.stop = start, stop

    def fault(self, what: str) -> BadWeights:
        return BadWeights(f"{printable(self.name, 100)!r} of the adapter {what}")

    def matrix(self, leaf: str) -> Tensor:
        """A tensor with two axes; those of a 1 x 1 convolution are dropped."""
        if leaf not in self.tensors:
            there = ", ".join(sorted(self.tensors))
            raise self.fault(f"has no {leaf}, only {there}, so that it is incomplete; get the whole file")
        tensor = self.tensors[leaf]
        if tensor.ndim > 2 and math.prod(tensor.shape[2:]) == 1:
            tensor = tensor.flatten(1)
        if tensor.ndim != 2:
            raise self.fault(f"has a {leaf} of shape {tuple(tensor.shape)}, wanted two axes")
        return tensor

    def pair(self, up: str, down: str) -> tuple[Tensor, Tensor]:
        """Two factors up [N, r] and down [r, K] with a rank that both have and that is no absurd one."""
        one, other = self.matrix(up), self.matrix(down)
        if one.shape[1] != other.shape[0]:
            raise self.fault(f"has ranks that mismatch: {down} {other.shape[0]}, {up} {one.shape[1]}")
        if not 0 < other.shape[0] <= MAX_LORA_RANK:
            raise self.fault(f"has rank {other.shape[0]}, wanted 1 to {MAX_LORA_RANK}")
        return one, other

    def fits(self, rows: int, columns: int) -> None:
        """Refuse a change of another size than the layer's."""
        if (rows, columns) != (self.rows, self.columns):
            raise self.fault(
                f"changes a weight of {rows} x {columns}, this model's has {self.rows} x {self.columns}: "
                f"it was made for another model{_whose(rows, columns)}"
            )

    def number(self, leaf: str, usual: float) -> float:
        if leaf not in self.tensors:
            return usual
        if self.tensors[leaf].numel() != 1:
            raise self.fault(f"has an {leaf} of shape {tuple(self.tensors[leaf].shape)}, wanted one number")
        return float(self.tensors[leaf])

    def scale(self, rank: int) -> float:
        """alpha / rank, times the scalar of LyCORIS if there is one."""
        stated = self.scaling.alpha(self.name)
        alpha = self.number("alpha", rank if stated is None else stated)
        root = self.scaling.root and "alpha" not in self.tensors
        return alpha / (math.sqrt(rank) if root else rank) * self.number("scalar", 1.0)

    def cut(self, tensor: Tensor) -> Tensor:
        """The rows of this layer, in memory of their own."""
        return tensor if self.target.rows is None else tensor[self.start : self.stop].clone()


def _whose(rows: int, columns: int) -> str:
    width = min(rows, columns)
    known = {
        3840: "Z-Image at its full size",
        2304: "Lumina-Image-2",
        3072: "FLUX or Qwen-Image",
        1280: "Stable Diffusion XL",
    }
    return f", perhaps {known[width]}" if width in known else ""


def _lora(one: _Layer) -> Change:
    up, down = one.pair("up", "down")
    one.fits(up.shape[0], down.shape[1])
    scale = one.scale(down.shape[0])
    up = one.cut(up)
    return Change(down=down, up=up if scale == 1 else up.float() * scale)


def _loha(one: _Layer) -> Change:
    """(w1_a w1_b) * (w2_a w2_b): of rank r1 r2, by products of the factors' columns and rows."""
    (a1, b1), (a2, b2) = one.pair("hada_w1_a", "hada_w1_b"), one.pair("hada_w2_a", "hada_w2_b")
    for up, down in ((a1, b1), (a2, b2)):
        one.fits(up.shape[0], down.shape[1])
    scale, rank = one.scale(b1.shape[0]), b1.shape[0] * b2.shape[0]
    a1, a2 = (one.cut(each).float() for each in (a1, a2))
    b1, b2 = b1.float(), b2.float()
    if rank * (len(a1) + one.columns) > len(a1) * one.columns:
        return Change(dense=(a1 @ b1).mul_(a2 @ b2).mul_(scale))
    up = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1) * scale
    return Change(down=(b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1), up=up)


def _lokr(one: _Layer) -> Change:
    """w1 (x) w2, where each is a matrix or a product of two."""
    ranks = []
    sides: list[tuple[Tensor | None, Tensor]] = []
    for side in ("lokr_w1", "lokr_w2"):
        if side in one.tensors:
            sides.append((None, one.matrix(side)))
        else:
            up, down = one.pair(f"{side}_a", f"{side}_b")
            ranks.append(down.shape[0])
            sides.append((up, down))
    # two whole matrices have no rank, and LyCORIS trains them with scale 1, whatever their alpha says
    scale = one.scale(ranks[-1]) if ranks else one.scaling.whole * one.number("scalar", 1.0)
    (up1, down1), (up2, w2) = sides
    outer, inner = (len(down if up is None else up) for up, down in sides)
    one.fits(outer * inner, down1.shape[1] * w2.shape[1])  # before a product that a small file can make huge
    w1 = (down1 if up1 is None else up1.float() @ down1.float()).float() * scale
    if up2 is not None and len(w2) * (len(up2) + w2.shape[1]) >= len(up2) * w2.shape[1]:
        w2, up2 = up2.float() @ w2.float(), None
    if one.target.rows is None:
        return Change(w1=w1, w2=w2, w2_up=up2)
    if one.start % inner == 0 and one.stop % inner == 0:
        return Change(w1=w1[one.start // inner : one.stop // inner].clone(), w2=w2, w2_up=up2)
    whole = w2.float() if up2 is None else up2.float() @ w2.float()
    return Change(dense=one.cut(torch.kron(w1, whole)))


def _full(one: _Layer) -> Change:
    diff = one.matrix("diff")
    one.fits(*diff.shape)
    return Change(dense=one.cut(diff))


def _set(one: _Layer) -> Change:
    """Another weight instead: the product is taken away, as far as the adapter's weight says."""
    weight = one.matrix("set_weight")
    one.fits(*weight.shape)
    return Change(dense=one.cut(weight), gain=torch.full((one.stop - one.start,), -1.0))


def _diag_oft(one: _Layer) -> Change:
    """LyCORIS: blocks of the outputs are turned by a Cayley transform, and scaled."""
    blocks = one.tensors["oft_blocks"].float()
    size = blocks.shape[-1]
    if blocks.shape[1] != size or len(blocks) * size != one.rows:
        raise one.fault(
            f"turns outputs in blocks of shape {tuple(blocks.shape)}, this layer has {one.rows} outputs"
        )
    skew = blocks - blocks.transpose(1, 2)
    limit = one.number("alpha", 0.0) * one.rows
    norm = float(skew.norm()) + 1e-8
    if 0 < limit < norm:
        skew *= limit / norm
    identity = torch.eye(size)
    turn = (identity + skew) @ torch.linalg.inv(identity - skew)
    if "rescale" in one.tensors:
        scales = one.tensors["rescale"].float().flatten()
        if scales.numel() not in (1, one.rows):
            raise one.fault(f"has {scales.numel()} scales for {one.rows} outputs")
        turn = turn * scales.expand(one.rows).view(len(blocks), 1, size)
    if one.start % size or one.stop % size:
        raise Unsupported(
            f"{printable(one.name, 100)!r}: blocks of {size} outputs do not fit q, k and v, which are cut "
            "at multiples of a third; get the adapter for separate q, k and v"
        )
    return Change(turn_out=(turn - identity)[one.start // size : one.stop // size].clone())


def _peft_oft(one: _Layer) -> Change:
    """PEFT: blocks of the inputs are turned by a Cayley transform of skew matrices, stored as triangles."""
    triangles = one.matrix("oft_R").float()
    count = triangles.shape[1]
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    if size * (size - 1) // 2 != count or one.columns % size:
        raise one.fault(f"has oft_R of shape {tuple(triangles.shape)}, which fits no block of its inputs")
    blocks = one.columns // size
    if len(triangles) not in (1, blocks):
        raise one.fault(f"turns {len(triangles)} blocks of {size} inputs, this layer has {blocks}")
    skew = torch.zeros(len(triangles), size, size)
    upper = torch.triu_indices(size, size, 1)
    skew[:, upper[0], upper[1]] = triangles
    skew = skew - skew.transpose(1, 2)
    identity = torch.eye(size)
    if one.scaling.neumann:
        power, turn = skew, identity + 2 * skew
        for term in range(2, NEUMANN_TERMS):
            power = power @ skew
            turn = turn + (2 if term < NEUMANN_TERMS - 1 else 1) * power
    else:
        turn = (identity - skew) @ torch.linalg.inv(identity + skew)
    return Change(turn_in=(turn - identity).expand(blocks, size, size).contiguous())


_KINDS: dict[str, Callable[[_Layer], Change]] = {
    **dict.fromkeys(LORA, _lora),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
    **dict.fromkeys((f"lokr_w{side}{part}" for side in (1, 2) for part in ("", "_a", "_b")), _lokr),
    "diff": _full,
    "set_weight": _set,
    "oft_blocks": _diag_oft,
    "oft_R": _peft_oft,
}


def _decomposed(one: _Layer, change: Change) -> Change:
    """DoRA: W + change, with rows (or columns) scaled to the trained magnitudes.

    The norms are those of W plus the change at weight 1; another weight of the adapter takes that share of
    the whole difference, as in ComfyUI, so that weight 0 is the model itself.
    """
    if change.gain is not None or change.turn_in is not None or change.turn_out is not None:
        raise one.fault("has DoRA magnitudes beside tensors that have none")
    magnitude = one.tensors["dora"].float()
    by_column = tuple(magnitude.shape) == (1, one.columns)
    if by_column and one.target.rows is not None:
        raise Unsupported(
            f"{printable(one.name, 100)!r}: DoRA over the inputs of a fused q, k and v is not applied; get "
            "the adapter for separate q, k and v"
        )
    if magnitude.numel() != (one.columns if by_column else one.rows):
        raise one.fault(f"has {magnitude.numel()} DoRA magnitudes for a weight of {one.rows} x {one.columns}")
    squares = _squared_norms(one.layer, change, 0 if by_column else 1)
    factor = (one.cut(magnitude.flatten()).double() / squares.sqrt().clamp_min(1e-12)).float()
    if by_column:
        return replace(
            change,
            scale_in=factor - 1,
            down=None if change.down is None else change.down.float() * factor,
            **_densified(change, factor),
        )
    return replace(
        change,
        gain=factor - 1,
        up=None if change.up is None else change.up.float() * factor.unsqueeze(1),
        **_densified(change, factor.unsqueeze(1)),
    )


def _densified(change: Change, factor: Tensor) -> dict[str, Tensor | None]:
    """Dense and Kronecker parts times a factor of rows or columns; the latter become dense by it."""
    parts = dense_of(replace(change, down=None, up=None))
    return {"dense": None if parts is None else parts * factor, "w1": None, "w2": None, "w2_up": None}


def dense_of(change: Change, start: int = 0, stop: int | None = None) -> Tensor | None:
    """Rows of the low-rank, Kronecker and dense parts of a change as one float32 matrix; None for none."""
    found: Tensor | None = None
    if change.down is not None and change.up is not None:
        found = change.up[start:stop].float() @ change.down.float()
    if change.w1 is not None and change.w2 is not None:
        right = change.w2.float() if change.w2_up is None else change.w2_up.float() @ change.w2.float()
        # a band of the product that covers the rows
        first = start // len(right)
        last = None if stop is None else -(-stop // len(right))
        whole = torch.kron(change.w1[first:last].float(), right)
        offset = start - first * len(right)
        whole = whole[offset : None if stop is None else offset + stop - start]
        found = whole if found is None else found + whole
    if change.dense is not None:
        part = change.dense[start:stop].float()
        found = part if found is None else found + part
    return found


def _squared_norms(layer: Linear, change: Change, axis: int) -> Tensor:
    """Squared norms of the rows (axis 1) or columns (axis 0) of W + change, float64, slab by slab."""
    weight = layer.weight
    rows, columns = weight.shape
    height = max(1, DORA_SLAB // columns)
    sums = torch.zeros(rows if axis else columns, dtype=torch.float64)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        if isinstance(weight, QuantTensor):
            dense = weight.rows(start, stop).dequantize(torch.float32)
        else:
            dense = weight.detach()[start:stop].float()
        more = dense_of(change, start, stop)
        squares = (dense.cpu() if more is None else dense.cpu() + more).double().square()
        if axis:
            sums[start:stop] = squares.sum(1)
        else:
            sums += squares.sum(0)
    return sums

"""Writes adapters of every kind and dialect with random numbers, and computes what they do in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor

Delta = Callable[[Tensor], Tensor]
"""W [N, K] float64 -> what an adapter of weight 1 adds to it."""


def dense(layer: Linear) -> Tensor:
    """The weight of a layer, float64."""
    weight = layer.weight
    own = weight.dequantize(torch.float32) if isinstance(weight, QuantTensor) else weight.detach()
    return own.double()


def random(*shape: int, seed: int = 0, scale: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def divisor(n: int) -> int:
    """A small divisor of n."""
    return next(d for d in (4, 5, 3, 2, 7, n) if n % d == 0)


def cayley(skew: Tensor) -> Tensor:
    one = torch.eye(skew.shape[-1], dtype=torch.float64)
    return (one + skew) @ torch.linalg.inv(one - skew)


def split_lora(
    n: int, k: int, seed: int = 0, rank: int = 3, alpha: float | None = None
) -> tuple[dict, Delta]:
    """A LoRA's tensors by their last names (kohya's), and its delta."""
    down, up = random(rank, k, seed=seed), random(n, rank, seed=seed + 1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    scale = 1.0 if alpha is None else alpha / rank
    return tensors, lambda w: scale * up.double() @ down.double()


def kind(name: str, n: int, k: int, seed: int = 0) -> tuple[dict[str, Tensor], Delta]:
    """Tensors of a kind for a weight [n, k] by their last names, and its delta, written out plainly."""
    r = lambda *shape, s=0: random(*shape, seed=seed + s)  # noqa: E731 - a table of formulas
    if name in ("lora", "lora alpha"):
        return split_lora(n, k, seed, alpha=1.5 if "alpha" in name else None)
    if name.startswith("loha"):
        rank = 12 if "dense" in name else 2
        t = {"hada_w1_a": r(n, rank), "hada_w1_b": r(rank, k, s=1), "hada_w2_a": r(n, rank, s=2),
             "hada_w2_b": r(rank, k, s=3), "alpha": torch.tensor(3.0)}  # fmt: skip
        d = {key: value.double() for key, value in t.items()}
        return t, lambda w: (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"]) * 3.0 / rank
    if name.startswith("lokr"):
        a, b = divisor(n), divisor(k)
        t = {}
        if "full" in name:
            t |= {"lokr_w1": r(a, b), "lokr_w2": r(n // a, k // b, s=1), "alpha": torch.tensor(1e9)}
            return t, lambda w: torch.kron(t["lokr_w1"].double(), t["lokr_w2"].double())
        if "both" in name:
            t |= {"lokr_w1_a": r(a, 1), "lokr_w1_b": r(1, b, s=4)}
        else:
            t |= {"lokr_w1": r(a, b)}
        t |= {"lokr_w2_a": r(n // a, 2, s=1), "lokr_w2_b": r(2, k // b, s=2), "alpha": torch.tensor(1.0)}
        d = {key: value.double() for key, value in t.items()}
        w1 = d["lokr_w1"] if "lokr_w1" in d else d["lokr_w1_a"] @ d["lokr_w1_b"]
        return t, lambda w: torch.kron(w1, d["lokr_w2_a"] @ d["lokr_w2_b"]) / 2
    if name.startswith("dora"):
        t, delta = split_lora(n, k, seed, alpha=2.0)
        rows = "in" not in name
        magnitude = 1 + r(n, 1, s=5) if rows else 1 + r(1, k, s=5)
        t["dora_scale"] = magnitude

        def decomposed(w: Tensor) -> Tensor:
            whole = w + delta(w)
            return whole * magnitude.double() / whole.norm(dim=1 if rows else 0, keepdim=True) - w

        return t, decomposed
    if name == "oft out":
        size = n // divisor(n)
        blocks = r(divisor(n), size, size)
        turn = torch.block_diag(*[cayley((b - b.T).double()) for b in blocks])
        # LyCORIS sums over the first axis of a block, so that the transpose turns the outputs
        return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, lambda w: turn.T @ w - w
    if name == "oft in":
        size = divisor(k)
        vector = r(k // size, size * (size - 1) // 2)
        skew = torch.zeros(k // size, size, size, dtype=torch.float64)
        i, j = torch.triu_indices(size, size, 1)
        skew[:, i, j] = vector.double()
        skew = skew - skew.transpose(1, 2)
        power = [torch.linalg.matrix_power(skew, p) for p in range(5)]
        turn = torch.block_diag(*(power[0] + 2 * power[1] + 2 * power[2] + 2 * power[3] + power[4]))
        return {"oft_R.weight": vector}, lambda w: w @ turn.T - w
    if name == "diff":
        t = {"diff": r(n, k)}
        return t, lambda w: t["diff"].double()
    if name == "set":
        t = {"set_weight": r(n, k)}
        return t, lambda w: t["set_weight"].double() - w
    raise KeyError(name)


KINDS = (
    "lora", "lora alpha", "loha", "loha dense", "lokr full", "lokr half", "lokr both", "dora", "dora in",
    "oft out", "oft in", "diff", "set",
)  # fmt: skip


def file_of(
    layers: Mapping[str, Mapping[str, Tensor]], rename: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """Layer -> tensors by last names, as one dict with the names of a file."""
    return {f"{rename(layer)}.{leaf}": value for layer, own in layers.items() for leaf, value in own.items()}


def merge(network: nn.Module, deltas: Mapping[str, list[tuple[Delta, float]]]) -> None:
    """Replace weights of a network by dense ones with the sums of deltas, computed in float64."""
    for name, own in deltas.items():
        layer = network.get_submodule(name)
        base = dense(layer)
        merged = base + sum(weight * delta(base) for delta, weight in own)
        layer.weight = nn.Parameter(merged.to(network.dtype), requires_grad=False)

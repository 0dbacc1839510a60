"""The choice of the next token from its logits.

Every choice is made on the CPU in float64 from one uniform number, so that devices differ only where their
logits do. Order of the steps as in transformers: temperature, top-k, top-p, min-p.
Sources: Holtzman et al. 2019, arXiv 1904.09751 (top-p); Nguyen et al. 2024, arXiv 2407.01082 (min-p).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_core.errors import BadArgument, NonFinite, printable

MAX_TEMPERATURE = 100.0
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy.

    Args:
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_k: Only so many of the most likely tokens; 0 for all.
        top_p: Only the most likely tokens that together have this share of the probability; 1 for all.
        min_p: Only tokens with this share of the probability of the most likely one; 0 for all.
        seed: Seed of the numbers that are drawn.

    Raises:
        BadArgument: A value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        ranges = {"temperature": (0, MAX_TEMPERATURE), "top_p": (0, 1), "min_p": (0, 1)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or (name == "top_p" and value == 0):
                above = "above 0, up to 1" if name == "top_p" else f"from {low:g} to {high:g}"
                raise BadArgument(f"{name}: got {shown(value)}, wanted a number {above}")
        for name, most in (("top_k", 1 << 24), ("seed", MAX_SEED)):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= most:
                raise BadArgument(f"{name}: got {shown(value)}, wanted an integer from 0 to {most}")


def shown(value: object) -> str:
    """A value for a message; Python refuses to write integers of thousands of digits."""
    long = isinstance(value, int) and abs(value) >> 99
    return "an integer of over 99 bits" if long else printable(value, 40)


class Chooser:
    """Chooses token after token.

    Args:
        sampling: How.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """Logits [V] of any float type -> the number of a token.

        Raises:
            NonFinite: A logit is NaN, or none is finite.
        """
        if self.sampling.temperature == 0:
            best = int(logits.argmax())
            if not math.isfinite(float(logits[best])):  # NaN counts as the largest
                raise NonFinite(_FAULT)
            return best
        ids, shares = distribution(logits, self.sampling)
        point = torch.rand((), dtype=torch.float64, generator=self._generator)
        # the last token takes what rounding leaves of the sum
        place = min(int(torch.searchsorted(shares.cumsum(0), point, right=True)), len(ids) - 1)
        return int(ids[place])


_FAULT = (
    "language model: the numbers of the next token are not finite, so nothing can be chosen; use "
    "dtype=bfloat16 or float32, or download the text encoder again"
)


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be chosen and their probabilities, on the CPU, the most likely first.

    Of equal tokens the one with the smaller number comes first, and is kept where only some of them fit.

    Args:
        logits: [V], any float type.
        sampling: How; its temperature must be above 0.

    Returns:
        Numbers of tokens [N] int64 and probabilities [N] float64, which add up to 1.

    Raises:
        NonFinite: A logit is NaN, or none is finite.
    """
    values = logits.detach().to("cpu", torch.float64)
    most = float(values.max())
    if not math.isfinite(most):
        raise NonFinite(_FAULT)
    ids = torch.arange(len(values))
    if 0 < sampling.top_k < len(values):  # before sorting, which takes longer than all the rest
        ids = (values >= values.topk(sampling.top_k).values[-1]).nonzero()[:, 0]
    order = values[ids].sort(descending=True, stable=True).indices
    ids = ids[order][: sampling.top_k or None]
    shares = ((values[ids] - most) / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        before = shares.cumsum(0) - shares
        keep = max(1, int((before < sampling.top_p).sum()))
        ids, shares = ids[:keep], shares[:keep]
    if sampling.min_p > 0:
        keep = int((shares >= sampling.min_p * shares[0]).sum())
        ids, shares = ids[:keep], shares[:keep]
    return ids, shares / shares.sum()

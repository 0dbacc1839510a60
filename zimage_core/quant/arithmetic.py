"""`compute=`: in which numbers the large products of a network are multiplied.

    exact      weights as the file has them, in the dtype of the computation, float32 sums
    bfloat16   x and the result rounded to bfloat16, and weights where the device gains by it; float32 sums
    int8       both operands as int8 with a scale for each row, exact int32 sums (reference/int8.py)
    auto       int8 for a large transformer with packed weights if the device gains over 1.5 times, else exact

This is the one place that says which layers take part and which of them rotate; docs/benchmarks/quality.md
has the errors behind it. Embedders, final layer and adaptive norms stay exact: they are 1 per cent of the
work, and err as much as a whole kind of layer of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from zimage_core.errors import BadArgument, printable

MODES = ("exact", "bfloat16", "int8", "auto")
"""Values of `compute=`."""

BLOCKS = (
    "layers",
    "noise_refiner",
    "context_refiner",
    "siglip_refiner",
    "control_layers",
    "control_noise_refiner",
)
"""Module lists whose layers take part, of all networks."""

PLAIN = ("to_q", "to_k", "to_v", "w1", "w3")
"""Layers of an S3-DiT block that multiply x as it is: their input comes from a norm. Rotating it, too, would
take a fifth from the error, and make rows that are not kept dearer to make."""

ROTATED = (
    "to_out.0", "w2", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj",
    "fc1", "fc2",
)  # fmt: skip
"""Layers whose operands are rotated. Outputs of attention and of a gate have outliers; in a language model
and in a vision tower single channels stand out behind the norms, too."""


@dataclass(frozen=True)
class Arithmetic:
    """How one layer multiplies.

    Args:
        mode: "exact", "bfloat16" or "int8".
        rotated: In int8, whether x and W are rotated by blocks of K before they are quantised.

    Raises:
        BadArgument: There is no such mode, or a layer cannot have it.
    """

    mode: str = "exact"
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES or self.mode == "auto":
            known = ", ".join(mode for mode in MODES if mode != "auto")
            raise BadArgument(f"mode of a layer: got {printable(self.mode, 40)!r}, wanted one of {known}")


EXACT = Arithmetic()


def arithmetic_of(name: str, mode: str) -> Arithmetic:
    """How a layer multiplies in a mode.

    Args:
        name: Name of the layer in its network, such as "layers.0.feed_forward.w2".
        mode: "exact", "bfloat16" or "int8".
    """
    stack, _, rest = name.partition(".")
    leaf = rest.split(".", 2)[-1]
    if mode == "exact" or stack not in BLOCKS or leaf not in (*PLAIN, *ROTATED):
        return EXACT
    return Arithmetic(mode, rotated=mode == "int8" and leaf in ROTATED)

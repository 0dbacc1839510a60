"""The samplers and schedules by name; each is imported when a run asks for it.

This file needs only the standard library, for the parser of the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple


class Sampler(NamedTuple):
    """Where a sampler is.

    Args:
        module: Its file in this folder.
        function: Its function, with the arguments of `euler.sample`.
        stochastic: Whether it also takes `noise`, a source of noise.
    """

    module: str
    function: str = "sample"
    stochastic: bool = False


SAMPLERS = {
    "euler": Sampler("euler"),
    "heun": Sampler("heun"),
    "res_multistep": Sampler("res_multistep"),
    "dpmpp_2m": Sampler("dpmpp_2m"),
    "dpmpp_2m_sde": Sampler("dpmpp_2m_sde", stochastic=True),
    "euler_ancestral": Sampler("ancestral", "euler_ancestral", True),
    "lcm": Sampler("ancestral", "lcm", True),
}
SCHEDULES = ("linear", "simple", "beta", "bong_tangent")
"""Names of the functions of `schedules`; "linear" is the checkpoint's own."""
UNSHIFTED = ("bong_tangent",)
"""Schedules that state noise levels, to which no shift applies."""


def find(name: str) -> Any:
    """The function of a sampler; it has the arguments of `euler.sample`, and `noise` if it is stochastic."""
    place = SAMPLERS[name]
    return getattr(import_module(f"zimage_core.sampling.{place.module}"), place.function)

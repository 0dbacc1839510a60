"""ggml's own quantiser through ctypes: the oracle of tests/quantize and of benchmarks/quantize.py.

The library is the one in the package llama_cpp, or the file that ZIMAGE_GGML names.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from zimage_core.formats import by_name

NEED_IMPORTANCE = ("IQ1_S", "IQ2_XXS", "IQ2_XS")
"""Types that ggml encodes with a matrix alone."""

VARIABLE = "ZIMAGE_GGML"


@cache
def _library() -> ctypes.CDLL | None:
    path = os.environ.get(VARIABLE)
    if path is None:
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            return None
        path = str(Path(spec.origin).parent / "lib" / "libggml-base.so")
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library


def available() -> bool:
    """Whether there is a library; one that is named and cannot be loaded is an error."""
    return _library() is not None


needs_ggml = pytest.mark.skipif(
    not available(), reason=f"no ggml: install llama-cpp-python or set {VARIABLE} to libggml-base.so"
)


def quantize(name: str, x: NDArray[np.float32], importance: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """Rows float32 [n, K] -> uint8 [n, row bytes], as `ggml_quantize_chunk` writes them.

    Importance is float32 [K]. The those of NEED_IMPORTANCE take no other way.
    """
    library = _library()
    if library is None:
        raise RuntimeError("ask available() first")
    fmt = by_name(name)
    x = np.ascontiguousarray(x, np.float32)
    out = np.zeros((len(x), fmt.row_bytes(x.shape[1])), np.uint8)
    costs = None if importance is None else np.ascontiguousarray(importance, np.float32)
    library.ggml_quantize_init(fmt.ggml_type)  # builds the tables of the IQ types, does nothing for others
    library.ggml_quantize_chunk(
        fmt.ggml_type,
        x.ctypes.data,
        out.ctypes.data,
        0,
        len(x),
        x.shape[1],
        None if costs is None else costs.ctypes.data,
    )
    return out

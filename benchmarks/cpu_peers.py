"""Products of others on a CPU for benchmarks.cpu_products: ggml through ctypes, and OpenVINO.

Neither is a dependency. ggml is the library of llama-cpp-python, in any environment; OpenVINO is imported
from the site-packages of another environment, after this one's packages.
"""

from __future__ import annotations

import ctypes as c
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GGML_F32 = 0
REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"
"""The buffers in which ggml interleaves rows when it loads them; C++ exports this name."""
_P = c.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_init": (_P, _P, c.c_size_t, c.c_bool),
    "ggml_new_tensor_2d": (_P, _P, c.c_int, c.c_int64, c.c_int64),
    "ggml_mul_mat": (_P, _P, _P, _P),
    "ggml_new_graph": (_P, _P),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_backend_cpu_init": (_P,),
    "ggml_backend_cpu_set_n_threads": (None, _P, c.c_int),
    "ggml_backend_cpu_buffer_type": (_P,),
    REPACKED: (_P,),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, _P, _P),
    "ggml_backend_graph_compute": (c.c_int, _P, _P),
    "ggml_backend_tensor_set": (None, _P, _P, c.c_size_t, c.c_size_t),
    "ggml_backend_tensor_get": (None, _P, _P, c.c_size_t, c.c_size_t),
    "ggml_free": (None, _P),
    "ggml_backend_buffer_free": (None, _P),
}
"""Function -> type of the result, then those of the arguments."""


class _Params(c.Structure):
    _fields_ = (("mem_size", c.c_size_t), ("mem_buffer", _P), ("no_alloc", c.c_bool))


class Ggml:
    """ggml's CPU backend.

    Args:
        folder: Folder with libggml-base.so and libggml-cpu.so.
        threads: Number of threads.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        libraries = [
            c.CDLL(str(folder / f"libggml-{name}.so"), mode=c.RTLD_GLOBAL) for name in ("base", "cpu")
        ]
        self._call: dict[str, Any] = {}
        for name, (result, *arguments) in _SIGNATURES.items():
            found = next((lib for lib in libraries if hasattr(lib, name)), None)
            if found is None:
                continue  # a build without repacking
            function = getattr(found, name)
            function.restype = result
            function.argtypes = [_Params] if name == "ggml_init" else arguments
            self._call[name] = function
        self._backend = self._call["ggml_backend_cpu_init"]()
        self._call["ggml_backend_cpu_set_n_threads"](self._backend, threads)

    @property
    def repacks(self) -> bool:
        """Whether the library can interleave rows for its products."""
        return REPACKED in self._call

    def weight(self, packed: Tensor, kind: int, width: int, repacked: bool) -> int:
        """A weight in ggml's memory: packed uint8 [N, row bytes] of the ggml type `kind`."""
        context = self._call["ggml_init"](_Params(1 << 20, None, True))
        tensor = self._call["ggml_new_tensor_2d"](context, kind, width, len(packed))
        which = REPACKED if repacked else "ggml_backend_cpu_buffer_type"
        if not self._call["ggml_backend_alloc_ctx_tensors_from_buft"](context, self._call[which]()):
            raise MemoryError("ggml found no memory for a weight")
        self._call["ggml_backend_tensor_set"](tensor, packed.data_ptr(), 0, packed.numel())
        return int(tensor)

    def product(self, weight: int, rows: int, width: int, tokens: int) -> Callable[[Tensor], Tensor]:
        """x float32 [tokens, width] -> [tokens, rows]; the graph is built once."""
        call = self._call
        context = call["ggml_init"](_Params(4 << 20, None, True))
        x = call["ggml_new_tensor_2d"](context, GGML_F32, width, tokens)
        y = call["ggml_mul_mat"](context, weight, x)
        graph = call["ggml_new_graph"](context)
        call["ggml_build_forward_expand"](graph, y)
        call["ggml_backend_alloc_ctx_tensors_from_buft"](context, call["ggml_backend_cpu_buffer_type"]())
        out = torch.empty(tokens, rows)

        def run(given: Tensor) -> Tensor:
            call["ggml_backend_tensor_set"](x, given.data_ptr(), 0, given.numel() * 4)
            if call["ggml_backend_graph_compute"](self._backend, graph):
                raise RuntimeError("ggml could not compute the product")
            call["ggml_backend_tensor_get"](y, out.data_ptr(), 0, out.numel() * 4)
            return out

        return run


class OpenVino:
    """Products of int8 weights with dynamically quantised activations.

    Args:
        site_packages: Folder of an environment that has openvino; None uses this environment's.
        threads: Number of threads.
    """

    def __init__(self, site_packages: Path | None, threads: int = 1) -> None:
        if site_packages is not None and str(site_packages) not in sys.path:
            sys.path.append(str(site_packages))
        import openvino
        from openvino import opset13

        self._ov, self._ops, self._threads = openvino, opset13, threads
        self._core = openvino.Core()
        self.version = str(openvino.__version__)

    def product(
        self, values: NDArray[np.int8], scale: NDArray[np.float32], group: int | None
    ) -> Callable[[Tensor], Tensor]:
        """x float32 [M, K] -> [M, N] for int8 rows [N, K] with scales [N].

        Args:
            values: The integers.
            scale: One scale for each row.
            group: Activations that share a scale; None leaves OpenVINO's default, 32.
        """
        ops = self._ops
        x = ops.parameter([-1, values.shape[1]], np.float32)
        weight = ops.multiply(ops.convert(ops.constant(values), "f32"), ops.constant(scale[:, None]))
        model = self._ov.Model([ops.matmul(x, weight, False, True)], [x])
        config = {
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if group is not None:
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(group)
        request = self._core.compile_model(model, "CPU", config).create_infer_request()

        def run(given: Tensor) -> Tensor:
            request.infer([self._ov.Tensor(given.numpy())], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor().data)

        return run

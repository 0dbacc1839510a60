"""What a block in int8 launches, one by one and as a graph, with weights from Q4_K and with kept rows.

    int8.py

The architecture is that of FAKE_ARCH. Kernels compute nothing; counted are their names.
"""

from __future__ import annotations

import sys

import fake_cuda

fake_cuda.settings(FAKE_NO_COPY=1)

import project
import torch
from torch import nn

from zimage_core.config import TransformerConfig
from zimage_core.formats import FORMATS
from zimage_core.models.transformer import TransformerBlock
from zimage_core.nn.compute import set_compute
from zimage_core.nn.linear import Linear
from zimage_core.quant.int8 import quantize_weight
from zimage_core.quant.tensor import QuantTensor

CONFIG, ROWS, OTHER = TransformerConfig(dim=512, n_heads=4, hidden_dim=1280), 544, 33
FMT, DTYPE = FORMATS["Q4_K"], torch.float16
TRITON = "triton:"
PRODUCTS = ("cublas", "gemm")
"""What names of a library's products hold."""


def network(device):
    """One block over packed weights of zeros, in int8."""
    block = TransformerBlock(CONFIG, modulated=False).to(device, DTYPE)
    for layer in (each for each in block.modules() if isinstance(each, Linear)):
        shape = (layer.out_features, layer.in_features)
        packed = torch.zeros(shape[0], FMT.row_bytes(shape[1]), dtype=torch.uint8, device=device)
        layer.assign(QuantTensor(packed, FMT, shape), DTYPE)
    set_compute(nn.ModuleDict({"layers": nn.ModuleList([block])}), "int8", device)
    return block


def launches(run):
    """Launches of Triton's kernels by name, and the products of a library."""
    run()  # compiles
    fake_cuda.launched(reset=True)
    run()
    found = fake_cuda.launched()
    ours = {name.removeprefix(TRITON): n for name, n in found.items() if name.startswith(TRITON)}
    return ours, sum(n for name, n in found.items() if any(part in name.lower() for part in PRODUCTS))


@torch.no_grad()
def main():
    torch.backends.cuda.enable_cudnn_sdp(False)  # the real library would ask the real driver
    device = torch.device("cuda", 0)
    block = network(device)
    x, angle = (torch.zeros(ROWS, n, device=device) for n in (CONFIG.dim, CONFIG.head_dim // 2))
    x = x.to(DTYPE)
    packed, by_library = launches(lambda: block(x, (angle, angle)))
    few = slice(OTHER)
    other, _ = launches(lambda: block(x[few], (angle[few], angle[few])))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block(x, (angle, angle))
    graph.replay()
    for layer in (each for each in block.modules() if isinstance(each, Linear)):
        layer.set_weight(quantize_weight(layer.weight, layer.rotation))
    kept, _ = launches(lambda: block(x, (angle, angle)))
    project.answer(packed=packed, by_library=by_library, other=other, kept=kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())

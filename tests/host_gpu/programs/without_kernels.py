"""Launches and memory of a product without kernels, for each format; attention of each network; the VAE.

    without_kernels.py [PART ...]       PART: backends, products, decode, unfused; default: all

Run it with ZIMAGE_KERNELS=off, and with FAKE_ARCH for another compute capability.
"""

from __future__ import annotations

import sys

import fake_cuda
import project
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zimage_core.config import AutoencoderConfig
from zimage_core.formats import FORMATS
from zimage_core.memory.activations import decode_bytes
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.nn import attention
from zimage_core.quant import ops
from zimage_core.quant.dispatch import plain_bytes
from zimage_core.quant.tensor import QuantTensor

BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
GPU = torch.device("cuda", 0)
ROWS, WIDTH = 10240, 3840


def measured(run):
    """Result, launches, and bytes that the allocator held at most on top."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, launches = torch.cuda.memory_allocated(), fake_cuda.counts()
    result = run()
    torch.cuda.synchronize()
    calls = fake_cuda.counts() - launches
    return result, calls["launch"] + calls["blas"], torch.cuda.max_memory_allocated() - before


def products():
    """Format -> launches, bytes, and what the plan may count for them."""
    found = {}
    x = torch.empty(4, WIDTH, dtype=torch.bfloat16, device=GPU)
    for fmt in FORMATS.values():
        if fmt.is_integer:
            continue
        packed = torch.empty(ROWS, fmt.row_bytes(WIDTH), dtype=torch.uint8, device=GPU)
        weight = QuantTensor(packed, fmt, (ROWS, WIDTH))
        ops.linear(x, weight.rows(0, 8))  # tables of the format, workspace of the library
        out, launches, nbytes = measured(lambda weight=weight: ops.linear(x, weight))
        nbytes -= out.numel() * out.element_size()
        found[fmt.name] = (launches, nbytes, plain_bytes(fmt, ROWS, WIDTH))
        del out
    return found


def backends():
    """Network -> what torch would take for it, in the settings of a run."""
    half = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    shapes = {
        "transformer": ((1, 30, 4128, 128), (1, 30, 4128, 128), half, False),
        "text encoder": ((1, 32, 64, 128), (1, 8, 64, 128), half, True),
        "VAE": ((1, 1, 16384, 512), (1, 1, 16384, 512), torch.float32, False),
    }
    found = {}
    for use, (of_q, of_k, dtype, causal) in shapes.items():
        q, k = (torch.empty(shape, dtype=dtype, device=GPU) for shape in (of_q, of_k))
        way = attention._way(q, k, k, causal, of_q != of_k)
        if way == "repeat":
            k, _ = attention._repeated(q, k, k)
        with attention.settings(GPU, use, dtype):
            chosen = torch._fused_sdp_choice(q, k, k, None, 0.0, causal, enable_gqa=q.shape != k.shape)
        name = str(dtype).removeprefix("torch.")
        arch = attention.architecture(GPU)
        found[use] = (way, BACKENDS[chosen], attention.attention_backends(arch, use, name, of_q[-1])[0])
    return found


def unfused():
    """Network -> bytes of attention at 1024 px where torch has no fused kernel at all."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    attention._ways.clear()
    q = torch.empty(4128, 30, 128, dtype=torch.float16, device=GPU)
    one = torch.empty(16384, 1, 512, device=GPU)
    return {
        "transformer": measured(lambda: attention.attention(q, q, q))[2],
        "VAE": measured(lambda: attention.attention(one, one, one))[2],
    }


class _Copies(TorchDispatchMode):
    """Counts copies, and additions of two maps whose layouts differ."""

    def __init__(self):
        super().__init__()
        self.copies = self.mixed = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.copies += function is torch.ops.aten.clone.default
        if function is torch.ops.aten.add.Tensor and arguments[0].ndim == 4:
            self.mixed += arguments[0].stride() != arguments[1].stride()
        return function(*arguments, **(options or {}))


def decode():
    """Copies, mixed additions and bytes of a decode at 1024 px, and the plan's bytes."""
    config = AutoencoderConfig()
    with GPU:
        vae = Autoencoder(config).eval()
    z = torch.empty(1, config.latent_channels, 128, 128, device=GPU)
    with _Copies() as count:
        vae.decode(z)
    nbytes = measured(lambda: vae.decode(z))[2]
    return {
        "copies": count.copies,
        "mixed": count.mixed,
        "bytes": nbytes,
        "plan": decode_bytes(config, 128, 128),
    }


def main():
    found = {}
    with torch.no_grad():
        for part in (backends, products, decode, unfused):
            if part is products:
                project.patch_out()  # not before: it switches cuDNN's attention off
            if part.__name__ in (sys.argv[1:] or [part.__name__]):
                found[part.__name__] = part()
    project.answer(**found)


main()

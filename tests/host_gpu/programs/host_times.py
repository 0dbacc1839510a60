"""Microseconds of the host for each operation of a block, and for a step of the network.

    host_times.py [--files FOLDER] [--pixels 1024] [--tokens 60]

The driver counts launches and does nothing else, so this is the time of Python, torch's dispatcher and
Triton's launcher. A real driver takes 2 to 5 us more for each launch. Times are CPU times of the thread: the
median of the repeats, with the least and the most.
"""

from __future__ import annotations

import statistics
import sys
import time

import fake_cuda

fake_cuda.settings(FAKE_NO_COPY=1)

import project
import torch

from zimage_core.formats import FORMATS
from zimage_core.nn import elementwise
from zimage_core.nn.attention import attention
from zimage_core.quant import ops
from zimage_core.quant.tensor import QuantTensor

REPEATS, CALLS, STEPS = 9, 200, 15
FEW = 32
"""Rows of x that the fused kernel multiplies."""


def timed(work, repeats, calls):
    """CPU time of one call in microseconds, over the repeats."""
    times = []
    for _ in range(3):
        work()
    for _ in range(repeats):
        begin = time.thread_time()
        for _ in range(calls):
            work()
        times.append((time.thread_time() - begin) / calls * 1e6)
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def operations(config, tokens):
    """The operations of a block of this width, by name."""
    device, dtype, dim = torch.device("cuda", 0), torch.bfloat16, config.dim
    fmt = FORMATS["Q4_K"]
    width = -(-dim // fmt.weights) * fmt.weights
    packed = torch.zeros(dim, fmt.row_bytes(width), dtype=torch.uint8, device=device)
    many, few = (QuantTensor(packed, fmt, (dim, width)) for _ in range(2))
    x, wide = (torch.zeros(tokens, size, device=device, dtype=dtype) for size in (dim, width))
    short = wide[:FEW]
    scale = torch.zeros(dim, device=device)
    gain = torch.zeros(dim, device=device, dtype=dtype)
    heads = x.unflatten(-1, (config.n_heads, -1))
    head = torch.zeros(heads.shape[-1], device=device, dtype=dtype)
    turn = torch.zeros(tokens, heads.shape[-1] // 2, device=device)
    return {
        "packed linear, many rows": lambda: ops.linear(wide, many),
        "packed linear, few rows": lambda: ops.linear(short, few),
        "rms_norm_modulate": lambda: elementwise.rms_norm_modulate(x, gain, 1e-5, scale),
        "gate_norm_residual": lambda: elementwise.gate_norm_residual(x, x, gain, 1e-5, scale),
        "qk_norm_rope": lambda: elementwise.qk_norm_rope(heads, heads, head, head, 1e-5, turn, turn),
        "silu_gate": lambda: elementwise.silu_gate(x, x),
        "attention": lambda: attention(heads, heads, heads),
    }


def main():
    parser = project.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=60, help="of the caption; default: 60")
    args = parser.parse_args()
    project.patch_out()
    torch.set_grad_enabled(False)
    pipe = project.open_pipeline(args.files, device="cuda", dtype="bfloat16")
    model, config = pipe.transformer, pipe.transformer.config
    side = (args.pixels or pipe.sample_size) // 8
    caption = torch.zeros(args.tokens, config.cap_feat_dim, device="cuda", dtype=torch.bfloat16)
    prepared = model.prepare([caption], [0.1, 0.2], (side, side))
    latent = torch.zeros(config.in_channels, side, side, device="cuda", dtype=torch.bfloat16)
    fake_cuda.set_fast(True)
    tokens = (side // config.patch_size) ** 2 + args.tokens
    found = {name: timed(work, REPEATS, CALLS) for name, work in operations(config, tokens).items()}
    found[f"step of {len(model.blocks)} blocks"] = timed(lambda: model.step(latent, prepared, 0), STEPS, 1)
    project.answer(us=found, torch=torch.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())

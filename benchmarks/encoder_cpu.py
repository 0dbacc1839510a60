"""CPU time of the text encoder by `compute`, and of attention, the VAE and dynamic int8 on a CPU.

    python -m benchmarks.make_full_size FOLDER
    python -m benchmarks.encoder_cpu FOLDER [--tokens 20 64 128] [--repeats 5]
    python -m benchmarks.encoder_cpu --attention

Writes results/encoder_cpu.json: seconds of the encoder for each `compute`, nanoseconds a weight of its parts,
and the other studies. The modes alternate within a repeat. With --encoder-only the file has the first part
alone, so that an older checkout can be measured by `--modes exact`. With --attention nothing but attention is
measured, into results/attention_cpu.json.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.report import RESULTS, write
from benchmarks.timing import spread
from zimage_core.cpu import attention as int8_attention
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.weights.load import load_text_encoder

PROMPTS = (
    "a small red circle on the left of a blue background",
    "a large green star on a white background",
    "the digit 7 in yellow on a black background",
)


def alternate(
    calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.thread_time
) -> dict[str, list[float]]:
    """Seconds of each call by a clock, in turn; the first turn does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if turn:
                taken[name].append(clock() - start)
    return taken


def encoder(
    path: Path, modes: Iterable[str], tokens: Iterable[int], repeats: int
) -> dict[str, dict[str, Any]]:
    """CPU seconds of one prompt by length and mode, with one thread and with two; and the error of a mode."""
    network = load_text_encoder(path)
    found: dict[str, dict[str, Any]] = {}
    for length in tokens:
        ids = torch.randint(0, 100_000, (length,), generator=torch.Generator().manual_seed(length))
        states: dict[str, Tensor] = {}

        def encode(mode: str, ids: Tensor = ids, states: dict[str, Tensor] = states) -> None:
            if mode != "exact" or len(states) > 1:
                from zimage_core.nn.compute import set_compute

                set_compute(network, mode, torch.device("cpu"))
            states[mode] = network(ids).float()

        figures = {mode: {} for mode in modes}
        for threads, clock in ((1, time.thread_time), (2, time.process_time)):
            torch.set_num_threads(threads)
            calls = {mode: lambda mode=mode: encode(mode) for mode in figures}  # type: ignore[misc]
            for mode, seconds in alternate(calls, repeats, clock).items():
                name = "one thread" if threads == 1 else "two threads together"
                figures[mode][name] = spread(seconds) | {"least": round(min(seconds), 3)}
        for mode in figures:
            error = (states[mode] - states["exact"]).norm() / states["exact"].norm()
            figures[mode]["error"] = float(error)
            print(length, mode, figures[mode], flush=True)
        found[str(length)] = figures
    return found


def parts(path: Path, tokens: Iterable[int], repeats: int) -> dict[str, dict[str, float]]:
    """Least nanoseconds a weight of one thread: unpacking, the product, and both together."""
    from zimage_core.cpu.dequantize import slabs
    from zimage_core.quant import int8, ops

    torch.set_num_threads(1)
    found = {}
    for name, module in load_text_encoder(path).layers[0].named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not hasattr(weight, "format"):
            continue
        rows, width = weight.shape
        height = max(8, ops.SLAB_BYTES // (4 * width) // 8 * 8)
        calls = {"unpack": lambda w=weight, h=height: [0 for _ in slabs(w.packed, w.format, h)]}
        for m in tokens:
            x, dense, out = torch.randn(m, width), torch.randn(height, width), torch.empty(m, height)
            calls[f"float32 product of {m} alone"] = lambda x=x, w=dense, y=out, n=rows // height + 1: [
                torch.mm(x, w.t(), out=y) for _ in range(n)
            ]
            calls[f"exact {m}"] = lambda x=x, w=weight: ops.linear(x, w)
            calls[f"bfloat16 {m}"] = lambda x=x, w=weight: ops.linear(x.bfloat16(), w)
            calls[f"int8 {m}"] = lambda x=x, w=weight: int8.linear(x, w)
        taken = alternate(calls, repeats)
        figures = {call: round(min(s) / (rows * width) * 1e9, 3) for call, s in taken.items()}
        found[f"{name} {weight.format.name} {rows}x{width}"] = figures
        print(name, figures, flush=True)
    return found


def attention(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of attention with 30 heads of 128 channels, by dtype, and with q k^T in int8."""
    found = {}
    for length in (288, 1056, 4128):
        calls = {}
        for dtype in (torch.float32, torch.bfloat16):
            heads = [torch.randn(1, 30, length, 128).to(dtype) for _ in range(3)]
            calls[str(dtype)] = lambda h=heads: functional.scaled_dot_product_attention(*h)
            if dtype == torch.float32:
                calls["int8"] = lambda h=heads: int8_attention.attention(*(each[0] for each in h))
        found[str(length)] = {n: round(min(s) * 1e3, 2) for n, s in alternate(calls, repeats).items()}
    return found


def vae(repeats: int) -> dict[str, Any]:
    """PSNR of the embedded VAE in bfloat16 to float32, and seconds of a full-size one for 128 px."""
    from zimage_core import ZImagePipeline
    from zimage_core.config import AutoencoderConfig

    pipe = ZImagePipeline.from_default()
    latents = [pipe(prompt, seed=i, output_type="latent").images for i, prompt in enumerate(PROMPTS)]
    config = pipe.vae.config
    unscaled = [z.reshape(1, *z.shape[-3:]) / config.scaling_factor + config.shift_factor for z in latents]
    wide = [pipe.vae.decode(z).clamp(-1, 1) for z in unscaled]
    narrow_vae = pipe.vae.to(torch.bfloat16)
    ratios = []
    for z, image in zip(unscaled, wide, strict=True):
        off = narrow_vae.decode(z.bfloat16()).float().clamp(-1, 1) - image
        ratios.append(round(10 * math.log10(4 / float(off.square().mean())), 1))
    torch.manual_seed(0)
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        full, z = Autoencoder(AutoencoderConfig()).to(dtype), torch.randn(1, 16, 16, 16).to(dtype)
        calls[str(dtype)] = lambda v=full, z=z: v.decode(z)
    seconds = {name: round(min(s), 3) for name, s in alternate(calls, min(repeats, 3)).items()}
    return {"psnr_embedded": ratios, "seconds_full_128px": seconds}


def dynamic_int8(repeats: int) -> dict[str, Any]:
    """torch's dynamic int8 linear on Gaussian data: GFLOP/s, error, and nanoseconds a weight to pack it."""
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(2560, 2560)
    x = torch.randn(288, 2560)
    exact, flops = x.double() @ weight.double().T, 2 * 288 * 2560**2
    scales = (weight.abs().amax(1) / 127).double()
    rows = torch.quantize_per_channel(weight, scales, torch.zeros(2560).long(), 0, torch.qint8)
    before, found = torch.backends.quantized.engine, {}
    float32 = min(alternate({"": lambda: torch.mm(x, weight.t())}, repeats)[""])
    for engine in ("fbgemm", "onednn"):
        torch.backends.quantized.engine = engine
        packed = torch.ops.quantized.linear_prepack(rows, None)
        for narrow in (False, True):
            calls = {
                "multiply": lambda p=packed, n=narrow: torch.ops.quantized.linear_dynamic(x, p, n),
                "pack": lambda: torch.ops.quantized.linear_prepack(rows, None),
            }
            least = {name: min(s) for name, s in alternate(calls, repeats).items()}
            error = (calls["multiply"]().double() - exact).norm() / exact.norm()
            found[f"{engine}, {'7' if narrow else '8'} bits of x"] = {
                "gflops": round(flops / least["multiply"] / 1e9),
                "over_float32": round(float32 / least["multiply"], 2),
                "error": round(float(error), 5),
                "pack_ns_a_weight": round(least["pack"] / 2560**2 * 1e9, 2),
            }
    torch.backends.quantized.engine = before
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=[20, 64])
    parser.add_argument("--modes", nargs="+", default=["exact", "bfloat16", "int8"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--encoder-only", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.attention:
        torch.set_num_threads(1)
        with torch.inference_mode():
            write(args.out or RESULTS / "attention_cpu.json", {"attention": attention(args.repeats)})
        return
    if args.folder is None:
        parser.error("give the folder of make_full_size, or --attention")
    path = args.folder / "text_encoder.gguf"
    with torch.inference_mode():
        figures: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 1)}
        figures["encoder"] = encoder(path, args.modes, args.tokens, args.repeats)
        if not args.encoder_only:
            from zimage_core.cpu import capability

            figures["cpu"], figures["rates"] = capability.features(), vars(capability.rates())
            figures["parts"] = parts(path, args.tokens, args.repeats)
            torch.set_num_threads(1)
            figures["attention"] = attention(args.repeats)
            figures["dynamic_int8"] = dynamic_int8(args.repeats)
            figures["vae"] = vae(args.repeats)
    write(args.out or RESULTS / "encoder_cpu.json", figures)


if __name__ == "__main__":
    main()

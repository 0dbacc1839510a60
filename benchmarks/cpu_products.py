"""Products of a full-width S3-DiT block, and steps of a small stack of such blocks, in every compute mode.

    python -m benchmarks.cpu_products [--format Q4_K] [--m 32 288 1056 4128] [--step 256 512]
        [--ggml FOLDER/llama_cpp/lib] [--openvino ENVIRONMENT/lib/python3.11/site-packages]

The seven products: to_q, to_k, to_v, to_out [3840, 3840], w1, w3 [10240, 3840] and w2 [3840, 10240], of
float32 activations, as the model's layers run them: q, k and v share an input, and so do w1 and w3. One
thread, CPU seconds of the process, all variants in turn, medians with p20 and p80. The steps run the real
classes with six main layers and two noise refiners.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import peers
from benchmarks.cases import TRANSFORMER
from benchmarks.cpu_peers import Ggml, OpenVino
from benchmarks.report import arguments, write
from benchmarks.timing import Budget, measure, spread
from benchmarks.weights import blank, fill_packed, linears, relative_error
from zimage_core.formats import BlockFormat, by_name
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.compute import set_compute
from zimage_core.nn.linear import Linear, ready
from zimage_core.quant.int8 import quantize_weight, rotation_of
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import encode

DIM, HIDDEN = TRANSFORMER.dim, TRANSFORMER.hidden_dim
NAMES = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
         "feed_forward.w3", "feed_forward.w2")  # fmt: skip
INPUTS = ((0, 1, 2), (3,), (4, 5), (6,))
"""Layers that share an input."""
REPEATS = {32: 7, 288: 5, 1056: 3, 4128: 3}
Products = Callable[[], list[Tensor]]
CPU = torch.device("cpu")


class Block(nn.Module):
    """The seven layers under the names that decide how a layer multiplies."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        for name, layer in zip(NAMES, layers, strict=True):
            parent: nn.Module = self.layers[0]
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, layer)


SHAPES: tuple[tuple[int, int], ...] = ((DIM, DIM),) * 4 + ((HIDDEN, DIM),) * 2 + ((DIM, HIDDEN),)


def weights(fmt: BlockFormat) -> list[QuantTensor]:
    """Encoded Gaussian weights of the seven products; 97 rows repeat."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for n, k in SHAPES:
        rows = encode(torch.randn(97, k, generator=generator) * 0.02, fmt)
        found.append(QuantTensor(rows.repeat(-(-n // 97), 1)[:n].contiguous(), fmt, (n, k)))
    return found


def block(packed: Sequence[Tensor | QuantTensor], mode: str) -> list[Linear]:
    """The seven layers in a compute mode."""
    layers = []
    for weight in packed:
        n, k = weight.shape
        with torch.device("meta"):
            layer = Linear(k, n)
        dense = None if isinstance(weight, QuantTensor) else nn.Parameter(weight, requires_grad=False)
        layer.set_weight(weight if dense is None else dense)  # type: ignore[arg-type]
        layers.append(layer)
    set_compute(Block(layers), mode, CPU)
    return layers


def keep_int8(layers: Sequence[Linear]) -> None:
    """Replace weights by int8 rows, where the layer multiplies int8."""
    for layer in layers:
        if layer.arithmetic.mode == "int8":
            rotation = rotation_of(layer.weight, layer.arithmetic.rotated)
            layer.set_weight(quantize_weight(layer.weight, rotation))


def by_layers(layers: Sequence[Linear], xs: Sequence[Tensor]) -> Products:
    """The seven products of layers; inputs are shared as in a block."""

    def run() -> list[Tensor]:
        found = []
        for x, group in zip(xs, INPUTS, strict=True):
            mine = [layers[i] for i in group]
            given = ready(x, *mine)
            found += [layer(given) for layer in mine]
        return found

    return run


def by_function(multiply: Callable[[Tensor, int], Tensor], xs: Sequence[Tensor]) -> Products:
    """The seven products of a function of (x, index of the product)."""
    return lambda: [multiply(x, i) for x, group in zip(xs, INPUTS, strict=True) for i in group]


class Contest:
    """The weights in every form, made once for all numbers of tokens."""

    def __init__(self, fmt: BlockFormat, ggml: Path | None, openvino: Path | None) -> None:
        self.fmt, self.packed = fmt, weights(fmt)
        self.dense = [weight.dequantize(torch.float32) for weight in self.packed]
        self.half = [weight.bfloat16() for weight in self.dense]
        self.modes = {mode: block(self.packed, mode) for mode in ("exact", "bfloat16", "int8")}
        self.kept = block(self.packed, "int8")
        keep_int8(self.kept)
        self.ggml = None if ggml is None else Ggml(ggml)
        self.openvino: dict[str, list[Callable[[Tensor], Tensor]]] = {}
        self.versions: dict[str, str] = {}
        self.ggml_weights: dict[str, list[int]] = {}
        if self.ggml is not None:
            for name, repacked in (("ggml", False), ("ggml, repacked", True)):
                if repacked and not self.ggml.repacks:
                    continue
                self.ggml_weights[name] = [
                    self.ggml.weight(weight.packed, fmt.ggml_type or 0, weight.shape[1], repacked)
                    for weight in self.packed
                ]
        if openvino is not None:
            engine = OpenVino(openvino)
            self.versions["openvino"] = engine.version
            for one_scale in (False, True):
                name = f"OpenVINO int8, {'a scale a token' if one_scale else 'groups of 32'}"
                made = []
                for dense in self.dense:
                    rows = quantize_weight(dense)
                    scale = torch.ones(len(dense)) if rows.scale is None else rows.scale
                    group = dense.shape[1] if one_scale else None
                    made.append(engine.product(rows.packed.view(torch.int8).numpy(), scale.numpy(), group))
                self.openvino[name] = made

    def products(self, tokens: int) -> dict[str, Products]:
        """All variants for one number of tokens."""
        generator = torch.Generator().manual_seed(tokens)
        xs = [torch.randn(tokens, SHAPES[group[0]][1], generator=generator) for group in INPUTS]
        halves = [x.bfloat16() for x in xs]
        names = {"exact": "exact", "bfloat16": "bfloat16", "int8": "int8 from codes"}
        found = {names[mode]: by_layers(layers, xs) for mode, layers in self.modes.items()}
        found["int8 kept"] = by_layers(self.kept, xs)
        found["dense float32"] = by_function(lambda x, i: functional.linear(x, self.dense[i]), xs)
        found["dense bfloat16"] = by_function(lambda x, i: functional.linear(x, self.half[i]), halves)
        if not peers.why_no_diffusers(self.fmt):
            theirs = [peers.diffusers_parameter(weight.packed, self.fmt) for weight in self.packed]
            multiply = peers.diffusers_linear(torch.float32)
            found["diffusers' GGUF path"] = by_function(lambda x, i: multiply(x, theirs[i]), xs)
        if self.ggml is not None:
            for name, stored in self.ggml_weights.items():
                runs = [self.ggml.product(w, *SHAPES[i], tokens) for i, w in enumerate(stored)]
                found[name] = by_function(lambda x, i, runs=runs: runs[i](x), xs)  # type: ignore[misc]
        for name, engines in self.openvino.items():
            found[name] = by_function(lambda x, i, engines=engines: engines[i](x), xs)  # type: ignore[misc]
        self.wanted = by_function(lambda x, i: functional.linear(x, self.dense[i]), xs)
        return found

    def row(self, tokens: int, repeats: int) -> dict[str, Any]:
        """Seconds and rates of all variants."""
        products = self.products(tokens)
        wanted = self.wanted()
        errors = {
            name: max(relative_error(got.float(), want) for got, want in zip(run(), wanted, strict=True))
            for name, run in products.items()
        }
        budget = Budget(repeats, 0.0, cpu_time=True)
        taken = measure({name: lambda _, run=run: run() for name, run in products.items()}, CPU, budget)  # type: ignore[misc]
        work = 2e-9 * tokens * sum(n * k for n, k in SHAPES)
        found = {
            name: {
                "seconds": spread(each.seconds),
                "gflops": round(work / each.median, 1),
                "over exact": round(taken["exact"].median / each.median, 3),
                "error": errors[name],
            }
            for name, each in taken.items()
        }
        for name, row in found.items():
            print(f"M {tokens:5} {name:32} {row['gflops']:7.1f} GFLOP/s  {row['over exact']:6.2f} x exact  "
                  f"error {row['error']:.2e}", flush=True)  # fmt: skip
        return {"m": tokens, "repeats": repeats, "variants": found}


def stacks(fmt: BlockFormat, layers: int) -> dict[str, ZImageTransformer]:
    """The full-width network with fewer main layers in every mode; packed weights are shared."""
    config = replace(TRANSFORMER, n_layers=layers)

    def empty() -> nn.Module:
        return blank(lambda: ZImageTransformer(config), torch.float32, CPU)

    packed = fill_packed(empty(), fmt, torch.float32, CPU)
    found: dict[str, Any] = {"exact": packed}
    for name, mode in (("bfloat16", "bfloat16"), ("int8 from codes", "int8"), ("int8 kept", "int8")):
        found[name] = model = empty()
        for layer_name, layer in linears(packed):
            ours: Any = model.get_submodule(layer_name)
            ours.set_weight(layer.weight)
            ours.bias = layer.bias
        set_compute(model, mode, CPU)
    keep_int8([layer for _, layer in linears(found["int8 kept"])])
    return found


def steps(models: dict[str, ZImageTransformer], pixels: int, caption: int, repeats: int) -> dict[str, Any]:
    """Seconds of a step of each network."""
    generator = torch.Generator().manual_seed(0)
    side = pixels // 8
    latent = torch.randn(TRANSFORMER.in_channels, side, side, generator=generator)
    text = torch.randn(caption, TRANSFORMER.cap_feat_dim, generator=generator)
    calls: dict[str, Callable[[int], Tensor]] = {}
    with torch.inference_mode():
        for name, model in models.items():
            prepared = model.prepare([text], [0.5], (side, side))
            calls[name] = lambda _, model=model, prepared=prepared: model.step(latent, prepared, 0)  # type: ignore[misc]
        wanted = calls["exact"](0)
        errors = {name: relative_error(call(0), wanted) for name, call in calls.items()}
        taken = measure(calls, CPU, Budget(repeats, 0.0, cpu_time=True))
    found = {
        name: {
            "seconds": spread(each.seconds),
            "over exact": round(taken["exact"].median / each.median, 3),
            "error": errors[name],
        }
        for name, each in taken.items()
    }
    for name, row in found.items():
        print(
            f"{pixels} px {name:18} {row['seconds']['median']:7.2f} s  {row['over exact']:5.2f} x exact",
            flush=True,
        )
    return {"pixels": pixels, "caption": caption, "repeats": repeats, "variants": found}


def main() -> None:
    """Products, then steps."""
    parser = arguments(__doc__, "cpu_products.json")
    parser.add_argument("--format", default="Q4_K", help="a format that divides 3840 and 10240")
    parser.add_argument("--m", type=int, nargs="*", default=list(REPEATS), help="numbers of tokens")
    parser.add_argument("--step", type=int, nargs="*", default=[256, 512], help="pixels")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--caption", type=int, default=32, help="tokens of the caption")
    parser.add_argument("--repeats", type=int, help="default: by the number of tokens")
    parser.add_argument("--ggml", type=Path, help="folder with libggml-base.so and libggml-cpu.so")
    parser.add_argument("--openvino", type=Path, help="site-packages with openvino")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fmt = by_name(args.format)
    report = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    report.pop("machine", None)
    report |= {"format": fmt.name, "layers": args.layers}
    if args.m:
        contest = Contest(fmt, args.ggml, args.openvino)
        report["peers"] = contest.versions
        with torch.inference_mode():
            for m in args.m:
                repeats = args.repeats or REPEATS.get(m, 5)
                report.setdefault("products", {})[str(m)] = contest.row(m, repeats)
                write(args.out, report)
        del contest
    if args.step:
        models = stacks(fmt, args.layers)
        for pixels in args.step:
            found = steps(models, pixels, args.caption, args.repeats or 3)
            report.setdefault("steps", {})[str(pixels)] = found
            write(args.out, report)


if __name__ == "__main__":
    main()

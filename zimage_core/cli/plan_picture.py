"""A plan as text: a table of the networks, a bar for each phase, and sentences."""

from __future__ import annotations

from collections.abc import Mapping

from zimage_core.files.units import in_bytes, in_seconds
from zimage_core.memory.plan import Phase, Plan

BLOCKS = "█▓▒░·"
"""Weights, slots, activations, the rest (scratch, planes, workspace), free."""
ASCII = "#=+-."
WIDTH = 50
"""Characters of a bar."""


def lines(plan: Plan, blocks: bool) -> list[str]:
    """One plan.

    Args:
        plan: To be shown.
        blocks: Whether block characters can be shown, else ASCII.
    """
    bars, why = _bars(plan, BLOCKS if blocks else ASCII), [f"- {reason}" for reason in plan.reasons]
    return [*_head(plan), "", *_table(plan), "", *bars, "", *_times(plan), "", *why]


def _head(plan: Plan) -> list[str]:
    count = f"{plan.images} pictures" if plan.images > 1 else "1 picture"
    rates = plan.rates
    guided = ", guided" if plan.guidance else ""
    speed = f"{rates.flops / 1e12:.3g} TFLOP/s, link {rates.link / 1e9:.3g} GB/s"
    budget = "no limit" if plan.vram is None else f"budget {in_bytes(plan.vram)}"
    host = "" if plan.ram is None else f" of {in_bytes(plan.ram)}"
    return [
        f"{plan.width} x {plan.height} px, {count}, caption of {plan.caption_tokens} tokens, "
        f"{plan.steps} steps{guided}, {plan.dtype}",
        f"{rates.architecture}: {speed} ({rates.source})",
        f"GPU memory: {budget}, peak {in_bytes(plan.peak)}, at least {in_bytes(plan.floor)}; "
        f"host memory: {in_bytes(plan.ram_need)}{host}, {in_bytes(plan.ring)} of it pinned",
    ]


def _table(plan: Plan) -> list[str]:
    head = f"{'network':<13}{'resident':>10}{'streamed':>10}{'on host':>10}{'blocks kept':>13}  slots"
    rows = [head]
    for part in plan.components:
        slots = f"{part.slots} x {in_bytes(part.slot_bytes)}" if part.slots else "none"
        kept = f"{len(part.resident_blocks)}/{part.blocks}" if part.blocks else "-"
        amounts = "".join(f"{in_bytes(n):>10}" for n in (part.resident, part.streamed, part.host))
        rows.append(f"{part.name.replace('_', ' '):<13}{amounts}{kept:>13}  {slots}")
    return rows


def _bars(plan: Plan, signs: str) -> list[str]:
    scale = max(plan.peak, plan.vram or 0)
    rows = []
    for phase in plan.phases:
        parts = _parts(phase)
        told = ", ".join(f"{name} {in_bytes(count)}" for name, count in parts if count)
        rows.append(
            f"{phase.name:<8}{_bar([count for _, count in parts], scale, signs)} {in_bytes(phase.peak):>8}"
        )
        rows.append(f"{'':<8}{told}")
    names = ("weights", "slots", "activations", "scratch and libraries", "free")
    key = "  ".join(f"{sign} {name}" for sign, name in zip(signs, names, strict=True))
    return [*rows, f"{'':<8}{key}; the whole bar is {in_bytes(scale)}"]


def _parts(phase: Phase) -> list[tuple[str, int]]:
    return [
        ("weights", phase.weights + phase.others),
        ("slots", phase.slots),
        ("activations", phase.activations),
        ("scratch and libraries", phase.scratch + phase.planes + phase.workspace),
    ]


def _bar(counts: list[int], scale: int, signs: str) -> str:
    """Whole characters for each amount; what rounding leaves over is never more than one."""
    text, total = "", 0
    for count, sign in zip(counts, signs, strict=False):
        total += count
        text += sign * (round(WIDTH * total / scale) - len(text))
    return text + signs[-1] * (WIDTH - len(text))


def _times(plan: Plan) -> list[str]:
    times = plan.times
    moved = (
        ""
        if not times.transfer
        else (
            f" (compute {in_seconds(times.compute)}, transfer {in_seconds(times.transfer)}, "
            f"first block {in_seconds(times.fill)})"
        )
    )
    return [
        f"expected: encode {in_seconds(times.encode)}, step {in_seconds(times.step)}{moved}, "
        f"decode {in_seconds(times.decode)}, whole run {in_seconds(plan.seconds)}"
    ]


def cards(plans: Mapping[str, Plan | str]) -> list[str]:
    """A line for each budget; a text stands for a plan that there is none of."""
    rows, refused = [], ""
    for name, plan in plans.items():
        if isinstance(plan, str):
            refused = refused or plan
            rows.append(f"{name:<9}does not fit")
            continue
        part, times = plan.component("transformer"), plan.times
        kept = (
            "all networks stay" if plan.resident else f"{len(part.resident_blocks)}/{part.blocks} blocks stay"
        )
        moved = (
            f"{in_bytes(part.each_step)} a step in {in_seconds(times.transfer)}"
            if times.transfer
            else "nothing streamed"
        )
        vae = "VAE at once" if plan.tile is None else f"VAE in tiles of {plan.tile} latents"
        rows.append(
            f"{name:<9}peak {in_bytes(plan.peak):>8}  step {in_seconds(times.step):>7}  run "
            f"{in_seconds(plan.seconds):>7}  {kept}, {moved}, {vae}"
        )
    shown = next((plan for plan in plans.values() if isinstance(plan, Plan)), None)
    head = [] if shown is None else [*_head(shown)[:2], f"at least {in_bytes(shown.floor)} of GPU memory", ""]
    return [*head, *rows, *([refused.removeprefix("plan: ")] if refused else [])]

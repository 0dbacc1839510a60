"""Full-size Z-Image headers without files: what `memory.sizes` reads of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from zimage_core.cli.plan import SIGNS, _lines
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.files.units import in_bytes, in_seconds
from zimage_core.formats import FORMATS
from zimage_core.memory.job import Job
from zimage_core.memory.planner import make_plan, plan_on_cpu
from zimage_core.memory.rates import PCIE, Rates, known
from zimage_core.memory.sizes import Sizes, sizes_of
from zimage_core.weights import names
from zimage_core.weights.card import ModelCard
from zimage_core.weights.opened import Opened

Rule = Callable[[str], str]


def q4_k_m(name: str) -> str:
    """As most files called Q4_K_M: refiners and embedders are left in bfloat16."""
    if not name.startswith("layers."):
        return "BF16"
    return "Q5_K" if ".qkv." in name else "Q6_K" if ".w2." in name else "Q4_K"


def q3_k_s(name: str) -> str:
    return "Q3_K" if "layers." in name or "refiner." in name else "BF16"


def plain(format_name: str) -> Rule:
    """Blocks in one format, the rest in bfloat16."""
    return lambda name: format_name if "layers." in name or "refiner." in name else "BF16"


def q4_k_encoder(name: str) -> str:
    return "Q6_K" if name.startswith("token_embd") else "Q4_K"


def _file(table: names.Table, rule: Rule) -> SimpleNamespace:
    tensors = {}
    for name, shape in names.checkpoint_shapes(table).items():
        two = len(shape) == 2 and name.endswith(".weight")
        tensors[name] = SimpleNamespace(format=FORMATS[rule(name) if two else "F32"], shape=shape)
    return SimpleNamespace(path="made up", tensors=tensors)


def full_size(transformer: Rule = q4_k_m, encoder: Rule = q4_k_encoder, dtype: str = "bfloat16") -> Sizes:
    configs = (TransformerConfig(), TextEncoderConfig(), AutoencoderConfig())
    tables = (
        names.transformer_table(configs[0], "fused"),
        names.text_encoder_table(configs[1], "gguf"),
        names.autoencoder_table(configs[2], "bfl"),
    )
    layouts, parts = ("fused", "gguf", "bfl"), ("transformer", "text_encoder", "vae")
    rules = (transformer, encoder, lambda name: "F32")
    files = {part: _file(table, rule) for part, table, rule in zip(parts, tables, rules, strict=True)}
    cards = {
        part: ModelCard(part, "", "", layout=layout, config=config)
        for part, layout, config in zip(parts, layouts, configs, strict=True)
    }
    return sizes_of({part: Opened(files[part], cards[part]) for part in parts}, dtype)


# dense 16-bit peak of the data sheet in TFLOP/s (float32 sums), memory in GB/s, link in bytes/s; the model
# takes 70 % of the first and 90 % of the second
CARDS = {
    "RTX 2060, PCIe 3": ("sm_75", 25.8, 336, PCIE[3]),
    "RTX 3060, PCIe 4": ("sm_86", 25.5, 360, PCIE[4]),
    "RTX 4060, PCIe 4 x8": ("sm_89", 30.2, 272, PCIE[3]),
    "RTX 4070, PCIe 4": ("sm_89", 58.3, 504, PCIE[4]),
    "RTX 4090, PCIe 4": ("sm_89", 165, 1008, PCIE[4]),
    "H100, PCIe 5": ("sm_90", 989, 3350, PCIE[5]),
}
QUANTISATIONS = {
    "Q3_K_S": q3_k_s, "Q4_0": plain("Q4_0"), "Q4_K_M": q4_k_m, "Q6_K": plain("Q6_K"), "Q8_0": plain("Q8_0"),
}  # fmt: skip


def card_table(px: tuple[int, ...] = (1024, 512)) -> list[str]:
    """Markdown: step at the floor (all that can be is streamed) over a step with everything resident."""
    head = ["card", "px", "compute", *QUANTISATIONS]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for card, (architecture, peak, bandwidth, link) in CARDS.items():
        rates = Rates(
            0.7e12 * peak, 0.7e12 * peak / 3, 0.9e9 * bandwidth, link, link / 2, architecture=architecture
        )
        for side in px:
            cells, compute = [], 0.0
            for rule in QUANTISATIONS.values():
                sizes = full_size(rule, dtype="float16" if architecture == "sm_75" else "bfloat16")
                floor = make_plan(sizes, side, side, rates=rates).floor
                times = make_plan(sizes, side, side, vram=floor, rates=rates).times
                compute = max(compute, times.compute)
                cells.append(f"{in_seconds(times.transfer)}, x{times.step / times.compute:.2f}")
            rows.append(f"| {card} | {side} | {in_seconds(compute)} | {' | '.join(cells)} |")
    return rows


def floor_table() -> list[str]:
    """Markdown: smallest budgets."""
    rows = [f"| | {' | '.join(QUANTISATIONS)} |", "|" + "---|" * (len(QUANTISATIONS) + 1)]
    for side in (512, 768, 1024, 1536, 2048):
        floors = [in_bytes(make_plan(full_size(rule), side, side).floor) for rule in QUANTISATIONS.values()]
        rows.append(f"| {side} px | {' | '.join(floors)} |")
    return rows


def stay_table() -> list[str]:
    """Markdown: what stays on a card in the steps of 1024 x 1024 px."""
    rows = [
        f"| memory for the run | {' | '.join(QUANTISATIONS)} |",
        "|" + "---|" * (len(QUANTISATIONS) + 1),
    ]
    for gib in (4, 6, 8, 10, 12, 16, 24):
        cells = []
        for rule in QUANTISATIONS.values():
            plan = make_plan(full_size(rule), 1024, 1024, vram=gib << 30)
            part = plan.component("transformer")
            stay = len(part.resident_blocks)
            whole = "all" if all(found.kept for found in plan.components) else "steps"
            cells.append(whole if stay == part.blocks else f"{stay}/{part.blocks}")
        rows.append(f"| {gib} GiB | {' | '.join(cells)} |")
    return rows


def rows_table() -> list[str]:
    """Markdown: blocks that a CPU keeps as int8 rows under a limit of host memory."""
    sizes = full_size(dtype="float32")
    job, rows = Job(sizes, 512, 512, rates=known("cpu"), compute="int8"), []
    for gib in (3, 4, 5, 6, 7, 8):
        plan = plan_on_cpu(job, gib << 30)
        part = plan.component("transformer")
        kept, packed = len(part.int8_blocks), len(part.resident_blocks) - len(part.int8_blocks)
        cells = (f"{gib} GiB", f"{packed}/{part.blocks} blocks", f"{kept} blocks, {in_bytes(part.int8_rows)}")
        rows.append(f"| {' | '.join(cells)} | {in_seconds(plan.times.step)} |")
    return rows


SIX_GB = "sm_75"
"""The architecture of the RTX 2060, a card of 6 GB; a driver and a screen leave 5 GiB of it."""


def six_gb_table() -> list[str]:
    """Markdown: images on a card of 6 GB."""
    rules = {"Q3_K_S": q3_k_s, "Q4_K_M": q4_k_m, "Q8_0": plain("Q8_0")}
    rows = [f"| image | {' | '.join(rules)} |", "|" + "---|" * (len(rules) + 1)]
    for side in (512, 768, 1024, 1536):
        cells = []
        for rule in rules.values():
            plan = make_plan(full_size(rule, dtype="float16"), side, side, vram=5 << 30, rates=known(SIX_GB))
            part, times = plan.component("transformer"), plan.times
            stay = f"{len(part.resident_blocks)}/{part.blocks}"
            cells.append(f"{stay}, {in_seconds(times.transfer)} in {in_seconds(times.step)}")
        rows.append(f"| {side} px | {' | '.join(cells)} |")
    return rows


def six_gb_plan() -> list[str]:
    """What `zimage plan --architecture sm_75 --vram 5GiB --compute exact` prints for files of Q8_0."""
    sizes = full_size(plain("Q8_0"), dtype="float16")
    plan = make_plan(sizes, 1024, 1024, vram=5 << 30, rates=known(SIX_GB))
    return _lines(plan, SIGNS, 0)


if __name__ == "__main__":
    tables = (card_table, floor_table, stay_table, rows_table, six_gb_table, six_gb_plan)
    print("\n\n".join("\n".join(table()) for table in tables))

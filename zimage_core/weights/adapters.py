"""Recognise LoRA and ControlNet files by their tensor names.

Sources: the key patterns of diffusers/PEFT, ai-toolkit, kohya/musubi and LyCORIS; VideoX-Fun's ControlNets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from zimage_core.config import COMPONENTS
from zimage_core.errors import printable
from zimage_core.weights.card import ModelCard
from zimage_core.weights.infer import Shape, count_layers

MAX_LORA_RANK = 1024

_FACTOR = re.compile(r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?\.weight")
_LYCORIS = re.compile(r"(.+)\.(lokr_w[12](?:_[ab])?|hada_w[12]_[ab])")
_DOWN = ("lora_A", "lora_down", "lora.down")

DIALECTS = {
    "base_model.model.": "PEFT",
    "lora_unet_": "kohya or musubi-tuner",
    "lycoris_": "LyCORIS",
    "transformer.": "diffusers",
    "diffusion_model.": "ai-toolkit or ComfyUI",
}
"""Prefix of every key -> the program that writes it."""

_TARGET = re.compile(
    r"(?:layers|noise_refiner|context_refiner)_\d{1,3}_"
    r"(?:attention_(?:to_[qkv]|to_out_0|qkv|out)|feed_forward_w[123]|adaLN_modulation_0)"
    r"|(?:all_)?x_embedder(?:_2-1)?|(?:all_)?final_layer(?:_2-1)?_(?:linear|adaLN_modulation_1)"
    r"|cap_embedder_1|t_embedder_mlp_[02]"
)
"""Names of the S3-DiT's modules with '_' for '.', as kohya's programs write them."""


def identify_lora(shapes: Mapping[str, Shape]) -> ModelCard | None:
    """Card of a LoRA, LoKr or LoHa file; None for any other.

    Args:
        shapes: Tensor name -> shape.
    """
    factors: dict[str, dict[str, Shape]] = {}
    lycoris = set()
    for name, shape in shapes.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})["down" if match[2] in _DOWN else "up"] = shape
        elif match := _LYCORIS.fullmatch(name):
            lycoris.add(match[1])
    targets = [*factors, *sorted(lycoris)]
    if not targets:
        return None
    prefix, dialect = next(
        (row for row in DIALECTS.items() if targets[0].startswith(row[0])), ("", "bare names")
    )
    known = [target for target in targets if _TARGET.fullmatch(_module_key(target))]
    ranks = sorted({pair["down"][0] for pair in factors.values() if pair.get("down")})
    label = "LoKr or LoHa"
    if ranks:
        label = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    title = f"a LoRA for another model ({label})"
    if known:
        title = f"a LoRA for Z-Image ({label}, {len(targets)} layers)"
    return ModelCard(
        "lora",
        "z-image" if known else "",
        title,
        variant="LyCORIS" if lycoris else "LoRA",
        layout=dialect,
        prefix=prefix,
        problem=_lora_problem(factors, targets, known),
        needs=COMPONENTS,
    )


def _module_key(target: str) -> str:
    for prefix in (*DIALECTS, "model."):
        target = target.removeprefix(prefix)
    return target.replace(".", "_")


def _lora_problem(factors: dict[str, dict[str, Shape]], targets: list[str], known: list[str]) -> str:
    for target, pair in factors.items():
        shown = printable(target, 100)
        if len(pair) != 2:
            absent = "up (lora_B)" if "down" in pair else "down (lora_A)"
            return f"the factor {absent} of {shown!r} is missing, so the pair is incomplete"
        if any(len(shape) != 2 for shape in pair.values()):
            return f"a factor of {shown!r} does not have 2 dimensions"
        if pair["down"][0] != pair["up"][1]:
            return f"ranks of {shown!r} mismatch: {pair['down'][0]} and {pair['up'][1]}"
        if not 0 < pair["down"][0] <= MAX_LORA_RANK:
            return f"{shown!r} has rank {pair['down'][0]}, wanted 1 to {MAX_LORA_RANK}"
    if len(known) != len(targets):
        strangers = sorted(set(targets) - set(known))
        listed = ", ".join(printable(name, 60) for name in strangers[:5])
        return f"{len(strangers)} unknown targets that a Z-Image transformer lacks: {listed}"
    return ""


def identify_controlnet(shapes: Mapping[str, Shape]) -> ModelCard | None:
    """Card of a Z-Image ControlNet (Fun-Controlnet-Union and relatives); None for any other file.

    Args:
        shapes: Tensor name -> shape.
    """
    embedder = next((n for n in shapes if n.endswith("control_all_x_embedder.2-1.weight")), None)
    if embedder is None:
        return None
    prefix = embedder.removesuffix("control_all_x_embedder.2-1.weight")
    inside = [name[len(prefix) :] for name in shapes if name.startswith(prefix)]
    layers = count_layers(inside, "control_layers")
    width = shapes[embedder][1] // 4 if len(shapes[embedder]) == 2 else 0
    refined = any(name.startswith("control_noise_refiner.0.before_proj.") for name in inside)
    # A 2.0 file may hold zero-filled refiner projections; the header alone cannot tell it from 2.1.
    variant = "1.0" if width == 16 else ("2.1" if refined else "2.0") + (" lite" if layers < 6 else "")
    title = f"a Z-Image ControlNet ({variant}, {layers} control layers, {width} control channels)"
    return ModelCard(
        "controlnet", "z-image", title, variant=variant, layout="split", prefix=prefix, needs=COMPONENTS
    )

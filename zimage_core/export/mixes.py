"""The standard mixes as recipes: the types of the published GGUF files.

Transformers follow the image branch of ComfyUI-GGUF's patched llama-quantize (tools/lcpp.patch). It treats
all layers alike: qkv and the output of the feed-forward network get more bits. This gives the sizes of the
published files to three digits: Q3_K_M 4.12, Q4_K_M 4.98, Q5_K_M 5.52 GB. It refuses IQ types; here their
higher types are those of llama.cpp's language models.

Text encoders follow llama.cpp (src/llama-quant.cpp, llama_tensor_get_type_impl) for a model with four or more
query heads per key head, such as Qwen3-4B. If llama-quantize's types depend on whether there is an importance
matrix, those without one are used, so that a mix does not depend on the calibration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from zimage_core.errors import BadArgument, printable
from zimage_core.export.recipes import SOURCE, Recipe, Rule

Bumps = tuple[tuple[str, str, str], ...]
"""(part of a block, layers, type): parts that get a higher type than the base; the first match decides."""

KEPT = (
    "t_embedder.*", "x_embedder.*", "final_layer.*", "cap_embedder.*", "context_refiner.*",
    "noise_refiner.*", "siglip_*", "*_pad_token",
)  # fmt: skip
"""Tensors of a transformer that keep the source's float type: they have few weights and much effect."""

KEPT_OF_TOWER = ("v.patch_embd.*", "v.position_embd.*")
"""Tensors of a vision tower that do so."""

TRANSFORMER_PARTS = {
    "qkv": "layers.*.attention.qkv.weight",
    "out": "layers.*.attention.out.weight",
    "down": "layers.*.feed_forward.w2.weight",
}
TEXT_PARTS = {
    "v": "blk.*.attn_v.weight",
    "q": "blk.*.attn_q.weight",
    "k": "blk.*.attn_k.weight",
    "out": "blk.*.attn_output.weight",
    "down": "blk.*.ffn_down.weight",
    "gate": "blk.*.ffn_gate.weight",
    "up": "blk.*.ffn_up.weight",
}


@dataclass(frozen=True)
class Mix:
    """A standard mix.

    Args:
        file_type: llama.cpp's LLAMA_FTYPE number; None if it has none.
        base: Type of all matrices without a rule of their own.
        transformer: Higher types in a transformer.
        text: Higher types in a text encoder.
        output: Type of a text encoder's output matrix, or of the embedding that is used for it (tied).
        embedding: Type of an embedding that is not tied; "" for the base.
    """

    file_type: int | None
    base: str
    transformer: Bumps = ()
    text: Bumps = ()
    output: str = "Q6_K"
    embedding: str = ""


def _low_bits(down: str, out: str = "") -> Bumps:
    """Higher types in the mixes of one and two bits."""
    return (("down", "first 1/8", down), *((("out", "", out),) if out else ()))


_V = ("v", "", "Q4_K")

_LOW = {"output": "Q5_K", "embedding": "Q2_K"}
_SMALL = {"output": "Q5_K", "embedding": "IQ3_S"}
_ENDS = tuple((part, ends, "IQ3_S") for part in ("gate", "up") for ends in ("first 1/8", "last 1/8"))

# fmt: off
MIXES: dict[str, Mix] = {
    "F32": Mix(0, "F32", output="F32"),
    "F16": Mix(1, "F16", output="F16"),
    "BF16": Mix(32, "BF16", output="BF16"),
    "Q8_0": Mix(7, "Q8_0", output="Q8_0"),
    "Q6_K": Mix(18, "Q6_K"),
    "Q5_K_M": Mix(17, "Q5_K", (("qkv", "", "Q6_K"), ("down", "", "Q6_K")),
                  (("v", "spread", "Q6_K"), ("down", "spread", "Q6_K"))),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_1": Mix(9, "Q5_1"),
    "Q5_0": Mix(8, "Q5_0", (("down", "", "Q5_1"),)),
    "Q4_K_M": Mix(15, "Q4_K", (("qkv", "", "Q5_K"), ("down", "", "Q6_K")),
                  (("v", "spread", "Q6_K"), ("down", "spread", "Q6_K"))),
    "Q4_K_S": Mix(14, "Q4_K", (("down", "", "Q5_K"),),
                  (("v", "0-3", "Q5_K"), ("down", "first 1/8", "Q5_K"))),
    "Q4_1": Mix(3, "Q4_1"),
    "Q4_0": Mix(2, "Q4_0", (("down", "", "Q4_1"),)),
    "IQ4_NL": Mix(25, "IQ4_NL", (("down", "first 1/8", "Q5_K"),),
                  (("v", "", "Q5_K"), ("down", "first 1/8", "Q5_K"))),
    "IQ4_XS": Mix(30, "IQ4_XS", (("down", "first 1/8", "Q5_K"),),
                  (("v", "", "Q5_K"), ("down", "first 1/8", "Q5_K"))),
    "Q3_K_L": Mix(13, "Q3_K", (("qkv", "", "Q4_K"), ("down", "", "Q5_K")),
                  (("v", "", "Q5_K"), ("down", "", "Q5_K"), ("out", "", "Q5_K"))),
    "Q3_K_M": Mix(12, "Q3_K", (("qkv", "", "Q4_K"), ("down", "", "Q4_K")),
                  (("v", "0-1", "Q5_K"), ("v", "", "Q4_K"), ("down", "first 1/16", "Q5_K"),
                   ("down", "", "Q4_K"), ("out", "", "Q4_K"))),
    "Q3_K_S": Mix(11, "Q3_K"),
    "IQ3_M": Mix(27, "IQ3_S", (("qkv", "", "Q4_K"), ("out", "", "Q4_K"), ("down", "first 1/8", "Q4_K")),
                 (("v", "", "Q4_K"), ("out", "", "Q4_K"), ("down", "first 1/8", "Q4_K"))),
    "IQ3_S": Mix(26, "IQ3_S", (), (("v", "", "Q4_K"),)),
    "IQ3_XS": Mix(22, "IQ3_S", (),
                  (("v", "", "Q4_K"), ("q", "", "IQ3_XXS"), ("k", "", "IQ3_XXS"), *_ENDS,
                   ("gate", "", "IQ3_XXS"), ("up", "", "IQ3_XXS"))),
    "IQ3_XXS": Mix(23, "IQ3_XXS", (("out", "", "IQ3_S"), ("down", "first 1/8", "Q4_K"), ("down", "", "Q3_K")),
                   (("v", "", "Q4_K"), ("q", "", "IQ2_S"), ("k", "", "IQ2_S"), ("out", "", "IQ3_S"),
                    ("down", "first 1/8", "Q4_K"), ("down", "", "Q3_K")), **_SMALL),
    "Q2_K": Mix(10, "Q2_K", (), (("v", "", "Q4_K"), ("down", "", "Q3_K"), ("out", "", "Q3_K"))),
    "IQ2_M": Mix(29, "IQ2_S", _low_bits("IQ3_S", "IQ3_S"), (_V, *_low_bits("IQ3_S", "IQ3_S")), **_SMALL),
    "IQ2_S": Mix(28, "IQ2_XS", _low_bits("IQ3_S", "IQ3_S"), (_V, *_low_bits("IQ3_S", "IQ3_S")), **_SMALL),
    "IQ2_XS": Mix(20, "IQ2_XS", _low_bits("Q2_K"), (_V, *_low_bits("Q2_K")), **_LOW),
    "IQ2_XXS": Mix(19, "IQ2_XXS", _low_bits("Q2_K"), (_V, *_low_bits("Q2_K")), **_LOW),
    "IQ1_M": Mix(31, "IQ1_M", _low_bits("Q2_K", "IQ2_XXS"), (_V, *_low_bits("Q2_K", "IQ2_XXS")), **_LOW),
    "IQ1_S": Mix(24, "IQ1_S", _low_bits("Q2_K", "IQ2_XXS"), (_V, *_low_bits("Q2_K", "IQ2_XXS")), **_LOW),
    "TQ2_0": Mix(37, "TQ2_0", embedding="Q4_K"),
    "TQ1_0": Mix(36, "TQ1_0", embedding="Q4_K"),
    "MXFP4": Mix(38, "MXFP4", output="Q8_0"),
    "NVFP4": Mix(39, "NVFP4", output="Q8_0"),
    "Q2_0": Mix(41, "Q2_0"),
    "Q1_0": Mix(40, "Q1_0"),
}
# fmt: on
"""Name -> mix, best quality first."""

INT8 = {"INT8_CONVROT": True, "INT8_ROW": False}
"""Types of int8 rows, which are written as safetensors (export/int8_file.py) -> whether rows are rotated."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Other names of mixes; as in llama-quantize, a bare K type means its M mix."""


def mix_name(name: str) -> str:
    """The name of a standard mix as `MIXES` has it, from one in any case or another name of it.

    Raises:
        BadArgument: There is no such mix; the message lists the names.
    """
    key = ALIASES.get(name.upper(), name.upper())
    if key not in MIXES:
        raise BadArgument(f"unknown type {printable(name, 40)!r}; known are {', '.join((*MIXES, *INT8))}")
    return key


def standard_mix(name: str, component: str, names: Mapping[str, object]) -> Recipe:
    """The recipe of a standard mix for one network.

    Args:
        name: Name of the mix, such as "Q4_K_M", in upper or lower case.
        component: "transformer", "text_encoder" or "siglip".
        names: Names of the tensors in the GGUF; embeddings get another type if there is no output matrix.

    Raises:
        BadArgument: There is no mix of that name; the message lists the names.
    """
    key = mix_name(name)
    mix = MIXES[key]
    if component == "transformer":
        rules = [*(Rule(pattern, SOURCE) for pattern in KEPT), *_bumps(mix.transformer, TRANSFORMER_PARTS)]
    elif component == "siglip":
        rules = [Rule(pattern, SOURCE) for pattern in KEPT_OF_TOWER]
    else:
        tied = "output.weight" not in names
        embedding = mix.output if tied else mix.embedding or mix.base
        rules = [Rule("output.weight", mix.output), Rule("token_embd.weight", embedding)]
        rules += _bumps(mix.text, TEXT_PARTS)
    network = "vision tower" if component == "siglip" else component.replace("_", " ")
    remarks = (f"{key}, the standard mix for a {network}",)
    return Recipe(key, (*rules, Rule("*", mix.base)), remarks, mix.file_type)


def _bumps(bumps: Bumps, parts: Mapping[str, str]) -> list[Rule]:
    return [Rule(parts[part], fmt, layers) for part, layers, fmt in bumps]


def refuse_idle_rules(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse a recipe of the user with a rule for tensors that the model does not have.

    Rules of the standard mixes may be in it: they name parts that only some models have.

    Raises:
        BadArgument: The message has the rule.
    """
    usual = {
        *KEPT,
        *KEPT_OF_TOWER,
        *TRANSFORMER_PARTS.values(),
        *TEXT_PARTS.values(),
        "output.weight",
        "token_embd.weight",
    }
    matching = [rule for rule in recipe.rules if any(_may_apply(rule, name) for name in names)]
    of_this_model = any(rule.pattern != "*" for rule in matching)
    for rule in recipe.rules:
        if rule not in matching and (rule.pattern not in usual or not of_this_model):
            raise BadArgument(
                f"the recipe {printable(recipe.name, 60)!r} has the rule `{printable(str(rule), 120)}`, but "
                f"there is no such tensor among {len(names)}, {printable(names[0], 120)} for instance"
            )


def _may_apply(rule: Rule, name: str) -> bool:
    """Whether a rule names a tensor; `first 1/8` and its like, which few layers may not fill, name all."""
    return rule.applies(name, 0) if rule.layers[:1].isdigit() else fnmatchcase(name, rule.pattern)

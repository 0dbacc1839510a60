"""Recognise adapters (LoRA and its kin, differences of fine-tunes) by their tensor names.

Sources: the key patterns of diffusers/PEFT, ai-toolkit, kohya/musubi, OneTrainer, LyCORIS, ComfyUI and
llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from zimage_core.errors import printable
from zimage_core.weights.card import ModelCard
from zimage_core.weights.infer import Shape

MAX_LORA_RANK = 1024
APPLIED = "to use it: pipe.load_lora(path, weight=1.0), or zimage generate ... --lora FILE[:WEIGHT]"

_FACTOR = (
    r"(.+?)[._](lora_[ABab]|lora_embedding_[AB]|lora_(?:down|up)|lora(?:_linear_layer)?\.(?:down|up))"
    r"(?:\.[\w-]{1,64})??(?:\.weight)?"
)
_DOWN = ("A", "a", "down")
_KINDS = (
    ("a LoKr adapter", r"lokr_(?:w[12](?:_[ab])?|t[12])"),
    ("a LoHa adapter", r"hada_(?:w[12]_[ab]|t[12])"),
    ("a BOFT adapter", r"boft_[RPs]|boft_blocks"),
    ("an OFT adapter", r"oft_(?:blocks|diag|R|r|s)"),
    ("an IA3 adapter", r"ia3_l|on_input"),
    ("a VeRA adapter", r"vera_(?:lambda_[bd]|[AB])"),
    ("full differences of a fine-tune", r"diff(?:_[bm])?"),
    ("weights that a fine-tune sets", r"set_weight"),
    ("differences of norms", r"[wb]_norm"),
)
"""Noun phrase of a kind -> the last piece of its tensors' names, before the name of a PEFT adapter."""
_LEAF = rf"(.+)\.(?:{'|'.join(f'({leaf})' for _, leaf in _KINDS)})(?:\.[\w-]{{1,64}})??(?:\.weight)?"
_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_DORA = r"(.+)[._](?:dora_scale|lora_magnitude_vector)(?:\.[\w-]{1,64})??(?:\.weight)?"
_BESIDE = r"(.+)[._](alpha|scale|scalar|rank|rescale|bias|reshape_weight|lora_mid\.weight|lora\.mid\.weight)"
"""Tensors that adapters have beside those of a kind, and that other files may have as well."""

DIALECTS = {
    "base_model.model.": "PEFT",
    "lora_unet_": "kohya or musubi-tuner",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
    "transformer.": "diffusers",
    "diffusion_model.": "ai-toolkit or ComfyUI",
    "model.diffusion_model.": "ComfyUI's checkpoints",
}
"""Prefix of every key -> the program that writes it. Any other prefix will do as well."""

_TARGET = (
    r"(?:(?<=_)|^)(?<!control_)(?:"
    r"(?:layers|noise_refiner|context_refiner|siglip_refiner)_\d{1,3}_"
    r"(?:attention_(?:processor_)?(?:to_[qkv]|to_out_0|to_out|qkv|out|norm_[qk]|[qk]_norm)|attention_norm[12]|ffn_norm[12]"
    r"|feed_forward_w[123]|adaLN_modulation_[01])"
    r"|(?:all_)?x_embedder(?:_2_1)?|(?:all_)?final_layer(?:_2_1)?_(?:linear|adaLN_modulation_1)"
    r"|(?:cap|siglip)_embedder_[01]|t_embedder_mlp_[02]|(?:x|cap|siglip)_pad_token"
    r")(?:_weight|_bias)?$"
)
"""Names of the S3-DiT's modules with '_' for '.' and '-', as kohya's programs write them."""

_LANGUAGE = (
    r"(?<!text_model_encoder_)(?<![a-z]_encoder_)layers_\d{1,3}_"
    r"(?:self_attn_(?:[qkvo]_proj|[qk]_norm)|mlp_(?:gate|up|down)_proj|input_layernorm|post_attention_layernorm)"
    r"(?:_weight)?$"
    r"|(?:(?<=_)|^)blk_\d{1,3}_(?:attn_(?:[qkv]|output)|ffn_(?:gate|up|down))(?:_weight)?$"
)
"""Names of the modules of Qwen3 and its relatives."""


def identify_adapter(shapes: Mapping[str, Shape]) -> ModelCard | None:
    """Card of a file that changes a model: LoRA and its kin, or differences; None for any other.

    Args:
        shapes: Tensor name -> shape.
    """
    factors, kinds, others = _taken_apart(shapes)
    if 2 * others > len(shapes) or not (factors or kinds):
        return None  # a model that holds a few such tensors is a model
    targets = list(dict.fromkeys([*factors, *(target for each in kinds.values() for target in each)]))
    known = [target for target in targets if re.search(_TARGET, _flat(target))]
    language = [target for target in targets if re.search(_LANGUAGE, _flat(target))]
    ours = bool(known) and 2 * len(known) >= len(targets) - len(language)
    details = [_ranks(factors)] if factors else []
    if ours:
        details.append(f"{len(known)} layer{'s' if len(known) > 1 else ''}")
    if language:
        details.append(f"{len(language)} of {'the text encoder' if known else 'its layers'}")
    whose = "Z-Image" if ours else "another model"
    if not known and 2 * len(language) >= len(targets):
        whose = "a text encoder or language model"
    prefix, dialect = _dialect((known or language or targets)[0])
    names = [*(["a LoRA"] if factors else []), *kinds]
    title = f"{' and '.join(names)} for {whose}" + (f" ({', '.join(details)})" if details else "")
    low_rank = bool(factors or {"a LoKr adapter", "a LoHa adapter"} & kinds.keys())
    return ModelCard(
        "lora" if low_rank else "adapter",
        "z-image" if ours else "",
        title,
        variant="LoRA" if factors else "LyCORIS" if low_rank else "",
        layout=dialect,
        prefix=prefix,
        problem=_lora_problem(factors)
        or ("" if known or language else "none of its layers is one of Z-Image or its text encoder"),
        notes=(*((APPLIED,) if known or language else ()), *_strangers(targets, known, language)),
    )


def split_name(name: str) -> tuple[str, str] | None:
    """Name of an adapter's tensor -> name of the layer it changes as written, and which tensor it is.

    Args:
        name: "lora_unet_layers_0_attention_to_q.lora_down.weight", for example.

    Returns:
        The layer, and one of "down", "up", "dora", "alpha", "scalar", "lora_mid", or the kind's own name of a
        tensor such as "lokr_w1" or "diff_b"; None for a name that no adapter has.
    """
    if name.endswith((".lora_A.bias", ".lora_B.bias")):
        return name[: -len(".lora_B.bias")], "bias"
    if match := re.fullmatch(_FACTOR, name):
        return match[1], "down" if match[2].endswith(_DOWN) else "up"
    if match := re.fullmatch(_LEAF, name):
        return match[1], next(leaf for leaf in match.groups()[1:] if leaf is not None)
    if match := re.fullmatch(_DORA, name):
        return match[1], "dora"
    if match := re.fullmatch(_BESIDE, name):
        return match[1], match[2].removesuffix(".weight").replace(".", "_")
    return None


_Factors = dict[str, dict[str, Shape]]


def _taken_apart(shapes: Mapping[str, Shape]) -> tuple[_Factors, dict[str, list[str]], int]:
    """Factors of LoRAs, targets of each other kind of adapter, and the number of tensors that are neither."""
    factors: _Factors = {}
    kinds: dict[str, list[str]] = {}
    others = 0
    for name, shape in shapes.items():
        if match := re.fullmatch(_FACTOR, name):
            factors.setdefault(match[1], {})["down" if match[2].endswith(_DOWN) else "up"] = shape
        elif match := re.fullmatch(_LEAF, name):
            kind = _KINDS[(match.lastindex or 0) - 2][0]
            kind = "a BOFT adapter" if kind == "an OFT adapter" and len(shape) == 4 else kind
            kinds.setdefault(kind, []).append(match[1])
        elif (stem := name.rpartition(".")[0].rpartition(".")[0]) and _is_glora(stem, shapes):
            kinds.setdefault("a GLoRA adapter", []).append(stem)
        elif match := re.fullmatch(_DORA, name):
            kinds.setdefault("its DoRA magnitudes", []).append(match[1])
        else:
            others += re.fullmatch(_BESIDE, name) is None
    return factors, kinds, others


def is_down(name: str) -> bool:
    """Whether a tensor is the first low-rank factor of a layer, the one that multiplies x."""
    match = re.fullmatch(_FACTOR, name)
    return match is not None and match[2].endswith(_DOWN)


def _is_glora(stem: str, names: Iterable[str]) -> bool:
    return all(f"{stem}.{leaf}" in names for leaf in _GLORA)


def _flat(target: str) -> str:
    return target.replace(".", "_").replace("-", "_")


def _ranks(factors: _Factors) -> str:
    ranks = sorted({pair["down"][0] for pair in factors.values() if pair.get("down")})
    if not ranks:
        return "of unknown rank"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _dialect(target: str) -> tuple[str, str]:
    """Prefix of the targets' names and the program that writes such names."""
    module = re.search(_TARGET, _flat(target)) or re.search(_LANGUAGE, _flat(target))
    known = max((each for each in DIALECTS if target.startswith(each)), key=len, default="")
    prefix = target[: module.start()] if module else known
    if prefix and not known:
        return prefix, f"names with the prefix {printable(prefix, 60)!r}"
    return prefix or known, DIALECTS.get(known, "bare names")


def _strangers(targets: list[str], known: list[str], language: list[str]) -> tuple[str, ...]:
    """A remark on layers that neither Z-Image nor its text encoder has."""
    found = sorted(set(targets) - set(known) - set(language)) if known or language else []
    listed = ", ".join(printable(name, 60) for name in found[:5])
    return (f"{len(found)} layers that Z-Image lacks are not used: {listed}",) if found else ()


def _lora_problem(factors: _Factors) -> str:
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
    return ""

"""Identify a model file by its tensors and metadata, never by its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zimage_core.config import (
    COMPONENTS,
    AutoencoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VisionConfig,
)
from zimage_core.errors import BadWeights, printable
from zimage_core.weights import adapters, controlnets, documents, infer, names, siglip, storage
from zimage_core.weights.card import ModelCard, check_compatible, require, text_encoder_name
from zimage_core.weights.lookalikes import recognise
from zimage_core.weights.packings import style_of

if TYPE_CHECKING:
    from zimage_core.weights.source import WeightFile

__all__ = ["ModelCard", "check_compatible", "identify", "require"]

Shapes = Mapping[str, infer.Shape]

TRANSFORMER_ANCHORS = (
    "x_pad_token",
    "cap_pad_token",
    "cap_embedder.0.weight",
    "cap_embedder.1.weight",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.weight",
    "layers.0.adaLN_modulation.0.weight",
    "layers.0.attention_norm1.weight",
    "layers.0.feed_forward.w1.weight",
    "noise_refiner.0.adaLN_modulation.0.weight",
    "context_refiner.0.attention_norm1.weight",
)
TEXT_ANCHORS = {
    "hf": (
        "embed_tokens.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
    ),
    "gguf": (
        "token_embd.weight",
        "blk.0.attn_q.weight",
        "blk.0.ffn_gate.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
    ),
}
VAE_ANCHORS = {
    "bfl": (
        "encoder.down.0.block.0.conv1.weight",
        "encoder.mid.block_1.conv1.weight",
        "decoder.mid.attn_1.q.weight",
    ),
    "diffusers": (
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "encoder.mid_block.resnets.0.conv1.weight",
        "decoder.mid_block.attentions.0.to_q.weight",
    ),
}
ENOUGH_ANCHORS = {"transformer": 5, "text_encoder": 3, "vae": 2, "siglip": siglip.ENOUGH}
"""Number of anchors from which on a file counts as that network, even if it turns out to be damaged."""

DROPPED = {
    "transformer": ("norm_final.weight",),
    "text_encoder": ("norm.", "output_norm.", "lm_head.", "output."),
    "vae": (),
}
"""Tensors that files hold and the networks never use; for the text encoder, prefixes of their names."""

QUANT_CONVS = ("quant_conv.weight", "post_quant_conv.weight")
"""Tensors of every VAE but FLUX.1's; in FLUX.2's VAE these lie inside the encoder and the decoder."""

FOREIGN_PREFIXES = (
    "model_ema.",
    "logvar",
    "model_sampling.",
    "denoiser.",
    "text_encoders.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "clip_vision.",
    "vae_approx.",
)
"""Name prefixes of the other parts of an all-in-one checkpoint, which are ignored."""

GLOBAL_TENSORS = ("scaled_fp8", "spiece_model", "tekken_model", "tokenizer_json")
"""Flags and tokenizers that ComfyUI stores as tensors."""


def find_prefix(all_names: Iterable[str], anchors: tuple[str, ...]) -> tuple[str, int]:
    """The prefix that most anchors have in the file (the shortest among equals), and the number of those."""
    hits: Counter[str] = Counter()
    for name in all_names:
        if name.endswith(anchors):
            for anchor in anchors:
                head = name.removesuffix(anchor)
                if head != name and (not head or head.endswith(".")):
                    hits[head] += 1
    if not hits:
        return "", 0
    return min(hits.items(), key=lambda item: (-item[1], len(item[0]), item[0]))


def identify(file: WeightFile, wanted: str = "", stated: Mapping[str, Any] | None = None) -> ModelCard:
    """Find out what the file is; never raises for a file that could be opened.

    Args:
        file: An open GGUF or safetensors file. Of its data only ComfyUI's short comfy_quant texts are read,
            and of a ControlNet the projections that tell its variant.
        wanted: Component to look for first in a file that holds several.
        stated: Parsed config.json from beside the file; it must agree with the tensors.
    """
    try:
        card = _identify(file, wanted, stated)
    except BadWeights as error:
        return ModelCard("unknown", "", f"a file of {len(file.tensors)} tensors", problem=str(error))
    return replace(card, notes=card.notes + file.notes, cautions=card.cautions + file.cautions)


def _identify(file: WeightFile, wanted: str, stated: Mapping[str, Any] | None) -> ModelCard:
    metadata = infer.values(file.metadata)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    cards = {
        kind: card
        for kind, detect in _DETECTORS.items()
        if (card := detect(shapes, metadata, stated if wanted == kind else None)) is not None
    }
    real = {kind: card for kind, card in cards.items() if card.kind == kind}
    own = real.get(wanted) or (None if wanted in _DETECTORS else next(iter(real.values()), None))
    tower = cards.get("siglip")
    # in a file with several components each is judged by its own tensors, whatever else is there
    if own is not None and (own.sound or any(card.sound for card in real.values() if card is not own)):
        found = _with_companions(own, cards)
    elif tower is not None and (tower.kind == "siglip" or tower.layout == "mmproj") and len(cards) == 1:
        found = _with_companions(tower, cards)  # a look-alike has fewer of its tensors
    else:
        found = _adapter_or_lookalike(file, shapes, metadata) or (
            _with_companions(cards.get(wanted) or next(iter(cards.values())), cards)
            if cards
            else _part_or_unknown(shapes, metadata)
        )
    if found.kind == "unknown" and (style := style_of(shapes)):
        return replace(
            found, title=f"{found.title}, quantised by {style}", problem=storage.storage_problem(file)
        )
    if found.kind not in _DETECTORS:
        return found
    # a part is judged by its own tensors, whatever else lies in the file
    elsewhere = (*FOREIGN_PREFIXES, *filter(None, _other_components(found.kind, shapes)))
    problem = storage.storage_problem(file, found.prefix, elsewhere) or found.problem
    notes = storage.storage_notes(file, storage.own_tensors(file, found.prefix, elsewhere))
    return replace(found, problem=problem, notes=found.notes + notes)


def name_packing(card: ModelCard, file: WeightFile, method: str, where: str) -> ModelCard:
    """The card of a safetensors file beside which a method of quantisation is stated.

    The tensors decide: if they are those of the network and plain, the statement is left over from other
    weights, and is told. If they do not fit, the method names the reason.

    Args:
        card: What the file was identified as.
        file: The open file.
        method: Name of the method.
        where: What states it.
    """
    if card.kind not in (*_DETECTORS, "unknown"):
        return card
    plain = card if card.sound or card.kind == "unknown" else identify(file, card.kind)
    if plain.sound:
        own = storage.own_tensors(file, card.prefix)
        if where != "config.json" or any(info.format.name in storage.PACKED for info in own.values()):
            return card
        caution = f"{where} says that the weights are quantised by {method!r}, but they are plain numbers"
        return replace(card, cautions=(*card.cautions, f"{caution}, which are used as they are"))
    if not (plain.problem or plain.unexpected or plain.misshapen):
        return card
    known = plain.problem.removesuffix(f"; {storage.WAY_ROUND}").removesuffix(", which is not supported")
    detail = known.removeprefix("its weights are quantised ") if known != plain.problem else ""
    shown = f" ({detail})" if detail and method.lower() not in detail.lower() else ""
    said = f"quantised by {method!r}, as {where} says{shown}"
    title = f"{card.title}, {said}" if card.kind == "unknown" else card.title
    problem = f"its weights are {said}, which is not supported; {storage.WAY_ROUND}"
    return replace(card, title=title, problem=problem, missing=(), unexpected=(), misshapen=())


def _adapter_or_lookalike(file: WeightFile, shapes: Shapes, metadata: Mapping[str, Any]) -> ModelCard | None:
    """A LoRA, a ControlNet, or a model that Z-Image does not use; None for anything else."""
    if adapter := adapters.identify_adapter(shapes) or controlnets.identify_controlnet(file):
        return adapter
    if imatrix := documents.identify_imatrix(shapes, metadata):
        return imatrix
    joined = "\n" + "\n".join(shapes) + "\n"
    if "cap_pad_token" in joined and "layers.0.adaLN_modulation.0.weight" in joined:
        return None
    other = recognise(joined, _architecture(metadata))
    if other is None:
        return None
    title = other.title + _width_remark(other.family, shapes)
    return ModelCard("other", other.family, title, problem=f"Z-Image does not use {other.title}")


def _architecture(metadata: Mapping[str, Any]) -> str | None:
    name = metadata.get("general.architecture")
    return name if isinstance(name, str) else None


def _with_companions(card: ModelCard, cards: Mapping[str, ModelCard]) -> ModelCard:
    """The card, completed with the other components in the file and those that must come from other files."""
    present = {kind for kind, other in cards.items() if other.kind == kind}
    also = tuple(kind for kind in _DETECTORS if kind in present and kind != card.kind)
    needs = tuple(kind for kind in COMPONENTS if kind not in present and kind != card.kind)
    return replace(card, also=also, needs=needs if card.kind in _DETECTORS else ())


def _width_remark(family: str, shapes: Shapes) -> str:
    if family != "lumina2":
        return ""
    widths = [shape[0] for name, shape in shapes.items() if name.endswith("cap_embedder.0.weight") and shape]
    return f" (caption width {widths[0]}; it shares the GGUF tag 'lumina2' with Z-Image)" if widths else ""


def _under(shapes: Shapes, prefix: str) -> dict[str, infer.Shape]:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def _compare(card: ModelCard, table: names.Table, shapes: Shapes, unused: Callable[[str], bool]) -> ModelCard:
    """The card, completed with the tensors that do not fit the table; `unused` accepts names to ignore."""
    wanted = names.checkpoint_shapes(table)
    inside = _under(shapes, card.prefix)
    others = _other_components(card.kind, shapes)
    elsewhere = (*FOREIGN_PREFIXES, *filter(None, others))
    strangers: list[str] = []
    foreign: list[str] = []
    # a vision tower beside a language model makes it another model, so that is no foreign content
    in_one = card.kind != "text_encoder" or others or card.prefix.startswith("text_encoder")
    for full in shapes:
        name = full.removeprefix(card.prefix)
        ours = full.startswith(card.prefix) and (name in wanted or storage.is_companion(name, inside))
        if ours or unused(name) or full.startswith(elsewhere) or full in GLOBAL_TENSORS:
            continue
        if not in_one or full.startswith(card.prefix):
            strangers.append(full)
        elif "" not in others:  # else it belongs to the network without a prefix, which judges it
            foreign.append(full)
    if foreign:
        some = ", ".join(printable(name, 80) for name in foreign[:3]) + (", ..." if foreign[3:] else "")
        caution = f"{len(foreign)} tensors of the file belong to no part of Z-Image and are ignored: {some}"
        card = replace(card, cautions=(*card.cautions, caution))
    misshapen = tuple(
        f"{card.prefix}{name} is {inside[name]}, wanted {shape}"
        for name, shape in wanted.items()
        if name in inside and infer.squeezed(inside[name]) != infer.squeezed(shape)
    )
    missing = tuple(card.prefix + name for name in wanted if name not in inside)
    return replace(card, missing=missing, unexpected=tuple(strangers), misshapen=misshapen)


def _other_components(kind: str, shapes: Shapes) -> list[str]:
    """Prefixes of the other networks in an all-in-one checkpoint; one may be empty."""
    found = []
    for other, groups in _ANCHORS.items():
        for anchors in groups if other != kind else ():
            prefix, hits = find_prefix(shapes, anchors)
            if hits >= ENOUGH_ANCHORS[other]:
                found.append(prefix)
    return found


# --- the networks ------------------------------------------------------------------


def _transformer(
    shapes: Shapes, metadata: Mapping[str, Any], stated: Mapping[str, Any] | None
) -> ModelCard | None:
    prefix, hits = find_prefix(shapes, TRANSFORMER_ANCHORS)
    inside = _under(shapes, prefix)
    if hits < ENOUGH_ANCHORS["transformer"] or "layers.0.adaLN_modulation.1.weight" in inside:
        return None
    layout = _transformer_layout(inside)
    card = ModelCard("transformer", "z-image", "a Z-Image transformer", layout=layout, prefix=prefix)
    if any(name.startswith("dec_net.") for name in inside):
        return replace(
            card,
            family="z-image-pixel",
            title="a pixel-space Z-Image relative",
            problem="it paints pixels, not latents",
        )
    try:
        json_config = infer.parse_config(TransformerConfig.from_json, stated) if stated is not None else None
        config, cautions = infer.transformer_config(inside, metadata, layout, json_config)
    except BadWeights as error:
        return replace(card, problem=str(error))
    label = " ".join(
        str(metadata.get(key, "")) for key in ("general.name", "general.basename", "general.finetune")
    )
    variant = "omni" if config.siglip_feat_dim else "turbo" if "turbo" in label[:1000].lower() else ""
    if config.siglip_feat_dim:
        card = replace(card, notes=("an Omni checkpoint: takes reference images, too",))
    title = f"a Z-Image transformer (width {config.dim}, {config.n_layers} layers)"
    card = replace(card, title=title, variant=variant, config=config, cautions=tuple(cautions))
    return _compare(
        card, names.transformer_table(config, layout), shapes, DROPPED["transformer"].__contains__
    )


def _transformer_layout(inside: Shapes) -> str:
    if any(name.startswith("all_x_embedder.") or name.endswith(".to_q.weight") for name in inside):
        return "split"
    return "sdcpp" if any(name.endswith(".qkv.weight.1") for name in inside) else "fused"


def _text_encoder(
    shapes: Shapes, metadata: Mapping[str, Any], stated: Mapping[str, Any] | None
) -> ModelCard | None:
    layout, prefix = _best("text_encoder", shapes)
    if not layout:
        return None
    inside = _under(shapes, prefix)
    architecture = _architecture(metadata)
    family = "qwen3" if architecture is None else architecture
    card = ModelCard("text_encoder", family, "a text encoder", layout=layout, prefix=prefix)
    if layout == "gguf" and architecture is not None and architecture not in ("qwen3", "qwen2", "llama"):
        title = f"a language model of architecture {printable(architecture, 40)!r}"
        return ModelCard("other", family, title, problem="its architecture is not one of qwen3, qwen2, llama")
    try:
        json_config = infer.parse_config(TextEncoderConfig.from_json, stated) if stated is not None else None
        config, cautions = infer.text_encoder_config(inside, metadata, layout, json_config)
    except BadWeights as error:
        return replace(card, problem=str(error))
    title = f"a {text_encoder_name(config)} text encoder (width {config.hidden_size})"
    card = replace(card, family=config.arch, title=title, config=config, cautions=tuple(cautions))
    last = f"{'blk' if layout == 'gguf' else 'layers'}.{config.num_layers - 1}."

    def unused(name: str) -> bool:
        return name.startswith((last, *DROPPED["text_encoder"])) or name.endswith("rotary_emb.inv_freq")

    return _compare(card, names.text_encoder_table(config, layout), shapes, unused)


def _vae(shapes: Shapes, metadata: Mapping[str, Any], stated: Mapping[str, Any] | None) -> ModelCard | None:
    layout, prefix = _best("vae", shapes)
    if not layout:
        return None
    inside = _under(shapes, prefix)
    card = ModelCard("vae", "flux-vae", "a VAE", layout=layout, prefix=prefix)
    latent = inside.get("decoder.conv_in.weight", ())
    if any(name.removeprefix(side) in QUANT_CONVS for name in inside for side in ("encoder.", "decoder.")):
        channels = latent[1] if len(latent) == 4 else 0
        which = {4: "a Stable Diffusion 1, 2 or XL VAE", 32: "a FLUX.2 VAE"}
        title = which.get(channels, "another model's VAE")
        title += f" ({channels} latent channels, and quant_conv layers, which FLUX.1's VAE does not have)"
        return ModelCard(
            "other", "vae", title, problem="Z-Image uses FLUX.1's VAE, without quant_conv layers"
        )
    if len(latent) == 5:
        return ModelCard("other", "video-vae", "a video VAE", problem="Z-Image uses FLUX.1's VAE")
    try:
        json_config = infer.parse_config(AutoencoderConfig.from_json, stated) if stated is not None else None
        config, cautions = infer.autoencoder_config(inside, metadata, layout, json_config)
    except BadWeights as error:
        return replace(card, problem=str(error))
    title = f"a Flux-style VAE ({config.latent_channels} latent channels)"
    card = replace(card, title=title, config=config, cautions=tuple(cautions))
    return _compare(card, names.autoencoder_table(config, layout), shapes, DROPPED["vae"].__contains__)


def _siglip(
    shapes: Shapes, metadata: Mapping[str, Any], stated: Mapping[str, Any] | None
) -> ModelCard | None:
    layout, prefix = _best("siglip", shapes)
    inside = _under(shapes, prefix)
    found = siglip.find(inside, layout) if layout else None
    if found is None:
        return None
    if found.fixed:
        title = f"a SigLIP vision tower for images of one size ({found.fixed}: SigLIP 1, or 2 without NaFlex)"
        return ModelCard("other", "siglip1", title, layout=layout, problem="Omni uses SigLIP2 with NaFlex")
    card = ModelCard("siglip", "siglip2", "a SigLIP2 vision tower", layout=found.layout, prefix=prefix)
    try:
        json_config = infer.parse_config(VisionConfig.from_json, stated) if stated is not None else None
        config, cautions = siglip.vision_config(inside, metadata, found.layout, json_config)
    except BadWeights as error:
        return replace(card, problem=str(error))
    title = f"a SigLIP2 vision tower (width {config.hidden_size}, {config.num_layers} layers)"
    card = replace(card, title=title, config=config, cautions=tuple(cautions))
    unused = siglip.UNUSED

    def ignored(name: str) -> bool:
        return name.removeprefix(prefix).startswith(unused) or name.startswith(unused)

    return _compare(card, names.vision_table(config, found.layout), shapes, ignored)


_ANCHORS = {
    "transformer": (TRANSFORMER_ANCHORS,),
    "text_encoder": tuple(TEXT_ANCHORS.values()),
    "vae": tuple(VAE_ANCHORS.values()),
    "siglip": tuple(siglip.ANCHORS.values()),
}
_LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "text_encoder": TEXT_ANCHORS,
    "vae": VAE_ANCHORS,
    "siglip": siglip.ANCHORS,
}
_DETECTORS = {"transformer": _transformer, "text_encoder": _text_encoder, "vae": _vae, "siglip": _siglip}


def _best(kind: str, shapes: Shapes) -> tuple[str, str]:
    """The layout and prefix with the most anchors, or two empty strings."""
    groups = _LAYOUTS[kind]
    hits = {layout: find_prefix(shapes, anchors) for layout, anchors in groups.items()}
    layout = max(hits, key=lambda name: hits[name][1])
    prefix, count = hits[layout]
    return (layout, prefix) if count >= ENOUGH_ANCHORS[kind] else ("", "")


def _part_or_unknown(shapes: Shapes, metadata: Mapping[str, Any]) -> ModelCard:
    architecture = _architecture(metadata)
    if any(".attention_norm1." in name and "layers." in name for name in shapes):
        problem = "most of its tensors are missing: one shard of several; give the folder or the index file"
        return ModelCard("unknown", "z-image", "a part of a Z-Image transformer", problem=problem)
    if any(".self_attn.q_proj." in name for name in shapes) or any(n.startswith("blk.") for n in shapes):
        problem = "the tensors of its first layer are missing: one shard of several, or another architecture"
        what = f" of architecture {printable(architecture, 40)!r}" if architecture else ""
        return ModelCard("unknown", architecture or "", f"a part of a language model{what}", problem=problem)
    if not shapes and "tokenizer.ggml.tokens" in metadata:
        return ModelCard("tokenizer", "tokenizer", "a vocabulary without weights")
    first = ", ".join(printable(name, 60) for name in list(shapes)[:3])
    what = f"an unknown model ({len(shapes)} tensors{': ' + first if first else ''})"
    if architecture:
        what = f"a model of architecture {printable(architecture, 40)!r} ({len(shapes)} tensors)"
    return ModelCard("unknown", architecture or "", what, problem="no network of Z-Image has such tensors")

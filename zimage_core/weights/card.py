"""The result of `identify`, and the checks that refuse a wrong or damaged model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig, VisionConfig
from zimage_core.errors import BadWeights, WrongModel, printable
from zimage_core.weights.infer import Config
from zimage_core.weights.storage import WAY_ROUND

WANTED = {
    "transformer": (
        "a Z-Image transformer",
        "get a Z-Image-Turbo or Z-Image transformer as GGUF (z_image_turbo-Q4_K_M.gguf) or safetensors",
    ),
    "text_encoder": ("a Qwen3-4B text encoder", "get Qwen3-4B as GGUF (Qwen3-4B-Q4_K_M.gguf) or safetensors"),
    "vae": ("FLUX.1's VAE", "get ae.safetensors of FLUX.1 or the vae folder of a Z-Image checkpoint"),
    "siglip": (
        "a SigLIP2 (NaFlex) vision tower",
        "get the siglip folder of a Z-Image-Omni checkpoint, or google/siglip2-so400m-patch16-naflex",
    ),
}
"""Component -> (name of the model wanted, advice on what to get)."""

TEXT_ENCODERS = {
    ("qwen3", 1024, 28): "Qwen3-0.6B",
    ("qwen3", 2048, 28): "Qwen3-1.7B",
    ("qwen3", 2560, 36): "Qwen3-4B",
    ("qwen3", 4096, 36): "Qwen3-8B",
    ("qwen3", 5120, 40): "Qwen3-14B",
    ("qwen3", 5120, 64): "Qwen3-32B",
    ("qwen2", 896, 24): "Qwen2.5-0.5B",
    ("qwen2", 1536, 28): "Qwen2.5-1.5B",
    ("qwen2", 2048, 36): "Qwen2.5-3B",
    ("qwen2", 3584, 28): "Qwen2.5-7B",
    ("qwen2", 5120, 48): "Qwen2.5-14B",
    ("llama", 576, 30): "SmolLM2-135M",
    ("llama", 2048, 16): "Llama-3.2-1B",
    ("llama", 3072, 28): "Llama-3.2-3B",
    ("llama", 4096, 32): "Llama or Mistral of 7 or 8 billion parameters",
}
"""(architecture, width, layers) -> name of the model."""


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a file is, found from its tensors and metadata, never from its name.

    Args:
        kind: "transformer", "text_encoder", "vae", "siglip", "controlnet", "lora", "tokenizer", "other" (a
            model that Z-Image does not use) or "unknown".
        family: "z-image", "qwen3", "qwen2", "llama", "flux-vae", or the family of a look-alike.
        title: Noun phrase that completes the sentence "this is {title}".
        variant: Version of the model, if the tensors show it: "turbo", "omni", "2.1 lite".
        layout: Naming scheme of the tensors, one of the layouts in weights/names.py.
        prefix: Prefix of this model's tensor names in the file.
        config: Config of the network; only for the networks of Z-Image.
        notes: Remarks for the user.
        cautions: Reasons why images may differ from what is expected; loading warns of them.
        problem: Why the file cannot be used, or "".
        missing: Tensors that the network needs and the file lacks.
        unexpected: Tensors of the file that the network does not know.
        misshapen: One description for each tensor of the wrong shape.
        needs: Components that must come from other files before an image can be made.
        also: Other components of Z-Image in the same file.
    """

    kind: str
    family: str
    title: str
    variant: str = ""
    layout: str = ""
    prefix: str = ""
    config: Config | None = None
    notes: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    problem: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self)

    @property
    def sound(self) -> bool:
        """True if the file can be loaded as the model that it was identified as."""
        return not (self.problem or self.missing or self.unexpected or self.misshapen)

    def faults(self) -> str:
        """The tensors that prevent loading: a count and the first ten of each kind; "" if there are none."""
        found = []
        for label, items in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("misshapen", self.misshapen),
        ):
            if items:
                shown = ", ".join(printable(item, 120) for item in items[:10])
                found.append(f"{len(items)} {label}: {shown}{', ...' if len(items) > 10 else ''}")
        return "; ".join(found)


def require(card: ModelCard, component: str, path: str) -> None:
    """Refuse a file that is not a sound model of the component.

    Raises:
        WrongModel: The file is another model, or one that cannot be used; the message says what to get.
        BadWeights: The file is the right model, but tensors are missing, unexpected or misshapen.
    """
    name, get = WANTED[component]
    if card.kind != component:
        if card.kind in WANTED and card.sound and not _is_known_wrong_size(card.config):
            get = f"pass it as the {card.kind.replace('_', ' ')}, and for this part {get}"
        raise WrongModel(path, f"this is {card.title}, where {name} is wanted", get)
    if card.problem:
        has_advice = card.problem.endswith(WAY_ROUND)
        raise WrongModel(path, f"this is {card.title}: {card.problem}", "" if has_advice else get)
    if faults := card.faults():
        raise BadWeights(
            f"{printable(path)}: this is {card.title} with tensors that do not fit: {faults}; {get}"
        )


def _is_known_wrong_size(config: Config | None) -> bool:
    """True for a known language model that is not as wide as Qwen3-4B, so that no Z-Image uses it."""
    return isinstance(config, TextEncoderConfig) and text_encoder_name(config) in {
        name for (_, width, _), name in TEXT_ENCODERS.items() if width != 2560
    }


def text_encoder_name(config: TextEncoderConfig) -> str:
    """Name of a known language model, or its architecture."""
    return TEXT_ENCODERS.get((config.arch, config.hidden_size, config.num_layers), f"{config.arch}-type")


def check_compatible(
    transformer: TransformerConfig,
    text_encoder: TextEncoderConfig | None = None,
    vae: AutoencoderConfig | None = None,
    paths: Mapping[str, str] | None = None,
    siglip: VisionConfig | None = None,
) -> None:
    """Refuse components that do not belong together, before any of them is loaded or run.

    Args:
        transformer: The component that the others must fit.
        text_encoder: Its width must be the transformer's caption width.
        vae: Its latent channels must be the transformer's.
        paths: Component -> file, for the message.
        siglip: Its width must be the transformer's width of vision features.

    Raises:
        WrongModel: The message names the component, its width, the width wanted and the file to get.
    """
    paths = paths or {}
    if text_encoder is not None and text_encoder.hidden_size != transformer.cap_feat_dim:
        wanted = transformer.cap_feat_dim
        known = sorted(name for (_, width, _), name in TEXT_ENCODERS.items() if width == wanted)
        get = (
            "get Qwen3-4B"
            if wanted == 2560
            else f"get the text encoder it was trained with (perhaps {known[0]})"
            if (known)
            else "get the text encoder it was trained with"
        )
        raise WrongModel(
            paths.get("text_encoder", "text encoder"),
            f"this is a {text_encoder_name(text_encoder)} text encoder (width {text_encoder.hidden_size}); "
            f"the Z-Image transformer needs width {wanted}",
            get,
        )
    if vae is not None and vae.latent_channels != transformer.in_channels:
        raise WrongModel(
            paths.get("vae", "VAE"),
            f"this VAE has {vae.latent_channels} latent channels; "
            f"the Z-Image transformer needs {transformer.in_channels}",
            WANTED["vae"][1] if transformer.in_channels == 16 else "get the VAE it was trained with",
        )
    if siglip is not None:
        check_fits(siglip, transformer, paths.get("siglip", "vision tower"))


def check_fits(tower: VisionConfig, transformer: TransformerConfig, path: str = "vision tower") -> None:
    """Refuse a vision tower whose features a transformer does not take.

    Args:
        tower: Config of the tower.
        transformer: Config of the transformer.
        path: The tower's file, for the message.

    Raises:
        WrongModel: The transformer takes no vision features, or those of another width.
    """
    wanted = transformer.siglip_feat_dim
    if wanted is None:
        fault = "this is a SigLIP2 vision tower, and the transformer takes text alone"
        raise WrongModel(
            path, fault, "leave siglip= out (None), or get an Omni checkpoint as the transformer"
        )
    if tower.hidden_size != wanted:
        fault = (
            f"this SigLIP2 vision tower has width {tower.hidden_size}; the Z-Image transformer needs {wanted}"
        )
        get = WANTED["siglip"][1] if wanted == 1152 else "get the tower it was trained with"
        raise WrongModel(path, fault, get)

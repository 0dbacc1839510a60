"""Which components a pipeline has: their kinds, those that are missing, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import nn

from zimage_core.config import COMPONENTS, OPTIONAL_COMPONENTS
from zimage_core.errors import BadArgument, Unsupported, WrongModel, printable
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.sampling.schedule import FlowMatchEulerScheduler
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.card import check_compatible

KINDS: dict[str, tuple[type, str]] = {
    "transformer": (ZImageTransformer, "zimage_core.load_transformer(path)"),
    "text_encoder": (TextEncoder, "zimage_core.load_text_encoder(path)"),
    "vae": (Autoencoder, "zimage_core.load_vae(path)"),
    "scheduler": (FlowMatchEulerScheduler, "zimage_core.FlowMatchEulerScheduler(shift=...)"),
}
"""Component -> its class, and how to get one."""
(SIGLIP,) = OPTIONAL_COMPONENTS
"""The vision tower of an Omni pipeline."""

_WITHOUT = {
    "transformer": "to make images",
    "text_encoder": "to encode a prompt; or give prompt_embeds= (and negative_prompt_embeds= with guidance)",
    "tokenizer": "to encode a prompt; or give prompt_embeds= (and negative_prompt_embeds= with guidance)",
    "vae": "to decode an image; or ask for output_type='latent'",
    "scheduler": "to make images",
}


class _Folders:
    """The value of an argument that was not given, where None has a meaning of its own."""

    def __repr__(self) -> str:
        return "the folder's"


FOLDERS: Any = _Folders()
"""Default of a component of `from_pretrained`: the folder's own; None means none."""


def is_network(value: object) -> TypeGuard[nn.Module]:
    """Whether a component is given as an object rather than as a path."""
    return isinstance(value, nn.Module)


def check_kind(name: str, value: object) -> None:
    """Refuse a component that is an object of another class; None is a component that is left out.

    Raises:
        BadArgument: The message names what was given and how to get what is wanted.
    """
    if value is None:
        return
    if name == "tokenizer":
        wanted, get = "a zimage_core tokenizer", "zimage_core.load_tokenizer(path)"
        right = hasattr(value, "encode") and isinstance(getattr(value, "vocab_size", None), int)
        right = right and not _package(value).startswith(("transformers", "tokenizers"))
    elif name == SIGLIP:
        from zimage_core.models.vision_tower import VisionTower

        wanted, get = "a zimage_core VisionTower", "zimage_core.load_siglip(path)"
        right = isinstance(getattr(value, "_orig_mod", value), VisionTower)
    else:
        kind, get = KINDS[name]
        wanted, right = f"a zimage_core {kind.__name__}", isinstance(getattr(value, "_orig_mod", value), kind)
    if right:
        return
    package, shown = _package(value), printable(type(value).__name__, 60)
    if package in ("diffusers", "transformers", "tokenizers"):
        shown += f" of {package}"
    elif isinstance(value, (int, float, str)):
        shown = printable(repr(value), 60)
    raise BadArgument(f"{name}: got {shown}, wanted {wanted}; get one by {get}")


def check_kinds(components: Mapping[str, object]) -> None:
    """`check_kind` for each component by its name."""
    for name, value in components.items():
        check_kind(name, value)


def require(name: str, value: object) -> None:
    """Refuse to go on without a component.

    Raises:
        Unsupported: It is None; the message says what would do instead.
    """
    if value is None:
        what = "VAE" if name == "vae" else name.replace("_", " ")
        raise Unsupported(f"this pipeline has no {what}: {name}= is needed {_WITHOUT[name]}")


def networks(pipe: Any) -> dict[str, Any]:
    """The networks of a pipeline by name, without those that it does not have."""
    names = (*COMPONENTS, *OPTIONAL_COMPONENTS)
    return {name: network for name in names if (network := getattr(pipe, name)) is not None}


def check_components(pipe: Any, paths: Mapping[str, str]) -> None:
    """Refuse components of a pipeline that do not belong together; those that are None fit any.

    Args:
        pipe: The pipeline.
        paths: Component -> file, for the message.

    Raises:
        WrongModel: The message names the component and what is wanted.
    """
    encoder, vae = pipe.text_encoder, pipe.vae
    if pipe.transformer is not None:
        check_compatible(
            pipe.transformer.config,
            None if encoder is None else encoder.config,
            None if vae is None else vae.config,
            paths,
            None if pipe.siglip is None else pipe.siglip.config,
        )
    if encoder is not None and pipe.tokenizer is not None:
        check_tokenizer(pipe.tokenizer, encoder, paths.get("text_encoder", "text encoder"))


def check_tokenizer(tokenizer: Tokenizer, encoder: TextEncoder, path: str) -> None:
    """Refuse a tokenizer that has more tokens than the text encoder.

    Raises:
        WrongModel: The message names the text encoder by `path`.
    """
    rows = encoder.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise WrongModel(
            path,
            f"it knows {rows} tokens, the tokenizer has {tokenizer.vocab_size}",
            "give the tokenizer that belongs to it",
        )


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]

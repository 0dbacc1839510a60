"""The peers' networks beside ours: how each is built, what it is given and which values both have."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import Unsupported, printable
from zimage_core.export.configs import of_sizes
from zimage_core.parity.precision import FLOAT32
from zimage_core.parity.watching import Place
from zimage_core.weights.facts import FIELD
from zimage_core.weights.opened import Opened

LATENT = (18, 20)
"""Latents (h, w) of the image that is compared: 90 tokens, which 6 pad tokens fill up to a multiple of 32."""
PICTURE = (8, 10)
"""Latents of the image that the VAE encodes and decodes."""
CAPTION = 37
"""Tokens of the prompt: 27 pad tokens fill them up."""
TIME = 0.3
"""Time of the transformer, between noise (0) and image (1)."""

Call = Callable[[Any], Mapping[str, Tensor]]
"""Run a network on the inputs, in the default dtype; its results by name."""


@dataclass(frozen=True)
class Pair:
    """How a network of the peer and ours are compared.

    Args:
        peer: Name of the peer's class, with its version.
        build: Builds the peer's network, on the device that torch is told; it has no weights.
        mend: Computes what it keeps beside weights, which needs memory.
        places: The values that both have, in the order of the peer's run.
        call_peer: Runs the peer.
        call_ours: Runs ours.
        inputs: What both get, in words.
        width: Most numbers that a place has, for the estimate of memory.
    """

    peer: str
    build: Callable[[], nn.Module]
    mend: Callable[[Any], None]
    places: tuple[Place, ...]
    call_peer: Call
    call_ours: Call
    inputs: str
    width: int


def library(name: str, needs: str) -> Any:
    """A peer's package.

    Args:
        name: "diffusers" or "transformers".
        needs: A name that it must have.

    Raises:
        Unsupported: It is not installed, or too old.
    """
    try:
        found = import_module(name)
        getattr(found, needs)
    except ImportError as error:
        if error.name == name:
            raise Unsupported(f"{name} is not installed; pip install -U {name}") from None
        reason = printable(str(error).partition("\n")[0], 120)
        raise Unsupported(f"{name} cannot be imported ({reason}); pip install -U {name}") from None
    except (AttributeError, RuntimeError):
        version = getattr(import_module(name), "__version__", "of unknown version")
        raise Unsupported(f"{name} {version} has no {needs}; pip install -U {name}") from None
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the peers log errors only: they warn of each network that is made in another dtype."""
    with ExitStack() as stack:
        for name in ("diffusers", "transformers"):
            if name in sys.modules:
                log = import_module(f"{name}.utils.logging")
                stack.callback(log.set_verbosity, log.get_verbosity())
                log.set_verbosity_error()
        yield


def pair_of(part: str, opened: Opened) -> Pair:
    """How a component is compared."""
    made: Mapping[str, Callable[[Opened], Pair]] = {
        "transformer": _transformer, "text_encoder": _text_encoder, "vae": _autoencoder
    }  # fmt: skip
    return made[part](opened)


def drawn(seed: int, *shape: int) -> Tensor:
    """Normal numbers, the same in both precisions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FLOAT32).to(torch.get_default_dtype())


def _stated(opened: Opened) -> dict[str, Any]:
    """The config.json of the checkpoint, else one made from the sizes that its tensors show."""
    if opened.stated is not None:
        return {name: value for name, value in opened.stated.items() if name != FIELD}
    return of_sizes(opened.card.config)  # type: ignore[arg-type]  # `require` has checked the kind


def _same(_: Any) -> None:
    """Nothing is kept beside the weights."""


def _transformer(opened: Opened) -> Pair:
    diffusers = library("diffusers", "ZImageTransformer2DModel")
    config, stated = opened.card.config, _stated(opened)
    if not isinstance(config, TransformerConfig):
        raise Unsupported("the sizes of the transformer cannot be told")
    image, text = LATENT[0] * LATENT[1] // config.patch_size**2, CAPTION

    def arguments() -> tuple[list[Tensor], Tensor, list[Tensor]]:
        time = torch.tensor([TIME], dtype=FLOAT32).to(torch.get_default_dtype())
        return [drawn(1, config.in_channels, 1, *LATENT)], time, [drawn(2, text, config.cap_feat_dim)]

    def call(network: Any) -> Mapping[str, Tensor]:
        return {"output": network(*arguments(), return_dict=False)[0][0]}

    return Pair(
        peer=f"diffusers {diffusers.__version__} ZImageTransformer2DModel",
        build=lambda: diffusers.ZImageTransformer2DModel.from_config(stated),
        mend=_same,
        places=tuple(_transformer_places(config)),
        call_peer=call,
        call_ours=call,
        inputs=f"{image} image tokens and {text} caption tokens of normal numbers, time {TIME}",
        width=(image + text + 63) * config.dim,
    )


def _transformer_places(config: TransformerConfig) -> list[Place]:
    places = [Place("t_embedder", "t_embedder")]
    places.append(Place("x_embedder", f"all_x_embedder.{config.patch_key}", cut=True))
    for name, count in (
        ("noise_refiner", config.n_refiner_layers),
        ("context_refiner", config.n_refiner_layers),
        ("layers", config.n_layers),
    ):
        if name == "context_refiner":
            places.append(Place("cap_embedder", "cap_embedder.1", cut=True))
        for i in range(count):
            module = f"{name}.{i}"
            if i == 0:
                places.append(Place(f"{name}: tokens", module, "in"))
                places.append(Place(f"{name}: rotary positions", module, "rotation"))
            places.append(Place(module, module))
    return [*places, Place("final_layer", f"all_final_layer.{config.patch_key}", cut=True)]


def _text_encoder(opened: Opened) -> Pair:
    transformers = library("transformers", "AutoModel")
    config, stated = opened.card.config, _stated(opened)
    if not isinstance(config, TextEncoderConfig):
        raise Unsupported("the sizes of the text encoder cannot be told")
    layers = config.num_layers - 1
    try:
        theirs = transformers.AutoConfig.for_model(**stated)
    except (ValueError, KeyError):
        version = transformers.__version__
        raise Unsupported(
            f"transformers {version} has no {config.arch}; pip install -U transformers"
        ) from None
    theirs.num_hidden_layers = layers  # the last layer and the norm after it are not in the caption
    if getattr(theirs, "layer_types", None):
        theirs.layer_types = theirs.layer_types[:layers]

    def build() -> nn.Module:
        network: nn.Module = transformers.AutoModel.from_config(theirs)
        network.norm = nn.Identity()
        return network

    def mend(network: Any) -> None:
        network.rotary_emb = type(network.rotary_emb)(network.config)

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, config.vocab_size, (CAPTION,), generator=generator)
    return Pair(
        peer=f"transformers {transformers.__version__} {config.arch}",
        build=build,
        mend=mend,
        places=(
            Place("embed_tokens", "embed_tokens"),
            *(Place(f"layers.{i}", f"layers.{i}") for i in range(layers)),
        ),
        call_peer=lambda net: {"hidden_states[-2]": net(ids[None], use_cache=False).last_hidden_state[0]},
        call_ours=lambda net: {"hidden_states[-2]": net(ids)},
        inputs=f"{CAPTION} drawn tokens",
        width=CAPTION * config.hidden_size,
    )


def _autoencoder(opened: Opened) -> Pair:
    diffusers = library("diffusers", "AutoencoderKL")
    config, stated = opened.card.config, _stated(opened)
    if not isinstance(config, AutoencoderConfig):
        raise Unsupported("the sizes of the VAE cannot be told")
    height, width = (side * config.spatial_factor for side in PICTURE)

    def latents() -> Tensor:
        return drawn(5, 1, config.latent_channels, *PICTURE)

    def image() -> Tensor:
        return drawn(4, 1, config.in_channels, height, width).clamp(-1, 1)

    def call_peer(network: Any) -> Mapping[str, Tensor]:
        found = network.encode(image()).latent_dist
        return {
            "encode: mean": found.mean,
            "encode: log-variance": found.logvar,
            "decode": network.decode(latents()).sample,
        }

    def call_ours(network: Any) -> Mapping[str, Tensor]:
        mean, logvar = network.moments(image())
        decoded = network.decode(latents())
        return {"encode: mean": mean, "encode: log-variance": logvar, "decode": decoded}

    levels = range(len(config.block_out_channels))
    encoder = ["conv_in", *(f"down_blocks.{i}" for i in levels), "mid_block", "conv_out"]
    decoder = ["conv_in", "mid_block", *(f"up_blocks.{i}" for i in levels), "conv_out"]
    names = [f"{side}.{name}" for side, own in (("encoder", encoder), ("decoder", decoder)) for name in own]
    return Pair(
        peer=f"diffusers {diffusers.__version__} AutoencoderKL",
        build=lambda: diffusers.AutoencoderKL.from_config(stated),
        mend=_same,
        places=tuple(Place(name, name) for name in names),
        call_peer=call_peer,
        call_ours=call_ours,
        inputs=f"an image of {width} x {height} px and its latents, of normal numbers",
        width=height * width * config.block_out_channels[0],
    )


def names(places: Sequence[Place], side: str) -> list[str]:
    """Names of the places of one kind."""
    return [place.name for place in places if place.side == side]

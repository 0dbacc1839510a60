"""Sizes and constants of the three networks; the defaults are those of Z-Image, Qwen3-4B and FLUX.1's VAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from zimage_core.errors import BadArgument

COMPONENTS = ("transformer", "text_encoder", "vae")
"""The three networks of a pipeline, by the names of their folders in diffusers' layout."""

TEXT_ARCHITECTURES = ("qwen3", "qwen2", "llama")
"""Architectures of text encoders, as `general.architecture` of a GGUF and `model_type` of a config.json."""

HEAD_AXES = (32, 48, 48)
"""Rotary channels for (t, h, w) in every released Z-Image; they sum to head_dim 128."""

PAD_MULTIPLE = 32
"""Caption and image tokens are each padded to a multiple of this with learned tokens (SEQ_MULTI_OF)."""

MIN_TILE = 16
"""Side in latents of the smallest tile for decoding. Smaller tiles save nothing, because the maps of the
whole image are then far larger than a tile."""


def _positive(owner: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise BadArgument(f"{owner}: {name} is {value!r}, wanted a positive whole number")


def _field(owner: str, data: Mapping[str, Any], name: str, *default: Any) -> Any:
    """Value of a config.json; if it is absent or null, the default, or BadArgument without one."""
    if name in data and data[name] is not None:
        return data[name]
    if default:
        return default[0]
    raise BadArgument(f"{owner}: the config has no {name!r}; it is not a config of this network")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of an S3-DiT, the single-stream diffusion transformer; see arXiv 2511.22699.

    Args:
        dim: Width of the token stream.
        n_layers: Modulated blocks over the joint sequence.
        n_refiner_layers: Blocks in each of the noise and context refiners.
        n_heads: Attention heads; dim / n_heads equals sum(axes_dims).
        cap_feat_dim: Width of the text encoder's hidden states.
        hidden_dim: Inner width of the SwiGLU, int(dim / 3 * 8) in every released model.
        in_channels: Latent channels.
        patch_size: Side of a patch, in latents.
        norm_eps: Added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary frequencies.
        axes_dims: Rotary channels per axis (t, h, w).
        axes_lens: Highest position per axis, plus one.
        t_scale: Factor of the time in [0, 1] before the sinusoid.
        t_mid_dim: Inner width of the timestep MLP.
        siglip_feat_dim: Width of the vision features; only for Omni.
    """

    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    cap_feat_dim: int = 2560
    hidden_dim: int = 10240
    in_channels: int = 16
    patch_size: int = 2
    norm_eps: float = 1e-5
    rope_theta: float = 256.0
    axes_dims: tuple[int, int, int] = HEAD_AXES
    axes_lens: tuple[int, int, int] = (1536, 512, 512)
    t_scale: float = 1000.0
    t_mid_dim: int = 1024
    siglip_feat_dim: int | None = None

    def __post_init__(self) -> None:
        """BadArgument where the sizes cannot belong together."""
        me = "S3-DiT config"
        _positive(me, dim=self.dim, n_layers=self.n_layers, n_heads=self.n_heads, hidden_dim=self.hidden_dim)
        _positive(
            me, cap_feat_dim=self.cap_feat_dim, in_channels=self.in_channels, patch_size=self.patch_size
        )
        if self.dim != self.n_heads * self.head_dim or self.head_dim != sum(self.axes_dims):
            raise BadArgument(
                f"{me}: dim {self.dim} over {self.n_heads} heads is not the {sum(self.axes_dims)} channels "
                f"of axes_dims {self.axes_dims}; wanted dim = n_heads * sum(axes_dims)"
            )
        if any(d % 2 for d in self.axes_dims):
            raise BadArgument(f"{me}: axes_dims {self.axes_dims} must be even, channels rotate in pairs")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.n_heads

    @property
    def adaln_dim(self) -> int:
        """Width of the timestep embedding that feeds the adaptive norms."""
        return min(self.dim, 256)

    @property
    def max_caption(self) -> int:
        """Most tokens of a caption; positions start at 1, and the image needs one after the caption."""
        return (self.axes_lens[0] - 2) // PAD_MULTIPLE * PAD_MULTIPLE

    @property
    def patch_dim(self) -> int:
        """Numbers in one image token before embedding: patch_size^2 * in_channels."""
        return self.patch_size**2 * self.in_channels

    @property
    def patch_key(self) -> str:
        """Key of this patch size in diffusers' module names, e.g. "2-1"."""
        return f"{self.patch_size}-1"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TransformerConfig:
        """Config of diffusers' transformer/config.json; BadArgument says what is missing or not supported."""
        me = "S3-DiT config"
        get = partial(_field, me, data)
        dim = int(get("dim"))
        patches, frames = get("all_patch_size", [2]), get("all_f_patch_size", [1])
        if len(patches) != 1 or list(frames) != [1]:
            raise BadArgument(f"{me}: patch sizes {patches} x {frames}; wanted one patch size and one frame")
        heads = int(get("n_heads"))
        if int(get("n_kv_heads", heads)) != heads:
            raise BadArgument(f"{me}: n_kv_heads differs from n_heads {heads}; S3-DiT has no grouped heads")
        siglip = data.get("siglip_feat_dim")
        t, h, w = get("axes_dims", cls.axes_dims)
        lt, lh, lw = get("axes_lens", cls.axes_lens)
        return cls(
            dim=dim,
            n_layers=int(get("n_layers")),
            n_refiner_layers=int(get("n_refiner_layers", cls.n_refiner_layers)),
            n_heads=heads,
            cap_feat_dim=int(get("cap_feat_dim")),
            hidden_dim=int(dim / 3 * 8),
            in_channels=int(get("in_channels", cls.in_channels)),
            patch_size=int(patches[0]),
            norm_eps=float(get("norm_eps", cls.norm_eps)),
            rope_theta=float(get("rope_theta", cls.rope_theta)),
            axes_dims=(int(t), int(h), int(w)),
            axes_lens=(int(lt), int(lh), int(lw)),
            t_scale=float(get("t_scale", cls.t_scale)),
            siglip_feat_dim=None if siglip is None else int(siglip),
        )


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of a decoder-only language model whose second-to-last hidden state is the caption.

    Args:
        arch: One of `TEXT_ARCHITECTURES`.
        hidden_size: Width of the residual stream.
        num_layers: Layers of the checkpoint; only the first num_layers - 1 are run.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Channels of a head; num_heads * head_dim may differ from hidden_size.
        intermediate_size: Inner width of the SwiGLU.
        vocab_size: Rows of the embedding table.
        rope_theta: Base of the rotary frequencies.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        qk_norm: RMSNorm on each head of q and k before the rotation (Qwen3).
        attention_bias: Biases on q, k and v (Qwen2).
    """

    arch: str = "qwen3"
    hidden_size: int = 2560
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    vocab_size: int = 151936
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True
    attention_bias: bool = False

    def __post_init__(self) -> None:
        """BadArgument where the sizes cannot belong together."""
        me = "text encoder config"
        if self.arch not in TEXT_ARCHITECTURES:
            known = ", ".join(TEXT_ARCHITECTURES)
            raise BadArgument(f"{me}: architecture {self.arch!r} is not one of {known}")
        _positive(me, hidden_size=self.hidden_size, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads)
        _positive(
            me, head_dim=self.head_dim, intermediate_size=self.intermediate_size, vocab_size=self.vocab_size
        )
        if self.num_layers < 2:
            raise BadArgument(
                f"{me}: {self.num_layers} layers; the second-to-last hidden state needs at least 2"
            )
        if self.num_heads % self.num_kv_heads:
            raise BadArgument(
                f"{me}: {self.num_heads} heads do not divide into {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise BadArgument(f"{me}: head_dim {self.head_dim} is odd, channels rotate in pairs")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TextEncoderConfig:
        """Config of transformers' config.json; its model_type must be in `TEXT_ARCHITECTURES`."""
        me = "text encoder config"
        get = partial(_field, me, data)
        arch = str(get("model_type"))
        hidden, heads = int(get("hidden_size")), int(get("num_attention_heads"))
        scaling = data.get("rope_scaling") or data.get("rope_parameters") or {}
        theta = data.get("rope_theta")
        if isinstance(scaling, Mapping):
            if scaling.get("rope_type", scaling.get("type", "default")) != "default":
                raise BadArgument(
                    f"{me}: rope scaling {scaling!r} is not supported; the encoders of Z-Image use none"
                )
            theta = theta or scaling.get("rope_theta")
        return cls(
            arch=arch,
            hidden_size=hidden,
            num_layers=int(get("num_hidden_layers")),
            num_heads=heads,
            num_kv_heads=int(get("num_key_value_heads", heads)),
            head_dim=int(get("head_dim", hidden // heads)),
            intermediate_size=int(get("intermediate_size")),
            vocab_size=int(get("vocab_size")),
            rope_theta=float(theta or 10000.0),
            rms_norm_eps=float(get("rms_norm_eps", cls.rms_norm_eps)),
            qk_norm=arch == "qwen3",
            attention_bias=bool(get("attention_bias", arch == "qwen2")),
        )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a Flux-style VAE.

    Args:
        block_out_channels: Width of each resolution, finest first; each but the last halves the side.
        layers_per_block: Residual blocks per resolution in the encoder; the decoder has one more.
        latent_channels: Channels of a latent.
        norm_num_groups: Groups of every GroupNorm.
        scaling_factor: Latents of the transformer are (z - shift_factor) * scaling_factor.
        shift_factor: Subtracted from the latents before they are scaled.
        in_channels: Channels of the image that is encoded.
        out_channels: Channels of the image that is decoded.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    in_channels: int = 3
    out_channels: int = 3

    def __post_init__(self) -> None:
        """BadArgument where the sizes cannot belong together."""
        me = "VAE config"
        _positive(me, layers_per_block=self.layers_per_block, latent_channels=self.latent_channels)
        _positive(me, norm_num_groups=self.norm_num_groups, blocks=len(self.block_out_channels))
        for width in self.block_out_channels:
            if width <= 0 or width % self.norm_num_groups:
                raise BadArgument(
                    f"{me}: width {width} does not divide into {self.norm_num_groups} norm groups"
                )

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along one side: 8 for four resolutions."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AutoencoderConfig:
        """Config of diffusers' vae/config.json; BadArgument says what is missing or not supported."""
        me = "VAE config"
        get = partial(_field, me, data)
        if get("use_quant_conv", False) or get("use_post_quant_conv", False):
            raise BadArgument(
                f"{me}: it has quant_conv layers, so it is not a Flux-style VAE; get Flux's ae.safetensors"
            )
        return cls(
            block_out_channels=tuple(int(c) for c in get("block_out_channels")),
            layers_per_block=int(get("layers_per_block", cls.layers_per_block)),
            latent_channels=int(get("latent_channels", cls.latent_channels)),
            norm_num_groups=int(get("norm_num_groups", cls.norm_num_groups)),
            scaling_factor=float(get("scaling_factor", cls.scaling_factor)),
            shift_factor=float(get("shift_factor", cls.shift_factor)),
            in_channels=int(get("in_channels", cls.in_channels)),
            out_channels=int(get("out_channels", cls.out_channels)),
        )

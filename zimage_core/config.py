"""Sizes and constants of the networks.

The defaults are those of Z-Image, Qwen3-4B, FLUX.1's VAE and the SigLIP2 of Z-Image-Omni.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from zimage_core.errors import BadArgument
from zimage_core.fields import Fields

NATIVE_SIZE = 1024
"""Pixels a side of an image, where a transformer's file does not state another size."""
COMPONENTS = ("transformer", "text_encoder", "vae")
"""The three networks of every pipeline, by the names of their folders in diffusers' layout."""
OPTIONAL_COMPONENTS = ("siglip",)
"""Networks that a pipeline may have beside them: the vision tower of Omni."""

ONCE = ("context_refiner", "siglip_refiner")
"""Module lists of a transformer that run once for a caption, before the steps."""

TEXT_ARCHITECTURES = ("qwen3", "qwen2", "llama")
"""Architectures of text encoders, as `general.architecture` of a GGUF and `model_type` of a config.json."""

HEAD_AXES = (32, 48, 48)
"""Rotary channels for (t, h, w) in every released Z-Image; they sum to head_dim 128."""

PAD_MULTIPLE = 32
"""Caption and image tokens are each padded to a multiple of this with learned tokens (SEQ_MULTI_OF)."""

POSITIONS = ("trained", "diffusers")
"""How pieces of a caption are numbered in an Omni stream.

trained    Every row of a piece has its own number, as ComfyUI numbers them too.
diffusers  As diffusers 0.42 does: it numbers all rows of a piece, appends (0, 0, 0) for its pads once more,
           joins the pieces and cuts the end off. From the second piece on, numbers lie beside rows that are
           not theirs (huggingface/diffusers#13574). The same as "trained" for one piece, or where each but
           the last is a multiple of 32 long.
"""

MIN_TILE = 16
"""Side in latents of the smallest tile for decoding. Smaller tiles save nothing, because the maps of the
whole image are then far larger than a tile."""


def _positive(owner: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise BadArgument(f"{owner}: {name} is {value!r}, wanted a positive whole number")


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
        read = Fields("S3-DiT config", data)
        dim = read.whole("dim")
        patches = read.wholes("all_patch_size", (2,), count=1)
        if read.wholes("all_f_patch_size", (1,)) != (1,):
            read.refuse("all_f_patch_size", "[1], one frame")
        read.only("qk_norm", True)
        t, h, w = read.wholes("axes_dims", cls.axes_dims, count=3)
        lt, lh, lw = read.wholes("axes_lens", cls.axes_lens, count=3)
        return cls(  # diffusers ignores n_kv_heads: an S3-DiT has no grouped heads
            dim=dim,
            n_layers=read.whole("n_layers"),
            n_refiner_layers=read.whole("n_refiner_layers", cls.n_refiner_layers, low=0),
            n_heads=read.whole("n_heads"),
            cap_feat_dim=read.whole("cap_feat_dim"),
            hidden_dim=int(dim / 3 * 8),
            in_channels=read.whole("in_channels", cls.in_channels),
            patch_size=patches[0],
            norm_eps=read.number("norm_eps", cls.norm_eps, low=0, high=0.1),
            rope_theta=read.number("rope_theta", cls.rope_theta, low=1, high=1e9),
            axes_dims=(t, h, w),
            axes_lens=(lt, lh, lw),
            t_scale=read.number("t_scale", cls.t_scale, low=1e-3, high=1e6),
            siglip_feat_dim=read.whole("siglip_feat_dim") if read.get("siglip_feat_dim", None) else None,
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
        read = Fields("text encoder config", data)
        if (arch := read.get("model_type")) not in TEXT_ARCHITECTURES:
            read.refuse("model_type", f"one of {', '.join(TEXT_ARCHITECTURES)}")
        hidden, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
        layers = read.whole("num_hidden_layers")
        for name, allowed in _ENCODER_FIXED.items():
            read.only(name, *allowed)
        _refuse_windows(read, layers - 1)
        return cls(
            arch=arch,
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=read.whole("num_key_value_heads", heads),
            head_dim=read.whole("head_dim", max(1, hidden // heads)),
            intermediate_size=read.whole("intermediate_size"),
            vocab_size=read.whole("vocab_size"),
            rope_theta=_rotary_base(read),
            rms_norm_eps=read.number("rms_norm_eps", cls.rms_norm_eps, low=0, high=0.1),
            qk_norm=arch == "qwen3",
            # transformers' Qwen2 always has these biases, whatever its config says
            attention_bias=arch == "qwen2" or read.flag("attention_bias", False),
        )


_ENCODER_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
}
"""Field of a text encoder's config -> its values that need no other arithmetic than the library's."""


def _refuse_windows(read: Fields, layers: int) -> None:
    """Refuse attention over a window of the prompt, in one of the layers that are run."""
    kinds = read.get("layer_types", [])
    if not isinstance(kinds, (list, tuple)):
        read.refuse("layer_types", "a list of words")
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds[:layers]):
        read.refuse("layer_types", "full_attention in every layer", "; other kinds are not supported")
    # max_window_layers may leave layers out; no real encoder asks for a short window in some of them
    if not read.flag("use_sliding_window", False) and "sliding_attention" not in kinds[:layers]:
        return
    longest = TransformerConfig().max_caption
    if read.get("sliding_window", None) is None or read.whole("sliding_window") < longest:
        rest = "; attention over a part of the prompt (use_sliding_window, layer_types) is not supported"
        read.refuse("sliding_window", f"{longest} or more", rest)


def _rotary_base(read: Fields) -> float:
    """The base of the rotary frequencies; scaled ones are refused."""
    bases = (
        {read.number("rope_theta", low=1, high=1e12)} if read.get("rope_theta", None) is not None else set()
    )
    for name in ("rope_scaling", "rope_parameters"):
        found = read.get(name, {})
        if isinstance(found, Mapping) and isinstance(found.get("full_attention"), Mapping):
            found = found["full_attention"]  # transformers 5 may state them for each kind of layer
        if not isinstance(found, Mapping):
            read.refuse(name, "a table of settings")
        inner = Fields(f"{read.owner}: {name}", found)
        kind = inner.get("rope_type", inner.get("type", "default"))
        if kind != "default" or inner.get("factor", 1) != 1:
            read.refuse(name, "'default'", "; the encoders of Z-Image do not scale their rotary frequencies")
        inner.only("partial_rotary_factor", 1, 1.0)
        if inner.get("rope_theta", None) is not None:
            bases.add(inner.number("rope_theta", low=1, high=1e12))
    if len(bases) > 1:
        read.refuse("rope_theta", "one base", f", and not both {' and '.join(map(str, sorted(bases)))}")
    return bases.pop() if bases else 10000.0


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
        read = Fields("VAE config", data)
        for name in ("use_quant_conv", "use_post_quant_conv"):
            if read.flag(name, False):
                rest = "; FLUX.1's VAE has no quant_conv layers, get its ae.safetensors"
                read.refuse(name, "false", rest)
        read.only("act_fn", "silu", "swish")
        read.only("mid_block_add_attention", True)
        for name in ("latents_mean", "latents_std"):
            read.only(name)
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            blocks = read.get(name, [])
            if not isinstance(blocks, (list, tuple)) or any(block != kind for block in blocks):
                read.refuse(name, f"{kind} only", "; other blocks are not supported")
        return cls(
            block_out_channels=read.wholes("block_out_channels"),
            layers_per_block=read.whole("layers_per_block", cls.layers_per_block),
            latent_channels=read.whole("latent_channels", cls.latent_channels),
            norm_num_groups=read.whole("norm_num_groups", cls.norm_num_groups),
            scaling_factor=read.number("scaling_factor", cls.scaling_factor, low=1e-4, high=1e4),
            shift_factor=read.number("shift_factor", cls.shift_factor, low=-100, high=100),
            in_channels=read.whole("in_channels", cls.in_channels),
            out_channels=read.whole("out_channels", cls.out_channels),
        )


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a SigLIP2 vision tower (NaFlex) without its pooling head; see arXiv 2502.14786.

    Args:
        hidden_size: Width of the tokens.
        num_layers: Layers.
        num_heads: Attention heads.
        intermediate_size: Inner width of the MLP.
        patch_size: Side of a patch, in pixels.
        num_patches: Rows of the position table, a square grid, which is resized for each image.
        num_channels: Channels of an image.
        layer_norm_eps: Added to the variance in every LayerNorm.
    """

    hidden_size: int = 1152
    num_layers: int = 27
    num_heads: int = 16
    intermediate_size: int = 4304
    patch_size: int = 16
    num_patches: int = 256
    num_channels: int = 3
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        """BadArgument where the sizes cannot belong together."""
        me = "vision config"
        _positive(me, hidden_size=self.hidden_size, num_layers=self.num_layers, num_heads=self.num_heads)
        _positive(me, intermediate_size=self.intermediate_size, patch_size=self.patch_size)
        _positive(me, num_patches=self.num_patches, num_channels=self.num_channels)
        if self.hidden_size % self.num_heads:
            raise BadArgument(
                f"{me}: {self.num_heads} heads do not divide hidden_size {self.hidden_size}; "
                "wanted a multiple of the heads"
            )
        if self.grid**2 != self.num_patches:
            raise BadArgument(f"{me}: num_patches is {self.num_patches}, wanted the square of a whole number")

    @property
    def grid(self) -> int:
        """Side of the grid of the position table."""
        return isqrt(self.num_patches)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: patch_size^2 * num_channels."""
        return self.patch_size**2 * self.num_channels

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VisionConfig:
        """Config of transformers' Siglip2VisionModel, or of a Siglip2Model, whose vision_config counts.

        What a file leaves out has transformers' default. BadArgument says what is missing or not supported.
        """
        nested = data.get("vision_config")
        read = Fields("vision config", nested if isinstance(nested, Mapping) else data)
        read.only("model_type", "siglip2_vision_model")
        read.only("hidden_act", "gelu_pytorch_tanh")
        read.only("is_causal", False)
        patch = read.get("patch_size", cls.patch_size)
        sides = read.wholes("patch_size", count=2) if isinstance(patch, (list, tuple)) else ()
        if len(set(sides)) > 1:
            read.refuse("patch_size", "a square")
        return cls(
            hidden_size=read.whole("hidden_size", 768),
            num_layers=read.whole("num_hidden_layers", 12),
            num_heads=read.whole("num_attention_heads", 12),
            intermediate_size=read.whole("intermediate_size", 3072),
            patch_size=sides[0] if sides else read.whole("patch_size", cls.patch_size),
            num_patches=read.whole("num_patches", cls.num_patches),
            num_channels=read.whole("num_channels", cls.num_channels),
            layer_norm_eps=read.number("layer_norm_eps", cls.layer_norm_eps, low=0, high=0.1),
        )

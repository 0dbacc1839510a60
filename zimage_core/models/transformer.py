"""S3-DiT, the scalable single-stream diffusion transformer of Z-Image (arXiv 2511.22699).

Module names are those of diffusers' ZImageTransformer2DModel. Images run one at a time and without a mask:
pad tokens are learned and attended to, so every token sees every other, and a batch gives bit for bit the
results of its images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zimage_core.config import TransformerConfig
from zimage_core.errors import BadShape
from zimage_core.models import sequence
from zimage_core.models.block_norms import gated, norm_modulate, norm_residual, norms_rope
from zimage_core.models.block_source import RESIDENT, BlockSource
from zimage_core.models.ported import Network, check_call
from zimage_core.models.timestep import TimestepEmbedder
from zimage_core.nn.attention import attention
from zimage_core.nn.layers import RMSNorm, Rotation, rotation
from zimage_core.nn.linear import Linear, multiplies_int8, ready

QK_NORM_EPS = 1e-5
"""Epsilon of the norms on q and k; it does not depend on norm_eps."""
FINAL_NORM_EPS = 1e-6
"""Epsilon of the LayerNorm before the last projection."""

FP16_ATTENTION_SCALE = 2.0**-5
FP16_FFN_SCALE = 2.0**-7
"""Factors that keep float16 in range: it ends at 65504, but v, attention and w2 outputs reach 1e6.

Both branches end in an RMSNorm. A power of two that scales v and w3 and is passed on to that norm therefore
cancels exactly. Only float16 uses it.
"""


Predict = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Type of `ZImageTransformer.predict`, and of functions that replace it."""

After = Callable[[int, Tensor], Tensor]
"""(number of a block of the step, or -1 before the first; tokens [L, dim]) -> tokens to go on with."""


class Prepared(NamedTuple):
    """Values that the steps of a run share, computed by `ZImageTransformer.prepare`.

    Args:
        captions: Caption features as given, each [L, cap_feat_dim].
        times: Network times of the steps.
        texts: Refined captions, each [padded, dim].
        rotations: Rotation of the joint sequence of image and caption, for each caption.
        blocks: Modulations of the blocks [steps, blocks, 4 * dim] float32, noise refiner first.
        final: Modulations of the final layer [steps, dim].
    """

    captions: tuple[Tensor, ...]
    times: tuple[float, ...]
    texts: tuple[Tensor, ...]
    rotations: tuple[Rotation, ...]
    blocks: Tensor
    final: Tensor


class Attention(nn.Module):
    """Bidirectional attention with RMS-normed, rotated q and k; no biases."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.n_heads
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q = RMSNorm(config.head_dim, QK_NORM_EPS)
        self.norm_k = RMSNorm(config.head_dim, QK_NORM_EPS)

    attend: Callable[..., Tensor] | None = None
    """What is called instead of `attention`, with the same arguments: see `parallel.ulysses`."""

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The layers that read x."""
        return self.to_q, self.to_k, self.to_v

    def forward(self, x: Tensor, rope: Rotation, scale: float) -> Tensor:
        """x [..., L, dim] -> [..., L, dim], multiplied by `scale`."""
        per_head = (self.heads, -1)
        x = ready(x, *self.readers)
        q, k = self.to_q(x).unflatten(-1, per_head), self.to_k(x).unflatten(-1, per_head)
        q, k = norms_rope(self.norm_q, self.norm_k, q, k, QK_NORM_EPS, rope)
        v = self.to_v(x if scale == 1.0 else x * scale).unflatten(-1, per_head)
        attend = self.attend or attention
        out: Tensor = self.to_out[0](attend(q, k, v, in_int8=multiplies_int8(self.to_k)))
        return out


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    @property
    def readers(self) -> tuple[Linear, ...]:
        """The layers that read x."""
        return self.w1, self.w3

    def forward(self, x: Tensor, scale: float) -> Tensor:
        """x [..., L, dim] -> [..., L, dim], multiplied by `scale`."""
        x = ready(x, *self.readers)
        up = self.w3(x if scale == 1.0 else x * scale)
        out: Tensor = self.w2(gated(self.w1(x), up, self.w2))
        return out


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each between two RMSNorms and followed by a gate.

    A modulated block scales the branch inputs by 1 + s and gates the branch outputs by tanh(g),
    with (s, g) of both branches from one Linear on the timestep embedding (without SiLU before it, and
    without shift). An unmodulated block (in the context refiner) has s = 0 and an open gate.
    """

    def __init__(self, config: TransformerConfig, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(Linear(config.adaln_dim, 4 * config.dim, bias=True))
        self.modulated = modulated

    def modulation(self, temb: Tensor) -> Tensor:
        """temb [..., adaln_dim] -> s and tanh(g) of attention, then of the feed-forward.

        Returns:
            [..., 4 * dim] float32: the tanh is taken once, not for every token, and is not rounded.
        """
        scale_msa, gate_msa, scale_mlp, gate_mlp = self.adaLN_modulation(temb).float().chunk(4, dim=-1)
        return torch.cat((scale_msa, gate_msa.tanh(), scale_mlp, gate_mlp.tanh()), dim=-1)

    def forward(
        self, x: Tensor, rope: Rotation, temb: Tensor | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        """x [..., L, dim] -> [..., L, dim].

        A modulated block needs either temb [..., adaln_dim] or `modulation`, the result of
        `modulation(temb)`.
        """
        half = x.dtype == torch.float16
        attn_scale, ffn_scale = (FP16_ATTENTION_SCALE, FP16_FFN_SCALE) if half else (1.0, 1.0)
        scale_msa = gate_msa = scale_mlp = gate_mlp = None
        if modulation is None and temb is not None:
            modulation = self.modulation(temb)
        if modulation is not None:
            if modulation.ndim > 1:  # one for each member of a batch
                modulation = modulation.unsqueeze(-2)
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        a = self.attention(
            norm_modulate(self.attention_norm1, x, scale_msa, self.attention), rope, attn_scale
        )
        x = norm_residual(self.attention_norm2, x, a, gate_msa, attn_scale)
        f = self.feed_forward(norm_modulate(self.ffn_norm1, x, scale_mlp, self.feed_forward), ffn_scale)
        return norm_residual(self.ffn_norm2, x, f, gate_mlp, ffn_scale)


class FinalLayer(nn.Module):
    """LayerNorm without weights, scaled by 1 + Linear(silu(temb)), then a projection to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.patch_dim, bias=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.adaln_dim, config.dim, bias=True))

    def modulation(self, temb: Tensor) -> Tensor:
        """temb [..., adaln_dim] -> s, [..., dim]."""
        out: Tensor = self.adaLN_modulation(temb)
        return out

    def forward(self, x: Tensor, temb: Tensor | None = None, modulation: Tensor | None = None) -> Tensor:
        """x [..., L, dim] and temb [..., adaln_dim], or `modulation(temb)` -> [..., L, patch_dim]."""
        if modulation is None:
            if temb is None:
                raise BadShape("final layer: needs the timestep embedding or its modulation")
            modulation = self.modulation(temb)
        normed = nn.functional.layer_norm(x, x.shape[-1:], eps=FINAL_NORM_EPS)
        out: Tensor = self.linear(normed * (1 + modulation.unsqueeze(-2)))
        return out


class Estimates(list[Tensor]):
    """The result of `ZImageTransformer.forward`: a tensor for each image; `sample` is the list itself."""

    @property
    def sample(self) -> Estimates:
        """The list, under diffusers' name."""
        return self


class ZImageTransformer(Network):
    """S3-DiT: estimates (clean - noise) from a noisy latent, a time and a caption."""

    loader = "load_transformer"
    block_class = TransformerBlock
    sample_size: int | None = None
    """Height and width in pixels that it was trained for; None if nothing states them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        key, refiners, block = config.patch_key, range(config.n_refiner_layers), self.block_class
        self.all_x_embedder = nn.ModuleDict({key: Linear(config.patch_dim, config.dim, bias=True)})
        self.all_final_layer = nn.ModuleDict({key: FinalLayer(config)})
        self.noise_refiner = nn.ModuleList(block(config, modulated=True) for _ in refiners)
        self.context_refiner = nn.ModuleList(block(config, modulated=False) for _ in refiners)
        self.t_embedder = TimestepEmbedder(config.adaln_dim, config.t_mid_dim)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), Linear(config.cap_feat_dim, config.dim, bias=True)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.layers = nn.ModuleList(block(config, modulated=True) for _ in range(config.n_layers))
        self.stream: BlockSource = RESIDENT

    @property
    def blocks(self) -> tuple[TransformerBlock, ...]:
        """The blocks of a step in their order: noise refiner, then layers."""
        return (*self.noise_refiner, *self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the computation; the packed weights do not depend on it."""
        return self.x_pad_token.dtype

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        return self.x_pad_token.device

    def forward(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        cap_feats: Sequence[Tensor],
        return_dict: bool = True,
        after: After | None = None,
        **others: Any,
    ) -> Estimates | tuple[Estimates]:
        """Run each image alone, in order.

        Time and sign are those of diffusers: t is 0 for noise and 1 for a clean image, and the
        result estimates (clean - noise).

        Args:
            x: Latents, each [in_channels, 1, h, w] with even h and w; sizes may differ.
            t: Times in [0, 1], float32 [len(x)].
            cap_feats: Hidden states of the text encoder, each [L, cap_feat_dim], without padding.
            return_dict: False returns (list,), as in diffusers.
            after: As for `predict`; one function for all images.
            others: Further arguments of diffusers; only None, empty values and this model's patch sizes are
                taken.

        Returns:
            One [in_channels, 1, h, w] per image, in the model's dtype.

        Raises:
            BadShape: Lengths or shapes do not fit this transformer.
            BadArgument: A caption or an image is longer than the positions the model knows.
            Unsupported: An argument of diffusers has a value that means something.
        """
        check_call(x, self.config.patch_size, others)
        if not len(x) == len(cap_feats) == t.numel():
            raise BadShape(
                f"transformer: got {len(x)} latents, {t.numel()} times and {len(cap_feats)} captions"
            )
        out = Estimates()
        for latent, time, caption in zip(x, t.flatten().tolist(), cap_feats, strict=True):
            self._check_latent(latent)
            prepared = self.prepare([caption], [time], (latent.shape[-2], latent.shape[-1]))
            out.append(self.step(latent[:, 0].to(self.dtype), prepared, 0, after=after).unsqueeze(1))
        return out if return_dict else (out,)

    def prepare(self, captions: Sequence[Tensor], times: Sequence[float], size: tuple[int, int]) -> Prepared:
        """Compute the values that the steps of a run share.

        The refined captions are the same in every step, the rotations depend only on sizes, and the adaptive
        norms only on the time, so the modulations for all times are computed together.

        Args:
            captions: Hidden states of the text encoder, each [L, cap_feat_dim]. An object that occurs several
                times in the list is refined once.
            times: Network times of the steps, each a float32 value.
            size: Height and width of the latents.

        Raises:
            BadShape: A caption does not fit this transformer.
            BadArgument: A caption or the image is longer than the positions the model knows.
        """
        rows, cols = (side // self.config.patch_size for side in size)
        for caption in captions:
            self._check_caption(caption)
            sequence.check_lengths(self.config, rows, cols, len(caption))
        different = {id(caption): caption for caption in captions}
        refined = {key: self.refine(caption) for key, caption in different.items()}
        rotations = {
            length: self.joint_rotation(rows, cols, length)
            for length in {len(text) for text in refined.values()}
        }
        texts = tuple(refined[id(caption)] for caption in captions)
        blocks, final = self.modulate(torch.tensor(times, dtype=torch.float32))
        ropes = tuple(rotations[len(text)] for text in texts)
        return Prepared(tuple(captions), tuple(times), texts, ropes, blocks, final)

    def step(
        self,
        latent: Tensor,
        prepared: Prepared,
        i: int,
        caption: int = 0,
        predict: Predict | None = None,
        after: After | None = None,
    ) -> Tensor:
        """Estimate (clean - noise) of one image in step i.

        Args:
            latent: [in_channels, h, w] of the prepared size, in the model's dtype.
            prepared: The result of `prepare`.
            i: Index of the prepared time.
            caption: Index of the prepared caption.
            predict: Function to call instead of `predict`, such as one that replays a graph.
            after: As for `predict`; with it, `predict` itself is called, since no graph repeats it.

        Returns:
            [in_channels, h, w].
        """
        cos, sin = prepared.rotations[caption]
        values = (latent, prepared.texts[caption], cos, sin, prepared.blocks[i], prepared.final[i])
        if after is not None:
            return self.predict(*values, after)
        return (self.predict if predict is None else predict)(*values)  # empty graphs are falsy

    def predict(
        self,
        latent: Tensor,
        text: Tensor,
        cos: Tensor,
        sin: Tensor,
        blocks: Tensor,
        final: Tensor,
        after: After | None = None,
    ) -> Tensor:
        """One call of the network on tensors alone, without host work, so that a graph can record it.

        Args:
            latent: [in_channels, h, w].
            text: Refined caption [padded, dim].
            cos: Cosines of the joint sequence [tokens, head_dim / 2] float32.
            sin: Sines of the same shape.
            blocks: Modulations of the blocks at one time [blocks, 4 * dim] float32.
            final: Modulation of the final layer [dim].
            after: Function that is called with the image's tokens before the noise refiner (-1) and after
                each of its blocks, then with the joint sequence, the image first, after each layer.

        Returns:
            [in_channels, h, w].
        """
        config = self.config
        height, width = latent.shape[-2:]
        tokens = sequence.patchify(latent, config.patch_size)
        image = self.all_x_embedder[config.patch_key](tokens)
        pads = len(cos) - len(text) - len(image)
        image = torch.cat((image, self.x_pad_token.expand(pads, -1)))
        split, modulations = len(image), blocks.unbind()
        if after is not None:
            image = after(-1, image)
        for i, block in enumerate(self.noise_refiner):
            with self.stream.block(i):
                image = block(image, (cos[:split], sin[:split]), modulation=modulations[i])
            if after is not None:
                image = after(i, image)
        joint = torch.cat((image, text))  # the image comes first in the joint sequence
        for i, block in enumerate(self.layers, start=len(self.noise_refiner)):
            with self.stream.block(i):
                joint = block(joint, (cos, sin), modulation=modulations[i])
            if after is not None:
                joint = after(i, joint)
        out = self.all_final_layer[config.patch_key](joint[: len(tokens)], modulation=final)
        return sequence.unpatchify(out, height, width, config.patch_size)

    def refine(self, caption: Tensor) -> Tensor:
        """Caption features [L, cap_feat_dim] -> tokens after the context refiner [padded, dim]."""
        # the norm comes before the cast, because hidden states of a language model may exceed float16
        normed, project = self.cap_embedder[0](caption.to(self.device)), self.cap_embedder[1]
        text = project(normed.to(self.dtype))
        text = torch.cat((text, self.cap_pad_token.expand(sequence.pad_count(len(text)), -1)))
        rope = self.rotation(sequence.caption_positions(len(text)))
        for block in self.context_refiner:
            with self.stream.once(block):
                text = block(text, rope)
        refined: Tensor = text
        return refined

    def modulate(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Times [S] -> modulations of blocks [S, blocks, 4 * dim] float32, of the final layer [S, dim]."""
        temb = self.t_embedder(times.to(self.device).float() * self.config.t_scale, self.dtype)
        blocks = torch.stack([block.modulation(temb) for block in self.blocks], dim=1)
        final = self.all_final_layer[self.config.patch_key].modulation(temb)  # type: ignore[operator]
        return blocks, final

    def joint_rotation(self, rows: int, cols: int, padded_caption: int) -> Rotation:
        """Rotation of the joint sequence of an image of rows x cols patches and a padded caption."""
        image = sequence.image_positions(rows, cols, padded_caption)
        return self.rotation(torch.cat((image, sequence.caption_positions(padded_caption))))

    def rotation(self, positions: Tensor) -> Rotation:
        """Positions (t, h, w) of the tokens, int64 [L, 3] -> rotation on the model's device."""
        cos, sin = rotation(positions, self.config.axes_dims, self.config.rope_theta)
        return cos.to(self.device), sin.to(self.device)

    def _check_latent(self, latent: Tensor) -> None:
        config = self.config
        if (
            latent.ndim != 4
            or latent.shape[:2] != (config.in_channels, 1)
            or any(side == 0 or side % config.patch_size for side in latent.shape[2:])
        ):
            raise BadShape(
                f"transformer: got a latent of {tuple(latent.shape)}, wanted [{config.in_channels}, 1, h, w] "
                f"with h and w multiples of {config.patch_size}"
            )

    def _check_caption(self, caption: Tensor) -> None:
        width = self.config.cap_feat_dim
        if caption.ndim != 2 or caption.shape[1] != width:
            raise BadShape(
                f"transformer: got a caption of {tuple(caption.shape)}, wanted [L, {width}]; "
                f"use the text encoder that belongs to this transformer"
            )

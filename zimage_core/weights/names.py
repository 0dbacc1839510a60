"""Tables that map module names to checkpoint names, computed from the config for each network and layout.

Module names are those of diffusers for the S3-DiT and the VAE, and those of transformers (without "model.")
for the text encoder. A table is a tuple of `Entry`, one for each parameter of the module. Where a layout
fuses tensors (qkv), several entries name one checkpoint tensor and cut it by rows, without gaps or overlaps.
Sources: diffusers' and ComfyUI's checkpoints, llama.cpp's GGUF names, the LDM names of ae.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig, VisionConfig
from zimage_core.errors import BadArgument

TIME_CHANNELS = 256
"""Channels of the sinusoid that feeds the timestep MLP."""

TRANSFORMER_LAYOUTS = ("split", "fused", "sdcpp")
TEXT_ENCODER_LAYOUTS = ("hf", "gguf")
VAE_LAYOUTS = ("diffusers", "bfl")
VISION_LAYOUTS = ("hf", "mmproj", "mmproj conv", "mmproj swapped", "mmproj conv swapped")


@dataclass(frozen=True)
class Entry:
    """Place of one parameter of a module in a checkpoint.

    Args:
        module: Parameter name in the module.
        checkpoint: Tensor name in the file, without the file's prefix.
        shape: Shape of the parameter.
        rows: (start, stop) on axis 0 of the checkpoint's tensor, or None for all of it.
        total_rows: Length of axis 0 of the checkpoint's tensor; used only if `rows` is given.
        heads: If positive, the number of heads whose rows are stored with their two halves interleaved, as
            llama.cpp does for architecture "llama"; loading undoes that.
        conv: If positive, the matrix is stored as a convolution [rows, channels, conv, conv]; its columns are
            the pixels of a patch with the channels last.
    """

    module: str
    checkpoint: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    total_rows: int = 0
    heads: int = 0
    conv: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor in the checkpoint."""
        if self.conv:
            return (self.shape[0], self.shape[1] // self.conv**2, self.conv, self.conv)
        return self.shape if self.rows is None else (self.total_rows, *self.shape[1:])


Table = tuple[Entry, ...]


def checkpoint_shapes(table: Table) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of the whole tensor, in the table's order."""
    return {entry.checkpoint: entry.stored_shape for entry in table}


def sources(table: Table) -> dict[str, tuple[Entry, ...]]:
    """Checkpoint name -> the entries cut from it, in row order."""
    found: dict[str, list[Entry]] = {}
    for entry in table:
        found.setdefault(entry.checkpoint, []).append(entry)
    return {name: tuple(sorted(entries, key=lambda e: e.rows or (0, 0))) for name, entries in found.items()}


def _layout(wanted: str, known: tuple[str, ...]) -> None:
    if wanted not in known:
        raise BadArgument(f"layout {wanted!r} is not one of {', '.join(known)}")


# --- S3-DiT --------------------------------------------------------------------------


def transformer_table(config: TransformerConfig, layout: str) -> Table:
    """Table of the S3-DiT in layout "split" (diffusers), "fused" (single file and GGUF) or "sdcpp".

    stable-diffusion.cpp writes layout "sdcpp" from diffusers' files: it has the names of the single file, but
    q, k and v are separate tensors qkv.weight, qkv.weight.1 and qkv.weight.2.
    """
    _layout(layout, TRANSFORMER_LAYOUTS)
    entries = tuple(_transformer(config, fused=layout != "split"))
    return tuple(_apart(e) for e in entries) if layout == "sdcpp" else entries


def _apart(entry: Entry) -> Entry:
    if entry.rows is None:
        return entry
    part = entry.rows[0] // entry.shape[0]
    return Entry(entry.module, entry.checkpoint + (f".{part}" if part else ""), entry.shape)


def _transformer(c: TransformerConfig, fused: bool) -> Iterator[Entry]:
    d, ada, mid = c.dim, c.adaln_dim, c.t_mid_dim
    for pad in ("x_pad_token", "cap_pad_token") + (("siglip_pad_token",) if c.siglip_feat_dim else ()):
        yield Entry(pad, pad, (1, d))
    x_module, final_module = f"all_x_embedder.{c.patch_key}", f"all_final_layer.{c.patch_key}"
    x_file, final_file = ("x_embedder", "final_layer") if fused else (x_module, final_module)
    yield from _affine(x_module, x_file, d, c.patch_dim)
    yield from _affine(f"{final_module}.linear", f"{final_file}.linear", c.patch_dim, d)
    yield from _affine(f"{final_module}.adaLN_modulation.1", f"{final_file}.adaLN_modulation.1", d, ada)
    yield from _affine("t_embedder.mlp.0", "t_embedder.mlp.0", mid, TIME_CHANNELS)
    yield from _affine("t_embedder.mlp.2", "t_embedder.mlp.2", ada, mid)
    yield Entry("cap_embedder.0.weight", "cap_embedder.0.weight", (c.cap_feat_dim,))
    yield from _affine("cap_embedder.1", "cap_embedder.1", d, c.cap_feat_dim)
    if c.siglip_feat_dim:
        yield Entry("siglip_embedder.0.weight", "siglip_embedder.0.weight", (c.siglip_feat_dim,))
        yield from _affine("siglip_embedder.1", "siglip_embedder.1", d, c.siglip_feat_dim)
    stacks = [("noise_refiner", c.n_refiner_layers, True), ("context_refiner", c.n_refiner_layers, False)]
    if c.siglip_feat_dim:
        stacks.append(("siglip_refiner", c.n_refiner_layers, False))
    stacks.append(("layers", c.n_layers, True))
    for stack, count, modulated in stacks:
        for i in range(count):
            yield from _block(c, f"{stack}.{i}", fused, modulated)


def _affine(module: str, checkpoint: str, rows: int, columns: int) -> Iterator[Entry]:
    yield Entry(f"{module}.weight", f"{checkpoint}.weight", (rows, columns))
    yield Entry(f"{module}.bias", f"{checkpoint}.bias", (rows,))


def _block(c: TransformerConfig, block: str, fused: bool, modulated: bool) -> Iterator[Entry]:
    d, attn = c.dim, f"{block}.attention"
    for i, part in enumerate("qkv"):
        whole = Entry(f"{attn}.to_{part}.weight", f"{attn}.to_{part}.weight", (d, d))
        if fused:
            whole = replace(
                whole, checkpoint=f"{attn}.qkv.weight", rows=(i * d, (i + 1) * d), total_rows=3 * d
            )
        yield whole
    yield Entry(f"{attn}.to_out.0.weight", f"{attn}.{'out' if fused else 'to_out.0'}.weight", (d, d))
    for part in "qk":
        norm = f"{part}_norm" if fused else f"norm_{part}"
        yield Entry(f"{attn}.norm_{part}.weight", f"{attn}.{norm}.weight", (c.head_dim,))
    same = [("feed_forward.w1", (c.hidden_dim, d)), ("feed_forward.w3", (c.hidden_dim, d))]
    same.append(("feed_forward.w2", (d, c.hidden_dim)))
    for part, shape in same:
        yield Entry(f"{block}.{part}.weight", f"{block}.{part}.weight", shape)
    for part in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield Entry(f"{block}.{part}.weight", f"{block}.{part}.weight", (d,))
    if modulated:
        yield from _affine(f"{block}.adaLN_modulation.0", f"{block}.adaLN_modulation.0", 4 * d, c.adaln_dim)


# --- text encoder --------------------------------------------------------------------

GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module of a layer -> its name in a GGUF file of llama.cpp."""


def text_encoder_table(config: TextEncoderConfig, layout: str) -> Table:
    """Table of the text encoder in layout "hf" or "gguf".

    The last layer and the final norm are left out: the caption is the hidden state before them.
    """
    _layout(layout, TEXT_ENCODER_LAYOUTS)
    return tuple(_text_encoder(config, gguf=layout == "gguf"))


def _text_encoder(c: TextEncoderConfig, gguf: bool) -> Iterator[Entry]:
    embedding = "token_embd.weight" if gguf else "embed_tokens.weight"
    yield Entry("embed_tokens.weight", embedding, (c.vocab_size, c.hidden_size))
    for i in range(c.num_layers - 1):
        yield from _layer(c, i, f"layers.{i}", gguf)


def _layer(c: TextEncoderConfig, i: int, module: str, gguf: bool) -> Iterator[Entry]:
    """The parameters of layer i of the checkpoint, in a module of this name."""
    for part, leaf, shape in _layer_parameters(c):
        name = f"blk.{i}.{GGUF_LAYER_NAMES[part]}" if gguf else f"layers.{i}.{part}"
        # llama.cpp stores q and k of "llama" for a rotation of neighbours; ours rotates halves.
        heads = {"self_attn.q_proj": c.num_heads, "self_attn.k_proj": c.num_kv_heads}.get(part, 0)
        permuted = heads if gguf and c.arch == "llama" else 0
        yield Entry(f"{module}.{part}.{leaf}", f"{name}.{leaf}", shape, heads=permuted)


def ending_table(config: TextEncoderConfig, layout: str) -> Table:
    """Table of what `text_encoder_table` leaves out, for `models.language_model.Ending`, without its head."""
    _layout(layout, TEXT_ENCODER_LAYOUTS)
    gguf = layout == "gguf"
    norm = Entry("norm.weight", "output_norm.weight" if gguf else "norm.weight", (config.hidden_size,))
    return (*_layer(config, config.num_layers - 1, "layer", gguf), norm)


def head_entry(config: TextEncoderConfig, layout: str) -> Entry:
    """The head of a language model, in files that do not use the table of token embeddings for it."""
    name = "output.weight" if layout == "gguf" else "lm_head.weight"
    return Entry("head.weight", name, (config.vocab_size, config.hidden_size))


def _layer_parameters(c: TextEncoderConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    hidden, inner = c.hidden_size, c.intermediate_size
    yield "input_layernorm", "weight", (hidden,)
    for part, rows in (("q", c.num_heads), ("k", c.num_kv_heads), ("v", c.num_kv_heads)):
        yield f"self_attn.{part}_proj", "weight", (rows * c.head_dim, hidden)
        if c.attention_bias:
            yield f"self_attn.{part}_proj", "bias", (rows * c.head_dim,)
    yield "self_attn.o_proj", "weight", (hidden, c.num_heads * c.head_dim)
    if c.qk_norm:
        yield "self_attn.q_norm", "weight", (c.head_dim,)
        yield "self_attn.k_norm", "weight", (c.head_dim,)
    yield "post_attention_layernorm", "weight", (hidden,)
    yield "mlp.gate_proj", "weight", (inner, hidden)
    yield "mlp.up_proj", "weight", (inner, hidden)
    yield "mlp.down_proj", "weight", (hidden, inner)


# --- VAE -----------------------------------------------------------------------------


def autoencoder_table(config: AutoencoderConfig, layout: str) -> Table:
    """Table of the VAE in layout "diffusers" or "bfl" (the LDM names of FLUX.1's ae.safetensors).

    In the BFL layout the four projections of an attention are 1x1 convolutions, (C, C, 1, 1).
    """
    _layout(layout, VAE_LAYOUTS)
    entries = tuple(_autoencoder(config))
    if layout == "diffusers":
        return entries
    last = len(config.block_out_channels) - 1
    return tuple(replace(e, checkpoint=_bfl_name(e.module, last)) for e in entries)


def _conv(name: str, c_out: int, c_in: int, side: int = 3) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", f"{name}.weight", (c_out, c_in, side, side))
    yield Entry(f"{name}.bias", f"{name}.bias", (c_out,))


def _resnet(name: str, c_in: int, c_out: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm1", f"{name}.norm1", c_in)
    yield from _conv(f"{name}.conv1", c_out, c_in)
    yield from _norm(f"{name}.norm2", f"{name}.norm2", c_out)
    yield from _conv(f"{name}.conv2", c_out, c_out)
    if c_in != c_out:
        yield from _conv(f"{name}.conv_shortcut", c_out, c_in, side=1)


def _mid(name: str, channels: int) -> Iterator[Entry]:
    yield from _resnet(f"{name}.resnets.0", channels, channels)
    yield from _norm(f"{name}.attentions.0.group_norm", f"{name}.attentions.0.group_norm", channels)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _affine(f"{name}.attentions.0.{part}", f"{name}.attentions.0.{part}", channels, channels)
    yield from _resnet(f"{name}.resnets.1", channels, channels)


def _autoencoder(c: AutoencoderConfig) -> Iterator[Entry]:
    widths, last = c.block_out_channels, len(c.block_out_channels) - 1
    yield from _conv("encoder.conv_in", widths[0], c.in_channels)
    for i, (c_in, c_out) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
        for j in range(c.layers_per_block):
            yield from _resnet(f"encoder.down_blocks.{i}.resnets.{j}", c_in if j == 0 else c_out, c_out)
        if i < last:
            yield from _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", c_out, c_out)
    yield from _mid("encoder.mid_block", widths[-1])
    yield from _norm("encoder.conv_norm_out", "encoder.conv_norm_out", widths[-1])
    yield from _conv("encoder.conv_out", 2 * c.latent_channels, widths[-1])
    yield from _conv("decoder.conv_in", widths[-1], c.latent_channels)
    yield from _mid("decoder.mid_block", widths[-1])
    up = widths[::-1]
    for i, (c_in, c_out) in enumerate(zip((up[0], *up[:-1]), up, strict=True)):
        for j in range(c.layers_per_block + 1):
            yield from _resnet(f"decoder.up_blocks.{i}.resnets.{j}", c_in if j == 0 else c_out, c_out)
        if i < last:
            yield from _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", c_out, c_out)
    yield from _norm("decoder.conv_norm_out", "decoder.conv_norm_out", up[-1])
    yield from _conv("decoder.conv_out", c.out_channels, up[-1])


BFL_MID_NAMES = {
    "resnets.0": "block_1",
    "resnets.1": "block_2",
    "attentions.0.group_norm": "attn_1.norm",
    "attentions.0.to_q": "attn_1.q",
    "attentions.0.to_k": "attn_1.k",
    "attentions.0.to_v": "attn_1.v",
    "attentions.0.to_out.0": "attn_1.proj_out",
}
"""Module of the middle block -> its LDM name."""


def _bfl_name(module: str, last: int) -> str:
    """diffusers' VAE name -> BFL's; `last` is the index of the coarsest resolution."""
    side, part, rest = module.split(".", 2)
    if part == "mid_block":
        key = next(k for k in BFL_MID_NAMES if rest.startswith(k + "."))
        return f"{side}.mid.{BFL_MID_NAMES[key]}{rest[len(key) :]}".replace(
            ".conv_shortcut.", ".nin_shortcut."
        )
    if part in ("down_blocks", "up_blocks"):
        level, kind, index, leaf = rest.split(".", 3)
        # LDM counts the decoder's resolutions from the finest one up.
        number = int(level) if part == "down_blocks" else last - int(level)
        head = f"{side}.{part.removesuffix('_blocks')}.{number}"
        if kind == "resnets":
            return f"{head}.block.{index}.{leaf}".replace(".conv_shortcut.", ".nin_shortcut.")
        return f"{head}.{'downsample' if kind == 'downsamplers' else 'upsample'}.{leaf}"
    return f"{side}.{'norm_out' if part == 'conv_norm_out' else part}.{rest}"


# --- vision tower --------------------------------------------------------------------

MMPROJ_LAYER_NAMES = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
"""Module of a layer of the vision tower -> its name in an mmproj file of llama.cpp."""
_SWAPPED = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}


def vision_table(config: VisionConfig, layout: str) -> Table:
    """Table of the SigLIP2 vision tower in layout "hf" (transformers) or "mmproj" (GGUF of llama.cpp).

    An mmproj may have the patch embedding as a convolution ("conv"), and the two layers of the MLP under each
    other's name ("swapped"). The pooling head is left out.
    """
    _layout(layout, VISION_LAYOUTS)
    return tuple(_vision(config, layout.split()))


def _vision(c: VisionConfig, layout: list[str]) -> Iterator[Entry]:
    hidden, gguf = c.hidden_size, layout[0] == "mmproj"
    patch = "v.patch_embd" if gguf else "embeddings.patch_embedding"
    weight, bias = _affine("embeddings.patch_embedding", patch, hidden, c.patch_dim)
    yield replace(weight, conv=c.patch_size if "conv" in layout else 0)
    yield bias
    table = "v.position_embd" if gguf else "embeddings.position_embedding"
    yield Entry("embeddings.position_embedding.weight", f"{table}.weight", (c.num_patches, hidden))
    sizes = {"mlp.fc1": (c.intermediate_size, hidden), "mlp.fc2": (hidden, c.intermediate_size)}
    for i in range(c.num_layers):
        for part, short in MMPROJ_LAYER_NAMES.items():
            short = _SWAPPED.get(short, short) if "swapped" in layout else short
            file, module = (
                f"v.blk.{i}.{short}" if gguf else f"encoder.layers.{i}.{part}",
                f"layers.{i}.{part}",
            )
            if "norm" in part:
                yield from _norm(module, file, hidden)
            else:
                yield from _affine(module, file, *sizes.get(part, (hidden, hidden)))
    yield from _norm("post_layernorm", "v.post_ln" if gguf else "post_layernorm", hidden)


def _norm(module: str, checkpoint: str, channels: int) -> Iterator[Entry]:
    yield Entry(f"{module}.weight", f"{checkpoint}.weight", (channels,))
    yield Entry(f"{module}.bias", f"{checkpoint}.bias", (channels,))

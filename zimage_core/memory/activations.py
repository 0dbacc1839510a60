"""Bytes alive at once while a network runs: weights, scratch and workspaces of libraries left out.

Formulas for the kernels' way: element-wise steps write their result alone, attention keeps no scores. They
follow the order in which the modules hold and drop their tensors; tests/memory/test_activations.py runs the
modules at full size on the meta device and counts. All functions are pure and need no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from zimage_core.config import PAD_MULTIPLE, AutoencoderConfig, TextEncoderConfig, TransformerConfig

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a number of each dtype that the networks compute in."""
FLOAT32 = 4


def padded(tokens: int) -> int:
    """Tokens of a stream with its learned pads: the next multiple of 32."""
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def image_tokens(config: TransformerConfig, height: int, width: int) -> int:
    """Patches of a latent of height x width latents, without pads."""
    return (height // config.patch_size) * (width // config.patch_size)


def step_bytes(config: TransformerConfig, height: int, width: int, caption: int, dtype: str) -> int:
    """Most bytes alive in `ZImageTransformer.step`, its arguments left out (see `kept_bytes`).

    Args:
        config: Config of the transformer.
        height: Height of the image in latents.
        width: Width of the image in latents.
        caption: Tokens of the caption, without pads.
        dtype: Dtype of the computation.
    """
    item, dim, hidden = ITEMSIZE[dtype], config.dim, config.hidden_dim
    patches = image_tokens(config, height, width)
    image = padded(patches)
    joint = image + padded(caption)
    # the sequence that entered the block, held by the loop; the normed input of the branch
    attention = joint * dim * (2 + 5)  # q, k, v, their mixture, what to_out makes of it
    # by now the stream has a second version, and the attention's branch is still held
    feed_forward = joint * (4 * dim + 3 * hidden)
    final = joint * dim + 3 * patches * dim
    # the refined image and the patches stay alive beside the joint sequence
    beside = image * dim + patches * config.patch_dim
    return item * (beside + max(attention, feed_forward, final))


def refine_bytes(config: TransformerConfig, caption: int, dtype: str) -> int:
    """Most bytes alive in `ZImageTransformer.refine` of one caption, its features left out."""
    item, tokens = ITEMSIZE[dtype], padded(caption)
    stream = FLOAT32 if dtype == "float16" else item  # of the features and of their norm
    block = item * tokens * max(4 * config.dim + 3 * config.hidden_dim, 7 * config.dim)
    rotation = tokens * config.head_dim * FLOAT32
    normed = caption * config.cap_feat_dim * stream
    return max(block + rotation + normed, caption * config.cap_feat_dim * (2 * FLOAT32 + stream))


def modulate_bytes(config: TransformerConfig, steps: int, dtype: str) -> int:
    """Bytes of the adaptive norms of a run of so many steps, which are kept through it."""
    blocks = config.n_refiner_layers + config.n_layers
    return steps * (FLOAT32 * blocks * 4 * config.dim + ITEMSIZE[dtype] * config.dim)


def kept_bytes(
    config: TransformerConfig, height: int, width: int, caption: int, dtype: str, images: int = 1,
    captions: int = 1, steps: int = 8,
) -> int:  # fmt: skip
    """Bytes that live through all steps of a run: adaptive norms, rotations, captions, latents.

    Args:
        config: Config of the transformer.
        height: Height of the image in latents.
        width: Width of the image in latents.
        caption: Tokens of a caption, without pads.
        dtype: Dtype of the computation.
        images: Images of the run.
        captions: Different captions: 1, or 2 with guidance.
        steps: Steps of the run.
    """
    item = ITEMSIZE[dtype]
    joint = padded(image_tokens(config, height, width)) + padded(caption)
    rotations = captions * joint * config.head_dim * FLOAT32  # cosines and sines of half the channels each
    texts = captions * item * (padded(caption) * config.dim + caption * config.cap_feat_dim)
    latent = config.in_channels * height * width
    # float32: noise, velocity and its negative, the step's result; a prediction of each side in both dtypes
    latents = images * latent * (4 * FLOAT32 + captions * (item + FLOAT32) + item)
    return modulate_bytes(config, steps, dtype) + rotations + texts + latents


def denoise_bytes(
    config: TransformerConfig, height: int, width: int, caption: int, dtype: str, images: int = 1,
    captions: int = 1, steps: int = 8,
) -> int:  # fmt: skip
    """Most bytes alive while a run denoises; arguments as for `kept_bytes`."""
    # all steps' adaptive norms are computed one by one and then stacked
    alone = modulate_bytes(config, steps, dtype)
    most = max(step_bytes(config, height, width, caption, dtype), refine_bytes(config, caption, dtype), alone)
    return kept_bytes(config, height, width, caption, dtype, images, captions, steps) + most


def encode_bytes(config: TextEncoderConfig, tokens: int, dtype: str, captions: int = 1) -> int:
    """Most bytes alive in `TextEncoder.forward` of so many tokens, and the captions encoded before.

    Norms and rotation are plain torch here: they hold float32 copies.
    """
    item = ITEMSIZE[dtype]
    stream = FLOAT32 if dtype == "float16" else item
    hidden, inner = config.hidden_size, config.intermediate_size
    q, k = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # the stream and the normed input of the branch
    base = hidden * (stream + item)
    # its second version, the attention's branch, then gate and up and what becomes of them
    feed_forward = hidden * (stream + item) + 3 * inner * item
    # rotation of q beside q, k and v: its float32 copy, the one with halves exchanged, a product
    attention = q * (item + 3 * FLOAT32) + 2 * k * item
    norm = hidden * (2 * stream + 2 * FLOAT32 + 2 * item)
    live = max(base + max(feed_forward, attention), norm)
    rotation = 2 * config.head_dim * FLOAT32
    features = (captions - 1) * hidden * stream
    return tokens * (live + rotation + features)


def decode_bytes(
    config: AutoencoderConfig, height: int, width: int, tile: int | None = None, apart: bool = False
) -> int:
    """Most bytes alive in a float32 VAE decode of one image, the image among them.

    In tiles (`models.vae_tiles`) it goes through the decoder layer by layer, and two maps of the whole
    image are kept. What a library takes for itself inside a convolution comes on top.

    Args:
        config: Config of the VAE.
        height: Height of the latents.
        width: Width of the latents.
        tile: Latents a side of a tile; None decodes the image at once.
        apart: With tiles: the maps of the whole image are kept on the host.
    """
    widths = config.block_out_channels[::-1]
    latents = config.latent_channels * height * width
    middle = 8 * widths[0] * height * width  # tokens, q, k, v and what comes of them, beside their input
    if tile is None or tile >= max(height, width):
        return FLOAT32 * (2 * latents + max(middle, *_at_once(widths, height, width)))
    # as few tiles as possible, as small as that number allows
    side = tuple(-(-length // -(-length // tile)) for length in (height, width))
    return FLOAT32 * (2 * latents + max(middle, *_in_tiles(config, height, width, side, apart)))


def _at_once(widths: tuple[int, ...], height: int, width: int) -> Iterator[int]:
    """Numbers alive at the fullest points of a decode at once."""
    for i, (before, channels) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
        area = 4**i * height * width
        held = before * area  # the decoder holds what it gave to the level
        yield held + area * max(2 * before, before + channels, 4 * channels)
        yield held + 9 * area * channels if i + 1 < len(widths) else 3 * area * channels


def _in_tiles(
    config: AutoencoderConfig, height: int, width: int, side: tuple[int, ...], apart: bool
) -> Iterator[int]:
    """Numbers alive at the fullest points of a decode in tiles of `side` latents."""
    widths, whole, copies, end = config.block_out_channels[::-1], int(not apart), int(apart), 0
    for i, (before, channels) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
        area, tall, wide = 4**i * height * width, side[0] << i, side[1] << i
        rim, rim2 = (tall + 2) * (wide + 2), (tall + 4) * (wide + 4)
        doubled = before * (2 * rim2 + (tall // 2 + 2) * (wide // 2 + 2) * (1 + copies))
        given, maps = before * area, 2 * channels * area
        if 0 < i < len(widths) - 1:
            yield whole * (given // 4 + given) + doubled
            maps += given if before != channels else 0  # else changed in place
        elif i:  # the map is doubled at each reading
            maps += given // 4
            yield whole * maps + max(doubled, before * rim2 + max(before, channels) * rim)
        yield whole * maps + rim * max(before + channels, 2 * channels, 2 * before * copies)
        end = whole * channels * area + config.out_channels * area + 2 * channels * rim
    yield end


def given_bytes(config: AutoencoderConfig, height: int, width: int) -> int:
    """Bytes of an image that is encoded, height and width in latents: as given, and in the encoder's layout.

    The encoder itself takes no more than the decoder (tests/editing/test_encode.py).
    """
    return 2 * config.in_channels * height * width * config.spatial_factor**2 * FLOAT32


def images_bytes(config: AutoencoderConfig, height: int, width: int, images: int) -> int:
    """Bytes of finished images while the last of them is decoded, height and width in latents."""
    factor = config.spatial_factor
    one = config.out_channels * height * width * factor * factor * FLOAT32
    latents = 2 * images * config.latent_channels * height * width * FLOAT32
    return (images - 1) * one + latents


def collected_bytes(config: AutoencoderConfig, height: int, width: int, images: int) -> int:
    """Bytes when all images of a run become one tensor: each twice."""
    factor = config.spatial_factor
    return 2 * images * config.out_channels * height * width * factor * factor * FLOAT32

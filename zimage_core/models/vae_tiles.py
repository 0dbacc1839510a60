"""Runs the VAE's decoder or encoder in tiles: up to rounding what the whole one gives, in less memory.

Tiles that are decoded separately differ in tone, because each GroupNorm then uses the mean and variance of
its tile instead of the image's, and blending only hides that. Here all tiles pass through the decoder layer
by layer: every norm uses the statistics of the whole image, and every 3x3 convolution gets one pixel of the
neighbouring tiles. The result equals that of the whole decoder up to rounding, for every tile size, and needs
no blending.

Only two maps of the whole image exist at a time: the input of a residual block, and the map between its
convolutions. Everything else (normalised and activated maps, the upsampled map before the last block) exists
for one tile only. The middle block, whose attention sees all positions, runs on the whole map; it is as small
as the latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from zimage_core.models.vae_blocks import (
    Decoder,
    DownBlock,
    Downsample,
    Encoder,
    ResnetBlock,
    UpBlock,
    Upsample,
)

TILE = 32
"""Default side of a tile in latents: 256 pixels. Larger tiles are hardly faster."""


@dataclass(frozen=True)
class Tile:
    """A rectangle of a map, and the part of it that earlier tiles have covered.

    Args:
        top: First row.
        left: First column.
        bottom: Row after the last.
        right: Column after the last.
        skip_rows: Rows at the top that belong to the tile above.
        skip_columns: Columns at the left that belong to the tile to the left.
    """

    top: int
    left: int
    bottom: int
    right: int
    skip_rows: int = 0
    skip_columns: int = 0

    def times(self, n: int) -> Tile:
        """The same tile on a map with `n` times as many rows and columns."""
        return Tile(*(n * value for value in self._values()))

    def halved(self) -> Tile:
        """The same tile on a map with half as many rows and columns."""
        return Tile(*(value // 2 for value in self._values()))

    @property
    def new(self) -> tuple[slice, slice]:
        """Rows and columns of the map that this tile is the first to cover."""
        return slice(self.top + self.skip_rows, self.bottom), slice(self.left + self.skip_columns, self.right)

    def _values(self) -> tuple[int, ...]:
        return self.top, self.left, self.bottom, self.right, self.skip_rows, self.skip_columns


def layout(h: int, w: int, tile: int) -> list[Tile]:
    """Tiles of equal size, with sides of at most `tile`, that cover h x w; each position is new in one tile.

    There are as few tiles as possible, as small as that number allows; the last one of a row or column
    overlaps its neighbour.
    """
    rows, columns = _spans(h, tile), _spans(w, tile)
    return [Tile(a, c, b, d, skip_a, skip_c) for a, b, skip_a in rows for c, d, skip_c in columns]


def _spans(length: int, tile: int) -> list[tuple[int, int, int]]:
    """(start, stop, number of positions that the previous span has covered) along one side."""
    count = -(-length // tile)
    size = -(-length // count)
    starts = [min(i * size, length - size) for i in range(count)]
    return [(start, start + size, i * size - start) for i, start in enumerate(starts)]


@torch.no_grad()
def decode_tiled(
    decoder: Decoder, z: Tensor, tile: int, keep: torch.device | None = None, strip: Any = None
) -> Tensor:
    """Compute `decoder(z)` up to rounding, one image and one tile at a time.

    Maps are changed in place, so there are no gradients.

    Args:
        decoder: The decoder; its modules are called, so hooks on them see every tile.
        z: Latents.
        tile: Side of a tile in latents, at least 1.
        keep: Device of the maps of the whole image; default: that of z. With "cpu", a decoder on a GPU needs
            little more GPU memory than for a tile, and each map is copied a few times.
        strip: The rows that this rank computes, where several share the image; see `parallel.vae`.

    Shape:
        z [B, latent_channels, h, w] -> [B, 3, 8 h, 8 w].
    """
    tiles = layout(z.shape[2], z.shape[3], tile) if strip is None else strip.tiles
    if len(tiles) == 1 and strip is None:
        images = [decoder(z[i : i + 1]) for i in range(len(z))]
    else:
        images = [_decode_one(decoder, z[i : i + 1], tiles, keep or z.device, strip) for i in range(len(z))]
    return torch.cat(images) if len(images) > 1 else images[0]


def _decode_one(decoder: Decoder, z: Tensor, tiles: list[Tile], keep: torch.device, strip: Any) -> Tensor:
    coarse = decoder.mid_block(decoder.conv_in(z)).to(keep, memory_format=torch.channels_last)
    if strip is not None:
        coarse = strip.part(coarse)
    x = _Map(coarse, z.device, strip=strip)
    del coarse
    for i, block in enumerate(cast(list[UpBlock], decoder.up_blocks), 2):
        for resnet in block.resnets:
            x = _residual(cast(ResnetBlock, resnet), x, tiles)
        for up in block.upsamplers:
            tiles = [t.times(2) for t in tiles]
            x = _Map(x.data, z.device, cast(Upsample, up), strip)
            if i < len(decoder.up_blocks):
                x = _whole_map(x, tiles)
    out = z.new_empty((1, decoder.conv_out.out_channels, *x.size))
    scale, shift = _affine(decoder.conv_norm_out, x, tiles)
    for t in tiles:
        rows, columns = t.new
        out[..., rows, columns] = _inner(decoder.conv_out(_framed(x.read(t, 1), t, scale, shift)), t)
    return out if strip is None else cast(Tensor, strip.whole(out))


@torch.no_grad()
def encode_tiled(encoder: Encoder, x: Tensor, tile: int, keep: torch.device | None = None) -> Tensor:
    """Compute `encoder(x)` up to rounding, one image and one tile at a time.

    Args:
        encoder: The encoder; its modules are called, so hooks on them see every tile.
        x: Images.
        tile: Side of a tile in latents, at least 1.
        keep: Device of the maps of the whole image; default: that of x.

    Shape:
        x [B, 3, 8 h, 8 w] -> [B, 2 * latent_channels, h, w].
    """
    factor = 2 ** (len(encoder.down_blocks) - 1)
    tiles = layout(x.shape[2] // factor, x.shape[3] // factor, tile)
    if len(tiles) == 1:
        found = [encoder(x[i : i + 1]) for i in range(len(x))]
    else:
        large = [t.times(factor) for t in tiles]
        found = [_encode_one(encoder, x[i : i + 1], large, keep or x.device) for i in range(len(x))]
    return torch.cat(found) if len(found) > 1 else found[0]


def _encode_one(encoder: Encoder, image: Tensor, tiles: list[Tile], keep: torch.device) -> Tensor:
    x, given = _Map(image, image.device), encoder.conv_in
    first = torch.empty(
        (1, given.out_channels, *x.size), dtype=image.dtype, device=keep, memory_format=torch.channels_last
    )
    for t in tiles:
        rows, columns = t.new
        part = x.read(t, 1)
        frame, inside = _frame(part, t, t.bottom - t.top + 2, t.right - t.left + 2)
        inside.copy_(part)
        first[..., rows, columns] = _inner(given(frame), t)
    x = _Map(first, image.device)
    del first
    for block in cast(list[DownBlock], encoder.down_blocks):
        for resnet in block.resnets:
            x = _residual(cast(ResnetBlock, resnet), x, tiles)
        for down in block.downsamplers:
            tiles = [t.halved() for t in tiles]
            x = _halved_map(cast(Downsample, down), x, tiles)
    return encoder.end(x.data.to(image.device))


def _halved_map(down: Downsample, x: _Map, tiles: list[Tile]) -> _Map:
    """`down(x)`, whose tiles are given."""
    size = tuple(side // 2 for side in x.size)
    data = torch.empty(
        (1, down.conv.out_channels, *size),
        dtype=x.data.dtype, device=x.data.device, memory_format=torch.channels_last,
    )  # fmt: skip
    for t in tiles:
        rows, columns = t.new
        # one more row and column of the neighbours than the module pads, where there are neighbours
        part = x.data[..., 2 * rows.start : 2 * rows.stop + 2, 2 * columns.start : 2 * columns.stop + 2]
        out = down(part.to(x.device))
        data[..., rows, columns] = out[..., : rows.stop - rows.start, : columns.stop - columns.start]
    return _Map(data, x.device)


class _Map:
    """A map [1, C, H, W] of the whole image, or one that is upsampled tile by tile as it is read.

    Args:
        data: The map itself; with `up`, the map before upsampling.
        device: Device that tiles are read to.
        up: The module that upsamples `data`; None for no upsampling.
        strip: The rows that this rank computes, where the map is one of several ranks' strips.
    """

    def __init__(
        self, data: Tensor, device: torch.device, up: Upsample | None = None, strip: Any = None
    ) -> None:
        self.data, self.device, self.up, self.strip = data, device, up, strip

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        n = 1 if self.up is None else 2
        return n * self.data.shape[2], n * self.data.shape[3]

    def empty(self, channels: int) -> _Map:
        """A new, uninitialised map of this size on the same device."""
        data = torch.empty(
            (1, channels, *self.size),
            dtype=self.data.dtype, device=self.data.device, memory_format=torch.channels_last,
        )  # fmt: skip
        return _Map(data, self.device, strip=self.strip)

    def finish(self) -> _Map:
        """This map, all of whose tiles were written, with the rows of neighbouring strips beside them."""
        if self.strip is not None:
            self.strip.fill(self.data)
        return self

    def read(self, t: Tile, rim: int) -> Tensor:
        """The tile with `rim` more rows and columns around it, as far as the map reaches."""
        height, width = self.size
        top, left = max(t.top - rim, 0), max(t.left - rim, 0)
        bottom, right = min(t.bottom + rim, height), min(t.right + rim, width)
        if self.up is None:
            return self.data[..., top:bottom, left:right].to(self.device)
        half = t.halved()
        rows, columns = half.bottom - half.top + 2, half.right - half.left + 2
        source = _Map(self.data, self.device).read(half, 1)
        framed, inside = _frame(source, half, rows, columns)
        inside.copy_(source)
        # `out` begins at row t.top - 2; its outermost row and column lack a neighbour and are cut off
        out: Tensor = self.up(framed)
        return out[..., top - t.top + 2 : bottom - t.top + 2, left - t.left + 2 : right - t.left + 2]


def _frame(part: Tensor, t: Tile, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Zeros [1, C, rows, columns] for a tile with a rim of 1, and a view of them at the position of `part`.

    The rim of a tile at the edge of the image stays zero, which is how the convolutions pad.
    """
    frame = torch.empty(
        (1, part.shape[1], rows, columns),
        dtype=part.dtype, device=part.device, memory_format=torch.channels_last,
    ).zero_()  # fmt: skip
    a, b = int(t.top == 0), int(t.left == 0)
    return frame, frame[..., a : a + part.shape[2], b : b + part.shape[3]]


def _framed(part: Tensor, t: Tile, scale: Tensor, shift: Tensor) -> Tensor:
    """silu(part * scale + shift) in a frame of zeros, as input of a convolution."""
    frame, inside = _frame(part, t, t.bottom - t.top + 2, t.right - t.left + 2)
    torch.addcmul(shift, part, scale, out=inside)
    nn.functional.silu(inside, inplace=True)
    return frame


def _inner(framed: Tensor, t: Tile) -> Tensor:
    """The part of the tile that is new, without the rim, where a convolution's output is wrong."""
    return framed[..., 1 + t.skip_rows : -1, 1 + t.skip_columns : -1]


def _whole_map(x: _Map, tiles: list[Tile]) -> _Map:
    """Upsample the whole map once instead of at each reading; only the last one is too large for that."""
    out = x.empty(x.data.shape[1])
    for t in tiles:
        rows, columns = t.new
        out.data[..., rows, columns] = x.read(t, 0)[..., t.skip_rows :, t.skip_columns :]
    return out.finish()


def _residual(block: ResnetBlock, x: _Map, tiles: list[Tile]) -> _Map:
    """`block(x)`, computed in place in x if the shapes allow it."""
    scale, shift = _affine(block.norm1, x, tiles)
    between = x.empty(block.conv1.out_channels)
    in_place = x.up is None and block.conv_shortcut is None
    out = x if in_place else x.empty(block.conv1.out_channels)
    for t in tiles:
        rows, columns = t.new
        part = x.read(t, 1)
        if not in_place:
            side = part if block.conv_shortcut is None else block.conv_shortcut(part)
            a, b = int(t.top > 0) + t.skip_rows, int(t.left > 0) + t.skip_columns
            core = side[..., a : a + rows.stop - rows.start, b : b + columns.stop - columns.start]
            out.data[..., rows, columns] = core
            del side, core
        framed = _framed(part, t, scale, shift)
        del part
        between.data[..., rows, columns] = _inner(block.conv1(framed), t)
        del framed
    between.finish()
    scale, shift = _affine(block.norm2, between, tiles)
    for t in tiles:
        rows, columns = t.new
        change = _inner(block.conv2(_framed(between.read(t, 1), t, scale, shift)), t)
        out.data[..., rows, columns] += change.to(out.data.device)
        del change
    return out.finish()


def _affine(norm: nn.GroupNorm, x: _Map, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """Scale and shift [1, C, 1, 1], float32, that apply this norm to this map.

    Mean and variance of each tile are float32; they are combined in float64 about the mean of the whole map,
    because sums of squares would lose digits if the mean is large.
    """
    found = []
    for t in tiles:
        part = x.read(t, 0)[..., t.skip_rows :, t.skip_columns :]
        groups = part.float().view(1, norm.num_groups, -1, *part.shape[2:])
        found.append(torch.stack(torch.var_mean(groups, dim=(0, 2, 3, 4), correction=0)))
        del part, groups
    sizes = [(t.bottom - t.top - t.skip_rows) * (t.right - t.left - t.skip_columns) for t in tiles]
    every, count = torch.stack(found).cpu().double(), torch.tensor(sizes, dtype=torch.float64)
    if x.strip is not None:
        every, count = x.strip.statistics(every, sizes)
    weight = count[:, None] / count.sum()
    variances, means = every.unbind(1)
    mean = (weight * means).sum(0)
    variance = (weight * (variances + (means - mean).square())).sum(0)
    width = norm.num_channels // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(width) * norm.weight.cpu().double()
    shift = norm.bias.cpu().double() - mean.repeat_interleave(width) * scale
    return tuple(v.float().to(x.device).view(1, -1, 1, 1) for v in (scale, shift))  # type: ignore[return-value]

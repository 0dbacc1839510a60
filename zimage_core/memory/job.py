"""One run to be planned: picture, sizes and rates, with the bytes and seconds that follow for any budget."""

from __future__ import annotations

from collections.abc import Sequence

from zimage_core.config import MIN_TILE, AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument
from zimage_core.memory import residency, work
from zimage_core.memory.activations import (
    ITEMSIZE,
    collected_bytes,
    decode_bytes,
    denoise_bytes,
    encode_bytes,
    image_tokens,
    padded,
    pictures_bytes,
)
from zimage_core.memory.rates import Rates
from zimage_core.memory.sizes import Block, Sizes, matrices
from zimage_core.quant.dispatch import family

WORKSPACE = {"sm_90": 32 << 20, "sm_100": 32 << 20}
"""Bytes that the library of products takes for itself, by family; 9 MiB elsewhere. Source: PyTorch, notes on
CUDA semantics, cuBLAS workspaces."""
_WORKSPACE = 9 << 20
RUNTIME = 800 << 20
"""Host memory of Python, torch and the driver, about."""
RING = 128 << 20
"""Bytes of the pinned ring that weights pass through, between files and the device."""
LEAST_RING = 32 << 20
"""Bytes of it where host memory is short."""
MAP_PASSES = 6
"""How often a map of the picture crosses the link at each resolution, where it is kept on the host."""


Way = tuple[int | None, bool]
"""To decode: latents a side of the tiles or None, whether maps of the picture are kept on the host."""
AT_ONCE: Way = (None, False)


def bytes_of(blocks: Sequence[Block]) -> list[int]:
    """Bytes of each block."""
    return [block.nbytes for block in blocks]


class Job:
    """Picture, sizes and rates, with what follows from them for any budget."""

    def __init__(
        self, sizes: Sizes, width: int, height: int, images: int, caption: int, guidance: bool, steps: int,
        rates: Rates,
    ) -> None:  # fmt: skip
        self.sizes, self.rates, self.dtype = sizes, rates, sizes.dtype
        self.width, self.height, self.images, self.caption = width, height, images, caption
        self.guidance, self.steps = guidance, steps
        self.captions = 2 if guidance else 1
        self.net, self.encoder, self.vae = sizes.transformer, sizes.text_encoder, sizes.vae
        net, encoder, vae = self.net.config, self.encoder.config, self.vae.config
        if not isinstance(net, TransformerConfig) or not isinstance(encoder, TextEncoderConfig):
            raise BadArgument("plan: the parts are not those of a Z-Image pipeline")
        if not isinstance(vae, AutoencoderConfig):
            raise BadArgument("plan: the VAE's part is not that of a VAE")
        self.net_config, self.encoder_config, self.vae_config = net, encoder, vae
        self.multiple = vae.spatial_factor * net.patch_size
        for name, value in (("images", images), ("caption tokens", caption), ("steps", steps)):
            if value < 1:
                raise BadArgument(f"{name}: got {value}, wanted at least 1")
        for name, side in (("width", width), ("height", height)):
            if side < 1 or side % self.multiple:
                raise BadArgument(f"{name}: got {side}, wanted a multiple of {self.multiple}")
        self.rows, self.cols = height // vae.spatial_factor, width // vae.spatial_factor
        self.scratch = max(part.scratch(sizes.dtype) for part in (self.net, self.encoder))
        gpu = rates.architecture != "cpu"
        self.workspace = WORKSPACE.get(family(rates.architecture), _WORKSPACE) if gpu else 0
        self.encode_live = encode_bytes(encoder, caption, self.dtype, self.captions)
        rest = (caption, self.dtype, images, self.captions, steps)
        self.denoise_live = denoise_bytes(net, self.rows, self.cols, *rest)
        # a caption alone, and a picture of one patch beside it
        refine = denoise_bytes(net, net.patch_size, net.patch_size, *rest)
        self.visited_live = max(self.denoise_live, max(self.net.once, default=0) + refine)

    def resized(self, width: int, height: int) -> Job:
        """The same job for another picture."""
        return Job(
            self.sizes, width, height, self.images, self.caption, self.guidance, self.steps, self.rates
        )

    @property
    def around(self) -> int:
        """Bytes that every phase has: scratch and the workspace of libraries."""
        return self.scratch + self.workspace

    def decode_live(self, way: Way) -> int:
        """Activations of decoding, finished pictures among them."""
        config, rows, cols = self.vae_config, self.rows, self.cols
        during = decode_bytes(config, rows, cols, *way) + pictures_bytes(config, rows, cols, self.images)
        return max(during, collected_bytes(config, rows, cols, self.images))

    def ways(self) -> list[Way]:
        """To decode, quickest first: at once, in tiles from large to small, with maps on the host."""
        sides = range((max(self.rows, self.cols) - 1) // 8 * 8, MIN_TILE - 1, -8)
        return [AT_ONCE, *((side, False) for side in sides), (MIN_TILE, True)]

    def decode_seconds(self, way: Way) -> float:
        """Of decoding all pictures."""
        config, (tile, apart) = self.vae_config, way
        one = work.decode_flops(config, self.rows, self.cols) / self.rates.flops32
        if tile is not None:  # a convolution's rim, two pixels on each side, is computed twice
            one *= (1 + 4 / (tile * config.spatial_factor)) ** 2
        if apart:
            maps = (
                sum(4**i * c for i, c in enumerate(config.block_out_channels[::-1])) * self.rows * self.cols
            )
            one += MAP_PASSES * maps * ITEMSIZE["float32"] / self.rates.pageable
        return self.images * one

    def encode_room(self, room: int) -> int:
        """What of a budget is left for blocks of the text encoder."""
        return room - self.encoder.always - self.around - self.encode_live

    def denoise_room(self, room: int, refiner_stays: bool = False) -> int:
        """What of a budget is left for blocks of the steps.

        The context refiner stays beside the steps, or its blocks come one by one before the first of them,
        in the room of their activations.
        """
        live = sum(self.net.once) + self.denoise_live if refiner_stays else self.visited_live
        return room - self.net.always - self.around - live

    def decode_room(self, room: int, way: Way) -> int:
        """What of a budget is left beside the VAE."""
        return room - self.vae.always - self.around - self.decode_live(way)

    def floors(self) -> dict[str, int]:
        """Least budget of each phase."""
        return {
            "encode": residency.floor(bytes_of(self.encoder.blocks), some=False) - self.encode_room(0),
            "denoise": residency.floor(bytes_of(self.net.blocks)) - self.denoise_room(0),
            "decode": min(-self.decode_room(0, way) for way in self.ways()),
        }

    def floor(self) -> int:
        """Least budget of the whole run."""
        return max(self.floors().values())

    def planes(self) -> int:
        """Bytes of the planes that products of few rows ask for, if there is room."""
        architecture = self.rates.architecture
        image = padded(image_tokens(self.net_config, self.rows, self.cols))
        text = padded(self.caption)

        def tokens(name: str) -> int:
            stack = name.partition(".")[0]
            if ".adaLN_modulation." in name or stack == "t_embedder":
                return self.steps
            return {"layers": image + text, "context_refiner": text, "cap_embedder": text}.get(stack, image)

        wanted = sum(m.planes(self.caption, architecture) for _, m in matrices(self.encoder))
        return wanted + sum(m.planes(tokens(name), architecture) for name, m in matrices(self.net))

    def step_seconds(self) -> float:
        """Compute of one step: all pictures and sides, one after the other."""
        config, item = self.net_config, ITEMSIZE[self.dtype]
        args = (config, self.rows, self.cols, self.caption)
        moved = work.step_traffic(*args, item) + self._unpacking(self.net.blocks)
        one = work.step_flops(*args) / self._rate() + moved / self.rates.bandwidth
        return self.images * self.captions * one

    def encode_seconds(self) -> float:
        """Compute of all captions."""
        flops = work.encode_flops(self.encoder_config, self.caption) / self._rate()
        return self.captions * (flops + self._unpacking(self.encoder.blocks) / self.rates.bandwidth)

    def _unpacking(self, blocks: tuple[Block, ...]) -> int:
        """Bytes read and written to make the weights of blocks dense, once each."""
        item = ITEMSIZE[self.dtype]
        return sum(m.nbytes + m.weights * item for block in blocks for m in block.matrices)

    def _rate(self) -> float:
        return self.rates.flops32 if self.dtype == "float32" else self.rates.flops

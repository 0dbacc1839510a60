"""One run to be planned, with the bytes and seconds that follow from it for any budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zimage_core.config import MIN_TILE, AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.errors import BadArgument, OverBudget
from zimage_core.files.units import in_bytes
from zimage_core.memory import int8_plan, residency
from zimage_core.memory.activations import (
    FLOAT32,
    ITEMSIZE,
    collected_bytes,
    decode_bytes,
    denoise_bytes,
    encode_bytes,
    given_bytes,
    image_tokens,
    images_bytes,
    padded,
)
from zimage_core.memory.allocator import (
    GAPS,
    MIDDLE_SEGMENT,
    MIDDLE_TENSOR,
    OTHER_WORKSPACE,
    PLANE_GAPS,
    SMALL_SEGMENTS,
    SMALL_TENSOR,
    WORKSPACE,
    segment,
)
from zimage_core.memory.plan import PHASES, Phase
from zimage_core.memory.rates import (
    Rates,
    decode_flops,
    encode_flops,
    encode_products,
    known,
    step_flops,
    step_products,
    step_traffic,
)
from zimage_core.memory.references import References
from zimage_core.memory.sizes import Block, Part, Sizes, in_int8, matrices
from zimage_core.quant.dispatch import family

PLAIN_SWIGLU = 10
"""Bytes of SwiGLU in plain torch for each number: float32 copies of both factors, and their product."""
MAP_PASSES = 6
"""How often a map of the image crosses the link at each resolution, where it is kept on the host."""
FINEST = 2.0625 / 8
"""Bytes a weight of the smallest usual quantisation."""

QUANTISING = 1.3
"""Time on a CPU to make int8 rows of packed weights over the time to make them dense, as aimed at."""

Way = tuple[int | None, bool]
"""How to decode: latents a side of the tiles or None, whether maps of the image are kept on the host."""
AT_ONCE: Way = (None, False)


class Job:
    """One run to be planned, with the bytes and seconds that follow from it for any budget.

    Args:
        sizes: Sizes of the networks, and the dtype of the computation.
        width: Pixels, a multiple of VAE factor and patch (16).
        height: Pixels, such a multiple.
        images: Images of the run.
        caption_tokens: Tokens of each caption, template included.
        rates: Rates of the machine; default those known of sm_86.
        guidance: Whether there is a negative side.
        steps: Steps of the run.
        kernels: Whether Triton kernels run on the GPU; plain torch takes more memory.
        workspace: Bytes that the library of products takes for itself, as found; default: as its makers say.
        compute: In which numbers the blocks multiply: "exact", "bfloat16" or "int8".
        threads: Threads of a CPU.
        encoder_compute: The same of the text encoder; None for `compute`.
        image: Whether the run begins from an image, which the VAE encodes before the first step.
        references: Reference images of the run, which the VAE encodes as well.

    Raises:
        BadArgument: A size or number is out of range.
    """

    def __init__(
        self, sizes: Sizes, width: int, height: int, images: int = 1, caption_tokens: int = 128,
        rates: Rates | None = None, guidance: bool = False, steps: int = 8, kernels: bool = True,
        workspace: int | None = None, compute: str = "exact", threads: int = int8_plan.THREADS,
        encoder_compute: str | None = None, image: bool = False, references: References | None = None,
    ) -> None:  # fmt: skip
        self.sizes, self.rates, self.dtype = sizes, rates or known("sm_86"), sizes.dtype
        self.width, self.height, self.images, self.caption = width, height, images, caption_tokens
        self.guidance, self.steps, self.kernels = guidance, steps, kernels
        self.compute, self.int8, self.threads = compute, compute == "int8", threads
        self.encoder_compute = encoder_compute or compute
        self.references = references
        self.image = image or bool(references and references.sizes)
        self.captions = 2 if guidance else 1
        self.net, self.encoder, self.vae = sizes.transformer, sizes.text_encoder, sizes.vae
        net, encoder, vae = self.net.config, self.encoder.config, self.vae.config
        if not isinstance(net, TransformerConfig) or not isinstance(encoder, TextEncoderConfig):
            raise BadArgument("plan: the parts are not those of a Z-Image pipeline")
        if not isinstance(vae, AutoencoderConfig):
            raise BadArgument("plan: the VAE's part is not that of a VAE")
        self.net_config, self.encoder_config, self.vae_config = net, encoder, vae
        self.multiple = vae.spatial_factor * net.patch_size
        for name, value in (("images", images), ("caption tokens", caption_tokens), ("steps", steps)):
            if value < 1:
                raise BadArgument(f"{name}: got {value}, wanted at least 1")
        for name, side in (("width", width), ("height", height)):
            if side < 1 or side % self.multiple:
                raise BadArgument(f"{name}: got {side}, wanted a multiple of {self.multiple}")
        self.rows, self.cols = height // vae.spatial_factor, width // vae.spatial_factor
        self.flops_rate = self.rates.flops32 if self.dtype == "float32" else self.rates.flops
        # height, width and caption of what the transformer gets, all its tokens counted
        self.stream = (self.rows, self.cols, caption_tokens)
        if references is not None:
            self.stream = references.stream(net, self.rows, self.cols)
        rows, cols, caption = self.stream
        tokens = padded(image_tokens(net, rows, cols)) + padded(caption)
        many = {"encode": caption_tokens, "denoise": tokens, "decode": 0}
        how = (self.dtype, self.rates.architecture, kernels, threads)
        self.scratch = {
            phase: int8_plan.scratch_bytes(part, many[phase], *how, self.how(part) == "int8")
            for phase, part in zip(PHASES, (self.encoder, self.net, self.vae), strict=True)
        }
        gpu = self.rates.architecture != "cpu"
        if workspace is None:
            workspace = segment(WORKSPACE.get(family(self.rates.architecture), OTHER_WORKSPACE) if gpu else 0)
        self.workspace = workspace
        self.encode_live = encode_bytes(encoder, caption_tokens, self.dtype, self.captions)
        rest = (caption, self.dtype, images, self.captions, steps)
        self.denoise_live = denoise_bytes(net, rows, cols, *rest)
        if references is not None:
            self.denoise_live += references.beside(net, self.rows, self.cols, self.dtype)
            self.encode_live = encode_bytes(encoder, caption_tokens, self.dtype, self.captions + 3)
        if not kernels:
            self.denoise_live += PLAIN_SWIGLU * tokens * net.hidden_dim
        # a caption alone, and an image of one patch beside it
        refine = denoise_bytes(net, net.patch_size, net.patch_size, *rest)
        on = (self.dtype, self.rates.architecture)
        if self.how(self.encoder) == "int8":
            self.encode_live += int8_plan.x_bytes(encoder, caption_tokens, *on)
        if self.int8:
            self.denoise_live += int8_plan.x_bytes(net, tokens, *on)
            refine += int8_plan.x_bytes(net, padded(caption), *on)
        self.visited_live = max(self.denoise_live, max(self.net.once, default=0) + refine)
        # bytes on the device beside the blocks: the context refiner's blocks come one by one before the
        # first step, in the memory of its activations, or stay beside the steps
        self.encode_need = self.encoder.always + self.around("encode", self.encode_live)
        self.denoise_need = self.net.always + self.around("denoise", self.visited_live)
        stays = self.net.always + sum(self.net.once)
        self.denoise_need_with_refiner = stays + self.around("denoise", self.denoise_live)

    @property
    def shown(self) -> str:
        """What is made, for messages."""
        size, count = f"{self.width} x {self.height} px", len(self.references.sizes) if self.references else 0
        plural = "" if count == 1 else "s"
        return size if not count else f"{size} with {count} reference image{plural}"

    def how(self, part: Part) -> str:
        """In which numbers a network multiplies."""
        return {"transformer": self.compute, "text_encoder": self.encoder_compute}.get(part.name, "exact")

    def products_rate(self, part: Part) -> float:
        """Operations a second in products with the weights of a network's blocks."""
        if self.how(part) == "int8" and self.rates.int8:
            return self.rates.int8
        return self.rates.flops if self.how(part) == "bfloat16" else self.flops_rate

    def gaps(self, phase: str, live: int) -> int:
        """Bytes unused in the segment of a phase's temporary tensors, of which `live` bytes live at once."""
        if self.rates.architecture == "cpu":
            return 0
        between = int(GAPS[phase] * live)
        filled = self.scratch[phase] + live + between
        return between + segment(filled) - filled

    def small(self, phase: str) -> int:
        """Bytes of the segments for small tensors of a phase, and of the rounding of its weights."""
        if self.rates.architecture == "cpu":
            return 0
        latent = self.net_config.in_channels * self.rows * self.cols * FLOAT32
        # predictions of each image and side, in two dtypes: as small tensors they are not among the others
        predictions = 2 * self.images * self.captions * latent if latent <= SMALL_TENSOR else 0
        part = dict(zip(PHASES, (self.encoder, self.net, self.vae), strict=True))[phase]
        rounding = MIDDLE_SEGMENT if part.nbytes < MIDDLE_TENSOR else 0
        return SMALL_SEGMENTS + predictions + rounding

    def around(self, phase: str, live: int) -> int:
        """Bytes beside the weights, where temporary tensors of so many bytes are alive."""
        return live + self.gaps(phase, live) + self.scratch[phase] + self.workspace + self.small(phase)

    def phase(
        self, name: str, weights: int, slots: int, live: int, others: int = 0, planes: int = 0
    ) -> Phase:
        """A phase whose temporary tensors have `live` bytes."""
        apart = (self.workspace, self.gaps(name, live), self.small(name))
        return Phase(name, weights, others, slots, live, self.scratch[name], planes, *apart)

    def decode_live(self, way: Way) -> int:
        """Activations of decoding, finished images among them; of encoding as well, which takes no more."""
        config, rows, cols = self.vae_config, self.rows, self.cols
        during = decode_bytes(config, rows, cols, *way) + images_bytes(config, rows, cols, self.images)
        during += given_bytes(config, rows, cols) if self.image else 0
        shown = set(self.references.sizes) if self.references else ()
        encoding = (decode_bytes(config, *size, *way) + given_bytes(config, *size) for size in shown)
        return max(during, collected_bytes(config, rows, cols, self.images), *encoding)

    def ways(self) -> list[Way]:
        """How to decode, quickest first: at once, in tiles from large to small, with maps on the host."""
        shown = self.references.sizes if self.references else ()
        longest = max(self.rows, self.cols, *(side for size in shown for side in size))
        sides = range((longest - 1) // 8 * 8, MIN_TILE - 1, -8)
        return [AT_ONCE, *((side, False) for side in sides), (MIN_TILE, True)]

    def decode_need(self, way: Way) -> int:
        """Bytes on the device while the VAE decodes."""
        return self.vae.always + self.around("decode", self.decode_live(way))

    def floors(self) -> dict[str, int]:
        """Least budget of each phase."""
        return {
            "encode": self.encode_need + residency.floor(self.encoder.block_bytes, some=False),
            "denoise": self.denoise_need + residency.floor(self.net.block_bytes),
            "decode": min(self.decode_need(way) for way in self.ways()),
        }

    def floor(self) -> int:
        """Least budget of the whole run."""
        return max(self.floors().values())

    def tokens_of(self, part: Part, name: str) -> int:
        """Rows of x in a product of a network, by the name of the module or its block."""
        if part is self.encoder:
            return self.caption
        rows, cols, caption = self.stream
        image, text = padded(image_tokens(self.net_config, rows, cols)), padded(caption)
        stack = name.partition(".")[0]
        if ".adaLN_modulation." in name or stack == "t_embedder":
            return self.steps
        return {"layers": image + text, "context_refiner": text, "cap_embedder": text}.get(stack, image)

    def planes(self, *parts: Part) -> int:
        """Bytes of the planes that products of few rows ask for; default: of both networks that have some."""
        architecture = self.rates.architecture if self.kernels else "cpu"
        planes = sum(
            matrix.planes(self.tokens_of(part, name), architecture)
            for part in parts or (self.encoder, self.net)
            for name, matrix in matrices(part)
            if not (self.how(part) == "int8" and in_int8(name))
        )
        return planes + int(PLANE_GAPS * planes)

    def encode_seconds(self) -> float:
        """Compute of all captions."""
        products = encode_products(self.encoder_config, self.caption)
        rest = encode_flops(self.encoder_config, self.caption) - products
        flops = rest / self.flops_rate + products / self.products_rate(self.encoder)
        moved = self._unpacking(self.encoder, self.encoder.blocks)
        return self.captions * (flops + moved / self.rates.bandwidth)

    def step_seconds(self, kept: Collection[int] = ()) -> float:
        """Compute of one step: all images and sides, one after the other.

        Args:
            kept: Indices of the blocks that are kept as int8 rows.
        """
        args = (self.net_config, *self.stream)
        packed = [block for i, block in enumerate(self.net.blocks) if i not in kept]
        moved = step_traffic(*args, ITEMSIZE[self.dtype]) + self._unpacking(self.net, packed)
        products = step_products(*args)
        flops = (step_flops(*args) - products) / self.flops_rate + products / self.products_rate(self.net)
        return self.images * self.captions * (flops + moved / self.rates.bandwidth)

    def decode_seconds(self, way: Way) -> float:
        """Compute of decoding all images."""
        config, (tile, apart) = self.vae_config, way
        one = decode_flops(config, self.rows, self.cols) / self.rates.flops32
        if tile is not None:  # a convolution's rim, two pixels on each side, is computed twice
            one *= (1 + 4 / (tile * config.spatial_factor)) ** 2
        if apart:
            channels = sum(4**i * c for i, c in enumerate(config.block_out_channels[::-1]))
            maps = channels * self.rows * self.cols
            one += MAP_PASSES * maps * ITEMSIZE["float32"] / self.rates.pageable
        return self.images * one

    def _unpacking(self, part: Part, blocks: Sequence[Block]) -> float:
        """Bytes read and written to make the weights of a network's blocks dense, or int8, once each."""
        cpu, int8 = self.rates.architecture == "cpu", self.how(part) == "int8"
        item = 1 if int8 and not cpu else ITEMSIZE[self.dtype]
        made = [m for block in blocks for m in block.matrices if not (int8 and m.in_rows)]
        moved = sum(m.nbytes + m.weights * item for m in made)
        return QUANTISING * moved if int8 and cpu else moved

    def over_budget(self, vram: int) -> OverBudget:
        """The error that says in one sentence what is needed, what was given, and what would fit."""
        floors = self.floors()
        phase, floor = max(floors.items(), key=lambda item: item[1])
        fits = []
        if smaller := self._largest_image(vram):
            fits.append("an image of {} x {} px".format(*smaller))
        if phase != "decode" and (most := self._largest_block(vram, floors["decode"])):
            here = in_bytes(max(self.net.block_bytes, default=0))
            fits.append(f"a quantisation whose blocks have at most {in_bytes(most)} (here: {here})")
        hint = (
            f"what would fit is {' or '.join(fits)}" if fits else "give as much, no smaller image would fit"
        )
        return OverBudget(
            f"plan: {in_bytes(vram)} of GPU memory are given and {self.shown} need at "
            f"least {in_bytes(floor)} ({phase}, all blocks streamed, VAE in tiles); {hint}"
        )

    def _largest_image(self, vram: int) -> tuple[int, int] | None:
        """The largest image of this shape, or near it, whose floor is within the budget."""
        unit, long = self.multiple, max(self.width, self.height)

        def scaled(count: int) -> tuple[int, int]:
            scale = count * unit / long
            width, height = (max(1, round(side * scale / unit)) * unit for side in (self.width, self.height))
            return width, height

        def floor(width: int, height: int) -> int:
            rest = (
                self.rates, self.guidance, self.steps, self.kernels, self.workspace, self.compute,
                self.threads, self.encoder_compute, self.image, self.references,
            )  # fmt: skip
            return Job(self.sizes, width, height, self.images, self.caption, *rest).floor()

        low, high = 0, long // unit - 1  # low fits, or nothing does
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if floor(*scaled(middle)) <= vram else (low, middle - 1)
        return scaled(low) if low else None

    def _largest_block(self, vram: int, decode_floor: int) -> int:
        """Bytes of a block with which the image would fit; 0 where smaller blocks do not help."""
        most = (vram - max(self.encode_need, self.denoise_need)) // 2 - residency.GRAIN
        weights = max((sum(m.weights for m in block.matrices) for block in self.net.blocks), default=0)
        return most if decode_floor <= vram and most >= weights * FINEST else 0

"""The cases of whole modules: a block, a step of the transformer, a VAE decode, an image."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, peers
from benchmarks.timing import Call, Samples, name_of
from benchmarks.variants import Bench, Variant, run_case, timed
from benchmarks.weights import (
    blank,
    fill_dense,
    fill_int8,
    fill_oracle,
    fill_packed,
    linears,
    relative_error,
)
from zimage_core.config import AutoencoderConfig, TransformerConfig
from zimage_core.formats import BlockFormat
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.transformer import TransformerBlock, ZImageTransformer
from zimage_core.nn.layers import rotation
from zimage_core.nn.linear import tensors_of

BLOCK_LIMIT = 3e-2
"""Largest error of a block in half precision, and of diffusers, which dequantises in float16, in any."""
STEP_LIMIT = 1e-1
"""Largest error of a step in half precision, summed over 34 blocks; a wrong kernel makes it 1."""
INT8_LIMIT = 2e-1
"""The same of a step in int8: a product of random numbers is 1.3 % off, with each block's seven on top."""
MEMBERS = ("packed", "resident", "diffusers")
INT8 = {"int8": False, "int8 kept": True}
"""Steps in int8, on a GPU -> whether int8 rows are kept."""


def stepper(model: nn.Module, latent: Tensor, t: Tensor, caption: Tensor, replay: bool = False) -> Call:
    """One step as a run does it: what all steps have in common was prepared before the first."""
    with torch.no_grad():
        prepared = model.prepare([caption], t.tolist(), (latent.shape[-2], latent.shape[-1]))
    predict = None
    if replay:
        from zimage_core.nn.cuda_graphs import StepGraphs

        predict = StepGraphs(model.predict)
    image = latent[:, 0].to(model.dtype)

    def run(i: int) -> Tensor:
        with torch.no_grad():
            return model.step(image, prepared, 0, predict=predict).unsqueeze(1)

    return run


def family(
    bench: Bench, build: Callable[[], nn.Module], fmt: BlockFormat
) -> dict[str, tuple[nn.Module | None, str]]:
    """Four modules over one set of weights: packed, resident, diffusers' Linear, and the float32 oracle.

    A module is None where it cannot take part; the text beside it says why.
    """
    device, dtype = bench.device, bench.dtype
    packed = fill_packed(blank(build, dtype, device, dtype), fmt, dtype, device)
    found: dict[str, tuple[nn.Module | None, str]] = {"packed": (packed, "")}
    needed = sum(m.in_features * m.out_features for _, m in linears(packed)) * dtype.itemsize
    if bench.gpu and needed > 0.8 * torch.cuda.mem_get_info(device)[0]:
        found["resident"] = (None, f"skipped: {needed / 2**30:.0f} GiB do not fit")
    else:
        found["resident"] = (fill_dense(blank(build, dtype, device, dtype), packed, dtype), "")
    if missing := peers.why_no_diffusers(fmt):
        found["diffusers"] = (None, missing)
    else:
        theirs = blank(build, dtype, device, dtype)
        found["diffusers"] = (peers.with_diffusers(theirs, packed, dtype), "")
    found["oracle"] = (fill_oracle(blank(build, torch.float32, device, dtype), packed), "")
    return found


def _nbytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(model))


def block(bench: Bench, fmt: BlockFormat, rows: int, config: TransformerConfig) -> None:
    """One modulated block over `rows` tokens."""
    device, dtype = bench.device, bench.dtype
    members = family(bench, lambda: TransformerBlock(config, modulated=True), fmt)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, config.dim, device=device, generator=generator).to(dtype)
    temb = torch.randn(config.adaln_dim, device=device, generator=generator).to(dtype)
    side = max(1, int(rows**0.5))
    positions = [torch.ones(rows), torch.arange(rows) // side, torch.arange(rows) % side]
    limits = torch.tensor(config.axes_lens) - 1
    places = torch.stack(positions, 1).long().clamp(max=limits)
    angles = tuple(t.to(device) for t in rotation(places, config.axes_dims, config.rope_theta))
    with torch.no_grad():
        want = members["oracle"][0](x.float(), angles, temb.float())
    nbytes = _nbytes(members["packed"][0]) + 2 * x.numel() * dtype.itemsize
    matrices = [c for c in cases.block_linears(config=config) if c.name.startswith("layers.")]
    weights = sum(c.weights for c in matrices) // config.n_layers
    flops = 2.0 * rows * weights + 4.0 * rows**2 * config.dim
    variants = []
    for name in MEMBERS:
        module, note = members[name]

        def call(i: int, module: nn.Module | None = module) -> Tensor:
            with torch.no_grad():
                return module(x, angles, temb)

        limit = BLOCK_LIMIT if name == "diffusers" else bench.limit(BLOCK_LIMIT, 1e-4)
        variants.append(_checked(name, module and call, want, limit, nbytes, note))
    head = {"what": "block", "case": "block", "format": fmt.name, "m": rows, "n": config.hidden_dim}
    run_case(bench, head | {"k": config.dim}, variants, flops, "resident")


def step_flops(pixels: int, caption: int, config: TransformerConfig) -> float:
    """Operations of one step."""
    size = (pixels, caption, config)
    return 1e12 * cases.teraflops([*cases.step_linears(*size), *cases.step_attention(*size)])


def step(bench: Bench, fmt: BlockFormat, pixels: int, caption: int, config: TransformerConfig) -> None:
    """One step of the whole transformer: packed weights, eager and replayed, resident, diffusers' Linear."""
    device, dtype = bench.device, bench.dtype
    members = family(bench, lambda: ZImageTransformer(config), fmt)
    generator = torch.Generator(device).manual_seed(0)
    side = pixels // AutoencoderConfig().spatial_factor
    latent = torch.randn(config.in_channels, 1, side, side, device=device, generator=generator)
    t = torch.full((1,), 0.5)  # on the host, where it is read
    words = torch.randn(caption, config.cap_feat_dim, device=device, generator=generator).to(dtype)
    with torch.no_grad():
        want = members["oracle"][0]([latent], t, [words.float()])[0]
    rows = cases.image_rows(pixels, config) + cases.padded(caption)
    flops = step_flops(pixels, caption, config)
    nbytes = _nbytes(members["packed"][0])
    variants = []
    for name in MEMBERS:
        model, note = members[name]
        limit = STEP_LIMIT if name == "diffusers" else bench.limit(STEP_LIMIT, 1e-3)
        call = model and stepper(model, latent, t, words)
        variants.append(_checked(name, call, want, limit, nbytes, note))
        if model is not None and bench.gpu and name in bench.given.replay:
            replayed = stepper(model, latent, t, words, replay=True)
            variants.append(_checked(f"{name} replayed", replayed, want, limit, nbytes))
    for name, kept in INT8.items() if bench.gpu else ():
        model = fill_int8(
            blank(lambda: ZImageTransformer(config), dtype, device, dtype), members["packed"][0], device, kept
        )
        variants.append(_checked(name, stepper(model, latent, t, words), want, INT8_LIMIT, nbytes))
        replayed = stepper(model, latent, t, words, replay=True)
        variants.append(_checked(f"{name} replayed", replayed, want, INT8_LIMIT, nbytes))
    head = {"what": "step", "case": step_name(pixels, caption, config), "format": fmt.name, "m": rows}
    run_case(bench, head | {"n": config.hidden_dim, "k": config.dim}, variants, flops, "resident")


def step_name(pixels: int, caption: int, config: TransformerConfig) -> str:
    """The case of a step in the table."""
    return f"{config.n_layers}+{2 * config.n_refiner_layers} blocks, {pixels} px, caption {caption}"


def _checked(
    name: str, call: Call | None, want: Tensor, limit: float, nbytes: float, note: str = ""
) -> Variant:
    """A variant whose result is `want`."""
    error = (lambda: relative_error(call(0), want)) if call else None
    return Variant(name, call, error, limit, nbytes, capture=False, note=note)


def vae(bench: Bench, pixels: int, config: AutoencoderConfig) -> None:
    """The VAE's decoder on random weights: whole, in tiles of 32 and 16 latents, and diffusers' decoder."""
    device, dtype = bench.device, bench.dtype
    theirs, note = None, "skipped: diffusers is not installed"
    if peers.has("diffusers"):
        from tests.helpers.parity import autoencoder_pair

        (theirs, ours), note = autoencoder_pair(config, 0.01), ""
        theirs.to(device, dtype)
    else:
        ours = Autoencoder(config).eval()
    side = pixels // config.spatial_factor
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, config.latent_channels, side, side, generator=generator).to(device)
    with torch.no_grad():
        want = ours.to(device).decode(z)
    ours, z = ours.to(dtype), z.to(dtype)

    def call(i: int, tile: int | None = None) -> Tensor:
        with torch.no_grad():
            return ours.decode(z, tile)

    def diffusers(i: int) -> Tensor:
        with torch.no_grad():
            return theirs.decode(z).sample

    calls = {"whole": call} | {f"tiles of {tile}": partial(call, tile=tile) for tile in (32, 16)}
    calls["diffusers"] = theirs and diffusers
    limit, nbytes = bench.limit(STEP_LIMIT, 1e-3), _nbytes(ours.decoder)
    variants = [
        _checked(name, run, want, limit, nbytes, note if run is None else "") for name, run in calls.items()
    ]
    run_case(bench, {"what": "vae", "case": f"{pixels} px", "m": side * side}, variants, 0.0, "diffusers")


def image(bench: Bench, files: tuple[Path, Path, Path] | None, pixels: int | None, steps: int | None) -> None:
    """Seconds of each phase of an image: of the given files, or of the embedded model."""
    from zimage_core import ZImagePipeline

    begin = time.perf_counter()
    if files is None:
        pipe = ZImagePipeline.from_default(device=bench.device, dtype=bench.dtype)
    else:
        pipe = ZImagePipeline.from_files(*files, device=bench.device, dtype=bench.dtype)
    phases: dict[str, list[float]] = {"open": [time.perf_counter() - begin]}
    about: dict[str, Any] = {"seed": 0, "height": pixels, "width": pixels, "num_inference_steps": steps}
    note = ""
    for repeat in range(max(2, bench.given.image_repeats + 1)):
        result = pipe("a lighthouse on a cliff at dusk", output_type="pt", **about)
        if not torch.isfinite(torch.as_tensor(result.images)).all():
            note = "refused: the image is not finite"
            break
        spent, first = result.timings, "" if repeat else "first "
        for phase, seconds in (
            ("encode", [spent.encode]),
            ("step", spent.steps[: None if repeat else 1]),
            ("decode", [spent.decode]),
            ("total", [spent.total]),
        ):
            phases.setdefault(first + phase, []).extend(seconds)
    name = "embedded model" if files is None else files[0].name
    head = {"what": "image", "variant": "zimage_core", "m": pixels or "", "note": note}
    head["dtype"] = name_of(bench.dtype)
    bench.results.add(
        head
        | {"case": f"{name}: {phase}"}
        | ({} if note else {**timed(Samples(tuple(seconds))), "count": len(seconds)})
        for phase, seconds in phases.items()
    )

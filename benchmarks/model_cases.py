"""The cases of whole modules: one block, one step of the transformer, one picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import cases, peers
from benchmarks.contest import Bench, Contestant, contest
from benchmarks.timing import Samples
from benchmarks.weights import (
    blank,
    fill_dense,
    fill_oracle,
    fill_packed,
    linears,
    relative_error,
)
from zimage_core.config import TransformerConfig
from zimage_core.formats import BlockFormat
from zimage_core.models.transformer import TransformerBlock, ZImageTransformer
from zimage_core.nn.linear import tensors_of
from zimage_core.nn.rope import rotation

BLOCK_LIMIT = 3e-2
"""A block's error in half precision, and of diffusers, which dequantises in float16, in any."""
STEP_LIMIT = 1e-1
"""A step's error in half precision, summed over 34 blocks; a wrong kernel makes it 1."""


def stepper(
    model: nn.Module, latent: Tensor, t: Tensor, caption: Tensor, replay: bool = False
) -> Callable[[int], Tensor]:
    """One step as a run does it: the caption refined and the rotation made once, before the first step.

    Raises:
        ImportError: A replay is asked for and the package has no graphs.
    """
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
    bench: Bench, build: Callable[[], nn.Module], fmt: BlockFormat, least: int
) -> dict[str, tuple[nn.Module | None, str]]:
    """The same weights four times: packed, resident, diffusers' Linear, and the float32 oracle."""
    device, dtype = bench.device, bench.dtype
    packed = fill_packed(blank(build, dtype, device, dtype), fmt, dtype, device, least)
    found: dict[str, tuple[nn.Module | None, str]] = {"packed": (packed, "")}
    bytes_needed = sum(m.in_features * m.out_features for _, m in linears(packed)) * dtype.itemsize
    if bench.gpu and bytes_needed > 0.8 * torch.cuda.mem_get_info(device)[0]:
        found["resident"] = (None, f"skipped: {bytes_needed / 2**30:.0f} GiB do not fit")
    else:
        found["resident"] = (fill_dense(blank(build, dtype, device, dtype), packed, dtype), "")
    missing = peers.why_no_diffusers(fmt)
    if missing:
        found["diffusers"] = (None, f"skipped: {missing}")
    else:
        theirs = blank(build, dtype, device, dtype)
        found["diffusers"] = (peers.with_diffusers(theirs, packed, dtype), "")
    found["oracle"] = (fill_oracle(blank(build, torch.float32, device, dtype), packed), "")
    return found


def block(bench: Bench, fmt: BlockFormat, rows: int, config: TransformerConfig, least: int = 0) -> None:
    """One modulated block over `rows` tokens."""
    device, dtype = bench.device, bench.dtype
    members = family(bench, lambda: TransformerBlock(config, modulated=True), fmt, least)
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, config.dim, device=device, generator=generator).to(dtype)
    temb = torch.randn(config.adaln_dim, device=device, generator=generator).to(dtype)
    side = max(1, int(rows**0.5))
    positions = torch.stack(
        [torch.ones(rows), torch.arange(rows) // side, torch.arange(rows) % side], 1
    ).long()
    limits = torch.tensor(config.axes_lens) - 1
    turn = tuple(
        t.to(device) for t in rotation(positions.clamp(max=limits), config.axes_dims, config.rope_theta)
    )
    with torch.no_grad():
        want = members["oracle"][0](x.float(), turn, temb.float())
    nbytes = _nbytes(members["packed"][0]) + 2 * x.numel() * dtype.itemsize
    weights = sum(c.n * c.k for c in _block_matrices(config))
    flops = 2.0 * rows * weights + 4.0 * rows**2 * config.dim
    found = []
    for name in ("packed", "resident", "diffusers"):
        module, note = members[name]
        if module is None:
            found.append(Contestant(name, note=note))
            continue

        def run(i: int, module: nn.Module = module) -> Tensor:
            with torch.no_grad():
                return module(x, turn, temb)

        limit = BLOCK_LIMIT if name == "diffusers" else bench.limit(BLOCK_LIMIT, 1e-4)
        check = lambda run=run: relative_error(run(0), want)  # noqa: E731
        found.append(Contestant(name, run, check, limit, nbytes, capture=False))
    head = {"what": "block", "case": "block", "format": fmt.name, "m": rows, "n": config.hidden_dim}
    contest(bench, head | {"k": config.dim}, found, flops, bench.given.baseline or "resident")


def _block_matrices(config: TransformerConfig) -> list[cases.LinearCase]:
    """The seven large matrices of one block, each by itself."""
    block = [c for c in cases.block_linears(config=config) if c.name.startswith("layers.")]
    return [c for c in block for _ in range(c.count // config.n_layers)]


def _nbytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(model))


def step(
    bench: Bench, fmt: BlockFormat, pixels: int, caption: int, config: TransformerConfig, least: int = 0
) -> None:
    """One step of the whole transformer: packed weights, eager and replayed, resident, diffusers' Linear."""
    device, dtype = bench.device, bench.dtype
    members = family(bench, lambda: ZImageTransformer(config), fmt, least)
    generator = torch.Generator(device).manual_seed(0)
    side = pixels // 8
    latent = torch.randn(config.in_channels, 1, side, side, device=device, generator=generator)
    t = torch.full((1,), 0.5)  # on the host, where it is read
    words = torch.randn(caption, config.cap_feat_dim, device=device, generator=generator).to(dtype)
    with torch.no_grad():
        want = members["oracle"][0]([latent], t, [words.float()])[0]
    packed = members["packed"][0]
    rows = cases.image_rows(pixels, config) + cases.padded(caption)
    flops = 1e12 * (
        cases.teraflops(cases.block_linears(pixels, caption, config))
        + cases.teraflops(cases.small_linears(pixels, caption, config))
        + cases.teraflops(cases.attention(pixels, caption, config))
    )
    nbytes = _nbytes(packed)
    found: list[Contestant] = []

    def add(name: str, run: Callable[[int], Tensor], peer: bool = False) -> None:
        limit = STEP_LIMIT if peer else bench.limit(STEP_LIMIT, 1e-3)
        found.append(
            Contestant(name, run, lambda: relative_error(run(0), want), limit, nbytes, capture=False)
        )

    for name in ("packed", "resident", "diffusers"):
        model, note = members[name]
        if model is None:
            found.append(Contestant(name, note=note))
            continue

        add(name, stepper(model, latent, t, words), name == "diffusers")
        if bench.gpu and name in bench.given.replay:
            try:
                add(f"{name} replayed", stepper(model, latent, t, words, replay=True))
            except ImportError:
                found.append(Contestant(f"{name} replayed", note="skipped: the package has no graphs"))
    layers = f"{config.n_layers}+{2 * config.n_refiner_layers} blocks, {pixels} px, caption {caption}"
    head = {"what": "step", "case": layers, "format": fmt.name, "m": rows, "n": config.hidden_dim}
    contest(bench, head | {"k": config.dim}, found, flops, bench.given.baseline or "resident")


def image(bench: Bench, files: tuple[Path, Path, Path] | None, pixels: int | None, steps: int | None) -> None:
    """Seconds of each phase of a picture: of the given files, or of the embedded model."""
    from zimage_core import ZImagePipeline

    begin = time.perf_counter()
    if files is None:
        pipe = ZImagePipeline.from_default(device=bench.device, dtype=bench.dtype)
    else:
        pipe = ZImagePipeline.from_files(*files, device=bench.device, dtype=bench.dtype)
    opened = time.perf_counter() - begin
    about: dict[str, Any] = {"seed": 0, "height": pixels, "width": pixels, "num_inference_steps": steps}
    phases: dict[str, list[float]] = {"encode": [], "step": [], "decode": [], "total": []}
    first: dict[str, float] = {"open": opened}
    note = ""
    for repeat in range(max(2, bench.given.image_repeats + 1)):
        result = pipe("a lighthouse on a cliff at dusk", output_type="pt", **about)
        spent = result.timings
        if not torch.isfinite(torch.as_tensor(result.images)).all():
            note = "refused: the picture is not finite"
            break
        if repeat == 0:
            first |= {"first encode": spent.encode, "first step": spent.steps[0], "first total": spent.total}
            continue
        phases["encode"].append(spent.encode)
        phases["step"] += spent.steps
        phases["decode"].append(spent.decode)
        phases["total"].append(spent.total)
    name = "embedded model" if files is None else files[0].name
    head = {"what": "image", "case": name, "contestant": "zimage_core", "m": pixels or "", "note": note}
    head["dtype"] = str(bench.dtype).removeprefix("torch.")
    rows = []
    for phase, seconds in (first | phases).items():
        values = Samples(tuple(seconds) if isinstance(seconds, list) else (seconds,), "wall")
        if not values.seconds or note:
            rows.append(head | {"case": f"{name}: {phase}"})
            continue
        rows.append(
            head | {
                "case": f"{name}: {phase}", "how": "wall", "median_us": values.median * 1e6,
                "p20_us": values.quantile(0.2) * 1e6, "p80_us": values.quantile(0.8) * 1e6,
                "count": len(values.seconds),
            }
        )  # fmt: skip
    bench.results.add(rows)

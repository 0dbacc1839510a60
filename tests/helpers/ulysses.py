"""Runs of one process and of several ranks, of small models with 30, 16 and 2 heads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from tests.helpers import controls, tiny
from tests.helpers.model_files import TOY_DIT, stored, write_gguf
from zimage_core import ZImagePipeline, load_transformer, pipeline
from zimage_core.config import TransformerConfig
from zimage_core.errors import NonFinite
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.parallel.group import Group, Link
from zimage_core.parallel.ulysses import Ulysses
from zimage_core.run.denoise import Denoiser
from zimage_core.weights import names

HEADS_30: dict[str, Any] = {
    **tiny.TRANSFORMER, "dim": 180, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [2, 2, 2],
}  # fmt: skip
HEADS_16 = replace(TOY_DIT, n_heads=16, axes_dims=(4, 6, 6))
"""Rows of 256, which K-quants divide."""
SIZE = {"height": 96, "width": 112}
"""6 x 7 patches and 22 pads: neither the rows nor the tokens divide by 5, nor the tokens by 3."""


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        make: Function that makes the pipeline.
        call: Arguments of the call.
        guided_apart: Whether the two sides of guidance are on two halves of the ranks.
    """

    make: Callable[..., ZImagePipeline]
    call: Mapping[str, Any] = field(default_factory=dict)
    guided_apart: bool = False


@cache
def heads_30(dtype: torch.dtype = torch.float32, net: str = "") -> ZImagePipeline:
    pipe = tiny.pipeline(dtype=dtype)
    transformer = ZImageTransformer(TransformerConfig.from_json(HEADS_30))
    pipe.transformer = tiny._randomised(transformer, 0, 0.05).to(dtype)
    if net:
        pipe.load_controlnet(controls.draw(controls.controlnet(net, HEADS_30), 7, 0.05), "net")
    return pipe


@cache
def packed(folder: Path, compute: str = "exact") -> ZImagePipeline:
    """Q4_K, without a text encoder."""
    path = folder / "transformer.gguf"
    if not path.exists():
        shapes = names.checkpoint_shapes(names.transformer_table(HEADS_16, "fused"))
        write_gguf(path, stored(shapes, matrix="Q4_K"), {"general.architecture": "lumina2"})
    return ZImagePipeline(transformer=load_transformer(path, compute=compute))


@cache
def embedded(lora: bool = False, net: bool = False, **options: Any) -> ZImagePipeline:
    """The embedded model, which has 2 heads."""
    pipe = ZImagePipeline.from_default(**options)
    if lora:
        pipe.load_lora("outline")
    if net:
        pipe.load_controlnet("edges")
    return pipe


@cache
def broken() -> ZImagePipeline:
    """NaN in one weight."""
    pipe = heads_30.__wrapped__()
    with torch.no_grad():
        pipe.transformer.layers[1].feed_forward.w2.weight[3, 5] = float("nan")
    return pipe


def picture(seed: int = 1) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (96, 112, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask() -> Image.Image:
    values = np.zeros((96, 112), np.uint8)
    values[20:70, 30:90] = 255
    return Image.fromarray(values)


def embeds() -> list[torch.Tensor]:
    return [torch.randn(37, 256, generator=torch.Generator().manual_seed(4))]


def cases(folder: Path) -> dict[str, Case]:
    """Every case of 30 or 16 heads by its name."""
    guided = {"guidance_scale": 2.0, "negative_prompt": "a long text that fills more than one row of tokens"}
    wide, drawn = heads_30, {"prompt": "a"}
    two = {"prompt": ["a", "a longer prompt, whose caption has more tokens than the other one has"]}
    return {
        "one image": Case(wide, drawn),
        "one row of patches a rank": Case(wide, {**drawn, "width": 48}),
        "batch of two": Case(wide, two),
        "guidance": Case(wide, {**two, **guided}),
        "guidance of some steps": Case(wide, {**drawn, **guided, "cfg_truncation": 0.5}),
        "heun": Case(wide, {**drawn, "sampler": "heun"}),
        "dpmpp_2m_sde": Case(wide, {**drawn, "sampler": "dpmpp_2m_sde"}),
        "float64": Case(partial(wide, torch.float64), drawn),
        "bfloat16": Case(partial(wide, torch.bfloat16), drawn),
        "float16": Case(partial(wide, torch.float16), drawn),
        "image to image": Case(wide, {**drawn, "image": picture(), "strength": 0.7}),
        "inpainting": Case(wide, {**drawn, "image": picture(), "mask_image": mask()}),
        **{
            f"ControlNet {kind}": Case(partial(wide, net=kind), {**drawn, "control_image": picture()})
            for kind in controls.VARIANTS
        },
        **{f"Q4_K {mode}": Case(partial(packed, folder, mode), {"prompt_embeds": embeds()})
           for mode in ("exact", "bfloat16", "int8")},
        "NaN": Case(broken, drawn),
    }  # fmt: skip


def cases_of_two(ram: int) -> dict[str, Case]:
    """Cases of the embedded model, for two ranks; `ram` is the least for a small image."""
    drawn = {"prompt": "a red circle", "height": 80, "width": 112}
    small = {**drawn, "height": 48, "width": 64}
    return {
        "embedded": Case(embedded, drawn),
        "LoRA": Case(partial(embedded, lora=True), drawn),
        "LoRA and ControlNet": Case(
            partial(embedded, lora=True, net=True), {**drawn, "control_image": picture()}
        ),
        "memory limit": Case(partial(embedded, ram=ram), small),
        "embedded int8": Case(partial(embedded, compute="int8"), drawn),
        "reference images": Case(
            partial(embedded, omni=True), {**drawn, "reference_images": [picture(), picture(2)]}
        ),
    }  # fmt: skip


def guided_apart() -> dict[str, Case]:
    """Cases of guidance whose sides are on two halves of the ranks."""
    call = cases(Path())["guidance"].call
    return {
        "sides apart": Case(heads_30, call, guided_apart=True),
        "sides apart, none in some steps": Case(heads_30, {**call, "cfg_truncation": 0.5}, guided_apart=True),
    }


def drawn(case: Case, parallel: Ulysses | None = None) -> torch.Tensor | str:
    """The latents of a run, or the message of its error."""

    def made(*given: Any) -> Denoiser:
        return Denoiser(*given[:-1], parallel)

    call = {**SIZE, "num_inference_steps": 4, "seed": 3, "output_type": "latent", **case.call}
    with warnings.catch_warnings(), patch.object(pipeline, "Denoiser", made):
        warnings.simplefilter("ignore")
        try:
            return case.make()(**call).images
        except NonFinite as error:
            return str(error)


def _rank(rank: int, size: int, folder: Path, wanted: Mapping[str, Case]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    link, cpu = Link(range(size), 600.0), torch.device("cpu")
    every = Ulysses(Group(link, range(size), cpu))
    half = size // 2
    if size % 2 == 0:
        side = range(half) if rank < half else range(half, size)
        apart = Ulysses(Group(link, side, cpu), Group(link, (rank % half, rank % half + half), cpu))
    torch.save(
        {name: drawn(case, apart if case.guided_apart else every) for name, case in wanted.items()},
        folder / f"{rank}.pt",
    )
    dist.destroy_process_group()


def on_ranks(size: int, folder: Path, wanted: Mapping[str, Case]) -> list[dict[str, torch.Tensor | str]]:
    """What each of `size` processes draws, by the names of the cases."""
    torch.multiprocessing.spawn(_rank, (size, folder, wanted), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]

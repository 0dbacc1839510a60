"""Small packed models on disk, of several blocks and formats, and what it takes to stream them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import torch

from tests.helpers.model_files import TOY_DIT, encoder_metadata, stored, toy_encoder, write_gguf
from zimage_core.memory.attach import maps_of, on_host, stream_model
from zimage_core.memory.device import Device
from zimage_core.memory.stream import Stream
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights import names
from zimage_core.weights.load import opened_file

DIT = replace(TOY_DIT, n_layers=5, n_refiner_layers=2)
"""7 blocks in a step."""
ENCODER = toy_encoder(num_layers=6)
"""5 layers that run."""
TIMEOUT = 120
"""Seconds after which a thread counts as stuck."""


def transformer_file(folder: Path, matrix: str = "Q4_K", other: str = "Q8_0") -> Path:
    """A GGUF whose odd layers are stored in another format than the even ones."""
    shapes = names.checkpoint_shapes(names.transformer_table(DIT, "fused"))
    content, second = (
        stored(shapes, matrix=matrix),
        stored(shapes, matrix=other, seed=1),
    )
    odd = [name for name in shapes if name.startswith(("layers.1.", "layers.3."))]
    content.tensors |= {name: second.tensors[name] for name in odd}
    return write_gguf(folder / "transformer.gguf", content, {"general.architecture": "lumina2"})


def encoder_file(folder: Path, matrix: str = "Q4_K") -> Path:
    content = stored(names.checkpoint_shapes(names.text_encoder_table(ENCODER, "gguf")), matrix=matrix)
    return write_gguf(folder / "encoder.gguf", content, encoder_metadata(ENCODER))


@torch.no_grad()
def draw(model: ZImageTransformer, steps: int = 2, images: int = 1, seed: int = 0) -> torch.Tensor:
    """What a run does with a transformer, one member of the batch after the other, caption by caption."""
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(16, 1, 4, 6, generator=g) for _ in range(images)]
    captions = [torch.randn(5 + i, DIT.cap_feat_dim, generator=g) for i in range(images)]
    for step in range(steps):
        t = torch.full((images,), step / steps)
        out = model([v.to(model.device) for v in x], t, captions)
        x = [v + 0.1 * o.float().cpu() for v, o in zip(x, out, strict=True)]
    return torch.stack(x)


@torch.no_grad()
def encode(model: TextEncoder, ids: tuple[int, ...] = (1, 2, 63, 5)) -> torch.Tensor:
    return model(torch.tensor(ids)).cpu()


def streamed(model, resident=(), device="cpu", **options) -> Stream:
    """The model streamed from the file that it was loaded from."""
    return stream_model(model, opened_file(model).file, resident, device, **options)


def our_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(("zimage-stream", "zimage-read"))]


def ringed(**options):
    """Through a ring of several chunks a block, as on a GPU."""
    return {"through": Device(staged=True), "ring": 1 << 18, **options}


def at_home(model):
    """The packed weights of streamed blocks are views of the map again."""
    streamed = model.stream.streamed if isinstance(model.stream, Stream) else range(len(model.blocks))
    maps = maps_of(opened_file(model).file)
    return all(
        on_host(m.weight.packed, maps).source is not None
        for i in streamed
        for name, m in model.blocks[i].named_modules()
        if isinstance(getattr(m, "weight", None), QuantTensor) and "adaLN" not in name
    )

"""The messages that docs/reference/errors.md shows, each made by what a user would have done.

Run as a module, it rewrites the page.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

import zimage_core
from benchmarks.report import fill_tables
from tests.helpers import stand_ins, tiny
from tests.helpers.tree import ROOT
from zimage_core.batch.dataset import generate_dataset
from zimage_core.run.device_faults import explained

PAGE = ROOT / "docs" / "reference" / "errors.md"
ENCODER, TRANSFORMER, VAE = stand_ins.ENCODER, stand_ins.TRANSFORMER, stand_ins.VAE
GPU = torch.device("cuda", 0)


def _truncated() -> None:
    Path("half.gguf").write_bytes(Path(TRANSFORMER).read_bytes()[:900_000])
    zimage_core.load_transformer("half.gguf")


def _web_page() -> None:
    Path("page.gguf").write_text("<!DOCTYPE html><html>Sign in</html>")
    zimage_core.load_transformer("page.gguf")


def _pointer() -> None:
    Path("pointer.gguf").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\n")
    zimage_core.load_transformer("pointer.gguf")


def _other_encoder() -> None:
    """A text encoder of another width than the transformer's captions."""
    tiny.folder(Path("tiny"))
    encoder = "tiny/text_encoder/model.safetensors"
    zimage_core.ZImagePipeline.from_files(TRANSFORMER, encoder, VAE, tokenizer="tiny/tokenizer")


def _edited_file() -> None:
    tensors = load_file("turbo.safetensors")
    tensors.pop("context_refiner.0.attention.out.weight")
    save_file({**tensors, "extra.weight": torch.zeros(2)}, "edited.safetensors")
    zimage_core.load_transformer("edited.safetensors")


def _bad_rows() -> None:
    rows = (
        '{"prompt": "a red circle", "seed": 1}\n{"prompt": "a star", "seed": -1}\n{"prompt": "", "size": 3}\n'
    )
    Path("rows.jsonl").write_text(rows)
    generate_dataset("rows.jsonl", "out")


def _infinite_weight() -> None:
    pipe = zimage_core.ZImagePipeline.from_default()
    layer = pipe.transformer.layers[2].attention.to_q
    layer.weight = torch.nn.Parameter(layer.weight.dequantize() * float("inf"), requires_grad=False)
    pipe("a red circle", seed=1)


def _called_from_its_callback() -> None:
    def again(pipe: Any, *rest: Any) -> Any:
        pipe("a blue circle")

    zimage_core.ZImagePipeline.from_default()("a red circle", callback_on_step_end=again)


def _of_the_gpu(text: str) -> Callable[[], None]:
    """What torch says is in `text`; no GPU is needed to explain it, for its memory is made up."""

    def memory(device: torch.device) -> tuple[int, int]:
        return 200 << 20, 6 << 30

    def fail() -> None:
        with mock.patch.multiple("torch.cuda", mem_get_info=memory, memory_reserved=lambda device: 5 << 30):
            raise explained(RuntimeError(text), GPU, limited=False)

    return fail


def _without_gpu() -> None:
    with mock.patch("torch.cuda.is_available", return_value=False):
        _files(device="cuda")


def _files(**options: Any) -> Any:
    return zimage_core.ZImagePipeline.from_files(TRANSFORMER, ENCODER, VAE, **options)


CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "truncated": ("BadFile", _truncated),
    "web page": ("BadFile", _web_page),
    "pointer": ("BadFile", _pointer),
    "vae as transformer": ("WrongModel", lambda: zimage_core.load_transformer(VAE)),
    "other encoder": ("WrongModel", _other_encoder),
    "rows": ("BadRows", _bad_rows),
    "edited file": ("BadWeights", _edited_file),
    "format": ("UnknownFormat", lambda: zimage_core.dequantize(torch.zeros(144, dtype=torch.uint8), "Q9_K")),
    "shape": ("BadShape", lambda: zimage_core.encode(torch.zeros(3, 100), "Q4_K")),
    "size": (
        "BadArgument",
        lambda: zimage_core.ZImagePipeline.from_default()("a red circle", height=81, width=80),
    ),
    "no gpu": ("Unsupported", _without_gpu),
    "over budget": ("OverBudget", lambda: _files(ram="200MB")("a red circle")),
    "infinity": ("NonFinite", _infinite_weight),
    "busy": ("Busy", _called_from_its_callback),
    "driver": ("DeviceFault", _of_the_gpu("CUDA error: an illegal memory access was encountered")),
    "no memory": ("OutOfMemory", _of_the_gpu("CUDA error: out of memory")),
}
"""Name of a message on the page -> its class and how it comes about."""


def messages() -> dict[str, str]:
    """Name -> the message as a block of the page."""
    with _folder():
        return {name: _block(*case) for name, case in CASES.items()}


def _block(kind: str, fail: Callable[[], Any]) -> str:
    try:
        fail()
    except zimage_core.ZImageError as error:
        if type(error).__name__ != kind:
            raise AssertionError(f"{kind} was expected") from error
        return f"> **{kind}:** {error}"
    raise AssertionError(f"{kind} did not come")


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    """A folder with the stand-ins as the current one, no GPU, and no warnings."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stand_ins.make(Path(folder))
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def without_figures(text: str) -> str:
    """The text with sizes in bytes left out, which depend on the machine."""
    return re.sub(r"[\d.,]+ (kB|MB|GB)", "N bytes", text)


if __name__ == "__main__":
    fill_tables(PAGE, messages())

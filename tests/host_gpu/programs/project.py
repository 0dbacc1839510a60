"""What the programs know of the project: how a pipeline is opened, and what is patched out.

Kernels compute nothing, so a value that the host reads back from the device means nothing. Checks of such
values are answered here, after they were read: launches and synchronisations stay what they are.

- `torch.isfinite` of a tensor on the device: true. Asked for the result of every step and of the VAE.
- `Tensor.min` and `.max` of a whole tensor on the device: 0. Asked for token numbers before they are looked
  up.
- cuDNN: it is the real library and would ask the real driver. Convolutions allocate their result and launch
  nothing; their workspace is missing from every figure. Attention takes the flash kernel where a real sm_90
  may take cuDNN's.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from zimage_core import ZImagePipeline
from zimage_core.weights.source import Source

PROMPT = "a small red circle on the left of a blue background"
MIB = 1 << 20


class _Answered:
    """A value on the device that is read like any other, and answered by another."""

    def __init__(self, value, answer):
        self._value, self._answer = value, answer

    def all(self):
        return _Answered(self._value.all(), self._answer)

    def __bool__(self):
        self._value.item()
        return bool(self._answer)

    def __int__(self):
        self._value.item()
        return int(self._answer)


def _answered(function, answer):
    def patched(tensor, *arguments, **options):
        value = function(tensor, *arguments, **options)
        return _Answered(value, answer) if tensor.is_cuda and not arguments and not options else value

    return patched


def patch_out():
    """Call it before a pipeline is opened."""
    warnings.filterwarnings("ignore", ".*were never written to the disk.*")  # sparse_models.py
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    nn.Conv2d.forward = _convolution
    torch.isfinite = _answered(torch.isfinite, True)
    torch.Tensor.min = _answered(torch.Tensor.min, 0)
    torch.Tensor.max = _answered(torch.Tensor.max, 0)


def read_nothing():
    """Call it when a pipeline is open: weights are read as whatever the memory holds, in no time.

    For files of holes on a device to which no copy moves anything.
    """
    Source.read_into = lambda source, offset, target: None
    Source.advise_willneed = Source.advise_dontneed = lambda source, offset, count: None


def _convolution(layer, x):
    """The memory that cuDNN's convolution gives back, without its workspace."""
    sides = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.padding, strict=True)
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (x.shape[0], layer.out_channels, height, width), device=x.device, dtype=x.dtype,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


def arguments(description):
    """A parser with the choice of a model."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--files", type=Path, metavar="FOLDER", help="a folder of model files; default: nano model"
    )
    parser.add_argument("--pixels", type=int, help="height and width; default: the model's own")
    return parser


def open_pipeline(folder=None, **options):
    """The nano model inside the package, or the files of a folder."""
    if folder is None:
        return ZImagePipeline.from_default(**options)
    return ZImagePipeline.from_pretrained(folder, **options)


def picture(pipe, pixels=None, steps=2, output_type="np", prompt=PROMPT, **options):
    """One run; its result."""
    return pipe(prompt, pixels, pixels, num_inference_steps=steps, seed=1, output_type=output_type, **options)


def answer(**found):
    """Print what a program found, as JSON on the last line; the tests read it."""
    print(json.dumps(found), flush=True)

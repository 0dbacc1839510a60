"""Does each read of a streamed weight see that weight's bytes, whatever the delays of the streams?

    ordering.py [--files FOLDER] [--rounds 3]

Weights go through a ring of pinned memory to the device, those of streamed blocks into a few slots there.
In place of each kernel that dequantises, a copy is queued on the stream of the computation: it holds what
the kernel would have read. Then three waits are left out, one at a time: each must give wrong bytes, or
this program is blind.
"""

from __future__ import annotations

import random
import sys
import threading
from unittest import mock

import fake_cuda

fake_cuda.settings(FAKE_SEED=1)

import project
import torch

from zimage_core.kernels import dequantize as kernels
from zimage_core.memory.attach import stream_model, unstream
from zimage_core.memory.device import CudaDevice
from zimage_core.memory.stream import READER
from zimage_core.nn.linear import Linear
from zimage_core.quant import dispatch
from zimage_core.quant.tensor import QuantTensor
from zimage_core.weights.load import opened_file

STEPS = 3
SLOW = {"copies": {"copy_us": 1000}, "computation": {"launch_us": 100}}
"""What lags behind the host and behind the other stream -> delays."""
KEPT = 1 << 30
"""Bytes of copies after which they are compared."""


class Reads:
    """What the kernels of a network would have read, beside what ought to be there."""

    def __init__(self, model):
        self.total = self.wrong = 0
        self._truth = {
            layer: layer.weight.packed.clone().view(-1)
            for layer in model.modules()
            if isinstance(layer, Linear) and isinstance(layer.weight, QuantTensor)
        }
        self._hooks = [layer.register_forward_pre_hook(self._enter) for layer in self._truth]
        self._kept, self._size = [], 0
        self._layer, self._start = None, 0

    def _enter(self, layer, _):
        """Before a layer runs: its next reads begin at its first byte."""
        self._layer, self._start = layer, 0

    def kernel(self, out, packed, fmt):
        """Stands for `dequantize_into`: what is copied is what is there when the stream comes to it."""
        copy = torch.empty_like(packed)
        copy.copy_(packed, non_blocking=True)
        self._kept.append((self._layer, self._start, copy))
        self._start += copy.nbytes
        self._size += copy.nbytes

    def compare(self, always=True):
        if not always and self._size < KEPT:
            return
        torch.cuda.synchronize()
        for layer, start, copy in self._kept:
            self.total += 1
            seen = copy.cpu().view(torch.uint8).view(-1)  # kernels read words of several bytes
            self.wrong += not torch.equal(seen, self._truth[layer][start : start + len(seen)])
        self._kept, self._size = [], 0

    def end(self):
        for hook in self._hooks:
            hook.remove()


def run(model, call, rounds, slow, stop_when_wrong=False):
    """Calls of a network with random parts of it streamed -> (reads, wrong reads)."""
    fake_cuda.set_delays(any_us=20, **SLOW[slow])
    reads, draw = Reads(model), random.Random(0)
    file = opened_file(model).file
    with mock.patch.object(kernels, "dequantize_into", reads.kernel), torch.no_grad():
        for number in range(rounds):
            stream_model(
                model,
                file,
                [i for i in range(len(model.blocks)) if draw.random() < 0.3],
                "cuda",
                slots=number % 3 + 1,
                ring=1 << draw.choice((16, 17, 18)),
                refiner_stays=draw.random() < 0.5,
            )
            for _ in range(STEPS):
                call()
                reads.compare(always=False)
            reads.compare()
            unstream(model)
            if reads.wrong and stop_when_wrong:
                break
    reads.end()
    return reads.total, reads.wrong


def without_wait(queue):
    """Work of a queue no longer waits for that of the other queue."""
    original = CudaDevice.order

    def order(self, which, event):
        if which != queue:
            original(self, which, event)

    return mock.patch.object(CudaDevice, "order", order)


def without_ring():
    """The reading thread fills memory again from which a copy is not done."""
    original = CudaDevice.wait

    def wait(self, event):
        if not threading.current_thread().name.startswith(READER):
            original(self, event)

    return mock.patch.object(CudaDevice, "wait", wait)


MUTATIONS = {
    "the computation does not wait for the copy": (lambda: without_wait("compute"), "copies"),
    "the copy does not wait for the computation": (lambda: without_wait("copy"), "computation"),
    "the ring does not wait for the copy": (without_ring, "copies"),
}
"""Name -> the mutation and what has to lag for it to matter."""


def main():
    parser = project.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    project.patch_out()
    dispatch.MODE = "dequantise"
    pipe = project.open_pipeline(args.files, device="cpu", dtype="bfloat16")
    config = pipe.transformer.config
    captions = [torch.zeros(20, config.cap_feat_dim, device="cuda", dtype=torch.bfloat16)]
    latents = [torch.zeros(config.in_channels, 1, 8, 8, device="cuda")]
    ids = torch.arange(20)
    networks = {
        "transformer": (pipe.transformer, lambda: pipe.transformer(latents, torch.tensor([0.5]), captions)),
        "text_encoder": (pipe.text_encoder, lambda: pipe.text_encoder(ids)),
    }
    found = {
        f"{name}, slow {slow}": run(*network, args.rounds, slow)
        for name, network in networks.items()
        for slow in SLOW
    }
    mutated = {}
    for name, (mutation, slow) in MUTATIONS.items():
        with mutation():
            mutated[name] = run(*networks["transformer"], args.rounds, slow, stop_when_wrong=True)
    project.answer(runs=found, mutations=mutated)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""With a device that lags behind its host, weights are complete when read, and no wait is superfluous."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from tests.helpers.streamed import streamed
from zimage_core.memory.attach import unstream
from zimage_core.memory.device import Device

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


class Lagging(Device):
    """Copies and computations are done later, each queue in its order, after random delays.

    Args:
        seed: Of the delays.
        slow: The queue whose work takes long.
        without: A wait that is left out: "copy" or "compute" of `order`, or "ring".
    """

    def __init__(self, seed, slow, without=""):
        super().__init__(staged=True)
        self.random, self.slow, self.without = random.Random(seed), slow, without
        self.queues = {name: ThreadPoolExecutor(1, "lagging") for name in ("copy", "compute")}

    def later(self, queue, work):
        most = {"copy": 2e-3, "compute": 4e-2}[queue] if queue == self.slow else 1e-4
        delay = self.random.uniform(0, most)
        return self.queues[queue].submit(lambda: (time.sleep(delay), work())[1])

    def copy(self, host, target):
        self.later("copy", lambda: Device.copy(self, host, target))

    def record(self, queue):
        return self.queues[queue].submit(time.perf_counter)

    def order(self, queue, event):
        if queue != self.without:
            self.queues[queue].submit(event.result)

    def wait(self, event):
        if self.without != "ring":
            event.result()

    def seconds(self, event):
        return event.result()

    def close(self):
        for pool in self.queues.values():
            pool.shutdown()


def wrong_reads(dit, device, order, slots):
    """How many of the weights that a computation reads have other bytes than the file has."""
    homes = {
        i: [(layer, layer.weight.packed.clone()) for layer in block.modules() if hasattr(layer, "assign")]
        for i, block in enumerate(dit.blocks)
    }
    reads = []

    def read(weights, wanted):
        return [torch.equal(weight, home) for weight, home in zip(weights, wanted, strict=True)]

    stream = streamed(dit, (1,), through=device, slots=slots, ring=1 << 18)
    for index in order:
        with stream.block(index):
            weights = [layer.weight.packed for layer, _ in homes[index]]
            wanted = [home for _, home in homes[index]]
            reads.append(device.later("compute", partial(read, weights, wanted)))
    right = [each for future in reads for each in future.result()]
    unstream(dit)
    device.close()
    assert len(right) == sum(len(homes[i]) for i in order)
    return right.count(False)


STEPS = [*range(7)] * 3
ASTRAY = [0, 1, 2, 5, 6, 0, 1, 0, 1, 2, 3, 3, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("slow", ["copy", "compute"])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("order", [STEPS, ASTRAY], ids=["steps", "astray"])
def test_no_read_sees_other_bytes(dit, order, slots, slow):
    assert wrong_reads(dit, Lagging(0, slow), order, slots) == 0


@pytest.mark.parametrize(("without", "slow"), [("copy", "compute"), ("compute", "copy"), ("ring", "copy")])
def test_without_one_of_the_waits_some_do(dit, without, slow):
    assert any(wrong_reads(dit, Lagging(seed, slow, without), STEPS, 2) for seed in range(5))

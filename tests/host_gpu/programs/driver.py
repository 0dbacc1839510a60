"""Does the driver itself keep the rules that the other programs rely on?"""

from __future__ import annotations

import sys

import fake_cuda

fake_cuda.settings(
    FAKE_MB=1024, FAKE_CONTEXT_MB=300, FAKE_DEVICES=2, FAKE_NO_COPY=1, FAKE_FAIL="host_alloc:2:2"
)

import project
import torch

MIB = project.MIB


def error_of(call):
    """First line of the error in which a call ends."""
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def pinned():
    return torch.empty(4 * MIB, dtype=torch.uint8, pin_memory=True)


def main():
    found = {"contexts before": [fake_cuda.has_context(0), fake_cuda.has_context(1)]}
    ones = torch.ones(4 * MIB, device="cuda:1")
    found["contexts"] = [fake_cuda.has_context(0), fake_cuda.has_context(1)]
    found["free"] = torch.cuda.mem_get_info(1)[0]
    found["used"] = fake_cuda.used(1)
    found["copied"] = int((torch.ones(8).to("cuda:1").cpu() != 0).sum())
    first = pinned()
    found["second pinned"], found["third pinned"] = error_of(pinned), error_of(pinned)
    del first
    fake_cuda.take(100 * MIB, device=1)
    found["free beside another program"] = torch.cuda.mem_get_info(1)[0]
    fake_cuda.take(1 << 40, at_malloc=1)
    found["nothing left"] = error_of(lambda: torch.empty(40 * MIB, device="cuda:1"))[:18]
    fake_cuda.take(-(1 << 40), device=1)
    fake_cuda.fail("malloc", 1, fake_cuda.OUT_OF_MEMORY)
    found["survived"] = error_of(lambda: torch.empty(20 * MIB, dtype=torch.uint8, device="cuda:1"))
    before = fake_cuda.counts()
    int(ones[0].item())
    calls = fake_cuda.counts() - before
    found["waits of an item"] = sum(calls[wait] for wait in fake_cuda.WAITS)
    fake_cuda.fail("synchronize", 2, fake_cuda.ILLEGAL_ADDRESS, sticky=True)
    found["synchronisations"] = [error_of(lambda: torch.cuda.synchronize(1)) for _ in range(3)]
    found["allocation after it"] = error_of(lambda: torch.empty(64 * MIB, device="cuda:1"))
    project.answer(**found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

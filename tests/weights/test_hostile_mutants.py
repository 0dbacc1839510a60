"""Random mutants of small files: what the readers accept is sound.

They find little beyond the structured lies of test_hostile.py, and are kept because they cost little.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tests.weights.test_hostile import HUGE, base
from tests.weights.test_safetensors import entry, raw
from zimage_core.errors import BadFile, UnknownFormat
from zimage_core.weights.opened import open_weights
from zimage_core.weights.scan import scan

MUTANTS = 800


def mutate(data: bytes, hot: int, rng: np.random.Generator) -> bytes:
    """One to three random changes, most of them in the first `hot` bytes."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, max(1, min(hot, len(out)))))
        choice = int(rng.integers(0, 6))
        if choice == 0 and out:
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif choice == 1:
            out[at : at + 4] = struct.pack(
                "<I", int(rng.choice([0, 1, 127, 255, 65535, 1 << 31, (1 << 32) - 1]))
            )
        elif choice == 2:
            out[at : at + 8] = struct.pack(
                "<Q", [0, 1 << 31, 1 << 32, 1 << 62, 1 << 63, HUGE][rng.integers(0, 6)]
            )
        elif choice == 3:
            del out[at : at + int(rng.integers(1, 64))]
        elif choice == 4:
            out[at:at] = rng.bytes(int(rng.integers(1, 64)))
        else:
            source = int(rng.integers(0, len(out) + 1))
            out[at : at + 32] = out[source : source + 32]
    return bytes(out)


@pytest.mark.parametrize("container", ["gguf", "safetensors"])
def test_random_mutants_are_refused_or_read_to_the_end(tmp_path, container):
    """Only the two errors escape, and what is accepted lies inside the file and can be read."""
    if container == "gguf":
        writer = base()
        data = writer.build()
        hot = writer.marks["data"]
    else:
        header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("BF16", (8,), (16, 32))}
        data = raw(header, bytes(range(32)))
        hot = len(data) - 32
    path = tmp_path / f"model.{container}"
    accepted, messages = 0, []
    for seed in range(MUTANTS):
        path.write_bytes(mutate(data, hot, np.random.default_rng(seed)))
        try:
            with open_weights(path, mmap=False) as file:
                for info in file.tensors.values():
                    assert 0 <= info.offset <= info.offset + info.nbytes <= file.size, f"seed {seed}"
                    assert file.tensor(info.name).packed.numel() == info.nbytes
                for value in file.metadata.values():
                    if not isinstance(value, (int, float, str)):
                        value.tolist()
                if seed % 10 == 0:
                    scan(file)
        except (BadFile, UnknownFormat) as error:
            messages.append(str(error))
        else:
            accepted += 1
    assert all(str(path) in message and message.isprintable() for message in messages)
    assert 0 < accepted < MUTANTS, "mutants that are all refused or all accepted test nothing"

"""Full-size model files with true headers and holes in place of weights: seconds to write, no disk.

    python -m tests.host_gpu.sparse_models FOLDER [MIX...]

Each mix gets a folder with Z-Image's transformer (6.15 G weights), Qwen3-4B with its tokenizer, and the VAE.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.make_full_size import Options, make

MIXES = ("Q4_K_M", "Q3_K_S", "Q8_0")


def write_models(folder: Path, mix: str = "Q4_K_M", layers: int = 30) -> Path:
    """Write what is missing of a mix's three files -> their folder."""
    made = folder / (mix if layers == 30 else f"{mix}-{layers}")
    make(made, layers, options=Options(mix, sparse=True))
    return made


if __name__ == "__main__":
    for each in sys.argv[2:] or MIXES:
        print(write_models(Path(sys.argv[1]), each))

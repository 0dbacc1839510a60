"""Tokens a second of a language model on a CPU by mode of `few_rows`, beside llama.cpp in the same run.

    python -m benchmarks.decoding FILE.gguf [MORE.gguf] --peer PYTHON [--threads 1 2] [--rounds 7]
    python -m benchmarks.decoding --wide FOLDER --peer PYTHON

PYTHON is one that has llama_cpp; without it only our own modes are measured. In each round, every mode and
llama.cpp read the same few tokens one by one, in turn. One thread is measured by its CPU time, which other
programs disturb less; more threads by the wall clock. --wide writes random Qwen3-4B files in the types of
Q4_K_M with 2 and 6 layers and the whole head, so that the time of 36 layers can be told from the difference.
Writes results/decoding_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import make_full_size
from benchmarks.report import arguments, write
from benchmarks.timing import spread
from zimage_core.config import TextEncoderConfig
from zimage_core.cpu.capability import features, rates_of_one_row
from zimage_core.models.language_model import LanguageModel
from zimage_core.nn.decoding import ReadyWeights
from zimage_core.nn.linear import packed_weights
from zimage_core.weights.language import load_language_model

MODES = ("slabs", "exact", "bfloat16", "int8")
PROMPT = tuple(range(100, 116))
WIDE = (2, 6)
"""Layers of the wide files."""
Seconds = Callable[[Sequence[int]], tuple[list[float], list[float]]]
"""Tokens -> seconds of each, of the wall clock and of CPU time."""


class Ours:
    """Our language model in one mode, which has read the prompt."""

    def __init__(self, model: LanguageModel, mode: str) -> None:
        self.model, self.ready = model, None if mode == "slabs" else ReadyWeights(model, mode, 1 << 62)
        self.cache = model.new_cache()
        with torch.inference_mode():
            model(torch.tensor(PROMPT), self.cache)

    def __call__(self, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        """Seconds of each token."""
        if self.ready is None:
            return self._run(tokens)
        with self.ready.bound():
            return self._run(tokens)

    def _run(self, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        wall, cpu = [], []
        clock = time.thread_time if torch.get_num_threads() == 1 else time.process_time
        with torch.inference_mode():
            for token in tokens:
                start = time.perf_counter(), clock()
                self.model(torch.tensor([token]), self.cache)
                wall.append(time.perf_counter() - start[0])
                cpu.append(clock() - start[1])
        return wall, cpu


@contextmanager
def peer(python: str, path: Path, threads: int, facts: dict[str, Any]) -> Iterator[Seconds]:
    """llama.cpp in a process of its own, which has read the prompt and waits."""
    command = [python, str(Path(__file__).with_name("decoding_peer.py")), str(path), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        send, answers = process.stdin, process.stdout

        def ask(question: dict[str, Any]) -> Any:
            send.write(json.dumps(question) + "\n")
            send.flush()
            return json.loads(answers.readline())

        def seconds(tokens: Sequence[int]) -> tuple[list[float], list[float]]:
            found = ask({"tokens": list(tokens)})
            return found["wall"], found["cpu"]

        facts["llama.cpp"] = ask({"read": list(PROMPT)})
        yield seconds
        send.close()


def measure(path: Path, args: argparse.Namespace, threads: int, facts: dict[str, Any]) -> dict[str, Any]:
    """All modes and the peer on one file with a number of threads."""
    torch.set_num_threads(threads)
    model = load_language_model(path)
    packed = {id(each): each.nbytes for each in packed_weights(model)}
    sides: dict[str, Seconds] = {mode: Ours(model, mode) for mode in args.modes}
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in [*sides, "llama.cpp"]}

    def rounds(sides: dict[str, Seconds]) -> None:
        for turn in range(args.rounds + 1):
            for name, side in sides.items():
                count = 2 if name == "slabs" else args.tokens
                found = side([200 + (turn * count + i) % 1000 for i in range(count)])
                if turn:
                    for own, new in zip(taken[name], found, strict=True):
                        own += new

    if args.peer:
        with peer(args.peer, path, threads, facts) as theirs:
            rounds(sides | {"llama.cpp": theirs})
    else:
        rounds(sides)
    size = sum(packed.values())
    found: dict[str, Any] = {"packed_bytes": size, "clock": "CPU" if threads == 1 else "wall"}
    for name, (wall, cpu) in taken.items():
        used = cpu if threads == 1 else wall
        if not used:
            continue
        middle = sorted(used)[len(used) // 2]
        found[name] = {
            "seconds": spread(used) | {"median": middle, "least": min(used)},
            "wall": spread(wall),
            "tokens/s": round(1 / middle, 2),
            "GB/s": round(1e-9 * size / middle, 2),
        }
        side = sides.get(name)
        if isinstance(side, Ours) and side.ready is not None:
            found[name] |= {"prepare_s": round(side.ready.seconds, 2), "extra_bytes": side.ready.nbytes}
    return found


def wide_files(folder: Path) -> list[Path]:
    """Random Qwen3-4B files of a few layers, which are written where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for layers in WIDE:
        paths.append(folder / f"qwen3_4b_{layers}_layers_q4_k_m.gguf")
        if not paths[-1].exists():
            make_full_size.write_text_encoder(paths[-1], TextEncoderConfig(num_layers=layers))
    return paths


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, "decoding_cpu.json")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--wide", type=Path, metavar="FOLDER", help="write and measure random Qwen3-4B files")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has llama_cpp")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a round")
    args = parser.parse_args()
    rates = rates_of_one_row()
    facts: dict[str, Any] = {"cpu": features(), "one_row": vars(rates), "files": {}}
    for path in [*args.files, *(wide_files(args.wide) if args.wide else [])]:
        for threads in args.threads:
            found = facts["files"].setdefault(path.name, {})
            found[f"{threads} threads"] = measure(path, args, threads, facts)
            print(
                path.name,
                threads,
                {k: v["tokens/s"] for k, v in found[f"{threads} threads"].items() if isinstance(v, dict)},
            )
            write(args.out, facts)


if __name__ == "__main__":
    main()

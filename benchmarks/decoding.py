"""Tokens a second of a language model on a CPU by mode of `few_rows`, beside llama.cpp in the same run.

    python -m benchmarks.decoding FILE.gguf [MORE.gguf] --wide FOLDER --greedy FILE.gguf --peer PYTHON

PYTHON is one that has llama_cpp; without it only our own modes are measured. Every mode and llama.cpp read
the same few tokens one by one, round after round in turn. One thread is measured by its CPU time, which
other programs disturb less; more threads (--threads 1 2) by the wall clock, with llama.cpp's threads asleep
while it waits. --wide writes random Qwen3-4B files in the types of Q4_K_M with 2 and 6 layers and the whole
head, so that the time of 36 layers can be told from the difference. With --greedy FILE, 100 tokens after each
of three prompts are compared with those of float32 as well. Writes results/decoding_cpu.json anew, from this
run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import make_full_size
from benchmarks.report import arguments, markdown, write
from benchmarks.timing import spread
from zimage_core.config import TextEncoderConfig
from zimage_core.cpu import int4, packed_int8
from zimage_core.cpu.capability import features, rates_of_one_row
from zimage_core.models.language_model import LanguageModel
from zimage_core.nn.decoding import ReadyWeights, ready_for_decoding
from zimage_core.nn.linear import packed_weights
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.language import load_language_model
from zimage_core.weights.opened import open_weights

MODES = ("slabs", "exact", "bfloat16", "int8", "auto")
PROMPT = tuple(range(100, 116))
WIDE = (2, 6)
"""Layers of the wide files."""
Ask = Callable[[dict[str, Any]], Any]
Seconds = Callable[[Sequence[int]], tuple[list[float], list[float]]]
"""Tokens -> seconds of each, of the wall clock and of CPU time."""


class Ours:
    """Our language model in one mode, which has read the prompt."""

    def __init__(self, model: LanguageModel, mode: str) -> None:
        started = time.process_time()
        self.model, self.ready = model, None if mode == "slabs" else ReadyWeights(model, mode, 1 << 62)
        self.prepare_s = time.process_time() - started
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
def peer(python: str, path: Path, threads: int, facts: dict[str, Any]) -> Iterator[tuple[Ask, Seconds]]:
    """llama.cpp in a process of its own, which has read the prompt: to ask it, and to measure it."""
    command = [python, str(Path(__file__).with_name("decoding_peer.py")), str(path), str(threads)]
    quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait would spin on our cores
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=quiet) as process:
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
        yield ask, seconds
        send.close()


def measure(path: Path, args: argparse.Namespace, threads: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Each mode on one file with a number of threads, in turn with llama.cpp."""
    torch.set_num_threads(threads)
    model = load_language_model(path)
    packed = {id(each): each.nbytes for each in packed_weights(model)}
    found: dict[str, Any] = {"packed_bytes": sum(packed.values()), "clock": "CPU" if threads == 1 else "wall"}
    with peer(args.peer, path, threads, facts) if args.peer else nullcontext((None, None)) as (ask, theirs):
        for mode in args.modes:
            own = Ours(model, mode)
            sides: dict[str, Seconds] = {mode: own}
            if ask is not None and theirs is not None:
                ask({"read": list(PROMPT)})
                sides["llama.cpp"] = theirs
            taken = _in_turn(sides, args.rounds, 2 if mode == "slabs" else args.tokens)
            figures = {name: _figures(found, *times) for name, times in taken.items()}
            found[mode] = figures[mode]
            if own.ready is not None:
                made = {"prepare_s": round(own.prepare_s, 2), "extra_bytes": own.ready.nbytes}
                found[mode] |= made
            if mode in ("bfloat16", "auto"):
                found[mode]["without products"] = round(without_products(own, args.rounds), 6)
            if "llama.cpp" in figures:
                found[mode]["llama.cpp"] = figures["llama.cpp"]
                ratio = found[mode]["tokens/s"] / figures["llama.cpp"]["tokens/s"]
                found[mode]["times llama.cpp"] = round(ratio, 2)
            print(path.name, threads, mode, found[mode]["tokens/s"], found[mode].get("times llama.cpp"))
            del own, sides
    return found


def without_products(own: Ours, rounds: int) -> float:
    """CPU seconds of a token whose products with nibbles and int8 rows are taken from the token before."""
    kept: dict[int, Tensor] = {}
    nibbles, rows = int4.multiply, packed_int8.multiply

    def of_nibbles(x: Tensor, planes: int4.Planes, scales: Tensor) -> Tensor:
        found = kept.get(id(planes))
        return kept.setdefault(id(planes), nibbles(x, planes, scales)) if found is None else found

    def of_rows(x: Tensor, packed: Any) -> Tensor:
        found = kept.get(id(packed))
        return kept.setdefault(id(packed), rows(x, packed)) if found is None else found

    try:
        int4.multiply, packed_int8.multiply = of_nibbles, of_rows
        own([200])
        return float(np.median(own([200] * 4 * rounds)[1]))
    finally:
        int4.multiply, packed_int8.multiply = nibbles, rows


def _in_turn(
    sides: dict[str, Seconds], rounds: int, tokens: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of all tokens of each side, round after round; the first round does not count."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            wall, cpu = side([200 + turn * tokens + i for i in range(tokens)])
            if turn:
                taken[name][0].extend(wall)
                taken[name][1].extend(cpu)
    return taken


def _figures(about: dict[str, Any], wall: list[float], cpu: list[float]) -> dict[str, Any]:
    used = sorted(cpu if about["clock"] == "CPU" else wall)
    middle = used[len(used) // 2]
    return {
        "seconds": spread(used) | {"median": round(middle, 6), "least": round(used[0], 6)},
        "wall": spread(wall),
        "tokens/s": round(1 / middle, 2),
        "GB/s": round(1e-9 * about["packed_bytes"] / middle, 2),
    }


TEXTS = ("A lighthouse on a cliff at dusk", "Once upon a time", "The capital of France is")
WRITTEN = 100


@torch.inference_mode()
def greedy(path: Path, python: str | None) -> dict[str, Any]:
    """How the tokens of each mode, and llama.cpp's, differ from those of slabs in float32.

    Each side reads the tokens that float32 has chosen, so that all logits are those of the same text.
    """
    model = load_language_model(path)
    with open_weights(path) as file:
        prompts = [Tokenizer.from_gguf(file).encode(text) for text in TEXTS]
    wanted = [_forced(model, ids, None) for ids in prompts]
    found: dict[str, Any] = {"prompts": list(TEXTS), "tokens": WRITTEN * len(prompts)}
    for mode in MODES[1:]:
        with ready_for_decoding(model, mode):
            own = [_forced(model, ids, tokens)[1] for ids, (tokens, _) in zip(prompts, wanted, strict=True)]
        found[mode] = _apart(own, [logits for _, logits in wanted])
    if python:
        own = []
        with peer(python, path, 1, {}) as (ask, _), tempfile.TemporaryDirectory() as folder:
            for ids, (tokens, _) in zip(prompts, wanted, strict=True):
                ask({"read": ids})
                ask({"tokens": tokens, "save": f"{folder}/logits.npy"})
                own.append(torch.from_numpy(np.load(f"{folder}/logits.npy")))
        found["llama.cpp"] = _apart(own, [logits for _, logits in wanted])
    return found


def _apart(own: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, Any]:
    """Equal tokens, the first other one of each text with the gap of the best two there, error of logits."""
    equal, first = 0, []
    for mine, logits in zip(own, wanted, strict=True):
        differ = (mine.argmax(1) != logits.argmax(1)).nonzero().flatten().tolist()
        equal += len(logits) - len(differ)
        best = logits.topk(2).values
        gaps = (best[:, 0] - best[:, 1]).tolist()
        first.append({"token": differ[0], "gap": round(gaps[differ[0]], 4)} if differ else None)
    mine, logits = torch.cat(list(own)), torch.cat(list(wanted))
    error = (mine - logits).norm(dim=1) / logits.norm(dim=1)
    return {"equal": equal, "first difference": first, "error of logits": float(error.median())}


def _forced(
    model: LanguageModel, ids: Sequence[int], tokens: Sequence[int] | None
) -> tuple[list[int], Tensor]:
    """Tokens after a prompt, and the logits of each: the most likely ones, or those that are given."""
    cache = model.new_cache()
    logits, chosen = [model(torch.tensor(ids), cache)[0]], list(tokens or [])
    for i in range(WRITTEN):
        if tokens is None:
            chosen.append(int(logits[-1].argmax()))
        logits.append(model(torch.tensor([chosen[i]]), cache)[0])
    return chosen, torch.stack(logits[:WRITTEN])


def wide_files(folder: Path) -> list[Path]:
    """Random Qwen3-4B files of a few layers, which are written where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for layers in WIDE:
        paths.append(folder / f"qwen3_4b_{layers}_layers_q4_k_m.gguf")
        if not paths[-1].exists():
            make_full_size.write_text_encoder(paths[-1], TextEncoderConfig(num_layers=layers))
    return paths


def tables(report: Mapping[str, Any]) -> dict[str, str]:
    """Speed of each mode on each file, a whole Qwen3-4B from the wide ones, and what modes do to tokens."""
    return {"decoding": _speed(report), "decoding tokens": _tokens(report["greedy"])}


def _speed(report: Mapping[str, Any]) -> str:
    rows = []
    for key in dict.fromkeys(key for found in report["files"].values() for key in found):
        own = {name: found[key] for name, found in report["files"].items() if key in found}
        threads = key.split()[0]
        for name in sorted(name for name in own if "layers" not in name):
            rows += [[name.split(".")[0], threads, *row] for row in _rows(own[name])]
        few, more = (next((own[n] for n in own if f"_{count}_layers" in n), None) for count in WIDE)
        if few is not None and more is not None:
            whole = _rows(_whole(few, more))
            rows += [["Qwen3-4B Q4_K_M, 36 layers from 2 and 6", threads, *row] for row in whole]
    return markdown(
        "file | threads | mode | tokens/s | GB/s of weights | times llama.cpp | CPU seconds to prepare "
        "| GB beside",
        rows,
    )


def _rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for mode in (mode for mode in MODES if mode in found):
        own = found[mode]
        cells = ("tokens/s", "GB/s", "times llama.cpp", "prepare_s", "extra_bytes")
        speed, rate, ratio, seconds, extra = (own.get(cell) for cell in cells)
        made = ["" if seconds is None else f"{seconds:.1f}", "" if extra is None else f"{extra / 1e9:.2f}"]
        yield [mode, f"{speed:.3g}", f"{rate:.2g}", f"{ratio:.2f}" if ratio else "", *made]


def _whole(few: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """36 layers and the head, from files of 2 and of 6 layers."""

    def grown(a: float, b: float) -> float:
        return a + (36 - WIDE[0]) * (b - a) / (WIDE[1] - WIDE[0])

    found: dict[str, Any] = {}
    size = grown(few["packed_bytes"], more["packed_bytes"])
    for mode in (mode for mode in MODES if mode in few and mode in more):
        pair = few[mode], more[mode]
        seconds = grown(*(each["seconds"]["median"] for each in pair))
        found[mode] = {"tokens/s": 1 / seconds, "GB/s": 1e-9 * size / seconds}
        for cell in ("prepare_s", "extra_bytes"):
            if all(cell in each for each in pair):
                found[mode][cell] = grown(*(each[cell] for each in pair))
        theirs = [_llama(each) for each in (few, more)]
        if all(theirs):
            found[mode]["times llama.cpp"] = grown(*theirs) / seconds
    return found


def _llama(found: Mapping[str, Any]) -> float:
    """llama.cpp's seconds of a token, the median of its turns with all modes: 36 layers enlarge noise."""
    turns = [found[mode].get("llama.cpp") for mode in MODES if mode in found]
    return float(np.median([turn["seconds"]["median"] for turn in turns if turn] or [0.0]))


def _tokens(report: Mapping[str, Any]) -> str:
    (found,) = report.values()
    rows = []
    for name in (*MODES, "llama.cpp"):
        if name in found:
            own = found[name]
            gaps = [first["gap"] for first in own["first difference"] if first]
            at = ", ".join(f"{gap:.2g}" for gap in gaps) or "none differs"
            rows.append([name, f"{own['equal']} of {found['tokens']}", at, f"{own['error of logits']:.1e}"])
    return markdown(
        "arithmetic | equal tokens | gap of the best two logits at the first other one | error of logits",
        rows,
    )


def main() -> None:
    """Measure and write."""
    parser = arguments(__doc__, "decoding_cpu.json")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--wide", type=Path, metavar="FOLDER", help="write and measure random Qwen3-4B files")
    parser.add_argument("--peer", metavar="PYTHON", help="a Python that has llama_cpp")
    parser.add_argument("--threads", nargs="*", type=int, default=[1])
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a round")
    parser.add_argument("--greedy", type=Path, metavar="FILE", help="compare its tokens too")
    args = parser.parse_args()
    facts: dict[str, Any] = {"cpu": features(), "one_row": vars(rates_of_one_row()), "files": {}}
    paths = [*args.files, *(wide_files(args.wide) if args.wide else [])]
    for threads in args.threads:
        facts[f"load before {threads} threads"] = [round(load, 2) for load in os.getloadavg()]
        for path in paths:
            found = facts["files"].setdefault(path.name, {})
            found[f"{threads} threads"] = measure(path, args, threads, facts)
    if args.greedy:
        torch.set_num_threads(max(args.threads))
        facts["greedy"] = {args.greedy.name: greedy(args.greedy, args.peer)}
    write(args.out, facts)


if __name__ == "__main__":
    main()

"""Decode with llama.cpp on command; `benchmarks.decoding` runs it with the Python that has llama_cpp.

    PYTHON benchmarks/decoding_peer.py FILE.gguf THREADS

Reads lines of JSON from stdin and answers each with one: {"read": ids} reads a text anew and answers what
llama.cpp is; {"tokens": ids} reads these one by one and answers their seconds, of the wall clock and of the
process. Nothing is sampled: both sides are given the same tokens.
"""

from __future__ import annotations

import json
import sys
import time

import llama_cpp


def main() -> None:
    """Answer until the input ends."""
    threads = int(sys.argv[2])
    model = llama_cpp.Llama(
        sys.argv[1], n_threads=threads, n_threads_batch=threads, n_ctx=1024, verbose=False
    )
    for line in sys.stdin:
        asked = json.loads(line)
        if "read" in asked:
            model.reset()
            model.eval(asked["read"])
            answer = {
                "version": llama_cpp.__version__,
                "system": llama_cpp.llama_print_system_info().decode(),
            }
        else:
            wall, cpu = [], []
            for token in asked["tokens"]:
                start = time.perf_counter(), time.process_time()
                model.eval([token])
                wall.append(time.perf_counter() - start[0])
                cpu.append(time.process_time() - start[1])
            answer = {"wall": wall, "cpu": cpu}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

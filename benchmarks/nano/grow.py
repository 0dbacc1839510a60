"""Give a text encoder's file the control tokens around an image, which the Omni sibling's prompts have.

    python -m benchmarks.nano.grow [--file zimage_core/assets/nano/text_encoder.gguf]

The rows of both tokens are copies of <|im_start|>'s, since they stand where it stood: before a prompt. All
other bytes of all tensors stay, so nothing else that is encoded changes. A file that has the tokens stays
as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from benchmarks.nano.export import ASSETS, CONTROL
from benchmarks.nano.vocabulary import SPECIAL, VISION

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
EMBEDDING = "token_embd.weight"


def grow(path: Path) -> None:
    """Write the file anew with VISION as its last tokens."""
    reader = GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tokens = fields[TOKENS].contents()
    if VISION[0] in tokens:
        return
    writer = GGUFWriter(path.with_suffix(".tmp"), str(fields.pop("general.architecture").contents()))
    for name, field in fields.items():
        value, kinds = field.contents(), field.types
        value = (
            {TOKENS: [*value, *VISION], TYPES: [*value, CONTROL, CONTROL]}.get(name, value)
            if (kinds[0] is GGUFValueType.ARRAY)
            else value
        )
        writer.add_key_value(name, value, kinds[0], kinds[1] if kinds[0] is GGUFValueType.ARRAY else None)
    row = tokens.index(SPECIAL[1])
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name == EMBEDDING:
            data = np.concatenate((data, data[[row] * len(VISION)]))
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".tmp").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=ASSETS / "text_encoder.gguf")
    grow(parser.parse_args().file)


if __name__ == "__main__":
    main()

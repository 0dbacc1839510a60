"""What the Python and zimage examples of docs/explanation/claims.md print, in order.

    python -m benchmarks.claims

The page is the script: a claim and its check are in one place. tests/docs/test_claims.py compares the text
blocks of the page, and of its translation, with the file that this writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT, arguments, write
from tests.helpers import examples, stand_ins

PAGE = ROOT / "docs" / "explanation" / "claims.md"


def printed() -> list[str]:
    """Run the blocks of the page in a folder of stand-ins; the text that each Python block prints."""
    texts, namespace = [], {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        stand_ins.make(Path(folder))
        for block in examples.blocks(PAGE.read_text("utf-8")):
            if block.not_run is None and block.language == "sh":
                examples.run_shell(block, PAGE.name)
            elif block.not_run is None and block.language == "python":
                texts.append(_output(block, namespace))
    return texts


def _output(block: examples.Block, namespace: dict[str, Any]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        exec(compile("\n" * (block.line - 1) + block.text, PAGE.name, "exec"), namespace)
    return out.getvalue().rstrip("\n")


def main() -> None:
    """Run the page and write what it prints."""
    args = arguments(__doc__, "claims.json").parse_args()
    figures = {"printed": printed()}
    print(json.dumps(figures, indent=1))
    write(args.out, figures)


if __name__ == "__main__":
    main()

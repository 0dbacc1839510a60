"""Do the commands that see references or write prompts run on a GPU, with a budget and without one?

    command.py [--files FOLDER]

The command line is called in this process: `generate --reference` with the embedded Omni model, and `enhance`
with the language model of a folder. Tokens are chosen here, since kernels compute nothing.
"""

from __future__ import annotations

import sys

import fake_cuda

fake_cuda.settings(FAKE_NO_COPY=1)

import contextlib
import io
import tempfile
from pathlib import Path

import project
from PIL import Image

from zimage_core.cli.main import main as command
from zimage_core.language.sampling import Chooser

WAYS = {"no budget": (), "auto": ("--vram", "auto"), "least": ("--vram", "least")}
TOKEN = 1000
"""What the model writes, again and again."""


def choose(chooser, logits):
    logits.to("cpu")
    return TOKEN


def told(*arguments):
    """Exit status of a command, what it launched, and the end of what it says."""
    before = fake_cuda.counts()["launch"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        status = command([str(each) for each in arguments])
    launches = fake_cuda.counts()["launch"] - before
    return {"status": status, "launches": launches, "said": said.getvalue()[-400:]}


def main():
    args = project.arguments(__doc__).parse_args()
    project.patch_out()
    Chooser.__call__ = choose
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.png")
        Image.new("RGB", (64, 64), "red").save(picture)
        out = ("-o", Path(folder, "out.png"), "--force", "--device", "cuda", "--steps", 1)
        for name, vram in WAYS.items():
            found[f"reference, {name}"] = told(
                "generate", "a red circle", "--reference", picture, "--reference", picture, *out, *vram
            )
        if args.files:
            for name, vram in WAYS.items():
                files = ("--model", args.files, "--device", "cuda", "--max-new-tokens", 4, *vram)
                found[f"enhance, {name}"] = told("enhance", "a red circle", *files)
    project.answer(**found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m zimage_core`: the command line, where its script is not on the PATH."""

from __future__ import annotations

from zimage_core.cli.main import process

if __name__ == "__main__":
    process()

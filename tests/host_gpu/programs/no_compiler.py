"""What happens where Triton finds no C compiler?

    no_compiler.py [--files FOLDER]

Triton compiles its launchers with a C compiler at the first launch; many who run models have none.
"""

from __future__ import annotations

import os
import sys
import tempfile

import fake_cuda  # noqa: F401 - ends the program where there is none

empty = tempfile.TemporaryDirectory()
os.environ.pop("CC", None)
os.environ.update(PATH=empty.name, TRITON_CACHE_DIR=empty.name)

import project

from zimage_core.errors import ZImageError


def main():
    args = project.arguments(__doc__).parse_args()
    project.patch_out()
    found = {"ran": False, "refused": "", "error": ""}
    try:
        pipe = project.open_pipeline(args.files, device="cuda")
        project.picture(pipe, args.pixels, 1, output_type="latent")
        found["ran"] = True
    except ZImageError as error:
        found["refused"] = str(error)
    except Exception as error:  # noqa: BLE001 - any other is what this looks for
        found["error"] = f"{type(error).__name__}: {error}"
    project.answer(**found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

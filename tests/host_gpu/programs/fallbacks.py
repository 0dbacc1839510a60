"""What happens on a GPU where no Triton kernel can run?

    fallbacks.py CASE

Each case takes something away from the machine, then makes an image with the nano model.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import warnings

import fake_cuda  # noqa: F401 - ends the program where there is none

CASES = ("nothing", "compiler", "headers", "triton", "new triton", "launch")
case = sys.argv[1] if sys.argv[1:] and sys.argv[1] in CASES else sys.exit(f"wanted one of {CASES}")
empty = tempfile.TemporaryDirectory()
if case in ("compiler", "headers"):
    os.environ["TRITON_CACHE_DIR"] = empty.name  # there may be a launcher in the usual one
if case == "compiler":
    os.environ.pop("CC", None)
    os.environ["PATH"] = empty.name
if case == "headers":
    paths = sysconfig.get_paths

    def without_headers(*arguments, **options):
        return {**paths(*arguments, **options), "include": empty.name}

    sysconfig.get_paths = without_headers
if case == "triton":
    sys.modules["triton"] = None  # each import of it fails

import project

from zimage_core.errors import ZImageError
from zimage_core.quant import probe

if case == "triton":
    probe.find_spec = lambda name: None
if case == "new triton":
    probe.version = lambda package: "3.2.0"
if case == "launch":
    import zimage_core.kernels.probe

    def broken(device):
        raise OSError("libcuda.so.1: cannot open shared object file")

    zimage_core.kernels.probe.launch = broken


def main():
    project.patch_out()
    found = {"ran": False, "refused": "", "error": "", "warned": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            pipe = project.open_pipeline(device="cuda")
            for _ in range(2):
                project.picture(pipe, steps=1, output_type="latent")
            found["ran"] = True
        except ZImageError as error:
            found["refused"] = str(error)
        except Exception as error:  # noqa: BLE001 - any other is what this looks for
            found["error"] = f"{type(error).__name__}: {error}"
    found["warned"] = [str(each.message) for each in caught if "Triton" in str(each.message)]
    project.answer(**found)


main()

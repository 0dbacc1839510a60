"""Whether Triton kernels run here; if not, why not and what to do, in one sentence.

Triton compiles a kernel at its first launch, and its own launcher with a C compiler. That it is installed
therefore proves nothing: `works` launches a tiny kernel once on each GPU. `lacks` tells what can be told
without a GPU, and neither imports Triton nor torch.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from zimage_core.errors import Unsupported, printable

if TYPE_CHECKING:
    import torch

OLDEST_TRITON = (3, 6)
ONE_LAUNCHER = (3, 7)
"""First Triton with one compiled launcher for all kernels; older ones may compile one for each signature."""
OLDEST_GPU = (7, 0)
"""Least compute capability that Triton compiles for, Volta."""
COST = "plain torch unpacks the weights instead, and a step takes up to about twice as long"

_verdicts: dict[int | None, str] = {}  # number of a GPU -> why kernels do not run there, or nothing


def triton_version() -> tuple[int, ...] | None:
    """Version of the installed Triton; () for a build without metadata, None if there is none."""
    if find_spec("triton") is None:
        return None
    for package in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton"):
        try:
            return tuple(int(number) for number in version(package).split(".")[:2])
        except (PackageNotFoundError, ValueError):
            continue
    return ()


def lacks_triton() -> str:
    """Why there is no usable Triton; empty if there is one."""
    found = triton_version()
    wanted = ".".join(map(str, OLDEST_TRITON))
    if found is None:
        return f"Triton is not installed; install {wanted} or newer: pip install 'zimage-core[gpu]'"
    if found and found < OLDEST_TRITON:
        older = ".".join(map(str, found))
        return f"Triton {older} is too old; a newer torch brings {wanted} or newer with it"
    return ""


def lacks_compiler() -> str:
    """What is missing to compile Triton's launcher; empty if nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler for Triton's launcher; install gcc or clang, or name one in CC"
    # as Triton looks for it; Debian's own scheme leads elsewhere
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    folder = sysconfig.get_paths(scheme).get("include", "")
    if not Path(folder, "Python.h").is_file():
        return (
            f"the C compiler finds no Python.h in {folder or 'the folder of headers'}; install Python's "
            "headers, a package such as python3-dev or python3-devel"
        )
    return ""


def lacks() -> str:
    """What Triton lacks on this machine, whatever its GPUs are; empty if nothing is known to be missing."""
    return lacks_triton() or lacks_compiler()


def works(device: torch.device, required: bool = False) -> bool:
    """Whether kernels run on a GPU; the first call for each GPU tries it, and warns if they do not.

    Under torch.compile nothing is tried: kernels count as working until a call outside has found otherwise.

    Args:
        device: A CUDA or ROCm device with its number.
        required: Raise instead of warn.

    Raises:
        Unsupported: Kernels are required and do not run; the message is one sentence.
    """
    verdict = _verdicts.get(device.index)
    if verdict is None:
        import torch

        if torch.compiler.is_compiling():
            return True
        verdict = _verdicts[device.index] = obstacle(device)
        if verdict and not required:
            warnings.warn(f"{device}: Triton kernels do not run: {verdict}; until then {COST}", stacklevel=2)
    if verdict and required:
        raise Unsupported(f"ZIMAGE_KERNELS is on, but kernels do not run on {device}: {verdict}")
    return not verdict


def obstacle(device: torch.device) -> str:
    """Why kernels do not run on a GPU, found by launching one; empty if they run."""
    import torch

    if missing := lacks_triton():
        return missing
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            mine, least = (".".join(map(str, each)) for each in (capability, OLDEST_GPU))
            return f"this GPU has compute capability {mine} and Triton needs {least}; only another GPU helps"
    if (triton_version() or ONE_LAUNCHER) < ONE_LAUNCHER and (missing := lacks_compiler()):
        return missing  # the launcher of the tiny kernel may be in Triton's cache, those of others not
    try:
        from zimage_core.kernels.probe import launch

        launch(device)
    except Exception as error:  # Triton, the compiler and the linker raise whatever they like
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            raise  # that Triton found none is an error of another type, and says nothing about kernels either
        shown = printable((str(error).splitlines() or [""])[0], 200)
        return lacks_compiler() or f"a tiny kernel ends in {type(error).__name__}: {shown}; repair Triton"
    return ""

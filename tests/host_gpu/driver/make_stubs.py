"""Write stubs for what torch and Triton may call and fake_cuda.cpp does not define.

    make_stubs.py SITE_PACKAGES OBJECT > stubs.cpp

Wanted is what torch's libraries leave undefined and what torch and Triton look up by name in the driver and
NVML: names that cuda.h declares, or that begin with nvml, among the strings of their files. A product of
cuBLAS counts as a launch, its settings do nothing, every other function says on stderr that it is not here,
and returns an error.
"""

import re
import subprocess
import sys
from pathlib import Path

RUNTIME_OR_BLAS = re.compile(r"(__cuda|cuda|cublas)[A-Z]\w*")
BLAS_SETTING = re.compile(
    r"cublas(Lt)?(Create|Destroy|Set|Get|Matmul\w*(Create|Destroy|Attribute)|MatrixLayout)\w*"
)


def symbols(file, *options):
    """Names that nm lists, without versions."""
    lines = subprocess.run(
        ["nm", *options, file], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


def strings(file, prefix=b"cu"):
    """Everything in a file that looks like a name of the driver's interface."""
    return {
        name.decode() for name in re.findall(rb"\b" + prefix + rb"[A-Z]\w*[A-Za-z0-9]", file.read_bytes())
    }


def stub(name):
    if BLAS_SETTING.fullmatch(name):
        body = "return 0;"
    elif name.startswith("cublas"):
        body = f'return fake_blas("{name}");'
    else:
        body = f'return fake_missing("{name}");'
    return f"API int {name}() {{ {body} }}"


def main(site, defined):
    torch, triton = site / "torch/lib", site / "triton"
    declared = set(
        re.findall(r"CUDAAPI\s+(cu\w+)\(", next(site.glob("nvidia/cu*/include/cuda.h")).read_text())
    )
    linked = set().union(*(symbols(lib, "-D", "--undefined-only") for lib in torch.glob("*.so")))
    found_by_name = strings(torch / "libc10_cuda.so") | strings(torch / "libtorch_cuda.so")
    found_by_name |= strings(triton / "backends/nvidia/driver.c")
    wanted = {name for name in linked if RUNTIME_OR_BLAS.fullmatch(name)}
    wanted |= strings(torch / "libc10_cuda.so", b"nvml")
    wanted |= {name for name in linked | found_by_name if re.sub(r"_v\d$", "", name) in declared}
    missing = [name for name in sorted(wanted) if not {name, f"{name}_v2", f"{name}_v3"} & defined]
    print('#define API extern "C" __attribute__((visibility("default")))')
    print("API int fake_blas(const char* name);")
    print("API int fake_missing(const char* name);")
    print("\n".join(map(stub, missing)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), symbols(sys.argv[2], "--defined-only", "--extern-only"))

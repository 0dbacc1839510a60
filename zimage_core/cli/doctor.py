"""`zimage doctor`: versions, devices, what would run where, and how each format is multiplied."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_core import __version__
from zimage_core.errors import ZImageError, printable
from zimage_core.files.units import in_bytes
from zimage_core.formats import FORMATS
from zimage_core.quant.dispatch import choose, crossover
from zimage_core.quant.probe import lacks

if TYPE_CHECKING:
    import torch

NEEDED = ("torch", "numpy", "gguf", "safetensors", "tokenizers", "sentencepiece", "pillow")
OPTIONAL = ("triton", "huggingface_hub")
ROWS, WIDTH = 10240, 3840
"""The widest matrix of S3-DiT, w1 and w3."""
TOKENS = {"adaptive norms": 8, "short prompt": 32, "256 px": 288, "512 px": 1056, "1024 px": 4128}
"""Rows of x: steps of a run, tokens of a caption, tokens of image and caption."""


def add_parser(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "doctor",
        parents=[common],
        help="show versions, devices and what would run where",
        description="Show versions, devices and what would run where. Status 1: something needed is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--paths", action="store_true", help="how each quantised format is multiplied on the GPU, and why"
    )
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="with --paths: another GPU than the one here, such as sm_75, sm_86, sm_89, sm_90, gfx1100",
    )
    parser.add_argument(
        "--free",
        type=float,
        metavar="GB",
        help="with --paths: free GPU memory in GB, default 8 or what is free",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look at the machine; nothing is changed and nothing is downloaded."""
    facts = examine()
    if args.paths or args.architecture is not None or args.free is not None:
        return _paths(args, facts["devices"])
    sys.stdout.write((json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts))) + "\n")
    return 1 if facts["problems"] else 0


def _paths(args: argparse.Namespace, devices: list[dict[str, Any]]) -> int:
    """Print how each block format is multiplied on the GPU here, on one asked for, or on a CPU."""
    from zimage_core.run.checks import real

    gpu = devices[1] if len(devices) > 1 else {}
    architecture = args.architecture or gpu.get("architecture", "cpu")
    free = int(real("--free", 8 if args.free is None else args.free, 0, 1e6) * 1e9)
    if args.free is None and args.architecture is None:
        free = gpu.get("memory_free_bytes", free)
    found: list[dict[str, Any]] = []
    for fmt in (each for each in FORMATS.values() if each.weights > 1):
        choices = [choose(fmt.name, ROWS, WIDTH, m, architecture, free) for m in TOKENS.values()]
        found.append(
            {
                "format": fmt.name,
                "crossover": crossover(fmt, architecture),
                "paths": dict(zip(TOKENS, (choice.path for choice in choices), strict=True)),
                "reason": choices[-1].reason,
                "nbytes": max(choice.nbytes for choice in choices),
            }
        )
    if args.json:
        report = {"architecture": architecture, "free_bytes": free, "paths": found}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    heads = "".join(f"{f'{what} ({m})':>21}" for what, m in TOKENS.items())
    lines = [f"paths of a {ROWS} x {WIDTH} weight on {architecture}, {in_bytes(free)} free"]
    if args.architecture is None and (why := gpu.get("kernels_obstacle")):
        lines.append(f"these need kernels, which do not run here, so plain torch unpacks all weights: {why}")
    lines.append(f"{heads}  why")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found:  # formats that differ in their crossover alone share a line
        reason = row["reason"].replace(f" {row['crossover']}", " {}").replace(row["format"], "the format")
        groups.setdefault((*row["paths"].values(), reason), []).append(row)
    for (*paths, reason), rows in groups.items():
        limits = sorted({row["crossover"] for row in rows})
        most = str(limits[0]) if len(limits) == 1 else f"{limits[0]} to {limits[-1]}"
        lines.append("".join(f"{path:>21}" for path in paths) + f"  {reason.format(most)}")
        lines.append(f"    {' '.join(row['format'] for row in rows)}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def examine() -> dict[str, Any]:
    """The report as plain data."""
    problems: list[str] = []
    versions: dict[str, str | None] = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    problems += [f"{name} is not installed" for name in NEEDED if versions[name] is None]
    devices, default = [_cpu()], "cpu"
    if versions["torch"] is not None:
        try:
            from zimage_core.run.checks import read_device

            devices += _gpus(devices[0])
            default = str(read_device("auto"))
        except (ImportError, OSError, RuntimeError) as error:
            problems.append(f"torch cannot be used: {printable(error)}")
    model, fault = _embedded_model()
    problems += [fault] if fault else []
    return {
        "zimage_core": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "kernels_lack": lacks(),
        "devices": devices,
        "embedded_model": model,
        "runs": _plan(devices, default),
        "problems": problems,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    device: dict[str, Any] = {
        "name": "cpu",
        "title": platform.processor() or platform.machine(),
        "cores": cores,
    }
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        table = dict(
            line.split(":", 1) for line in meminfo.read_text("ascii", "replace").splitlines() if ":" in line
        )
        for key, field in (("memory_bytes", "MemTotal"), ("memory_free_bytes", "MemAvailable")):
            if field in table:
                device[key] = int(table[field].split()[0]) * 1024
    return device


def _gpus(cpu: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from zimage_core.cpu import capability
    from zimage_core.nn.attention import attention_backends
    from zimage_core.quant.gpu import architecture
    from zimage_core.quant.probe import obstacle
    from zimage_core.run.checks import read_dtypes

    cpu |= {"threads": torch.get_num_threads(), **_products(torch.device("cpu"))}
    cpu["instructions"], cpu["gflops_a_core"] = capability.features(), asdict(capability.rates())
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties, device = torch.cuda.get_device_properties(index), torch.device("cuda", index)
        arch = architecture(device)
        dtype = str(read_dtypes(None, None, device)["transformer"]).removeprefix("torch.")
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "name": f"cuda:{index}",
                "title": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "architecture": arch,
                "kernels_obstacle": obstacle(device),
                "attention": {
                    "transformer": attention_backends(arch, "transformer", dtype),
                    "text encoder": attention_backends(arch, "text encoder", dtype),
                    "VAE": attention_backends(arch, "VAE", "float32", 512),
                },
                "memory_bytes": total,
                "memory_free_bytes": free,
                **_products(device),
            }
        )
    return found


def _products(device: torch.device) -> dict[str, Any]:
    """What `--compute auto` chooses on a device for a network of full size with packed weights, and why."""
    from zimage_core.nn.compute import automatic_on

    choice, reason = automatic_on(device)
    return {"compute": choice, "compute_reason": reason}


def _embedded_model() -> tuple[dict[str, Any] | None, str]:
    """The model inside the package: its parts, or what is wrong with them."""
    from zimage_core.assets import NANO
    from zimage_core.weights.inspection import inspect_file

    try:
        found = inspect_file(NANO)
    except ZImageError as error:
        return None, f"the embedded model cannot be used: {error}"
    if found.needs:
        return None, f"the embedded model lacks {' and '.join(found.needs)}; install zimage-core again"
    return {"nbytes": found.nbytes, "parts": {part.kind: part.title for part in found.parts}}, ""


def _plan(devices: list[dict[str, Any]], default: str) -> list[str]:
    """What `zimage generate` does on each device, in sentences."""
    plan = []
    for device in devices:
        name = device["name"]
        if name == "cpu":
            does = (
                f"all three networks in float32 on {device.get('threads', device['cores'])} threads, or one "
                "for a small model; quantised weights stay packed in memory and are unpacked tile by tile"
            )
        else:
            does = f"{_on_gpu(device)}; {_attention(device)}"
        if "compute" in device:
            does += f"; --compute auto: {device['compute']}, {device['compute_reason']}"
            if device["compute"] == "int8":
                does += "; text encoders, small transformers and those without packed weights stay exact"
        plan.append(f"{name} ({'default' if name == default else f'with --device {name}'}): {does}")
    return plan


def _on_gpu(device: dict[str, Any]) -> str:
    """What happens to quantised weights on a GPU."""
    if why := device["kernels_obstacle"]:
        return f"quantised weights are unpacked by plain torch, slower than by kernels: {why}"
    most = crossover(FORMATS["Q4_K"], device["architecture"])
    few = f"up to {most} rows of x multiplied as they are (Q4_K), beyond that " if most else ""
    return f"quantised weights stay packed; {few}unpacked for each product by a kernel; see --paths"


def _attention(device: dict[str, Any]) -> str:
    """The first choice of each network."""
    first = {use: (names or ("chunks of queries",))[0] for use, names in device["attention"].items()}
    amd = device["architecture"].startswith("gfx")
    otherwise = ", where this torch has it, else chunks of queries" if amd else ""
    return f"attention: {', '.join(f'{name} ({use})' for use, name in first.items())}{otherwise}"


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = [f"zimage-core {facts['zimage_core']}, Python {facts['python']}, {facts['platform']}"]
    lines += [f"  {name:<16} {found or 'not installed'}" for name, found in facts["packages"].items()]
    lacking = facts["kernels_lack"] or "Triton, a C compiler and Python.h are there"
    lines.append(f"  {'GPU kernels':<16} {lacking}")
    lines.append("devices")
    for device in facts["devices"]:
        parts = [device["title"]]
        if "cores" in device:
            parts.append(f"{device['cores']} cores")
        if "instructions" in device:
            parts.append(device["instructions"])
        if "compute_capability" in device:
            parts.append(f"compute capability {device['compute_capability']}")
        if "memory_bytes" in device:
            free = device.get("memory_free_bytes", 0)
            parts.append(f"{in_bytes(device['memory_bytes'])}, {in_bytes(free)} free")
        lines.append(f"  {device['name']:<16} {', '.join(printable(p) for p in parts)}")
        if "gflops_a_core" in device:
            rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in device["gflops_a_core"].items())
            lines.append(f"  {'':<16} products, measured: {rates} GFLOP/s a core")
    lines.append("embedded model")
    model = facts["embedded_model"]
    for kind, title in (model["parts"] if model else {}).items():
        lines.append(f"  {kind:<16} {title}")
    lines.append("what runs where")
    lines += [f"  {sentence}" for sentence in facts["runs"]]
    if facts["problems"]:
        lines.append("problems")
        lines += [f"  {printable(problem, 1000)}" for problem in facts["problems"]]
    return lines

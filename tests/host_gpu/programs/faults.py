"""What does a user see where a GPU is full, fails, or is shared?

    faults.py

Each case is a run that something disturbs, and a second one afterwards on the same pipeline.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_cuda

fake_cuda.settings(FAKE_CONTEXT_MB=300)

import project
import torch

from zimage_core import ZImagePipeline
from zimage_core.export.converting import convert_file
from zimage_core.kernels.launch import Launch
from zimage_core.run.sources import embedded

MIB = project.MIB
VRAM = "1GiB"


def attempt(pipe, **options):
    """One run -> "" or its error, by kind and message."""
    try:
        project.picture(pipe, **options)
    except Exception as error:  # noqa: BLE001 - what comes out is what is asked
        return f"{type(error).__name__}: {error}"
    return ""


def at_home(pipe):
    """Whether every weight of a pipeline with a budget is on the host."""
    networks = (pipe.transformer, pipe.text_encoder, pipe.vae)
    return all(tensor.device.type == "cpu" for network in networks for tensor in network.parameters())


def full():
    """Another program holds nearly the whole card before the run, and lets go of it."""
    pipe = project.open_pipeline(device="cuda", vram=VRAM)
    torch.zeros(1, device="cuda")
    free = torch.cuda.mem_get_info()[0] - 2 * MIB
    fake_cuda.take(free)
    errors = [attempt(pipe)]
    fake_cuda.take(-free)
    return pipe, [*errors, attempt(pipe)]


def full_without_budget():
    """The same, for a pipeline whose networks are on the GPU."""
    pipe = project.open_pipeline(device="cuda")
    fake_cuda.take(torch.cuda.mem_get_info()[0])
    errors = [attempt(pipe)]
    fake_cuda.take(-(80 << 30))
    return pipe, [*errors, attempt(pipe)]


def taken(phase):
    """Another program takes the card when a phase begins."""
    pipe = project.open_pipeline(device="cuda", vram=VRAM)
    placement = type(pipe._placement)
    original = placement.phase

    def begin(self, name, network):
        if name == phase:
            fake_cuda.take(torch.cuda.mem_get_info()[0])
        return original(self, name, network)

    placement.phase = begin
    errors = [attempt(pipe)]
    placement.phase = original
    fake_cuda.take(-(80 << 30))
    return pipe, [*errors, attempt(pipe)]


def failing(kind, nth, sticky=False):
    """The driver returns an error for the nth call of a kind from the beginning of a run."""
    pipe = project.open_pipeline(device="cuda", vram="least")
    attempt(pipe)  # kernels are compiled, the workspace is there
    fake_cuda.fail(kind, nth, fake_cuda.ILLEGAL_ADDRESS, sticky=sticky)
    errors = [attempt(pipe)]
    fake_cuda.fail(kind, 0)
    if not sticky:
        return pipe, [*errors, attempt(pipe)]
    errors.append(attempt(pipe))
    pipe.limit_memory()  # the CPU is left; convolutions are patched out
    return pipe, [*errors, attempt(pipe, output_type="latent")]


def triton(error):
    """The driver returns an error for a launch that Triton makes."""
    pipe = project.open_pipeline(device="cuda", vram="least")
    attempt(pipe)
    original = Launch._launch

    def launch(self, *arguments):
        Launch._launch = original
        fake_cuda.fail("launch", 1, error)
        original(self, *arguments)

    Launch._launch = launch
    return pipe, [attempt(pipe), attempt(pipe)]


def fraction():
    """The program allows torch a part of the card; "auto" stays within it."""
    torch.cuda.set_per_process_memory_fraction(1 / 64)
    pipe = project.open_pipeline(device="cuda", vram="auto")
    errors = [attempt(pipe), attempt(pipe)]
    planned = pipe._placement.report().plan.vram
    torch.cuda.set_per_process_memory_fraction(1.0)
    return pipe, [*errors, planned]


def dense_table():
    """A table of tokens that is not packed stays on the host, beside norms that stay on the GPU."""
    nano = embedded().paths
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder, "text_encoder.safetensors")
        convert_file(nano["text_encoder"], dense, dequantize="bf16")
        pipe = ZImagePipeline.from_files(
            nano["transformer"], dense, nano["vae"], nano["text_encoder"], device="cuda", vram=VRAM
        )
        return pipe, [attempt(pipe), attempt(pipe)]


def two(threads):
    """Two pipelines with a budget each on a card that holds both, one after the other or at once."""
    pipes = [project.open_pipeline(device="cuda", vram=VRAM) for _ in range(2)]
    torch.zeros(1, device="cuda")
    fake_cuda.take(torch.cuda.mem_get_info()[0] - 2 * (1 << 30))
    with ThreadPoolExecutor(2 if threads else 1) as workers:
        found = workers.map(lambda pipe: [attempt(pipe), attempt(pipe)], pipes)
    fake_cuda.take(-(80 << 30))
    return pipes[0], [error for each in found for error in each]


KINDS = {
    "full": full,
    "full without budget": full_without_budget,
    **{f"taken before {phase}": lambda p=phase: taken(p) for phase in ("encode", "denoise", "decode")},
    **{
        f"{kind} {nth}": lambda k=kind, n=nth: failing(k, n)
        for kind, nth in (("copy", 1), ("copy", 40), ("launch", 5), ("malloc", 2))
    },
    "Triton launch": lambda: triton(fake_cuda.ILLEGAL_ADDRESS),
    "Triton without memory": lambda: triton(fake_cuda.OUT_OF_MEMORY),
    "dense table": dense_table,
    "fraction": fraction,
    "two in turn": lambda: two(threads=False),
    "two at once": lambda: two(threads=True),
    "for good": lambda: failing("copy", 40, sticky=True),  # after it nothing works
}


def main():
    project.patch_out()
    found = {}
    for name, case in KINDS.items():
        pipe, errors = case()
        threads = [each.name for each in threading.enumerate() if each.name.startswith("zimage")]
        found[name] = {
            "errors": errors,
            "home": at_home(pipe),
            "fraction": torch.cuda.get_per_process_memory_fraction(),
            "threads": threads,
        }
        del pipe
        gc.collect()
        if name != "for good":  # each case begins without memory that the one before left
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
    project.answer(**found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

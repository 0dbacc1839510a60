"""Importing the package loads nothing heavy, and every public name resolves."""

from __future__ import annotations

import subprocess
import sys

import zimage_core
from tests.helpers.tree import ROOT

HEAVY = {"torch", "numpy", "triton", "transformers", "diffusers", "PIL", "gguf", "tokenizers", "safetensors"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules), file=sys.__stdout__)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in run.stdout.split()} | {
        name for name in run.stdout.split() if name.startswith("zimage_core.")
    }


def test_import_zimage_core_loads_nothing_heavy():
    loaded = loaded_after("import zimage_core; zimage_core.BadFile; dir(zimage_core)")
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("zimage_core.")} <= {"zimage_core.errors"}


def test_the_command_line_starts_without_torch_or_numpy():
    loaded = loaded_after(
        "from zimage_core.cli.main import main\ntry: main(['inspect', '--help'])\nexcept SystemExit: pass"
    )
    assert not loaded & HEAVY


def test_the_pipeline_needs_neither_triton_nor_diffusers():
    loaded = loaded_after("from zimage_core import ZImagePipeline, dequantize, load_transformer")
    assert "torch" in loaded
    # torch itself may look for Triton, our kernels must not be what pulls it in
    assert not loaded & {"transformers", "diffusers", "accelerate"}
    assert not any(name.startswith("zimage_core.kernels") for name in loaded)


def test_a_plain_run_loads_no_room_beside_the_main_job():
    loaded = loaded_after(
        "from zimage_core import ZImagePipeline\n"
        "pipe = ZImagePipeline.from_default()\n"
        "pipe('a circle', num_inference_steps=1, height=32, width=32, seed=0)"
    )
    rooms = {name.split(".")[1] for name in loaded if name.count(".")}
    assert "run" in rooms
    samplers = {"heun", "res_multistep", "dpmpp_2m", "ancestral", "schedules", "variety"}
    assert not loaded & {f"zimage_core.sampling.{name}" for name in samplers}
    assert not rooms & {"adapters", "control", "editing", "export", "omni", "preview", "study", "vision"}


def test_every_public_name_resolves():
    for name in zimage_core.__all__:
        assert getattr(zimage_core, name) is not None
    assert set(zimage_core.__all__) <= set(dir(zimage_core))


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(zimage_core, "no_such_name")


def test_the_oracle_is_reached_by_its_full_name():
    import zimage_core.reference.dequantize

    assert callable(zimage_core.reference.dequantize.dequantize)

"""A folder is a model for every verb that studies one, whatever its layout."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.tree import ROOT

NANO = ROOT / "zimage_core" / "assets" / "nano"
PREFIX = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.qwen3_4b.transformer.",
    "vae": "vae.",
}
SMALL = ("-W", 32, "-H", 32, "--steps", 1, "--quiet")

pytestmark = pytest.mark.filterwarnings("ignore:.*assumed")  # loose files lack the config of these odd sizes


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """The tiny pipeline as a diffusers folder, as loose files, and as one file, each with its tokenizer."""
    loose, merged = (tmp_path_factory.mktemp(name) for name in ("loose", "merged"))
    everything = {}
    for part, prefix in PREFIX.items():
        state = load_file(next((model / part).glob("*.safetensors")))
        save_file(state, loose / f"{part}.safetensors")
        everything |= {prefix + name: tensor for name, tensor in state.items()}
    save_file(everything, merged / "all.safetensors")
    for folder in (loose, merged):
        shutil.copytree(model / "tokenizer", folder / "tokenizer")
    return {"diffusers": model, "loose": loose, "merged": merged, "shipped": NANO}


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    return tmp_path / "p.txt"


@pytest.mark.parametrize("kind", ["diffusers", "loose", "merged", "shipped"])
def test_an_imatrix_and_a_sensitivity_are_measured(zimage, folders, prompts, tmp_path, kind):
    model = ("--prompts", prompts, "--model", folders[kind], *SMALL)
    assert zimage("imatrix", *model, "-o", tmp_path / "a.gguf").status == 0
    words = ("--types", "Q8_0", "--every", 1, "-o", tmp_path / "s.json")
    assert zimage("sensitivity", *model, *words).status == 0


def test_a_name_for_another_kind_of_file_is_refused(zimage, prompts, tmp_path):
    for words in (
        ("imatrix", "-o", "a.safetensors"),
        ("imatrix", "-o", "a.json"),
        ("sensitivity", "-o", "a.gguf"),
    ):
        outcome = zimage(*words[:2], tmp_path / words[2], "--prompts", prompts, *SMALL)
        assert "wanted a name that ends in" in outcome.error


@pytest.mark.parametrize("kind", ["diffusers", "loose", "merged", "shipped"])
def test_two_folders_are_compared(zimage, folders, kind):
    """A and B are the transformers of folders, the other parts those of --model."""
    folder = folders[kind]
    words = ("--prompt", "a red circle", "--model", folder, *SMALL)
    outcome = zimage("compare", folder, "default", *words)
    assert outcome.status == 0, outcome.err
    assert "PSNR equal" in outcome.out

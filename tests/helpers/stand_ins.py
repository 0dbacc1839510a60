"""Small files by the names that the documents use for the files of a reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers import tiny
from tests.helpers.tree import ROOT
from zimage_core import QuantTensor, ZImagePipeline, convert_file, load_controlnet
from zimage_core.assets import PARTS, embedded_files

TRANSFORMER, ENCODER, VAE = "z_image_turbo-Q4_K_M.gguf", "Qwen3-4B-Q4_K_M.gguf", "ae.safetensors"
CONTROLNETS = ("union.safetensors", "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors")
PHOTOS = {
    "circle.png": "red", "red.png": "red", "in.png": "blue", "photo.png": "green", "pose.png": "white",
    "cat.jpg": "black", "sofa.png": "yellow", "a.png": "red", "b.png": "blue",
}  # fmt: skip
PROMPTS = "a red circle on a white background\na big yellow star in the middle of a black background\n"


def make(folder: Path) -> Path:
    """Write all stand-ins into an empty folder; returns it."""
    files = embedded_files()
    (folder / "z-image" / "split_files" / "vae").mkdir(parents=True)
    for component, place in (
        ("transformer", TRANSFORMER), ("text_encoder", ENCODER), ("vae", f"split_files/vae/{VAE}")
    ):  # fmt: skip
        shutil.copy(files[component], folder / "z-image" / place)
        shutil.copy(files[component], folder / Path(place).name)
    dense = {"dequantize": "bf16"}
    ZImagePipeline.from_default().save_pretrained(folder / "Z-Image-Turbo", **dense)
    ZImagePipeline.from_default(omni=True).save_pretrained(folder / "Z-Image-Omni-Base", **dense)
    convert_file(folder / "Z-Image-Turbo", folder / "turbo.safetensors")
    writer(folder / "Z-Image")
    for file in CONTROLNETS:
        save_file(dense_control_net(), folder / file, {"places": "0"})
    for style in ("style", "outline"):
        shutil.copy(PARTS["outline"], folder / f"{style}.safetensors")
    (folder / "prompts.txt").write_text(PROMPTS, "utf-8")
    images(folder)
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


def writer(folder: Path) -> None:
    """A random model whose text encoder can write, as the embedded one cannot; 8 steps keep pages quick."""
    config = tiny.folder(folder) / "transformer" / "config.json"
    tiny.write_json(config, {**json.loads(config.read_text("utf-8")), "_zimage": {"sample_size": 64}})


def dense_control_net() -> dict[str, torch.Tensor]:
    """The tensors of the embedded ControlNet as plain numbers."""
    net = load_controlnet(PARTS["edges"])
    kept = {name: value for name, value in net.state_dict().items() if not name.endswith(".packed")}
    tensors = {name: value.clone() for name, value in kept.items()}
    for name, layer in net.named_modules():
        if isinstance(getattr(layer, "weight", None), QuantTensor):
            tensors[f"{name}.weight"] = layer.weight.dequantize(torch.float32)
    return tensors


def images(folder: Path) -> None:
    """Pictures of 80 x 80 pixels: shapes, a mask with a white middle, and white edges on black."""
    for picture in ("mask", "edges"):
        shutil.copy(ROOT / "docs" / "images" / f"{picture}.png", folder)
    for picture, colour in PHOTOS.items():
        drawn = Image.new("RGB", (80, 80), "white")
        drawn.paste(colour, (20, 20, 60, 60))
        drawn.save(folder / picture)

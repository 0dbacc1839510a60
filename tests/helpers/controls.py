"""Small ControlNets of random weights in every variant, with diffusers' own beside ours, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.helpers import tiny
from tests.helpers.parity import TRANSFORMER
from zimage_core.config import TransformerConfig
from zimage_core.control.config import ControlConfig
from zimage_core.control.model import ControlNet
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.weights.controlnets import OWN, PLAIN, SHARED

BASE: dict[str, Any] = {**TRANSFORMER, "n_layers": 6}
TINY: dict[str, Any] = {**tiny.TRANSFORMER, "n_layers": 2, "n_refiner_layers": 1}
"""The transformer of tests/helpers/tiny.py."""
VARIANTS: dict[str, tuple[int, int, str]] = {
    "1.0": (2, 16, PLAIN), "2.0": (6, 33, SHARED), "2.1": (6, 33, OWN), "2.1 lite": (3, 33, OWN),
}  # fmt: skip
"""Variant -> control layers, channels, kind of refiner."""


def config(variant: str, base: dict[str, Any] = BASE) -> ControlConfig:
    layers, channels, refiner = VARIANTS[variant]
    layers = min(layers, base["n_layers"])
    return ControlConfig(
        dim=base["dim"], n_heads=base["n_heads"], hidden_dim=int(base["dim"] / 3 * 8), channels=channels,
        n_layers=layers, n_refiner_layers=0 if refiner == SHARED else base["n_refiner_layers"],
        refiner=refiner,
    )  # fmt: skip


def draw(module: torch.nn.Module, seed: int, std: float = 0.15) -> Any:
    """Random weights, the same for the same names."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)) * 1009 + len(name))
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64) * std + ("norm" in name)
            p.copy_(drawn)
    return module.requires_grad_(False).eval()


def controlnet(variant: str, base: dict[str, Any] = BASE, seed: int = 7) -> ControlNet:
    return draw(ControlNet(config(variant, base)), seed)


def transformer(seed: int = 3) -> ZImageTransformer:
    usual = {"_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1]}
    return draw(ZImageTransformer(TransformerConfig.from_json({**usual, "norm_eps": 1e-5, **BASE})), seed)


def their_net(variant: str, ours: ControlNet, base: dict[str, Any] = BASE) -> Any:
    """diffusers' ControlNet with the weights of ours."""
    from diffusers import ZImageControlNetModel

    _, channels, refiner = VARIANTS[variant]
    net = ZImageControlNetModel(
        control_layers_places=list(ours.config.places_in(base["n_layers"])),
        control_refiner_layers_places=[] if refiner == PLAIN else list(range(base["n_refiner_layers"])),
        control_in_dim=channels,
        add_control_noise_refiner=None if refiner == PLAIN else refiner,
        **{name: base[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")},
    )
    net.load_state_dict(ours.state_dict())
    return net


def theirs(variant: str, ours: ControlNet, base: ZImageTransformer) -> tuple[Any, Any]:
    """diffusers' ControlNet and transformer with the weights of ours."""
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    transformer, net = ZImageTransformer2DModel(**BASE), their_net(variant, ours)
    transformer.load_state_dict(base.state_dict())
    for each in (transformer, net):
        each.requires_grad_(False).eval()
    return ZImageControlNetModel.from_transformer(net, transformer), transformer


def write(path: Path, net: ControlNet, prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file with split names, as the trainer writes it."""
    tensors = {prefix + name: value.contiguous().clone() for name, value in net.state_dict().items()}
    save_file(tensors, path, metadata=metadata)
    return path


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with q, k and v in one and ComfyUI's names."""
    out = {}
    for name, value in state.items():
        if ".attention.to_q." in name:
            parts = [state[name.replace("to_q", f"to_{part}")] for part in "qkv"]
            out[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            for ours, comfy in (("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm")):
                name = name.replace(f"attention.{ours}.", f"attention.{comfy}.")
            out[name] = value
    return out

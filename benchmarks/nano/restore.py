"""Turn the shipped files back into checkpoints, so that training goes on where the files stand.

    python -m benchmarks.nano.restore --runs RUNS [--assets zimage_core/assets/nano]

What rounding took is lost, and the optimisers' state and the classifier were never shipped. An existing
checkpoint is not written over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.nano.export import ASSETS
from benchmarks.nano.model import Nano
from benchmarks.nano.train_vae import CONFIG, NanoVAE, save
from zimage_core import load_text_encoder, load_transformer, load_vae
from zimage_core.nn.linear import Embedding, Linear


def dense(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Parameters of a loaded network, its packed weights dequantised."""
    for module in model.modules():
        if isinstance(module, (Linear, Embedding)):
            module.dequantize_weight(torch.float32)
    return {f"{prefix}{name}": p.detach().clone() for name, p in model.named_parameters()}


def vae_state(assets: Path) -> dict[str, Tensor]:
    """A NanoVAE whose batch norm undoes Flux's scale and shift, all that export left to undo."""
    vae = NanoVAE()
    vae.norm.running_mean.fill_(CONFIG.shift_factor)
    vae.norm.running_var.fill_(CONFIG.scaling_factor**-2 - vae.norm.eps)
    return filled(vae, dense(load_vae(assets / "vae.safetensors"), "model."))


def nano_state(assets: Path) -> dict[str, Tensor]:
    """A Nano with the files' weights and a classifier that says nothing yet."""
    model = Nano()
    model.classifier.weight.data.zero_()
    found = dense(load_transformer(assets / "transformer.gguf"), "transformer.")
    return filled(model, found | dense(load_text_encoder(assets / "text_encoder.gguf"), "text_encoder."))


def filled(model: nn.Module, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state with the found weights in it; names that the model lacks are an error."""
    state = model.state_dict() | found
    model.load_state_dict(state)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    for name, state in (("vae.pt", vae_state), ("nano.pt", nano_state)):
        path = args.runs / name
        if path.exists():
            raise SystemExit(f"{path} exists; move it away or give another folder")
        weights = state(args.assets)
        save(path, {"model": weights, "ema": weights, "optimisers": [], "step": 0, "spent": 0.0})
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

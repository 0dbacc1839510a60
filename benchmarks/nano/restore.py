"""Turn the shipped files back into checkpoints, so that training goes on where the files stand.

    python -m benchmarks.nano.restore --runs RUNS [--assets zimage_core/assets/nano]

The inverse of export, but for what rounding took and for the optimisers' state and the classifier, which
were never shipped. Refuses to write over a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor, nn

from benchmarks.nano.export import ASSETS
from benchmarks.nano.model import Nano
from benchmarks.nano.train_vae import CONFIG, NanoVAE, save
from zimage_core import load_text_encoder, load_transformer, load_vae


def dense(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """State of a loaded network with its packed weights dequantised."""
    out = {f"{prefix}{name}": p.detach().clone() for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        packed = getattr(module, "quant", None)
        if packed is not None:
            out[f"{prefix}{name}.weight"] = packed.dequantize()
    return out


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

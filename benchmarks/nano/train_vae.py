"""Train the nano VAE on drawn images.

Latents are normalised to zero mean and unit variance per channel while training (a batch norm
without learned scale, frozen for the last part), and disturbed with a little noise, so that the
decoder forgives a transformer that is slightly off. The decoder reads latents in Flux's scale
already; `export` folds the normalisation into the encoder's last convolution, which is exact.

    python -m benchmarks.nano.train_vae --runs RUNS --minutes 20

With --decoder the encoder stands still, so that the transformer can train on its latents meanwhile, and
the decoder of RUNS/vae.pt gets sharper into RUNS/decoder.pt, which `export` prefers.

Resumes from RUNS/vae.pt. Progress of the learning rate follows the clock, since the machine's speed
is not known beforehand; `--steps` makes it follow the step count instead.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.nano.draw import SIZE, draw, random_scene
from zimage_core.config import AutoencoderConfig
from zimage_core.models.autoencoder import Autoencoder

CONFIG = AutoencoderConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8)
LATENT_NOISE = 0.12
"""Standard deviation of the noise added to unit-variance latents while training."""
FREEZE_AT = 0.7
"""Share of the run after which the normalisation stands still."""
CROPS_UNTIL = 0.55
"""Share of the run that trains on random crops instead of whole images, which is faster."""
CROP = 48


class NanoVAE(nn.Module):
    """The autoencoder with normalised latents in between."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Autoencoder(CONFIG)
        self.norm = nn.BatchNorm2d(CONFIG.latent_channels, affine=False, momentum=0.05)
        with torch.no_grad():  # the decoder's input is 1 / scaling_factor times as wide as usual
            self.model.decoder.conv_in.weight.mul_(CONFIG.scaling_factor)

    def latents(self, x: Tensor) -> Tensor:
        """x [B, 3, H, W] in [-1, 1] -> unit-variance latents, what the transformer sees."""
        out: Tensor = self.norm(self.model.moments(x)[0].float())
        return out

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents / CONFIG.scaling_factor + CONFIG.shift_factor)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it; without the instructions it is far slower than float32."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_tile" in flags else torch.float32


def mixed_precision() -> torch.autocast:
    """Autocast to `fast_dtype`, which does nothing if that is float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def batch(rng: np.random.Generator, size: int, crop: int) -> Tensor:
    drawn = []
    for _ in range(size):
        whole = draw(random_scene(rng, held_out=False, glyphs=0.4), rng)
        y, x = rng.integers(0, SIZE - crop + 1, 2)
        drawn.append(whole[y : y + crop, x : x + crop])
    return to_tensor(np.stack(drawn))


def save(path: Path, state: dict[str, object]) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=0, help="follow the step count instead of the clock")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decoder", action="store_true", help="train the decoder alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    vae = NanoVAE().to(memory_format=torch.channels_last)
    path = args.runs / ("decoder.pt" if args.decoder else "vae.pt")
    if args.decoder:
        vae.load_state_dict(torch.load(args.runs / "vae.pt", weights_only=True)["ema"])
        vae.model.encoder.requires_grad_(False)
    ema = {k: v.clone() for k, v in vae.state_dict().items()}
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.98), weight_decay=1e-3)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent, ema = state["step"], state["spent"], state["ema"]
    crops_until = 0.0 if args.decoder else CROPS_UNTIL

    def keep() -> None:
        state = {"model": vae.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema}
        save(path, {**state, "step": step, "spent": time.time() - began})

    began, shown, losses = time.time() - spent, time.time(), []
    while True:
        progress = step / args.steps if args.steps else (time.time() - began) / (60 * args.minutes)
        if progress >= 1:
            break
        rng = np.random.default_rng((1, int(args.decoder), step))
        x = batch(rng, args.batch, CROP if progress < crops_until else SIZE).contiguous(
            memory_format=torch.channels_last
        )
        for group in optimiser.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        vae.norm.train(progress < FREEZE_AT and not args.decoder)
        with mixed_precision():
            z = vae.latents(x)
            y = vae.decode(z + LATENT_NOISE * torch.randn_like(z)).float()
        l1, mse = (y - x).abs().mean(), (y - x).square().mean()
        optimiser.zero_grad(set_to_none=True)
        (l1 + 2 * mse).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step += 1
        decay = min(0.998, 1 - 1 / (step + 1))
        for k, v in vae.state_dict().items():
            if v.is_floating_point():
                ema[k].lerp_(v, 1 - decay)
            else:
                ema[k].copy_(v)
        losses.append((l1.item(), mse.item()))
        if step % 50 == 0:
            a, b = np.mean(losses[-50:], axis=0)
            pace = (time.time() - shown) / 50
            print(f"step {step} at {progress:.3f}  L1 {a:.4f}  MSE {b:.5f}  {pace:.3f} s a step", flush=True)
            shown = time.time()
        if step % 250 == 0:
            keep()
    keep()


if __name__ == "__main__":
    main()

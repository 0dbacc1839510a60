"""Train the nano transformer and its text encoder together, by flow matching.

x = sigma * noise + (1 - sigma) * clean; the transformer is told 1 - sigma and estimates clean - noise.
Half of the noise levels follow the eight-step schedule's density, half are logit-normal, both shifted
by 3. A small classifier on the encoder's last token names the attributes of the prompt; it teaches the
encoder to read within minutes and is thrown away afterwards.

    python -m benchmarks.nano.train --runs RUNS --minutes 80

Needs RUNS/vae.pt; resumes from RUNS/nano.pt; writes sample sheets RUNS/sheet-STEP.png. Progress of the
learning rate follows the clock (`--steps` makes it follow the step count). Ctrl-C and SIGTERM end it
with a checkpoint, and pauses do not count.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.nano.draw import SIZE, ZH, Scene, describe, draw, loosen, random_scene, sheet
from benchmarks.nano.model import CLASSES, Nano, images, pad_ids, speed_up
from benchmarks.nano.muon import Muon
from benchmarks.nano.train_vae import NanoVAE, fast_dtype, mixed_precision, save, to_tensor

EMPTY = 0.05
"""Share of empty captions, so that guidance works too."""
GLYPH_SHARE = 0.2
"""Share of images of glyphs; there are 60 glyphs and six shapes."""
Show = Callable[[Scene, np.random.Generator], tuple[Scene, list[np.ndarray]]]


def labels(scene: Scene, prompt: str) -> list[int]:
    """What the prompt says about each attribute; -100 where it says nothing."""
    out = []
    for names, attribute in CLASSES:
        value = getattr(scene, attribute)
        unsaid = attribute in ("colour", "background") and not (
            value in prompt.lower() or ZH[value] in prompt
        )
        moot = attribute in ("position", "size") and (scene.glyph or scene.count > 1)
        out.append(-100 if unsaid or moot or not prompt else names.index(value))
    return out


def plain(scene: Scene, rng: np.random.Generator) -> tuple[Scene, list[np.ndarray]]:
    """The scene that a prompt will describe, and the one image of it."""
    return scene, [draw(scene, rng)]


class Pool:
    """Drawn scenes with their latents; a few are replaced before every step.

    Args:
        vae: Encodes the images.
        size: Number of scenes that are kept.
        seed: Step to start at.
        show: A scene -> what its prompt will describe, and images: the wanted one first, then what
            conditions it.
        kinds: Number of images that `show` gives.
    """

    def __init__(self, vae: NanoVAE, size: int, seed: int, show: Show = plain, kinds: int = 1) -> None:
        self.vae, self.rng, self.show = vae, np.random.default_rng((2, seed)), show
        self.scenes: list[Scene] = [Scene("red", "blue", "circle")] * size
        self.latents = torch.zeros(size, kinds, 16, SIZE // 8, SIZE // 8)
        self.next = self.filled = 0

    @torch.no_grad()
    def renew(self, count: int) -> None:
        scenes = [random_scene(self.rng, held_out=False, glyphs=GLYPH_SHARE) for _ in range(count)]
        shown = [self.show(s, self.rng) for s in scenes]
        drawn = to_tensor(np.stack([image for _, images in shown for image in images]))
        with mixed_precision():
            latents = self.vae.latents(drawn).unflatten(0, (count, -1))
        for (scene, _), latent in zip(shown, latents, strict=True):
            self.scenes[self.next], self.latents[self.next] = scene, latent
            self.next = (self.next + 1) % len(self.scenes)
            self.filled = max(self.filled, self.next or len(self.scenes))


class Batch(NamedTuple):
    """One step's scenes, prompts, latents [B, kinds, 16, h, w], noise [B, 16, h, w] and noise levels [B]."""

    scenes: list[Scene]
    said: list[str]
    latents: Tensor
    noise: Tensor
    sigma: Tensor

    @property
    def noisy(self) -> Tensor:
        """What the transformer sees."""
        s = self.sigma[:, None, None, None]
        return s * self.noise + (1 - s) * self.latents[:, 0]

    def loss(self, out: Tensor) -> Tensor:
        """Mean squared error of an estimate of clean - noise."""
        return (out - (self.latents[:, 0] - self.noise)).square().mean()


def pick(pool: Pool, count: int, step: int) -> Batch:
    """The batch of a step, which depends on the step's number alone."""
    rng = np.random.default_rng((3, step))
    generator = torch.Generator().manual_seed(step)
    rows = rng.integers(0, pool.filled, count)
    scenes = [pool.scenes[k] for k in rows]
    said = [loosen(describe(s, rng, chinese=bool(rng.integers(2)), omit=0.04), rng) for s in scenes]
    said = ["" if rng.random() < EMPTY else p for p in said]
    latents = pool.latents[torch.from_numpy(rows)]
    noise = torch.randn(latents[:, 0].shape, generator=generator)
    return Batch(scenes, said, latents, noise, noise_levels(count, generator))


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = torch.sigmoid(torch.randn(count, generator=generator))
    u = torch.where(torch.arange(count) % 2 == 0, u, normal)
    return 3 * u / (1 + 2 * u)


def load_vae(runs: Path) -> NanoVAE:
    vae = NanoVAE()
    vae.load_state_dict(torch.load(runs / "vae.pt", weights_only=True)["ema"])
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def in_a_block(name: str) -> bool:
    """Whether a matrix of this name lies inside a block: Muon's, the others are AdamW's."""
    return any(part in name for part in (".attention.to", ".feed_forward.", ".self_attn.")) or (
        name.startswith("text_encoder.layers.") and ".mlp." in name
    )


class Trainer:
    """The networks, their optimisers and averages; `step` is one update."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.runs / "nano.pt"
        self.model, self.vae = Nano(), load_vae(args.runs)
        named = dict(self.model.named_parameters())
        inner = [p for n, p in named.items() if p.ndim == 2 and in_a_block(n)]
        rest = [p for n, p in named.items() if not (p.ndim == 2 and in_a_block(n))]
        self.optimisers = (
            (Muon(inner, dtype=fast_dtype()), args.muon),
            (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=1e-3), args.lr),
        )
        self.ema = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.done, self.began = 0, time.time()
        if self.path.exists():
            self._resume()
        self.pool = Pool(self.vae, args.pool, self.done)
        for _ in range(args.first // 64):
            self.pool.renew(64)
        if args.compile:
            dit, encoder = self.model.transformer, self.model.text_encoder
            for block in (*dit.noise_refiner, *dit.context_refiner, *dit.layers, *encoder.layers):
                block.compile(dynamic=False)

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        if state["optimisers"]:  # a checkpoint from `restore` has none
            for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
        self.done, self.ema = state["step"], state["ema"]
        self.began -= state["spent"]

    def keep(self) -> None:
        """Write the checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimisers": [o.state_dict() for o, _ in self.optimisers],
        }
        save(self.path, {**state, "step": self.done, "spent": time.time() - self.began})

    def progress(self) -> float:
        """Share of the run that is over."""
        if self.args.steps:
            return self.done / self.args.steps
        return (time.time() - self.began) / (60 * self.args.minutes)

    def step(self, progress: float) -> tuple[float, float]:
        """One update; the flow matching loss and the classifier's."""
        self.pool.renew(self.args.fresh)
        batch = pick(self.pool, self.args.batch, self.done)
        targets = torch.tensor([labels(s, p) for s, p in zip(batch.scenes, batch.said, strict=True)])
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for optimiser, lr in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1, (self.done + 1) / 100) * (0.01 + 0.99 * cosine)
            optimiser.zero_grad(set_to_none=True)
        with mixed_precision():
            ids, lengths = pad_ids(batch.said)
            hidden = self.model.caption(ids)
            guess = self.model.classifier(hidden[torch.arange(len(ids)), lengths - 1]).float()
            out = self.model(batch.noisy, 1 - batch.sigma, hidden, lengths)
        loss = batch.loss(out)
        parts = guess.split([len(names) for names, _ in CLASSES], dim=1)
        terms = [
            nn.functional.cross_entropy(p, t, reduction="sum") for p, t in zip(parts, targets.T, strict=True)
        ]
        named = sum(terms) / (targets != -100).sum()
        (loss + 0.3 * cosine * named).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self.done += 1
        decay = min(0.998, 1 - 1 / (0.2 * self.done + 1))
        torch._foreach_lerp_(list(self.ema.values()), list(self.model.state_dict().values()), 1 - decay)
        return loss.item(), named.item()

    def run(self) -> None:
        """Train until the time or the steps are over, with a line every 50 steps."""
        test = np.random.default_rng(99)
        scenes = [random_scene(test, held_out=True) for _ in range(40)]
        prompts = [describe(s, test, chinese=bool(k % 2)) for k, s in enumerate(scenes)]
        (self.args.runs / "sheet.txt").write_text("\n".join(prompts), encoding="utf-8")
        shadow, losses, shown, kept = Nano(), [], time.time(), time.time()
        while (progress := self.progress()) < 1:
            losses.append(self.step(progress))
            if self.done % 50 == 0:
                a, b = np.mean(losses[-50:], axis=0)
                print(
                    f"step {self.done} at {progress:.3f}  loss {a:.4f}  named {b:.4f}  "
                    f"{(time.time() - shown) / 50:.3f} s a step",
                    flush=True,
                )
                shown = time.time()
            if self.done % 500 == 0:
                shadow.load_state_dict(self.ema)
                drawn = sheet(images(shadow, self.vae, prompts, 5))
                drawn.save(self.args.runs / f"sheet-{self.done:05d}.png")
            if time.time() - kept > 240:
                self.keep()
                kept = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--steps", type=int, default=0, help="follow the step count instead of the clock")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--compile", action="store_true", help="compile the blocks; a quarter faster")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW")
    parser.add_argument("--muon", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--pool", type=int, default=32768, help="images kept")
    parser.add_argument("--first", type=int, default=4096, help="images drawn before the first step")
    parser.add_argument("--fresh", type=int, default=8, help="new images a step")
    parser.add_argument("--threads", type=int, default=1, help="as many as there are idle cores, no more")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    speed_up()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    trainer = Trainer(args)
    try:
        trainer.run()
    finally:
        trainer.keep()


if __name__ == "__main__":
    main()

"""Train something small beside the frozen nano model: a LoRA or a ControlNet.

The base is the shipped model, dequantised (`restore`). Scenes, prompts and noise levels are those of
`train`; only the trained module and the drawn images differ. Resumes from its checkpoint; the learning
rate follows the step count, so that a run is repeatable.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.nano.draw import Scene, describe, random_scene, sheet
from benchmarks.nano.export import ASSETS
from benchmarks.nano.model import Control, Nano, images, pad_ids, speed_up
from benchmarks.nano.restore import nano_state, vae_state
from benchmarks.nano.train import Batch, Pool, Show, pick
from benchmarks.nano.train_vae import NanoVAE, mixed_precision, save, to_tensor

KEEP_EVERY = 100
SCALES = (0.6, 1.1)
"""A ControlNet is trained at scales between these, for people use it at 0.65 to 1."""


def base(assets: Path = ASSETS) -> tuple[Nano, NanoVAE]:
    """The shipped networks, frozen, as they are trained."""
    model, vae = Nano(), NanoVAE()
    model.load_state_dict(nano_state(assets))
    vae.load_state_dict(vae_state(assets))
    for network in (model, vae):
        network.eval().requires_grad_(False)
    return model, vae.to(memory_format=torch.channels_last)


class Tuner:
    """The frozen base, what is trained beside it, and its average."""

    def __init__(
        self, args: argparse.Namespace, name: str, part: nn.Module, base: tuple[Nano, NanoVAE],
        show: Show, kinds: int, condition: Callable[..., Control] | None = None,
    ) -> None:  # fmt: skip
        self.args, self.path, self.part = args, args.runs / f"{name}.pt", part
        self.model, self.vae = base
        self.condition, self.show = condition, show
        self.optimiser = torch.optim.AdamW(part.parameters(), betas=(0.9, 0.98), weight_decay=1e-3)
        self.ema = {k: v.clone() for k, v in part.state_dict().items()}
        self.done, self.losses = 0, []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            part.load_state_dict(state["part"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.ema, self.done = state["ema"], state["step"]
        self.pool = Pool(self.vae, args.pool, self.done, show, kinds)
        for _ in range(args.first // 64):
            self.pool.renew(64)

    def keep(self) -> None:
        """Write the checkpoint."""
        state = {"part": self.part.state_dict(), "ema": self.ema, "step": self.done}
        save(self.path, {**state, "optimiser": self.optimiser.state_dict()})

    def loss(self, batch: Batch) -> Tensor:
        """Flow matching loss of the base with the part beside it."""
        with mixed_precision():
            ids, lengths = pad_ids(batch.said)
            with torch.no_grad():
                hidden = self.model.caption(ids)
            control = None
            if self.condition:
                low, high = SCALES
                share = torch.rand(len(ids), 1, 1, generator=torch.Generator().manual_seed(self.done))
                control = self.condition(batch.latents[:, 1], low + (high - low) * share)
            out = self.model(batch.noisy, 1 - batch.sigma, hidden, lengths, control)
        return batch.loss(out)

    def step(self) -> float:
        """One update; its loss."""
        self.pool.renew(self.args.fresh)
        progress = self.done / self.args.steps
        for group in self.optimiser.param_groups:
            warm = min(1, (self.done + 1) / 50)
            group["lr"] = self.args.lr * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.loss(pick(self.pool, self.args.batch, self.done))
        loss.backward()
        nn.utils.clip_grad_norm_(self.part.parameters(), 1.0)
        self.optimiser.step()
        self.done += 1
        decay = min(0.995, 1 - 1 / (0.2 * self.done + 1))
        torch._foreach_lerp_(list(self.ema.values()), list(self.part.state_dict().values()), 1 - decay)
        return loss.item()

    def run(self) -> None:
        """Train until the steps are over, with a line and a checkpoint every KEEP_EVERY steps."""
        began, spent = time.time(), time.process_time()
        losses: list[float] = []
        while self.done < self.args.steps:
            losses.append(self.step())
            if self.done % KEEP_EVERY == 0 or self.done == self.args.steps:
                self.keep()
                print(
                    f"step {self.done}  loss {np.mean(losses[-KEEP_EVERY:]):.4f}  "
                    f"{time.time() - began:.0f} s, {time.process_time() - spent:.0f} s of a core",
                    flush=True,
                )

    def finish(self) -> None:
        """Take the average for the weights, and draw a sheet of held-out prompts with it."""
        self.part.load_state_dict(self.ema)
        rng = np.random.default_rng(99)
        shown = [self.show(random_scene(rng, held_out=True), rng) for _ in range(30)]
        prompts = [describe(scene, rng, chinese=bool(k % 2)) for k, (scene, _) in enumerate(shown)]
        control = None
        rows: list[np.ndarray] = []
        if self.condition:
            hints = np.stack([pictures[1] for _, pictures in shown])
            control = self.condition(self.vae.latents(to_tensor(hints)).detach())
            rows = [*hints]
        rows += [*images(self.model, self.vae, prompts, 5, control)]
        sheet(rows).save(self.path.with_suffix(".png"))


def arguments(steps: int, lr: float) -> argparse.Namespace:
    """The command line of both trainings."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--pool", type=int, default=8192, help="images kept")
    parser.add_argument("--first", type=int, default=2048, help="images drawn before the first step")
    parser.add_argument("--fresh", type=int, default=8, help="new images a step")
    parser.add_argument("--threads", type=int, default=1, help="as many as there are idle cores, no more")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    speed_up()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return args


def single(scene: Scene) -> bool:
    """Whether a scene has one shape, which stands where its position says."""
    return not scene.glyph and scene.count == 1

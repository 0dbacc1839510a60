"""Train the Omni sibling: what a prompt leaves open, colours, comes from a reference image.

    python -m benchmarks.nano.train_omni --runs RUNS --minutes 45

Starts from the shipped model, whose text encoder and VAE stay frozen; the transformer, its vision branch
and a tiny vision tower are trained together, from scenes in pairs. The prompt describes the first scene and
leaves out its colour, its background, both or neither; the second, the reference, has what the prompt
leaves out and is anything else in all other respects. Now and then the reference lacks its latent or its
features. Every sixth step is text to image without a reference, so that this is not forgotten. A small
classifier on the tower names what the reference shows; it is thrown away afterwards. Resumes from
RUNS/omni.pt.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.nano.check import read
from benchmarks.nano.draw import COLOURS, SHAPES, SIZE, Scene, draw, loosen, random_scene, sentence, sheet
from benchmarks.nano.export import ASSETS
from benchmarks.nano.model import TRANSFORMER, pad_ids, speed_up
from benchmarks.nano.model_omni import FEATURES, OmniNano, Tower, images, run, second_ids
from benchmarks.nano.muon import Muon
from benchmarks.nano.train import EMPTY, GLYPH_SHARE, in_a_block, noise_levels
from benchmarks.nano.train_vae import NanoVAE, fast_dtype, mixed_precision, save, to_tensor
from benchmarks.nano.tune import base

OPEN_COLOUR, OPEN_BACKGROUND = 0.75, 0.25
"""How often a prompt leaves these out."""
NO_LATENT, NO_FEATURES = 0.25, 0.05
"""How often a reference lacks these."""
PLAIN_EVERY = 8
"""Of so many steps one is text to image without a reference."""
INSIDE = ("reference", "features", "target 1", "target 2")
"""Where in the transformer a classifier listens."""
CLASSES = (("colour", list(COLOURS)), ("background", list(COLOURS)), ("shape", [*SHAPES, ""]))


class Task(NamedTuple):
    """A scene, what its prompt leaves open, and the scene of the reference."""

    scene: Scene
    colour: bool
    background: bool
    reference: Scene

    def prompt(self, rng: np.random.Generator, chinese: bool) -> str:
        """A sentence without what is open."""
        return sentence(self.scene, rng, chinese, not self.background, not self.colour)


def random_task(rng: np.random.Generator, held_out: bool, glyphs: float = GLYPH_SHARE) -> Task:
    """A task of the training set, or one whose scenes were kept out of it."""
    scene = random_scene(rng, held_out, glyphs)
    colour, background = rng.random() < OPEN_COLOUR, rng.random() < OPEN_BACKGROUND
    while True:
        reference = random_scene(rng, held_out, glyphs)
        taken = {k: getattr(scene, k) for k, v in (("colour", colour), ("background", background)) if v}
        reference = replace(reference, **taken)
        if reference.colour != reference.background and reference.held_out == held_out:
            return Task(scene, bool(colour), bool(background), reference)


class Pairs:
    """Tasks with the latents of both drawings and the pixels of the reference; a few are new in each step."""

    def __init__(self, vae: NanoVAE, size: int, seed: int) -> None:
        self.vae, self.rng = vae, np.random.default_rng((5, seed))
        self.tasks: list[Task] = []
        self.size, self.next = size, 0
        self.latents = torch.zeros(size, 2, 16, SIZE // 8, SIZE // 8)
        self.pixels = torch.zeros(size, SIZE, SIZE, 3, dtype=torch.uint8)

    @torch.no_grad()
    def renew(self, count: int) -> None:
        """Draw new tasks in place of the oldest."""
        tasks = [random_task(self.rng, held_out=False) for _ in range(count)]
        drawn = np.stack([draw(s, self.rng) for t in tasks for s in (t.scene, t.reference)])
        with mixed_precision():
            latents = self.vae.latents(to_tensor(drawn)).unflatten(0, (count, 2))
        pixels = torch.from_numpy(drawn).unflatten(0, (count, 2))[:, 1]
        for task, latent, image in zip(tasks, latents, pixels, strict=True):
            if len(self.tasks) < self.size:
                self.tasks.append(task)
            self.tasks[self.next], self.latents[self.next], self.pixels[self.next] = task, latent, image
            self.next = (self.next + 1) % self.size


def class_numbers(scenes: list[Scene]) -> Tensor:
    """Number of each attribute of CLASSES, [scenes, attributes]."""
    return torch.tensor([[names.index(getattr(s, a)) for a, names in CLASSES] for s in scenes])


def named_loss(guess: Tensor, wanted: Tensor, first: int = len(CLASSES)) -> Tensor:
    """Mean cross entropy of guesses [B, ..., classes]; -100 does not count."""
    parts = guess.float().split([len(names) for _, names in CLASSES], -1)
    terms = [
        nn.functional.cross_entropy(p.flatten(0, -2), w, ignore_index=-100)
        for p, w in list(zip(parts, wanted.T, strict=True))[:first]
    ]
    return torch.stack(terms).mean()


def teach(tower: Tower, head: nn.Linear, steps: int) -> None:
    """Train a tower alone: from each of its features one can tell colour, background and shape."""
    rng = np.random.default_rng(8)
    scenes = [random_scene(rng, held_out=False, glyphs=GLYPH_SHARE) for _ in range(8192)]
    pixels, wanted = torch.from_numpy(np.stack([draw(s, rng) for s in scenes])), class_numbers(scenes)
    trained = [*tower.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=1e-2)
    for step in range(steps):
        rows = torch.from_numpy(np.random.default_rng((9, step)).integers(0, len(scenes), 128))
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
        seen = tower(pixels[rows])
        loss = named_loss(head(seen), wanted[rows].repeat_interleave(seen.shape[1], 0))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0:
            print(f"tower, step {step + 1}: {loss.item():.4f}", flush=True)


class Trainer:
    """The networks, their optimisers and averages; `step` is one update."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, args.runs / "omni.pt"
        shipped, self.vae = base()
        count = sum(len(names) for _, names in CLASSES)
        widths = {"tower": FEATURES, **dict.fromkeys(INSIDE, TRANSFORMER.dim)}
        self.model = OmniNano()
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, width in widths.items()})
        self.model.load_state_dict(shipped.state_dict(), strict=False)
        dit = self.model.transformer
        dit.siglip_refiner.load_state_dict(dit.context_refiner.state_dict())
        self.model.text_encoder.requires_grad_(False)
        self.model.classifier.requires_grad_(False)
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        inner = {n: p for n, p in named.items() if p.ndim == 2 and in_a_block(n) and "siglip" not in n}
        branch = {n: p for n, p in named.items() if "siglip_refiner" in n and p.ndim == 2}
        new = [p for n, p in named.items() if "siglip" in n and n not in branch]
        rest = [p for n, p in named.items() if n not in inner and "siglip" not in n]
        slow = {"betas": (0.9, 0.98), "weight_decay": 1e-3}
        self.optimisers = (
            (Muon(inner.values(), dtype=fast_dtype()), args.muon),
            (Muon(branch.values(), dtype=fast_dtype()), 2 * args.muon),
            (torch.optim.AdamW(rest, **slow), args.lr),
            (torch.optim.AdamW([*new, *self.heads.parameters()], **slow), 2 * args.lr),
        )
        self.trained = [*named.values(), *self.heads.parameters()]
        self.parts = dict(named)
        self.ema = {n: p.detach().clone() for n, p in self.parts.items()}
        self.done, self.began = 0, time.time()
        self.said: list[float] = []
        if self.path.exists():
            self._resume()
        else:
            teach(self.model.siglip, self.heads["tower"], args.teach)
            self.ema = {n: p.detach().clone() for n, p in self.parts.items()}
        self.pairs = Pairs(self.vae, args.pool, self.done)
        for _ in range(args.first // 64):
            self.pairs.renew(64)
        if args.compile:
            self.model.run_block = torch.compile(run, dynamic=False)

    def _resume(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)
        self.heads.load_state_dict(state["heads"])
        if state["optimisers"]:
            for (optimiser, _), saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
        self.done, self.ema = state["step"], state["ema"]
        self.began -= state["spent"]

    def keep(self) -> None:
        """Write the checkpoint."""
        state = {
            "model": {n: p.detach() for n, p in self.parts.items()},
            "heads": self.heads.state_dict(),
            "ema": self.ema,
            "optimisers": [o.state_dict() for o, _ in self.optimisers],
        }
        save(self.path, {**state, "step": self.done, "spent": time.time() - self.began})

    def loss(self) -> tuple[Tensor, Tensor]:
        """Flow matching loss of this step's batch, and the tower's classification."""
        args, pairs, model = self.args, self.pairs, self.model
        rng = np.random.default_rng((6, self.done))
        generator = torch.Generator().manual_seed(self.done)
        rows = rng.integers(0, len(pairs.tasks), args.batch)
        tasks = [pairs.tasks[k] for k in rows]
        latents = pairs.latents[rows]
        noise = torch.randn(latents[:, 0].shape, generator=generator)
        sigma = noise_levels(len(rows), generator)
        s = sigma.view(-1, 1, 1, 1)
        noisy = s * noise + (1 - s) * latents[:, 0]
        plain = self.done % PLAIN_EVERY == 0
        said = []
        for task in tasks:
            chinese = bool(rng.integers(2))
            asked = replace_open(task) if plain else task
            text = loosen(asked.prompt(rng, chinese), rng)
            said.append("" if rng.random() < EMPTY else text)
        with mixed_precision():
            if plain:
                ids, lengths = pad_ids(said)
                with torch.no_grad():
                    hidden = model.caption(ids)
                out = model(noisy, 1 - sigma, hidden, lengths)
                named = torch.zeros(())
            else:
                ids, lengths = second_ids(said)
                with torch.no_grad():
                    hidden = model.texts(ids, lengths)
                drawn = torch.from_numpy(rng.random(len(rows)))
                has_latent, has_features = drawn >= NO_LATENT, drawn < 1 - NO_FEATURES
                seen = model.siglip(pairs.pixels[rows])
                out = model.omni(
                    noisy, 1 - sigma, hidden, lengths, latents[:, 1], seen, has_latent, has_features
                )
                named = self.named(seen, tasks, sigma)
        return (out - (latents[:, 0] - noise)).square().mean(), named

    def named(self, seen: Tensor, tasks: list[Task], sigma: Tensor) -> Tensor:
        """Cross entropies: what tower and reference say about the reference, and the target about itself."""
        references = class_numbers([t.reference for t in tasks])
        wanted = class_numbers([t.scene for t in tasks])
        wanted[sigma < 0.7] = -100  # where the noisy image shows it by itself
        inside = self.model.seen
        total = named_loss(self.heads["tower"](seen.mean(1)), references)
        for name in INSIDE:
            total = total + named_loss(
                self.heads[name](inside[name]), wanted if name.startswith("target") else references
            )
        self.said = [named_loss(self.heads[n](inside[n]), wanted, 1).item() for n in INSIDE if "target" in n]
        return total / (1 + len(INSIDE))

    def step(self, progress: float) -> tuple[float, float]:
        """One update; both losses."""
        self.pairs.renew(self.args.fresh)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for optimiser, lr in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1, (self.done + 1) / 50) * (0.01 + 0.99 * cosine)
            optimiser.zero_grad(set_to_none=True)
        loss, named = self.loss()
        (loss + cosine * named).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimiser, _ in self.optimisers:
            optimiser.step()
        self.done += 1
        decay = min(0.995, 1 - 1 / (0.2 * self.done + 1))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parts.values()), 1 - decay)
        return loss.item(), named.item()

    def progress(self) -> float:
        """Share of the run that is over."""
        return (time.time() - self.began) / (60 * self.args.minutes)

    def run(self) -> None:
        """Train until the time is over, with a line every 25 steps and a look every 250."""
        plain: list[float] = []
        losses: list[tuple[float, float]] = []
        shown = kept = time.time()
        while (progress := self.progress()) < 1:
            both = self.step(progress)
            (plain if (self.done - 1) % PLAIN_EVERY == 0 else losses).append(both)
            if self.done % 25 == 0:
                a, b = np.mean(losses[-20:], axis=0)
                print(
                    f"step {self.done} at {progress:.3f}  loss {a:.4f}  named {b:.4f}  "
                    f"plain {np.mean([x for x, _ in plain[-4:]]):.4f}  inside {self.said}  "
                    f"{(time.time() - shown) / 25:.3f} s a step",
                    flush=True,
                )
                shown = time.time()
            if self.done % 150 == 0:
                self.look()
            if time.time() - kept > 180:
                self.keep()
                kept = time.time()

    @torch.no_grad()
    def look(self, count: int = 48) -> None:
        """Print what is right in held-out tasks with the averaged weights; write a sheet."""
        now = {n: p.clone() for n, p in self.parts.items()}
        for n, p in self.parts.items():
            p.copy_(self.ema[n])
        rng = np.random.default_rng(99)
        tasks = [random_task(rng, held_out=True) for _ in range(count)]
        said = [t.prompt(rng, chinese=bool(k % 2)) for k, t in enumerate(tasks)]
        drawn = np.stack([draw(t.reference, rng) for t in tasks])
        with mixed_precision():
            latents = self.vae.latents(to_tensor(drawn)).float()
        compiled, self.model.run_block = self.model.run_block, run
        made = images(self.model, self.vae, said, torch.from_numpy(drawn), latents, 5)
        self.model.run_block = compiled
        seen = [read(image) for image in made]
        line = []
        for name in ("colour", "background"):
            for state in (True, False):
                hits = [
                    getattr(t.scene, name) == getattr(s, name)
                    for t, s in zip(tasks, seen, strict=True)
                    if getattr(t, name) is state
                ]
                line.append(f"{name} {'open' if state else 'said'} {np.mean(hits):.2f} of {len(hits)}")
        hits = [
            (t.scene.shape, t.scene.glyph) == (s.shape, s.glyph) for t, s in zip(tasks, seen, strict=True)
        ]
        print("  look:", ", ".join(line), f"shape {np.mean(hits):.2f}", flush=True)
        sheet([*drawn[:12], *made[:12], *drawn[12:24], *made[12:24]], 12).save(
            self.args.runs / f"omni-{self.done:05d}.png"
        )
        (self.args.runs / "omni.txt").write_text("\n".join(said), encoding="utf-8")
        for n, p in self.parts.items():
            p.copy_(now[n])


def replace_open(task: Task) -> Task:
    """The task with everything said."""
    return task._replace(colour=False, background=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=ASSETS)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--lr", type=float, default=5e-4, help="of AdamW")
    parser.add_argument("--muon", type=float, default=0.005, help="learning rate of Muon")
    parser.add_argument("--pool", type=int, default=16384, help="tasks kept")
    parser.add_argument("--first", type=int, default=1024, help="tasks drawn before the first step")
    parser.add_argument("--teach", type=int, default=1500, help="steps of the tower alone, at first")
    parser.add_argument("--fresh", type=int, default=2, help="new tasks a step")
    parser.add_argument("--threads", type=int, default=1, help="as many as there are idle cores, no more")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
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

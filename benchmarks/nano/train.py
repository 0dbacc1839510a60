"""Train the nano transformer and its text encoder together, by flow matching.

x = sigma * noise + (1 - sigma) * clean; the transformer is told 1 - sigma and estimates clean - noise.
Half of the noise levels follow the eight-step schedule's density, half are logit-normal, both shifted
by 3. A small classifier on the encoder's last token names the attributes of the prompt; it teaches the
encoder to read within minutes and is thrown away afterwards.

    python -m benchmarks.nano.train --runs RUNS --minutes 80

Needs RUNS/vae.pt; resumes from RUNS/nano.pt; writes sample sheets RUNS/sheet-STEP.png. Progress of the
learning rate follows the clock (`--steps` makes it follow the step count).
"""

from __future__ import annotations

import argparse
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.nano.draw import (
    COLOURS,
    GLYPHS,
    POSITIONS,
    RADII,
    SHAPES,
    SIZE,
    ZH,
    Scene,
    describe,
    draw,
    loosen,
    random_scene,
)
from benchmarks.nano.muon import Muon
from benchmarks.nano.train_vae import NanoVAE, fast_dtype, mixed_precision, save, to_tensor
from benchmarks.nano.vocabulary import LENGTH, encode, tokenizer
from zimage_core.config import TextEncoderConfig, TransformerConfig
from zimage_core.models import sequence, text_encoder, transformer
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.linear import Linear

TRANSFORMER = TransformerConfig(
    dim=256, n_layers=4, n_refiner_layers=1, n_heads=2, cap_feat_dim=256, hidden_dim=682
)
ROWS = SIZE // 16
TEXT = 24
"""Tokens of the longest prompt; the caption is padded to LENGTH behind the encoder."""
SIGMAS = (1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0.0)
"""Eight steps at shift 3."""
EMPTY = 0.05
"""Share of empty captions, so that guidance works too."""
GLYPH_SHARE = 0.2
"""Of the pictures; there are 60 glyphs and six shapes."""
GATE = 0.55
"""Initial bias of the gates; tanh of it is 0.5."""
CLASSES = (
    (list(COLOURS), "colour"),
    (list(COLOURS), "background"),
    ([*SHAPES, ""], "shape"),
    (list(POSITIONS), "position"),
    (list(RADII), "size"),
    ([1, 2, 3], "count"),
    ([*GLYPHS, ""], "glyph"),
)


def encoder_config() -> TextEncoderConfig:
    return TextEncoderConfig(
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=384,
        vocab_size=tokenizer().get_vocab_size(),
        rope_theta=1e6,
    )


def short_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """zimage_core.nn.attention written out: at 64 tokens its backward pass is several times faster."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
    if q.shape[-3] != k.shape[-3]:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    score = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        score = score + torch.full(score.shape[-2:], float("-inf")).triu(1)
    return (score.softmax(-1).to(v.dtype) @ v).transpose(-3, -2).flatten(-2)


def speed_up() -> None:
    """Put plain torch in place of what the library does more carefully than training needs."""
    transformer.attention = text_encoder.attention = short_attention
    Linear.forward = lambda self, x: nn.functional.linear(x, self.weight, self.bias)


class Nano(nn.Module):
    """Both networks, run on whole batches, and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = ZImageTransformer(TRANSFORMER)
        self.text_encoder = TextEncoder(encoder_config())
        self.classifier = nn.Linear(256, sum(len(names) for names, _ in CLASSES))
        image = sequence.image_positions(ROWS, ROWS, LENGTH)
        joint = torch.cat((image, sequence.caption_positions(LENGTH)))
        self.turn = self.transformer.rotation(joint)
        self.image_turn = tuple(t[: len(image)] for t in self.turn)
        self.caption_turn = tuple(t[len(image) :] for t in self.turn)
        self.text_turn = self.text_encoder.rotation(TEXT)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        dit = self.transformer
        for block in (*dit.noise_refiner, *dit.layers):
            linear = block.adaLN_modulation[0]
            linear.weight.normal_(std=0.02)
            linear.bias.view(4, -1)[[1, 3]] = GATE
        final = dit.all_final_layer["2-1"]
        for linear in (final.linear, final.adaLN_modulation[1]):
            linear.weight.zero_()
        dit.x_pad_token.normal_(std=0.5)
        dit.cap_pad_token.normal_(std=0.5)
        self.text_encoder.embed_tokens.weight.normal_(std=0.5)

    def caption(self, ids: Tensor) -> Tensor:
        """ids [B, TEXT] -> hidden states [B, TEXT, 256]; causal, so what is after the end is harmless."""
        x = nn.functional.embedding(ids, self.text_encoder.embed_tokens.weight)
        for layer in self.text_encoder.layers:
            x = layer(x, self.text_turn, x.dtype)
        return x

    def forward(self, x: Tensor, t: Tensor, hidden: Tensor, lengths: Tensor) -> Tensor:
        """x [B, 16, h, w], t [B], hidden [B, TEXT, 256], lengths [B] -> estimate of clean - noise."""
        dit = self.transformer
        b, _, height, width = x.shape
        temb = dit.t_embedder(t * TRANSFORMER.t_scale, x.dtype)
        image = dit.all_x_embedder["2-1"](sequence.patchify(x, 2)).float()
        count = image.shape[1]
        image = torch.cat((image, dit.x_pad_token.expand(b, sequence.pad_count(count), -1)), 1)
        for block in dit.noise_refiner:
            image = block(image, self.image_turn, temb)
        real = (torch.arange(LENGTH) < lengths[:, None])[:, :, None]
        text = nn.functional.pad(dit.cap_embedder(hidden).float(), (0, 0, 0, LENGTH - TEXT))
        text = torch.where(real, text, dit.cap_pad_token)
        for block in dit.context_refiner:
            text = block(text, self.caption_turn)
        joint = torch.cat((image, text), 1)
        for block in dit.layers:
            joint = block(joint, self.turn, temb)
        tokens = dit.all_final_layer["2-1"](joint[:, :count], temb)
        return sequence.unpatchify(tokens.float(), height, width, 2)


def pad_ids(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Prompts -> ids [B, TEXT] and lengths [B]."""
    rows = [encode(p) for p in prompts]
    if max(map(len, rows)) > TEXT:
        raise ValueError(f"a prompt has more than {TEXT} tokens")
    ids = torch.zeros(len(rows), TEXT, dtype=torch.int64)
    for row, target in zip(rows, ids, strict=True):
        target[: len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(r) for r in rows])


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


class Pool:
    """Drawn scenes with their latents; a few are replaced before every step."""

    def __init__(self, vae: NanoVAE, size: int, seed: int) -> None:
        self.vae, self.rng = vae, np.random.default_rng((2, seed))
        self.scenes: list[Scene] = [Scene("red", "blue", "circle")] * size
        self.latents = torch.zeros(size, 16, SIZE // 8, SIZE // 8)
        self.next = self.filled = 0

    @torch.no_grad()
    def renew(self, count: int) -> None:
        scenes = [random_scene(self.rng, held_out=False, glyphs=GLYPH_SHARE) for _ in range(count)]
        pictures = to_tensor(np.stack([draw(s, self.rng) for s in scenes]))
        with mixed_precision():
            latents = self.vae.latents(pictures)
        for scene, latent in zip(scenes, latents, strict=True):
            self.scenes[self.next], self.latents[self.next] = scene, latent
            self.next = (self.next + 1) % len(self.scenes)
            self.filled = max(self.filled, self.next or len(self.scenes))


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    normal = torch.sigmoid(torch.randn(count, generator=generator))
    u = torch.where(torch.arange(count) % 2 == 0, u, normal)
    return 3 * u / (1 + 2 * u)


@torch.no_grad()
def sample(model: Nano, prompts: list[str], seed: int) -> Tensor:
    """Unit-variance latents of the prompts after eight Euler steps."""
    x = torch.randn(len(prompts), 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(seed))
    with mixed_precision():
        ids, lengths = pad_ids(prompts)
        hidden = model.caption(ids)
        for sigma, after in pairwise(SIGMAS):
            x = x - (after - sigma) * model(x, torch.full((len(x),), 1 - sigma), hidden, lengths)
    return x


@torch.no_grad()
def pictures(model: Nano, vae: NanoVAE, prompts: list[str], seed: int) -> np.ndarray:
    """uint8 [B, SIZE, SIZE, 3]."""
    y = vae.decode(sample(model, prompts, seed)).float().clamp(-1, 1)
    return ((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def sheet(images: np.ndarray, columns: int = 10) -> Image.Image:
    rows = -(-len(images) // columns)
    out = Image.new("RGB", (columns * (SIZE + 4), rows * (SIZE + 4)), "gray")
    for k, image in enumerate(images):
        out.paste(Image.fromarray(image), (k % columns * (SIZE + 4), k // columns * (SIZE + 4)))
    return out


def load_vae(runs: Path) -> NanoVAE:
    vae = NanoVAE()
    vae.load_state_dict(torch.load(runs / "vae.pt", weights_only=True)["ema"])
    return vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--steps", type=int, default=0, help="follow the step count instead of the clock")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--compile", action="store_true", help="compile the blocks; a quarter faster")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW")
    parser.add_argument("--muon", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--pool", type=int, default=32768, help="pictures kept")
    parser.add_argument("--first", type=int, default=4096, help="pictures drawn before the first step")
    parser.add_argument("--fresh", type=int, default=8, help="new pictures a step")
    parser.add_argument("--threads", type=int, default=1, help="as many as there are idle cores, no more")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    speed_up()
    model, vae = Nano(), load_vae(args.runs)
    inside = (
        ".attention.to",
        ".self_attn.",
        ".feed_forward.",
        "layers.0.mlp.",
        "layers.1.mlp.",
        "layers.2.mlp.",
    )
    inner = {n: p for n, p in model.named_parameters() if p.ndim == 2 and any(i in n for i in inside)}
    rest = [p for n, p in model.named_parameters() if n not in inner]
    optimisers = (
        (Muon(inner.values(), dtype=fast_dtype()), args.muon),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=1e-3), args.lr),
    )
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    step, spent = 0, 0.0
    path = args.runs / "nano.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        if state["optimisers"]:  # a checkpoint from `restore` has none
            for (optimiser, _), saved in zip(optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
        step, spent, ema = state["step"], state["spent"], state["ema"]
    pool = Pool(vae, args.pool, step)
    for _ in range(args.first // 64):
        pool.renew(64)
    shadow = Nano()
    dit = model.transformer
    if args.compile:
        for block in (*dit.noise_refiner, *dit.context_refiner, *dit.layers, *model.text_encoder.layers):
            block.compile(dynamic=False)
    test = np.random.default_rng(99)
    scenes = [random_scene(test, held_out=True) for _ in range(40)]
    prompts = [describe(s, test, chinese=bool(k % 2)) for k, s in enumerate(scenes)]
    (args.runs / "sheet.txt").write_text("\n".join(prompts), encoding="utf-8")

    def keep() -> None:
        state = {
            "model": model.state_dict(),
            "ema": ema,
            "optimisers": [o.state_dict() for o, _ in optimisers],
        }
        save(path, {**state, "step": step, "spent": time.time() - began})

    began, shown, losses, kept = time.time() - spent, time.time(), [], time.time()
    while True:
        progress = step / args.steps if args.steps else (time.time() - began) / (60 * args.minutes)
        if progress >= 1:
            break
        rng = np.random.default_rng((3, step))
        generator = torch.Generator().manual_seed(step)
        pool.renew(args.fresh)
        chosen_rows = rng.integers(0, pool.filled, args.batch)
        batch = [pool.scenes[k] for k in chosen_rows]
        said = [loosen(describe(s, rng, chinese=bool(rng.integers(2)), omit=0.04), rng) for s in batch]
        said = ["" if rng.random() < EMPTY else p for p in said]
        targets = torch.tensor([labels(s, p) for s, p in zip(batch, said, strict=True)])
        clean = pool.latents[torch.from_numpy(chosen_rows)]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = noise_levels(args.batch, generator)
        s = sigma[:, None, None, None]
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for optimiser, lr in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * (0.01 + 0.99 * cosine)
            optimiser.zero_grad(set_to_none=True)
        with mixed_precision():
            ids, lengths = pad_ids(said)
            hidden = model.caption(ids)
            guess = model.classifier(hidden[torch.arange(len(ids)), lengths - 1]).float()
            out = model(s * noise + (1 - s) * clean, 1 - sigma, hidden, lengths)
        loss = (out - (clean - noise)).square().mean()
        parts = guess.split([len(names) for names, _ in CLASSES], dim=1)
        terms = [
            nn.functional.cross_entropy(p, t, reduction="sum") for p, t in zip(parts, targets.T, strict=True)
        ]
        named = sum(terms) / (targets != -100).sum()
        (loss + 0.3 * cosine * named).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
        step += 1
        decay = min(0.998, 1 - 1 / (0.2 * step + 1))
        torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)
        losses.append((loss.item(), named.item()))
        if step % 50 == 0:
            a, b = np.mean(losses[-50:], axis=0)
            pace = (time.time() - shown) / 50
            print(
                f"step {step} at {progress:.3f}  loss {a:.4f}  named {b:.4f}  {pace:.3f} s a step", flush=True
            )
            shown = time.time()
        if step % 500 == 0 or step in (100, 250):
            shadow.load_state_dict(ema)
            sheet(pictures(shadow, vae, prompts, 5)).save(args.runs / f"sheet-{step:05d}.png")
        if time.time() - kept > 240:
            keep()
            kept = time.time()
    keep()


if __name__ == "__main__":
    main()

"""The flow of the ControlNets' trainer in plain torch functions, from its formulae; nothing of the library.

Weights are state dicts by diffusers' names; everything is float64. docs/guides/control.md has the formulae: a
stack of control blocks begins with before_proj(c) + x, each block continues from c, and its hint is
after_proj(c).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

State = Mapping[str, Tensor]


@dataclass
class OracleControl:
    """A ControlNet with one control image.

    Args:
        state: Its tensors.
        kind: "plain" (1.0), "control_layers" (2.0) or "control_noise_refiner" (2.1).
        places: Layers of the base model that it steers.
        latents: [channels, h, w].
        scale: Factor of the hints.
    """

    state: State
    kind: str
    places: Sequence[int]
    latents: Tensor
    scale: float
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))


def predict(
    base: State,
    sizes: Mapping[str, Any],
    latent: Tensor,
    time: float,
    caption: Tensor,
    controls: Sequence[OracleControl],
) -> Tensor:
    """Estimate of clean - noise [16, h, w] with control, in float64."""
    base = {name: value.double() for name, value in base.items()}
    _, h, w = latent.shape
    rows, cols = h // 2, w // 2
    heads, eps = sizes["n_heads"], 1e-5

    def lin(state: State, name: str, x: Tensor) -> Tensor:
        bias = state.get(f"{name}.bias")
        return linear(x, state[f"{name}.weight"].double(), None if bias is None else bias.double())

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()

    def patches(z: Tensor) -> Tensor:
        c = z.shape[0]
        return z.double().reshape(c, rows, 2, cols, 2).permute(1, 3, 2, 4, 0).reshape(rows * cols, 4 * c)

    def padded(x: Tensor, pad: Tensor) -> Tensor:
        return torch.cat((x, pad.double().reshape(1, -1).expand(-len(x) % 32, -1)))

    def angles(ids: Tensor) -> Tensor:
        parts = []
        for axis, width in enumerate(sizes["axes_dims"]):
            k = torch.arange(0, width, 2, dtype=torch.float64) / width
            parts.append(ids[:, axis : axis + 1].double() * sizes["rope_theta"] ** -k)
        return torch.cat(parts, dim=1)

    def rotated(x: Tensor, angle: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(-2)

    def block(state: State, name: str, x: Tensor, angle: Tensor, temb: Tensor | None) -> Tensor:
        def w_(part: str) -> Tensor:
            return state[f"{name}.{part}.weight"]

        s1 = s2 = torch.zeros(())
        g1 = g2 = torch.ones(())
        if temb is not None:
            s1, g1, s2, g2 = lin(state, f"{name}.adaLN_modulation.0", temb).chunk(4)
            g1, g2 = g1.tanh(), g2.tanh()
        y = rms(x, w_("attention_norm1")) * (1 + s1)
        q, k, v = (lin(state, f"{name}.attention.to_{p}", y).unflatten(-1, (heads, -1)) for p in "qkv")
        q = rotated(rms(q, w_("attention.norm_q")), angle)
        k = rotated(rms(k, w_("attention.norm_k")), angle)
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        mixed = torch.einsum("hqk,khd->qhd", score.softmax(-1), v).flatten(1)
        x = x + g1 * rms(lin(state, f"{name}.attention.to_out.0", mixed), w_("attention_norm2"))
        y = rms(x, w_("ffn_norm1")) * (1 + s2)
        f = silu(lin(state, f"{name}.feed_forward.w1", y)) * lin(state, f"{name}.feed_forward.w3", y)
        return x + g2 * rms(lin(state, f"{name}.feed_forward.w2", f), w_("ffn_norm2"))

    freq = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    wave = torch.cat(((time * sizes["t_scale"] * freq).cos(), (time * sizes["t_scale"] * freq).sin()))
    temb = lin(base, "t_embedder.mlp.2", silu(lin(base, "t_embedder.mlp.0", wave)))
    text = lin(base, "cap_embedder.1", rms(caption.double(), base["cap_embedder.0.weight"]))
    text = padded(text, base["cap_pad_token"])
    text_ids = torch.zeros(len(text), 3)
    text_ids[:, 0] = torch.arange(1, len(text) + 1)
    image = padded(lin(base, "all_x_embedder.2-1", patches(latent)), base["x_pad_token"])
    ids = torch.zeros(len(image), 3)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    ids[: rows * cols] = torch.cat((torch.full((rows * cols, 1), len(text) + 1), grid), dim=1).float()
    here, there = angles(ids), angles(text_ids)
    refiners = sizes["n_refiner_layers"]
    for i in range(refiners):
        text = block(base, f"context_refiner.{i}", text, there, None)

    pending: dict[int, list[Tensor]] = {}
    for c in controls:
        state = c.state
        tokens = padded(lin(state, "control_all_x_embedder.2-1", patches(c.latents)), base["x_pad_token"])
        stack = "control_layers" if c.kind == "control_layers" else "control_noise_refiner"
        count = len(c.places) if c.kind == "control_layers" else refiners
        if c.kind != "plain":
            tokens = lin(state, f"{stack}.0.before_proj", tokens) + image
        for i in range(count):
            tokens = block(state, f"{stack}.{i}", tokens, here, temb)
            if c.kind != "plain" and i < refiners:
                pending.setdefault(i, []).append(c.scale * lin(state, f"{stack}.{i}.after_proj", tokens))
        c.tokens = tokens
    for i in range(refiners):
        image = block(base, f"noise_refiner.{i}", image, here, temb) + sum(pending.get(i, ()))

    joint, angle = torch.cat((image, text)), torch.cat((here, there))
    hints: dict[int, list[Tensor]] = {}
    for c in controls:
        tokens = lin(c.state, "control_layers.0.before_proj", torch.cat((c.tokens, text))) + joint
        for i, place in enumerate(c.places):
            tokens = block(c.state, f"control_layers.{i}", tokens, angle, temb)
            hint = lin(c.state, f"control_layers.{i}.after_proj", tokens)
            hints.setdefault(place, []).append(c.scale * hint)
    for i in range(sizes["n_layers"]):
        joint = block(base, f"layers.{i}", joint, angle, temb) + sum(hints.get(i, ()))
    shift = 1 + lin(base, "all_final_layer.2-1.adaLN_modulation.1", silu(temb))
    out = lin(base, "all_final_layer.2-1.linear", layer_norm(joint, joint.shape[-1:], eps=1e-6) * shift)
    cells = out[: rows * cols].reshape(rows, cols, 2, 2, 16)
    return cells.permute(4, 0, 2, 1, 3).reshape(16, h, w)

"""Formulas of live bytes against a count: the modules run at full size on the meta device."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.live_bytes import LiveBytes, as_the_kernels, meta, on_meta
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.memory import activations
from zimage_core.memory.int8_plan import x_bytes
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.compute import set_compute

LEAST, MOST = 0.98, 1.05
"""A formula over the count."""
NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SMALL_NET = TransformerConfig(
    dim=256, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=256, hidden_dim=682
)
NARROW_NET = TransformerConfig(n_layers=2, hidden_dim=2048)
ENCODERS = {
    "Qwen3-4B": TextEncoderConfig(num_layers=4),
    "Qwen3-0.6B": TextEncoderConfig(
        hidden_size=1024, num_layers=4, num_heads=16, num_kv_heads=8, intermediate_size=3072
    ),
    "Qwen2.5-0.5B": TextEncoderConfig(
        arch="qwen2", hidden_size=896, num_layers=4, num_heads=14, num_kv_heads=2, head_dim=64,
        intermediate_size=4864, qk_norm=False, attention_bias=True,
    ),
    "SmolLM2-135M": TextEncoderConfig(
        arch="llama", hidden_size=576, num_layers=4, num_heads=9, num_kv_heads=3, head_dim=64,
        intermediate_size=1536, qk_norm=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def net():
    """S3-DiT of full size."""
    return on_meta(lambda: ZImageTransformer(TransformerConfig()))


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    with as_the_kernels(monkeypatch), torch.no_grad():
        yield


def step_peak(net, rows, cols, caption):
    c = net.config
    text = activations.padded(caption)
    joint = activations.padded(activations.image_tokens(c, rows, cols)) + text
    blocks = c.n_layers + c.n_refiner_layers
    turn = [meta(joint, c.head_dim // 2, dtype=torch.float32) for _ in "cs"]
    args = (meta(c.in_channels, rows, cols), meta(text, c.dim), *turn, meta(blocks, 4 * c.dim), meta(c.dim))
    with LiveBytes() as count:
        count.ignore(*args, *net.parameters())
        net.predict(*args)
    assert count.live == 0
    return count.peak


def within(formula, counted):
    assert LEAST <= formula / counted <= MOST, f"formula {formula}, counted {counted}"


@pytest.mark.parametrize(
    ("height", "width", "caption"),
    [(256, 256, 32), (256, 256, 512), (512, 512, 100), (768, 1024, 77), (1024, 1024, 128), (1024, 1024, 512),
     (1536, 1536, 32), (1536, 1536, 512), (80, 48, 1)],
)  # fmt: skip
def test_a_step_of_the_transformer(net, height, width, caption):
    rows, cols = height // 8, width // 8
    formula = activations.step_bytes(net.config, rows, cols, caption, "bfloat16")
    within(formula, step_peak(net, rows, cols, caption))


@pytest.mark.parametrize(("px", "caption"), [(256, 32), (1024, 128)])
def test_quantised_activations_are_counted(px, caption):
    """An upper bound: in most places they take the place of activations that are longer."""
    config, side = TransformerConfig(n_layers=2), px // 8
    net = on_meta(lambda: ZImageTransformer(config))
    set_compute(net, "int8", torch.device("cpu"))
    tokens = activations.padded(activations.image_tokens(config, side, side)) + activations.padded(caption)
    formula = activations.step_bytes(config, side, side, caption, "bfloat16")
    formula += x_bytes(config, tokens, "bfloat16", "sm_86")
    counted = step_peak(net, side, side, caption)
    assert 0.75 * formula <= counted <= formula


@pytest.mark.parametrize("config", [SMALL_NET, NARROW_NET], ids=["small", "attention wider than the rest"])
@pytest.mark.parametrize("px", [256, 1024])
def test_a_step_of_other_shapes(config, px):
    net = on_meta(lambda: ZImageTransformer(config))
    formula = activations.step_bytes(config, px // 8, px // 8, 70, "bfloat16")
    within(formula, step_peak(net, px // 8, px // 8, 70))


@pytest.mark.parametrize("caption", [1, 32, 512])
def test_the_context_refiner(net, caption):
    features = meta(caption, net.config.cap_feat_dim)
    with LiveBytes() as count:
        count.ignore(features, *net.parameters())
        net.refine(features)
    formula = activations.refine_bytes(net.config, caption, "bfloat16")
    # so few rows that constants count: a few kilobytes of 3 megabytes
    assert LEAST <= formula / count.peak <= (MOST if caption >= 32 else 1.2)


def test_the_adaptive_norms_of_a_run(net):
    with LiveBytes() as count:
        count.ignore(*net.parameters())
        kept = net.modulate(torch.zeros(8, device="meta"))
    kept_bytes = activations.modulate_bytes(net.config, 8, "bfloat16")
    assert kept_bytes == sum(t.numel() * t.itemsize for t in kept)
    within(2 * kept_bytes, count.peak)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", NAMES)
def test_the_text_encoder(name, dtype):
    config = ENCODERS[name]
    encoder = on_meta(lambda: TextEncoder(config), NAMES[dtype])
    for tokens in (32, 128, 512):
        # the table lies on the host; its rows arrive in the dtype of the stream
        encoder.embed_tokens.forward = lambda ids: meta(len(ids), config.hidden_size, dtype=NAMES[dtype])
        with LiveBytes() as count:
            count.ignore(*encoder.parameters())
            encoder(torch.zeros(tokens, dtype=torch.int64, device="meta"))
        within(activations.encode_bytes(config, tokens, dtype), count.peak)


@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (128, 128), (64, 96)])
def test_a_decode_at_once(rows, cols):
    vae = on_meta(lambda: Autoencoder(AutoencoderConfig()), torch.float32)
    z = meta(1, 16, rows, cols, dtype=torch.float32)
    with LiveBytes() as count:
        count.ignore(z, *vae.parameters())
        vae.decode(z)
    within(activations.decode_bytes(vae.config, rows, cols), count.peak)


def test_tiles_take_less_and_smaller_ones_less_still():
    config, whole = AutoencoderConfig(), activations.decode_bytes(AutoencoderConfig(), 128, 128)
    sizes = [activations.decode_bytes(config, 128, 128, tile) for tile in (64, 48, 32, 16)]
    assert whole > sizes[0]
    assert sizes == sorted(sizes, reverse=True)
    assert activations.decode_bytes(config, 128, 128, 16, apart=True) < sizes[-1] / 2


def test_the_count_sees_views_and_ends_of_life():
    with LiveBytes() as count:
        a = torch.zeros(1000, dtype=torch.uint8)
        b = a[10:20]
        c = a + 1
        assert count.live == 2000
        del a
        assert count.live == 2000, "a view holds it"
        del b
        assert count.live == 1000
        del c
    assert (count.live, count.peak) == (0, 2000)

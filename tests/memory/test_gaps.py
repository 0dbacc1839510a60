"""The gaps of a plan against torch's allocator, whose rules are followed for modules on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers.best_fit import BestFit
from tests.helpers.live_bytes import as_the_kernels, meta, on_meta
from tests.helpers.model_headers import full_size
from zimage_core.config import AutoencoderConfig, TextEncoderConfig, TransformerConfig
from zimage_core.memory.job import AT_ONCE, Job
from zimage_core.memory.references import References
from zimage_core.models.autoencoder import Autoencoder
from zimage_core.models.omni import OmniTransformer, Reference
from zimage_core.models.text_encoder import TextEncoder
from zimage_core.models.transformer import ZImageTransformer

SIZES = full_size()


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    with as_the_kernels(monkeypatch), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def net():
    return on_meta(lambda: ZImageTransformer(TransformerConfig()))


def arena(job, phase, live):
    """Bytes of the segment that a phase takes for its temporary tensors, scratch included."""
    return job.scratch[phase] + live + job.gaps(phase, live)


def run(net, job):
    """What `Denoiser` and `sample` allocate in two steps -> high-water mark."""
    with BestFit() as count:
        count.ignore(*net.parameters())
        count.place("scratch", job.scratch["denoise"])
        latents = meta(job.images, 16, job.rows, job.cols, dtype=torch.float32)
        captions = [meta(job.caption, net.config.cap_feat_dim) for _ in range(job.captions)]
        prepared = net.prepare(captions, [0.1] * job.steps, (job.rows, job.cols))
        for step in range(2):
            members = latents.to(torch.bfloat16)
            sides = [
                torch.stack([net.step(member, prepared, step, side).float() for member in members])
                for side in range(job.captions)
            ]
            v = -sides[0] if len(sides) == 1 else -(sides[0] + (sides[0] - sides[1]) * 2.0)
            latents = latents + v * 0.1
            del members, sides, v
    return count.high


@pytest.mark.parametrize(
    ("width", "height", "caption", "more"),
    [(1024, 1024, 32, {}), (1024, 1024, 512, {}), (768, 1024, 77, {"guidance": True}),
     (1536, 1536, 300, {"guidance": True, "images": 2, "steps": 50}), (512, 512, 412, {}),
     (256, 256, 32, {}), (256, 256, 512, {"images": 4, "guidance": True}), (2048, 2048, 77, {}),
     (832, 1216, 200, {"images": 4}), (80, 48, 7, {})],
)  # fmt: skip
def test_denoising_fits_its_segment(net, width, height, caption, more):
    job = Job(SIZES, width, height, caption_tokens=caption, **more)
    high, room = run(net, job), arena(job, "denoise", job.denoise_live)
    assert high <= room
    assert room <= 1.08 * high or room - high < 20 << 20, "no more is taken than needed"


@pytest.fixture(scope="module")
def omni():
    return on_meta(lambda: OmniTransformer(TransformerConfig(n_layers=6, siglip_feat_dim=1152)))


@pytest.mark.parametrize(
    ("side", "caption", "references", "more"),
    [(1024, 32, 0, {}), (1024, 32, 1, {}), (1024, 32, 1, {"guidance": True}), (1024, 32, 2, {}),
     (1024, 300, 5, {"guidance": True, "steps": 28}), (1024, 32, 20, {}), (512, 77, 1, {}), (256, 77, 3, {})],
)  # fmt: skip
def test_denoising_with_references_fits_its_segment(omni, side, caption, references, more):
    """Of two segments, noisy and clean; six blocks are enough, since each takes what the one before did."""
    count, config = 2 if more.get("guidance") else 1, omni.config
    planned = References.usual(references, side // 8, side // 8, caption, count)
    net = replace(SIZES.transformer, config=replace(config, n_layers=SIZES.transformer.config.n_layers))
    job = Job(replace(SIZES, transformer=net), side, side, 1, caption, references=planned, **more)
    with BestFit() as count:
        count.ignore(*omni.parameters())
        count.place("scratch", job.scratch["denoise"])
        latent = meta(16, job.rows, job.cols)
        shown = [Reference(meta(16, *size), meta(16, 16, 1152)) for size in planned.sizes]
        captions = [[meta(n, config.cap_feat_dim) for n in planned.pieces] for _ in range(job.captions)]
        prepared = omni.prepare_omni(
            captions, [shown] * job.captions, [0.1] * job.steps, (job.rows, job.cols)
        )
        for sample in range(job.captions):
            omni.step_omni(latent, prepared, 0, sample)
    room = arena(job, "denoise", job.denoise_live)
    assert count.high <= room
    assert room <= 1.25 * count.high, "no more is taken than needed"


@pytest.mark.parametrize("side", [256, 512, 1024, 1536])
@pytest.mark.parametrize("images", [1, 3])
def test_decoding_fits_its_segment(side, images):
    job = Job(SIZES, side, side, images)
    vae = on_meta(lambda: Autoencoder(AutoencoderConfig()), torch.float32)
    with BestFit() as count:
        count.ignore(*vae.parameters())
        latents = meta(images, 16, side // 8, side // 8, dtype=torch.float32)
        left = [z[None] for z in latents / 0.3 + 0.1]
        while left:  # as `run.decode` does, which moves each image to the host
            vae.decode(left[0])
            del left[0]
    assert count.high <= arena(job, "decode", job.decode_live(AT_ONCE)) <= 1.05 * count.high


@pytest.mark.parametrize("tokens", [16, 128, 512])
def test_encoding_fits_its_segment(tokens):
    job, encoder = (
        Job(SIZES, 1024, 1024, caption_tokens=tokens),
        on_meta(lambda: TextEncoder(TextEncoderConfig(num_layers=4))),
    )
    encoder.embed_tokens.forward = lambda ids: meta(len(ids), encoder.config.hidden_size)
    with BestFit() as count:
        count.ignore(*encoder.parameters())
        count.place("scratch", job.scratch["encode"])
        encoder(torch.zeros(tokens, dtype=torch.int64, device="meta"))
    assert count.high <= arena(job, "encode", job.encode_live)


def test_the_allocator_takes_the_smallest_block_and_joins_neighbours():
    mib = 1 << 20
    with BestFit() as count:
        for key, size in (("a", 8), ("b", 2), ("c", 4), ("d", 2)):
            count.place(key, size * mib)
        assert count.high == 16 * mib
        count.release("a")
        count.release("c")
        count.place("e", 3 * mib)  # into the 4 MiB, of which no block is left that is larger than 1 MiB
        count.place("f", 5 * mib)
        assert count.high == 16 * mib
        count.release("b")
        count.place("g", 5 * mib)  # the 3 MiB behind f and the 2 MiB of b are one block
        assert count.high == 16 * mib
        count.place("h", mib // 2)
        assert count.high == 16 * mib, "small tensors have segments of their own"

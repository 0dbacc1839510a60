"""TAEF1 decodes as diffusers' AutoencoderTiny does, from every naming of its file; others are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import tiny
from zimage_core.errors import BadFile, BadShape, Unsupported, WrongModel
from zimage_core.preview import Preview
from zimage_core.preview.taef1 import TinyDecoder, load, table


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.06 for name, shape in table().items()}


def renamed(prefix, first):
    return {
        f"{prefix}{int(name.partition('.')[0]) + first}.{name.partition('.')[2]}": tensor
        for name, tensor in weights().items()
    }


@pytest.fixture
def file(tmp_path):
    def write(state):
        save_file(state, tmp_path / "t.safetensors")
        return tmp_path / "t.safetensors"

    return write


@pytest.mark.parity
def test_decodes_as_diffusers_does(file):
    from diffusers import AutoencoderTiny

    theirs = AutoencoderTiny(latent_channels=16).eval()
    state = theirs.state_dict()
    assert {f"decoder.layers.{n}": s for n, s in table().items()} == {
        name: tuple(t.shape) for name, t in state.items() if name.startswith("decoder.")
    }
    latents = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad():
        want = theirs.decode(latents).sample
    got = load(file({name: tensor.contiguous() for name, tensor in state.items()}))(latents)
    assert float((got - want).abs().max()) <= 1e-5


def test_latents_are_clamped_and_eight_pixels_stand_for_one():
    decoder = TinyDecoder(weights())
    z = torch.full((1, 16, 3, 2), 1e6)
    got = decoder(z)
    assert got.shape == (1, 3, 24, 16)
    torch.testing.assert_close(got, decoder(z / 1e3), rtol=0, atol=1e-6)
    with pytest.raises(BadShape, match=r"TAEF1: got \(1, 4, 3, 2\)"):
        decoder(torch.zeros(1, 4, 3, 2))


@pytest.mark.parametrize(("prefix", "first"), [("decoder.layers.", 0), ("taesd_decoder.", 1), ("", 1)])
def test_every_naming_is_the_same_decoder(file, prefix, first):
    z = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(2))
    state = renamed(prefix, first) | {"encoder.layers.0.weight": torch.zeros(64, 3, 3, 3)}
    assert torch.equal(load(file(state))(z), TinyDecoder(weights())(z))


def test_half_precision_files_are_read(file):
    half = {name: tensor.half() for name, tensor in renamed("decoder.layers.", 0).items()}
    z = torch.ones(1, 16, 2, 2)
    want = TinyDecoder({name: tensor.half().float() for name, tensor in weights().items()})(z)
    assert torch.equal(load(file(half))(z), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"decoder.layers.0.weight": torch.zeros(64, 4, 3, 3)},
            r"layers.0.weight is \[64, 4, 3, 3\], not \[64, 16",
        ),
        ({"decoder.layers.3.conv.2.bias": None}, r"layers.3.conv.2.bias is missing, not \[64\]"),
        ({"decoder.layers.18.bias": torch.full((3,), torch.nan)}, "layers.18.bias holds NaN or infinity"),
    ],
)
def test_a_file_that_is_nearly_taef1_is_refused_by_the_tensor(file, change, message):
    state = {k: v for k, v in (renamed("decoder.layers.", 0) | change).items() if v is not None}
    with pytest.raises(WrongModel, match=message):
        load(file(state))


def test_other_files_are_refused_by_what_they_are(file, tmp_path):
    with pytest.raises(WrongModel, match=r"this is .*VAE.*, where TAEF1 is wanted"):
        load(file({name: tensor.contiguous() for name, tensor in tiny.vae().state_dict().items()}))
    (tmp_path / "page").write_text("<html></html>")
    for path in (tmp_path / "missing", tmp_path / "page"):
        with pytest.raises(BadFile):
            load(path)


def test_taef1_is_refused_for_a_model_with_another_vae(file):
    with pytest.raises(Unsupported, match="this model has another VAE"):
        Preview(tiny.pipeline(), file(renamed("", 1)))


def test_taef1_previews_a_model_with_flux_latents(file):
    pipe = tiny.pipeline()
    pipe.vae = None  # a pipeline without a VAE has FLUX.1's latents
    latents = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(1))
    look = Preview(pipe, file(renamed("", 1)))
    assert look(latents).size == (40, 24)
    assert look(latents, 1).tobytes() == look(latents[1]).tobytes() != look(latents).tobytes()

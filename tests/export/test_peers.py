"""Written files follow the rules of the other programs that load them."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from importlib.util import find_spec

import gguf
import pytest
import torch

from tests.helpers.wide import WIDE
from zimage_core import convert_file, load_transformer, open_weights, quantize_file
from zimage_core.config import TransformerConfig
from zimage_core.weights import names

IMG_ARCHITECTURES = {
    "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2",
    "qwen_image",
}  # fmt: skip
"""IMG_ARCH_LIST of ComfyUI-GGUF's loader.py."""
COMFY_DEQUANTIZES = {
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS",
}  # fmt: skip
"""Types with torch kernels in its dequant.py; others fall back to NumPy."""
MIXES = ("Q4_K_M", "Q8_0", "Q3_K_M", "Q4_0", "BF16")


@contextlib.contextmanager
def quiet():
    """gguf-py warns of nothing that matters here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("mix", MIXES)
def test_the_rules_of_comfyui_gguf_hold(wide, tmp_path, mix):
    """Architecture in its list as one string; names without prefix; shapes reversed; nothing else asked for.

    Its loader takes the shape from the file where no comfy.gguf.orig_shape says otherwise, views F32 and F16
    at once and leaves the rest to its kernels. Pad tokens of one dimension broke it (#379, #392, #419).
    """
    quantize_file(wide, tmp_path / "a.gguf", mix)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    field = reader.get_field("general.architecture")
    assert field.types == [gguf.GGUFValueType.STRING]
    assert str(field.parts[field.data[-1]], "utf-8") in IMG_ARCHITECTURES
    assert reader.get_field("general.file_type").contents() == {
        "Q4_K_M": 15, "Q8_0": 7, "Q3_K_M": 12, "Q4_0": 2, "BF16": 32,
    }[mix]  # fmt: skip
    assert reader.get_field("general.quantization_version").contents() == 2
    wanted = names.checkpoint_shapes(names.transformer_table(TransformerConfig.from_json(WIDE), "fused"))
    found = {t.name: tuple(int(v) for v in reversed(t.shape)) for t in reader.tensors}
    assert found == wanted
    assert len(found["x_pad_token"]) == 2
    for tensor in reader.tensors:
        assert tensor.tensor_type.name in COMFY_DEQUANTIZES, tensor.name
        one = len(found[tensor.name]) == 1 or "pad_token" in tensor.name
        assert not one or tensor.tensor_type.name == "F32", tensor.name
        block, nbytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        assert tensor.n_bytes == math.prod(found[tensor.name]) // block * nbytes
        assert tensor.data_offset % 32 == 0


def test_gguf_py_reads_the_numbers_that_we_read(wide, tmp_path):
    """Another reader and another dequantiser, bit for bit."""
    quantize_file(wide, tmp_path / "a.gguf", "Q4_K_M")
    with open_weights(tmp_path / "a.gguf") as file, quiet():
        for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
            theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            ours = file.tensor(tensor.name).dequantize()
            assert torch.equal(ours, theirs.reshape(ours.shape)), tensor.name


@pytest.mark.parity
@pytest.mark.parametrize(
    ("mix", "tolerance"), [("Q4_K_M", 2e-3), ("Q8_0", 2e-3), ("Q4_0", 1e-4), ("BF16", 1e-5)]
)
@torch.no_grad()
def test_diffusers_loads_it_and_computes_the_same(wide, tmp_path, mix, tolerance):
    """Relative difference of one forward in float32.

    diffusers rounds the products of scales and codes of Q8_0 and K types to float16: 2e-4 to 1.5e-3 are
    known. It is exact for BF16, where its order of sums remains; the few bits of Q4_0 round as little.
    """
    from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel

    quantize_file(wide, tmp_path / "a.gguf", mix)
    theirs = ZImageTransformer2DModel.from_single_file(
        str(tmp_path / "a.gguf"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
        config=str(wide.parent),
        subfolder="transformer",
    ).eval()
    ours = load_transformer(tmp_path / "a.gguf")
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, 1, 8, 12, generator=generator)]
    captions = [torch.randn(7, WIDE["cap_feat_dim"], generator=generator)]
    time = torch.tensor([0.4])
    wanted = theirs(latents, time, captions, return_dict=False)[0][0]
    got = ours(latents, time, captions)[0]
    assert (got - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parity
@torch.no_grad()
def test_diffusers_loads_a_folder_that_was_written_here(wide, tmp_path):
    from diffusers import ZImageTransformer2DModel

    convert_file(wide, tmp_path / "a.gguf")
    convert_file(tmp_path / "a.gguf", tmp_path / "transformer", shard_bytes=2_000_000)
    theirs = ZImageTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer").state_dict()
    ours = load_transformer(wide, torch.bfloat16).state_dict()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name].to(tensor.dtype), tensor), name


@pytest.mark.slow
@pytest.mark.skipif(find_spec("stable_diffusion_cpp") is None, reason="needs stable-diffusion-cpp-python")
def test_stable_diffusion_cpp_loads_a_full_size_file(tmp_path):
    """The wheel knows the full size only: 64 px and one step must give an image, not an error.

    ZIMAGE_FULL_SIZE names a folder made by benchmarks/make_full_size.py.
    """
    folder = os.environ.get("ZIMAGE_FULL_SIZE")
    if folder is None:
        pytest.skip("ZIMAGE_FULL_SIZE names no folder of full-size files")
    from stable_diffusion_cpp import StableDiffusion

    quantize_file(f"{folder}/transformer.gguf", tmp_path / "a.gguf", "Q4_0", requantize=True)
    model = StableDiffusion(
        diffusion_model_path=str(tmp_path / "a.gguf"),
        llm_path=f"{folder}/text_encoder.gguf",
        vae_path=f"{folder}/vae.safetensors",
        offload_params_to_cpu=True,
    )
    (image,) = model.generate_image(prompt="a cat", width=64, height=64, sample_steps=1, cfg_scale=1.0)
    assert image.size == (64, 64)
    assert "stable_diffusion_cpp" in sys.modules

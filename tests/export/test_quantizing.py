"""A quantised file holds what its recipe says, whatever layout it was made from, and loads everywhere."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import tiny
from tests.helpers.wide import WIDE, wide_state, write_wide
from zimage_core import (
    BadArgument,
    BadFile,
    BadWeights,
    OverBudget,
    Unsupported,
    WrongModel,
    convert_file,
    load_text_encoder,
    load_transformer,
    open_weights,
    quantize_file,
)
from zimage_core.config import TransformerConfig
from zimage_core.export.mixes import MIXES
from zimage_core.export.recipes import Recipe, Rule
from zimage_core.quantize.encode import encode
from zimage_core.quantize.imatrix import Imatrix, flat
from zimage_core.text.tokenizer import Tokenizer
from zimage_core.weights import names

QKV = "layers.0.attention.qkv.weight"


def test_the_file_is_the_encoder_applied_to_each_tensor(wide, tmp_path):
    """Bit for bit, with q, k and v one below the other."""
    state = wide_state()
    done = quantize_file(wide, tmp_path / "a.gguf", "Q8_0")
    with open_weights(tmp_path / "a.gguf") as file:
        assert file.metadata["general.architecture"] == "lumina2"
        assert file.metadata["general.file_type"] == 7
        assert file.metadata["general.quantization_version"] == 2
        assert "* = Q8_0" in file.metadata["zimage.recipe"]
        assert file.size == done.nbytes
        fused = torch.cat([state[f"layers.0.attention.to_{p}.weight"] for p in "qkv"])
        assert torch.equal(file.tensor(QKV).packed, encode(fused, "Q8_0"))
        assert file.tensor(QKV).shape == (3 * 256, 256)
        assert file.tensors["x_pad_token"].shape == (1, 256)
        assert file.tensors["x_pad_token"].format.name == "F32"
        kept = "noise_refiner.0.feed_forward.w1.weight"
        assert file.tensors[kept].format.name == "BF16"
        assert torch.equal(file.tensor(kept).dequantize(torch.bfloat16), state[kept])
    assert sum(done.types.values()) == len(file.tensors)


def test_every_layout_of_a_model_gives_the_same_tensors(wide, tmp_path):
    single = tmp_path / "model.safetensors"
    convert_file(wide, single, prefix="model.diffusion_model.")
    convert_file(wide, tmp_path / "plain.gguf")
    found = []
    for number, source in enumerate((wide, single, tmp_path / "plain.gguf")):
        quantize_file(source, tmp_path / f"{number}.gguf", "Q4_K_M")
        with open_weights(tmp_path / f"{number}.gguf") as file:
            found.append({name: bytes(file.tensor(name).packed.flatten().numpy()) for name in file.tensors})
    assert found[0] == found[1] == found[2]


def test_a_toy_of_ours_loads_without_a_warning_and_computes_the_same(wide, tmp_path):
    """Q8_0: relative error of a forward below 2e-2, twice what peers.md has for it on random weights."""
    quantize_file(wide, tmp_path / "a.gguf", "Q8_0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_transformer(tmp_path / "a.gguf")
    dense = load_transformer(wide)
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, 1, 8, 8, generator=generator)]
    captions = [torch.randn(7, 256, generator=generator)]
    with torch.no_grad():
        (a,), (b,) = (model(latents, torch.tensor([0.5]), captions) for model in (ours, dense))
    assert (a - b).norm() <= 2e-2 * b.norm()
    assert not torch.equal(a, b)


def test_a_text_encoder_brings_its_tokenizer(model, tmp_path):
    quantize_file(model, tmp_path / "te.gguf", "Q8_0", component="text_encoder")
    load_text_encoder(tmp_path / "te.gguf")
    with open_weights(tmp_path / "te.gguf") as file:
        assert file.metadata["general.architecture"] == "qwen3"
        assert {"output_norm.weight", "blk.2.attn_q.weight"} <= set(file.tensors), "what others run is kept"
        ours, theirs = Tokenizer.from_gguf(file), tiny.tokenizer()
        text = "<|im_start|>user\na cat, 猫<|im_end|>"
        assert ours.encode(text) == theirs.encode(text)


def test_a_gguf_text_encoder_keeps_every_key_with_its_type(model, tmp_path):
    quantize_file(model, tmp_path / "a.gguf", "F16", component="text_encoder")
    quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q5_1")
    with open_weights(tmp_path / "a.gguf") as a, open_weights(tmp_path / "b.gguf") as b:
        for key, value in a.metadata.items():
            if key.startswith(("qwen3.", "tokenizer.")):
                other = b.metadata[key]
                assert (list(value) == list(other)) if hasattr(value, "tolist") else (value == other), key
        assert b.metadata["general.file_type"] == 9
        assert b.metadata["tokenizer.ggml.token_type"].item_type == "i32"


def test_a_size_is_kept_and_used(wide, tmp_path):
    low = quantize_file(wide, tmp_path / "q3.gguf", "Q3_K_S").nbytes
    high = quantize_file(wide, tmp_path / "q6.gguf", "Q6_K").nbytes
    size = (low + high) // 2
    done = quantize_file(wide, tmp_path / "s.gguf", size=size)
    largest = 682 * 256 * 2  # one step of the largest tensor is the granularity of so small a model
    assert size - largest <= done.nbytes <= size
    assert len(set(done.types) - {"F32", "BF16"}) > 1
    with pytest.raises(OverBudget, match=r"the smallest possible is \d+ bytes"):
        quantize_file(wide, tmp_path / "t.gguf", size=low // 3)
    assert not (tmp_path / "t.gguf").exists()


def test_an_importance_matrix_is_used_and_one_of_another_model_refused(wide, tmp_path):
    plain = quantize_file(wide, tmp_path / "a.gguf", "Q4_K_S")
    with open_weights(tmp_path / "a.gguf") as file:
        widths = {n: t.shape[-1] for n, t in file.tensors.items() if t.format.name in ("Q4_K", "Q5_K")}
        before = file.tensor(QKV).packed.clone()
    matrix = flat(widths)
    matrix.entries[QKV].squares[:64] *= 100
    done = quantize_file(wide, tmp_path / "b.gguf", "Q4_K_S", imatrix=matrix)
    assert done.nbytes >= plain.nbytes
    with open_weights(tmp_path / "b.gguf") as file:
        assert not torch.equal(before, file.tensor(QKV).packed)
        assert "quantize.imatrix.file" in file.metadata
    with pytest.raises(WrongModel, match="imatrix of another model"):
        quantize_file(wide, tmp_path / "c.gguf", "Q4_K_S", imatrix=Imatrix())
    with pytest.raises(WrongModel, match="imatrix of another model"):
        quantize_file(wide, tmp_path / "c.gguf", "Q4_K_S", imatrix=flat(dict.fromkeys(widths, 512)))


def test_rows_that_no_block_divides_are_told(model, tmp_path):
    done = quantize_file(model, tmp_path / "a.gguf", "Q4_K_M", component="transformer")
    assert any("rows of 32, which blocks of Q4_K do not divide: Q5_0 instead" in r for r in done.remarks)
    assert any("rows of 85" in r and "F16 instead" in r for r in done.remarks)
    load_transformer(tmp_path / "a.gguf")


def test_few_bits_without_a_matrix_are_remarked(wide, tmp_path):
    done = quantize_file(wide, tmp_path / "a.gguf", "Q2_K")
    assert any("importance matrix" in remark for remark in done.remarks)


# --- bad input ---------------------------------------------------------------------------


def broken(tmp_path, value: float, dtype=torch.bfloat16):
    state = wide_state(dtype)
    state["layers.1.attention.to_k.weight"][5, 7] = value
    state["layers.1.attention.to_k.weight"][6, 8] = value
    return write_wide(tmp_path / "broken", state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named_and_refused_unless_allowed(tmp_path, value):
    """q, k, v are fused, so row 5 of k is row 261."""
    source, out = broken(tmp_path, value), tmp_path / "a.gguf"
    where = (
        r"layers\.1\.attention\.qkv\.weight has 2 numbers that are NaN or infinite, the first at \[261, 7\]"
    )
    with pytest.raises(BadWeights, match=where):
        quantize_file(source, out, "Q4_K_M")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"], "no half file, no temporary one"
    done = quantize_file(source, out, "Q4_K_M", allow_nonfinite=True)
    assert any("2 numbers that are NaN or infinite" in remark for remark in done.remarks)
    with open_weights(out) as file:
        assert bool(file.tensor("layers.1.attention.qkv.weight").dequantize().isfinite().all())


@pytest.mark.parametrize("type", ["BF16", "F16"])
def test_what_is_allowed_harms_no_finite_number(tmp_path, type):
    """One NaN; BF16 holds 2^20, F16 has its largest number for it and counts it."""
    state = wide_state(torch.float32)
    name = "layers.1.feed_forward.w1.weight"
    state[name][0, :5] = torch.tensor([float("nan"), 2.0**20, -(2.0**20), float("inf"), -float("inf")])
    source = write_wide(tmp_path / "in", state)
    done = quantize_file(source, tmp_path / "a.gguf", type, allow_nonfinite=True)
    large = 65504.0 if type == "F16" else 2.0**20
    with open_weights(tmp_path / "a.gguf") as file:
        found = file.tensor(name).dequantize()[0, :5]
    most = 65504.0 if type == "F16" else 65536.0  # what bfloat16 has for 65504
    assert found.tolist() == [0.0, large, -large, most, -most]
    assert any(f"has {5 if type == 'F16' else 3} numbers" in remark for remark in done.remarks)


def test_numbers_beyond_float16_are_refused_for_f16(tmp_path):
    with pytest.raises(BadWeights, match=r"2 numbers that are beyond the range of F16, .*choose BF16 or F32"):
        quantize_file(broken(tmp_path, 1e6), tmp_path / "a.gguf", "F16")


def test_a_quantised_source_is_refused_unless_asked_for(wide, tmp_path):
    quantize_file(wide, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(Unsupported, match=r"quantised already \(Q8_0 10\), .*--requantize"):
        quantize_file(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M")
    quantize_file(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_K_M", requantize=True)
    load_transformer(tmp_path / "q4.gguf")


def test_scaled_fp8_is_a_quantised_source_that_can_be_taken(tmp_path):
    state = wide_state(torch.float32)
    tensors = {}
    for name, entries in names.sources(
        names.transformer_table(TransformerConfig.from_json(WIDE), "fused")
    ).items():
        tensors[name] = torch.cat([state[e.module] for e in entries])
    tensors[QKV] = (tensors[QKV] / 0.01).to(torch.float8_e4m3fn)
    tensors[QKV.removesuffix("weight") + "scale_weight"] = torch.tensor([0.01])
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(Unsupported, match=r"F8_E4M3 1"):
        quantize_file(tmp_path / "fp8.safetensors", tmp_path / "a.gguf", "Q8_0")
    quantize_file(tmp_path / "fp8.safetensors", tmp_path / "a.gguf", "Q8_0", requantize=True)
    with open_weights(tmp_path / "a.gguf") as file:
        wanted = tensors[QKV].float() * 0.01
        error = (file.tensor(QKV).dequantize() - wanted).abs().max()
    # Q8_0 rounds to 1/254 of the block's largest, and its scale to float16
    assert error <= wanted.abs().max() / 127 * (0.5 + 127 * 2**-11)


def test_a_vae_is_left_as_it_is(model, tmp_path):
    with pytest.raises(Unsupported, match="a VAE stays as it is"):
        quantize_file(model / "vae", tmp_path / "a.gguf", "Q8_0")


def test_arguments_that_make_no_sense_are_refused(wide, tmp_path):
    out = tmp_path / "a.gguf"
    with pytest.raises(BadArgument, match="exactly one of"):
        quantize_file(wide, out)
    with pytest.raises(BadArgument, match="unknown type 'Q7_K'; known are"):
        quantize_file(wide, out, "Q7_K")
    with pytest.raises(BadArgument, match="no rule for"):
        quantize_file(wide, out, recipe=Recipe("r", (Rule("nothing", "Q8_0"),)))
    with pytest.raises(BadFile, match="no such file"):
        quantize_file(tmp_path / "none", out, "Q8_0")
    out.write_bytes(b"precious")
    with pytest.raises(BadFile, match="exists already"):
        quantize_file(wide, out, "Q8_0")
    assert out.read_bytes() == b"precious"


def test_a_file_is_never_written_over_itself(wide, tmp_path):
    convert_file(wide, tmp_path / "a.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "a.gguf")
    before = (tmp_path / "a.gguf").read_bytes()
    for name in ("a.gguf", "link.gguf"):
        with pytest.raises(BadFile, match="is the source itself"):
            quantize_file(tmp_path / "a.gguf", tmp_path / name, "Q8_0", overwrite=True)
    assert (tmp_path / "a.gguf").read_bytes() == before


def test_progress_counts_every_weight(wide, tmp_path):
    seen = []
    quantize_file(wide, tmp_path / "a.gguf", "Q8_0", progress=lambda *step: seen.append(step))
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1] == sum(p.numel() for p in wide_state().values())


def test_an_interrupted_call_leaves_the_old_file_and_the_next_one_starts_anew(wide, tmp_path):
    out = tmp_path / "a.gguf"
    out.write_bytes(b"old")

    def interrupt(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_file(wide, out, "Q8_0", overwrite=True, progress=interrupt)
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    quantize_file(wide, out, "Q8_0", overwrite=True)
    quantize_file(wide, tmp_path / "b.gguf", "Q8_0")
    assert out.read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_makes_a_file_that_computes(wide, tmp_path, mix):
    """Relative error of a forward below that of ternary weights, 0.83 on these random ones, with a margin."""
    quantize_file(wide, tmp_path / "a.gguf", mix)
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, 1, 8, 8, generator=generator)]
    captions = [torch.randn(7, 256, generator=generator)]
    with torch.no_grad():
        (a,), (b,) = (
            load_transformer(place)(latents, torch.tensor([0.5]), captions)
            for place in (tmp_path / "a.gguf", wide)
        )
    assert (a - b).norm() <= 0.95 * b.norm()

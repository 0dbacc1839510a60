"""NaN and infinity are errors that name step, block and tensor; there is never a black image."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import tiny
from zimage_core.errors import NonFinite
from zimage_core.run.nonfinite import _bad, watch


def pristine():
    return {"transformer": tiny.transformer(), "text_encoder": tiny.text_encoder(), "vae": tiny.vae().decoder}


TENSORS = [(part, name) for part, model in pristine().items() for name, _ in model.named_parameters()]
NAN, INF = float("nan"), float("inf")
CASES = [(*tensor, NAN) for tensor in TENSORS] + [(*tensor, INF) for tensor in TENSORS if "att" in tensor[1]]
LABELS = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "VAE"}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.mark.parametrize(("part", "name", "poison"), CASES, ids=str)
def test_one_bad_weight_anywhere_is_named(pipe, part, name, poison):
    model = getattr(pipe, part)
    if part == "vae":
        name = f"decoder.{name}"
    weight = model.get_parameter(name)
    # the row of "<|im_start|>", which every prompt has; elsewhere any number will do
    place = (257, 0) if name == "embed_tokens.weight" else (0,) * weight.ndim
    kept = weight.data[place].clone()
    weight.data[place] = poison
    try:
        with pytest.raises(NonFinite) as caught:
            pipe("a", 16, 16, num_inference_steps=1, seed=1)
    finally:
        weight.data[place] = kept
    message = str(caught.value)
    assert f"weight {name} holds NaN or infinity" in message
    assert f"{LABELS[part]}: first in " in message
    assert "block " in message
    if part == "transformer":
        assert message.startswith("step 1 of 1: ")
    assert "\n" not in message


def test_the_pipeline_works_again_after_the_weight_is_mended(pipe):
    a, b = (p("a", seed=1, output_type="latent").images for p in (pipe, tiny.pipeline()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("debug", [False, True])
def test_a_number_too_large_for_the_dtype_blames_the_dtype(debug):
    pipe = tiny.pipeline(dtype=torch.float16)
    weight = pipe.transformer.layers[1].attention.to_q.weight
    weight.data.fill_(6e4)
    with pytest.raises(
        NonFinite, match=r"layers\.1\.attention\.to_q \(block layers\.1\).*float16 is too narrow"
    ):
        pipe("a", num_inference_steps=1, debug=debug)


def test_the_step_is_the_one_where_it_happened(pipe):
    """Latents from a callback are checked; a value that overflows only inside the network is found there."""

    def enlarge(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * 3e38} if i == 2 else {}

    with pytest.raises(ValueError, match="latents"):
        pipe("a", callback_on_step_end=enlarge)

    def to_the_edge(pipe, i, t, tensors):
        return {"latents": torch.full_like(tensors["latents"], 1e38)} if i == 2 else {}

    with pytest.raises(NonFinite, match=r"step 4 of 8.*block "):
        pipe("a", callback_on_step_end=to_the_edge)


def test_debug_stops_at_the_block_even_if_a_later_one_hides_it(pipe):
    """What follows may turn infinity into zero; debug looks at every output."""
    hidden = pipe.transformer.layers[0]
    handle = hidden.register_forward_hook(lambda m, i, out: torch.zeros_like(out))
    w2 = pipe.transformer.layers[0].feed_forward.w2
    kept = w2.weight.data[0, 0].clone()
    w2.weight.data[0, 0] = float("inf")
    try:
        pipe("a", num_inference_steps=1)
        with pytest.raises(NonFinite, match=r"feed_forward\.w2 \(block layers\.0\)"):
            pipe("a", num_inference_steps=1, debug=True)
    finally:
        handle.remove()
        w2.weight.data[0, 0] = kept


def test_debug_changes_no_bit_and_leaves_no_hook(pipe):
    a, b = (pipe("a", seed=3, output_type="latent", debug=d).images for d in (False, True))
    assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="mine"), watch(pipe.vae, "VAE"):
        raise RuntimeError("mine")
    counts = [sum(len(m._forward_hooks) for m in part.modules()) for part in (pipe.transformer, pipe.vae)]
    assert counts == [0, 4]  # queries and keys of the VAE's two attentions are always checked


def test_the_diagnosis_names_no_path_and_fits_a_line(pipe):
    weight = pipe.transformer.cap_pad_token
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(NonFinite) as caught:
            pipe("a", num_inference_steps=1)
    finally:
        weight.data.copy_(kept)
    assert len(str(caught.value)) < 400
    assert not re.search(r"/\w+/", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_works_on_a_cpu(dtype):
    got = tiny.pipeline(dtype=dtype)("a", seed=1, output_type="latent").images
    want = tiny.pipeline()("a", seed=1, output_type="latent").images
    assert got.dtype == torch.float32
    # eight steps of a random network: the scale of rounding, not more; values reach 4
    tolerance = {torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    assert float((got - want).abs().max()) < tolerance
    assert tiny.pipeline(dtype=dtype)("a", seed=1).images[0].size == (32, 32)


def test_the_search_takes_no_memory_of_the_tensors_size():
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    value = torch.ones(1, 64, 32, 32).contiguous(memory_format=torch.channels_last)
    with Sizes():
        assert not _bad(value)
    assert max(sizes) <= 2
    assert [_bad(value * bad) for bad in (NAN, INF, -INF)] == [True, True, True]
    assert not _bad(value[:0])

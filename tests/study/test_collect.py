"""Collected sums are those of the inputs; the pipeline's results and state do not change."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.helpers import tiny
from zimage_core.errors import BadArgument, NonFinite, Unsupported
from zimage_core.models.sequence import pad_count
from zimage_core.nn.linear import Linear
from zimage_core.study.collect import Collector, collect_imatrix
from zimage_core.weights.names import text_encoder_table, transformer_table

PROMPTS = ["a red circle", "two small stars on white paper"]
OPTIONS = {"height": 48, "width": 32, "num_inference_steps": 3}
TOKENS = 6  # of an image of 48 x 32


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def hooks(pipe) -> int:
    nets = (pipe.transformer, pipe.text_encoder)
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for net in nets for m in net.modules())


def inputs(net, run):
    """Every input of every Linear, kept whole."""
    seen = {name: [] for name, module in net.named_modules() if isinstance(module, Linear)}
    handles = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, args, rows=rows: rows.append(args[0].double())
        )
        for name, rows in seen.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def counted(module: str, x: torch.Tensor, caption: int) -> torch.Tensor:
    """The rows that are no pads, by the layout written out."""
    if "adaLN" in module or not module.startswith(("noise_refiner", "layers", "context_refiner")):
        return x
    if module.startswith("noise_refiner"):
        return x[:TOKENS]
    if module.startswith("context_refiner"):
        return x[:caption]
    start = TOKENS + pad_count(TOKENS)
    return torch.cat((x[:TOKENS], x[start : start + caption]))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_sums_are_those_of_the_inputs(pipe, guidance):
    """Layer by layer, both sides of the guidance, against the inputs kept whole; float32 inside a slab."""
    options = {**OPTIONS, "guidance_scale": guidance}

    def run():
        return pipe(PROMPTS[0], seed=5, output_type="latent", **options)

    seen = inputs(pipe.transformer, run)
    imatrix = collect_imatrix(pipe, PROMPTS[:1], seed=5, **options)
    lengths = [len(c) for c in pipe.encode_prompt(PROMPTS[0])[0] + pipe.encode_prompt("")[0]]
    for entry in transformer_table(pipe.transformer.config, "fused"):
        module = entry.module.removesuffix(".weight")
        if module not in seen:
            continue
        # with guidance the two sides run one after the other
        rows = [counted(module, x, lengths[i % 2 if guidance else 0]) for i, x in enumerate(seen[module])]
        rows = torch.cat(rows)
        sums = imatrix.entries[entry.checkpoint]
        assert sums.count == len(rows), module
        torch.testing.assert_close(sums.squares, rows.square().sum(0), rtol=1e-6, atol=0)


def test_every_matrix_of_both_networks_has_an_entry(pipe):
    imatrix = collect_imatrix(pipe, PROMPTS[:1], components=("transformer", "text_encoder"), **OPTIONS)
    for net, table in (
        (pipe.transformer, transformer_table(pipe.transformer.config, "fused")),
        (pipe.text_encoder, text_encoder_table(pipe.text_encoder.config, "gguf")),
    ):
        modules = dict(net.named_modules())
        for entry in table:
            module, _, leaf = entry.module.rpartition(".")
            if leaf == "weight" and isinstance(modules.get(module), Linear):
                assert imatrix.entries[entry.checkpoint].width == entry.shape[1], entry.checkpoint


def test_a_batch_is_its_members(pipe):
    one_by_one = collect_imatrix(pipe, [PROMPTS[0]] * 2, seed=3, **OPTIONS)
    together = collect_imatrix(pipe, PROMPTS[:1], seed=3, num_images_per_prompt=2, **OPTIONS)
    assert one_by_one.chunks == together.chunks == 2
    for name in ("layers.1.feed_forward.w2.weight", "x_embedder.weight"):
        mine, theirs = one_by_one.entries[name], together.entries[name]
        assert mine.count == theirs.count
        # the same numbers in another order, in float64
        torch.testing.assert_close(mine.squares, theirs.squares, rtol=1e-12, atol=0)


def test_images_are_the_same_to_the_bit_and_hooks_go(pipe):
    options = {**OPTIONS, "seed": 1, "output_type": "latent"}
    before, own = pipe(PROMPTS[0], **options).images, hooks(pipe)
    with Collector(pipe, ("transformer", "text_encoder")):
        assert torch.equal(pipe(PROMPTS[0], **options).images, before)
        assert hooks(pipe) > own
    assert hooks(pipe) == own


def test_hooks_go_after_an_error(pipe):
    own = hooks(pipe)

    def fail(done, imatrix):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_imatrix(pipe, PROMPTS, on_prompt=fail, **OPTIONS)
    assert hooks(pipe) == own
    broken = tiny.pipeline()
    broken.transformer.layers[0].feed_forward.w1.weight[0, 0] = float("nan")
    with pytest.raises(NonFinite):
        collect_imatrix(broken, PROMPTS, **OPTIONS)
    assert hooks(broken) == own
    with pytest.raises(BadArgument):
        collect_imatrix(pipe, PROMPTS, height=7)
    assert hooks(pipe) == own


def test_no_activation_is_kept(pipe):
    with Collector(pipe) as collector:
        pipe(PROMPTS[0], seed=1, output_type="latent", **OPTIONS)
        gc.collect()
        kept = [x for sums in collector._sums.values() for x in vars(sums).values() if torch.is_tensor(x)]
        assert kept
        assert all(x.ndim == 1 for x in kept)
        assert all(not torch.is_tensor(value) for value in vars(collector).values())


def test_what_was_collected_so_far_does_not_change_later(pipe):
    seen = []
    whole = collect_imatrix(pipe, PROMPTS, on_prompt=lambda done, imatrix: seen.append(imatrix), **OPTIONS)
    half = collect_imatrix(pipe, PROMPTS[:1], **OPTIONS)
    for name, sums in half.entries.items():
        assert torch.equal(seen[0].entries[name].squares, sums.squares), name
        assert torch.equal(seen[1].entries[name].squares, whole.entries[name].squares), name


def test_the_text_encoder_alone_denoises_nothing(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("denoised"))
    imatrix = collect_imatrix(pipe, PROMPTS, components=("text_encoder",), max_sequence_length=64)
    assert all(name.startswith("blk.") for name in imatrix.entries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ("vae",)}, "components: got vae, wanted transformer or text_encoder"),
        ({"components": ()}, "components: got none"),
        ({"latents": 1}, "latents: chosen by the collection itself"),
        ({"debug": True}, "debug: chosen by the collection itself"),
        ({"prompts": []}, "prompts: there are none"),
    ],
)
def test_arguments_are_checked(pipe, options, message):
    with pytest.raises(BadArgument, match=message):
        collect_imatrix(pipe, **{"prompts": PROMPTS, **options})


def test_float16_is_refused():
    with pytest.raises(Unsupported, match="float16"):
        Collector(tiny.pipeline(dtype=torch.float16))

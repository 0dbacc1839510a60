"""S3-DiT with images among the text, alone; tests/parity/test_omni.py compares it with diffusers."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import omni_transformer as omni
from tests.helpers import tiny
from zimage_core.config import TransformerConfig
from zimage_core.errors import BadArgument, BadShape, NonFinite, Unsupported
from zimage_core.models import omni_sequence
from zimage_core.models.omni import OmniTransformer, Reference
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn.compute import set_compute
from zimage_core.nn.linear import Linear
from zimage_core.nn.segments import joined
from zimage_core.quant.int8 import Int8Rows, quantize_rows
from zimage_core.run.nonfinite import watch

TRAINED_IDS = [*range(1, 33), *range(8, 72), *range(47, 79)]
"""t of three pieces of 5, 37 and 3 tokens with their pads, each counted on from its first token."""


@pytest.fixture(scope="module")
def model():
    return omni.transformer()


def test_text_to_image_is_the_plain_transformer_to_the_bit(model):
    plain = ZImageTransformer(TransformerConfig.from_json(tiny.TRANSFORMER)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("siglip_")})
    g = torch.Generator().manual_seed(2)
    x = [torch.randn(16, 1, 6, 10, generator=g), torch.randn(16, 1, 4, 4, generator=g)]
    arguments = x, torch.tensor([0.2, 0.7]), [torch.randn(n, 24, generator=g) for n in (7, 40)]
    for ours, wanted in zip(model(*arguments), plain(*arguments), strict=True):
        assert torch.equal(ours, wanted)


def test_trained_positions_lie_beside_their_tokens():
    images: list[omni_sequence.Size | None] = [(2, 3), (3, 5)]
    trained = omni_sequence.positions_of([5, 37, 3], images, [(3, 2), None], 2, "trained")
    assert [int(t) for ids in trained.captions for t in ids[:, 0]] == TRAINED_IDS
    assert [int(ids[0, 0]) for ids in trained.images] == [6, 45]
    assert trained.images[0][5].tolist() == [6, 1, 2]
    assert trained.images[0][6:].abs().sum() == 0, "pads are at the origin"
    first, missing = trained.features
    assert first[:7].tolist() == [[7, 0, 0], [7, 0, 5], [7, 1, 0], [7, 1, 5], [7, 3, 0], [7, 3, 5], [0, 0, 0]]
    assert missing.shape == (32, 3)
    assert not missing.any()


def test_the_positions_of_diffusers_drift_by_the_pads_of_earlier_pieces():
    theirs = omni_sequence.positions_of([5, 37, 3], [(2, 3), (3, 5)], (), 2, "diffusers")
    ids = [int(t) for piece in theirs.captions for t in piece[:, 0]]
    # 27 zeros behind the first piece, 27 behind the second, and the end is cut off
    assert ids == [*range(1, 33), *[0] * 27, *range(8, 72), *[0] * 5]


@torch.no_grad()
@pytest.mark.parametrize(
    ("pieces", "same"), [((32, 64, 32, 5), True), ((5, 2, 37, 3), False), ((32, 64, 31, 5), False)]
)
def test_positions_differ_only_behind_a_padded_piece(model, pieces, same):
    arguments = omni.call(pieces=pieces).arguments
    trained, theirs = model(**arguments)[0], model(**arguments, positions="diffusers")[0]
    assert torch.equal(trained, theirs) == same
    assert torch.equal(trained, model(**arguments, positions="trained")[0])


@torch.no_grad()
def test_steps_of_a_prepared_run_are_calls_to_the_bit_and_refine_once(model):
    net, count = omni.transformer(), []
    for block in (*net.context_refiner, *net.siglip_refiner):
        block.register_forward_hook(lambda *_: count.append(1))
    one, other = omni.call(), omni.call(images=0, pieces=(9,))
    samples = ([one.pieces, other.pieces, one.pieces], [one.references, [], one.references])
    prepared = net.prepare_omni(*samples, [0.2, 0.7], (6, 8))
    assert len(count) == 3, "a sample that occurs twice is refined once; without images there are no features"
    for i, time in enumerate((0.2, 0.7)):
        for sample, source in enumerate((one, other, one)):
            wanted = model(**source._replace(time=time).arguments)[0][:, 0]
            assert torch.equal(net.step_omni(source.target, prepared, i, sample), wanted)
    assert len(count) == 3


@torch.no_grad()
def test_every_reference_and_its_features_matter(model):
    base = omni.call()
    plain = model(**base.arguments)[0]
    for j in (0, 1):
        for missing in ("latent", "features"):
            references = list(base.references)
            references[j] = references[j]._replace(**{missing: None})
            got = model(**base._replace(references=references).arguments)[0]
            assert float((got - plain).abs().max()) > 1e-3


@torch.no_grad()
def test_clean_tokens_do_not_take_the_time_of_the_step(model):
    base = omni.call(images=1, pieces=(5, 7, 3)).arguments
    late = base | {"t": torch.tensor([1.0])}
    # at the last time both kinds are modulated alike; only the order of sums differs
    same = [model(**late, image_noise_mask=[mask])[0] for mask in ([0, 1], [1, 1])]
    assert float((same[0] - same[1]).abs().max()) < 2e-5
    early = [model(**base, image_noise_mask=[mask])[0] for mask in ([0, 1], [1, 1])]
    assert float((early[0] - early[1]).abs().max()) > 1e-3


@torch.no_grad()
def test_a_watched_norm_is_called_once_with_all_tokens_and_changes_nothing():
    model, lengths = omni.transformer(), []
    arguments = omni.call().arguments
    plain = model(**arguments)[0]
    for norm in (model.layers[0].attention_norm1, model.layers[0].ffn_norm2):
        norm.register_forward_hook(lambda _m, inputs, _o: lengths.append(len(inputs[0])))
    watched = model(**arguments)[0]
    assert len(lengths) == 2
    assert len(set(lengths)) == 1
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-5)  # the norm rounds once more


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(model, dtype):
    arguments = omni.call().arguments
    wanted = model(**arguments)[0]
    got = omni.transformer().to(dtype)(**arguments)[0]
    assert got.dtype == dtype
    # three blocks on values of 1 to 10, each rounded to 8 or 11 bits
    assert float((got.float() - wanted).abs().max()) < 16 * torch.finfo(dtype).eps * float(wanted.abs().max())


@torch.no_grad()
def test_float16_keeps_the_scales_of_a_plain_block(model):
    """Values of 1e6 inside the branches, which the norms behind them take back."""

    def loud():
        net = omni.transformer()
        for block in (*net.blocks, *net.context_refiner, *net.siglip_refiner):
            block.attention.to_v.weight *= 1e4
            block.attention.to_out[0].weight *= 10
            block.feed_forward.w3.weight *= 300
            block.feed_forward.w2.weight *= 30
        return net

    arguments = omni.call().arguments
    peak: list[float] = []
    watched = loud()
    for block in watched.layers:
        for part in (block.attention.to_out[0], block.feed_forward.w2):
            part.register_forward_hook(lambda _m, _i, out: peak.append(float(out.abs().max())))
    wanted = watched(**arguments)[0]
    assert min(peak) > 65504
    got = loud().half()(**arguments)[0]
    assert float((got.float() - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@torch.no_grad()
def test_int8_is_near_and_takes_both_segments_as_rows(model):
    net, arguments = omni.transformer(), omni.call().arguments
    set_compute(net, "int8", torch.device("cpu"))
    assert all(block.attention.to_q.arithmetic.mode == "int8" for block in net.siglip_refiner)
    wanted, got = model(**arguments)[0], net(**arguments)[0]
    error = float((got - wanted).norm() / wanted.norm())
    assert 0 < error < 0.05  # 8 bits a number, 127 steps, through five blocks


def test_rows_of_two_segments_are_those_of_the_whole():
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    whole, parts = quantize_rows(x), joined((quantize_rows(part) for part in (x[:3], x[3:])), len(x))
    assert isinstance(parts, Int8Rows)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scale, whole.scale)
    layer = Linear(32, 16)
    assert torch.equal(layer(parts), layer(whole))


@torch.no_grad()
@pytest.mark.parametrize(
    "bad", ["siglip_refiner.0.feed_forward.w1", "siglip_embedder.1", "layers.1.attention.to_k"]
)
def test_a_bad_number_is_named(bad):
    model = omni.transformer()
    model.get_submodule(bad).weight[0, 0] = float("nan")
    with pytest.raises(NonFinite, match=f"because the weight {bad}.weight holds NaN"), watch(model, "S3-DiT"):
        model(**omni.call().arguments)


def test_gradients_reach_every_weight():
    model = omni.transformer().requires_grad_(True)
    model(**omni.call().arguments)[0].square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_a_transformer_without_the_branch_says_so():
    net = tiny.transformer()
    with pytest.raises(Unsupported, match=r"no vision branch \(siglip_embedder, .*give an Omni checkpoint"):
        net(**omni.call().arguments)
    with pytest.raises(BadArgument, match="lacks siglip_feat_dim"):
        OmniTransformer(net.config)


def _with(**changes):
    return lambda call: call.arguments | changes


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: c._replace(pieces=c.pieces[:2]).arguments, BadShape, "2 pieces of text for 3 images"),
        (lambda c: c._replace(pieces=[p[:, :9] for p in c.pieces]).arguments, BadShape, r"wanted \[L, 24\]"),
        (lambda c: c._replace(pieces=[p[:0] for p in c.pieces]).arguments, BadShape, "has no tokens"),
        (
            lambda c: c._replace(references=[r._replace(features=torch.ones(2, 2, 9)) for r in c.references]),
            BadShape,
            r"features of \(2, 2, 9\), wanted \[h, w, 12\]; use the vision tower",
        ),
        (
            lambda c: c._replace(references=[Reference(torch.ones(16, 5, 6))] * 2),
            BadShape,
            "multiples of 2",
        ),
        (_with(x=[[None]]), BadShape, "the last of them its target"),
        (_with(siglip_feats=[[None]]), BadShape, "1 features for 3 images"),
        (_with(image_noise_mask=[[0, 1]]), BadShape, "2 flags"),
        (_with(image_noise_mask=[[0, 0, 1]] * 2), BadShape, "and 2 noise masks"),
        (_with(positions="theirs"), BadArgument, "'theirs', wanted one of 'trained', 'diffusers'"),
        (_with(controlnet_block_samples={0: 1}), Unsupported, "controlnet_block_samples= means nothing"),
        (
            lambda c: c._replace(pieces=[p.repeat(300, 1) for p in c.pieces]).arguments,
            BadArgument,
            r"14100 tokens of text and 3 images.*this transformer ends at 1535; shorten the prompt",
        ),
        (
            lambda c: c._replace(references=[Reference(torch.ones(16, 2, 1028), torch.ones(1, 2, 12))] * 2),
            BadArgument,
            r"reach position \(2, 1027\), this transformer ends at \(511, 511\); choose a smaller size",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(model, change, error, words):
    changed = change(omni.call())
    with pytest.raises(error, match=words):
        model(**(changed.arguments if isinstance(changed, omni.Call) else changed))

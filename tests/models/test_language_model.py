"""The cache of a language model, and the text encoder that it shares."""

import pytest
import torch

from tests.helpers.parity import WIDE, apart, in_float64
from tests.models.test_text_encoder import TINY, tiny
from zimage_core.errors import BadArgument, BadShape
from zimage_core.models.kv_cache import CHUNK, KVCache, cache_bytes
from zimage_core.models.language_model import Ending, LanguageModel

IDS = torch.arange(20)


def model(tied=True, positions=1000):
    torch.manual_seed(1)
    ending = Ending(TINY, tied)
    with torch.no_grad():
        for name, p in ending.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return LanguageModel(tiny(), ending, positions).eval()


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 7, 19])
def test_logits_with_a_cache_are_those_without(first):
    with in_float64():
        ours = model().double()
        cache, want = ours.new_cache(), ours(IDS)
        got = [ours(IDS[:first], cache), *(ours(token, cache) for token in IDS[first:].split(1))]
        assert apart(torch.cat(got), want[first - 1 :]) <= WIDE  # sums in another order


@torch.no_grad()
def test_several_tokens_may_follow_those_in_the_cache():
    with in_float64():
        ours = model().double()
        cache = ours.new_cache()
        ours(IDS[:6], cache)
        assert apart(ours(IDS[6:], cache), ours(IDS)[-1:]) <= WIDE


@torch.no_grad()
def test_the_cache_grows_over_its_chunks():
    with in_float64():
        ours, ids = model().double(), torch.arange(CHUNK + 3) % TINY.vocab_size
        cache = ours.new_cache()
        ours(ids[:-4], cache)
        got = torch.cat([ours(token, cache) for token in ids[-4:].split(1)])
        assert apart(got, ours(ids)[-4:]) <= WIDE
        assert cache.length == len(ids)


def test_what_is_planned_for_a_cache_is_what_it_takes_while_it_grows():
    cache = KVCache(4)
    for layer in cache.layers:
        for count in (CHUNK, 1):
            layer.extend(torch.zeros(count, 2, 16), torch.zeros(count, 2, 16))
    held = sum(layer._memory.nbytes for layer in cache.layers)
    before = held // 4 // 2  # of the layer that grows last, which is copied
    assert held + before <= cache_bytes(4, 2, 16, CHUNK + 1, 4) <= held + 2 * before


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_same_logits_to_its_own_rounding(dtype):
    ours = model()
    want = ours(IDS)
    ours.encoder.to(dtype)
    ours.share()
    cache, step = ours.new_cache(), torch.finfo(dtype).eps
    got = [ours(IDS[:5], cache), *(ours(token, cache) for token in IDS[5:].split(1))]
    assert got[0].dtype == torch.float32
    # a few dozen roundings on the way through four layers
    assert apart(torch.cat(got), want[4:]) <= 32 * step * want.abs().max()


@torch.no_grad()
def test_the_encoder_is_shared_and_gives_the_captions_that_it_gave():
    alone, ours = tiny(), model()
    want = alone(IDS)
    ours(IDS, ours.new_cache())
    assert torch.equal(ours.encoder(IDS), want)
    assert ours.ending.head.weight is ours.encoder.embed_tokens.weight


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_that_is_empty_changes_no_bit(dtype):
    encoder = tiny().to(dtype)
    assert torch.equal(encoder(IDS, KVCache(TINY.num_layers)), encoder(IDS))


@pytest.mark.parametrize("ids", [torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)])
def test_ids_of_another_shape_are_refused(ids):
    with pytest.raises(BadShape, match=r"wanted \[L\]"):
        model()(ids)


def test_a_text_longer_than_the_model_was_made_for_is_refused():
    ours = model(positions=10)
    cache = ours.new_cache()
    ours(IDS[:9], cache)
    with pytest.raises(BadArgument, match="11 tokens, this model was made for 10"):
        ours(IDS[:2], cache)

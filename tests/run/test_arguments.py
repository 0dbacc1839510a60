"""Every bad argument is one sentence with name and range, before a weight is touched."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import tiny
from zimage_core.errors import BadArgument, Unsupported, ZImageError
from zimage_core.pipeline import ZImagePipeline
from zimage_core.run.checks import read_dtype
from zimage_core.run.request import Request

HUGE = 10**5000
EMBEDS = [torch.ones(3, 24)]


class Reached(Exception):
    """A network would have run."""


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny.pipeline()

    def fail(*_):
        raise Reached

    for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
        part.register_forward_pre_hook(fail)
    return pipe


BAD = [
    *[{name: value} for name in ("height", "width") for value in
      (0, -16, 8, math.nan, math.inf, 10**6, HUGE, -HUGE, 33.5, "32", True, [32], 8208)],
    {"height": 8192, "width": 8192},
    *[{"num_inference_steps": v} for v in (0, -1, 1001, HUGE, math.nan, 2.5, "8", True)],
    *[{"guidance_scale": v} for v in (-1, -0.001, math.nan, math.inf, 1e9, HUGE, "4", [4.0])],
    *[{"cfg": v} for v in (0, 0.99, -1, math.nan, math.inf, 1e9, "5")],
    {"cfg": 5.0, "guidance_scale": 4.0},
    *[{"seed": v} for v in (-1, 2**64, HUGE, 0.5, math.nan, "7", True, [1])],
    {"seed": 1, "generator": torch.Generator()},
    {"generator": [torch.Generator()] * 3},
    {"generator": 5},
    *[{"num_images_per_prompt": v} for v in (0, -1, 1025, HUGE, None, 1.5)],
    *[{"max_sequence_length": v} for v in (0, -1, 1505, HUGE, None, 1.5)],
    *[{"cfg_truncation": v} for v in (-1, math.nan, "x")],
    *[{"cfg_normalization": v} for v in (-1, math.nan, None, "x")],
    *[{"sigmas": v} for v in ([], [math.nan], [0.5, 0.6], [1.0, 0.0], [2.0], 5, "x", [HUGE])],
    *[{"output_type": v} for v in ("PIL", "", None, 3, ["pil"])],
    *[{"prompt": v} for v in (None, [], 5, [5], ["a", None], "a\0b", "\ud800", "a" * 20_000, b"a", {"a": 1})],
    {"prompt": ["a"] * 1025},
    *[{"negative_prompt": v, "guidance_scale": 2.0} for v in ([], 5, ["a", "b"], "a\0")],
    *[{"prompt_embeds": v} for v in ([], 5, [torch.ones(3, 25)], [torch.ones(24)], [torch.ones(0, 24)],
                                     [None],
                                     [torch.ones(3, 24, dtype=torch.int64)],
                                     [torch.full((3, 24), math.nan)],
                                     EMBEDS * 2)],
    {"prompt": None, "prompt_embeds": EMBEDS, "guidance_scale": 2.0},
    {"negative_prompt_embeds": EMBEDS * 2, "guidance_scale": 2.0},
    *[{"latents": v} for v in (torch.ones(1, 16, 4, 5), torch.ones(2, 16, 4, 4), 5,
                               torch.ones(1, 16, 4, 4, dtype=torch.int32),
                               torch.full((1, 16, 4, 4), math.inf))],
    {"callback_on_step_end": 5},
    *[{"callback_on_step_end_tensor_inputs": v} for v in (["latent"], "latents", 5, [5])],
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: " ".join(bad) or "none")
def test_a_bad_argument_is_a_value_error_that_names_it(pipe, bad):
    with pytest.raises(ZImageError) as caught:
        pipe(**{"prompt": "a", **bad})
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    names = {name.removesuffix("s") for name in bad} | {"prompt"}
    assert any(name in message for name in names), message


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(1080, "1072 and 1088"), (770, "768 and 784"), (15, "is 16"), (8191, "8176 and 8192")],
)
def test_a_size_between_two_names_both(pipe, size, nearest):
    with pytest.raises(BadArgument, match=f"height: got {size}.*multiple of 16.*{nearest}"):
        pipe("a", height=size, width=32)


def test_attention_processors_are_refused_by_name(pipe):
    with pytest.raises(Unsupported, match="joint_attention_kwargs"):
        pipe("a", joint_attention_kwargs={"scale": 1.0})


anything = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.none(), st.booleans(), st.just([]),
    st.lists(st.floats(), max_size=3),
)  # fmt: skip
NAMES = ("height", "width", "num_inference_steps", "guidance_scale", "cfg", "seed", "cfg_truncation",
         "sigmas", "cfg_normalization", "max_sequence_length", "output_type")  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), anything, min_size=1, max_size=4))
def test_any_arguments_give_a_value_error_or_reach_the_networks(pipe, values):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe("a", **{"height": 32, "width": 32, **values})
    except (BadArgument, Reached):
        pass


def test_numpy_integers_are_integers():
    pipe = tiny.pipeline()
    got = pipe(
        "a", height=np.int64(32), width=np.int32(16), seed=np.uint64(3), num_inference_steps=np.int8(1)
    )
    assert got.images[0].size == (16, 32)


def test_guidance_that_does_not_suit_the_checkpoint_warns_what_it_costs():
    pipe = tiny.pipeline()
    with pytest.warns(
        UserWarning, match=r"guidance_scale=1 runs the network twice.*off is 0.*the 2 of programs"
    ):
        pipe("a", guidance_scale=1.0, num_inference_steps=1)
    with pytest.warns(UserWarning, match="distilled to need no guidance$"):
        pipe("a", guidance_scale=4.0, num_inference_steps=1)
    with pytest.warns(UserWarning, match="no effect at guidance_scale=0"):
        pipe("a", negative_prompt="b", num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a", num_inference_steps=1)
        pipe("a", cfg=1, num_inference_steps=1)
        tiny.pipeline(shift=6.0)("a", negative_prompt="b", num_inference_steps=1)


def test_warnings_point_at_the_callers_line():
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        tiny.pipeline()("a", guidance_scale=1.0, num_inference_steps=1)
    assert caught[0].filename == __file__


def test_defaults_suit_the_checkpoint():
    turbo, base = tiny.pipeline(), tiny.pipeline(shift=6.0)
    assert len(turbo("a").sigmas) == 9
    got = base("a", output_type="latent", seed=1)
    assert len(got.sigmas) == 51
    assert got.settings[0]["guidance_scale"] == 4.0


def test_cfg_is_guidance_plus_one():
    pipe = tiny.pipeline(shift=6.0)
    a, b = (pipe("a", seed=1, num_inference_steps=2, output_type="latent", **k).images
            for k in ({"cfg": 3.5}, {"guidance_scale": 2.5}))  # fmt: skip
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_the_default_dtype_is_one_that_the_gpu_has(capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert read_dtype(None, None, torch.device("cuda")) == getattr(torch, wanted)
    assert read_dtype(None, None, torch.device("cpu")) == torch.float32
    assert read_dtype("float32", None, torch.device("cuda")) == torch.float32


def test_a_request_has_the_arguments_of_the_call_and_their_defaults():
    call = dict(inspect.signature(ZImagePipeline.__call__).parameters)
    del call["self"], call["return_dict"]
    fields = {field.name: field.default for field in dataclasses.fields(Request)}
    assert {name: parameter.default for name, parameter in call.items()} == fields

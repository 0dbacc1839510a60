"""Steps are recorded unasked only where the GPU would wait for the host, and nothing else changes."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.linear import quant
from tests.helpers.live_bytes import on_meta
from tests.helpers.recorder import Recorder
from zimage_core.config import TransformerConfig
from zimage_core.memory import int8_rows
from zimage_core.memory.rates import known
from zimage_core.models.transformer import ZImageTransformer
from zimage_core.nn import cuda_graphs
from zimage_core.run import capturing, placement

DRAW = {"prompt": "a", "seed": 1, "num_inference_steps": 6, "output_type": "latent"}


@pytest.fixture(scope="module")
def full_size():
    """S3-DiT of full size with dense weights, as if it were on a GPU."""
    net = on_meta(lambda: ZImageTransformer(TransformerConfig()))
    return SimpleNamespace(
        config=net.config,
        blocks=net.blocks,
        dtype=torch.bfloat16,
        device=torch.device("cuda", 0),
        compute="exact",
    )


@pytest.mark.parametrize(
    ("architecture", "largest"), [("sm_86", 0), ("sm_89", 256), ("sm_90", 640), ("sm_100", 896), ("sm_61", 0)]
)
def test_steps_up_to_a_size_wait_for_the_host(full_size, monkeypatch, architecture, largest):
    monkeypatch.setattr(capturing, "architecture", lambda device: architecture)
    pixels = range(256, 1344, 64)
    found = [px for px in pixels if capturing.pays(full_size, px // 8, px // 8, 64)]
    assert found == [px for px in pixels if px <= largest]


def test_packed_weights_take_the_time_to_make_them_dense():
    dense, packed = tiny.transformer(), tiny.transformer()
    for block in packed.blocks:
        layer = block.feed_forward.w1
        layer.assign(quant("Q8_0", *layer.weight.shape, torch.device("cpu")))
    times = [capturing.device_seconds(net, 4, 4, 8, "sm_90") for net in (dense, packed)]
    weights = sum(math.prod(block.feed_forward.w1.weight.shape) for block in packed.blocks)
    wanted = weights * (34 / 32 + 4) / known("sm_90").bandwidth
    assert times[1] - times[0] == pytest.approx(wanted)


def test_int8_steps_are_shorter_so_that_larger_ones_wait_for_the_host(full_size, monkeypatch):
    monkeypatch.setattr(capturing, "architecture", lambda device: "sm_89")
    assert not capturing.pays(full_size, 48, 48, 64)
    assert capturing.pays(SimpleNamespace(**{**vars(full_size), "compute": "int8"}), 48, 48, 64)


def test_a_cpu_and_amd_record_nothing_unasked(full_size, monkeypatch):
    monkeypatch.setattr(capturing, "architecture", lambda device: "sm_100")
    assert capturing.pays(full_size, 32, 32, 64)
    assert not capturing.pays(tiny.transformer(), 32, 32, 64)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not capturing.pays(full_size, 32, 32, 64)


@pytest.mark.parametrize(("free", "room"), [(2 << 30, False), (3 << 30, True)])
def test_the_decoder_keeps_its_memory(full_size, monkeypatch, free, room):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1000, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    assert capturing.has_room(full_size, 64, 64, 64) == room


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(cuda_graphs, "CudaRecorder", lambda: found)
    monkeypatch.setattr(placement, "pays", lambda *_: True)
    monkeypatch.setattr(placement, "has_room", lambda *_: True)
    return found


def test_the_ninth_step_of_a_size_is_recorded_and_no_latent_changes(recorder):
    pipe, plain = tiny.pipeline(), tiny.pipeline()
    plain.capture(False)
    seen = []
    for _ in range(3):
        assert torch.equal(pipe(**DRAW).images, plain(**DRAW).images)
        seen.append((recorder.recorded, recorder.replayed))
    assert seen == [(0, 0), (1, 4), (1, 10)]
    copy.deepcopy(pipe)
    assert torch.equal(copy.copy(pipe)(**DRAW).images, plain(**DRAW).images)


def test_steps_with_int8_rows_are_recorded_once_since_the_rows_stay_where_they_are(recorder, monkeypatch):
    monkeypatch.setattr(int8_rows.page_cache, "available", lambda: 1 << 40)
    pipe, plain = tiny.pipeline(), tiny.pipeline()
    for each in (pipe, plain):
        each.set_compute("int8")
    plain.capture(False)
    for _ in range(3):
        assert torch.equal(pipe(**DRAW).images, plain(**DRAW).images)
    assert pipe._placement.rows.nbytes
    assert (recorder.recorded, recorder.replayed) == (1, 10)


def hook(pipe):
    pipe.transformer.layers[0].register_forward_hook(lambda *_: None)


def own_forward(pipe):
    layer = pipe.transformer.layers[0].feed_forward
    layer.forward = lambda x, scale, usual=layer.forward: usual(x, scale)


class Scaled(torch.nn.Module):
    """A layer around another one, whose factor is a number that a user may change between runs."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.factor = inner, 1.0

    def forward(self, x, scale):
        return self.inner(x, scale) * self.factor


def own_module(pipe):
    block = pipe.transformer.layers[0]
    block.feed_forward = Scaled(block.feed_forward)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (own_module, {}),
        (lambda pipe: pipe.capture(False), {}),
        (hook, {}),
        (own_forward, {}),
        (lambda pipe: None, {"debug": True}),
        (lambda pipe: None, {"callback_on_step_end": lambda *_: {}}),
    ],
    ids=["module", "not wanted", "hook", "forward", "debug", "callback"],
)
def test_what_a_graph_would_not_repeat_is_not_recorded(recorder, change, options):
    pipe = tiny.pipeline()
    change(pipe)
    for _ in range(3):
        pipe(**DRAW, **options)
    assert not recorder.recorded
    if not options:
        return
    for _ in range(3):
        pipe(**DRAW)
    assert recorder.recorded == 1


def test_a_weight_that_is_replaced_is_read(recorder):
    pipe, plain = tiny.pipeline(), tiny.pipeline()
    plain.capture(False)
    for _ in range(2):
        pipe(**DRAW)
    for each in (pipe, plain):
        layer = each.transformer.layers[0].attention.to_v
        layer.weight = torch.nn.Parameter(layer.weight.detach() * -1)
    assert torch.equal(pipe(**DRAW).images, plain(**DRAW).images)
    pipe(**DRAW)
    assert recorder.recorded == 2

"""Streamed weights give the bits of resident ones in any order and thread, and move once per step."""

from __future__ import annotations

import threading
import warnings
from contextlib import closing

import pytest
import torch

from tests.helpers.streamed import (
    DIT,
    TIMEOUT,
    at_home,
    draw,
    encode,
    our_threads,
    ringed,
    streamed,
    transformer_file,
)
from tests.helpers.tree import ROOT
from zimage_core.memory.attach import unstream
from zimage_core.memory.device import Device
from zimage_core.models.block_source import RESIDENT
from zimage_core.pipeline import ZImagePipeline
from zimage_core.quant import dispatch
from zimage_core.weights.load import load_text_encoder, load_transformer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")

BLOCKS = DIT.n_layers + DIT.n_refiner_layers
SETS = [(), (0,), (1, 4), (0, 1, 2, 3, 4, 5)]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("resident", SETS, ids=str)
def test_streamed_is_resident_to_the_bit(dit, single, resident, slots):
    for options in ({}, ringed()):
        stream = streamed(dit, resident, slots=slots, **options)
        assert stream.streamed == tuple(i for i in range(BLOCKS) if i not in resident)
        assert torch.equal(draw(dit), single)
        assert torch.equal(draw(dit), single)
        unstream(dit)
        assert at_home(dit)
    assert torch.equal(draw(dit), single)


@pytest.mark.parametrize("resident", [(), (1, 3)], ids=str)
def test_a_text_encoder_streams_too(encoder_path, resident):
    model = load_text_encoder(encoder_path)
    want, other = encode(model), encode(model, (7, 7))
    with closing(streamed(model, resident, **ringed(slots=2))) as stream:
        for _ in range(2):
            assert torch.equal(encode(model), want)
            assert torch.equal(encode(model, (7, 7)), other)
        assert stream.traffic().loads == 4 * len(stream.streamed), "no block is read ahead for a next run"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("matrix", ["BF16", "IQ4_XS"])
def test_other_formats_and_dtypes(tmp_path, matrix, dtype):
    """A matrix stored in the dtype of the computation is a dense parameter, and streams like a packed one."""
    path = transformer_file(tmp_path, matrix, "Q6_K")
    want = draw(load_transformer(path, dtype))
    model = load_transformer(path, dtype)
    with closing(streamed(model, (), **ringed(slots=2))) as stream:
        assert stream.streamed == (*range(7),)
        assert torch.equal(draw(model), want)


@pytest.mark.parametrize("mmap", [True, False])
def test_the_context_refiner_comes_for_each_caption_and_goes(dit_path, wanted, mmap):
    model = load_transformer(dit_path, mmap=mmap)
    before = {name: p.data_ptr() for name, p in model.context_refiner.named_parameters()}
    seen = []
    for block in model.context_refiner:
        block.register_forward_hook(lambda module, *_: seen.append(place_of(module)))
    with closing(streamed(model, (), refiner_stays=False, **ringed())):
        assert torch.equal(draw(model, images=2), wanted)
        assert len(seen) >= DIT.n_refiner_layers
        home = {place_of(block) for block in model.context_refiner}
        assert home.isdisjoint(seen) or not mmap, "weights in memory are at their place on a CPU already"
        assert before == {name: p.data_ptr() for name, p in model.context_refiner.named_parameters()}
    unstream(model)
    assert torch.equal(draw(model, images=2), wanted)


def place_of(block):
    return block.feed_forward.w1.weight.packed.data_ptr()


def test_fp8_scales_go_with_their_weights(tmp_path):
    from tests.helpers.model_files import stored, write_safetensors
    from zimage_core.weights import names

    shapes = names.checkpoint_shapes(names.transformer_table(DIT, "fused"))
    content = stored(shapes, matrix="F8_E4M3")
    for k, name in enumerate([n for n in shapes if "feed_forward" in n]):
        scale = stored({name.replace(".weight", ".scale_weight"): (1,)}, seed=k)
        content.tensors |= scale.tensors
    model = load_transformer(write_safetensors(tmp_path / "x.safetensors", content))
    assert model.layers[0].feed_forward.w1.weight.scale is not None
    want = draw(model)
    with closing(streamed(model, (), **ringed(slots=2))):
        assert torch.equal(draw(model), want)


def test_weights_in_memory_stream_too(dit_path, wanted):
    model = load_transformer(dit_path, mmap=False)
    with closing(streamed(model, (2,), **ringed())) as stream:
        assert torch.equal(draw(model, images=2), wanted)
        assert all(s.stored.source is None for b in stream._blocks.values() for s in b.segments)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_every_byte_moves_once_a_step_and_the_memory_is_what_was_said(dit, slots, monkeypatch):
    device, allocated = Device(staged=True), []
    real = device.memory
    monkeypatch.setattr(device, "memory", lambda n: (allocated.append(n), real(n))[1])
    stream = streamed(dit, (3,), slots=slots, ring=1 << 18, through=device)
    sizes = {i: stream._blocks[i].payload for i in stream.streamed}
    largest = max(b.nbytes for b in stream._blocks.values())
    piece = stream.rest.device_bytes
    assert allocated[0] == piece >= slots * largest, "one piece of memory for what stays and for the slots"
    draw(dit, steps=4, images=2)
    for load in stream._loads:
        load.copied.result(TIMEOUT)
    traffic = stream.traffic()
    moved = [s.block for s in traffic.timeline if s.lane == "copy"]
    assert moved == [stream.streamed[k % 6] for k in range(8 * 6 + slots)]
    assert traffic.bytes_moved == sum(sizes[i] for i in moved)
    assert stream.device_bytes == slots * largest
    assert allocated[1:] == [1 << 18], "the ring"
    assert len(traffic.step_stalls) == 8
    assert sum(traffic.step_stalls) == pytest.approx(traffic.stall_seconds)
    assert 0 <= traffic.overlap <= 1
    assert traffic.rate == traffic.bytes_moved / traffic.transfer_seconds > 0
    assert {s.lane for s in traffic.timeline} == {"read", "copy", "stall", "compute"}
    assert all(s.start <= s.end for s in traffic.timeline)
    assert stream.traffic(clear=True).loads == 48 + slots
    assert stream.traffic().loads == 0
    assert stream.traffic().overlap == 1


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_while_a_block_computes_the_next_ones_are_read(dit, slots):
    """So a step takes the longer of computation and transfer; with one slot nothing overlaps."""
    stream = streamed(dit, (2,), **ringed(slots=slots))
    order = [i for i in range(BLOCKS) if i != 2] * 3
    for place, index in enumerate(order[: 2 * 6]):
        with stream.block(index):
            ahead = list(stream._loads)
            assert [load.index for load in ahead] == order[place + 1 : place + slots]
            for load in ahead:
                load.copied.result(TIMEOUT)
            held = [load.slot for load in (*ahead, stream._held)]
            assert len(set(held)) == slots, "no slot is read into that is in use"
    assert stream.traffic().loads >= 2 * 6 + slots - 1


def test_blocks_in_any_order(dit):
    stream = streamed(dit, (5,), **ringed(slots=3))
    generator = torch.Generator().manual_seed(0)
    home = {i: [s.home.packed.clone() for s in stream._blocks[i].segments] for i in stream.streamed}
    for index in torch.randint(0, BLOCKS, (200,), generator=generator).tolist():
        with stream.block(index):
            if index == 5:
                continue
            for segment, packed in zip(stream._blocks[index].segments, home[index], strict=True):
                assert torch.equal(segment.linear.weight.packed, packed)
                assert segment.linear.weight.packed.data_ptr() != segment.home.packed.data_ptr()
                assert segment.linear.weight.packed.data_ptr() % 64 == 0
                assert segment.linear.weight.planes.closed
    assert at_home(dit)


def test_two_models_and_two_threads_at_once(dit_path, wanted):
    models = [load_transformer(dit_path) for _ in range(2)]
    streams = [streamed(model, (k,), **ringed(slots=2)) for k, model in enumerate(models)]
    results = run_in_threads([lambda m=m: draw(m, images=2) for m in models])
    assert all(torch.equal(r, wanted) for r in results)
    for stream in streams:
        stream.close()


def test_two_threads_in_one_model_take_turns(dit, wanted):
    streamed(dit, (), **ringed(slots=2))
    results = run_in_threads([lambda: draw(dit, images=2)] * 2)
    assert all(torch.equal(r, wanted) for r in results)


def test_two_whole_pipelines_at_once_with_guidance_and_a_batch():
    """The embedded model, text encoder and transformer streamed, against itself resident."""
    nano = ROOT / "zimage_core" / "assets" / "nano"
    files = (nano / "transformer.gguf", nano / "text_encoder.gguf", nano / "vae.safetensors")
    pipes = [ZImagePipeline.from_files(*files) for _ in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 1.5, "negative_prompt": "blue", "seed": 3}
    size = {"height": 64, "width": 64, "output_type": "latent"}

    def run(pipe):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipe(["a red circle", "a square"], **options, **size).images

    want = run(pipes[0])
    for pipe in pipes:
        for model in (pipe.transformer, pipe.text_encoder):
            streamed(model, (1,), **ringed(slots=2))
    results = run_in_threads([lambda p=p: run(p) for p in pipes])
    assert all(torch.equal(r, want) for r in results)
    for pipe in pipes:
        assert pipe.transformer.stream.traffic().bytes_moved > 0
        assert pipe.text_encoder.stream.traffic().bytes_moved > 0
        unstream(pipe.transformer)
        unstream(pipe.text_encoder)
    assert torch.equal(run(pipes[1]), want)


def run_in_threads(jobs):
    results = [None] * len(jobs)

    def run(k):
        results[k] = jobs[k]()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "deadlock"
    return results


def test_all_resident_needs_no_thread(dit, wanted):
    stream = streamed(dit, range(BLOCKS))
    assert torch.equal(draw(dit, images=2), wanted)
    assert (stream.device_bytes, stream.streamed) == (0, ())
    assert not our_threads()


def test_the_seam_of_a_resident_model_compiles_without_a_break():
    class Loop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stream = RESIDENT

        def forward(self, x):
            for i in range(3):
                with self.stream.block(i):
                    x = x * 2 + i
            return x

    x = torch.ones(2)
    loop = Loop()
    assert torch.equal(torch.compile(loop, backend="eager", fullgraph=True)(x), loop(x))


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("resident", [(), (1, 4), (0, 1, 2, 3, 4, 5)], ids=str)
def test_on_a_gpu_streamed_is_resident_to_the_bit(dit_path, resident, slots):
    dtype = torch.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        # planes are never made of streamed weights, and the other path sums in another order
        patch.setattr(dispatch, "MODE", "dequantise")
        want = draw(load_transformer(dit_path, dtype, "cuda"), images=2)
        model = load_transformer(dit_path, dtype)
        stream = streamed(model, resident, "cuda", slots=slots, ring=1 << 18)
        for _ in range(3):
            assert torch.equal(draw(model, images=2), want)
        traffic = stream.traffic()
        assert traffic.loads >= 18 * len(stream.streamed)
        assert 0 <= traffic.overlap <= 1
        unstream(model)
    assert at_home(model)
    assert model.device.type == "cpu"


@pytest.mark.gpu
def test_on_a_gpu_a_text_encoder_streams(encoder_path):
    want = encode(load_text_encoder(encoder_path, torch.bfloat16, "cuda"))
    model = load_text_encoder(encoder_path, torch.bfloat16)
    with closing(streamed(model, (1,), "cuda", slots=2)):
        for _ in range(3):
            assert torch.equal(encode(model), want)

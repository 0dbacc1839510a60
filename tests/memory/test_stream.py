"""Streamed weights: the bits of resident ones, errors instead of crashes, no thread left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import time
import warnings
import weakref

import pytest
import torch

from tests.helpers.streamed import DIT, draw, encode, encoder_file, transformer_file
from tests.helpers.tree import ROOT
from zimage_core import paths
from zimage_core.errors import BadArgument, BadFile, Unsupported
from zimage_core.memory.attach import stream_model, unstream
from zimage_core.memory.blocks import in_file, sources_of
from zimage_core.memory.device import HostBackend, backend_for
from zimage_core.memory.stream import Stream
from zimage_core.models.block_source import RESIDENT
from zimage_core.pipeline import ZImagePipeline
from zimage_core.weights.load import load_text_encoder, load_transformer, weight_file

BLOCKS = DIT.n_layers + DIT.n_refiner_layers
SETS = [(), (0,), (1, 4), (0, 1, 2, 3, 4, 5)]
TIMEOUT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("streamed")


@pytest.fixture(scope="module")
def dit_path(folder):
    return transformer_file(folder)


@pytest.fixture(scope="module")
def encoder_path(folder):
    return encoder_file(folder)


@pytest.fixture(scope="module")
def wanted(dit_path):
    return draw(load_transformer(dit_path), images=2)


@pytest.fixture(scope="module")
def single(dit_path):
    return draw(load_transformer(dit_path))


@pytest.fixture
def dit(dit_path):
    model = load_transformer(dit_path)
    yield model
    unstream(model)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    gc.collect()
    assert not our_threads(), our_threads()


def our_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(("zimage-feed", "zimage-read"))]


def ringed(**options):
    """Through a ring of several chunks a block, as on a GPU."""
    return {"backend": HostBackend(direct=False), "ring": 1 << 18, **options}


def at_home(model):
    """The packed weights of streamed blocks are views of the map again."""
    streamed = model.stream.streamed if isinstance(model.stream, Stream) else range(len(model.blocks))
    files = sources_of(weight_file(model))
    return all(
        in_file(m.packed, files)[0] is not None
        for i in streamed
        for name, m in model.blocks[i].named_modules()
        if getattr(m, "packed", None) is not None and "adaLN" not in name
    )


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("resident", SETS, ids=str)
def test_streamed_is_resident_to_the_bit(dit, single, resident, slots):
    for options in ({}, ringed()):
        stream = stream_model(dit, resident, slots=slots, **options)
        assert stream.streamed == tuple(i for i in range(BLOCKS) if i not in resident)
        assert torch.equal(draw(dit), single)
        assert torch.equal(draw(dit), single)
        unstream(dit)
        assert at_home(dit)
    assert torch.equal(draw(dit), single)


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("resident", [(), (1, 3)], ids=str)
def test_a_text_encoder_streams_too(encoder_path, resident, wrap):
    model = load_text_encoder(encoder_path)
    want, other = encode(model), encode(model, (7, 7))
    with stream_model(model, resident, wrap=wrap, **ringed(slots=2)) as stream:
        for _ in range(2):
            assert torch.equal(encode(model), want)
            assert torch.equal(encode(model, (7, 7)), other)
        if not wrap:
            assert stream.traffic().loads == 4 * len(stream.streamed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("matrix", ["BF16", "IQ4_XS"])
def test_other_formats_and_dtypes(tmp_path, matrix, dtype):
    """A matrix stored in the dtype of the computation is a dense parameter, and stays resident."""
    path = transformer_file(tmp_path, matrix, "Q6_K")
    want = draw(load_transformer(path, dtype))
    model = load_transformer(path, dtype)
    with stream_model(model, (), **ringed(slots=2)) as stream:
        assert stream.streamed == ((3, 5) if (matrix, dtype) == ("BF16", torch.bfloat16) else (*range(7),))
        assert torch.equal(draw(model), want)


def test_fp8_scales_go_with_their_weights(tmp_path):
    from tests.helpers.model_files import stored, write_safetensors
    from zimage_core.weights import names

    shapes = names.checkpoint_shapes(names.transformer_table(DIT, "fused"))
    content = stored(shapes, matrix="F8_E4M3")
    for k, name in enumerate([n for n in shapes if "feed_forward" in n]):
        scale = stored({name.replace(".weight", ".scale_weight"): (1,)}, seed=k)
        content.tensors |= scale.tensors
    model = load_transformer(write_safetensors(tmp_path / "x.safetensors", content))
    assert model.layers[0].feed_forward.w1.quant.scale is not None
    want = draw(model)
    with stream_model(model, (), **ringed(slots=2)):
        assert torch.equal(draw(model), want)


def test_weights_in_memory_stream_too(dit_path, wanted):
    model = load_transformer(dit_path, mmap=False)
    with stream_model(model, (2,), **ringed()) as stream:
        assert torch.equal(draw(model, images=2), wanted)
        assert all(s.source is None for b in stream._blocks.values() for s in b.segments)


def test_every_byte_moves_once_a_step_and_the_memory_is_what_was_said(dit):
    backend = HostBackend(direct=False)
    stream = stream_model(dit, (3,), slots=2, ring=1 << 18, backend=backend)
    sizes = {i: stream._blocks[i].payload for i in stream.streamed}
    step = sum(sizes.values())
    draw(dit, steps=4, images=2)
    wait_for_rest(stream)
    traffic = stream.traffic()
    ahead = sum(sizes[i] for i in stream.streamed[:2])
    assert traffic.bytes_moved == 8 * step + ahead
    moved = [s.block for s in traffic.timeline if s.lane == "copy"]
    assert moved == [stream.streamed[k % 6] for k in range(8 * 6 + 2)]
    assert stream.device_bytes == 2 * max(b.nbytes for b in stream._blocks.values())
    assert stream.host_bytes == 1 << 18
    assert backend.allocated == stream.device_bytes + stream.host_bytes
    assert len(traffic.step_stalls) == 8
    assert sum(traffic.step_stalls) == pytest.approx(traffic.stall_seconds)
    assert 0 <= traffic.overlap <= 1
    assert traffic.rate == traffic.bytes_moved / traffic.transfer_seconds > 0
    assert {s.lane for s in traffic.timeline} == {"read", "copy", "stall", "compute"}
    assert all(s.start <= s.end for s in traffic.timeline)
    assert stream.traffic(clear=True).loads == 50
    assert stream.traffic().loads == 0
    assert stream.traffic().overlap == 1


def wait_for_rest(stream):
    """Until every slot is full."""
    deadline = time.monotonic() + TIMEOUT
    while any(s.value != "ready" for s in stream._feeder.schedule.states):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_run_broken_off_anywhere_leaves_a_stream_that_works(dit, wanted):
    stream = stream_model(dit, (2,), **ringed(slots=2))
    for place in (0, 1, 3, 6):
        original = type(dit.blocks[place]).forward

        def fail(self, *args, place=place, original=original, **kwargs):
            if self is dit.blocks[place]:
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(dit.blocks[place]), "forward", fail)
            with pytest.raises(KeyboardInterrupt):
                draw(dit)
        assert at_home(dit)
        assert torch.equal(draw(dit, images=2), wanted)
    assert not stream.closed


def test_ctrl_c_while_a_block_is_awaited(dit, wanted, monkeypatch, interruptible):
    stream = stream_model(dit, (), **ringed(slots=2))
    stuck, real = threading.Event(), os.preadv

    def preadv(*arguments):
        stuck.wait(TIMEOUT)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    stream.prefetch()  # so that it is the read that takes long
    interrupt = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        draw(dit)
    interrupt.join()
    stuck.set()
    assert at_home(dit)
    assert torch.equal(draw(dit, images=2), wanted)
    assert not stream.closed


def test_ctrl_c_while_threads_are_started(dit, wanted, monkeypatch):
    stream = stream_model(dit, (), slots=2)
    real = threading.Thread.start
    for place in range(4):
        count = [0]

        def start(thread, place=place, count=count):
            if thread.name.startswith(("zimage-feed", "zimage-read")):
                count[0] += 1
                if count[0] > place:
                    raise KeyboardInterrupt
            real(thread)

        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            draw(dit)
        monkeypatch.undo()
        assert torch.equal(draw(dit, images=2), wanted)
        stream.park()


def test_a_block_that_was_never_released_is_taken_back(dit, wanted):
    """As if an interrupt came between acquire and the block."""
    stream = stream_model(dit, (), slots=2)
    for index in (4, 1, 1):
        stream.acquire(index)
    stream.release(4)  # not held: nothing happens
    assert stream._held == 1
    assert torch.equal(draw(dit, images=2), wanted)
    stream.acquire(3)
    stream.park()
    assert at_home(dit)


def test_blocks_in_any_order(dit):
    stream = stream_model(dit, (5,), **ringed(slots=3))
    generator = torch.Generator().manual_seed(0)
    home = {i: [s.home.packed.clone() for s in stream._blocks[i].segments] for i in stream.streamed}
    for index in torch.randint(0, BLOCKS, (200,), generator=generator).tolist():
        with stream.block(index):
            if index == 5:
                continue
            for segment, packed in zip(stream._blocks[index].segments, home[index], strict=True):
                assert torch.equal(segment.linear.packed, packed)
                assert segment.linear.packed.data_ptr() != segment.home.packed.data_ptr()
                assert segment.linear.packed.data_ptr() % 64 == 0
                assert segment.linear.quant.cache == {"planes": None}
    assert at_home(dit)


def test_two_models_and_two_threads_at_once(dit_path, wanted):
    models = [load_transformer(dit_path) for _ in range(2)]
    streams = [stream_model(model, (k,), **ringed(slots=2)) for k, model in enumerate(models)]
    results = run_in_threads([lambda m=m: draw(m, images=2) for m in models])
    assert all(torch.equal(r, wanted) for r in results)
    for stream in streams:
        stream.close()


def test_two_threads_in_one_model_take_turns(dit, wanted):
    stream_model(dit, (), **ringed(slots=2))
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
            stream_model(model, (1,), **ringed(slots=2))
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


# --- faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("change", ["cut", "grown", "touched"])
def test_a_file_that_changes_meanwhile_is_an_error_with_its_name(tmp_path, change, direct):
    path = transformer_file(tmp_path)
    model = load_transformer(path)
    stream = stream_model(model, (), slots=2, backend=HostBackend(direct))
    draw(model, steps=1)
    if change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "grown":
        with path.open("ab") as file:
            file.write(b"x")
    else:
        os.utime(path, (1, 1))
    for _ in range(2):  # and again, not a crash
        with pytest.raises(BadFile, match=r"transformer\.gguf: changed while in use"):
            draw(model, steps=2)
    assert stream.closed
    assert not our_threads()
    assert at_home(model)


def test_a_replaced_file_is_read_to_the_end(tmp_path):
    path = transformer_file(tmp_path)
    model = load_transformer(path)
    want = draw(model)
    with stream_model(model, (), slots=2):
        other = tmp_path / "new"
        other.write_bytes(b"something else")
        other.replace(path)
        assert torch.equal(draw(model), want)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_a_read_error_surfaces_where_the_block_is_asked_for(dit, monkeypatch, code):
    stream = stream_model(dit, (), **ringed(slots=2))
    real, count = os.preadv, [0]

    def preadv(*arguments):
        count[0] += 1
        if count[0] > 40:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(BadFile, match=rf"transformer\.gguf: cannot be read at byte \d+: {os.strerror(code)}"):
        draw(dit, steps=20)
    assert stream.closed
    assert not our_threads()
    assert at_home(dit)
    monkeypatch.undo()
    unstream(dit)
    with stream_model(dit, ()):
        draw(dit)


def test_a_fault_that_is_no_read_error_surfaces_as_it_is(dit):
    backend = HostBackend(direct=False)
    stream = stream_model(dit, (), backend=backend, slots=2)
    backend.copy = lambda host, slot: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        draw(dit)
    assert stream.closed


@pytest.mark.parametrize("what", ["slot", "ring"])
def test_no_memory_for_slots_leaves_nothing_behind(dit, wanted, what):
    backend = HostBackend(direct=False)
    stream = stream_model(dit, (), backend=backend, slots=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, what, lambda n: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            draw(dit)
    assert not our_threads()
    assert torch.equal(draw(dit, images=2), wanted)  # there is some now
    assert not stream.closed


# --- life ---------------------------------------------------------------------------------


def test_memory_and_threads_come_at_first_use_and_go_with_park_and_close(dit, wanted):
    backend = HostBackend()
    stream = stream_model(dit, (), slots=2, backend=backend)
    assert not our_threads()
    assert backend.allocated == 0
    for round_ in range(3):
        stream.prefetch()
        assert len(our_threads()) == 4
        assert torch.equal(draw(dit, images=2), wanted)
        stream.park()
        assert not our_threads()
        assert stream._feeder.life is None
        assert not any(b._views for b in stream._blocks.values())
        assert backend.allocated == (round_ + 1) * stream.device_bytes
    assert "parked" in repr(stream)
    stream.close()
    stream.close()
    for use in (stream.prefetch, lambda: stream.acquire(0), lambda: draw(dit)):
        with pytest.raises(BadArgument, match="it was closed"):
            use()
    assert stream.traffic().loads > 0


def test_closed_in_the_middle_by_another_thread(dit):
    stream = stream_model(dit, (), **ringed(slots=2))
    closer = threading.Timer(0.05, stream.close)
    closer.start()
    with pytest.raises(BadArgument, match="it was closed"):
        draw(dit, steps=10_000)
    closer.join()
    assert at_home(dit)


def test_a_forgotten_stream_ends_its_threads(dit_path):
    model = load_transformer(dit_path)
    stream = weakref.ref(stream_model(model, (), **ringed()))
    draw(model)
    assert our_threads()
    del model
    gc.collect()
    assert stream() is None
    assert not our_threads()


def test_a_process_ends_with_a_stream_that_was_never_closed(dit_path):
    import subprocess
    import sys

    code = (
        "import sys, torch\nfrom tests.helpers.streamed import draw\n"
        "from zimage_core.memory.attach import stream_model\n"
        "from zimage_core.weights.load import load_transformer\n"
        "model = load_transformer(sys.argv[1]); stream_model(model); draw(model); print('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(dit_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_arguments_out_of_range(dit):
    for options in ({"slots": 0}, {"ring": 0}, {"readers": 0}, {"readers": 7}):
        with pytest.raises(BadArgument, match="wanted 1 slot or more"):
            stream_model(dit, **options)
    with pytest.raises(BadArgument, match="resident names block 7, blocks are 0 to 6"):
        stream_model(dit, (7,))
    with pytest.raises(Unsupported, match="cannot be streamed to meta"):
        backend_for("meta")
    stream_model(dit)
    with pytest.raises(BadArgument, match="streamed already"):
        stream_model(dit)


def test_all_resident_needs_no_thread(dit, wanted):
    stream = stream_model(dit, range(BLOCKS))
    stream.prefetch()
    assert torch.equal(draw(dit, images=2), wanted)
    assert (stream.device_bytes, stream.host_bytes, stream.streamed) == (0, 0, ())
    assert not our_threads()
    stream.park()
    stream.close()


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


# --- on a GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("resident", [(), (1, 4), (0, 1, 2, 3, 4, 5)], ids=str)
def test_on_a_gpu_streamed_is_resident_to_the_bit(dit_path, resident, slots):
    dtype = torch.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        # planes are never made of streamed weights, and the other path sums in another order
        patch.setattr(paths, "MODE", "dequantise")
        want = draw(load_transformer(dit_path, dtype, "cuda"), images=2)
        model = load_transformer(dit_path, dtype)
        stream = stream_model(model, resident, "cuda", slots=slots, ring=1 << 18)
        for _ in range(3):
            assert torch.equal(draw(model, images=2), want)
        traffic = stream.traffic()
        assert traffic.loads >= 18 * len(stream.streamed)
        assert 0 <= traffic.overlap <= 1
        stream.park()
        assert torch.equal(draw(model, images=2), want)
        unstream(model)
    assert at_home(model)
    assert model.device.type == "cpu"


@pytest.mark.gpu
def test_on_a_gpu_a_text_encoder_streams(encoder_path):
    want = encode(load_text_encoder(encoder_path, torch.bfloat16, "cuda"))
    model = load_text_encoder(encoder_path, torch.bfloat16)
    with stream_model(model, (1,), "cuda", slots=2):
        for _ in range(3):
            assert torch.equal(encode(model), want)


@pytest.mark.gpu
def test_on_a_gpu_a_cut_file_is_an_error(tmp_path):
    path = transformer_file(tmp_path)
    model = load_transformer(path, torch.bfloat16)
    stream = stream_model(model, (), "cuda", slots=2)
    draw(model, steps=1)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(BadFile, match="changed while in use"):
        draw(model, steps=3)
    assert stream.closed

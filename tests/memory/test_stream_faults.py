"""A stream that is interrupted, fails or ends: errors instead of crashes, no thread left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import weakref

import pytest
import torch

from tests.helpers.streamed import TIMEOUT, at_home, draw, our_threads, ringed, transformer_file
from zimage_core.errors import BadArgument, BadFile, Unsupported
from zimage_core.memory.attach import stream_model, unstream
from zimage_core.memory.device import HostBackend, backend_for
from zimage_core.weights.load import load_transformer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


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

    def interrupted():
        interrupt.start()  # in here, so that no pause of the machine lets it go off outside
        draw(dit)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
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
        timeout=120,
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

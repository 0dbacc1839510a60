"""A stream that is interrupted, fails or ends: errors instead of crashes, no thread left behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
import weakref
from contextlib import closing

import pytest
import torch

from tests.helpers.streamed import TIMEOUT, at_home, draw, our_threads, ringed, streamed, transformer_file
from zimage_core.errors import BadArgument, BadFile, Unsupported
from zimage_core.memory.attach import unstream
from zimage_core.memory.device import Device, device_for
from zimage_core.weights.load import load_transformer

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_a_run_broken_off_anywhere_leaves_a_stream_that_works(dit, wanted):
    stream = streamed(dit, (2,), **ringed(slots=2))
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
    stream = streamed(dit, (), **ringed(slots=2))
    stuck, real = threading.Event(), os.preadv

    def preadv(*arguments):
        stuck.wait(TIMEOUT)
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
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


def test_ctrl_c_while_the_thread_is_started(dit, wanted, monkeypatch):
    streamed(dit, (), slots=2)
    real = threading.Thread.start

    def start(thread):
        if thread.name.startswith("zimage-stream"):
            raise KeyboardInterrupt
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        draw(dit)
    monkeypatch.undo()
    assert torch.equal(draw(dit, images=2), wanted)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_block_that_was_never_released_is_taken_back(dit, wanted, slots):
    """As if an interrupt came between the stream and the block, after any number of blocks."""
    stream = streamed(dit, (), slots=slots)
    for index in (4, 1, 1):
        left = stream._acquire(index)
    assert stream._held is left
    assert torch.equal(draw(dit, images=2), wanted)
    with stream.block(2):
        left = stream._acquire(3)
    assert stream._held is left, "it is not the block that ends"
    stream.close()
    assert at_home(dit)


def test_a_thread_that_waits_gets_its_turn_after_an_interrupt(dit, single):
    """The thread that was interrupted gives its block up when it asks for the next one."""
    stream = streamed(dit, (), slots=2)
    stream._acquire(3)
    results = []
    other = threading.Thread(target=lambda: results.append(draw(dit)))
    other.start()
    assert torch.equal(draw(dit), single)
    other.join(TIMEOUT)
    assert torch.equal(results[0], single)


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("change", ["cut", "grown", "touched"])
def test_a_file_that_changes_meanwhile_is_an_error_with_its_name(tmp_path, change, staged):
    path = transformer_file(tmp_path)
    model = load_transformer(path)
    stream = streamed(model, (), slots=2, through=Device(staged))
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
    with closing(streamed(model, (), slots=2)):
        other = tmp_path / "new"
        other.write_bytes(b"something else")
        other.replace(path)
        assert torch.equal(draw(model), want)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_a_read_error_surfaces_where_the_block_is_asked_for(dit, monkeypatch, code):
    stream = streamed(dit, (), **ringed(slots=2))
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
    with closing(streamed(dit, ())):
        draw(dit)


def test_a_fault_that_is_no_read_error_surfaces_as_it_is(dit):
    device = Device(staged=True)
    stream = streamed(dit, (), through=device, slots=2)
    device.copy = lambda host, slot: (_ for _ in ()).throw(RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        draw(dit)
    assert stream.closed


def test_no_memory_leaves_nothing_behind(dit, single):
    device = Device(staged=True)
    for enough in range(2):
        left = [enough]

        def memory(nbytes, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError
            return Device.memory(device, nbytes)

        device.memory = memory
        with pytest.raises(MemoryError):
            streamed(dit, (), through=device, slots=2)
        assert at_home(dit)
        assert torch.equal(draw(dit), single)
    del device.memory  # there is enough now
    with closing(streamed(dit, (), through=device, slots=2)):
        assert torch.equal(draw(dit), single)


def test_after_the_end_it_says_so(dit, wanted):
    stream = streamed(dit, (), slots=2)
    assert torch.equal(draw(dit, images=2), wanted)
    assert len(our_threads()) == 1
    stream.close()
    stream.close()
    assert not our_threads()
    assert not stream._slots
    assert not stream._views
    with pytest.raises(BadArgument, match="it was closed"):
        draw(dit)
    assert stream.traffic().loads > 0
    assert at_home(dit)


def test_closed_in_the_middle_by_another_thread(dit):
    stream = streamed(dit, (), **ringed(slots=2))
    closer = threading.Timer(0.05, stream.close)
    closer.start()
    with pytest.raises(BadArgument, match="it was closed"):
        draw(dit, steps=10_000)
    closer.join()
    assert at_home(dit)


def test_a_forgotten_stream_ends_its_threads(dit_path):
    model = load_transformer(dit_path)
    stream = weakref.ref(streamed(model, (), **ringed()))
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
        "import sys, torch\nfrom tests.helpers.streamed import draw, streamed\n"
        "from zimage_core.memory.attach import stream_model\n"
        "from zimage_core.weights.load import load_transformer\n"
        "model = load_transformer(sys.argv[1]); streamed(model); draw(model); print('done')\n"
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
    for options, words in (({"slots": 0}, "wanted 1 slot or more"), ({"ring": 0}, "wanted 1 byte or more")):
        with pytest.raises(BadArgument, match=words):
            streamed(dit, **options)
    with pytest.raises(BadArgument, match="resident names block 7, blocks are 0 to 6"):
        streamed(dit, (7,))
    with pytest.raises(Unsupported, match="cannot be streamed to meta"):
        device_for("meta")
    streamed(dit)
    with pytest.raises(BadArgument, match="streamed already"):
        streamed(dit)


@pytest.mark.gpu
def test_on_a_gpu_a_cut_file_is_an_error(tmp_path):
    path = transformer_file(tmp_path)
    model = load_transformer(path, torch.bfloat16)
    stream = streamed(model, (), "cuda", slots=2)
    draw(model, steps=1)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(BadFile, match="changed while in use"):
        draw(model, steps=3)
    assert stream.closed

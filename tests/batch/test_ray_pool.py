"""What is settled before a worker of Ray starts: package, address, device, number of workers."""

from __future__ import annotations

import socket
import sys
import threading
from dataclasses import replace

import pytest

from zimage_core.batch.model import Model
from zimage_core.batch.ray import GREETING, Pool, _check_address, _resources
from zimage_core.batch.worker import Spec
from zimage_core.errors import BadArgument, Unsupported

ROWS = [{"prompt": "a red circle", "seed": 1}]


@pytest.fixture
def server():
    """A server on this machine that answers each client with what is put into the list."""
    answers: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            while answers:
                client, _ = listening.accept()
                with client:
                    client.recv(len(GREETING))
                    client.sendall(answers.pop())

        thread = threading.Thread(target=serve, daemon=True)
        yield f"127.0.0.1:{listening.getsockname()[1]}", answers, thread
        thread.join(60)


def test_a_missing_ray_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Unsupported, match=r"^Ray is not installed; pip install zimage-core\[ray\]$"):
        list(Pool(Spec()).results([]))


def test_an_address_that_nobody_answers_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(BadArgument, match=f"^no Ray at 127.0.0.1:{port}: connection refused$"):
        _check_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b""])
def test_another_program_at_the_address_is_told_from_ray(server, answer):
    address, answers, thread = server
    answers.append(answer)
    thread.start()
    with pytest.raises(BadArgument, match="another program"):
        _check_address(address)


def test_settings_of_http2_are_taken_for_grpc(server):
    address, answers, thread = server
    answers.append(b"\0\0\0\4\0\0\0\0\0")
    thread.start()
    _check_address(address)


@pytest.mark.parametrize(
    "address", ["here", "host:", ":6379", "host:port", "host:99999", "ray://host:10001", ""]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(BadArgument, match="HOST:PORT"):
        _check_address(address)


def test_one_gpu_of_several_cannot_be_asked_for():
    with pytest.raises(BadArgument, match="Ray chooses the GPU"), Pool(Spec(Model(device="cuda:1"))):
        pass


def test_there_are_as_many_workers_as_nodes_have_room_for():
    nodes = [{"CPU": 5.0}, {"CPU": 3.0, "GPU": 2.0}, {"CPU": 1.0}]
    spec = Spec(Model(device="cpu"), threads=2)
    assert _resources(spec, nodes, None) == ({"num_cpus": 2}, 3)
    assert _resources(replace(spec, threads=1), nodes, 4) == ({"num_cpus": 1}, 4)
    assert _resources(Spec(Model(device="cuda")), nodes, None) == ({"num_gpus": 1, "num_cpus": 0}, 2)


@pytest.mark.parametrize(("device", "text"), [("cpu", "has 8 CPUs"), ("cuda", "has a GPU")])
def test_a_cluster_without_room_is_an_error_unless_workers_are_given(device, text):
    spec, nodes = Spec(Model(device=device), threads=8), [{"CPU": 4.0}] * 4
    with pytest.raises(BadArgument, match=text):
        _resources(spec, nodes, None)
    assert _resources(spec, nodes, 1)[1] == 1

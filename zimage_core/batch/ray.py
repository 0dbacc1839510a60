"""Workers on Ray: an actor a GPU, or a number of CPUs, called by Ray Data.

Rows go out in windows of `WINDOW` rows a worker, a row a task. Results come back to the process that asked,
in the order in which they are finished. Ray Data starts no task whose result would find no room in the object
store, so a slow writer slows the actors down.

An actor whose process ends is started again, and its row is drawn again there, `TRIES` times in all. Rows
that are lost even so are drawn once more at the end of the window, one at a time for each actor; a row that
is lost again is a `Failed`, and the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from zimage_core import __version__
from zimage_core.batch.model import Model
from zimage_core.batch.worker import Done, Failed, Row, Spec, Worker
from zimage_core.errors import BadArgument, DeviceFault, Unsupported, ZImageError, printable

WINDOW = 1000
"""Rows a worker that Ray is given at once: each is an object of Ray, which costs this process 4 KB and 1 ms.
The actors are started anew for each window."""
TRIES = 3
"""How often a row is drawn whose actor ends meanwhile."""
MOST_LOST = 20
"""Rows of a window that may be lost in that way; with more, something is wrong with all of them."""
LOST = f"its worker ended {TRIES} times while it drew this row; it may need more memory than there is"
TIMEOUT = 5.0
"""Seconds to wait for an address to answer."""
STORE = 512 << 20
"""Bytes of shared memory for results on a local Ray."""
LOCAL = "local"
"""Ray's own word for a Ray of this process."""
QUIET = {
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # its messages of workers that end, from standard output
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ lines, from standard error, but for one that says so
    "RAY_USAGE_STATS_ENABLED": "0",  # its reports of its use to its makers
}
"""What Ray is told to leave out; it reads this when it is imported and started."""
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How a client of HTTP/2, and so of gRPC, begins: RFC 9113, section 3.4, with empty settings."""


class Pool:
    """Draws rows on Ray; a context manager, which decides the device and leaves Ray at its end.

    Args:
        spec: What a worker has to know; a device "auto" is a GPU for each worker if there are any, else CPUs.
        address: "HOST:PORT" of a cluster, "auto" for the one on this machine, True for RAY_ADDRESS if it is
            set, else for a Ray that is started here and stopped at the end. A Ray that this process is
            connected to already is used and left as it is.
        workers: Number of actors; None for as many as the cluster has GPUs, or CPUs over `spec.threads`.

    Raises:
        Unsupported: Ray is not installed.
        BadArgument: Nothing answers at the address, or the cluster has no room for a worker.
    """

    def __init__(self, spec: Spec, address: str | bool = True, workers: int | None = None) -> None:
        self.spec = spec
        self.address = (os.environ.get("RAY_ADDRESS") or LOCAL) if address is True else str(address)
        self.workers = workers
        self._exits = contextlib.ExitStack()
        self._connected = False

    def __enter__(self) -> Pool:
        try:
            self.spec = replace(self.spec, model=self._placed(self.spec.model))
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def results(self, rows: Sequence[Row]) -> Iterator[Done | Failed]:
        """Draw the rows; each gives one result, in the order in which they are finished.

        The files that rows and the model name lie at the same paths on every node.

        Raises:
            ZImageError: A worker cannot load the model, or Ray gave up.
        """
        self._connect()
        resources, workers = _resources(self.spec, _nodes(), self.workers)
        for start in range(0, len(rows), WINDOW * workers):
            window = rows[start : start + WINDOW * workers]
            waiting = {row.number: row for row in window}
            # a second task waits at each worker, since Ray takes 0.1 s to send one; where a row ends its
            # worker, the one behind it loses a try too, so that lost rows are drawn again one at a time
            for tasks in (2, 1):
                rest = list(waiting.values())
                for result in _drawn(self.spec, rest, resources, workers, tasks) if rest else ():
                    if waiting.pop(result.row.number, None) is not None:
                        yield result
            for row in waiting.values():
                yield Failed(row, LOST)

    def _placed(self, model: Model) -> Model:
        """The same model with its device decided."""
        device = model.device
        if device not in ("auto", "cpu", "cuda"):
            raise BadArgument(f"device {printable(device)}: Ray chooses the GPU of each worker; give cuda")
        if device == "auto":
            if self.address == LOCAL:  # it has what this process has, and starts when it is needed
                device = model.placed().device.partition(":")[0]
            else:
                self._connect()
                device = "cuda" if any(node.get("GPU", 0) >= 1 for node in _nodes()) else "cpu"
        unlimited = device == "cuda" and model.vram is None and model.ram is None
        return replace(model, device=device, vram="auto" if unlimited else model.vram)

    def _connect(self) -> None:
        if not self._connected:
            _connect(self.address, self._exits)
            self._connected = True


def _drawn(
    spec: Spec, window: Sequence[Row], resources: Mapping[str, Any], workers: int, tasks: int
) -> Iterator[Done | Failed]:
    """The results of Ray Data, with so many tasks at each worker, without the rows that were lost."""
    from ray import data

    with warnings.catch_warnings(), contextlib.ExitStack() as exits:
        # Ray warns of names of its own settings, and of the argument for retries, which has no other name
        warnings.simplefilter("ignore")
        context = data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.max_errored_blocks = MOST_LOST * tasks
        context.max_consecutive_actor_init_deaths = TRIES
        exits.enter_context(data.DataContext.current(context))
        results = data.from_items(
            [{"row": row} for row in window], override_num_blocks=len(window)
        ).map_batches(
            Actor,
            fn_constructor_args=(spec, __version__, socket.gethostname()),
            batch_size=1,
            batch_format="numpy",
            compute=data.ActorPoolStrategy(
                size=min(workers, len(window)), max_tasks_in_flight_per_actor=tasks
            ),
            max_restarts=-1,
            max_task_retries=TRIES - 1,
            **resources,
        )
        batches = iter(results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # noqa: BLE001  whatever Ray raises ends the run with one sentence
            text = f"Ray gave up: {_sentence(error)}; start again to draw what is missing"
            raise ZImageError(text) from None
        if batch is None:
            return
        for result in batch["result"]:
            if isinstance(result, str):
                raise ZImageError(result)
            yield result


class Actor:
    """What Ray runs in each of its processes: a worker, and what it could not do as a sentence.

    Args:
        spec: Description of the worker.
        version: Version of this package in the process that asked.
        asked: Name of that process's machine.
    """

    def __init__(self, spec: Spec, version: str, asked: str) -> None:
        name = socket.gethostname()
        self.node = "" if name == asked else f"node {name}: "
        self.fault = ""
        if version != __version__:
            self.fault = f"node {name} has zimage-core {__version__}, wanted {version}; install that there"
            return
        try:
            self.worker = Worker(spec)
        except ZImageError as error:
            self.fault = f"{self.node}{error}"

    def __call__(self, batch: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
        """A column `row` of rows -> a column `result`: `Done`, `Failed`, or a sentence that ends the run."""
        import numpy as np

        results = np.empty(len(batch["row"]), object)
        results[:] = [self._result(row) for row in batch["row"]]
        return {"result": results}

    def _result(self, row: Row) -> Done | Failed | str:
        if self.fault:
            return self.fault
        try:
            result = self.worker(row)
        except DeviceFault:
            os.kill(os.getpid(), signal.SIGKILL)  # only another process can use the GPU again; Ray starts it
            raise
        except ZImageError as error:
            return f"{self.node}{error}"
        if isinstance(result, Failed) and self.node:
            return replace(result, reason=f"{self.node}{result.reason}")
        return result


def _connect(address: str, exits: contextlib.ExitStack) -> None:
    """Connect to Ray, or start one; `exits` gets what undoes it."""
    if address not in (LOCAL, "auto"):
        _check_address(address)
    with _environment(QUIET):
        try:
            import pyarrow  # noqa: F401
            import ray.data
        except ImportError:
            raise Unsupported("Ray is not installed; pip install zimage-core[ray]") from None
        exits.enter_context(_quiet_loggers())
        if ray.is_initialized():
            return
        exits.callback(ray.shutdown)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if address == LOCAL:
            options |= {"include_dashboard": False, "object_store_memory": STORE}
            options["_node_ip_address"] = "127.0.0.1"
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with _no_stderr():
                ray.init(address, **options)
        except ConnectionError:
            raise BadArgument("no Ray runs on this machine; `ray start --head` starts one") from None
        except Exception as error:  # noqa: BLE001  whatever Ray raises ends the run with one sentence
            raise BadArgument(f"no Ray at {printable(address)}: {_sentence(error)}") from None
        finally:
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGTERM, handler)  # Ray has put its own there


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Keep Ray's loggers out of the terminal; its log files stay in /tmp/ray."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_address(address: str) -> None:
    """Refuse an address where nothing speaks gRPC: Ray would try for two minutes, then end this process."""
    name = printable(address)
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise BadArgument(f"{name}: Ray Data needs a driver inside the cluster; give HOST:PORT or auto there")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadArgument(f"{name}: no address of Ray; HOST:PORT such as 10.0.0.5:6379, or auto, was wanted")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.settimeout(TIMEOUT)
            connection.sendall(GREETING)
            answer = connection.recv(9)
    except OSError as error:
        reason = (error.strerror or "no answer").lower()
        raise BadArgument(f"no Ray at {name}: {printable(reason)}") from None
    if answer[3:4] != GREETING[-6:-5]:
        raise BadArgument(f"no Ray at {name}: what answers there is another program")


def _nodes() -> list[Mapping[str, float]]:
    """Resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _resources(
    spec: Spec, nodes: Sequence[Mapping[str, float]], workers: int | None
) -> tuple[dict[str, Any], int]:
    """What an actor asks of Ray, and how many there are."""
    if spec.model.device == "cpu":
        resources, wanted = {"num_cpus": spec.threads}, f"{spec.threads} CPUs"
        room = sum(int(node.get("CPU", 0) // spec.threads) for node in nodes)
    else:
        resources, wanted = {"num_gpus": 1, "num_cpus": 0}, "a GPU"
        room = sum(int(node.get("GPU", 0)) for node in nodes)
    if workers is None and not room:
        raise BadArgument(
            f"no node of Ray has {wanted} for a worker; give fewer threads, another device, or a number of "
            "workers, to wait for such a node"
        )
    return resources, workers or room


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that the user has not set, for a while."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what this process writes to standard error, past Python too."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _sentence(error: BaseException) -> str:
    """The last line of what Ray says, which names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1] if lines else type(error).__name__, 300)

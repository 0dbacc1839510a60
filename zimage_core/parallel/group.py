"""Ranks that make one image together: how they exchange tensors, agree, and learn that one of them failed.

Tensors go through torch.distributed: gloo between CPUs, NCCL between GPUs. Everything else goes through the
key-value store of its process group, which costs a few round trips a step: what each rank says of itself
(`Link.agree`), and the reason of the first rank that failed. No wait is without a limit. Where another rank
ended, hangs or raised an error, every rank raises `RankFailed` within the limit, with the number of that rank
and its reason.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from zimage_core.errors import BadArgument, RankFailed, Unsupported, printable
from zimage_core.parallel.store import LimitedStore

TIMEOUT = 60.0
"""Seconds that a rank waits for the others, where `timeout` and ZIMAGE_RANK_TIMEOUT do not say."""
VARIABLE = "ZIMAGE_RANK_TIMEOUT"
"""Environment variable: seconds that a rank waits for the others during a run; default 60."""
FIRST = 10
"""How many times longer ranks wait for each other at the start of a run: they load at different speeds."""
ANSWER = 3.0
"""Seconds in which a rank that still runs says so, after an exchange failed, where several are missing."""
STORE_LOST = (
    "the process that holds the store of the process group, rank 0 or torchrun, ended or does not answer; "
    "start all ranks anew"
)


def read_timeout(timeout: float | None) -> float:
    """The limit of a wait in seconds: the argument, else ZIMAGE_RANK_TIMEOUT, else 60.

    Raises:
        BadArgument: It is no number above 0.
    """
    own = timeout is None
    value: Any = os.environ.get(VARIABLE) or TIMEOUT if own else timeout
    with suppress(TypeError, ValueError):
        if not isinstance(value, bool) and 0 < float(value) <= 1e6:
            return float(value)
    name = VARIABLE if own else "timeout"
    raise BadArgument(f"{name}: got {printable(repr(value), 60)}, wanted seconds above 0")


def device_of_rank() -> torch.device:
    """The GPU of this rank, which is that of its number on this machine (LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = _number("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else 0
    count = torch.cuda.device_count()
    if number >= count:
        raise Unsupported(
            f"rank {os.environ.get('RANK', number)}: this machine has {count} GPU(s) and each rank takes "
            "one; start as many ranks as there are GPUs"
        )
    return torch.device("cuda", number)


def _number(name: str, least: int, most: int = 10**6) -> int:
    """A whole number of the environment.

    Raises:
        BadArgument: It is another text, or out of range.
    """
    text = os.environ[name]
    if not (text.isdecimal() and len(text) < 8 and least <= int(text) <= most):
        raise BadArgument(
            f"{name}: got {printable(repr(text), 40)}, wanted a whole number from {least} to {most}, as "
            "torchrun sets it"
        )
    return int(text)


def join_world(timeout: float | None = None) -> None:
    """Join the default process group that torchrun's variables describe, if there is none yet.

    These are RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises:
        RankFailed: The others did not come within ten times the limit.
        Unsupported: torch was built without torch.distributed.
        BadArgument: The environment has no such variables, or wrong ones.
    """
    if not dist.is_available():
        raise Unsupported("parallel: this torch was built without torch.distributed; install another one")
    if dist.is_initialized():
        return
    seconds = read_timeout(timeout)
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in os.environ]:
        raise BadArgument(
            f"parallelize: no process group, and {' and '.join(missing)} not in the environment; start "
            "the program with torchrun --nproc-per-node N, or call torch.distributed.init_process_group first"
        )
    size = _number("WORLD_SIZE", 1)
    _number("RANK", 0, size - 1)
    _number("MASTER_PORT", 0, 65535)
    # without it a GPU that waits for a lost rank ends its process by SIGABRT, or never
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=FIRST * seconds))
    except (RuntimeError, ValueError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise RankFailed(
            f"rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} ranks of this job did not find each "
            f"other ({reason}); see whether all of them started"
        ) from None


class Link:
    """What ranks tell each other besides tensors, through the store of the default process group.

    Args:
        ranks: Their numbers in the world, rising.
        timeout: Seconds to wait for the others during a run.
        number: How many links these ranks had before; the same on each of them.
    """

    def __init__(self, ranks: Sequence[int], timeout: float, number: int = 0) -> None:
        self.ranks, self.timeout, self.number = tuple(ranks), timeout, number
        self.rank = dist.get_rank()
        name = f"zimage/{'-'.join(map(str, self.ranks))}/{number}"
        self._store = LimitedStore(_get_default_store(), name, timeout)
        self._round = 0
        self._groups: list[Any] = []
        self._process = os.getpid()

    def agree(self, message: str = "", first: bool = False) -> list[str]:
        """What each rank says at this point of the program, in the order of the ranks.

        Args:
            message: What this rank says.
            first: Whether a run begins here, for which the others may still be loading.

        Raises:
            RankFailed: A rank failed, or does not come to this point within the limit.
        """
        self.check()
        limit = self.timeout * (FIRST if first else 1)
        keys = [f"round/{self._round}/{rank}" for rank in self.ranks]
        try:
            self._store.set(f"round/{self._round}/{self.rank}", message)
            if missing := self._missing(keys, limit):
                raise self._failed(missing, f"did not come within {limit:g} s")
            said = self._store.all(keys)
            if self._round:  # all ranks have read the round before the one that they have just written
                self._store.delete(f"round/{self._round - 1}/{self.rank}")
        except RuntimeError:
            raise RankFailed(self.failure() or STORE_LOST) from None
        self._round += 1
        return said

    def _missing(self, keys: Sequence[str], limit: float, fewest: int = 0) -> list[int]:
        """Wait for the key of each rank; the ranks whose keys are still missing after the limit.

        Args:
            keys: A key of each rank.
            limit: Seconds.
            fewest: Number of missing ranks at which the wait ends.

        Raises:
            RankFailed: A rank has said that it failed.
        """
        end, pause = time.monotonic() + limit, 1e-4
        while not self._store.check(*keys):
            self.check()
            missing = [r for r, key in zip(self.ranks, keys, strict=True) if not self._store.check(key)]
            if len(missing) <= fewest or time.monotonic() > end:
                return missing
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return []

    def check(self) -> None:
        """Refuse to go on where a rank has failed before.

        Raises:
            RankFailed: One has.
            Unsupported: This process is a fork of the one that joined the group.
        """
        if os.getpid() != self._process:
            raise Unsupported(
                "parallel: this process was forked from a rank; only that one can run with others"
            )
        reason = self.failure()
        if reason is not None:
            raise RankFailed(reason)

    def failure(self) -> str | None:
        """Why these ranks cannot work together any more; None while they can."""
        try:
            return self._store.get("failed") if self._store.check("failed") else None
        except RuntimeError:
            return STORE_LOST

    def fail(self, reason: str) -> None:
        """Tell the other ranks that this one failed, so that they raise `RankFailed` and do not wait."""
        self._post(f"rank {self.rank} failed: {reason}")

    def note(self, what: str) -> bool:
        """Note something for all ranks; whether this rank is the first that did."""
        try:
            return self._store.first(f"note/{what}", str(self.rank)) == str(self.rank)
        except RuntimeError:
            return True

    def noted(self, what: str) -> bool:
        """Whether some rank noted it."""
        try:
            return self._store.check(f"note/{what}")
        except RuntimeError:
            return False

    def _post(self, reason: str) -> str:
        """Make this the reason of all ranks, unless there is one already; the reason that counts then."""
        try:
            reason = self._store.first("failed", reason)
        except RuntimeError:
            reason = STORE_LOST
        for group in self._groups:  # wakes those who wait for a tensor
            group.abort()
        self._groups.clear()
        return reason

    def lost(self, error: RuntimeError) -> RankFailed:
        """The error to raise after an exchange of tensors failed with `error`."""
        text = str(error).lower()
        slow = "timed out" in text or "timeout" in text
        try:
            self._store.set(f"here/{self.rank}", "")
            missing = self._missing([f"here/{rank}" for rank in self.ranks], ANSWER, fewest=1)
        except RankFailed as failed:
            return RankFailed(self._post(str(failed)))
        except RuntimeError:
            return RankFailed(self._post(STORE_LOST))
        what = f"does not answer for {self.timeout:g} s" if slow else "ended, or its connection broke"
        return self._failed(missing, what if missing else printable(text.partition("\n")[0]))

    def _failed(self, missing: Sequence[int], what: str) -> RankFailed:
        who = " and ".join(f"rank {rank}" for rank in missing) or "the exchange between the ranks"
        return RankFailed(self._post(f"{who} {what}; see what became of it, then start all ranks anew"))

    def process_group(self, ranks: Sequence[int]) -> Any:
        """A process group of some of these ranks, with the limit as its timeout; None for one rank alone."""
        if len(ranks) == 1:
            return None
        try:
            group = dist.new_group(
                list(ranks), timeout=timedelta(seconds=self.timeout), use_local_synchronization=True
            )
        except RuntimeError as error:
            raise self.lost(error) from None
        self._groups.append(group)
        return group


_links: dict[tuple[int, ...], Link] = {}
"""The latest link of these ranks in this process."""


def link_of(ranks: Sequence[int], timeout: float) -> Link:
    """The link between these ranks: the one that they have, or a new one where it failed."""
    key = tuple(ranks)
    old = _links.get(key)
    if old is None or old.failure() is not None:
        _links[key] = Link(key, timeout, 0 if old is None else old.number + 1)
    _links[key].timeout = timeout
    return _links[key]


class Group:
    """Some ranks that exchange tensors; every method is called by all of them, in the same order.

    Args:
        link: What all ranks of the run share.
        ranks: The numbers of these ranks in the world.
        device: Where the tensors of this rank are: its GPU, for NCCL, or the CPU, for gloo.
    """

    def __init__(self, link: Link, ranks: Sequence[int], device: torch.device) -> None:
        self.link, self.ranks, self.device = link, tuple(ranks), device
        self.rank, self.size = self.ranks.index(link.rank), len(self.ranks)
        self._group = link.process_group(self.ranks)

    def __repr__(self) -> str:
        return f"Group(rank {self.rank} of {self.size} on {self.device})"

    def exchange(self, x: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Send rows to each rank and receive rows from each.

        Args:
            x: Rows for rank 0, then those for rank 1, and so on, of any dtype.
            sends: Number of rows for each rank.
            receives: Number of rows from each rank; what that rank sends to this one.

        Shape:
            x [sum(sends), ...] -> [sum(receives), ...], contiguous.

        Raises:
            RankFailed: Another rank failed, ended or does not answer.
        """
        out = x.new_empty((sum(receives), *x.shape[1:]))
        if self._group is None:
            return out.copy_(x)
        try:
            # bytes, since gloo does not know every dtype
            dist.all_to_all_single(
                _bytes(out), _bytes(x.contiguous()), list(receives), list(sends), group=self._group
            )
        except RuntimeError as error:
            raise self.link.lost(error) from None
        return out

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, one rank after the other.

        Args:
            x: The rows of this rank.
            counts: Number of rows of each rank.

        Shape:
            x [counts[rank], ...] -> [sum(counts), ...].

        Raises:
            RankFailed: Another rank failed, ended or does not answer.
        """
        return self.exchange(x.repeat(self.size, *(1 for _ in x.shape[1:])), [len(x)] * self.size, counts)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite x on every rank with that of rank `source` of this group, and return it.

        Raises:
            RankFailed: Another rank failed, ended or does not answer.
        """
        if self._group is not None:
            flat = _bytes(x.contiguous().view(1, -1))
            try:
                dist.broadcast(flat, self.ranks[source], group=self._group)
            except RuntimeError as error:
                raise self.link.lost(error) from None
            x.copy_(flat.view(x.dtype).view(x.shape))
        return x

    def barrier(self) -> None:
        """Wait until all ranks of this group are here.

        Raises:
            RankFailed: Another rank failed, ended or does not answer.
        """
        self.gather(torch.zeros(1, 1, dtype=torch.uint8, device=self.device), [1] * self.size)


def _bytes(x: Tensor) -> Tensor:
    """x [rows, ...], contiguous, as bytes [rows, bytes of a row]: a view."""
    return x.view(len(x), x[:1].numel() if len(x) else 0).view(torch.uint8)

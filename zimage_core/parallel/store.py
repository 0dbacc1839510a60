"""The key-value store of a process group, where no call waits for ever.

torch's TCPStore is a server inside one rank, or inside torchrun. Its calls have no limit of their own: where
the server's process is stopped they would hang with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

Answer = TypeVar("Answer")
MOST = 10.0
"""Most seconds that the store may take for one answer, which usually comes within a millisecond."""


class LimitedStore:
    """Texts by key, shared by ranks; a thread of its own asks the store, and is left alone where that hangs.

    Every method raises RuntimeError where the store is lost or does not answer.

    Args:
        store: The store.
        name: What its keys begin with.
        limit: Seconds to wait for an answer, if less than `MOST`.
    """

    def __init__(self, store: Store, name: str, limit: float) -> None:
        self._store, self._limit = PrefixStore(name, store), min(limit, MOST)
        self._calls: SimpleQueue[tuple[Callable[[], Any], list[Any], threading.Event]] = SimpleQueue()
        self._lost = False
        threading.Thread(target=self._serve, name="zimage-store", daemon=True).start()

    def set(self, key: str, text: str) -> None:
        """Keep a text under a key."""
        self._ask(lambda: self._store.set(key, text))

    def get(self, key: str) -> str:
        """The text of a key that is there."""
        return self._ask(lambda: self._store.get(key)).decode()

    def check(self, *keys: str) -> bool:
        """Whether all these keys are there."""
        return self._ask(lambda: self._store.check(list(keys)))

    def first(self, key: str, text: str) -> str:
        """Keep a text under a key unless it has one; what it has then."""
        return self._ask(lambda: self._store.compare_set(key, "", text)).decode()

    def delete(self, key: str) -> None:
        """Remove a key."""
        self._ask(lambda: self._store.delete_key(key))

    def all(self, keys: Sequence[str]) -> list[str]:
        """The texts of keys that are there."""
        return [text.decode() for text in self._ask(lambda: self._store.multi_get(list(keys)))]

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        answer: list[Any] = []
        done = threading.Event()
        if not self._lost:
            self._calls.put((call, answer, done))
        if self._lost or not done.wait(self._limit):
            self._lost = True
            raise RuntimeError("the store does not answer")
        if isinstance(answer[0], Exception):
            self._lost = True
            raise RuntimeError(f"the store is lost: {answer[0]}") from None
        return answer[0]  # type: ignore[no-any-return]

    def _serve(self) -> None:
        while True:
            call, answer, done = self._calls.get()
            try:
                answer.append(call())
            except Exception as error:  # noqa: BLE001  it is raised where the call was made
                answer.append(error)
            done.set()
            del call, answer, done  # or the last call would live as long as the wait for the next

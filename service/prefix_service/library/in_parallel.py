"""One computation for all callers that ask for the same thing in parallel."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class _Computation(Generic[V]):
    task: asyncio.Task[V]
    waiting: int = 0


class InParallel(Generic[K, V]):
    """Runs each computation once, however many callers ask for it in parallel, and cancels it if no caller waits for it
    any more. It keeps no results. Used from one event loop.
    """

    def __init__(self) -> None:
        self._running: dict[K, _Computation[V]] = {}

    async def result(self, key: K, compute: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """Returns the result of the running computation with this key, or of `compute`, which is begun otherwise.

        Raises what the computation raises.
        """
        if (computation := self._running.get(key)) is None:
            task = asyncio.create_task(compute())
            computation = self._running[key] = _Computation(task)
            task.add_done_callback(lambda _: self._forget(key, computation))
        computation.waiting += 1
        try:
            return await asyncio.shield(computation.task)
        finally:
            computation.waiting -= 1
            if not computation.waiting:
                self._forget(key, computation)
                computation.task.cancel()

    def _forget(self, key: K, computation: _Computation[V]) -> None:
        if self._running.get(key) is computation:
            del self._running[key]

"""Finds the version that a reference means, by memory or by asking the service, tenant after tenant."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Final

from prefix_service.client.vllm.background import all_of
from prefix_service.client.vllm.base_model import BaseModel
from prefix_service.client.vllm.composition import Composition, Version
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.requests import References
from prefix_service.client.vllm.source import Source
from prefix_service.client.vllm.turns import Share, Turns
from prefix_service.errors import ConnectionFailed, CorruptBlob, PrefixServiceError, Unavailable
from prefix_service.prefix.references import parse_qualified
from prefix_service.system.bounded import put_last

_QUESTIONS: Final = 32  # in parallel
_FRESH: Final = 1.0  # seconds in which an alias is not asked for again
_PATIENCE: Final = 1.0  # seconds that a request waits for the service if the version of its adapter is remembered
_MOST_REMEMBERED: Final = 10_000


class _Memory:
    """The versions that references mean, each with the moment of `time.monotonic` until which that is certain; safe to
    share between threads. The least recently used of more than 10,000 is forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[Version, float]] = {}

    def get(self, reference: str) -> tuple[Version, float] | None:
        """Returns a remembered version and its moment; None if the reference is not remembered."""
        with self._lock:
            if (found := self._entries.get(reference)) is not None:
                put_last(self._entries, reference, found, _MOST_REMEMBERED)
            return found

    def put(self, reference: str, version: Version, until: float) -> None:
        """Remembers the version that a reference means."""
        with self._lock:
            put_last(self._entries, reference, (version, until), _MOST_REMEMBERED)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()


@dataclass(slots=True)
class _Question:
    """A question to the service, and how many callers wait for its answer."""

    task: "asyncio.Task[Version]"
    waiting: int = 0


class Resolver:
    """Asks on one event loop, once for all who wait for the same reference; `recall` may be called from any thread.

    A tenant whose questions the service does not answer (it is away, or the tenant above its rate) holds up its own
    requests alone, and of these only the ones whose adapter was never resolved.
    """

    def __init__(self, source: Source, model: Model, base_model: BaseModel) -> None:
        self._source, self._model, self._base_model, self._memory = source, model, base_model, _Memory()
        self._questions: dict[str, _Question] = {}
        self._slots, self._turns = Share(_QUESTIONS), Turns[tuple[str, asyncio.Future[None]]]()
        self._late: dict[str, asyncio.Task[None]] = {}  # of each tenant without an answer, the task that waits for one

    def recall(self, references: References) -> Composition | None:
        """Returns the versions of references if they are certain: a version's number or digest was resolved before, an
        alias within the last second. While the service does not answer for a tenant, the versions that were resolved
        last count as certain."""
        versions = [self._recall(reference) for reference in references]
        known = tuple(version for version in versions if version is not None)
        return Composition(known) if len(known) == len(versions) else None

    def knows(self, references: References) -> bool:
        """Returns whether one of the references was ever resolved, so that its bytes may be in the workers' memory."""
        return any(self._memory.get(reference) is not None for reference in references)

    async def resolve(self, references: References) -> Composition:
        """Returns the versions of references, by asking the service in parallel if necessary.

        Raises:
            PrefixServiceError: the service reported it, or did not answer before the client's deadline.
            DimensionMismatch: a version is one for another model.
            BaseModelMismatch: the same by its fingerprint, if that is refused.
        """
        return Composition(tuple(await all_of(self._resolve(reference) for reference in references)))

    def _recall(self, reference: str) -> Version | None:
        found = self._memory.get(reference)
        if found is None:
            return None
        version, until = found
        return version if time.monotonic() < until or version.tenant in self._late else None

    async def _resolve(self, reference: str) -> Version:
        version = self._recall(reference)
        if version is not None:
            return version
        found = self._memory.get(reference)
        try:
            async with asyncio.timeout(_PATIENCE if found else None):
                return await self._answer(reference)
        except (TimeoutError, ConnectionFailed, Unavailable) as error:
            if found is None or isinstance(error, CorruptBlob):
                raise
        tenant = found[0].tenant
        if tenant not in self._late:
            self._late[tenant] = asyncio.create_task(self._await_news(tenant, reference))
        return found[0]

    async def _answer(self, reference: str) -> Version:
        """Returns the answer to a question, which is cancelled when no caller waits for it any more."""
        question = self._questions.get(reference)
        if question is None:
            question = self._questions[reference] = _Question(asyncio.create_task(self._ask(reference)))
        question.waiting += 1
        try:
            return await asyncio.shield(question.task)
        finally:
            question.waiting -= 1
            if not question.waiting:
                question.task.cancel()
                if self._questions.get(reference) is question:
                    del self._questions[reference]

    async def _ask(self, reference: str) -> Version:
        tenant, parsed = parse_qualified(reference)
        try:
            async with asyncio.timeout(self._source.timeout), self._turn_of(tenant):
                found = await self._source.resolve(reference)
        except TimeoutError as error:
            raise Unavailable(
                f"the service did not say within {self._source.timeout} s what {reference} means: questions take "
                "turns, tenant by tenant"
            ) from error
        self._model.check(asdict(found))
        await asyncio.to_thread(self._base_model.check, found)
        version = Version(found.tenant, found.adapter, found.version, found.digest, found.num_virtual_tokens)
        forever = float("inf")
        self._memory.put(reference, version, forever if parsed.immutable else time.monotonic() + _FRESH)
        self._memory.put(version.reference, version, forever)
        return version

    @asynccontextmanager
    async def _turn_of(self, tenant: str) -> AsyncIterator[None]:
        """Waits until the tenant may ask another question; frees its turn at the end of the block."""
        turn = tenant, asyncio.get_running_loop().create_future()
        self._turns.add(tenant, turn)
        self._begin()
        try:
            await turn[1]
            yield
        finally:
            if turn[1].cancelled():
                self._turns.discard(tenant, turn)
            else:
                self._slots.give(tenant, 1)
            self._begin()

    def _begin(self) -> None:
        for tenant, begun in self._turns.take(lambda turn: self._slots.has_room(turn[0], 1)):
            if not begun.done():  # else its request was cancelled, and has not noticed yet
                self._slots.take(tenant, 1)
                begun.set_result(None)

    async def _await_news(self, tenant: str, reference: str) -> None:
        """Asks until the service answers for a tenant, even with an error."""
        try:
            while True:
                if await self._is_answered(reference):
                    return
                await asyncio.sleep(_PATIENCE)
        finally:
            del self._late[tenant]

    async def _is_answered(self, reference: str) -> bool:
        try:
            await self._answer(reference)
        except (ConnectionFailed, Unavailable) as error:
            return isinstance(error, CorruptBlob)
        except PrefixServiceError:
            pass
        return True

    def forget(self) -> None:
        """Forgets every version, so that each is asked for again."""
        self._memory.clear()
        self._source.forget()

    async def close(self) -> None:
        """Cancels every question, and closes the connections."""
        tasks = [*self._late.values(), *(question.task for question in self._questions.values())]
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._source.close()

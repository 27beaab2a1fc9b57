"""Carries out flows: deadlines, retries, and several flows in parallel."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

from prefix_service.client.protocol import Answer, Fetch, Flow, Request, Step, T, Together, Work, require_success
from prefix_service.client.transport.connection import connection_failed
from prefix_service.client.transport.dialling import time_left
from prefix_service.client.transport.fetcher import Fetcher
from prefix_service.client.transport.foreign import AsyncForeign, Foreign
from prefix_service.client.transport.pool import Interrupt
from prefix_service.client.transport.retries import Attempts, named
from prefix_service.client.transport.tracing import traced
from prefix_service.errors import (
    InvalidRequest,
    PrefixServiceError,
)
from prefix_service.system.forks import renew_in_child
from prefix_service.system.spans import carried

_MOST_THREADS: Final = 32

Begun = tuple[Flow[Any], Step]
"""A flow, and the step that it waits for."""


def _begun(flows: Sequence[Flow[Any]]) -> tuple[list[Any], dict[int, Begun]]:
    """Starts flows.

    Returns their results, with the results and errors of flows that need no step; and the others by their index.
    """
    results: list[Any] = [None] * len(flows)
    waiting: dict[int, Begun] = {}
    for index, flow in enumerate(flows):
        try:
            waiting[index] = flow, next(flow)
        except StopIteration as end:
            results[index] = end.value
        except PrefixServiceError as error:
            results[index] = error
    return results, waiting


def _next_step(flow: Flow[Any], result: Any) -> Step:
    """Returns the step that a flow takes next. An error that it finds in an answer carries the id of that request."""
    try:
        return flow.send(result)
    except PrefixServiceError as error:
        if isinstance(result, Answer):
            error.met_by(result.request_id)
        raise


class Transport:
    """Carries out flows in the calling thread.

    It can be shared between threads. `timeout` is a flow's deadline in seconds.
    """

    def __init__(self, way: Fetcher | Foreign, timeout: float) -> None:
        self._way, self._timeout = way, timeout
        self._is_closed = False

    def run(self, flow: Flow[T]) -> T:
        """Carries out a flow; returns its result.

        Raises:
            ConnectionFailed: it was not finished before the deadline.
            InvalidRequest: the client is closed.
            PrefixServiceError: the service reported the error, or the flow raised it.
        """
        try:
            step = next(flow)
        except StopIteration as end:
            result: T = end.value
            return result
        if self._is_closed:
            raise InvalidRequest("this client is closed: make another one")
        return self._finish(flow, step, time.monotonic() + self._timeout)

    def _finish(self, flow: Flow[T], step: Step, until: float) -> T:
        try:
            while True:
                step = _next_step(flow, self._carry_out(step, until))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            flow.close()  # after an error, the flow closes its files

    def _carry_out(self, step: Step, until: float) -> Any:
        if isinstance(step, Work):
            return step.run()
        if isinstance(step, Together):
            return self._together(step, until)
        attempts = Attempts(step, until)
        while True:
            try:
                return self._once(step, until)
            except PrefixServiceError as error:
                if attempts.found_done(error):
                    return Answer(204, {}, bytearray())
                if (pause := attempts.pause_after(named(error, step))) is None:
                    raise
                time.sleep(pause)

    def _once(self, request: Request, until: float) -> Any:
        with traced(request) as sent:
            return self._send(sent, until)

    def _send(self, request: Request, until: float) -> Any:
        if isinstance(self._way, Fetcher):
            return self._way.carry_out(request, until, Interrupt())
        answer = require_success(self._way.send(request, until))
        return request.read(answer) if isinstance(request, Fetch) else answer

    def _together(self, step: Together, until: float) -> list[Any]:
        results, waiting = _begun(step.flows)
        if not waiting:
            return results

        def finish(begun: Begun) -> Any:
            try:
                return self._finish(*begun, until)
            except PrefixServiceError as error:
                return error

        calls = [carried(partial(finish, begun)) for begun in waiting.values()]
        with ThreadPoolExecutor(min(step.at_once, len(waiting)), "prefix-rows") as threads:
            for index, result in zip(waiting, threads.map(lambda call: call(), calls), strict=True):
                results[index] = result
        return results

    def close(self) -> None:
        """Closes every connection."""
        self._is_closed = True
        self._way.close()


class AsyncTransport:
    """Carries out flows on an event loop; work that blocks for long runs in threads."""

    def __init__(self, way: Fetcher | AsyncForeign, timeout: float) -> None:
        self._way, self._timeout = way, timeout
        self._is_closed = False
        self.renew()
        renew_in_child(self)

    def renew(self) -> None:
        """Starts without threads, in a forked child too, where the parent's threads do not run."""
        self._threads = ThreadPoolExecutor(_MOST_THREADS, "prefix-client")

    async def run(self, flow: Flow[T]) -> T:
        """Carries out a flow; returns its result.

        Raises:
            ConnectionFailed: it was not finished before the deadline.
            InvalidRequest: the client is closed.
            PrefixServiceError: the service reported the error, or the flow raised it.
        """
        try:
            step = next(flow)
        except StopIteration as end:
            result: T = end.value
            return result
        if self._is_closed:
            raise InvalidRequest("this client is closed: make another one")
        return await self._finish(flow, step, time.monotonic() + self._timeout)

    async def _finish(self, flow: Flow[T], step: Step, until: float) -> T:
        try:
            while True:
                step = _next_step(flow, await self._carry_out(step, until))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            flow.close()  # after an error, the flow closes its files

    async def _carry_out(self, step: Step, until: float) -> Any:
        if isinstance(step, Work):
            return await self._in_thread(step.run)
        if isinstance(step, Together):
            return await self._together(step, until)
        attempts = Attempts(step, until)
        while True:
            try:
                return await self._once(step, until)
            except PrefixServiceError as error:
                if attempts.found_done(error):
                    return Answer(204, {}, bytearray())
                if (pause := attempts.pause_after(named(error, step))) is None:
                    raise
                await asyncio.sleep(pause)

    async def _once(self, request: Request, until: float) -> Any:
        with traced(request) as sent:
            return await self._send(sent, until)

    async def _send(self, request: Request, until: float) -> Any:
        if isinstance(self._way, AsyncForeign):
            answer = require_success(await self._way.send(request, until))
            return await self._in_thread(partial(request.read, answer)) if isinstance(request, Fetch) else answer
        if not self._way.blocks(request):
            return await self._way.carry_out_on_loop(request, until)
        interrupt = Interrupt()
        try:
            async with asyncio.timeout(time_left(until)):  # which includes the wait for a thread
                return await self._in_thread(partial(self._way.carry_out, request, until, interrupt))
        except TimeoutError as error:
            raise connection_failed(error, self._way.address) from error
        finally:
            interrupt.break_off()

    async def _together(self, step: Together, until: float) -> list[Any]:
        results, waiting = _begun(step.flows)
        turns = asyncio.Semaphore(step.at_once)

        async def finish(index: int, begun: Begun) -> None:
            async with turns:
                try:
                    results[index] = await self._finish(*begun, until)
                except PrefixServiceError as error:
                    results[index] = error

        async with asyncio.TaskGroup() as group:
            for index, begun in waiting.items():
                group.create_task(finish(index, begun))
        return results

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Closes every connection."""
        self._is_closed = True
        if isinstance(self._way, AsyncForeign):
            await self._way.close()
        else:
            self._way.close()
        self._threads.shutdown(wait=False)

"""The first byte of an answer, from whichever of two addresses sends it first."""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from inspect import GEN_CLOSED, getgeneratorstate
from typing import Final, Protocol, TypeVar

from prefix_service.client.protocol import Request
from prefix_service.client.transport.link import Link, carry_out, carry_out_first, carry_out_on_loop

_HEDGE_CONNECTS: Final = 0.25
"""Seconds that a thread spends on a connection to another address, while this one may answer."""


class Contestant(Protocol):
    """One address: the pool of its connections."""

    def message(self, request: Request, headers: Mapping[str, str] | None = None) -> tuple[bytes, Iterable[bytes]]:
        """Returns a request's head with additional `headers`, and the pieces of its body."""

    def idle_one(self, request: Request) -> Link | None:
        """Returns a connection that was used before, if there is one."""

    def dial(self, until: float) -> Link:
        """Returns a new connection."""

    async def dial_in_thread(self, until: float) -> Link:
        """Returns a new connection, made in a thread."""


P = TypeVar("P", bound=Contestant)

_Won = tuple[P, Link, int]
"""The pool and the connection over which an answer begins, and the number of its first bytes."""


class Race(Protocol[P]):
    """The help that a GET gets from a service's other addresses.

    `connected_by` and `first_by` are the times of `time.monotonic` until which this address may take to connect, and to
    send the first byte; at `hedge_at` another one is asked too.
    """

    connected_by: float
    first_by: float
    hedge_at: float

    @property
    def has_begun(self) -> bool:
        """Whether an answer has begun to arrive."""

    def second(self) -> P | None:
        """Returns the pool to another address, if there is one to ask now."""

    def begins(self, pool: P) -> None:
        """Notes that an answer began to arrive over a pool."""


def first_answer(
    pool: P, link: Link, request: Request, headers: Mapping[str, str] | None, first_by: float, race: Race[P]
) -> _Won[P]:
    """Sends a GET over a connection of a pool; if no answer begins in time, sends it to another address too.

    Returns the pool and the connection over which an answer began first, and the number of its first bytes. The caller
    closes `link` after an error.

    Raises:
        OSError: no answer began before the time `first_by` of `time.monotonic`.
    """
    steps = link.begin(pool.message(request, headers)[0])
    try:
        count = carry_out(steps, link.socket, min(race.hedge_at, first_by))
    except TimeoutError:
        if getgeneratorstate(steps) == GEN_CLOSED or time.monotonic() >= first_by:
            raise
    else:
        race.begins(pool)
        return pool, link, count
    runs, links = [(steps, link.socket)], [(pool, link)]
    if (other := race.second()) is not None:
        with contextlib.suppress(OSError):  # this address may still answer
            dial_by = min(first_by, time.monotonic() + _HEDGE_CONNECTS)
            second = other.idle_one(request) or other.dial(dial_by)
            runs.append((second.begin(other.message(request, headers)[0]), second.socket))
            links.append((other, second))
    try:
        winner, count = carry_out_first(runs, first_by)
    except BaseException:
        for _, failed in links[1:]:
            failed.socket.close()
        raise
    for _, loser in links[:winner] + links[winner + 1 :]:
        loser.socket.close()
    race.begins(links[winner][0])
    return *links[winner], count


async def first_answer_on_loop(
    pool: P, link: Link, request: Request, headers: Mapping[str, str] | None, first_by: float, race: Race[P]
) -> _Won[P]:
    """Sends a GET as `first_answer` does, on the running event loop.

    Raises:
        OSError: no answer began before the time `first_by` of `time.monotonic`.
    """
    steps = link.begin(pool.message(request, headers)[0])
    try:
        count = await carry_out_on_loop(steps, link.socket, min(race.hedge_at, first_by))
    except TimeoutError:
        if getgeneratorstate(steps) == GEN_CLOSED or time.monotonic() >= first_by:
            raise
    else:
        race.begins(pool)
        return pool, link, count

    async def go_on() -> _Won[P]:
        return pool, link, await carry_out_on_loop(steps, link.socket, first_by)

    async def begin(other: P) -> _Won[P]:
        second = other.idle_one(request) or await other.dial_in_thread(first_by)
        try:
            return (
                other,
                second,
                await carry_out_on_loop(second.begin(other.message(request, headers)[0]), second.socket, first_by),
            )
        except BaseException:
            second.socket.close()
            raise

    runs = [asyncio.create_task(go_on())]
    if (other := race.second()) is not None:
        runs.append(asyncio.create_task(begin(other)))
    first, winner, count = await _first_success(runs)
    if winner is not link:
        link.socket.close()
    race.begins(first)
    return first, winner, count


async def _first_success(runs: Sequence[asyncio.Task[_Won[P]]]) -> _Won[P]:
    """Returns the result of the task that succeeds first, and cancels the others.

    Raises:
        OSError: all of them failed.
    """
    waiting = set(runs)
    winner: asyncio.Task[_Won[P]] | None = None
    try:
        while winner is None and waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            winner = next((task for task in done if task.exception() is None), None)
        return (winner or runs[0]).result()
    finally:
        for task in waiting:
            task.cancel()
        for task, found in zip(runs, await asyncio.gather(*runs, return_exceptions=True), strict=True):
            if task is not winner and not isinstance(found, BaseException):
                found[1].socket.close()

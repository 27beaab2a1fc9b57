"""The neighbour: a tenant that reads warm and cold adapters and moves an alias, at a steady rate, and asks whether the
service lives."""

import asyncio
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

import httpx

WARM_PAUSE: Final = 0.02
COLD_PAUSE: Final = 0.1
MOVE_PAUSE: Final = 0.1
LIVE_PAUSE: Final = 0.025


@dataclass(slots=True)
class Seen:
    """What the neighbour saw: seconds of its reads and of its moves of an alias, statuses other than success, wrong
    bodies, and the longest time between two signs of life."""

    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    move: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    silence: float = 0.0


class Neighbour:
    """Reads from one service. `bodies` maps each path to the SHA-256 of its body; the first path is the warm one.
    `alias` is the path of an alias, which points at version 1."""

    def __init__(self, url: str, key: str, bodies: Mapping[str, str], alias: str) -> None:
        self._url, self._bodies, self._alias = url, bodies, alias
        self._warm, *self._colds = bodies
        self._headers = {"Authorization": f"Bearer {key}"}

    async def watch(self, seconds: float) -> Seen:
        """Read for so long."""
        seen, until = Seen(), time.monotonic() + seconds
        colds = itertools.cycle(self._colds)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=30, limits=limits) as client:
            await asyncio.gather(
                self._steadily(WARM_PAUSE, until, lambda: self._read(client, self._warm, seen, seen.warm)),
                self._steadily(COLD_PAUSE, until, lambda: self._read(client, next(colds), seen, seen.cold)),
                self._steadily(MOVE_PAUSE, until, lambda: self._move(client, seen)),
                self._live(seen, until),
            )
        return seen

    async def _steadily(self, pause: float, until: float, step: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < until:
            began = time.monotonic()
            await step()
            await asyncio.sleep(max(0.0, pause - (time.monotonic() - began)))

    async def _read(self, client: httpx.AsyncClient, path: str, seen: Seen, times: list[float]) -> None:
        answer = await self._answer(client.get(path), seen, times)
        if answer is not None and hashlib.sha256(answer.content).hexdigest() != self._bodies[path]:
            seen.wrong += 1

    async def _move(self, client: httpx.AsyncClient, seen: Seen) -> None:
        await self._answer(client.put(self._alias, json={"version": 1}), seen, seen.move)

    async def _answer(self, asked: Awaitable[httpx.Response], seen: Seen, times: list[float]) -> httpx.Response | None:
        """Returns an answer that says success; of another its status is counted."""
        began = time.perf_counter()
        try:
            answer = await asked
            status = str(answer.status_code)
        except httpx.TransportError as error:
            status = type(error).__name__
        times.append(time.perf_counter() - began)
        if status in ("200", "201"):
            return answer
        seen.statuses[status] = seen.statuses.get(status, 0) + 1
        return None

    async def _live(self, seen: Seen, until: float) -> None:
        """Over one connection, as a probe of an orchestrator; a new one where it was lost."""
        last = time.monotonic()
        async with httpx.AsyncClient(base_url=self._url, timeout=30) as client:
            while time.monotonic() < until:
                try:
                    is_live = (await client.get("/livez")).status_code == 200
                except httpx.TransportError:
                    is_live = False
                if is_live:
                    now = time.monotonic()
                    seen.silence, last = max(seen.silence, now - last), now
                await asyncio.sleep(LIVE_PAUSE)
        seen.silence = max(seen.silence, time.monotonic() - last)


def main() -> None:
    """Read what to watch from the first line of standard input, wait for the second, and write what was seen."""
    given = json.loads(sys.stdin.readline())
    neighbour = Neighbour(given["url"], given["key"], given["bodies"], given["alias"])
    print("ready", flush=True)  # noqa: T201 - the trial waits for it
    sys.stdin.readline()
    json.dump(asdict(asyncio.run(neighbour.watch(given["seconds"]))), sys.stdout)


if __name__ == "__main__":
    main()

"""The neighbour: a tenant that reads warm and cold adapters at a steady rate, and asks whether the service lives."""

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
LIVE_PAUSE: Final = 0.025


@dataclass(slots=True)
class Seen:
    """What the neighbour saw: seconds of its reads, other statuses than 200, wrong bodies, and the longest time between
    two signs of life."""

    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    silence: float = 0.0


class Neighbour:
    """Reads from one service. `bodies` maps each path to the SHA-256 of its body; the first path is the warm one."""

    def __init__(self, url: str, key: str, bodies: Mapping[str, str]) -> None:
        self._url, self._bodies = url, bodies
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
                self._live(seen, until),
            )
        return seen

    async def _steadily(self, pause: float, until: float, step: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < until:
            began = time.monotonic()
            await step()
            await asyncio.sleep(max(0.0, pause - (time.monotonic() - began)))

    async def _read(self, client: httpx.AsyncClient, path: str, seen: Seen, times: list[float]) -> None:
        began = time.perf_counter()
        try:
            answer = await client.get(path)
            status = str(answer.status_code)
        except httpx.TransportError as error:
            status = type(error).__name__
        times.append(time.perf_counter() - began)
        if status != "200":
            seen.statuses[status] = seen.statuses.get(status, 0) + 1
        elif hashlib.sha256(answer.content).hexdigest() != self._bodies[path]:
            seen.wrong += 1

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
    neighbour = Neighbour(given["url"], given["key"], given["bodies"])
    print("ready", flush=True)  # noqa: T201 - the trial waits for it
    sys.stdin.readline()
    json.dump(asdict(asyncio.run(neighbour.watch(given["seconds"]))), sys.stdout)


if __name__ == "__main__":
    main()

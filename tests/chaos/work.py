"""Callers of a service, or of a fleet, under chaos: owners that publish, move aliases and delete, and readers."""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Final, Protocol

import httpx

from prefix_service.client import PrefixClient
from prefix_service.errors import NotFound, PrefixServiceError
from prefix_service.prefix.buffers import bytes_of
from tests.chaos.service import Service, code_of, now
from tests.chaos.truth import SHAPE, Adapter, Truth, content

BETWEEN: Final = 0.03  # seconds between two requests of one caller
_AFTER_FAILURE: Final = 0.1
_MOST_VERSIONS: Final = 6


@dataclass
class Seen:
    """Callers' observations since the last fault began. The interpreter's lock makes its changes atomic."""

    errors: Counter[str] = field(default_factory=Counter)
    reads: list[float] = field(default_factory=list)  # when requests that succeeded were sent
    writes: list[float] = field(default_factory=list)
    readiness: list[tuple[float, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The answer that acknowledges a change; `is_repeated` if an earlier try of the same change may have done it."""

    answer: httpx.Response
    is_repeated: bool


class Target(Protocol):
    """What callers reach."""

    @property
    def key(self) -> str:
        """Returns the platform admin's key."""
        ...

    def client(self, timeout: float = ...) -> httpx.Client:
        """Returns an HTTP client with that key."""
        ...


class Callers:
    """Callers in threads. `seen` has their observations; a campaign puts a new one there for each fault."""

    def __init__(self, target: Target, truth: Truth, between: float = BETWEEN) -> None:
        self._target, self.truth, self._between = target, truth, between
        self.seen = Seen()
        self._stop = threading.Event()
        self._may_write = threading.Event()
        self._may_write.set()
        self._writing = [threading.Lock() for _ in truth.owned]
        self.seeds = iter(range(1, 1 << 30))
        self._seeds_lock = threading.Lock()

    def loops(self) -> list[Callable[[], None]]:
        """Returns what the callers do until they are stopped."""
        return [partial(self._own, number) for number in range(len(self.truth.owned))]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs all callers until the block ends."""
        threads = [threading.Thread(target=loop, daemon=True) for loop in self.loops()]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._may_write.set()
            self._stop.set()
            for thread in threads:
                thread.join(60)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Holds changes back until the block ends, once every change that was begun has been acknowledged."""
        self._may_write.clear()
        try:
            for lock in self._writing:
                if not lock.acquire(timeout=90):
                    raise TimeoutError("a change was not acknowledged within 90 seconds")
                lock.release()
            yield
        finally:
            self._may_write.set()

    def _own(self, number: int) -> None:
        """Changes the adapters of one owner, and sends each change until it is acknowledged."""
        random = Random(number)  # noqa: S311 - the same changes each time
        with self._target.client() as client:
            while not self._stop.wait(self._between):
                self._may_write.wait()
                with self._writing[number]:
                    if not self._may_write.is_set():  # `quiet` has begun in between
                        continue
                    adapter = random.choice(self.truth.owned[number])
                    what = random.random()
                    if len(adapter.versions) - len(adapter.leaving) < 2 or (
                        what < 0.4 and len(adapter.versions) - len(adapter.leaving) < _MOST_VERSIONS
                    ):
                        self._publish(client, adapter)
                    elif what < 0.8 or not (candidates := adapter.deletable):
                        self._move(client, adapter, random)
                    else:
                        self._delete(client, adapter, random.choice(candidates))

    def _publish(self, client: httpx.Client, adapter: Adapter) -> None:
        with self._seeds_lock:
            new = content(next(self.seeds))
        with self.truth.lock:
            adapter.attempted[new.key_values] = new
        files = {"adapter_config.json": SHAPE.config, "adapter_model.safetensors": new.file}
        done = self._until_acknowledged(lambda: client.post(f"{adapter.path}/versions", files=files), 200, 201)
        if done is not None:
            self.truth.add_version(adapter, done.answer.json()["version"], new)

    def _move(self, client: httpx.Client, adapter: Adapter, random: Random) -> None:
        """Moves an alias from where it is. A try whose answer was lost can still be carried out much later, by a
        process that was stopped, but only if the alias is then where it was: it is never moved back there.
        """
        alias = random.choice(["prod", "canary"])
        before, doubtful = adapter.aliases.get(alias), adapter.doubtful.setdefault(alias, set())
        candidates = {*adapter.versions} - adapter.leaving - doubtful - {before}
        if not candidates:
            return
        version = random.choice(sorted(candidates))
        headers = {"If-None-Match": "*"} if before is None else {"If-Match": f'"{before}"'}
        path = f"{adapter.path}/aliases/{alias}"
        send = partial(client.put, path, json={"version": version}, headers=headers)
        done = self._until_acknowledged(send, 200, 201, 412)
        if done is None:
            return
        if done.is_repeated and before is not None:
            doubtful.add(before)
        if done.answer.status_code == 412 and not done.is_repeated:
            self.truth.lost.append(f"{path} is not {before}: {done.answer.text}")
        adapter.aliases[alias] = version
        self.moved(adapter, alias, version, done)

    def moved(self, adapter: Adapter, alias: str, version: int, done: Acknowledged) -> None:
        """Is called after the move of an alias was acknowledged."""

    def _delete(self, client: httpx.Client, adapter: Adapter, version: int) -> None:
        with self.truth.lock:
            if version in adapter.spared:
                return
            adapter.leaving.add(version)
        self._until_acknowledged(lambda: client.delete(f"{adapter.path}@{version}"), 204, 404)

    def _until_acknowledged(self, send: Callable[[], httpx.Response], *statuses: int) -> Acknowledged | None:
        """Sends a change until it is acknowledged; returns None if the work ends before."""
        is_repeated = False
        while not self._stop.is_set():
            started = now()
            answer = self._answer(send)
            if answer is not None and answer.status_code in statuses:
                self.seen.writes.append(started)
                self.truth.acknowledged += 1
                return Acknowledged(answer, is_repeated)
            if answer is not None:
                self.seen.errors[code_of(answer)] += 1
            is_repeated = True
            self._stop.wait(_AFTER_FAILURE)
        return None

    def _answer(self, send: Callable[[], httpx.Response]) -> httpx.Response | None:
        try:
            return send()
        except httpx.TimeoutException:
            self.seen.errors["timeout"] += 1
        except httpx.TransportError:
            self.seen.errors["disconnected"] += 1
        return None

    def _read_raw(self) -> None:
        """Reads versions, aliases and weights files, half of the time on a new connection."""
        random = Random(threading.get_ident())  # noqa: S311 - any order will do
        client = self._target.client()
        while not self._stop.wait(self._between):
            if random.random() < 0.5:
                client.close()
                client = self._target.client()
            if (chosen := self.truth.anything(random)) is None:
                continue
            adapter, version = chosen
            started, what = now(), random.random()
            if what < 0.2:
                answer = self._answer(lambda: client.get(f"{adapter.path}@{version}/parameters"))  # noqa: B023
                if answer is not None and answer.status_code == 200:
                    self.truth.check_parameters(adapter, version, answer.content)
            elif what < 0.4 and adapter.aliases:
                alias = random.choice(list(adapter.aliases))
                answer = self._answer(lambda: client.get(f"{adapter.path}@{alias}/prefix?layout=stacked"))  # noqa: B023
                if answer is not None and answer.status_code == 200:
                    self.truth.check_prefix(adapter, None, key_values_of(answer.content))
            else:
                answer = self._answer(lambda: client.get(f"{adapter.path}@{version}/prefix?layout=stacked"))  # noqa: B023
                if answer is not None and answer.status_code == 200:
                    self.truth.check_prefix(adapter, version, key_values_of(answer.content))
                elif answer is not None and answer.status_code == 404:
                    self.truth.check_missing(adapter, version, "404")
            self._count(answer, started)
        client.close()

    def _count(self, answer: httpx.Response | None, started: float) -> None:
        if answer is None:
            return
        if answer.status_code == 200:
            self.seen.reads.append(started)
        elif answer.status_code != 404:  # what was deleted meanwhile
            self.seen.errors[code_of(answer)] += 1

    def read_by(self, client: PrefixClient, random: Random) -> None:
        """Reads as a worker does, until the work ends: versions, and aliases."""
        while not self._stop.wait(self._between):
            if (chosen := self.truth.anything(random)) is None:
                continue
            adapter, version = chosen
            alias = random.choice([None, *adapter.aliases])
            try:
                prefix = client.get(f"{adapter.tenant}/{adapter.name}@{version if alias is None else alias}")
            except NotFound as error:
                if alias is None:
                    self.truth.check_missing(adapter, version, str(error))
            except PrefixServiceError as error:
                self.seen.errors[f"client {error.code}"] += 1
            else:
                digest = hashlib.sha256()
                for keys, values in prefix.past_key_values:
                    digest.update(bytes_of(keys.contiguous()))
                    digest.update(bytes_of(values.contiguous()))
                self.truth.check_prefix(adapter, version if alias is None else None, digest.hexdigest())


class Work(Callers):
    """The callers of one service: owners, readers, and a prober."""

    def __init__(self, service: Service, truth: Truth, between: float = BETWEEN) -> None:
        super().__init__(service, truth, between)
        self.service = service

    def loops(self) -> list[Callable[[], None]]:
        """Returns what the callers do until they are stopped."""
        return [*super().loops(), self._read_raw, self._read_raw, self._read_by_client, self._probe]

    def _read_by_client(self) -> None:
        with PrefixClient(self.service.url, self.service.key, timeout=10, cache_bytes=1 << 18) as client:
            self.read_by(client, Random(0))  # noqa: S311 - any order will do

    def _probe(self) -> None:
        """Asks `/readyz`, on a new connection each time."""
        while not self._stop.wait(0.1):
            started = now()
            try:
                answer = httpx.get(f"{self.service.url}/readyz", timeout=2)
                self.seen.readiness.append((started, "200" if answer.status_code == 200 else code_of(answer)))
            except httpx.TransportError:
                self.seen.readiness.append((started, "none"))


def key_values_of(body: bytes) -> str:
    """Returns the SHA-256 of the keys and values in a stacked safetensors body, or "" for a body without."""
    import json

    with suppress(ValueError, KeyError):
        length = 8 + int.from_bytes(body[:8], "little")
        start, stop = json.loads(body[8:length])["past_key_values"]["data_offsets"]
        return hashlib.sha256(memoryview(body)[length + start : length + stop]).hexdigest()
    return ""

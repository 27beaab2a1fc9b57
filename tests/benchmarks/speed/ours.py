"""Starts the service under measurement, fills it through its API, and reads it with a key that may only read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from tests.benchmarks.fleet import Hosted, Shape, publish_all
from tests.benchmarks.speed.harness import QUIET, say
from tests.benchmarks.speed.load import Address, get
from tests.conftest import Server, running_server

TENANT = "acme"
_PEERS_OWN: Final = frozenset({"content-length", "date"})


@dataclass(slots=True)
class Ours:
    """A running service, and a key for it."""

    server: Server
    key: str
    hosted: list[Hosted]

    @property
    def address(self) -> Address:
        """Returns the address on which it listens."""
        url = httpx.URL(self.server.url)
        return url.host, url.port or 80

    @property
    def pid(self) -> int:
        """Returns its process id."""
        return self.server.process.pid

    def get(self, path: str, **fields: str) -> bytes:
        """Returns a request with the key, as it travels."""
        return get(path, self.address, authorization=f"Bearer {self.key}", **fields)

    def ask(self, path: str, **fields: str) -> httpx.Response:
        """Returns an answer, outside of what is timed."""
        headers = {"Authorization": f"Bearer {self.key}", **fields}
        return httpx.get(f"{self.server.url}{path}", headers=headers, timeout=60).raise_for_status()

    def saved(self, folder: Path, paths: dict[str, str]) -> Path:
        """Saves its answer to each path for the peers to send: `{name}.safetensors`, and `head.json`."""
        folder.mkdir()
        for name, path in paths.items():
            answer = self.ask(path)
            (folder / f"{name}.safetensors").write_bytes(answer.content)
            head = {name: value for name, value in answer.headers.items() if name not in _PEERS_OWN}
            (folder / "head.json").write_text(json.dumps(head))
        return folder

    def publish(self, shape: Shape, count: int) -> None:
        """Publishes adapters of one shape until there are so many."""
        first = len(self.hosted)
        say(f"  publishing {count - first} adapters")
        wanted = [(TENANT, f"a-{number:05}", shape) for number in range(first, count)]
        server = self.server
        self.hosted += publish_all(server.url, server.admin_key, wanted, 4, lambda: None, server.uds)


@contextmanager
def serving(folder: Path, *options: str, environment: dict[str, str] | None = None, **arguments: Any) -> Iterator[Ours]:
    """Runs `prefix-service serve` quietly in an empty folder, with the arguments of `running_server`."""
    with running_server(folder, *options, environment=QUIET | (environment or {}), **arguments) as server:
        made = server.client().post("/v1/keys", json={"scope": "read"}).raise_for_status()
        yield Ours(server, made.json()["key"], [])


def path_of(number: int, query: str, version: str = "@1") -> str:
    """Returns the path of a prefix of the `number`-th adapter."""
    return f"/v1/tenants/{TENANT}/adapters/a-{number:05}{version}/prefix?{query}"

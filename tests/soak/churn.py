"""Does everything that callers do in a soak, right and wrong, again and again."""

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import httpx

from prefix_service.client import PrefixClient
from prefix_service.errors import PrefixServiceError
from tests.conftest import Server

TENANTS: Final = ("acme", "beta", "gamma")
_SIZES: Final = {"num_virtual_tokens": 32, "num_layers": 8, "num_attention_heads": 4, "token_dim": 256}  # 512 KiB
_CONFIG: Final = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "m", **_SIZES}
_ADAPTERS: Final = 6  # few, and few forms of each: what the service remembers is complete before samples are taken
_KEPT: Final = 3  # versions of an adapter
_TOO_SLOW: Final = {"storage-failed", "overloaded", "unavailable"}


@dataclass
class Churn:
    """Threads that publish, move, read, delete and fail on one service until `stop`."""

    server: Server
    done: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    held_up: Counter[str] = field(default_factory=Counter)
    """Answers that the service was too slow for, as it may be while the machine does something else."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Publishes a first version of everything, and starts the threads."""
        admin = self.server.client()
        for tenant, number in itertools.product(TENANTS, range(_ADAPTERS)):
            self._publish(admin, tenant, f"a{number}", number)
            admin.put(f"/v1/tenants/{tenant}/adapters/a{number}/aliases/prod", json={"version": 1}).raise_for_status()
        steps = (self._publishing, self._reading, self._reading_raw, self._hanging_up, self._failing, self._managing)
        for number, step in enumerate(steps):
            draw = random.Random(number)  # noqa: S311 - a soak's draw
            self._threads.append(threading.Thread(target=self._again, args=(step, draw), daemon=True))
        for thread in self._threads:
            thread.start()

    def has_begun(self) -> bool:
        """Returns whether every step was done twice, or something is wrong."""
        return bool(self.unexpected) or (len(self.done) == len(self._threads) and min(self.done.values()) >= 2)

    def stop(self) -> None:
        """Stops the threads, and waits for their last steps."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _again(self, step: Callable[[random.Random], None], draw: random.Random) -> None:
        while not self._stop.is_set():
            try:
                step(draw)
                self.done[step.__name__.strip("_")] += 1
            except (PrefixServiceError, httpx.HTTPError) as error:
                counts = self.held_up if _code(error) in _TOO_SLOW else self.unexpected
                counts[f"{step.__name__.strip('_')}: {type(error).__name__} {error!s:.100}"] += 1
            time.sleep(0.01)

    def _any(self, draw: random.Random) -> tuple[str, str]:
        return draw.choice(TENANTS), f"a{draw.randrange(_ADAPTERS)}"

    def _publish(self, client: httpx.Client, tenant: str, adapter: str, seed: int) -> int:
        body = {"config": _CONFIG, "init_weights": "random", "seed": seed}
        answer = client.post(f"/v1/tenants/{tenant}/adapters/{adapter}/versions", json=body).raise_for_status()
        number: int = answer.json()["version"]
        return number

    def _publishing(self, draw: random.Random) -> None:
        """Publishes a new version, moves the alias to it, and deletes old ones."""
        tenant, adapter = self._any(draw)
        base = f"/v1/tenants/{tenant}/adapters/{adapter}"
        with self.server.client() as client:
            number = self._publish(client, tenant, adapter, draw.randrange(1 << 30))
            client.put(f"{base}/aliases/prod", json={"version": number, "preload": True}).raise_for_status()
            for item in client.get(f"{base}/versions").raise_for_status().json()["items"][_KEPT:]:
                client.delete(f"{base}@{item['version']}")

    def _reading(self, draw: random.Random) -> None:
        """Reads through this project's client: by alias, mixed, and in part."""
        with contextlib.closing(PrefixClient(self.server.url, self.server.admin_key, cache_bytes=0)) as client:
            for _ in range(10):
                first, second = ("/".join(self._any(draw)) for _ in range(2))
                client.get(f"{first}@prod", batch_size=4, dtype="bfloat16")
                client.get(second, layers=(0, draw.choice((2, 4))))
                client.get_many([first, None, [first, second]], dtype="float32")

    def _reading_raw(self, draw: random.Random) -> None:
        """Reads by bare requests: conditions, ranges, masks, `/v2`."""
        tenant, adapter = self._any(draw)
        path = f"/v1/tenants/{tenant}/adapters/{adapter}/prefix"
        with self.server.client() as client:
            tag = client.get(path, params={"batch_size": draw.choice((1, 4))}).headers["etag"]
            client.get(path, headers={"If-None-Match": tag})
            client.get(path, headers={"Range": "bytes=100-50000"})
            client.post(path, json={"attention_mask": [[1] * draw.randrange(1, 2000)] * 4}).raise_for_status()
            client.post(f"/v2/models/{tenant}/{adapter}/infer", json={"inputs": []})

    def _hanging_up(self, draw: random.Random) -> None:
        """Hangs up in the middle of an answer, and of an upload."""
        tenant, adapter = self._any(draw)
        base = f"/v1/tenants/{tenant}/adapters/{adapter}"
        with self.server.client() as client:
            with client.stream("GET", f"{base}/prefix", params={"batch_size": 256}) as answer:
                next(answer.iter_raw(1 << 16))

            def pieces() -> "itertools.chain[bytes]":
                return itertools.chain([b"--x\r\n"], (bytes(1 << 16) for _ in range(4)), _broken())

            with contextlib.suppress(RuntimeError, httpx.HTTPError):
                client.post(
                    f"{base}/versions", content=pieces(), headers={"Content-Type": "multipart/form-data; boundary=x"}
                )

    def _failing(self, draw: random.Random) -> None:
        """Sends requests that are refused: wrong keys, missing versions, malformed bodies."""
        tenant, adapter = self._any(draw)
        base = f"/v1/tenants/{tenant}/adapters"
        with self.server.client() as client:
            client.get(f"{base}/{adapter}@{draw.randrange(10_000, 99_999)}/prefix")
            client.get(f"{base}/missing-{draw.randrange(10_000)}/prefix")
            client.get(f"{base}/{adapter}/prefix", params={"layers": f"0:{draw.randrange(100, 9999)}"})
            client.post("/v1/prefixes", content=b'{"rows":[' + bytes(1000))
            client.get(f"{base}/{adapter}/prefix", headers={"Authorization": f"Bearer pfx_{draw.randrange(1 << 60)}"})

    def _managing(self, draw: random.Random) -> None:
        """Makes and deletes keys, tenants and residency."""
        tenant, adapter = self._any(draw)
        with self.server.client() as client:
            made = client.post(f"/v1/tenants/{tenant}/keys", json={"scope": "read", "name": "soak"}).raise_for_status()
            key = made.json()
            with self.server.client(key["key"]) as reader:
                reader.get(f"/v1/tenants/{tenant}/adapters/{adapter}").raise_for_status()
            client.delete(f"/v1/tenants/{tenant}/keys/{key['id']}").raise_for_status()
            client.delete(f"/v1/tenants/{tenant}/adapters/{adapter}/residency")
            gone = f"gone-{draw.randrange(1 << 30)}"
            client.put(f"/v1/tenants/{gone}", json={}).raise_for_status()
            self._publish(client, gone, "a", 1)
            client.delete(f"/v1/tenants/{gone}").raise_for_status()
            client.get("/metrics")


def _code(error: PrefixServiceError | httpx.HTTPError) -> str:
    if isinstance(error, PrefixServiceError):
        return error.code
    return str(error.response.json()["code"]) if isinstance(error, httpx.HTTPStatusError) else ""


def _broken() -> "itertools.chain[bytes]":
    raise RuntimeError("the uploader is gone")

"""What each thing takes on a folder with so many adapters, and what others notice of it."""

import json
import random
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Final

import httpx

from prefix_service.data_folder.opening import blob_folder, catalog_file
from tests.api.helpers import upload, weights
from tests.benchmarks.growth.folder import BIG, fill, name_of
from tests.benchmarks.growth.watch import Noticed, watched
from tests.commands import PREFIX_SERVICE
from tests.conftest import Server, running_server

_REPEATED: Final = 30
_IDLE: Final = 3.0  # seconds

QUICK: Final = {"PREFIX_GARBAGE_GRACE": "2", "PREFIX_LOG_LEVEL": "warning"}
"""Collections begin soon after a deletion; blobs of the folder are old."""


def measure(folder: Path, count: int) -> dict[str, Noticed]:
    """Fills a new folder, and does everything once; `seconds` of what is done often are those of one."""
    data_dir = folder / "data"
    with running_server(data_dir) as server:
        upload(server.client(), BIG, "first").raise_for_status()
    fill(data_dir, count)
    found: dict[str, Noticed] = {}
    began = time.monotonic()
    with running_server(data_dir, environment=QUICK) as server:
        found["start"] = Noticed(time.monotonic() - began)
        time.sleep(2 + count / 20_000)  # it looks for lost blobs
        for name, step in _steps(server, folder, count).items():
            with watched(server) as noticed:
                each = step()
            if each is not None:
                noticed.seconds = each
            found[name] = noticed
    return found


def _steps(server: Server, folder: Path, count: int) -> dict[str, Callable[[], float | None]]:
    client = server.client()
    choose = random.Random(7)  # noqa: S311 - adapters to ask for
    path = f"/v1/tenants/{BIG}"

    def resolve() -> float:
        return _median(lambda: client.get(f"{path}/adapters/{name_of(choose.randrange(count))}"))

    def publish() -> float:
        client.put(path, json={"max_adapters": 10**7, "max_bytes": 10**12}).raise_for_status()
        seeds = iter(range(1, 1000))
        return _median(lambda: upload(client, BIG, "first", file=weights(next(seeds))))

    def pages() -> float:
        times, params = [], {"limit": "1000"}
        while True:
            began = time.monotonic()
            page = client.get(f"{path}/adapters", params=params).raise_for_status().json()
            times.append(time.monotonic() - began)
            if page["next"] is None:
                return statistics.median(times)
            params["cursor"] = page["next"]

    def backup() -> None:
        command = [*PREFIX_SERVICE, "backup", str(folder / "copy"), "--data-dir", str(server.data_dir), "--json"]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        if done["blobs"] < 2 * count or done["lost"]:
            raise AssertionError(f"the backup has {done['blobs']} blobs of {2 * count}")

    def index() -> None:
        with client.stream("POST", "/v2/repository/index") as answer:
            nbytes = sum(map(len, answer.iter_raw()))
        if nbytes < 50 * count:
            raise AssertionError(f"the index has {nbytes} bytes")

    return {
        "nothing": lambda: time.sleep(_IDLE),
        "resolve": resolve,
        "publish under a quota": publish,
        "a page of 1,000 adapters": pages,
        "a page of tenants": lambda: _median(lambda: client.get("/v1/tenants")),
        "/v2 index": index,
        "backup": backup,
        "deletion: answer": lambda: _once(lambda: client.delete(path)),
        "deletion: rows": lambda: _until(lambda: _rows_are_gone(server.data_dir)),
        "collection": lambda: _until(lambda: _blobs_are_gone(server.data_dir)),
    }


def _once(call: Callable[[], httpx.Response]) -> float:
    began = time.monotonic()
    call().raise_for_status()
    return time.monotonic() - began


def _median(call: Callable[[], httpx.Response]) -> float:
    return statistics.median(_once(call) for _ in range(_REPEATED))


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError("it has not ended after 15 minutes")
        time.sleep(0.2)


def _rows_are_gone(data_dir: Path) -> bool:
    with closing(sqlite3.connect(catalog_file(data_dir), timeout=30)) as catalog:
        left: tuple[int] = catalog.execute("SELECT count(*) FROM tenants WHERE deleted = 1").fetchone()
    return left == (0,)


def _blobs_are_gone(data_dir: Path) -> bool:
    """The service lists folders in their order: the last one is emptied in the end."""
    return not any(path for name in ("00", "80", "fe", "ff") for path in (blob_folder(data_dir) / name).iterdir())

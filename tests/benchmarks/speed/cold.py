"""Measures cold adapters: from the blob to the first byte, many of them beside a hot one, and the start of the service.

What is compared is measured in the same rounds, on the same file: reading and hashing a blob, and a real server's
answer just after `DELETE …/residency`. A digest is unknown where this very body was never sent before.
"""

import hashlib
import http.client
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from threading import Event

from prefix_service.system.sizes import human_bytes
from tests.benchmarks.fleet import Hosted, Shape, percentile, publish_all
from tests.benchmarks.speed.harness import QUIET, Chart, Outcome, say
from tests.benchmarks.tables import Grid
from tests.conftest import Server, running_server

_ANSWER = 1 << 20

Row = list[str]


class Reader:
    """A connection that reads into memory that exists already."""

    def __init__(self, url: str, key: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        self._headers = {"Authorization": f"Bearer {key}"}
        self._memory = memoryview(bytearray(_ANSWER))

    def get(self, path: str, tag: str = "") -> tuple[float, float, str]:
        """Returns the seconds to the first and the last byte, and the entity tag."""
        began = time.perf_counter()
        self._connection.request("GET", path, headers=self._headers | ({"If-None-Match": tag} if tag else {}))
        answer = self._connection.getresponse()
        first = time.perf_counter() - began
        while answer.readinto(self._memory):
            pass
        if answer.status != (304 if tag else 200):
            raise RuntimeError(f"{path}: status {answer.status}")
        return first, time.perf_counter() - began, answer.headers["ETag"]

    def unload(self, one: Hosted) -> None:
        """Makes an adapter cold."""
        path = f"/v1/tenants/{one.tenant}/adapters/{one.adapter}@1/residency"
        self._connection.request("DELETE", path, headers=self._headers)
        answer = self._connection.getresponse()
        answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{path}: status {answer.status}")


def publish(server: Server, tenant: str, shape: Shape, count: int) -> list[Hosted]:
    """Publishes so many adapters of one shape."""
    wanted = [(tenant, f"adapter-{number:03}", shape) for number in range(count)]
    return publish_all(server.url, server.admin_key, wanted, 2, lambda: None)


def blob_of(server: Server, shape: Shape) -> Path:
    """Returns the file of the only keys and values of a shape."""
    for path in (server.data_dir / "blobs").glob("[0-9a-f][0-9a-f]/*"):
        with path.open("rb") as file:
            if path.stat().st_size >= shape.nbytes and b"past_key_values" in file.read(200):
                return path
    raise RuntimeError("there is no such blob")


def read_and_hash(path: Path) -> float:
    """Returns the seconds to open, read and hash a file."""
    began = time.perf_counter()
    with path.open("rb") as file:
        data = file.read()
    hashlib.sha256(data).digest()
    return time.perf_counter() - began


def drop(path: Path) -> None:
    """Drops a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_cold(folder: Path, shape: Shape, rounds: int) -> list[Row]:
    """(a) Measures one adapter, cold again and again."""
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    base: dict[str, list[float]] = {"warm": [], "dropped": []}
    rows_asked = itertools.count(2)
    with running_server(folder, environment=QUIET) as server:
        (one,) = publish(server, "acme", shape, 1)
        path, reader = blob_of(server, shape), Reader(server.url, server.admin_key)
        reader.get(one.path)
        for _ in range(rounds):
            for cache, before in (("warm", lambda _: None), ("dropped", drop)):
                before(path)
                base[cache].append(read_and_hash(path))
                for digest in ("known", "unknown"):
                    # Other numbers of rows, which are not sent, make another body of the same tensors.
                    new = f"&expand=false&batch_size={next(rows_asked)}" if digest == "unknown" else ""
                    reader.unload(one)
                    before(path)
                    seen.setdefault((cache, digest), []).append(reader.get(one.path + new)[:2])
    size, rows = human_bytes(shape.nbytes), list[Row]()
    for (cache, digest), times in seen.items():
        median = statistics.median(base[cache])
        for index, name in enumerate(("first", "last")):
            what = f"{size}, {cache} page cache, digest {digest}: {name} byte ÷ read + hash"
            rows.append([what, *_ratios([found[index] for found in times], median)])
    return rows


def _ratios(values: list[float], base: float) -> Row:
    ordered = [value / base for value in sorted(values)]
    return [f"{statistics.median(ordered):.2f}", f"{ordered[0]:.2f} to {ordered[-1]:.2f}"]


def many_cold(folder: Path, count: int) -> list[Row]:
    """(b) Measures many cold adapters, read by one and by sixteen, while a hot one is read."""
    rows: list[Row] = []
    spawning = multiprocessing.get_context("spawn")
    with running_server(folder, environment=QUIET) as server, ProcessPoolExecutor(1, spawning) as pool:
        shape = Shape()
        hot, *cold = publish(server, "acme", shape, count + 1)
        with spawning.Manager() as manager:
            alone = None
            for readers in (0, 1, 16):
                begun, stop = manager.Event(), manager.Event()
                watching = pool.submit(watch, server.url, server.admin_key, hot, begun, stop)
                begun.wait(60)
                if readers:
                    seconds = _read_all(server, cold, readers)
                    rate = f"{count / seconds:.0f} adapters/s, {human_bytes(count * shape.nbytes / seconds)}/s"
                    rows.append([f"{count} cold adapters, {readers} readers", rate, ""])
                else:
                    time.sleep(2)
                stop.set()
                found = watching.result()
                alone = alone or found
                for status, times in found.items():
                    figures = [percentile(times, share) for share in (0.5, 0.99)]
                    times_alone = [percentile(alone[status], share) for share in (0.5, 0.99)]
                    text = f"p50 {figures[0] * 1000:.2f} ms, p99 {figures[1] * 1000:.2f} ms"
                    ratio = [f"{one / other:.1f}" for one, other in zip(figures, times_alone, strict=True)]
                    rows.append([f"hot {status} beside {readers} cold readers", text, f"x {', x '.join(ratio)}"])
    return rows


def _read_all(server: Server, cold: list[Hosted], readers: int) -> float:
    connections = [Reader(server.url, server.admin_key) for _ in range(readers)]
    for one in cold:
        connections[0].unload(one)
    began = time.perf_counter()

    def read(number: int) -> None:
        for one in cold[number::readers]:
            connections[number].get(one.path)

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, range(readers)))
    return time.perf_counter() - began


def watch(url: str, key: str, hot: Hosted, begun: Event, stop: Event) -> dict[int, list[float]]:
    """Measures latencies of a resident adapter, by status, until it is stopped."""
    reader = Reader(url, key)
    *_, tag = reader.get(hot.path)
    found: dict[int, list[float]] = {304: [], 200: []}
    begun.set()
    while not stop.is_set():
        found[304].append(reader.get(hot.path, tag)[1])
        found[200].append(reader.get(hot.path)[1])
        time.sleep(0.002)
    return found


def start_up(folder: Path, rounds: int) -> list[Row]:
    """(c) Measures `serve` until it is ready, and `import torch`."""

    def import_torch() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        return time.perf_counter() - began

    def start() -> float:
        began = time.perf_counter()
        with running_server(folder):
            return time.perf_counter() - began

    start()  # the first start makes the catalog and the key
    imports, starts = [], []
    for _ in range(rounds):
        imports.append(import_torch())
        starts.append(start())
    return [["start until ready ÷ import torch", *_ratios(starts, statistics.median(imports))]]


def measure(*, quick: bool) -> Outcome:
    """Measures all three."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in (20,) if quick else (20, 2048):
            say(f"  one cold adapter of {tokens} tokens")
            rows += one_cold(Path(folder) / f"one-{tokens}", Shape(tokens=tokens), 3 if quick else 9)
        say("  many cold adapters")
        rows += many_cold(Path(folder) / "many", 20 if quick else 200)
        say("  start-up")
        rows += start_up(Path(folder) / "start", 1 if quick else 5)
    first = {row[0].removesuffix(": first byte ÷ read + hash"): float(row[1]) for row in rows if "first byte" in row[0]}
    chart = Chart(
        "bars",
        "From a cold blob to the first byte",
        "times read + SHA-256 of the file",
        list(first),
        {"first byte": list(first.values())},
        log_y=False,
    )
    return Outcome([Grid("Cold", ["", "median", "spread, or beside the hot one alone"], rows)], chart)

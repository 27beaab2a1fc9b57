"""Measures bytes on loopback: ours against servers that send the same bytes, read by one client into one buffer.

Each round a connection that is kept is used for some tens of MB; the layout is `layers`, as it is by default.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import httpx

from prefix_service.system.sizes import human_bytes
from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed import peers
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, in_turns, ratio, say
from tests.benchmarks.speed.load import Address, Reader, get, redis
from tests.benchmarks.speed.memory import Growth
from tests.benchmarks.speed.ours import Ours, path_of, serving
from tests.benchmarks.speed.processor import spent
from tests.benchmarks.tables import Grid

OURS: Final = "ours"
ONE_OBJECT: Final = "uvicorn, one bytes object"
SCATTER: Final = "uvicorn, the same buffers"
FASTAPI: Final = "FastAPI `Response`"
NGINX: Final = "nginx `sendfile`"
REDIS: Final = "Redis `GET`"

PEERS: Final = (OURS, ONE_OBJECT, SCATTER, FASTAPI, NGINX, REDIS)
_HELD_WHOLE: Final = 32  # the largest batch that peers are asked for which hold all of it in memory
_ROUND: Final = 256 << 20  # bytes that one peer sends in a round, so that the first answers after a pause are few

Times = dict[str, list[float]]


def measure(*, quick: bool) -> Outcome:
    """Measures all batches, and the memory of the server while it sends the largest."""
    shape, batches, rounds = Shape(), (1, 8) if quick else (1, 8, 32, 256), 5 if quick else 25
    with tempfile.TemporaryDirectory(prefix="prefix-wire-") as name, ExitStack() as stack:
        folder = Path(name)
        ours = stack.enter_context(serving(folder / "data"))
        ours.publish(shape, 1)
        memory = _memory(ours, shape, batches)
        files = ours.saved(folder / "files", {str(batch): _path(batch) for batch in batches})
        readers = _readers(stack, ours, files, folder)
        times = {batch: _measured(readers, batch, rounds if batch < 256 else 5) for batch in batches}
        processor = _processor(ours, files, 100 if quick else 2560)
    speeds = {
        batch: {peer: (files_size(shape, batch) / Spread.of(seconds).median) / 1e9 for peer, seconds in found.items()}
        for batch, found in times.items()
    }
    chart = Chart(
        "bars",
        "Bytes on loopback, Llama-3-8B, 20 tokens",
        "GB/s",
        [f"batch {batch}" for batch in batches],
        {peer: [speeds[batch].get(peer) for batch in batches] for peer in _shown(times)},
        log_y=False,
    )
    return Outcome([_speeds(times, speeds), _ratios(times), processor, memory], chart)


def files_size(shape: Shape, batch: int) -> int:
    """Returns the bytes of the keys and values of a batch."""
    return shape.nbytes * batch


def _path(batch: int) -> str:
    return path_of(0, f"batch_size={batch}&dtype=bfloat16")


Ask = Callable[[int], int]
"""Reads the answer for a batch, and returns its length."""


def _readers(stack: ExitStack, ours: Ours, files: Path, folder: Path) -> dict[str, Ask]:
    def file_of(reader: Reader, address: Address, batch: int) -> int:
        return reader.read(get(f"/{batch}.safetensors", address))

    def from_app(reader: Reader, address: Address, batch: int) -> int:
        return reader.read(get(f"/{batch}", address))

    reader = stack.enter_context(Reader(ours.address))
    readers: dict[str, Ask] = {OURS: lambda batch: reader.read(ours.get(_path(batch)))}
    for name, app in ((ONE_OBJECT, "one_object"), (SCATTER, "scatter"), (FASTAPI, "fastapi_response")):
        address = stack.enter_context(peers.python_peer(app, files)).address
        _must_agree(name, address, files)
        readers[name] = partial(from_app, stack.enter_context(Reader(address)), address)
    if (at := stack.enter_context(peers.nginx(files, folder / "nginx"))) is not None:
        readers[NGINX] = partial(file_of, stack.enter_context(Reader(at)), at)
    values = {path.stem: path.read_bytes() for path in files.glob("*.safetensors") if int(path.stem) <= _HELD_WHOLE}
    if (at := stack.enter_context(peers.redis(values))) is not None:
        from_redis = stack.enter_context(Reader(at, redis))
        readers[REDIS] = lambda batch: from_redis.read(peers.command_of("GET", str(batch)))
    return readers


def _must_agree(name: str, address: Address, files: Path) -> None:
    """Raises unless a peer sends the same bytes, rows repeated."""
    for batch in (1, 8):
        body = httpx.get(f"http://{address[0]}:{address[1]}/{batch}", timeout=60).content
        if body != (files / f"{batch}.safetensors").read_bytes():
            raise RuntimeError(f"{name} sends other bytes than ours at batch {batch}")


def _measured(readers: dict[str, Ask], batch: int, rounds: int) -> Times:
    say(f"  batch {batch}, {rounds} rounds")
    asked = {name: ask for name, ask in readers.items() if batch <= _HELD_WHOLE or name in (OURS, SCATTER, NGINX)}
    lengths = {name: ask(batch) for name, ask in asked.items()}
    repeats = max(1, _ROUND // min(lengths.values()))
    return in_turns({name: partial(_seconds, ask, batch, repeats) for name, ask in asked.items()}, rounds)


def _seconds(ask: Ask, batch: int, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        ask(batch)
    return (time.perf_counter() - began) / repeats


def _processor(ours: Ours, files: Path, answers: int) -> Grid:
    """Measures the server's work for not making one bytes object of a row."""
    rows = []
    with (
        peers.python_peer("one_object", files) as peer,
        Reader(ours.address) as to_ours,
        Reader(peer.address) as to_peer,
    ):
        for name, pid, reader, request in (
            (OURS, ours.pid, to_ours, ours.get(_path(1))),
            (ONE_OBJECT, peer.pid, to_peer, get("/1", peer.address)),
        ):
            reader.read(request)
            before, began = spent(pid), time.perf_counter()
            for _ in range(answers):
                reader.read(request)
            passed = time.perf_counter() - began
            user, kernel = (after - first for after, first in zip(spent(pid), before, strict=True))
            rows.append([name, *(f"{seconds / answers * 1e6:.0f}" for seconds in (user, kernel, passed))])
    title = f"One row, {answers:,} answers one after another: microseconds of each"
    return Grid(title, ["", "of the server's user time", "in the kernel", "until it was read"], rows)


def _shown(times: dict[int, Times]) -> list[str]:
    """Returns ours and the peers that are there."""
    return [peer for peer in PEERS if any(peer in found for found in times.values())]


def _speeds(times: dict[int, Times], speeds: dict[int, dict[str, float]]) -> Grid:
    rows = [
        [peer, *(f"{speeds[batch][peer]:.2f}" if peer in speeds[batch] else "—" for batch in times)]
        for peer in _shown(times)
    ]
    return Grid("GB/s by batch, median", ["", *(f"batch {batch}" for batch in times)], rows)


def _ratios(times: dict[int, Times]) -> Grid:
    rows = []
    for peer in _shown(times)[1:]:
        # The peer's seconds by those of ours: how many times as fast ours is.
        cells = [str(ratio(found[peer], found[OURS])) if peer in found else "—" for found in times.values()]
        rows.append([f"against {peer}", *cells])
    title = "How many times as fast ours is: median of paired rounds (quartiles)"
    return Grid(title, ["", *(f"batch {batch}" for batch in times)], rows)


_MEMORY: Final = (
    "The server's highest peak above what it had after a first answer of one row; a rendering has 2.5 MiB",
    ["batch", "body", "to a slow reader", "then to a fast one", "in renderings"],
)


def _memory(ours: Ours, shape: Shape, batches: tuple[int, ...]) -> Grid:
    """Measures the memory first, so that no earlier answer has made room, from small batches to large."""
    rows = []
    with Reader(ours.address) as reader:
        reader.read(ours.get(_path(1)))
        growth = Growth(ours.pid)
        for batch in batches:
            say(f"  memory at batch {batch}")
            request = ours.get(_path(batch))
            reader.read(request, pause=_slowed(100))
            slow = growth.peak()
            reader.read(request)
            fast = growth.peak()
            body = human_bytes(files_size(shape, batch))
            rows.append([str(batch), body, human_bytes(slow), human_bytes(fast), f"{fast / shape.nbytes:.2f}"])
    return Grid(*_MEMORY, rows)


def _slowed(times: int) -> Callable[[], None]:
    """Returns a pause of a millisecond for the first calls, and none for later ones."""
    pauses = iter([0.001] * times)
    return lambda: time.sleep(next(pauses, 0))

"""Measures from an adapter's name to keys and values of eight rows, of which an element of the last was read."""

import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import httpx
import torch

from prefix_service.client import PrefixClient
from prefix_service.settings import Settings
from prefix_service.system.sizes import human_bytes
from tests.benchmarks.fleet import Shape
from tests.benchmarks.speed import peers
from tests.benchmarks.speed.harness import Chart, Outcome, Spread, in_turns, ratio, say
from tests.benchmarks.speed.memory import anonymous
from tests.benchmarks.speed.ours import TENANT, Ours, path_of, serving
from tests.benchmarks.speed.worker_peers import BATCH, FromNginx, FromRedis, Pairs, Switch, from_file, gpt2, llama_3_8b
from tests.benchmarks.tables import Grid

COLD: Final = "ours, never seen"
POOL: Final = "ours, never seen, same host"
CACHED: Final = "ours, cached (a version)"
LATEST: Final = "ours, cached (`latest`: a 304)"
HTTPX: Final = "ours, by httpx and `safetensors.torch.load`"
NGINX: Final = "nginx, http.client and `safetensors.torch.load`"
REDIS: Final = "Redis, a socket and `safetensors.torch.load`"
PEFT: Final = "PEFT: `load_adapter`, `set_adapter`, `get_prompt(8)`"
PEFT_META: Final = "the same with `low_cpu_mem_usage`"
PEFT_LOADED: Final = "PEFT, loaded before: `set_adapter`, `get_prompt(8)`"

CASES: Final = (POOL, COLD, CACHED, LATEST, HTTPX, NGINX, REDIS, PEFT, PEFT_META, PEFT_LOADED)
_AT_LEAST: Final = 0.02  # seconds of one case in one round
_AT_MOST: Final = 0.5  # seconds after which there need not be nine of it
_TELLING: Final = 64 << 20  # bytes of a prefix that no memory freed before makes room for

Case = Callable[[int], Pairs]


@dataclass(frozen=True, slots=True)
class Model:
    """The model whose adapters are switched, and how often it is measured."""

    name: str
    shape: Shape
    base: Callable[[], Any]
    adapters: int
    rounds: int


MODELS: Final = (
    Model("GPT-2, 20 tokens", Shape(layers=12, heads=12, head_dim=64), gpt2, 8, 15),
    Model("Llama-3-8B, 20 tokens", Shape(), llama_3_8b, 8, 15),
    Model("Llama-3-8B, CARTRIDGE of 2,048 tokens", Shape(tokens=2048, peft_type="CARTRIDGE"), llama_3_8b, 2, 3),
)


def measure(*, quick: bool) -> Outcome:
    """Measures one model after another."""
    models = MODELS[:2] if quick else MODELS
    times: dict[str, dict[str, list[float]]] = {}
    grown: dict[str, dict[str, int]] = {}
    for model in models:
        say(f"  {model.name}")
        with tempfile.TemporaryDirectory(prefix="prefix-worker-") as name, _cases(model, Path(name)) as (cases, forget):
            _must_agree(cases)
            if model.shape.nbytes >= _TELLING:
                grown[model.name] = {case: _grown(switch) for case, switch in cases.items()}
                forget()
            timed = {case: partial(_seconds, model, switch, forget) for case, switch in cases.items()}
            times[model.name] = in_turns(timed, 3 if quick else model.rounds, warm_up=0)
    shown = [case for case in CASES if any(case in found for found in times.values())]
    rows = [[case, *(_milliseconds(found, case) for found in times.values())] for case in shown]
    against = [[case, *(_against(found, case) for found in times.values())] for case in shown if case != PEFT]
    grids = [
        Grid("Milliseconds until usable at batch 8: median of rounds (quartiles)", ["", *times], rows),
        Grid(f"How many times as fast as {PEFT}: median of paired rounds (quartiles)", ["", *times], against),
    ]
    for name, found in grown.items():
        held = [[case, human_bytes(found[case])] for case in shown if case in found]
        grids.append(Grid("Memory of its own that a worker takes for one of them", ["", name], held))
    series: dict[str, list[float | None]] = {
        case: [Spread.of(found[case]).median * 1000 if case in found else None for found in times.values()]
        for case in shown
    }
    return Outcome(
        grids, Chart("bars", "From a name to usable keys and values, batch 8", "milliseconds", [*times], series)
    )


@contextmanager
def _cases(model: Model, folder: Path) -> Iterator[tuple[dict[str, Case], Callable[[], None]]]:
    """Yields every way to the adapters of a model, and what clears up after a round."""
    with ExitStack() as stack:
        ours = stack.enter_context(serving(folder / "data"))
        ours.publish(model.shape, model.adapters)
        cases = _by_client(stack, ours)
        if "shared_dir" in Settings.model_fields:
            cases[POOL] = stack.enter_context(_same_host(model, folder))
        cases |= _by_download(stack, ours, model, folder)
        switch = Switch(model.base(), _saved(model, folder))
        cases |= {PEFT: switch.loading(False), PEFT_META: switch.loading(True), PEFT_LOADED: switch.loaded}
        yield cases, switch.forget


def _by_client(stack: ExitStack, ours: Ours) -> dict[str, Case]:
    """Returns the ways of our client: one that forgets, and one that remembers."""
    forgetful, client = (stack.enter_context(PrefixClient(ours.server.url, ours.key)) for _ in range(2))

    def get(client: PrefixClient, number: int, version: str = "@1") -> Pairs:
        return client.get(f"{TENANT}/a-{number:05}{version}", batch_size=BATCH, dtype="bfloat16").past_key_values

    def never_seen(number: int) -> Pairs:
        pairs = get(forgetful, number)
        forgetful.clear_cache()
        return pairs

    return {COLD: never_seen, CACHED: partial(get, client), LATEST: partial(get, client, version="")}


@contextmanager
def _same_host(model: Model, folder: Path) -> Iterator[Case]:
    """Yields the way of a service on a Unix socket that shares its memory with workers that may read it."""
    socket, where = folder / "socket", "/dev/shm" if Path("/dev/shm").is_dir() else folder  # noqa: S108
    with (
        tempfile.TemporaryDirectory(prefix="prefix-shared-", dir=where) as shared,
        serving(folder / "pool", "--uds", str(socket), environment={"PREFIX_SHARED_DIR": shared}, uds=socket) as ours,
        PrefixClient(ours.server.url, ours.key, uds=socket) as client,
    ):
        ours.publish(model.shape, model.adapters)

        def never_seen(number: int) -> Pairs:
            pairs = client.get(f"{TENANT}/a-{number:05}@1", batch_size=BATCH, dtype="bfloat16").past_key_values
            client.clear_cache()
            return pairs

        yield never_seen


def _by_download(stack: ExitStack, ours: Ours, model: Model, folder: Path) -> dict[str, Case]:
    """Returns other ways to the same bytes; one row travels and is expanded, which favours them most."""
    paths = [path_of(number, f"batch_size={BATCH}&dtype=bfloat16&expand=false") for number in range(model.adapters)]
    files = folder / "files"
    files.mkdir()
    for number, path in enumerate(paths):
        (files / f"{number}.safetensors").write_bytes(ours.ask(path).content)
    headers = {"Authorization": f"Bearer {ours.key}"}
    plain = stack.enter_context(httpx.Client(base_url=ours.server.url, headers=headers, timeout=60))
    cases: dict[str, Case] = {HTTPX: lambda number: from_file(plain.get(paths[number]).raise_for_status().content)}
    if (nginx := stack.enter_context(peers.nginx(files, folder / "nginx"))) is not None:
        cases[NGINX] = FromNginx(nginx)
    values = {str(number): (files / f"{number}.safetensors").read_bytes() for number in range(model.adapters)}
    if (redis := stack.enter_context(peers.redis(values))) is not None:
        cases[REDIS] = FromRedis(redis)
    return cases


def _saved(model: Model, folder: Path) -> list[Path]:
    """Saves the published adapters as PEFT finds them on its disk."""
    folders = [folder / f"adapter-{number}" for number in range(model.adapters)]
    for number, one in enumerate(folders):
        one.mkdir()
        (one / "adapter_config.json").write_bytes(model.shape.config)
        (one / "adapter_model.safetensors").write_bytes(model.shape.weights(number)[0])
    return folders


def _must_agree(cases: dict[str, Case]) -> None:
    """Raises unless all ways lead to the same bits; this also warms them up."""
    expected = cases[COLD](0)
    for case, switch in cases.items():
        for ours, other in zip(expected, switch(0), strict=True):
            if not all(torch.equal(one, another) for one, another in zip(ours, other, strict=True)):
                raise RuntimeError(f"{case}: other keys and values than {COLD}")


def _seconds(model: Model, switch: Case, forget: Callable[[], None]) -> float:
    """Returns the seconds of one switch; of short ones the median of many, over all adapters in turn."""
    numbers = cycle(range(model.adapters))
    shape = (BATCH, model.shape.heads, model.shape.tokens, model.shape.head_dim)
    spent: list[float] = []
    while sum(spent) < _AT_LEAST or (len(spent) < 9 and sum(spent) < _AT_MOST):
        number = next(numbers)
        began = time.perf_counter()
        pairs = switch(number)
        last = pairs[-1][1]
        last[-1, -1, -1, -1].item()
        spent.append(time.perf_counter() - began)
        if len(pairs) != model.shape.layers or last.shape != shape:
            raise RuntimeError(f"{len(pairs)} layers of {tuple(last.shape)}")
        del pairs, last
    forget()
    return statistics.median(spent)


def _grown(switch: Case) -> int:
    """Returns the bytes that the worker takes, without those that it maps, while it holds the result; adapter 1 is new
    to the client that remembers.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be taken again unseen
    before = anonymous()
    held = switch(1)
    grown = anonymous() - before
    del held
    return max(grown, 0)


def _milliseconds(found: dict[str, list[float]], case: str) -> str:
    return str(Spread.of([seconds * 1000 for seconds in found[case]])) if case in found else "—"


def _against(found: dict[str, list[float]], case: str) -> str:
    return str(ratio(found[PEFT], found[case])) if case in found else "—"

"""One attack beside a neighbour, on a real service: what each of them saw, and what the service took."""

import contextlib
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from tests.attack.attacks import ATTACKS, LARGE_LAYERS, MANY, TENANT, WIDE_TOKENS, Attack
from tests.attack.neighbour import Seen
from tests.benchmarks.fleet import Hosted, Shape, percentile, publish_all
from tests.conftest import Server, running_server

_MIB: Final = 1 << 20
BUDGETS: Final = {
    "PREFIX_DEVICE_BYTES": 64 * _MIB,
    "PREFIX_RENDERING_BYTES": 64 * _MIB,
    "PREFIX_WORK_BYTES": 256 * _MIB,
}
SLACK: Final = 256 * _MIB
"""Bytes of memory that an attack may take beside the budgets."""
QUOTA: Final = 1 << 30
_WARM, _COLD = Shape(head_dim=16), Shape(head_dim=32)  # 320 and 640 KiB
_COLDS: Final = 150  # more than the device's budget holds
_LARGE: Final = {"num_virtual_tokens": 128, "num_layers": LARGE_LAYERS, "num_attention_heads": 8, "token_dim": 1024}
_WIDE: Final = {"num_virtual_tokens": WIDE_TOKENS, "num_layers": 1, "num_attention_heads": 1, "token_dim": 2}
_MANY: Final = {"num_virtual_tokens": 20, "num_layers": 4, "num_attention_heads": 8, "token_dim": 256}


@dataclass(frozen=True, slots=True)
class Stage:
    """A service with the neighbour's and the attacker's adapters, and their keys."""

    server: Server
    hosted: list[Hosted]
    neighbour_key: str
    attacker_keys: dict[str, str]
    idle: int

    @property
    def most_memory(self) -> int:
        """Bytes that the service may have in memory at any time."""
        return self.idle + sum(BUDGETS.values()) + SLACK


@dataclass(frozen=True, slots=True)
class Round:
    """What was seen alone and beside the attack: latencies in seconds, memory in bytes."""

    alone: Seen
    beside: Seen
    answers: Mapping[str, int]
    memory: int
    is_alive: bool

    def ratio(self, kind: str) -> float:
        """The neighbour's p99 beside the attack, in its own undisturbed ones; `kind` is warm or cold."""
        return percentile(getattr(self.beside, kind), 0.99) / percentile(getattr(self.alone, kind), 0.99)


@contextlib.contextmanager
def staged(folder: Path, progress: Callable[[str], None], **settings: str) -> Iterator[Stage]:
    """Start a service with these settings, and publish what attacks and neighbour need."""
    environment = {name: str(nbytes) for name, nbytes in BUDGETS.items()} | settings
    with running_server(folder / "data", environment=environment) as server:
        admin = server.client()
        for tenant in ("neighbour", TENANT):
            _made(admin.put(f"/v1/tenants/{tenant}", json={"max_bytes": QUOTA}))
        progress("publishing the neighbour's adapters")
        wanted = [("neighbour", f"n-{number:03}", _COLD if number else _WARM) for number in range(_COLDS + 1)]
        hosted = publish_all(server.url, server.admin_key, wanted, 2, lambda: None)
        progress("publishing the attacker's adapters")
        for name, sizes, count in (("large", _LARGE, 1), ("wide", _WIDE, 1), ("many", _MANY, 200)):
            for seed in range(count):
                body = {"config": _config(sizes), "init_weights": "random", "seed": seed}
                _made(admin.post(f"/v1/tenants/{TENANT}/adapters/{name}/versions", json=body))
        _made(admin.get(f"{MANY}@{count}"))
        keys = {scope: server.key(scope, TENANT) for scope in ("read", "write", "admin")}
        stage = Stage(server, hosted, server.key("read", "neighbour"), keys, 0)
        _watch(stage, 2.0)
        yield Stage(server, hosted, stage.neighbour_key, keys, memory(server))


def _config(sizes: Mapping[str, int]) -> dict[str, object]:
    given = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "m"}
    return {**given, **sizes, "inference_mode": True}


def _made(answer: httpx.Response) -> None:
    if answer.status_code not in (200, 201):
        raise RuntimeError(f"{answer.request.url}: {answer.status_code} {answer.text}")


def memory(server: Server) -> int:
    """Returns the bytes that the service has in memory now."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


class _Watcher(threading.Thread):
    """Notes the most memory that the service has, every 20 ms."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._server, self._end = server, threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.02):
            with contextlib.suppress(OSError, IndexError):
                self.most = max(self.most, memory(self._server))

    def __enter__(self) -> "_Watcher":
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self.join()


def _started(module: str, given: dict[str, Any]) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _tell(process, json.dumps(given))
    if process.stdout is None or process.stdout.readline() != "ready\n":
        raise RuntimeError(f"{module} did not start")
    return process


def _tell(process: subprocess.Popen[str], line: str) -> None:
    if process.stdin is None:
        raise RuntimeError("the process has no standard input")
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _watch(stage: Stage, seconds: float, *others: subprocess.Popen[str]) -> tuple[Seen, list[str]]:
    """Let the neighbour watch, and others begin in the same moment; what each of them wrote."""
    hosted = [asdict(one) for one in stage.hosted]
    given = {"url": stage.server.url, "key": stage.neighbour_key, "hosted": hosted, "seconds": seconds}
    neighbour = _started("tests.attack.neighbour", given)
    for process in (neighbour, *others):
        _tell(process, "go")
    seen, *written = [process.communicate(timeout=seconds + 120)[0] for process in (neighbour, *others)]
    return Seen(**json.loads(seen)), written


def tried(stage: Stage, attack: Attack, seconds: float) -> Round:
    """One round of an attack: the neighbour alone, then beside it, each for so many seconds."""
    alone, _ = _watch(stage, seconds)
    address = urlsplit(stage.server.url)
    target = {"host": address.hostname, "port": address.port, "keys": stage.attacker_keys, "seconds": seconds}
    attacker = _started("tests.attack.attacker", {"attack": attack.name, "target": target})
    with _Watcher(stage.server) as watcher:
        beside, (answers,) = _watch(stage, seconds, attacker)
    return Round(alone, beside, json.loads(answers), watcher.most, stage.server.process.poll() is None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """An attack's rounds, and what of the promises did not hold: first those that hold at any time, then those of
    time, which are judged by the median of the rounds."""

    attack: Attack
    rounds: list[Round]
    most_memory: int

    def ratio(self, kind: str) -> float:
        """The median of the rounds."""
        return statistics.median(one.ratio(kind) for one in self.rounds)

    @property
    def silence(self) -> float:
        """Seconds, the median of the rounds' longest."""
        return statistics.median(one.beside.silence for one in self.rounds)

    @property
    def answers(self) -> dict[str, int]:
        """What the attacker got, in all rounds."""
        statuses = {status for one in self.rounds for status in one.answers}
        return {status: sum(one.answers.get(status, 0) for one in self.rounds) for status in sorted(statuses)}

    @property
    def has_ended_service(self) -> bool:
        """Whether the service's process is gone."""
        return not self.rounds[-1].is_alive

    def broken(self) -> list[str]:
        """What must never be."""
        found = []
        if self.has_ended_service:
            found.append("the process died")
        if (most := max(one.memory for one in self.rounds)) > self.most_memory:
            found.append(f"{most / _MIB:.0f} MiB of memory, more than {self.most_memory / _MIB:.0f}")
        wrong = {status for status in self.answers if status.isdigit() and int(status) not in self.attack.allowed}
        if wrong:
            found.append(f"the attacker was answered {', '.join(sorted(wrong))}")
        for one in self.rounds:
            if one.beside.wrong:
                found.append(f"the neighbour got {one.beside.wrong} wrong bodies")
            if one.beside.statuses:
                found.append(f"the neighbour was answered {one.beside.statuses}")
        return found

    def slow(self) -> list[str]:
        """What took too long."""
        found = []
        if self.silence > 0.25:
            found.append(f"/livez was silent for {self.silence * 1000:.0f} ms")
        ratios = {kind: self.ratio(kind) for kind in ("warm", "cold")}
        found += [f"the neighbour's {kind} p99 grew {ratio:.1f} times" for kind, ratio in ratios.items() if ratio > 3]
        return found


def judged(stage: Stage, name: str, seconds: float, rounds: int) -> Verdict:
    """Try an attack so many times."""
    attack = ATTACKS[name]
    found = []
    for _ in range(rounds):
        found.append(tried(stage, attack, seconds))
        if not found[-1].is_alive:
            break
    return Verdict(attack, found, stage.most_memory)

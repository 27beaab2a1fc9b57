"""One attack beside a neighbour, on a real service: what each of them saw, and what the service took."""

import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from tests.attack.attacks import (
    DEEP_LAYERS,
    HEAVY_VERSIONS,
    LARGE_LAYERS,
    MANY,
    QUOTA,
    SMALL_QUOTA,
    SMALL_TENANT,
    TENANT,
    VERSIONS,
    WIDE_TOKENS,
    Attack,
)
from tests.attack.neighbour import Seen
from tests.benchmarks.fleet import Hosted, Shape, percentile, publish_all
from tests.conftest import Server, running_server

_MIB: Final = 1 << 20
BUDGETS: Final = {
    "PREFIX_DEVICE_BYTES": 64 * _MIB,
    "PREFIX_RENDERING_BYTES": 64 * _MIB,
    "PREFIX_WORK_BYTES": 256 * _MIB,
}
_SILENCE: Final = 0.25  # seconds
_STALL: Final = 0.02
"""Seconds of processor time that the machine's own walk may take longer than usual: it takes 2 ms longer at most beside
the attacks, and 50 ms longer where the host took memory away."""
_MOST_TRIES: Final = 4
"""Times as many rounds are tried as must count."""
_SLOWER: Final = 3  # times the neighbour's own undisturbed p99
LIMITS: Final = {"PREFIX_MAX_CONNECTIONS": "1000", "PREFIX_MAX_IN_FLIGHT_TENANT": "256"}
SLACK: Final = 256 * _MIB
"""Bytes of memory that an attack may take beside the budgets."""
_WARM, _COLD = Shape(head_dim=16), Shape(head_dim=32)  # 320 and 640 KiB
_COLDS: Final = 110  # more than the device's budget holds
_LARGE: Final = {"num_virtual_tokens": 128, "num_layers": LARGE_LAYERS, "num_attention_heads": 8, "token_dim": 1024}
_WIDE: Final = {"num_virtual_tokens": WIDE_TOKENS, "num_layers": 1, "num_attention_heads": 1, "token_dim": 2}
_DEEP: Final = {"num_virtual_tokens": 4, "num_layers": DEEP_LAYERS, "num_attention_heads": 2, "token_dim": 16}
_HEAVY_BYTES: Final = HEAVY_VERSIONS * 65 * _MIB
"""Bytes that the heavy versions count for. They are all zeros, so that the disk holds them once."""
_ALIAS: Final = "/v1/tenants/neighbour/adapters/n-000/aliases/moved"
_MANY: Final = {"num_virtual_tokens": 20, "num_layers": 4, "num_attention_heads": 8, "token_dim": 256}


@dataclass(frozen=True, slots=True)
class Stage:
    """A service with the neighbour's and the attacker's adapters, and their keys."""

    server: Server
    bodies: dict[str, str]
    neighbour_key: str
    attacker_keys: dict[str, str]
    idle: int

    def most_memory(self, attack: Attack) -> int:
        """Returns the bytes that the service may have in memory at any time of an attack."""
        unused = 0 if attack.works else BUDGETS["PREFIX_WORK_BYTES"]
        return self.idle + sum(BUDGETS.values()) - unused + SLACK


@contextlib.contextmanager
def staged(folder: Path, progress: Callable[[str], None], **settings: str) -> Iterator[Stage]:
    """Start a service with these settings, and publish what attacks and neighbour need."""
    environment = {name: str(nbytes) for name, nbytes in BUDGETS.items()} | LIMITS | settings
    with running_server(folder / "data", environment=environment) as server:
        admin = server.client()
        for tenant, quota in (("neighbour", QUOTA), (TENANT, QUOTA + _HEAVY_BYTES), (SMALL_TENANT, SMALL_QUOTA)):
            _made(admin.put(f"/v1/tenants/{tenant}", json={"max_bytes": quota}))
        progress("publishing the neighbour's adapters")
        wanted = [("neighbour", f"n-{number:03}", _COLD if number else _WARM) for number in range(_COLDS + 1)]
        hosted = publish_all(server.url, server.admin_key, wanted, 2, lambda: None)
        progress("publishing the attacker's adapters")
        for name, sizes, count, weights in (
            ("large", _LARGE, 1, "random"),
            ("wide", _WIDE, 1, "random"),
            ("deep", _DEEP, 1, "random"),
            ("heavy", _LARGE, HEAVY_VERSIONS, "zero"),
            ("many", _MANY, VERSIONS, "random"),
        ):
            for number in range(count):
                config = {**_config(sizes), "base_model_name_or_path": f"m{number}"}
                body = {"config": config, "init_weights": weights, "seed": number}
                _made(admin.post(f"/v1/tenants/{TENANT}/adapters/{name}/versions", json=body))
        _made(admin.get(f"{MANY}@{count}"))
        keys = {scope: server.key(scope, TENANT) for scope in ("read", "write", "admin")}
        keys["small"] = server.key("write", SMALL_TENANT)
        bodies = {one.path: _body(admin.get(one.path), one) for one in hosted}
        stage = Stage(server, bodies, server.key("write", "neighbour"), keys, 0)
        _watch(stage, 2.0)
        yield replace(stage, idle=memory(server))


def _config(sizes: Mapping[str, int]) -> dict[str, object]:
    given = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "m"}
    return {**given, **sizes, "inference_mode": True}


def _made(answer: httpx.Response) -> None:
    if answer.status_code not in (200, 201):
        raise RuntimeError(f"{answer.request.url}: {answer.status_code} {answer.text}")


def _body(answer: httpx.Response, hosted: Hosted) -> str:
    _made(answer)
    if not hosted.is_right(answer.content):
        raise RuntimeError(f"{answer.request.url}: other keys and values than were published")
    return hashlib.sha256(answer.content).hexdigest()


def memory(server: Server) -> int:
    """Returns the bytes that the service has in memory now."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def on_disk(server: Server) -> int:
    """Returns the bytes of all blobs that the service has on the disk now."""
    return sum(path.stat().st_size for path in (server.data_dir / "blobs").glob("??/*"))


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


def _watch(stage: Stage, seconds: float, *others: subprocess.Popen[str]) -> tuple[Seen, float, list[str]]:
    """Let the neighbour watch, and others begin in the same moment.

    Returns what the neighbour saw, the seconds that the machine stalled, and what the others wrote.
    """
    given: dict[str, Any] = {"url": stage.server.url, "key": stage.neighbour_key, "bodies": stage.bodies}
    given |= {"alias": _ALIAS, "seconds": seconds}
    machine = _started("tests.attack.machine", {"seconds": seconds})
    processes = [_started("tests.attack.neighbour", given), machine, *others]
    for process in processes:
        _tell(process, "go")
    seen, stall, *written = [process.communicate(timeout=seconds + 120)[0] for process in processes]
    return Seen(**json.loads(seen)), json.loads(stall), written


@dataclass(frozen=True, slots=True)
class Attacked:
    """What the neighbour and the attacker saw, the seconds that the machine stalled, the most memory that the service
    had, and the blobs that came on the disk, in bytes."""

    seen: Seen
    stall: float
    answers: Mapping[str, int]
    memory: int
    disk: int
    is_alive: bool

    def broken(self, stage: Stage, attack: Attack) -> list[str]:
        """Returns what must never be, whatever the machine."""
        found = [] if self.is_alive else ["the process died"]
        if self.memory > (most := stage.most_memory(attack)):
            found.append(f"{self.memory / _MIB:.0f} MiB of memory, more than {most / _MIB:.0f}")
        if self.disk > attack.disk:
            found.append(f"{self.disk / _MIB:.0f} MiB came on the disk, more than {attack.disk / _MIB:.0f}")
        wrong = {status for status in self.answers if status.isdigit() and int(status) not in attack.allowed}
        if wrong:
            found.append(f"the attacker was answered {', '.join(sorted(wrong))}")
        if self.seen.wrong:
            found.append(f"the neighbour got {self.seen.wrong} wrong bodies")
        if self.seen.statuses:
            found.append(f"the neighbour was answered {self.seen.statuses}")
        return found


def attacked(stage: Stage, attack: Attack, seconds: float) -> Attacked:
    """Attack for so many seconds, while the neighbour watches."""
    address = urlsplit(stage.server.url)
    target = {"host": address.hostname, "port": address.port, "keys": stage.attacker_keys, "seconds": seconds}
    before = on_disk(stage.server)
    attacker = _started("tests.attack.attacker", {"attack": attack.name, "target": target})
    with _Watcher(stage.server) as watcher:
        seen, stall, (answers,) = _watch(stage, seconds, attacker)
    disk = on_disk(stage.server) - before
    return Attacked(seen, stall, json.loads(answers), watcher.most, disk, stage.server.process.poll() is None)


@dataclass(frozen=True, slots=True)
class Round:
    """What the neighbour saw alone, and then beside an attack. `stall`: the seconds that the machine itself stalled."""

    alone: Seen
    beside: Attacked
    stall: float


@dataclass(slots=True)
class Verdict:
    """An attack's rounds, and what never may be but was.

    The times of a round count unless the machine itself stalled in it; where it stalled in all, they count too.
    """

    attack: Attack
    rounds: list[Round] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def has_ended_service(self) -> bool:
        """Whether the service's process is gone."""
        return not self.rounds[-1].beside.is_alive

    @property
    def undisturbed(self) -> list[Round]:
        """The rounds in which the machine did not stall."""
        return [one for one in self.rounds if one.stall < _STALL]

    @property
    def _counted(self) -> list[Round]:
        return self.undisturbed or self.rounds

    @property
    def memory(self) -> int:
        """The most bytes that the service had."""
        return max(one.beside.memory for one in self.rounds)

    @property
    def silence(self) -> float:
        """Seconds between two signs of life: the longest of each round, the median of the rounds."""
        return statistics.median(one.beside.seen.silence for one in self._counted)

    @property
    def answers(self) -> Counter[str]:
        """What the attacker got."""
        return sum((Counter(one.beside.answers) for one in self.rounds), Counter[str]())

    def latency(self, kind: str, share: float) -> tuple[float, float]:
        """Returns the neighbour's percentile beside the attack and alone, in seconds: medians of the rounds. `kind` is
        warm, cold or move."""
        rounds = ([one.beside.seen for one in self._counted], [one.alone for one in self._counted])
        beside, alone = (statistics.median(percentile(getattr(one, kind), share) for one in seen) for seen in rounds)
        return beside, alone

    def slow(self) -> list[str]:
        """Returns what took too long."""
        found = [f"/livez was silent for {self.silence * 1000:.0f} ms"] if self.silence > _SILENCE else []
        for kind in ("warm", "cold", "move"):
            ratios = [
                percentile(getattr(one.beside.seen, kind), 0.99) / percentile(getattr(one.alone, kind), 0.99)
                for one in self._counted
            ]
            if (ratio := statistics.median(ratios)) > _SLOWER:
                found.append(f"the neighbour's {kind} p99 grew {ratio:.1f} times")
        return found


def judged(stage: Stage, attack: Attack, seconds: float, rounds: int) -> Verdict:
    """Try an attack until so many rounds count, unless it ends the service.

    If its times do not hold, it is tried as often again, so that what else the machine did weighs less.
    """
    verdict = Verdict(attack)
    for _ in range(_MOST_TRIES * rounds):
        alone, stall, _ = _watch(stage, seconds)
        beside = attacked(stage, attack, seconds)
        verdict.rounds.append(Round(alone, beside, max(stall, beside.stall)))
        verdict.broken += beside.broken(stage, attack)
        counted = len(verdict.undisturbed)
        if verdict.has_ended_service or counted == 2 * rounds or (counted == rounds and not verdict.slow()):
            break
    return verdict

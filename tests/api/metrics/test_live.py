"""Live numbers: counted by slot, kept for an hour, the same whichever worker answers."""

import json
import time
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from prefix_service.api.metrics import live as module
from prefix_service.api.metrics.live import Live
from prefix_service.api.metrics.live_counts import BOUNDS, Sample, quantile
from prefix_service.api.metrics.worker_metrics import Place
from prefix_service.registry.admission import InFlight
from prefix_service.registry.report import TierReport


def place(folder: Path, number: int) -> Place:
    return Place(folder, number, BytesIO())  # nobody else asks for the lock


def report(hits: int, used: int) -> TierReport:
    return TierReport("device", "cpu", 100, used, 0, 1, 0, 0, hits, 0, 0, 0, 0, 0, 0.0)


def end_slot(live: Live, slot: int) -> None:
    """Ends the current slot, as the passing of time does."""
    sample = live._sample(slot)
    live._own.append(sample)
    if live._place is not None:
        module._write(live._place, sample)


@pytest.fixture
def slot(monkeypatch: pytest.MonkeyPatch) -> int:
    """A slot, which is the newest that has ended."""
    slot = 1_000_000
    monkeypatch.setattr(time, "time", lambda: (slot + 1) * 5.0 + 2)
    return slot


def test_workers_are_one_service(tmp_path: Path, slot: int) -> None:
    """Requests, bytes, problems, times and tiers of all workers are summed, in the answer of each."""
    workers = [Live(place(tmp_path, number)) for number in range(2)]
    for number, live in enumerate(workers):
        in_flight = InFlight(10, 5)
        in_flight.begin("acme")
        hits = iter((3 + number, 10))
        live.watch(partial(lambda hits: [report(next(hits), 20)], hits), in_flight)
        live.count("acme", None, 0.004, 1000, is_cold=number == 0)
        live.count("beta", "not-found", 0.004, 50, is_cold=False)
        live.count(None, None, 0.004, 7, is_cold=False)
        end_slot(live, slot - 1)
        live.count("acme", None, 40, 1, is_cold=False)
        end_slot(live, slot)
    found = [live.read(None, 0)() for live in workers]
    assert found[0] == found[1]
    assert found[0]["at"] == [(slot - 1) * 5, slot * 5]
    assert found[0]["requests"] == [6, 2]
    assert found[0]["bytes"] == [2114, 2]
    assert found[0]["cold_loads"] == [1, 0]
    assert found[0]["problems"] == {"not-found": [2, 0]}
    assert found[0]["p99"][1] == BOUNDS[-1]
    assert (found[0]["in_flight"], found[0]["in_flight_limit"]) == ([2, 2], 20)
    (tier,) = found[0]["tiers"]
    assert (tier["hits"], tier["used"], tier["budget"]) == ([7, 13], [40, 40], [200, 200])
    assert found[0]["tenants"][0] == {"tenant": "acme", "requests": 4, "bytes": 2002}


def test_a_tenant_sees_itself_alone(tmp_path: Path, slot: int) -> None:
    """Nothing of another tenant, of the process, or of its tiers."""
    live = Live(place(tmp_path, 0))
    in_flight = InFlight(10, 5)
    in_flight.begin("beta")
    live.watch(lambda: [report(1, 20)], in_flight)
    live.count("beta", "too-large", 0.004, 1000, is_cold=False)
    live.count("acme", None, 0.004, 3, is_cold=False)
    end_slot(live, slot)
    found = live.read("acme", 0)()
    assert (found["requests"], found["bytes"], found["problems"], found["in_flight"]) == ([1], [3], {}, [0])
    assert (found["tiers"], found["tenants"], found["in_flight_limit"]) == ([], [], None)
    assert "beta" not in json.dumps(found)


def test_an_hour_is_kept(tmp_path: Path, slot: int) -> None:
    """Older slots are gone, from the answer and from the disk; `since` leaves out what is known already."""
    live, other = Live(place(tmp_path, 0)), Live(place(tmp_path, 1))
    for number in range(slot - 800, slot + 1):
        end_slot(live, number)
    assert len(live.read(None, 0)()["at"]) == len(other.read(None, 0)()["at"]) == 720
    assert len(list(tmp_path.glob("live-0-*.jsonl"))) <= 62
    assert live.read(None, slot * 5 - 1)()["at"] == other.read(None, slot * 5)()["at"] == [slot * 5]
    assert live.read(None, slot * 5 + 1)()["at"] == []


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path, slot: int) -> None:
    """The other lines of the file count."""
    live, other = Live(place(tmp_path, 0)), Live(place(tmp_path, 1))
    live.count("acme", None, 0.1, 1, is_cold=False)
    end_slot(live, slot)
    (file,) = tmp_path.glob("live-0-*.jsonl")
    file.write_bytes(file.read_bytes() + b'{"slot": 10')
    assert other.read(None, 0)()["requests"] == [1]


def test_a_file_is_parsed_once(tmp_path: Path, slot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of a thousand tenants takes seconds: a stream, which asks for the last slots, must not let them go."""
    live, other = Live(place(tmp_path, 0)), Live(place(tmp_path, 1))
    for number in range(slot - 100, slot + 1):
        end_slot(live, number)
    read, parsed = module._read, list[str]()

    def watched_read(file: Path) -> list[Sample]:
        parsed.append(file.name)
        return read(file)

    monkeypatch.setattr(module, "_read", watched_read)
    assert len(other.read(None, 0)()["at"]) == 101
    assert len(other.read(None, slot * 5)()["at"]) == 1
    assert len(other.read(None, 0)()["at"]) == 101
    assert len(parsed) == len(set(parsed)) > 1


def test_tenants_are_bounded(slot: int) -> None:
    """Beyond a thousand in a slot they are counted together, and none is lost in the sums."""
    live = Live(None)
    for number in range(1500):
        live.count(f"t{number}", None, 0.1, 1, is_cold=False)
    assert len(live._now) <= 1001
    end_slot(live, slot)
    assert live.read(None, 0)()["requests"] == [1500]
    assert live.read("t0", 0)()["requests"] == [1]


@pytest.mark.parametrize(
    ("counts", "part", "expected"),
    [
        ({}, 0.5, None),
        ({0: 10}, 0.5, 0.0005),
        ({3: 10}, 0.5, 0.0075),
        ({0: 99, 8: 1}, 0.99, 0.001),
        ({0: 98, 8: 2}, 0.99, 0.375),
        ({len(BOUNDS): 1}, 0.99, 30.0),
    ],
)
def test_quantiles(counts: dict[int, int], part: float, expected: Any) -> None:
    """Quantiles are estimated as Prometheus does; one beyond the last bound is shown as that bound."""
    seconds = [counts.get(number, 0) for number in range(len(BOUNDS) + 1)]
    assert quantile(seconds, part) == expected

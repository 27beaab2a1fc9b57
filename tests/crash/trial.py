"""One interruption: a change is killed, or one of its calls fails; afterwards the folder must be whole."""

import shutil
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from prefix_service.catalog import garbage
from prefix_service.data_folder.opening import opened
from tests.crash.child import DONE, forked
from tests.crash.folder import Snapshot, leftovers, serving, settings_of, snapshot
from tests.crash.operations import CASES, OPERATIONS
from tests.crash.strace import Call, calls_in, traced

KILL: Final = "signal=KILL"
_REFUSALS: Final = {
    "error=EIO": {"storage-failed"},
    "error=ENOSPC": {"out-of-space"},
    "error=EDQUOT": {"out-of-space", "storage-failed"},  # SQLite tells a quota from nothing else
}


@dataclass(frozen=True)
class Base:
    """A prepared folder, its content before and after the change, and the calls that the change makes."""

    operation: str
    case: str
    folder: Path
    before: Snapshot
    after: Snapshot
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Point:
    """The `nth` call of this name in a change, and its fault: `signal=KILL` or `error=EIO`."""

    base: Base
    call: str
    nth: int
    fault: str


@dataclass(frozen=True)
class Verdict:
    """The change was found `whole` or `absent`, or something is `wrong`, for a reason."""

    point: Point
    found: str
    reason: str = ""


class Wrong(Exception):
    """A state that must never be."""


def base_of(operation: str, case: str, folder: Path) -> Base:
    """Prepares a folder, and makes the change once on a copy, undisturbed.

    Raises:
        Wrong: it fails, or writes in several threads, for each of which strace counts anew.
    """
    folder.mkdir(parents=True)
    OPERATIONS[operation].prepare(folder / "data")
    with _copy(folder) as data_dir:
        with forked(operation, case, data_dir) as child, traced(child.pid, data_dir.with_name("trace")):
            _require(child.change() == DONE, f"{operation} of {case} fails undisturbed")
        calls = calls_in(data_dir.with_name("trace"))
        after = _restarted(data_dir)
    with _copy(folder) as data_dir:
        before = _restarted(data_dir)
    _require(len({call.thread for call in calls}) == 1, f"{operation} writes in several threads")
    return Base(operation, case, folder, before, after, tuple(calls))


def points_of(base: Base, fault: str) -> list[Point]:
    """Returns every point of a change at which this fault can happen, in their order."""
    seen: Counter[str] = Counter()
    points = []
    for call in base.calls:
        seen[call.name] += 1
        points.append(Point(base, call.name, seen[call.name], fault))
    return points


def attempted_twice(data_dir: Path, *inject: str) -> tuple[list[str | None], list[Call]]:
    """Publishes the same new version twice in one process, and returns the outcomes and the calls of both attempts;
    `inject` is for the first.
    """
    name = "second version"
    OPERATIONS[name].prepare(data_dir)
    outcomes, calls = [], []
    with forked(name, CASES[0], data_dir) as child:
        for faults in (inject, ()):
            trace = data_dir.with_name("trace")
            with traced(child.pid, trace, *faults):
                outcomes.append(child.change())
            calls += calls_in(trace)
    return outcomes, calls


def tried(point: Point) -> Verdict:
    """Interrupts a change at this point, and returns the verdict."""
    try:
        found = _killed(point) if point.fault == KILL else _failed(point)
    except Exception:  # noqa: BLE001 - it is told
        return Verdict(point, "wrong", traceback.format_exc())
    return Verdict(point, found)


def _killed(point: Point) -> str:
    base = point.base
    with _copy(base.folder) as data_dir:
        with forked(base.operation, base.case, data_dir) as child, _traced(point, child.pid, data_dir):
            answer = child.change()
        _require(answer in (DONE, None), f"the change ended with {answer}")
        return _recovered(base, data_dir, acknowledged=answer == DONE)


def _failed(point: Point) -> str:
    """Returns the verdict on a failed call, after which the same process goes on."""
    base = point.base
    with _copy(base.folder) as data_dir:
        with forked(base.operation, base.case, data_dir) as child:
            with _traced(point, child.pid, data_dir):
                answer = child.change()
            trace = calls_in(data_dir.with_name("trace"))
            failed = [call for call in trace if call.injected]
            _require(len(failed) == 1, f"{len(failed)} calls failed instead of one, and the change ended with {answer}")
            _require(answer == DONE or answer in _refusals(point, *failed), f"the change ended with {answer}")
            if _is_committed(trace):
                answer = DONE  # too late for the change to be undone: it was refused, and yet it is there
            if OPERATIONS[base.operation].serves:
                seen, expected = child.look(), base.after if answer == DONE else base.before
                _require(seen == expected, f"after {answer} there was {_difference(seen, expected)}")
            if answer != DONE or OPERATIONS[base.operation].repeatable:
                again = child.change()
                _require(again == DONE, f"the second attempt ended with {again}")
        _recovered(base, data_dir, acknowledged=True)
        return "whole" if answer == DONE else "absent"


def _refusals(point: Point, failed: Call) -> set[str]:
    # SQLite notices a full disk only when it writes.
    return _REFUSALS[point.fault] | ({"storage-failed"} if "catalog.sqlite" in failed.path else set())


def _is_committed(trace: list[Call]) -> bool:
    """Returns whether SQLite's last flush failed, after the end of the journal, which is what makes a commit."""
    failed = next(index for index, call in enumerate(trace) if call.injected)
    return trace[failed].path.endswith("-journal") and trace[failed - 1].name == "ftruncate"


def _recovered(base: Base, data_dir: Path, *, acknowledged: bool) -> str:
    """Returns the verdict on what a restarted service finds, and makes the change once more."""
    operation = OPERATIONS[base.operation]
    seen = _restarted(data_dir)
    is_whole = seen == base.after
    _require(is_whole or not acknowledged, f"acknowledged, but: {_difference(seen, base.after)}")
    _require(is_whole or seen == base.before, f"neither whole nor absent: {_difference(seen, base.before)}")
    if not is_whole or operation.repeatable:
        with operation.act(data_dir, base.case) as change:
            change()
    with serving(data_dir) as service:
        seen = snapshot(service)
    _require(seen == base.after, f"made once more, but: {_difference(seen, base.after)}")
    return "whole" if is_whole else "absent"


def _restarted(data_dir: Path) -> Snapshot:
    """Returns the snapshot of a restarted service, whose collection must leave just what the catalog names."""
    with opened(settings_of(data_dir)), serving(data_dir) as service:
        seen = snapshot(service)
        lost = service.collector().reconcile()
        _require(not lost, f"blobs are lost: {lost}")
        service.remove_deleted()
        with patch.object(garbage, "CONDEMNED", 0.0):  # as if the time were over that a killed collector's digests wait
            service.collector().collect()
        _require(not leftovers(service), f"too many or too few blobs after a collection: {leftovers(service)}")
        return seen


@contextmanager
def _copy(folder: Path) -> Iterator[Path]:
    """Yields a copy of a prepared folder, for one trial."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        if (folder / "data").exists():
            shutil.copytree(folder / "data", Path(place) / "data")
        yield Path(place) / "data"


def _traced(point: Point, pid: int, data_dir: Path) -> AbstractContextManager[None]:
    return traced(pid, data_dir.with_name("trace"), f"{point.call}:{point.fault}:when={point.nth}")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Wrong(otherwise)


def _difference(seen: Any, expected: Snapshot) -> str:
    if not isinstance(seen, dict):
        return str(seen)
    names = [name for name in {**seen, **expected} if seen.get(name) != expected.get(name)]
    return ", ".join(f"{name}: {seen.get(name)} instead of {expected.get(name)}" for name in names)

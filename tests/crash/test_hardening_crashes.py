"""A process is killed, or a call fails, at every write of a change; and these writes have the right order."""

import re
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import anyio
import pytest

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.deletions import Deletions
from prefix_service.catalog.garbage import Garbage
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.data_folder.collector import Collector
from prefix_service.errors import NotFound
from prefix_service.prefix.references import parse_reference
from tests.crash import strace
from tests.crash.campaign import ERRORS, Campaign, campaign
from tests.crash.child import DONE
from tests.crash.folder import serving
from tests.crash.operations import CASES, publish, start
from tests.crash.trial import KILL, Verdict, attempted_twice

KILLS, FAILURES = 240, 120  # `python -m tests.crash` makes thousands


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    """Yields trials in processes of their own."""
    strace.require()
    with campaign(tmp_path_factory.mktemp("crash")) as running:
        yield running


def wrong(verdicts: list[Verdict]) -> list[str]:
    """Returns the verdicts that must never be, as texts from which they can be repeated."""
    return [
        f"{one.point.base.operation}, {one.point.call} {one.point.nth}, {one.point.fault}: {one.reason}"
        for one in verdicts
        if one.found == "wrong"
    ]


def test_hardening_45_kill_at_every_write(trials: Campaign) -> None:
    """After a kill at any call and a restart, the change is whole or absent; what was acknowledged is whole, all
    versions are byte-identical, a collection leaves just the blobs that are named, and the change can be made again.
    """
    points = trials.points(KILL, wanted=KILLS)
    verdicts = list(trials.tried(points))
    assert wrong(verdicts) == []
    assert len(verdicts) >= KILLS
    kinds = {point.call for point in points}
    assert kinds >= {"write", "pwrite64", "fsync", "fdatasync", "rename", "link", "unlink", "ftruncate", "mkdir"}
    found = Counter((verdict.point.base.operation, verdict.found) for verdict in verdicts)
    for operation in ("first publish", "second version", "alias move", "deletion", "tenant deletion"):
        assert found[operation, "whole"], found
        assert found[operation, "absent"], found


def test_hardening_47_failures_at_every_write(trials: Campaign) -> None:
    """If any call fails, a full disk raises OutOfSpace and an I/O error StorageFailed; nothing of the change is
    visible, earlier content stays, and the same process makes the change at the next attempt.
    """
    verdicts = list(trials.tried(trials.points(*ERRORS, wanted=FAILURES)))
    assert wrong(verdicts) == []
    assert {verdict.point.fault for verdict in verdicts} == set(ERRORS)
    assert any(verdict.found == "absent" for verdict in verdicts)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Returns the path of a data folder to be made."""
    return tmp_path / "data"


def places(data_dir: Path, calls: list[strace.Call]) -> list[tuple[str, str]]:
    """Returns each call with the kind of its file, without repetition."""
    kinds = {"staging/.*": "staged", "blobs": "root", "blobs/../.{64}": "blob", "blobs/..": "folder", "": "data"}
    kinds |= {"catalog.sqlite-journal": "journal", "catalog.sqlite": "catalog", "blobs/staging/.*": "staged"}
    told: list[tuple[str, str]] = []
    for call in calls:
        place = call.path.removeprefix(str(data_dir)).removeprefix("/")
        kind = next((kind for pattern, kind in kinds.items() if re.fullmatch(pattern, place)), place)
        if told[-1:] != [(call.name, kind)]:
            told.append((call.name, kind))
    return told


def test_hardening_46_durable_before_visible(trials: Campaign, data_dir: Path) -> None:
    """Once its digest is held, each blob is flushed, renamed, and its folder flushed, before the catalog names it: its
    journal is flushed before the catalog's file is written, and that before the journal ends.
    """
    outcomes, calls = trials.call(attempted_twice, data_dir)
    assert outcomes == [DONE, DONE]
    steps = places(data_dir, calls)
    held = steps.index(("fdatasync", "journal"), steps.index(("ftruncate", "journal"))) + 1
    assert ("rename", "staged") not in steps[:held]
    first = steps[held : steps.index(("ftruncate", "journal"), held) + 1]
    order = [step for step in first if step[0] not in ("utimensat", "mkdir", "unlink") and step != ("fsync", "root")]
    blob = [("fsync", "staged"), ("rename", "staged"), ("fsync", "folder")]
    assert ("write", "staged") in steps[:held]
    begin = order.index(("pwrite64", "journal"))
    assert [step for step in order[:begin] if step != ("write", "staged")] == [*blob, *blob]
    assert order[begin : begin + 8] == [
        ("pwrite64", "journal"),
        ("fdatasync", "journal"),
        ("fdatasync", "data"),
        ("pwrite64", "journal"),
        ("fdatasync", "journal"),
        ("pwrite64", "catalog"),
        ("fdatasync", "catalog"),
        ("ftruncate", "journal"),
    ]
    made = first.index(("mkdir", "folder"))
    assert first[made + 1] == ("fsync", "root")


def test_hardening_47_a_failed_fsync_is_never_repeated(trials: Campaign, data_dir: Path) -> None:
    """The service gives a file up that it could not flush, and the next attempt writes all bytes into another file."""
    outcomes, calls = trials.call(attempted_twice, data_dir, "fsync:error=EIO:when=1")
    assert outcomes == ["storage-failed", DONE]
    failed = next(index for index, call in enumerate(calls) if call.injected)
    lost = calls[failed].path
    assert "staging" in lost
    assert [call.name for call in calls[failed + 1 :] if call.path == lost] == ["unlink"]
    written = [{call.path for call in part if call.name == "write"} for part in (calls[:failed], calls[failed:])]
    assert written[1], "nothing was written anew"
    assert not written[0] & written[1]


def test_hardening_42_what_is_published_during_a_collection_stays(data_dir: Path) -> None:
    """A collection keeps blobs that were old and unnamed when it asked the catalog, and are named when it comes to
    remove them; it removes the others.
    """
    start(data_dir)
    with serving(data_dir) as service:
        for case in CASES[:2]:
            anyio.run(publish, service.cases.publisher, "acme", "a", case)
        whole = [Catalog(service.database).resolve("acme", parse_reference(f"a@{number}")) for number in (1, 2)]
        anyio.run(service.cases.adapters.delete, "acme", parse_reference("a"), COMMAND_LINE)
        while Deletions(service.database).remove_slice():
            pass
        time.sleep(2)

        class Racing(Garbage):
            """A collection during which a version is published, right after it has asked the catalog."""

            def wanted(self, digests: Collection[str], grace: float) -> set[str]:
                found = super().wanted(digests, grace)
                anyio.run(publish, service.cases.publisher, "acme", "a", CASES[0])
                return found

        collected = Collector(Racing(service.database), service.blobs, grace=1).collect()
        assert collected.blobs == 2
        for digest in (whole[0].weights, whole[0].key_values):
            assert service.blobs.read(digest)
        for digest in (whole[1].weights, whole[1].key_values):
            with pytest.raises(NotFound):
                service.blobs.read(digest)

"""`library.statistics`: figures are computed once, within admitted memory, also after stored bytes were lost."""

import asyncio
import json
from collections.abc import Generator
from pathlib import Path

import pytest

from prefix_service.errors import CorruptBlob, OutOfSpace
from prefix_service.library import statistics
from prefix_service.library.statistics import VersionStatistics
from prefix_service.library.wiring import UseCases
from prefix_service.prefix.bins import Rows, Shape
from prefix_service.prefix.norms import Norms, measuring
from prefix_service.registry.admission import Admission
from tests.library.test_library import blob, cases, database, published

__all__ = ["cases", "database"]

CASES = ["llama-n20-emb", "gpt2-n20-proj-trainstate"]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Returns the shapes that were measured."""
    shapes: list[Shape] = []

    def counting(shape: Shape, rows: Rows) -> Generator[None, None, Norms]:
        shapes.append(shape)
        return measuring(shape, rows)

    monkeypatch.setattr(statistics, "measuring", counting)
    return shapes


def _figures(cases: UseCases, admission: Admission | None = None) -> VersionStatistics:
    """Returns statistics that remember nothing yet."""
    return VersionStatistics(cases.library._encodings, admission or cases.library._admission)


def _lose(path: Path, damaged: bool) -> None:
    if damaged:
        path.write_bytes(b"x" * path.stat().st_size)
    else:
        path.unlink()


async def test_they_are_computed_once(cases: UseCases, counted: list[Shape]) -> None:
    """Callers in parallel and later ones get one computation's result, and nothing becomes resident for it."""
    version = await published(cases, CASES[0])
    figures = cases.statistics
    found = await asyncio.gather(*(figures.norms(version) for _ in range(3)))
    assert found == [await figures.norms(version)] * 3
    assert len(counted) == 1
    assert cases.residency.versions(None) == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("damaged", [False, True])
async def test_lost_keys_and_values_are_encoded_again(
    cases: UseCases, tmp_path: Path, case: str, damaged: bool
) -> None:
    """The figures are those of the bytes before, and the bytes are stored again."""
    version = await published(cases, case)
    expected = await _figures(cases).norms(version)
    _lose(blob(tmp_path, version.key_values), damaged)
    figures = _figures(cases)
    assert await figures.norms(version) == expected
    assert blob(tmp_path, version.key_values).exists()
    _lose(blob(tmp_path, version.key_values), damaged)
    compared = json.loads(await figures.comparison(version, version))
    assert compared["by_layer"][0]["keys"]["relative"] == 0


async def test_what_cannot_be_encoded_again(cases: UseCases, tmp_path: Path) -> None:
    """Without weights there are no figures, and the error says that stored bytes are lost."""
    version = await published(cases, CASES[0])
    blob(tmp_path, version.key_values).unlink()
    blob(tmp_path, version.weights).unlink()
    with pytest.raises(CorruptBlob, match=version.weights):
        await _figures(cases).norms(version)


async def test_memory_is_admitted_first(cases: UseCases, counted: list[Shape]) -> None:
    """Where there is no memory for the figures, nothing is read or computed."""
    version = await published(cases, CASES[0])
    admission = Admission(in_flight=8, in_flight_tenant=8, work_bytes=1 << 20, processors=2)
    figures = _figures(cases, admission)
    with pytest.raises(OutOfSpace):
        await figures.norms(version)
    with pytest.raises(OutOfSpace):
        await figures.comparison(version, version)
    assert counted == []
    assert admission.memory.used == 0


async def test_a_caller_that_leaves_ends_the_computation(cases: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once nobody waits, the computation stops, its file is closed, and its memory is free."""
    began, closed = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless(_shape: Shape, _rows: Rows) -> Generator[None, None, Norms]:
        loop.call_soon_threadsafe(began.set)
        try:
            while True:
                yield
        finally:
            loop.call_soon_threadsafe(closed.set)

    monkeypatch.setattr(statistics, "measuring", endless)
    version = await published(cases, CASES[0])
    figures = _figures(cases)
    asking = asyncio.create_task(figures.norms(version))
    await began.wait()
    asking.cancel()
    async with asyncio.timeout(60):
        await closed.wait()
    with pytest.raises(asyncio.CancelledError):
        await asking

"""A stream waits outside of everything that has answered its request."""

import gc
from pathlib import Path
from types import CoroutineType

import httpx

from prefix_service.api.app import create_app
from prefix_service.settings import Settings
from tests.api.apps import served

STREAM = {"Accept": "text/event-stream"}


def waiting_in(package: str) -> list[str]:
    """Returns the coroutines of a package that are suspended in this process."""
    found = [it for it in gc.get_objects() if type(it) is CoroutineType and it.cr_frame is not None]
    return sorted(it.__qualname__ for it in found if f"/{package}/" in it.cr_code.co_filename)


def test_a_stream_that_waits_holds_nothing_of_fastapi(tmp_path: Path) -> None:
    """Both kinds of streams have begun, and none of the coroutines that led to them is left behind."""
    with served(create_app(Settings(data_dir=tmp_path, dev=True))) as url:
        before = waiting_in("fastapi")  # the lifespan's
        for path in ("/v1/changes", "/v1/live"):
            with httpx.stream("GET", url + path, headers=STREAM, timeout=60) as stream:
                lines = stream.iter_lines()  # kept: the answer is closed with it
                next(lines)
                assert waiting_in("fastapi") == before


def test_who_is_refused_a_stream_gets_a_problem(tmp_path: Path) -> None:
    """The refusal is an answer like any other."""
    with served(create_app(Settings(data_dir=tmp_path, dev=True, max_watchers=1))) as url:
        with httpx.stream("GET", f"{url}/v1/changes", headers=STREAM, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            refused = httpx.get(f"{url}/v1/live", headers=STREAM, timeout=60)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1

"""The page of a service with two worker processes: each has its own memory and pins, and the page says so."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.api.helpers import upload
from tests.api.page.conftest import Seen
from tests.conftest import Server, running_server
from tests.processes import eventually, workers_of

STATE = "/v1/tenants/acme/adapters/a@1/residency"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with two workers and one version."""
    with running_server(tmp_path_factory.mktemp("two") / "data", "--workers", "2") as running:
        assert upload(running.client(), "acme", "a").status_code == 201
        yield running


def _states(service: Server, path: str, processes: int) -> dict[int, dict[str, Any]]:
    """Returns what each of so many processes answers: connections are new, so that any process gets them."""
    found = dict[int, dict[str, Any]]()

    def all_have_answered() -> bool:
        answer = service.client().get(path, headers={"Connection": "close"}).json()
        found[answer["process"]] = answer
        return len(found) == processes

    eventually(all_have_answered)
    return found


def test_a_pin_is_one_processes(service: Server, seen: Seen) -> None:
    """What pins a version says in which process; only that one has it. The page names the process that answered it, and
    shows what this one has."""
    pinned = service.client().put(STATE, json={"pinned": True}).json()
    states = _states(service, STATE, 2)
    assert set(states) == set(workers_of(service.process.pid))
    assert {process: state["pinned"] for process, state in states.items()} == {
        process: process == pinned["process"] for process in states
    }
    assert {one["processes"] for one in (*states.values(), *_states(service, "/v1/residency", 2).values())} == {2}
    seen.sign_in(service.admin_key)
    said = re.compile(
        r"of the worker process that answered, (\d+)\. The service has 2 worker processes: each has its own"
    )
    views = [("adapters/acme/a@1", "acme/a", ", pinned"), ("residency", "Memory", "it is pinned")]
    for view, title, words in views:
        seen.open(view, title)
        expect(seen.page.get_by_text(said)).to_be_visible()
        number = said.search(seen.page.get_by_text(said).inner_text())
        assert number is not None
        expect(seen.page.get_by_text(words)).to_have_count(int(int(number[1]) == pinned["process"]))
    seen.open("adapters/acme", "Adapters of acme")
    expect(seen.page.get_by_text(re.compile("^1 adapter, "))).to_be_visible()
    seen.open("adapters/acme/a@1", "acme/a")
    seen.page.get_by_role("button", name=re.compile("^(Pin|Unpin)$")).click()
    toast = seen.page.get_by_text(re.compile(r"^The version is in memory.* in worker process \d+, one of 2\.$"))
    expect(toast).to_be_visible()

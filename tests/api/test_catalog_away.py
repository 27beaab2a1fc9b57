"""While the catalog is locked, known keys and remembered answers hold for the stated 30 seconds."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.helpers import problem, upload
from tests.conftest import Server, running_server

PREFIX = "/v1/tenants/away/adapters/a/prefix"


@contextlib.contextmanager
def locked(server: Server) -> Iterator[None]:
    """Keeps others from reading and writing the catalog while the block runs."""
    with contextlib.closing(sqlite3.connect(server.data_dir / "catalog.sqlite", timeout=10)) as catalog:
        catalog.execute("BEGIN EXCLUSIVE")
        yield


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with running_server(tmp_path / "data") as running:
        assert upload(running.client(), "away", "a").status_code == 201
        yield running


def test_known_keys_and_answers_go_on_while_the_catalog_is_locked(server: Server) -> None:
    """A key of a tenant with a rate and one of the platform get remembered answers, for longer than any fixed time of
    remembering."""
    admin = server.client()
    admin.put("/v1/tenants/away", json={"requests_per_second": 1000})
    own = server.client(admin.post("/v1/tenants/away/keys", json={"scope": "read"}).json()["key"])
    bodies = {client.get(PREFIX).content for client in (admin, own)}
    with locked(server):
        began = time.monotonic()
        while time.monotonic() < began + 7:
            for client in (admin, own):
                answer = client.get(PREFIX)
                assert answer.status_code == 200, answer.text
                bodies.add(answer.content)
            time.sleep(0.5)
        stranger = f"Bearer {server.admin_key[:20]}"
        problem(httpx.get(server.url + PREFIX, headers={"Authorization": stranger}), 401, "unauthenticated")
    assert len(bodies) == 1

"""Pages and descriptions are charged to the work budget while they are sent, so that unread ones fill no memory."""

from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from prefix_service.api.app import create_app
from prefix_service.data_folder.opening import opened
from prefix_service.registry.admission import Admission
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import problem, upload

_OF_ADAPTER = "/v1/tenants/acme/adapters/a"
PATHS = [
    "/v1/tenants",
    "/v1/tenants/acme/adapters",
    f"{_OF_ADAPTER}/versions",
    f"{_OF_ADAPTER}/card",
    f"{_OF_ADAPTER}/annotations",
    "/v1/tenants/acme/keys",
    "/v1/keys",
    "/v1/tenants/acme/audit",
    "/v1/audit",
    "/v1/tenants/acme/usage",
    "/v1/usage",
    "/v1/residency",
]


@pytest.fixture(scope="module")
def without_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that has an adapter, and whose budget for work in progress has become far too small for any answer."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("held"), dev=True)
    app = create_app(settings)
    with opened(settings), served(app) as url, httpx.Client(base_url=url) as client:
        assert upload(client, "acme", "a").status_code == 201
        assert {client.get(path).status_code for path in PATHS} == {200}
        small = Admission(in_flight=9, in_flight_tenant=9, work_bytes=1024, processors=2)
        app.open(replace(app.state.prefix_service, admission=small))
        yield client


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_without_memory_is_refused(without_memory: httpx.Client, path: str) -> None:
    """Before anything is read for it."""
    problem(without_memory.get(path), 507, "out-of-space")

"""`api.dependencies.queries`: no route answers another question than the one that was asked."""

import httpx
import pytest

from prefix_service.api.app import create_app
from prefix_service.settings import Settings
from tests.api.helpers import problem
from tests.conftest import Server

METHODS = ("get", "head", "post", "put", "patch", "delete")
VALUES = {"tenant": "queries", "name": "a", "ref": "a@1", "alias": "prod", "key_id": "0" * 16, "version": "1"}
DOCUMENT = create_app(Settings()).openapi()["paths"]
ROUTES = [(method, path) for path, methods in DOCUMENT.items() for method in METHODS if method in methods]
STRICT = [(method, path) for method, path in ROUTES if path.startswith(("/v1", "/v2")) and "/health/" not in path]


@pytest.fixture(scope="module")
def admin(server: Server) -> httpx.Client:
    return server.client()


@pytest.mark.parametrize(("method", "path"), STRICT, ids=" ".join)
def test_an_unknown_parameter_is_refused_by_every_route(admin: httpx.Client, method: str, path: str) -> None:
    """Before anything is done; the refusal names it. FastAPI would ignore it, and answer as if it had not been sent."""
    target = path.format(**VALUES, region="r") + "?colour=red"
    answer = admin.request(method, target)
    status = 400 if path.startswith("/v2") else 422
    assert answer.status_code == status
    if method != "head":
        assert "'colour' is no query parameter of this route" in problem(answer, status, "invalid-request")["detail"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"])
def test_probes_may_add_what_they_like(admin: httpx.Client, path: str) -> None:
    """Load balancers append parameters against caches."""
    assert admin.get(f"{path}?colour=red").status_code == 200


def test_the_refusal_says_what_the_route_takes(admin: httpx.Client) -> None:
    """The refusal of an unknown parameter names those that the route takes."""
    detail = problem(admin.get("/v1/audit?limits=3"), 422, "invalid-request")["detail"]
    assert detail == "'limits' is no query parameter of this route: it takes action, cursor, limit, search"

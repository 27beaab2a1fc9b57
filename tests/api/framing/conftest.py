"""Fixtures of the framing suites: a service with each parser."""

from collections.abc import Iterator

import pytest

from tests.api.framing.victim import publish
from tests.conftest import Server, running_server

PARSERS = ("httptools", "h11")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Yields a service with each parser, and the adapters in it."""
    folder = tmp_path_factory.mktemp("framing")
    with (
        running_server(folder / "a", environment={"PREFIX_HTTP_PARSER": PARSERS[0]}) as first,
        running_server(folder / "b", environment={"PREFIX_HTTP_PARSER": PARSERS[1]}) as second,
    ):
        for server in (first, second):
            publish(server.client())
        yield dict(zip(PARSERS, (first, second), strict=True))


@pytest.fixture(params=PARSERS)
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    """Returns the service with one parser."""
    return servers[request.param]

"""Gives an application an adapter which fits its model."""

import pytest

from prefix_service.client import PrefixClient
from tests.client.conftest import GPT2
from tests.client.vllm.behind import Behind
from tests.conftest import Publish, Server


@pytest.fixture
def behind(server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> Behind:
    """An application behind the middleware, and an adapter that fits its model."""
    publish("vllm", "fits", GPT2)
    monkeypatch.setenv("PREFIX_API_KEY", server.admin_key)
    with PrefixClient(server.url, server.admin_key) as client:
        return Behind(server.url, dict(client.get("vllm/fits").metadata))

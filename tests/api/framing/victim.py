"""The adapters of the framing suites; no request may delete the victim."""

from typing import Final
from urllib.parse import urlsplit

import httpx

from tests.api.helpers import upload, weights

TENANT: Final = "framing"
VICTIM: Final = f"/v1/tenants/{TENANT}/adapters/victim"
ALIAS: Final = f"/v1/tenants/{TENANT}/adapters/mine/aliases/prod"


def publish(client: httpx.Client) -> None:
    """Publishes the victim and two adapters of one shape, `mine`, which has an alias, and `other`."""
    for seed, name in enumerate(("victim", "mine", "other")):
        assert upload(client, TENANT, name, file=weights(seed)).status_code == 201
    assert client.put(ALIAS, json={"version": 1}).status_code == 201


def survives(client: httpx.Client) -> bool:
    """Returns whether the victim is there; otherwise publishes it again, for the next test."""
    if client.get(VICTIM).status_code == 200:
        return True
    upload(client, TENANT, "victim")
    return False


def address(url: str) -> tuple[str, int]:
    """Returns host and port of a URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port

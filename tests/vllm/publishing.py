"""Publishes a folder as a command line does."""

from pathlib import Path

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import PrefixClient
from tests.conftest import Server


def publish(server: Server, adapter: str, folder: Path) -> int:
    """Publishes a folder, and returns the version's number."""
    upload = prepare_upload(folder)
    with PrefixClient(server.url, server.admin_key) as client, upload.weights as weights:
        return int(client.publish_files(adapter, upload.config, weights)[0]["version"])

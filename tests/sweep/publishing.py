"""Puts the real service between PEFT's files and the client."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import Prefix, PrefixClient
from tests.conftest import Server
from tests.sweep.verdict import Fetch


@contextmanager
def publishing(server: Server) -> Iterator[Fetch]:
    """Yields a function that publishes a folder under a name and returns the prefix that a worker gets."""
    with PrefixClient(server.url, server.admin_key) as client:

        def fetch(folder: Path, name: str) -> Prefix:
            adapter = f"sweep/{re.sub('[^a-z0-9]', '-', name)}"
            upload = prepare_upload(folder)
            with upload.weights as weights:
                client.publish_files(adapter, upload.config, weights)
            return client.get(adapter)

        yield fetch

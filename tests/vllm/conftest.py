"""What the tests of vLLM share: the environment that it lives in, a small model, and a service with its adapters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import PrefixClient
from tests.conftest import Server, running_server
from tests.vllm.driver import PYTHON
from tests.vllm.reference import TOKENS, Reference, make_reference

_INSTALLED: Final = PYTHON.parents[1] / "installed"


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    """vLLM is there; only CI must have tried to install it."""
    if not _INSTALLED.exists():
        told = os.environ.get("VLLM_NOT_INSTALLED", "tests/vllm/install makes .venv-vllm")
        pytest.skip(f"NOT TESTED: vLLM is not installed: {told}")


@pytest.fixture(scope="session")
def reference(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A small Llama and its adapters."""
    return make_reference(tmp_path_factory.mktemp("reference"))


@contextmanager
def serving_adapters(reference: Reference, folder: Path) -> Iterator[Server]:
    """A service with every adapter of the small Llama, under the tenant `acme`."""
    with running_server(folder / "data") as server:
        for name in TOKENS:
            publish(server, f"acme/{name}", reference.adapter(name))
        yield server


def publish(server: Server, adapter: str, folder: Path) -> int:
    """Publish a folder; the version's number."""
    upload = prepare_upload(folder)
    with PrefixClient(server.url, server.admin_key) as client, upload.weights as weights:
        return int(client.publish_files(adapter, upload.config, weights)[0]["version"])

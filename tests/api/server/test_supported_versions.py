"""The private parts of uvicorn and h11 that connections are built on are looked for before any connection is accepted,
and a release that lacks one is refused by name.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from prefix_service.api.server.supported_versions import TOUCHED, WORKING, check
from prefix_service.errors import InvalidInput

HTTPTOOLS = "protocols/http/httptools_impl.py"
INSTALLED = {name: version(name) for name in TOUCHED}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with copies of the installed uvicorn and h11, which a test may change."""
    for name in TOUCHED:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        shutil.copytree(Path(spec.origin).parent, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def change(file: Path, before: str, after: str) -> None:
    """Changes something in the source of a file."""
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_the_installed_packages_have_all_parts(site: Path) -> None:
    """The installed packages pass, and are among the versions that the error would recommend."""
    for name in TOUCHED:
        check(name, INSTALLED[name], site / name)
        assert INSTALLED[name].startswith(f"{WORKING[name].rpartition(' ')[2]}.")


@pytest.mark.parametrize(
    ("name", "file", "before", "after", "lacks"),
    [
        ("uvicorn", HTTPTOOLS, "def on_headers_complete", "def headers_done", "HttpToolsProtocol.on_headers_complete"),
        ("uvicorn", HTTPTOOLS, "self, name: bytes,", "self, field: bytes,", "the parameter name of HttpToolsProtocol."),
        ("uvicorn", HTTPTOOLS, "self.response_complete", "self.complete", "RequestResponseCycle.response_complete"),
        ("uvicorn", "protocols/http/h11_impl.py", "class H11Protocol", "class H11", "H11Protocol (uvicorn/protocols/"),
        ("h11", "_receivebuffer.py", "_multiple_lines_search", "_searched", "ReceiveBuffer._multiple_lines_search"),
        ("h11", "_readers.py", "_bytes_in_chunk", "_left", "ChunkedReader._bytes_in_chunk (h11/_readers.py)"),
    ],
)
def test_a_release_that_lacks_a_part_is_refused_by_its_name(
    site: Path, name: str, file: str, before: str, after: str, lacks: str
) -> None:
    """A method, a parameter, a field, a class: the error says what is missing in which version, and what to install."""
    change(site / name / file, before, after)
    with pytest.raises(InvalidInput) as refused:
        check(name, "9.9.9", site / name)
    text = str(refused.value)
    assert f"works with {name} {WORKING[name]}; {name} 9.9.9, which is installed, lacks parts" in text
    assert lacks in text
    assert re.search(r"Run pip install '(uvicorn\[standard\]==0\.54|h11==0\.16)\.\*'", text)


def test_serve_does_not_start_on_a_newer_uvicorn_without_a_method(site: Path, tmp_path: Path) -> None:
    """The command ends with one sentence, before it opens the data folder."""
    change(site / "uvicorn" / HTTPTOOLS, "def on_body", "def on_piece")
    (site / "uvicorn-9.9.9.dist-info").mkdir()
    (site / "uvicorn-9.9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: uvicorn\nVersion: 9.9.9\n")
    program = f"import sys; sys.path.insert(0, {str(site)!r}); from prefix_service.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--data-dir", str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error (invalid-input): this prefix-service works with uvicorn 0.53 to 0.54; ")
    assert "uvicorn 9.9.9, which is installed, lacks parts" in ended.stderr
    assert f"HttpToolsProtocol.on_body (uvicorn/{HTTPTOOLS})" in ended.stderr
    assert not (tmp_path / "data").exists()


def test_installing_brings_only_versions_that_work() -> None:
    """The bounds of pyproject.toml are the versions that the error names, and end before the next minor release."""
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    bounds = dict(re.findall(r"'(uvicorn|h11)(?:\[standard\])?>=([0-9.]+,<[0-9.]+)'", str(extras["server"])))
    for name, versions in WORKING.items():
        oldest, newest = versions.split(" to ")[0], versions.split(" to ")[-1]
        major, minor = newest.split(".")
        assert bounds[name] == f"{oldest},<{major}.{int(minor) + 1}"

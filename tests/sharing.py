"""Runs a service that shares its renderings with workers on the same host, and lists the files in its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import Server, running_server


def shared_dir(folder: Path) -> Path:
    """Returns the folder in which the service of a folder shares its files."""
    return folder / "shared"


def shared_files(folder: Path) -> list[Path]:
    """Returns the shared files of all processes at this moment."""
    return sorted(shared_dir(folder).glob("*/*"))


@contextmanager
def sharing_server(folder: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Runs `serve --uds` with `PREFIX_SHARED_DIR`, both in the folder, until the block ends."""
    socket = folder / "s.sock"
    settings = {"PREFIX_SHARED_DIR": str(shared_dir(folder)), **(environment or {})}
    with running_server(folder / "data", "--uds", str(socket), *options, environment=settings, uds=socket) as server:
        yield server

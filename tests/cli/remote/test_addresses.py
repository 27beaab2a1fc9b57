"""Addresses of adapters elsewhere: what they may be, and what an archive or a missing library is answered."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from prefix_service.checkpoints.remote.address import Address, parse_address
from prefix_service.checkpoints.remote.archives import archived_files, extract
from prefix_service.errors import InvalidCheckpoint, InvalidRequest, TooLarge
from tests.cli.test_imports import _MAIN, _WITHOUT_SERVER
from tests.conftest import Server

DIGEST: Final = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("word", "address"),
    [
        ("hf://acme/a", Address("hf", "acme/a", None, "")),
        ("hf://acme/a@v1/b/c.pt", Address("hf", "acme/a", "v1", "b/c.pt")),
        ("hf://acme/a@refs%2Fpr%2F1", Address("hf", "acme/a", "refs/pr/1", "")),
        ("s3://bucket/a/b/", Address("s3", "bucket", None, "a/b")),
        ("oci://ghcr.io/acme/a:v1", Address("oci", "ghcr.io", "v1", "acme/a")),
        ("oci://127.0.0.1:5000/a:latest", Address("oci", "127.0.0.1:5000", "latest", "a")),
        (f"oci://[::1]:5000/a@{DIGEST}", Address("oci", "[::1]:5000", DIGEST, "a")),
    ],
)
def test_an_address_has_a_place_a_revision_and_a_path(word: str, address: Address) -> None:
    """Each scheme has its form."""
    assert parse_address(word) == address


@pytest.mark.parametrize(
    "word",
    [
        "hf://user:secret@acme/a",
        "hf://acme/a?token=secret",
        "hf://acme/a#secret",
        "s3://id:secret@bucket/a",
        "s3://bucket/a?X-Amz-Signature=secret",
        "oci://user:secret@ghcr.io/acme/a:v1",
        "https://secret.example/a",
        "hf://secret",
        "hf://acme/a/../secret",
        "s3://bucket",
        "s3://bucket/a//secret\x1b]52",
        "oci://ghcr.io/acme/secret",
        f"oci://ghcr.io/acme/{'secret' * 200}:v1",
    ],
)
def test_other_addresses_are_refused_without_repeating_their_secrets(word: str) -> None:
    """Credentials, queries and what leads elsewhere are errors, which show no secret."""
    with pytest.raises(InvalidRequest) as refused:
        parse_address(word)
    assert "secret" not in str(refused.value).replace("'../secret'", "")


def _archive(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    return path


def test_files_are_taken_out_of_an_archive_one_by_one(tmp_path: Path) -> None:
    """Only what is named is written, and where the caller says."""
    archive = _archive(
        tmp_path / "a.tar.gz",
        ("folder", tarfile.DIRTYPE, b""),
        ("folder/a", tarfile.REGTYPE, b"one"),
        ("folder/b", tarfile.REGTYPE, b"two"),
    )
    assert archived_files(archive, 6) == {"folder/a": 3, "folder/b": 3}
    extract(archive, {"folder/b": tmp_path / "came"}, 6)
    assert (tmp_path / "came").read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "came"]
    with pytest.raises(TooLarge, match="more than 5 bytes"):
        archived_files(archive, 5)


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (("../a", tarfile.REGTYPE, b"x"), "leads out of the folder"),
        (("/a", tarfile.REGTYPE, b"x"), "leads out of the folder"),
        (("a/../../b", tarfile.REGTYPE, b"x"), "leads out of the folder"),
        (("a", tarfile.SYMTYPE, b""), "a link, a device"),
        (("a", tarfile.LNKTYPE, b""), "a link, a device"),
        (("a", tarfile.FIFOTYPE, b""), "a link, a device"),
        (("a", tarfile.GNUTYPE_SPARSE, b""), "or sparse"),
        (("sound", tarfile.REGTYPE, b"x"), "twice"),
    ],
)
def test_an_archive_that_leads_elsewhere_is_refused(
    tmp_path: Path, member: tuple[str, bytes, bytes], reason: str
) -> None:
    """Links, devices, paths that leave the folder, and a file that is there twice are errors."""
    archive = _archive(tmp_path / "a.tar.gz", ("sound", tarfile.REGTYPE, b"x"), member)
    with pytest.raises(InvalidCheckpoint, match=reason):
        archived_files(archive, 100)


@pytest.mark.parametrize(
    "members",
    [[("a" * (5 << 20), tarfile.REGTYPE, b"")], [(str(n), tarfile.DIRTYPE, b"") for n in range(9000)]],
    ids=["a long name", "many folders"],
)
def test_an_archive_that_unpacks_to_headers_is_refused(tmp_path: Path, members: list[tuple[str, bytes, bytes]]) -> None:
    """Names and folders of a small archive that would fill the memory are an error before they do."""
    archive = _archive(tmp_path / "a.tar.gz", *members)
    assert archive.stat().st_size < 1 << 18
    with pytest.raises(InvalidCheckpoint, match="more than 4194304 bytes beside its files' contents"):
        archived_files(archive, 1 << 30)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:60], lambda data: data[: len(data) // 2], lambda _: b"no archive"],
    ids=["beginning", "half", "other"],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    """An archive that ends too soon, or is none, is an error."""
    archive = _archive(tmp_path / "a.tar.gz", ("a", tarfile.REGTYPE, bytes(range(256)) * 40))
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(InvalidCheckpoint, match="cannot be read"):
        archived_files(archive, 1 << 20)


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("publish hf://acme/a x/y", "huggingface_hub", "hf"),
        ("publish s3://bucket/a x/y", "obstore", "s3"),
        ("publish oci://127.0.0.1:1/a:v1 x/y", "oras", "oci"),
    ],
)
def test_a_scheme_that_lacks_its_extra_says_so(server: Server, command: str, missing: str, extra: str) -> None:
    """The error is one line with the `pip install` to paste."""
    code = _WITHOUT_SERVER.replace("SERVER", f"{{{missing!r}}}") + _MAIN
    environment = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 1
    assert done.stderr.endswith(f"pip install 'prefix-service[{extra}]'\n"), done.stderr
    assert done.stderr.count("\n") == 1

"""`publish s3://…` downloads what an adapter needs from a bucket, and shows its key to that server alone."""

from pathlib import Path
from typing import Final

import obstore
import pytest
from obstore.store import S3Store

from prefix_service.checkpoints.remote.address import parse_address
from prefix_service.checkpoints.remote.download import downloaded
from prefix_service.checkpoints.remote.wanted import wanted_files
from prefix_service.client import PrefixClient
from prefix_service.errors import (
    Conflict,
    ConnectionFailed,
    Forbidden,
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    PrefixServiceError,
    TooLarge,
)
from tests.cli.remote.local_servers import Handler, serving, storage_handler
from tests.commands import run_command
from tests.conftest import CORPUS, Server, free_port
from tests.seaweedfs import KEYS, SeaweedFS

ADAPTER: Final = CORPUS / "cases" / "llama-n20-emb" / "adapter"
_MOST: Final = 1 << 20


def store_of(seaweedfs: SeaweedFS) -> S3Store:
    """Returns the bucket of these tests."""
    return S3Store(
        "adapters",
        config={
            "endpoint": seaweedfs.url,
            "access_key_id": KEYS["AWS_ACCESS_KEY_ID"],
            "secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"],
            "region": KEYS["AWS_REGION"],
        },
        client_options={"allow_http": True},
    )


@pytest.fixture(scope="module")
def bucket(seaweedfs: SeaweedFS) -> SeaweedFS:
    """Returns a server whose bucket has adapters and traps."""
    store = store_of(seaweedfs)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        obstore.put(store, f"team/sound/{name}", ADAPTER / name)
        obstore.put(store, f"team/compiled/{name}", ADAPTER / name)
    for name in ("prefix_base_model.json", "prefix_recipe.json"):
        obstore.put(store, f"team/compiled/{name}", b"{}")
    obstore.put(store, "team/sound/notes.txt", b"not an adapter's")
    obstore.put(store, "team/sound/old/adapter_model.safetensors", b"not this one")
    obstore.put(store, "team/cartridge/cache.pt", CORPUS / "variants" / "hazy_cartridge-f1" / "cache-step4.pt")
    obstore.put(store, "team/large/adapter_model.safetensors", bytes(_MOST + 1))
    obstore.put(store, "team/empty/notes.txt", b"nothing")
    return seaweedfs


@pytest.fixture
def variables(bucket: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leads this process to the server."""
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)


def fetched(address: str) -> tuple[list[str], dict[str, str], str | None]:
    """Downloads an adapter; returns the names of its folder's files, its annotations, and how it was converted."""
    with downloaded(parse_address(address), _MOST) as found:
        return sorted(path.name for path in found.folder.iterdir()), found.annotations, found.converted


def test_an_adapter_is_published_from_a_bucket(bucket: SeaweedFS, server: Server) -> None:
    """The version has the files of the folder, and its address as an annotation."""
    environment = bucket.environment | {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
    done = run_command("publish", "s3://adapters/team/sound", "bucket/sound", environment=environment)
    assert done.returncode == 0, done.stderr
    with PrefixClient(server.url, server.admin_key) as client:
        assert client.annotations("bucket/sound@1") == {"source": "s3://adapters/team/sound"}
        weights = (ADAPTER / "adapter_model.safetensors").read_bytes()
        assert bytes(client.parameters("bucket/sound@1", 0, len(weights))) == weights


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("address", "names", "is_converted"),
    [
        ("s3://adapters/team/sound", ["adapter_config.json", "adapter_model.safetensors"], False),
        (
            "s3://adapters/team/compiled",
            ["adapter_config.json", "adapter_model.safetensors", "prefix_base_model.json", "prefix_recipe.json"],
            False,
        ),
        ("s3://adapters/team/cartridge", ["adapter_config.json", "adapter_model.safetensors"], True),
        ("s3://adapters/team/cartridge/cache.pt", ["adapter_config.json", "adapter_model.safetensors"], True),
    ],
)
def test_only_an_adapters_files_come(address: str, names: list[str], is_converted: bool) -> None:
    """A folder's other objects stay where they are, and a pickle is converted on this machine."""
    found, annotations, converted = fetched(address)
    assert (found, annotations, converted is not None) == (names, {"source": address}, is_converted)


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("address", "error", "reason"),
    [
        ("s3://adapters/nowhere", NotFound, "there are no files at nowhere"),
        ("s3://other-bucket/team/sound", NotFound, "there is no s3://other-bucket/team/sound"),
        ("s3://adapters/team/empty", InvalidCheckpoint, r"no weights among notes\.txt"),
        ("s3://adapters/team/large", TooLarge, rf"adapter_model\.safetensors has {_MOST + 1} bytes"),
    ],
)
def test_what_cannot_be_published_is_told(address: str, error: type[PrefixServiceError], reason: str) -> None:
    """The error says what is missing or too large."""
    with pytest.raises(error, match=reason):
        fetched(address)


@pytest.mark.usefixtures("variables")
def test_wrong_keys_and_servers_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error says what to look at, and shows no key."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(Forbidden, match="AWS_ACCESS_KEY_ID") as refused:
        fetched("s3://adapters/team/sound")
    assert "wrong-secret" not in str(refused.value)
    assert KEYS["AWS_ACCESS_KEY_ID"] not in str(refused.value)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "missing"))
    with pytest.raises(InvalidRequest, match="look at their values"):
        fetched("s3://adapters/team/sound")


def test_a_server_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is an error of the connection."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConnectionFailed, match="did not answer: look at AWS_ENDPOINT_URL"):
        fetched("s3://adapters/team/sound")


def test_a_redirect_is_given_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that redirects elsewhere leads to no request with a key's id or a signature there."""

    class Redirecting(Handler):
        def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            return 307, {"Location": f"{elsewhere.url}{path}"}, b""

    with serving(storage_handler({})) as elsewhere, serving(Redirecting) as first:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": first.url}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(PrefixServiceError):
            fetched("s3://adapters/team/sound")
        assert first.authorizations() != {None}
        assert elsewhere.authorizations() <= {None}
        assert not any(KEYS["AWS_ACCESS_KEY_ID"] in str(request) for request in elsewhere.requests)


@pytest.mark.usefixtures("variables")
def test_an_object_that_is_replaced_meanwhile_is_refused(bucket: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config and weights that were not there together are never published together."""
    writer = store_of(bucket)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        obstore.put(writer, f"team/replaced/{name}", ADAPTER / name)
    weights = (ADAPTER / "adapter_model.safetensors").read_bytes()

    def replaced(sizes: dict[str, int], most: int) -> tuple[str, list[str]]:
        obstore.put(writer, "team/replaced/adapter_model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
        return wanted_files(sizes, most)

    monkeypatch.setattr("prefix_service.checkpoints.remote.s3.wanted_files", replaced)
    with pytest.raises(Conflict, match="was replaced while the adapter was downloaded: try again"):
        fetched("s3://adapters/team/replaced")

"""`pull … oci://…` and `publish oci://…` go through an OCI registry, and show its password to that registry alone."""

import hashlib
import io
import json
import tarfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import parse_qs

import oras.provider
import pytest

from prefix_service.checkpoints.remote.address import parse_address
from prefix_service.checkpoints.remote.download import downloaded
from prefix_service.checkpoints.remote.oci import ARTIFACT, store
from prefix_service.client import Fingerprint, PrefixClient
from prefix_service.errors import (
    ConnectionFailed,
    InvalidCheckpoint,
    InvalidResponse,
    NotFound,
    PrefixServiceError,
    TooLarge,
    Unauthenticated,
)
from tests.cli.remote.local_servers import Handler, Seen, serving
from tests.commands import run_command
from tests.conftest import CORPUS, Server, free_port
from tests.docker_registry import PASSWORD, USER, DockerRegistry

ADAPTER: Final = CORPUS / "cases" / "llama-n20-emb" / "adapter"
RECIPE: Final = {"compiled/from": "text"}
BASE_MODEL: Final = Fingerprint("llama", weights_index="sampled-bfloat16:1")
FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
_MOST: Final = 1 << 20


@pytest.fixture(scope="module")
def registry() -> Iterator[DockerRegistry]:
    """Yields a registry that wants a password."""
    registry = DockerRegistry(free_port())
    yield registry
    registry.remove()


@pytest.fixture
def home(registry: DockerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a home folder in which `docker login` was run."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name, value in registry.login(folder).items():
        monkeypatch.setenv(name, value)
    return folder


def fetched(address: str, most: int = _MOST) -> tuple[dict[str, bytes], dict[str, str]]:
    """Downloads an adapter; returns the contents of its folder, and its annotations."""
    with downloaded(parse_address(address), most) as found:
        return {path.name: path.read_bytes() for path in found.folder.iterdir()}, found.annotations


@pytest.mark.usefixtures("home")
def test_a_version_goes_through_a_registry_and_comes_back(registry: DockerRegistry, server: Server) -> None:
    """The artifact has the version's files, annotations, recipe and its base model's fingerprint; published again it is
    the same version.
    """
    environment = {"PREFIX_URL": server.url, "PREFIX_API_KEY": server.admin_key}
    with PrefixClient(server.url, server.admin_key) as client:
        client.publish("oci/first", ADAPTER, annotations={"run": "17", **RECIPE}, base_model=BASE_MODEL)
    address = f"oci://{registry.place}/team/first:v1"
    pulled = run_command("pull", "oci/first@1", address, "--json", environment=environment)
    assert pulled.returncode == 0, pulled.stderr
    artifact = json.loads(pulled.stdout)["artifact"]
    assert artifact.startswith(f"oci://{registry.place}/team/first@sha256:")
    again = run_command("pull", "oci/first@1", address, "--json", environment=environment)
    assert json.loads(again.stdout)["artifact"] == artifact  # the same content is the same artifact
    for source, annotations in (
        (address, {"source": artifact, "source.revision": "v1"}),
        (artifact, {"source": artifact}),
    ):
        name = f"oci/again-{len(annotations)}"
        done = run_command("publish", source, name, environment=environment)
        assert done.returncode == 0, done.stderr
        with PrefixClient(server.url, server.admin_key) as client:
            assert client.annotations(f"{name}@1") == annotations | RECIPE
            assert client.inspect(f"{name}@1")["digest"] == client.inspect("oci/first@1")["digest"]
            assert client.base_model(f"{name}@1") == BASE_MODEL


@pytest.mark.usefixtures("home")
def test_an_artifact_is_what_other_tools_read(registry: DockerRegistry, tmp_path: Path) -> None:
    """oras pulls the files by their names; the manifest has the type and the annotations."""
    address = parse_address(f"oci://{registry.place}/plain:v1")
    store(address, {name: (ADAPTER / name, "application/octet-stream") for name in FILES}, {"run": "17"})
    client = oras.provider.Registry(registry.place, insecure=True, auth_backend="basic")
    client.auth.set_basic_auth(USER, PASSWORD)
    target = f"{registry.place}/plain:v1"
    manifest = client.get_manifest(oras.container.Container(target))
    assert (manifest["artifactType"], manifest["annotations"]) == (ARTIFACT, {"run": "17"})
    client.pull(target, outdir=str(tmp_path / "pulled"))
    for name in FILES:
        assert (tmp_path / "pulled" / name).read_bytes() == (ADAPTER / name).read_bytes()


@pytest.mark.usefixtures("home")
def test_a_folder_that_oras_pushed_is_read(
    registry: DockerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`oras push … FOLDER` makes one layer, an archive, of which the adapter's files alone come out."""
    folder = tmp_path / "packed" / "adapter"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes((ADAPTER / name).read_bytes())
    (folder / "notes.txt").write_text("not an adapter's")
    client = oras.provider.Registry(registry.place, insecure=True, auth_backend="basic")
    client.auth.set_basic_auth(USER, PASSWORD)
    monkeypatch.chdir(folder.parent)
    client.push(f"{registry.place}/folder:v1", files=["adapter"])
    files, _ = fetched(f"oci://{registry.place}/folder:v1")
    assert files == {name: (ADAPTER / name).read_bytes() for name in FILES}


def test_without_a_login_the_registry_is_not_read(
    registry: DockerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to do."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Unauthenticated, match="docker login"):
        fetched(f"oci://{registry.place}/plain:v1")


@pytest.mark.usefixtures("home")
def test_what_is_missing_or_away_is_told(registry: DockerRegistry) -> None:
    """The error names the address."""
    with pytest.raises(NotFound, match=f"there is no oci://{registry.place}/missing:v1"):
        fetched(f"oci://{registry.place}/missing:v1")
    with pytest.raises(ConnectionFailed, match="did not answer"):
        fetched(f"oci://127.0.0.1:{free_port()}/a:v1")


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _layer(data: bytes, title: str, **changes: Any) -> dict[str, Any]:
    annotations = {"org.opencontainers.image.title": title}
    return {"mediaType": "x", "digest": _digest(data), "size": len(data), "annotations": annotations, **changes}


class Hostile(Handler):
    """A registry whose manifests and blobs the test decides."""

    manifest: ClassVar[bytes]
    blobs: ClassVar[dict[str, tuple[int, dict[str, str], bytes]]]

    def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if "authorization" not in headers:
            return 401, {"WWW-Authenticate": 'Basic realm="tests"'}, b""
        if "/manifests/" in path:
            return 200, {}, self.manifest
        return self.blobs.get(path.rpartition("/")[2], (404, {}, b""))


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Hostile], Seen]]:
    """Yields a registry that does what the test says, and to which there is a login."""
    config, weights = ((ADAPTER / name).read_bytes() for name in FILES)

    class Own(Hostile):
        manifest = json.dumps({"layers": [_layer(config, FILES[0]), _layer(weights, FILES[1])]}).encode()
        blobs: ClassVar = {_digest(data): (200, {}, data) for data in (config, weights)}

    with serving(Own) as seen:
        place = seen.url.removeprefix("http://")
        (tmp_path / ".docker").mkdir()
        login = {"auths": {place: {"auth": b64encode(b"user:secret").decode()}}}
        (tmp_path / ".docker" / "config.json").write_text(json.dumps(login))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield Own, seen


def _address(seen: Seen) -> str:
    return f"oci://{seen.url.removeprefix('http://')}/a:v1"


def test_redirects_are_given_no_password(hostile: tuple[type[Hostile], Seen], tmp_path: Path) -> None:
    """A blob may come from another host, which is sent no credentials, also if it asks for them."""
    handler, seen = hostile
    weights = (ADAPTER / FILES[1]).read_bytes()

    class Storage(Handler):
        wants = False

        def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            return (401, {"WWW-Authenticate": 'Basic realm="x"'}, b"") if self.wants else (200, {}, weights)

    with serving(Storage) as storage:
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")  # of curl, not of docker
        handler.blobs[_digest(weights)] = (307, {"Location": f"{storage.url}/blob?signature=x"}, b"")
        files, _ = fetched(_address(seen))
        assert files[FILES[1]] == weights
        Storage.wants = True
        with pytest.raises(InvalidResponse, match="asks for credentials: it is given none"):
            fetched(_address(seen))
        assert storage.authorizations() == {None}
    assert None not in {headers.get("authorization") for _, path, headers in seen.requests[-2:] if "/blobs/" in path}


def test_a_token_is_asked_for_each_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with tokens is given one to read, then one to write; the password goes to the realm alone."""

    class Tokens(Handler):
        def answer(self, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
            if path == "/token":
                known = headers.get("authorization") == f"Basic {b64encode(b'user:secret').decode()}"
                scope = parse_qs(self.path.partition("?")[2]).get("scope", [""])[0]
                return (200 if known else 401), {}, json.dumps({"token": scope.replace(":", "-")}).encode()
            actions = "pull" if self.command in ("GET", "HEAD") else "pull,push"
            if headers.get("authorization") != f"Bearer repository-a-{actions}":
                scope = f'Bearer realm="{self.seen.url}/token",service="tests",scope="repository:a:{actions}"'
                return 401, {"WWW-Authenticate": scope}, b""
            if self.command == "HEAD":
                return 404, {}, b""
            return 202, {"Location": "/v2/a/blobs/uploads/1"}, b""

    with serving(Tokens) as seen:
        place = seen.url.removeprefix("http://")
        (tmp_path / ".docker").mkdir()
        login = {"auths": {place: {"auth": b64encode(b"user:secret").decode()}}}
        (tmp_path / ".docker" / "config.json").write_text(json.dumps(login))
        monkeypatch.setenv("HOME", str(tmp_path))
        digest = store(parse_address(_address(seen)), {FILES[0]: (ADAPTER / FILES[0], "application/json")}, {})
        assert digest.startswith("sha256:")
        with_password = {path.partition("?")[0] for _, path, headers in seen.requests if "Basic" in str(headers)}
    assert with_password == {"/token"}


@pytest.mark.parametrize(
    ("manifest", "error", "reason"),
    [
        ({"layers": [_layer(b"x" * 10, FILES[1], size=_MOST + 1)]}, TooLarge, f"{_MOST + 1} bytes"),
        ({"layers": [_layer(b"other", FILES[1])]}, NotFound, "there is no"),
        ({"layers": [_layer(b"x", "notes.txt")]}, InvalidCheckpoint, r"no weights among notes\.txt"),
        ({"layers": [{"digest": "md5:1", "size": 1}]}, InvalidCheckpoint, "the digest md5:1"),
        ({"layers": [_layer(b"x", FILES[1], size=-1)]}, InvalidCheckpoint, "the size -1"),
        ({"layers": {}}, InvalidCheckpoint, "no list of layers"),
        ({"mediaType": "application/vnd.oci.image.index.v1+json"}, InvalidCheckpoint, "single manifest"),
        ([], InvalidCheckpoint, "single manifest"),
    ],
)
def test_a_manifest_that_is_no_adapters_is_refused(
    hostile: tuple[type[Hostile], Seen], manifest: Any, error: type[PrefixServiceError], reason: str
) -> None:
    """Sizes, digests and files that an adapter has not are errors."""
    handler, seen = hostile
    handler.manifest = json.dumps(manifest).encode()
    with pytest.raises(error, match=reason):
        fetched(_address(seen))


def test_what_does_not_match_its_digest_is_refused(hostile: tuple[type[Hostile], Seen]) -> None:
    """Other bytes, too many bytes, another manifest than the digest's, and a manifest without end are errors."""
    handler, seen = hostile
    weights = (ADAPTER / FILES[1]).read_bytes()
    for sent in (weights[:-1] + b"?", weights + b"?"):
        handler.blobs[_digest(weights)] = (200, {}, sent)
        with pytest.raises(InvalidResponse, match="does not match its size and digest"):
            fetched(_address(seen))
    with pytest.raises(InvalidResponse, match="the registry sent the manifest sha256:"):
        fetched(_address(seen).replace(":v1", f"@{_digest(b'another')}"))
    handler.manifest = b"{"
    with pytest.raises(InvalidResponse, match="is not JSON"):
        fetched(_address(seen))
    handler.manifest = bytes((1 << 20) + 1)
    with pytest.raises(InvalidResponse, match="has more than"):
        fetched(_address(seen))


def test_a_folder_that_leads_elsewhere_is_refused(hostile: tuple[type[Hostile], Seen], tmp_path: Path) -> None:
    """A link in an artifact's archive is an error, and nothing of it is written."""
    handler, seen = hostile
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        link = tarfile.TarInfo(FILES[1])
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    data = packed.getvalue()
    unpack = {"org.opencontainers.image.title": "adapter", "io.deis.oras.content.unpack": "true"}
    handler.manifest = json.dumps({"layers": [_layer(data, "", annotations=unpack)]}).encode()
    handler.blobs[_digest(data)] = (200, {}, data)
    with pytest.raises(InvalidCheckpoint, match="a link, a device"):
        fetched(_address(seen))

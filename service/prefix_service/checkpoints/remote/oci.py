"""Adapters as artifacts of an OCI registry, with oras-py: `docker login` gives it its credentials.

An artifact of this project has one layer for each file, whose title is the file's name. Artifacts that `oras push` made
of files, or of a folder, are read too. A registry on this machine's loopback address is spoken to without TLS.
"""

import contextlib
import hashlib
import io
import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urljoin, urlsplit

import oras.auth
import oras.container
import requests
from requests import PreparedRequest, Response

from prefix_service.checkpoints.remote.address import Address
from prefix_service.checkpoints.remote.archives import archived_files, extract
from prefix_service.checkpoints.remote.wanted import files_at, wanted_files
from prefix_service.errors import (
    ConnectionFailed,
    Forbidden,
    InvalidCheckpoint,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    TooLarge,
    Unauthenticated,
)

ARTIFACT: Final = "application/vnd.prefix-service.adapter.v1"
"""The type of the artifacts that this project writes."""

_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
_TITLE: Final = "org.opencontainers.image.title"
_IS_FOLDER: Final = "io.deis.oras.content.unpack"
_FOLDER: Final = ".tar+gzip"  # oras-py gives files the type of a plain tar
_MOST_MANIFEST: Final = 1 << 20
_MOST_LAYERS: Final = 1000
_DIGEST: Final = re.compile("sha256:[0-9a-f]{64}")
_TIMEOUT: Final = (10.0, 30.0)  # seconds: to connect, and between two pieces
_CHUNK: Final = 1 << 20


def _as_it_is(request: PreparedRequest) -> PreparedRequest:
    return request


class _Session(requests.Session):
    """A session with deadlines that gives no host to which a redirect leads a password, and never reads ~/.netrc."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = _as_it_is  # else ~/.netrc's password would take the place of the token

    def rebuild_auth(self, prepared_request: PreparedRequest, response: Response) -> None:
        """Keeps `Authorization` from another host, as `requests.Session` does, and puts no password in its place."""
        if self.should_strip_auth(str(response.request.url), str(prepared_request.url)):
            prepared_request.headers.pop("Authorization", None)

    def request(self, *args: Any, **options: Any) -> Response:
        """Sends a request as `requests.Session` does.

        Raises:
            InvalidResponse: a host to which the registry redirected asks for credentials, which oras would give it.
        """
        answer = super().request(*args, **{"timeout": _TIMEOUT, **options})
        if answer.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            answer.close()  # its body is never read
            if answer.history:
                raise InvalidResponse("the registry redirects to a host that asks for credentials: it is given none")
        return answer


class Registry:
    """The repository of an artifact in a registry.

    Errors of every method: NotFound, Unauthenticated, Forbidden, InvalidRequest (the registry refused), InvalidResponse
    (it sent something else than it should), ConnectionFailed.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._scheme = "http" if _is_loopback(address.place) else "https"
        self._base = f"{self._scheme}://{address.place}/v2/{address.path}/"
        self._authorization: dict[str, str] = {}
        self._session = _Session()
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        if self._scheme == "https":
            del self._session.adapters["http://"]  # neither a redirect nor a token's realm leads out of TLS

    def close(self) -> None:
        """Closes the connections."""
        self._session.close()

    def manifest(self) -> tuple[str, dict[str, Any]]:
        """Returns the digest and the content of the artifact's manifest."""
        revision = str(self._address.revision)
        with self._translated(), self._asked("GET", f"manifests/{revision}", headers={"Accept": _MANIFEST}) as answer:
            data = b""
            for piece in answer.iter_content(_CHUNK):
                data += piece
                if len(data) > _MOST_MANIFEST:
                    raise InvalidResponse(f"the manifest of {self._address} has more than {_MOST_MANIFEST} bytes")
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if ":" in revision and digest != revision:
            raise InvalidResponse(f"the registry sent the manifest {digest} for {revision}")
        try:
            manifest = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InvalidResponse(f"the manifest of {self._address} is not JSON") from error
        if not isinstance(manifest, dict) or manifest.get("mediaType", _MANIFEST) != _MANIFEST:
            raise InvalidCheckpoint(f"{self._address} is no OCI artifact with a single manifest")
        return digest, manifest

    def download(self, layer: "Layer", path: Path) -> None:
        """Writes the content of a layer to a file, and verifies its size and digest."""
        digest, written = hashlib.sha256(), 0
        with self._translated(), self._asked("GET", f"blobs/{layer.digest}") as answer, path.open("wb") as file:
            for piece in answer.iter_content(_CHUNK):
                written += len(piece)
                if written > layer.size:
                    break
                digest.update(piece)
                file.write(piece)
        if written != layer.size or f"sha256:{digest.hexdigest()}" != layer.digest:
            raise InvalidResponse(f"what came for {layer.title} of {self._address} does not match its size and digest")

    def upload(self, file: io.BufferedReader | io.BytesIO) -> dict[str, Any]:
        """Stores a file as a blob, unless it is there; returns its digest and size as a manifest has them."""
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        size = file.seek(0, os.SEEK_END)
        with self._translated():
            with self._request("HEAD", f"blobs/{digest}") as known:
                if known.status_code == HTTPStatus.OK:
                    return {"digest": digest, "size": size}
            with self._asked("POST", "blobs/uploads/") as begun:
                there = urljoin(begun.url, begun.headers.get("Location", ""))
            if urlsplit(there)[:2] != urlsplit(self._base)[:2]:
                raise InvalidResponse("the registry takes uploads on another host: it is given no credentials")
            file.seek(0)
            there += f"{'&' if '?' in there else '?'}digest={digest}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            with self._asked("PUT", there, headers=headers, data=file):
                return {"digest": digest, "size": size}

    def put_manifest(self, manifest: Mapping[str, Any]) -> str:
        """Stores the artifact's manifest under its tag; returns its digest."""
        data = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
        with self._translated():
            path = f"manifests/{self._address.revision}"
            self._asked("PUT", path, headers={"Content-Type": _MANIFEST}, data=data).close()
        return f"sha256:{hashlib.sha256(data).hexdigest()}"

    def _asked(self, method: str, path: str, **options: Any) -> Response:
        """Returns a good answer."""
        answer = self._request(method, path, **options)
        if answer.status_code < HTTPStatus.MULTIPLE_CHOICES:
            return answer
        answer.close()
        match answer.status_code:
            case HTTPStatus.NOT_FOUND:
                raise NotFound(f"there is no {self._address}, or the credentials may not see it")
            case HTTPStatus.UNAUTHORIZED:
                raise Unauthenticated(f"the registry wants credentials for {self._address}: run `docker login`")
            case HTTPStatus.FORBIDDEN:
                raise Forbidden(f"the credentials may not do that with {self._address}: look at their rights")
        raise InvalidRequest(f"the registry refused {self._address} with status {answer.status_code}")

    def _request(self, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any) -> Response:
        url, own = urljoin(self._base, path), headers or {}
        answer = self._session.request(method, url, headers={**own, **self._authorization}, stream=True, **options)
        if answer.status_code != HTTPStatus.UNAUTHORIZED:
            return answer
        self._authorization = self._authorized(answer)
        if "data" in options and hasattr(options["data"], "seek"):
            options["data"].seek(0)
        return self._session.request(method, url, headers={**own, **self._authorization}, stream=True, **options)

    def _authorized(self, refused: Response) -> dict[str, str]:
        """Returns the header that answers a registry's challenge: a password, or a new token for what was asked."""
        is_basic = refused.headers.get("WWW-Authenticate", "").lower().startswith("basic")
        auth = oras.auth.get_auth_backend(
            "basic" if is_basic else "token", self._session, insecure=self._scheme == "http"
        )
        try:
            auth.load_configs(oras.container.Container(f"{self._address.place}/{self._address.path}"))
            signed, _ = auth.authenticate_request(refused, {})
            return {"Authorization": signed["Authorization"]}
        except (AttributeError, KeyError, TypeError) as error:  # there is no login, or no realm to ask
            raise Unauthenticated(
                f"the registry wants credentials for {self._address}: run `docker login {self._address.place}`"
            ) from error

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except requests.exceptions.InvalidSchema as error:
            raise InvalidResponse("the registry leads to an address without TLS: it was not asked") from error
        except requests.RequestException as error:
            what = type(error).__name__
            raise ConnectionFailed(f"the registry of {self._address} did not answer: {what}") from error


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of an artifact; `title` is a file's name, or that of a folder, which the layer has as an archive."""

    digest: str
    size: int
    title: str
    is_folder: bool

    @classmethod
    def parse(cls, described: Any) -> Self:
        """Returns the layer that a manifest describes.

        Raises:
            InvalidCheckpoint: it has no digest or size.
        """
        values = described if isinstance(described, dict) else {}
        digest, size = str(values.get("digest")), values.get("size")
        if not _DIGEST.fullmatch(digest) or type(size) is not int or size < 0:
            raise InvalidCheckpoint(f"a layer of the artifact has the digest {digest:.80} and the size {size!r:.20}")
        annotations = values.get("annotations")
        annotations = annotations if isinstance(annotations, dict) else {}
        is_folder = annotations.get(_IS_FOLDER) == "true" or str(values.get("mediaType")).endswith(_FOLDER)
        return cls(digest, size, str(annotations.get(_TITLE, "")), is_folder)


def download(address: Address, folder: Path, most: int) -> tuple[Path, dict[str, str]]:
    """Downloads an adapter's files to `folder`; returns the path of its weights, and annotations that say where they
    come from.

    `most` bounds the weights' bytes.

    Raises:
        NotFound: there is no such artifact.
        Unauthenticated, Forbidden: the registry wants credentials, or others.
        InvalidCheckpoint, TooLarge: the artifact is no adapter.
        InvalidRequest, InvalidResponse, ConnectionFailed: the registry refused, sent something else than it announced,
            or did not answer.
    """
    with contextlib.closing(Registry(address)) as registry:
        digest, weights = _download(registry, address, folder, most)
    resolved = Address("oci", address.place, digest, address.path)
    tag = {} if address.revision == digest else {"source.revision": str(address.revision)}
    return folder / weights, {"source": str(resolved), **tag}


def _download(registry: Registry, address: Address, folder: Path, most: int) -> tuple[str, str]:
    """Returns the manifest's digest, and the name of the weights."""
    digest, manifest = registry.manifest()
    described = manifest.get("layers")
    if not isinstance(described, list) or len(described) > _MOST_LAYERS:
        raise InvalidCheckpoint(f"{address} has no list of layers, or more than {_MOST_LAYERS}")
    layers = [Layer.parse(each) for each in described]
    folders = [layer for layer in layers if layer.is_folder]
    if folders:
        return digest, _download_folder(registry, folders, folder, most)
    files = {layer.title: layer for layer in layers if layer.title and "/" not in layer.title}
    weights, names = wanted_files({name: layer.size for name, layer in files.items()}, most)
    for name in names:
        registry.download(files[name], folder / name)
    return digest, weights


def _download_folder(registry: Registry, folders: list[Layer], folder: Path, most: int) -> str:
    """Downloads the files of an adapter that is one folder, packed; returns the name of its weights."""
    if len(folders) > 1:
        raise InvalidCheckpoint(f"the artifact has {len(folders)} folders: push the adapter's alone")
    bound = most + _MOST_MANIFEST
    if folders[0].size > bound:
        raise TooLarge(f"the artifact's folder has {folders[0].size} bytes, and an adapter's may have {bound}")
    archive = folder / ".archive"
    registry.download(folders[0], archive)
    listing = archived_files(archive, bound)
    tops = {path.partition("/")[0] for path in listing if "/" in path}
    inside, sizes = files_at(listing, tops.pop() if len(tops) == 1 and all("/" in path for path in listing) else "")
    weights, names = wanted_files(sizes, most)
    extract(archive, {f"{inside}/{name}" if inside else name: folder / name for name in names}, bound)
    archive.unlink()
    return weights


def store(address: Address, files: Mapping[str, tuple[Path, str]], annotations: Mapping[str, str]) -> str:
    """Stores an adapter as an artifact; returns its digest. `files` has the path and media type of each name.

    Raises:
        InvalidRequest: the address is a digest's, or the registry refused.
        NotFound, Unauthenticated, Forbidden, InvalidResponse, ConnectionFailed: as every method of `Registry`.
    """
    if ":" in str(address.revision):
        raise InvalidRequest(f"{address} names a digest, which follows from the content: name a tag")
    with contextlib.closing(Registry(address)) as registry:
        layers = []
        for name, (path, media_type) in files.items():
            with path.open("rb") as file:
                described = {"mediaType": media_type, **registry.upload(file), "annotations": {_TITLE: name}}
            layers.append(described)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": ARTIFACT,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", **registry.upload(io.BytesIO(b"{}"))},
            "layers": layers,
            "annotations": dict(annotations),
        }
        return registry.put_manifest(manifest)


def _is_loopback(place: str) -> bool:
    host = urlsplit(f"//{place}").hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"

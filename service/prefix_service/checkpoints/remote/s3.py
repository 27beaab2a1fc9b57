"""Downloads an adapter from a bucket of an S3-compatible server, which the usual `AWS_…` variables lead to."""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import S3Store

from prefix_service.checkpoints.remote.address import Address
from prefix_service.checkpoints.remote.wanted import BESIDE, MOST_FILES, files_at, wanted_files
from prefix_service.errors import (
    Conflict,
    ConnectionFailed,
    Forbidden,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    PrefixServiceError,
    Unauthenticated,
)

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

T = TypeVar("T")
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_CONNECT, _STALLED, _RETRYING = timedelta(seconds=10), timedelta(seconds=30), timedelta(seconds=20)
_STATUS: Final = re.compile(r"status code: ([0-9]{3})\b")


def download(address: Address, folder: Path, most: int) -> tuple[Path, dict[str, str]]:
    """Downloads an adapter's files to `folder`; returns the path of its weights, and annotations that say where they
    come from.

    `most` bounds the weights' bytes.

    Raises:
        NotFound: there is no such bucket or path.
        Unauthenticated, Forbidden: the credentials are missing, or may not read it.
        InvalidCheckpoint, TooLarge: the files are not those of an adapter.
        Conflict: an object was replaced since it was listed.
        InvalidRequest, InvalidResponse, ConnectionFailed: the variables cannot be used, an object does not have the
            announced size, or the server did not answer.
    """
    store = _store(address)
    listing = _asked(address, lambda: _listing(store, address))
    inside, sizes = files_at({key: found["size"] for key, found in listing.items()}, address.path)
    weights, names = wanted_files(sizes, most)
    for name in names:
        key = f"{inside}/{name}" if inside else name
        _save(address, store, listing[key], folder / name)
    return folder / weights, {"source": str(address)}


def _listing(store: S3Store, address: Address) -> dict[str, "ObjectMeta"]:
    """Returns the objects of an address by key. If the address names one object, they are that object and the other
    files of an adapter in its folder; else they are all objects whose keys begin with the address's path and `/`.

    Raises:
        InvalidRequest: there are more than `MOST_FILES`.
    """
    if (found := _head(store, address.path)) is not None:
        folder = address.path.rpartition("/")[0]
        beside = [_head(store, f"{folder}/{name}".lstrip("/")) for name in BESIDE]
        return {each["path"]: each for each in (found, *beside) if each is not None}
    listing: dict[str, ObjectMeta] = {}
    for page in obstore.list(store, address.path, chunk_size=1000):
        listing.update({each["path"]: each for each in page})
        if len(listing) > MOST_FILES:
            raise InvalidRequest(f"{address} has more than {MOST_FILES} objects: name the adapter's folder")
    return listing


def _head(store: S3Store, key: str) -> "ObjectMeta | None":
    try:
        return obstore.head(store, key)
    except FileNotFoundError:
        return None


def _store(address: Address) -> S3Store:
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    client: ClientConfig = {"connect_timeout": _CONNECT, "read_timeout": _STALLED, "timeout": timedelta(hours=1)}
    if endpoint.startswith("http://"):
        client["allow_http"] = True
    retry: RetryConfig = {"max_retries": 4, "retry_timeout": _RETRYING}
    try:
        if authorities := os.environ.get("AWS_CA_BUNDLE"):
            client["root_certificate"] = Path(authorities).read_bytes()
        return S3Store(address.place, client_options=client, retry_config=retry)
    except (BaseError, ValueError, OSError):
        # The foreign error may show a value.
        raise InvalidRequest(f"the AWS_… variables for {address} cannot be used: look at their values") from None


def _save(address: Address, store: S3Store, found: "ObjectMeta", path: Path) -> None:
    """Writes an object to a file if it is still the one that was listed."""
    key, size = found["path"], found["size"]
    options: GetOptions = {} if found["e_tag"] is None else {"if_match": found["e_tag"]}

    def write() -> int:
        written = 0
        with path.open("wb") as file:
            for piece in obstore.get(store, key, options=options).stream(min_chunk_size=1 << 20):
                written += len(piece)
                if written > size:
                    break
                file.write(piece)
        return written

    if (written := _asked(address, write)) != size:
        raise InvalidResponse(f"{key} was announced with {size} bytes, and {written} or more came: try again")


def _asked(address: Address, call: Callable[[], T]) -> T:
    """Returns what a call of obstore returns. The text of its errors can hold a key's id, so none of it is shown."""
    try:
        return call()
    except (BaseError, ValueError, FileNotFoundError) as error:
        raise _error(address, error) from None


def _error(address: Address, error: Exception) -> PrefixServiceError:
    status = int(found[1]) if (found := _STATUS.search(str(error))) else 0
    if isinstance(error, UnauthenticatedError) or "credentials" in str(error).lower():
        return Unauthenticated(
            f"{address} wants credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true "
            "for a public bucket"
        )
    if isinstance(error, PermissionDeniedError) or status == HTTPStatus.FORBIDDEN:
        return Forbidden(f"these credentials may not read {address}: look at AWS_ACCESS_KEY_ID")
    if isinstance(error, PreconditionError):
        return Conflict(f"an object of {address} was replaced while the adapter was downloaded: try again")
    if isinstance(error, FileNotFoundError) or status == HTTPStatus.NOT_FOUND:
        return NotFound(f"there is no {address}: look at the bucket's name and AWS_ENDPOINT_URL")
    if status:
        return InvalidRequest(f"the server refused {address} with status {status}")
    return ConnectionFailed(f"the server of {address} did not answer: look at AWS_ENDPOINT_URL")

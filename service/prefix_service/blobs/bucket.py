"""A bucket of an S3-compatible server: objects below one path. All calls block, with deadlines; errors are our own."""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from prefix_service.blobs.refusals import Refusal, refusal_of, translated_refusal
from prefix_service.errors import InvalidInput, PrefixServiceError, Unavailable
from prefix_service.system.spans import carried, span

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

T = TypeVar("T")
RANGE: Final = 8 << 20
"""Bytes of one request: of a read, and of a part of an upload."""

_AHEAD: Final = 4  # ranges, or parts, that are under way at a time
_DEADLINE, _STALLED, _CONNECT = timedelta(seconds=30), timedelta(seconds=10), timedelta(seconds=2)
_RETRYING: Final = timedelta(seconds=6)
_QUICK: Final = timedelta(seconds=1.5)  # so that /readyz has an answer before its own deadline
_PAGE: Final = 1000
_PAUSE: Final = 5.0  # seconds without a request after the server did not answer
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_MISSING: Final = "missing"  # an object that never exists
_CLOCK: Final = "clock"  # an object that is written to read the server's time


@dataclass(frozen=True, slots=True)
class Found:
    """An object in a bucket; `etag` distinguishes its contents, but is no digest of them."""

    key: str
    size: int
    modified: datetime
    etag: str | None


@dataclass(frozen=True, slots=True)
class Body:
    """An object while it is read: what it was when its first bytes came, and its bytes in order."""

    found: Found
    pieces: Generator[memoryview, None, None]


class Bucket:
    """The objects below the path of `url`, `s3://bucket/path`. The server and the keys come from the environment's
    `AWS_…` variables, which obstore reads too.

    Raises:
        InvalidInput: a variable is malformed, or the file of AWS_CA_BUNDLE cannot be read.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.name, path = parts.netloc, parts.path.strip("/")
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
        self.host = _host(endpoint)
        self.identity = f"s3://{self.name}/{path}@{self.host}"
        client: ClientConfig = {"connect_timeout": _CONNECT, "read_timeout": _STALLED, "timeout": _DEADLINE}
        if endpoint is not None and endpoint.startswith("http://"):
            client["allow_http"] = True
        if authorities := os.environ.get("AWS_CA_BUNDLE"):
            client["root_certificate"] = _read(Path(authorities))
        retry: RetryConfig = {"max_retries": 4, "retry_timeout": _RETRYING}
        try:
            self._store = S3Store(self.name, prefix=path or None, client_options=client, retry_config=retry)
            quick = client | {"timeout": _QUICK, "connect_timeout": _QUICK}
            self._quick = S3Store(self.name, prefix=path or None, client_options=quick, retry_config={"max_retries": 0})
        except (BaseError, ValueError):
            # The foreign error may show a value.
            raise InvalidInput(f"the AWS_… variables for {url} cannot be used: look at their values") from None
        self._away_until = 0.0
        self._away: Refusal | None = None

    def check(self) -> None:
        """Checks that the bucket answers, soon. If it does, requests are made again that a failure held back.

        Raises:
            Unavailable, StorageFailed: it does not, or refuses.
        """
        refused = self._result(lambda: obstore.get(self._quick, _MISSING))
        if isinstance(refused, Refusal) and not refused.is_missing:
            raise self._translated(refused, "look into the bucket")
        self._away = None

    def read(self, key: str) -> Body | None:
        """Returns an object, whose bytes come in ranges, a few under way at a time; None if it is missing.

        Its pieces raise as this does.

        Raises:
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        first = self._range(key, 0)
        if isinstance(first, Refusal):
            if first.is_missing:
                return None
            empty = self.head(key)  # an empty object has no first byte
            return None if empty is None else Body(empty, self._pieces(empty, memoryview(b"")))
        found, piece = first
        return Body(found, self._pieces(found, piece))

    def _pieces(self, found: Found, first: memoryview) -> Generator[memoryview, None, None]:
        yield first
        if found.size <= RANGE:
            return
        with ThreadPoolExecutor(_AHEAD, "blob-range") as threads:
            coming: deque[Future[memoryview]] = deque()
            try:
                for start in range(RANGE, found.size, RANGE):
                    coming.append(threads.submit(carried(partial(self._next, found, start))))
                    if len(coming) == _AHEAD:
                        yield coming.popleft().result()
                while coming:
                    yield coming.popleft().result()
            finally:
                for piece in coming:
                    piece.cancel()

    def _next(self, found: Found, start: int) -> memoryview:
        """Returns the range of an object that begins at `start`."""
        come = self._range(found.key, start)
        if isinstance(come, Refusal) or come[0].size != found.size:
            raise Unavailable(f"{found.key} was replaced while it was read: try again")
        return come[1]

    def _range(self, key: str, start: int) -> tuple[Found, memoryview] | Refusal:
        """Returns a range, or that the object or the range is missing."""
        come = self._ask(f"read {key}", partial(self._get, key, start), _is_missing_or_outside)
        if not isinstance(come, Refusal) and len(come[1]) != min(RANGE, come[0].size - start):
            raise Unavailable(f"cannot read {key}: {self.host} sends fewer bytes than it announces", retry_after=5)
        return come

    def _get(self, key: str, start: int) -> tuple[Found, memoryview]:
        result = obstore.get(self._store, key, options={"range": (start, start + RANGE)})
        return _found(result.meta), memoryview(result.bytes())

    def write(self, key: str, file: Path | bytes) -> None:
        """Stores an object, in parts if it is large. An object that the server refuses to replace is left alone.

        Raises:
            OutOfSpace, Unavailable, StorageFailed: the server refused; nothing, or the whole object, is visible.
        """
        put = partial(obstore.put, self._store, key, file, chunk_size=RANGE, max_concurrency=_AHEAD)
        refused = self._ask(f"store {key}", put, lambda refusal: refusal.is_conditional)
        if isinstance(refused, Refusal) and self.head(key) is None:
            raise self._translated(refused, f"store {key}")

    def head(self, key: str) -> Found | None:
        """Returns what an object is; None if it is missing.

        Raises:
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        found = self._ask(f"look for {key}", lambda: obstore.head(self._store, key), _is_missing)
        if not isinstance(found, Refusal):
            return _found(found)
        if not found.code:  # an answer without a body leaves open whether the bucket is missing
            self.check()
        return None

    def now(self) -> datetime:
        """Returns the server's time, in whole seconds: the time of an object that this writes.

        Raises:
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        self.write(_CLOCK, b"written to read the time")
        found = self.head(_CLOCK)
        if found is None:
            raise Unavailable(f"{self.host} has lost {_CLOCK}, which it stored a moment ago")
        return found.modified

    def listed(self) -> Iterator[Found]:
        """Yields every object, page by page.

        Raises:
            Unavailable, StorageFailed: the server does not answer, or refuses.
        """
        pages = obstore.list(self._store, chunk_size=_PAGE)
        while page := self._do("list the blobs", lambda: next(pages, ())):
            yield from map(_found, page)

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; one that is missing is no error.

        Raises:
            Unavailable, StorageFailed: the server refused; some may be deleted.
        """
        self._ask("delete blobs", lambda: obstore.delete(self._store, list(keys)), _is_missing)

    def copy(self, key: str, to: str) -> None:
        """Copies an object inside the bucket.

        Raises:
            Unavailable, StorageFailed: the server refused.
        """
        self._do(f"copy {key}", lambda: obstore.copy(self._store, key, to))

    def _do(self, action: str, call: Callable[[], T]) -> T:
        """Returns what `call` returns; no refusal is expected."""
        result = self._ask(action, call, lambda _: False)
        assert not isinstance(result, Refusal)  # noqa: S101
        return result

    def _ask(self, action: str, call: Callable[[], T], expected: Callable[[Refusal], bool]) -> T | Refusal:
        """Returns what `call` returns, or the refusal if it is `expected`.

        For some seconds after the server did not answer, nobody waits for it again.
        """
        away = self._away
        if away is not None and time.monotonic() < self._away_until:
            raise self._translated(away, action)
        with span("ask the bucket", {"prefix.action": action, "server.address": self.host}):
            result = self._result(call)
        if not isinstance(result, Refusal) or expected(result):
            self._away = None
            return result
        if result.is_silence:
            self._away, self._away_until = result, time.monotonic() + _PAUSE
        raise self._translated(result, action)

    def _translated(self, refusal: Refusal, action: str) -> PrefixServiceError:
        return translated_refusal(refusal, action, self.host, self.name)

    @staticmethod
    def _result(call: Callable[[], T]) -> T | Refusal:
        try:
            return call()
        except (BaseError, OSError, ValueError) as error:
            return refusal_of(error)


def _is_missing(refusal: Refusal) -> bool:
    return refusal.is_missing


def _is_missing_or_outside(refusal: Refusal) -> bool:
    return refusal.is_missing or refusal.is_outside


def _found(meta: "ObjectMeta") -> Found:
    return Found(meta["path"], meta["size"], meta["last_modified"], meta["e_tag"])


def _host(endpoint: str | None) -> str:
    """Returns the server's name and port, without what else an address can hold."""
    if endpoint is None:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return f"s3.{region}.amazonaws.com"
    parts = urlsplit(endpoint)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _read(authorities: Path) -> bytes:
    try:
        return authorities.read_bytes()
    except OSError as error:
        raise InvalidInput(f"AWS_CA_BUNDLE={authorities} cannot be read: {os.strerror(error.errno or 0)}") from error

"""Requests and answers of the service, without any I/O."""

import json
import random
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, TypeVar
from urllib.parse import quote

from prefix_service import errors
from prefix_service.errors import InvalidResponse, PrefixServiceError, TooLarge, Unavailable
from prefix_service.prefix.ranks import Rank
from prefix_service.prefix.references import Reference, check_name
from prefix_service.prefix.variant import MEDIA_TYPE, KVDtype, Layout, Span
from prefix_service.prefix.wire.digests import Algorithm, digest_of, parse_digests

Files = Mapping[str, bytes | BinaryIO]
Buffer = bytearray | memoryview
"""Memory that a body has arrived in."""

Progress = Callable[[int, int], None]
"""Called with the bytes of a body that have travelled, and their total."""

BodyDigest = tuple[Algorithm, bytes]

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")

_WANT_DIGEST: Final = {"Want-Repr-Digest": "crc32c=2, sha-256=1"}
"""Prefers the cheap one; a service that does not know it sends SHA-256."""


def _new_id() -> str:
    return f"{random.getrandbits(128):032x}"


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `files` are the parts of a multipart body, in order; `content` is a body as it is, whose media type
    stands in `headers`. `progress` follows its body, or that of a fetch's answer. The service logs it under
    `request_id`, each attempt and each range."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    files: Files | None = None
    json: Any = None
    content: bytes | None = None
    progress: Progress | None = None
    request_id: str = field(default_factory=_new_id, kw_only=True, compare=False)

    @property
    def is_idempotent(self) -> bool:
        """Whether carrying the request out twice has the same effect as once (RFC 9110, section 9.2.2).

        A change under a condition is not idempotent: the first may make the condition false. Neither is a POST, since a
        composition resolves its references again, except an upload, whose content names its version.
        """
        if self.method == "POST":
            return self.files is not None
        return self.method == "GET" or not self.headers.keys() & {"If-Match", "If-None-Match"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `headers` have lower-case names, `digest` is the body's where it was computed on arrival."""

    status: int
    headers: Mapping[str, str]
    body: Buffer
    digest: BodyDigest | None = None

    @property
    def request_id(self) -> str | None:
        """The id under which the service's log has the request."""
        found = self.headers.get("x-request-id", "")
        return found if _REQUEST_ID.fullmatch(found) else None

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            InvalidResponse: it is not JSON, or is nested too deeply.
        """
        try:
            return json.loads(bytes(self.body))
        except (ValueError, RecursionError) as error:
            raise InvalidResponse(f"the answer is not JSON that can be read: {bytes(self.body[:80])!r}") from error

    def json_object(self) -> dict[str, Any]:
        """Returns the JSON object in the body.

        Raises:
            InvalidResponse: the body is something else.
        """
        content_type = self.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise InvalidResponse(f"the answer should be application/json, got {content_type or 'nothing'!r:.100}")
        found = self.json()
        if not isinstance(found, dict):
            raise InvalidResponse(f"the answer should be a JSON object, got {bytes(self.body[:80])!r}")
        return found


@dataclass(frozen=True, slots=True)
class Fetch(Request):
    """A GET of tensors. `read` makes of its answer what the flow is sent, where the answer arrived: for asyncio that
    is a worker thread, always so if `blocks`. `is_verified` asks for the body's digest, computed on arrival."""

    read: Callable[[Answer], Any] = Answer.json
    is_verified: bool = False
    blocks: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """A blocking step that is no request: a read from disk, a large copy. With asyncio a worker thread does it."""

    run: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Together:
    """Flows to carry out in parallel, at most `at_once` at a time. The flow that asks for it is sent a list: of each
    flow its result, or the `PrefixServiceError` that it ended with."""

    flows: Sequence[Generator[Any, Any, Any]]
    at_once: int


Step = Request | Work | Together
T = TypeVar("T")
Flow = Generator[Step, Any, T]
"""An operation without I/O: it yields its steps, is sent what they bring, and returns its result."""


def tenant_path(tenant: str, *rest: str) -> str:
    """The path of a tenant, or of something of it."""
    return "/".join(("/v1/tenants", check_name("tenant", tenant), *rest))


def adapter_path(tenant: str, reference: Reference | str, *rest: str) -> str:
    """The path of an adapter, or of something of it."""
    return tenant_path(tenant, "adapters", quote(str(reference), safe="@:"), *rest)


def prefix_request(
    tenant: str,
    reference: Reference,
    *,
    layout: Layout,
    dtypes: Mapping[str, KVDtype],
    layers: Span | None = None,
    kv_heads: Span | None = None,
    tp: Rank | None = None,
    etag: str | None = None,
    read: Callable[[Answer], Any],
    is_verified: bool,
    blocks: bool,
) -> Fetch:
    """Ask for one row of a prefix; a batch is made of it on arrival. `dtypes` are those of the request's options."""
    params: dict[str, str] = {"layout": layout, "expand": "false", **dtypes}
    for name, span in (("layers", layers), ("kv_heads", kv_heads)):
        if span is not None:
            params[name] = f"{span[0]}:{span[1]}"
    if tp is not None:
        params["tp"] = f"{tp[0]}/{tp[1]}"
    headers = {"Accept": MEDIA_TYPE} | ({} if etag is None else {"If-None-Match": etag})
    if is_verified:
        headers |= _WANT_DIGEST
    path = adapter_path(tenant, reference, "prefix")
    return Fetch("GET", path, params, headers, read=read, is_verified=is_verified, blocks=blocks)


def verifiable(headers: Mapping[str, str]) -> Algorithm | None:
    """Return the algorithm by which an answer with these headers is verified, the cheapest that it has; None if it has
    no digest."""
    found = parse_digests(headers.get("repr-digest", ""))
    return "crc32c" if "crc32c" in found else "sha-256" if found else None


def check_digest(answer: Answer) -> None:
    """Compare a body with its `Repr-Digest` (RFC 9530).

    Raises:
        InvalidResponse: they differ, or there is no digest.
    """
    algorithm = verifiable(answer.headers)
    if algorithm is None:
        raise InvalidResponse("the answer has no Repr-Digest to verify it by; verify_digest=False accepts it")
    if answer.digest is not None and answer.digest[0] == algorithm:
        found = answer.digest[1]
    else:
        found = digest_of(algorithm, answer.body)
    if parse_digests(answer.headers["repr-digest"])[algorithm] != found:
        raise InvalidResponse(f"the answer does not match its Repr-Digest ({algorithm}): it was damaged on its way")


_OF_CLIENTS: Final = (errors.InvalidResponse, errors.ConnectionFailed)
_ERRORS: Final = {
    cls.code: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, PrefixServiceError) and cls not in _OF_CLIENTS
}
_SECONDS: Final = re.compile(r"[0-9]{1,9}")


def require_success(answer: Answer) -> Answer:
    """Returns the answer, if it is a success or a 304.

    Raises:
        PrefixServiceError: the error that the service reported, as the class of its `code`.
        Unavailable: a proxy says that the service is not there.
        TooLarge: a proxy says that the request is larger than it lets through.
        InvalidResponse: an answer that the service would not give.
    """
    try:
        return _successful(answer)
    except PrefixServiceError as error:
        error.met_by(answer.request_id)
        raise


def _successful(answer: Answer) -> Answer:
    encoding = answer.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise InvalidResponse(f"the answer is encoded as {encoding!r:.100}, which was not asked for")
    if 200 <= answer.status < 300 or answer.status == 304:
        return answer
    if answer.status < 400:
        where = answer.headers.get("location", "")
        raise InvalidResponse(f"status {answer.status} points elsewhere, to {where!r:.200}: is the URL right?")
    if not answer.headers.get("content-type", "").startswith("application/problem+json"):
        if answer.status in (502, 503, 504):
            raise Unavailable(f"the service is not reachable behind its proxy: status {answer.status}")
        if answer.status == 413:
            raise TooLarge(
                "413 from something in front of the service: raise its body limit (nginx: client_max_body_size)"
            )
        raise InvalidResponse(f"status {answer.status} that prefix-service does not send: is the URL right?")
    raise _reported(answer)


def _reported(answer: Answer) -> PrefixServiceError:
    problem = answer.json()
    if not isinstance(problem, dict):
        raise InvalidResponse(f"status {answer.status} with a problem that is no JSON object")
    detail = str(problem.get("detail", "")).encode(errors="replace").decode()
    error = _ERRORS.get(str(problem.get("code")), PrefixServiceError)(detail)
    if isinstance(error, Unavailable) and _SECONDS.fullmatch(answer.headers.get("retry-after", "")):
        error.retry_after = int(answer.headers["retry-after"])
    return error

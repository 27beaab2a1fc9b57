"""The errors that prefix-service reports, in the service and in the client.

PrefixServiceError
├── InvalidInput                input that cannot be accepted
│   ├── InvalidReference        a tenant, adapter, version, alias or digest is malformed
│   ├── InvalidConfig           adapter_config.json or a base model's config.json
│   ├── InvalidCheckpoint       a weights file: its bytes, tensors or layout
│   │   └── UnsafeCheckpoint    a pickle, which the service never opens
│   ├── InvalidRequest          a parameter, a body or an attention mask
│   ├── DimensionMismatch       a prefix that does not fit the base model
│   └── BaseModelMismatch       (client) a prefix of another base model
├── NotFound                    missing, or another tenant's
├── Unauthenticated             no key, or an invalid one
├── Forbidden                   the key's scope is too small
│   └── ReadOnly                the service does not accept changes from anybody
├── Conflict                    the state of the resource forbids the request
├── Gone                        the resource existed, and is no longer kept
├── PreconditionFailed          If-Match or If-None-Match did not hold
├── TooLarge                    more bytes than the configured limit
├── RequestTimeout              a request did not arrive in time
├── MalformedRequest            not HTTP/1.1, or ambiguous
├── HeaderFieldsTooLarge        the head of a request, or one of its fields, is too large
├── UriTooLong                  path and query have too many bytes
├── NotAcceptable               no representation that the caller accepts
├── UnsupportedMediaType        a content type or encoding that is not supported
├── RangeNotSatisfiable         a byte range outside the body
├── OutOfSpace                  the disk or a memory budget is exhausted
│   └── QuotaExceeded           the tenant's quota is exhausted
├── Unavailable                 try again later
│   ├── RateLimited             more requests than the tenant's rate
│   ├── Overloaded              too many requests in flight, or too much work in progress
│   ├── CorruptBlob             stored bytes do not match their digest
│   └── StorageFailed           the disk or the catalog refused a write or a read
├── Internal                    a defect of the service
├── InvalidResponse             (client) an answer that violates the contract
└── ConnectionFailed            (client) no answer: refused, reset or timed out

`code` is stable: a client can branch on it, and the HTTP API sends it. `prefix_service.api.http.problems` has the one
table from these classes to HTTP statuses; this module knows no HTTP.
"""

from typing import ClassVar, Self

__all__ = [
    "BaseModelMismatch",
    "Conflict",
    "ConnectionFailed",
    "CorruptBlob",
    "DimensionMismatch",
    "Forbidden",
    "Gone",
    "HeaderFieldsTooLarge",
    "Internal",
    "InvalidCheckpoint",
    "InvalidConfig",
    "InvalidInput",
    "InvalidReference",
    "InvalidRequest",
    "InvalidResponse",
    "MalformedRequest",
    "NotAcceptable",
    "NotFound",
    "OutOfSpace",
    "Overloaded",
    "PreconditionFailed",
    "PrefixServiceError",
    "QuotaExceeded",
    "RangeNotSatisfiable",
    "RateLimited",
    "ReadOnly",
    "RequestTimeout",
    "StorageFailed",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnsafeCheckpoint",
    "UnsupportedMediaType",
    "UriTooLong",
]


class PrefixServiceError(Exception):
    """The root of all errors. `code` names the failure; `str(error)` says what was wrong, with which value, and what to
    do.

    The client sets `request_id` to the id of the failed request, by which the service's log can be searched. A
    traceback shows it too.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.request_id: str | None = None

    def met_by(self, request_id: str | None) -> Self:
        """Sets the id of the request that failed, unless it is set already; returns the error."""
        if request_id is not None and self.request_id is None:
            self.request_id = request_id
            self.add_note(f"request id: {request_id}")
        return self


class InvalidInput(PrefixServiceError):
    """Input that cannot be accepted as it is."""

    code = "invalid-input"


class InvalidReference(InvalidInput):
    """A tenant, adapter, version, alias or digest that is malformed."""

    code = "invalid-reference"


class InvalidConfig(InvalidInput):
    """An adapter's config or a base model's config that cannot be used."""

    code = "invalid-config"


class InvalidCheckpoint(InvalidInput):
    """A weights file that is malformed, incomplete, ambiguous, or does not match its config."""

    code = "invalid-checkpoint"


class UnsafeCheckpoint(InvalidCheckpoint):
    """A pickle, or an archive of one; the service never opens it (CVE-2025-32434)."""

    code = "unsafe-checkpoint"


class InvalidRequest(InvalidInput):
    """A parameter, a request body or an attention mask that is out of bounds or malformed."""

    code = "invalid-request"


class DimensionMismatch(InvalidInput):
    """A prefix whose layers, heads or head size do not fit the base model."""

    code = "dimension-mismatch"


class BaseModelMismatch(InvalidInput):
    """A prefix that fits the model, but was made for another one, by the fingerprints of both."""

    code = "base-model-mismatch"


class NotFound(PrefixServiceError):
    """A resource that is missing, or belongs to another tenant; callers cannot distinguish the two."""

    code = "not-found"


class Unauthenticated(PrefixServiceError):
    """The request has no key, or an unknown, expired or revoked one."""

    code = "unauthenticated"


class Forbidden(PrefixServiceError):
    """The key is valid, but its scope is too small."""

    code = "forbidden"


class ReadOnly(Forbidden):
    """The service runs read-only, and does not accept changes."""

    code = "read-only"


class Conflict(PrefixServiceError):
    """The present state of the resource forbids the change."""

    code = "conflict"


class Gone(PrefixServiceError):
    """The resource existed, and is no longer kept."""

    code = "gone"


class PreconditionFailed(PrefixServiceError):
    """`If-Match` or `If-None-Match` did not hold."""

    code = "precondition-failed"


class TooLarge(PrefixServiceError):
    """More bytes than the configured limit."""

    code = "too-large"


class RequestTimeout(PrefixServiceError):
    """The head or the body of a request did not arrive in time; the connection is closed."""

    code = "request-timeout"


class MalformedRequest(PrefixServiceError):
    """A request that is not HTTP/1.1, or is ambiguous about its target or its end; the connection is closed."""

    code = "malformed-request"


class HeaderFieldsTooLarge(PrefixServiceError):
    """The head of a request, or one of its fields, is too large; the connection is closed."""

    code = "header-fields-too-large"


class UriTooLong(PrefixServiceError):
    """The path and query of a request have too many bytes."""

    code = "uri-too-long"


class NotAcceptable(PrefixServiceError):
    """There is no representation that the caller accepts."""

    code = "not-acceptable"


class UnsupportedMediaType(PrefixServiceError):
    """A content type or content encoding that the service does not support."""

    code = "unsupported-media-type"


class RangeNotSatisfiable(PrefixServiceError):
    """A byte range outside the body of `length` bytes."""

    code = "range-not-satisfiable"

    def __init__(self, message: str, length: int = 0) -> None:
        super().__init__(message)
        self.length = length


class OutOfSpace(PrefixServiceError):
    """The disk or a memory budget is exhausted."""

    code = "out-of-space"


class QuotaExceeded(OutOfSpace):
    """The tenant has the most adapters or bytes that its quota allows."""

    code = "quota-exceeded"


class Unavailable(PrefixServiceError):
    """The service cannot answer now; try again after `retry_after` seconds."""

    code = "unavailable"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Unavailable):
    """The tenant sent more requests per second than its rate allows."""

    code = "rate-limited"


class Overloaded(Unavailable):
    """Too many requests are in flight, in the process or of the tenant, or too much work is in progress."""

    code = "overloaded"


class CorruptBlob(Unavailable):
    """Stored bytes do not match their digest. The version is quarantined; other versions are unaffected."""

    code = "corrupt-blob"


class StorageFailed(Unavailable):
    """The disk or the catalog refused a read or a write. If `is_undone`, it left nothing and is worth another try."""

    code = "storage-failed"
    is_undone = False


class Internal(PrefixServiceError):
    """A defect of the service; only the service's log has the details."""

    code = "internal"


class InvalidResponse(PrefixServiceError):
    """(client) The answer violates the contract: it is truncated, malformed, or does not match its digest."""

    code = "invalid-response"


class ConnectionFailed(PrefixServiceError):
    """(client) There was no answer: the connection was refused or reset, or the deadline passed."""

    code = "connection-failed"

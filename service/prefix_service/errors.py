"""Every failure that prefix-service reports, service and client alike.

PrefixServiceError
├── InvalidInput                what was given cannot be accepted
│   ├── InvalidReference        a tenant, adapter, version, alias or digest is not well formed
│   ├── InvalidConfig           adapter_config.json or a base model's config.json
│   ├── InvalidCheckpoint       a weights file: its bytes, tensors or layout
│   │   └── UnsafeCheckpoint    a pickle, which the service never opens
│   ├── InvalidRequest          a parameter, a body or an attention mask
│   └── DimensionMismatch       a prefix that does not fit the base model
├── NotFound                    missing, or another tenant's
├── Unauthenticated             no key, or not a valid one
├── Forbidden                   the key's scope is too small
│   └── ReadOnly                the service changes nothing, whoever asks
├── Conflict                    the state of the resource forbids it
├── Gone                        it was there, and is no longer kept
├── PreconditionFailed          If-Match or If-None-Match did not hold
├── TooLarge                    more bytes than the configured limit
├── RequestTimeout              a request did not arrive in time
├── MalformedRequest            not HTTP/1.1, or ambiguous
├── HeaderFieldsTooLarge        the head of a request, or one of its fields, is too large
├── UriTooLong                  path and query have too many bytes
├── NotAcceptable               no representation that the caller accepts
├── UnsupportedMediaType        a content type or encoding that is not read here
├── RangeNotSatisfiable         a byte range outside the body
├── OutOfSpace                  the disk or a memory budget is exhausted
│   └── QuotaExceeded           the tenant has as much as it may have
├── Unavailable                 try again later
│   ├── RateLimited             more requests than the tenant's rate
│   ├── Overloaded              too many requests in flight, or too much work in progress
│   ├── CorruptBlob             stored bytes no longer match their digest
│   └── StorageFailed           the disk or the catalog refused a write or a read
├── Internal                    a defect of the service
├── InvalidResponse             (client) an answer that is not what the contract says
└── ConnectionFailed            (client) no answer: refused, reset or timed out

`code` is stable: a client may branch on it, and the HTTP API sends it. `prefix_service.api.http.problems` has
the one table from these classes to HTTP statuses; nothing here knows HTTP.
"""

from typing import ClassVar, Self


class PrefixServiceError(Exception):
    """The root: `code` names the failure, `str(error)` says what was wrong, with which value, and what to do.

    `request_id` is set by the client: the id of the request that was answered so, by which the service's log has it. A
    traceback shows it too.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.request_id: str | None = None

    def met_by(self, request_id: str | None) -> Self:
        """Note which request met this error, unless that is noted already. Returns the error."""
        if request_id is not None and self.request_id is None:
            self.request_id = request_id
            self.add_note(f"request id: {request_id}")
        return self


class InvalidInput(PrefixServiceError):
    """What was given cannot be accepted as it is."""

    code = "invalid-input"


class InvalidReference(InvalidInput):
    """A tenant, adapter, version, alias or digest that is not well formed."""

    code = "invalid-reference"


class InvalidConfig(InvalidInput):
    """An adapter config or a base model's config that cannot be used."""

    code = "invalid-config"


class InvalidCheckpoint(InvalidInput):
    """A weights file that is malformed, incomplete, ambiguous, or does not match its config."""

    code = "invalid-checkpoint"


class UnsafeCheckpoint(InvalidCheckpoint):
    """A pickle, or an archive of one: never opened here (CVE-2025-32434)."""

    code = "unsafe-checkpoint"


class InvalidRequest(InvalidInput):
    """A parameter, a request body or an attention mask that is out of bounds or malformed."""

    code = "invalid-request"


class DimensionMismatch(InvalidInput):
    """A prefix whose layers, heads or head size do not fit the base model."""

    code = "dimension-mismatch"


class NotFound(PrefixServiceError):
    """Missing, or another tenant's: the two are not told apart."""

    code = "not-found"


class Unauthenticated(PrefixServiceError):
    """No key was given, or it is unknown, expired or revoked."""

    code = "unauthenticated"


class Forbidden(PrefixServiceError):
    """The key is valid, and its scope is too small."""

    code = "forbidden"


class ReadOnly(Forbidden):
    """The service was started to serve what there is, and changes nothing."""

    code = "read-only"


class Conflict(PrefixServiceError):
    """The resource's present state forbids the change."""

    code = "conflict"


class Gone(PrefixServiceError):
    """It was there, and is no longer kept."""

    code = "gone"


class PreconditionFailed(PrefixServiceError):
    """`If-Match` or `If-None-Match` did not hold."""

    code = "precondition-failed"


class TooLarge(PrefixServiceError):
    """More bytes than the configured limit."""

    code = "too-large"


class RequestTimeout(PrefixServiceError):
    """The head or the body of a request did not arrive in time; the connection ends."""

    code = "request-timeout"


class MalformedRequest(PrefixServiceError):
    """What came is not HTTP/1.1, or says two things about where it goes or ends; the connection ends."""

    code = "malformed-request"


class HeaderFieldsTooLarge(PrefixServiceError):
    """The head of a request, or one of its fields, is larger than any caller needs; the connection ends."""

    code = "header-fields-too-large"


class UriTooLong(PrefixServiceError):
    """Path and query of a request have more bytes than any caller needs."""

    code = "uri-too-long"


class NotAcceptable(PrefixServiceError):
    """There is no representation that the caller accepts."""

    code = "not-acceptable"


class UnsupportedMediaType(PrefixServiceError):
    """A content type or content encoding that is not read here."""

    code = "unsupported-media-type"


class RangeNotSatisfiable(PrefixServiceError):
    """A byte range that lies outside the body of `length` bytes."""

    code = "range-not-satisfiable"

    def __init__(self, message: str, length: int = 0) -> None:
        super().__init__(message)
        self.length = length


class OutOfSpace(PrefixServiceError):
    """The disk or a memory budget is exhausted."""

    code = "out-of-space"


class QuotaExceeded(OutOfSpace):
    """The tenant has as many adapters or bytes as it may have."""

    code = "quota-exceeded"


class Unavailable(PrefixServiceError):
    """Not now: try again after `retry_after` seconds."""

    code = "unavailable"

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(Unavailable):
    """More requests a second than the tenant may send."""

    code = "rate-limited"


class Overloaded(Unavailable):
    """Too many requests are in flight, in the process or of the tenant, or too much work is in progress."""

    code = "overloaded"


class CorruptBlob(Unavailable):
    """Stored bytes no longer match their digest; the version is quarantined, others are unaffected."""

    code = "corrupt-blob"


class StorageFailed(Unavailable):
    """The disk or the catalog refused a read or a write."""

    code = "storage-failed"


class Internal(PrefixServiceError):
    """A defect of the service; its details are in the log of the service alone."""

    code = "internal"


class InvalidResponse(PrefixServiceError):
    """(client) The answer is not what the contract says: truncated, malformed, or of the wrong digest."""

    code = "invalid-response"


class ConnectionFailed(PrefixServiceError):
    """(client) No answer: the connection was refused or reset, or the deadline passed."""

    code = "connection-failed"

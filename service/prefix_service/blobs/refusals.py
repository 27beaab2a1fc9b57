"""Translates the errors of an S3 server, and of the network in front of it, into this project's errors.

The text of a foreign error can hold a key's id or a signed request, so none of it reaches a message or a log but the
server's own error code.
"""

import re
from dataclasses import dataclass
from typing import Final

from prefix_service.errors import OutOfSpace, PrefixServiceError, StorageFailed, Unavailable

_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")
_STATUS: Final = re.compile(r"status code: ([0-9]{3})\b")
_REDIRECTED: Final = frozenset({301, 307, 308})
_NO_SPACE: Final = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})
_WRONG_KEY: Final = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
)
_WRONG_REGION: Final = frozenset({"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraint"})
_ON_THE_WAY: Final = {
    "169.254.": "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "dns error": "its name is unknown: look at AWS_ENDPOINT_URL",
    "ConnectionRefused": "it refuses connections",
    "InvalidCertificate": "its certificate is not trusted: name the authority's file in AWS_CA_BUNDLE",
    "InvalidContentType": "it speaks no TLS: write AWS_ENDPOINT_URL with http://",
    "TimedOut": "it did not answer in time",
}
"""Words in the text of a failed connection, and what they mean."""

_BARE_REDIRECT: Final = "BareRedirect"
_BROKEN_OFF: Final = ("kind: Body", "kind: Decode")


@dataclass(frozen=True, slots=True)
class Refusal:
    """The status and the error code of an answer; 0 and "" stand for no answer, and for an answer without a code."""

    status: int
    code: str
    text: str

    @property
    def is_missing(self) -> bool:
        """True if the bucket exists, and the object does not."""
        return self.status == 404 and self.code != "NoSuchBucket"

    @property
    def is_conditional(self) -> bool:
        """Whether the server refused to write because of what is there, or because it knows no conditions."""
        return self.status in (409, 412, 501)

    @property
    def is_silence(self) -> bool:
        """Whether the server did not begin an answer."""
        return self.status == 0 and not any(word in self.text for word in _BROKEN_OFF)

    @property
    def is_outside(self) -> bool:
        """Whether the object has no byte in the range that was asked for, so it is empty."""
        return self.status == 416


def refusal_of(error: Exception) -> Refusal:
    """Returns what the server answered."""
    text = str(error)
    if _BARE_REDIRECT in text:
        return Refusal(301, "PermanentRedirect", text)
    code, status = _CODE.search(text), _STATUS.search(text)
    return Refusal(int(status[1]) if status else 0, code[1] if code else "", text)


def translated_refusal(refusal: Refusal, action: str, host: str, bucket: str) -> PrefixServiceError:
    """Returns the error for a refusal; `action` completes "cannot …" in its message.

    StorageFailed if an operator must change something, Unavailable if the server may answer later.
    """
    if refusal.is_silence:
        reason = next((reason for word, reason in _ON_THE_WAY.items() if word in refusal.text), "there is no answer")
        return Unavailable(f"cannot {action}: the blob store {host} is away ({reason})", retry_after=5)
    if refusal.status == 0:
        return Unavailable(f"cannot {action}: the answer of {host} broke off", retry_after=5)
    said = f"cannot {action}: {host} answers {refusal.status}{f' {refusal.code}' if refusal.code else ''}"
    if refusal.code == "NoSuchBucket":
        return StorageFailed(f"{said}: make the bucket {bucket!r}, or correct PREFIX_BLOBS_URL")
    if refusal.code == "RequestTimeTooSkewed":
        return StorageFailed(f"{said}: this machine's clock is wrong, or that of the store; set it by NTP")
    if refusal.code in _WRONG_REGION or refusal.status in _REDIRECTED:
        return StorageFailed(f"{said}: set AWS_REGION to the region of the bucket {bucket!r}")
    if refusal.code in _WRONG_KEY or refusal.status == 401:
        return StorageFailed(f"{said}: look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN")
    if refusal.status == 403:
        return StorageFailed(
            f"{said}: let the key read, write, delete and list in the bucket {bucket!r}, or correct AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY"
        )
    if refusal.status == 507 or refusal.code in _NO_SPACE:
        return OutOfSpace(f"{said}: the blob store has no room")
    return Unavailable(said, retry_after=5)

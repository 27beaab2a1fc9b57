"""Numbers and revisions as opaque text, so that neither order nor gaps reveal what other callers do."""

import hmac
import re
import secrets
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from prefix_service.catalog.records import Principal
from prefix_service.errors import InvalidRequest

_TEXT: Final = re.compile(r"[0-9a-f]{32}")
_REVISION_BITS: Final = 40  # of a number; they suffice for 35 years of a thousand changes a second
_RANDOM_BITS: Final = 24


class OpaqueNumbers:
    """Converts numbers below 2**64 to 32 hex digits, and back.

    This is deterministic authenticated encryption in the manner of SIV (RFC 5297), with HMAC-SHA-256 for both of its
    functions: a tag of the number, and the number under a key stream that depends on the tag. Without `secret`, 32
    bytes, nobody can read or forge a text.
    """

    def __init__(self, secret: bytes) -> None:
        self._tags, self._stream = (hmac.digest(secret, purpose, "sha256") for purpose in (b"tag", b"stream"))

    def text(self, number: int) -> str:
        """Returns the text of a number; it is always the same."""
        plain = number.to_bytes(8)
        tag = self._tag(plain)
        return (tag + self._hidden(tag, plain)).hex()

    def number(self, text: str) -> int:
        """Returns the number of a text.

        Raises:
            InvalidRequest: the text was not made with this secret.
        """
        if (found := self._number(text)) is None:
            raise InvalidRequest(f"{text!r:.80} is not a value from a listing")
        return found

    def holds(self, text: str) -> bool:
        """Returns whether a text was made by `text`."""
        return self._number(text) is not None

    def _number(self, text: str) -> int | None:
        if not _TEXT.fullmatch(text):
            return None
        sealed = bytes.fromhex(text)
        plain = self._hidden(sealed[:8], sealed[8:])
        return int.from_bytes(plain) if hmac.compare_digest(self._tag(plain), sealed[:8]) else None

    def _tag(self, plain: bytes) -> bytes:
        return hmac.digest(self._tags, plain, "sha256")[:8]

    def _hidden(self, tag: bytes, data: bytes) -> bytes:
        """Returns eight bytes encrypted under the key stream of a tag, or decrypted, which is the same operation."""
        stream = hmac.digest(self._stream, tag, "sha256")[:8]
        return bytes(one ^ other for one, other in zip(data, stream, strict=True))


class Revisions:
    """Revisions as opaque texts, of which each is another, so that order, gaps and equality of two texts say nothing of
    what other tenants do. A text belongs to the tenant that got it, or to the platform: other keys cannot use it.

    `derive` makes a secret for a purpose.
    """

    def __init__(self, derive: Callable[[str], bytes]) -> None:
        self._derive = derive
        self._numbers = lru_cache(1024)(self._make_numbers)

    def text(self, by: Principal, revision: int) -> str:
        """Returns a revision for a caller."""
        return self._numbers(by.tenant_id).text(secrets.randbits(_RANDOM_BITS) << _REVISION_BITS | revision)

    def revision(self, by: Principal, text: str) -> int:
        """Returns the revision in a caller's text.

        Raises:
            InvalidRequest: the service did not give this text to the caller's tenant.
        """
        numbers = self._numbers(by.tenant_id)
        if not numbers.holds(text):
            raise InvalidRequest(f"{text!r:.80} is no revision that this service gave to a key of your tenant")
        return numbers.number(text) & ((1 << _REVISION_BITS) - 1)

    def _make_numbers(self, tenant_id: int | None) -> OpaqueNumbers:
        return OpaqueNumbers(self._derive(f"revisions {tenant_id}"))

"""Numbers as opaque text, so that neither their order nor their gaps reveal what other callers do."""

import hmac
import re
from typing import Final

from prefix_service.errors import InvalidRequest

_TEXT: Final = re.compile(r"[0-9a-f]{32}")


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

"""What is stored beside a version and not in its digest: the model card, annotations, the base model's fingerprint, and
the uploaded config file. Checked and bounded."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prefix_service.errors import InvalidRequest, TooLarge
from prefix_service.prefix.json_text import shown

MOST_CARD: Final = 256 << 10
"""The most bytes of a model card in UTF-8."""

MOST_ANNOTATIONS: Final = 64
"""The most annotations of a version."""

MOST_VALUE: Final = 4 << 10
"""The most bytes of an annotation's value in UTF-8."""

KEY_PATTERN: Final = "^[A-Za-z0-9._/-]{1,63}$"
_KEY: Final = re.compile(r"[A-Za-z0-9._/-]{1,63}")


@dataclass(frozen=True, slots=True)
class Description:
    """What a version's digest does not cover; empty where there is none.

    The model card in Markdown, annotations and `fingerprint`, that of the base model as `check_fingerprint` writes it,
    can be replaced. `config_file` has the bytes of `adapter_config.json` as it was uploaded, and stays.
    """

    card: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    config_file: bytes = b""

    @property
    def nbytes(self) -> int:
        """The bytes of all of it, texts in UTF-8, which count towards the tenant's quota."""
        texts = (self.card, self.fingerprint, *self.annotations, *self.annotations.values())
        return sum(len(text.encode()) for text in texts) + len(self.config_file)


EMPTY: Final = Description()


def decode_card(data: bytes | bytearray) -> str:
    """Returns the text of a model card.

    Raises:
        TooLarge: the card has more than `MOST_CARD` bytes.
        InvalidRequest: the card is not UTF-8, or contains a NUL.
    """
    try:
        return check_card(data.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the card is not UTF-8: byte {error.start} is {data[error.start]:#04x}; save it as UTF-8"
        ) from error


def check_card(text: str) -> str:
    """Returns a model card unchanged.

    Raises:
        TooLarge: the card has more than `MOST_CARD` bytes of UTF-8.
        InvalidRequest: the card contains a NUL.
    """
    if len(text) > MOST_CARD or (nbytes := len(text.encode())) > MOST_CARD:
        size = f"{len(text)} characters" if len(text) > MOST_CARD else f"{nbytes} bytes"
        raise TooLarge(f"the card has {size}, and may have {MOST_CARD} bytes: shorten it")
    return _without_nul("the card", text)


def check_annotations(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns annotations in the order of their keys.

    Raises:
        InvalidRequest: there are too many annotations, a key is malformed, or a value is not text, too long, or
        contains a
            NUL.
    """
    if len(values) > MOST_ANNOTATIONS:
        raise InvalidRequest(f"there are {len(values)} annotations, and a version may have {MOST_ANNOTATIONS}")
    return {key: _checked(key, values[key]) for key in sorted(values)}


def _checked(key: str, value: Any) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"an annotation's key has 1 to 63 characters, letters, digits and . _ / - alone, got {shown(key)}"
        )
    if not isinstance(value, str):
        raise InvalidRequest(f"annotation {key} must be text, got {shown(value)}: write it in quotes")
    if len(value) > MOST_VALUE or len(value.encode()) > MOST_VALUE:
        raise InvalidRequest(f"annotation {key} has more than {MOST_VALUE} bytes of UTF-8: shorten it")
    return _without_nul(f"annotation {key}", value)


def _without_nul(what: str, text: str) -> str:
    if "\0" in text:  # PostgreSQL's texts cannot hold one
        raise InvalidRequest(f"{what} contains a NUL at character {text.index(chr(0))}: send text alone")
    return text

"""Parses and formats sizes in bytes: `20GiB`, `500MB`, `4096`; and for people: `1.5 GiB`."""

import re
from fractions import Fraction
from typing import Final

from prefix_service.errors import InvalidInput

EXAMPLES: Final = "20GiB, 500MB or 4096"
"""Three valid sizes, for error messages."""

_SIZE: Final = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)
_BINARY: Final = ("KiB", "MiB", "GiB", "TiB")
_UNITS: Final = (
    {"": 1, "b": 1}
    | {unit.lower(): 1024**power for power, unit in enumerate(_BINARY, 1)}
    | {unit.lower(): 1000**power for power, unit in enumerate(("KB", "MB", "GB", "TB"), 1)}
)


def parse_bytes(text: str) -> int:
    """Returns the bytes that a text such as `10GiB`, `1.5 GB` or `4096` names; upper and lower case are equal.

    Raises:
        InvalidInput: the text is not a size, or not a whole number of bytes.
    """
    found = _SIZE.fullmatch(text)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None:
        raise InvalidInput(f"{text!r} is not a size: write it as in {EXAMPLES}")
    nbytes = Fraction(found[1]) * unit
    if nbytes.denominator != 1:
        raise InvalidInput(f"{text!r} is not a whole number of bytes: write it as in {EXAMPLES}")
    return int(nbytes)


def written_bytes(nbytes: int) -> str:
    """Returns a size in the largest binary unit that expresses it exactly: `4GiB`, `1536MiB`, `4096` below 1 MiB.

    `parse_bytes` can read the result.
    """
    for power, unit in reversed(list(enumerate(_BINARY, 1))):
        if power > 1 and nbytes and nbytes % 1024**power == 0:
            return f"{nbytes // 1024**power}{unit}"
    return str(nbytes)


def human_bytes(count: float) -> str:
    """Returns a size for people, in binary units: `20 B`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

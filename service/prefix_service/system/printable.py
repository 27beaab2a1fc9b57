"""Text of others, made harmless for a terminal and for the eyes in front of it."""

import re
from typing import Final

_HARMFUL: Final = (
    "\\x00-\\x1f\\x7f-\\x9f"  # controls, which a terminal obeys (ECMA-48): OSC 52 fills the clipboard
    "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"  # controls of direction (UAX 9), which reorder what is read
    "\\u2028\\u2029"  # ends of lines that only some programs know
    "\\ud800-\\udfff"  # halves of surrogates, which no encoding writes
)
_ANYWHERE: Final = re.compile(f"[{_HARMFUL}]")
_IN_LINES: Final = re.compile(f"(?!\n)[{_HARMFUL}]")


def printable(text: str) -> str:
    """Returns one line of text with what could deceive or command a terminal written as `\\u001b`, line ends too."""
    return text if text.isprintable() else _ANYWHERE.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """Returns text with the same escapes, its line ends kept. JSON keeps its meaning: in it, these characters stand in
    strings alone, where the escapes mean them."""
    return text if text.isprintable() else _IN_LINES.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"

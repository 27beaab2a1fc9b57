"""Escapes untrusted text, so that it can neither command a terminal nor deceive its reader."""

import re
from typing import Final

_HARMFUL: Final = (
    "\\x00-\\x1f\\x7f-\\x9f"  # controls, which a terminal obeys (ECMA-48): OSC 52 fills the clipboard
    "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069"  # controls of direction (UAX 9), which reorder text
    "\\u2028\\u2029"  # line ends that only some programs know
    "\\ud800-\\udfff"  # unpaired surrogates, which no encoding can write
)
_ANYWHERE: Final = re.compile(f"[{_HARMFUL}]")
_IN_LINES: Final = re.compile(f"(?!\n)[{_HARMFUL}]")


def printable(text: str) -> str:
    """Returns text as one line, with line ends and characters that could command or deceive a terminal escaped."""
    return text if text.isprintable() else _ANYWHERE.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """Returns text with characters that could command or deceive a terminal escaped, and line ends kept.

    JSON keeps its meaning: these characters occur only in its strings, where the escapes mean them.
    """
    return text if text.isprintable() else _IN_LINES.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"

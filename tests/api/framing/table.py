"""The written table of requests, `README.md`, and how its rows are sent."""

import contextlib
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PAUSE: Final = 0.1
NEXT: Final = b"framing-next"
"""The request id of the request that stands behind each row."""

_ROW: Final = re.compile(r"\| (.+) \| `(.+)` \| ([\w, ]+) \|")
_SYMBOLS: Final = {"↵": b"\r\n", "␊": b"\n", "␍": b"\r", "␉": b"\t", "␠": b" "}
_BEHIND: Final = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\nX-Request-ID: " + NEXT + b"\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One case: the bytes that are sent, with pauses between the pieces, and the answers."""

    case: str
    pieces: tuple[bytes, ...]
    answers: str


def rows() -> list[Row]:
    """Returns the rows of all tables in `README.md`; their placeholders are filled in by `filled`."""
    text = (Path(__file__).parent / "README.md").read_text()
    found = [_ROW.fullmatch(line) for line in text.splitlines() if "`" in line and line.startswith("|")]
    return [Row(row[1], tuple(_bytes(piece) for piece in row[2].split("⏸")), row[3]) for row in found if row]


def _bytes(text: str) -> bytes:
    pieces = re.split(r"(\\x[0-9a-f]{2})", text)
    return b"".join(
        bytes.fromhex(piece[2:]) if piece.startswith("\\x") else b"".join(_SYMBOLS.get(c, c.encode()) for c in piece)
        for piece in pieces
    )


def filled(row: Row, key: str, alias: str, steal: bytes) -> list[bytes]:
    """Returns the pieces of a row, with a service's values for its placeholders."""
    values = {b"{key}": f"Authorization: Bearer {key}".encode(), b"{alias}": alias.encode(), b"{steal}": steal}
    pieces = list(row.pieces)
    for name, value in values.items():
        pieces = [piece.replace(name, value) for piece in pieces]
    return pieces


def exchange(address: tuple[str, int], pieces: list[bytes], timeout: float = 10) -> bytes:
    """Sends a row and the request behind it; returns all bytes that come until the connection ends, or is silent for
    `timeout` seconds."""
    *first, last = pieces
    received = b""
    with socket.create_connection(address, timeout=timeout) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in first:
                connection.sendall(piece)
                time.sleep(PAUSE)
            connection.sendall(last + _BEHIND)
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while more := connection.recv(65536):
                received += more
    return received


def answers(received: bytes) -> str:
    """Returns the statuses of answers in the table's words."""
    heads = re.findall(rb"HTTP/1\.1 ([0-9]{3}) [A-Z][^\r]*\r\n((?:[^\r]+\r\n)*)\r\n", received)
    return ", ".join("next" if NEXT in fields else status.decode() for status, fields in heads)

"""Encodes the bodies of requests: JSON, and the parts of an upload."""

from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from prefix_service.client.protocol import Progress, Request
from prefix_service.errors import InvalidRequest


def encoded(request: Request) -> tuple[Mapping[str, str], Iterator[bytes]]:
    """Returns the headers that describe a request's body, and its pieces; files are read from their beginning.

    Raises:
        InvalidRequest: a part is neither bytes nor a file in binary mode, or the JSON cannot be written.
    """
    try:
        files = None if request.files is None else dict(request.files)
        content = request.content
        made = httpx.Request(request.method, "http://service", files=files, json=request.json, content=content)
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise InvalidRequest(f"the arguments cannot be sent: {error}") from error
    headers = {name: value for name, value in made.headers.items() if name != "host"}
    if "transfer-encoding" in headers:  # a file without a known length
        return headers, _chunks(_pieces(made.stream, None, None))
    return headers, _pieces(made.stream, int(headers.get("content-length", "0")), request.progress)


def _chunks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in filter(None, pieces):
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def _pieces(stream: Any, declared: int | None, progress: Progress | None) -> Iterator[bytes]:
    """Yields a body in pieces; calls `progress` if the length is declared.

    Raises:
        InvalidRequest: a file cannot be read, or its length differs from the declared one.
    """
    sent = 0
    try:
        for piece in stream:
            sent += len(piece)
            if declared is None or sent <= declared:
                yield piece
            if declared is not None and progress is not None:
                progress(sent, declared)
    except (OSError, TypeError, ValueError) as error:
        raise InvalidRequest(f"a file to upload cannot be read: {error}") from error
    if declared is not None and sent != declared:
        raise InvalidRequest(f"a file to upload has changed: {sent} bytes to send where there were {declared}")

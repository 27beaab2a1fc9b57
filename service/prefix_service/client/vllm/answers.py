"""Answers of vLLM's server: the middleware's in vLLM's form, and vLLM's with the versions that made them.

Imports neither vLLM nor a web framework.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any, Final

from prefix_service.client.vllm.bodies import Message
from prefix_service.client.vllm.composition import Composition
from prefix_service.client.vllm.failures import status_of
from prefix_service.client.vllm.requests import CONTAINER
from prefix_service.errors import PrefixServiceError, Unavailable

Send = Callable[[Message], Awaitable[None]]

_TYPES: Final = {  # vLLM's words
    400: "BadRequestError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    503: "ServiceUnavailableError",
}
_KEY: Final = f'"{CONTAINER}":'.encode()
_NULL: Final = _KEY + b"null"
_START, _BODY = "http.response.start", "http.response.body"

# Each is in the last chunk of a stream (of chat and completions, of their usage, of messages), and in no JSON text.
_LAST: Final = (b'"finish_reason":"', b'"choices":[]', b'"type":"message_stop"')


class Labelled:
    """Sends an answer with the versions that made it: in two headers, in the `kv_transfer_params` of a JSON body where
    they are null, and in a stream in its last chunk, where vLLM writes none."""

    def __init__(self, send: Send, composition: Composition) -> None:
        self._send = send
        self._headers = [
            (b"prefix-version", ", ".join(str(version.number) for version in composition.versions).encode()),
            (b"prefix-digest", ", ".join(version.digest for version in composition.versions).encode()),
        ]
        self._parameters = json.dumps(composition.answer_parameters, separators=(",", ":")).encode()
        self._held: Message | None = None  # the head of a JSON answer, until its body comes
        self._is_stream = False

    async def __call__(self, message: Message) -> None:
        """Passes on a message."""
        if message["type"] == _START:
            content_type = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            message = {**message, "headers": [*message["headers"], *self._headers]}
            self._is_stream = content_type.startswith(b"text/event-stream")
            if content_type.startswith(b"application/json"):
                self._held = message
                return
        elif message["type"] == _BODY and self._held is not None:
            start, self._held = self._held, None
            if not message.get("more_body", False):
                message = self._filled(start, message)
            await self._send(start)
        elif message["type"] == _BODY and self._is_stream:
            message = self._marked(message)
        await self._send(message)

    def _filled(self, start: Message, message: Message) -> Message:
        before, null, after = message.get("body", b"").rpartition(_NULL)
        if not null:
            return message
        body = before + _KEY + self._parameters + after
        start["headers"] = [
            (name, str(len(body)).encode() if name.lower() == b"content-length" else value)
            for name, value in start["headers"]
        ]
        return {**message, "body": body}

    def _marked(self, message: Message) -> Message:
        body = message.get("body", b"")
        if not any(mark in body for mark in _LAST):
            return message
        return {**message, "body": b"\n".join(self._marked_line(line) for line in body.split(b"\n"))}

    def _marked_line(self, line: bytes) -> bytes:
        is_last = line.startswith(b"data: {") and line.endswith(b"}") and any(mark in line for mark in _LAST)
        return line[:-1] + b"," + _KEY + self._parameters + b"}" if is_last and _KEY not in line else line


async def send_json(send: Send, status: int, content: Any, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Sends a JSON answer."""
    body = json.dumps(content, separators=(",", ":")).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": _START, "status": status, "headers": [*own, *headers]})
    await send({"type": _BODY, "body": body})


async def send_error(send: Send, error: PrefixServiceError, field: str) -> None:
    """Sends an error in vLLM's form; `field` is the faulty field of the request."""
    status = status_of(error)
    described = {"message": error.message, "type": _TYPES[status], "param": field, "code": status}
    retry = ((b"retry-after", str(error.retry_after).encode()),) if isinstance(error, Unavailable) else ()
    await send_json(send, status, {"error": described}, retry)

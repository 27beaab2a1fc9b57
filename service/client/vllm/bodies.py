"""The fields of an HTTP request's body, read as vLLM reads them. Imports neither vLLM nor a web framework."""

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qsl

from service.client.vllm.requests import BODY, misplaced, refuse_misplaced
from service.errors import InvalidRequest, TooLarge

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

MAX_BODY: Final = 256 << 20  # bytes; vLLM itself has no limit
_FORMS: Final = ("multipart/form-data", "application/x-www-form-urlencoded")
_PART_NAME: Final = re.compile(rb'form-data;[^\r\n]*?\bname="?([^";\r\n]*)', re.IGNORECASE)


async def read_body(receive: Receive) -> bytes | None:
    """Read a request's body to its end; None if the client leaves before.

    Raises:
        TooLarge: the body has more than 256 MiB.
    """
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MAX_BODY:
            raise TooLarge(f"the body has more than {MAX_BODY} bytes, the most that PrefixMiddleware reads")
        if not message.get("more_body", False):
            return b"".join(pieces)


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields a body that was read, then the messages that follow it."""
    waiting: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Message:
        return next(waiting, None) or await receive()

    return replayed


def refuse_misplaced_outside(scope: Message) -> None:
    """Refuse query parameters and header fields that look like an adapter.

    Raises:
        InvalidRequest: there is one.
    """
    query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
    headers = {name.decode("latin-1"): None for name, _ in scope["headers"]}
    refuse_misplaced({"query": query, "header": headers}.items())


def fields_of(scope: Message, body: bytes) -> Mapping[str, Any]:
    """Return the fields of a JSON object; none for another body, which vLLM takes for no request of text.

    Raises:
        InvalidRequest: a form has a field that looks like an adapter, or a JSON object has one twice, or is nested too
            deeply.
    """
    content_type = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"")
    media_type = content_type.decode("latin-1").partition(";")[0].strip().lower()
    if media_type in _FORMS:
        refuse_misplaced(("form", {name: None}) for name in _form_names(media_type, body))
        return {}
    try:
        fields = json.loads(body, object_pairs_hook=_object)
    except ValueError:  # vLLM, which reads bodies with the same parser, answers with the reason
        return {}
    except RecursionError as error:
        raise InvalidRequest("the body's JSON is nested too deeply") from error
    return fields if isinstance(fields, Mapping) else {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two entries of one name the last holds; vLLM does not see the first."""
    made = dict(pairs)
    if len(made) < len(pairs):
        hidden = [(key, value) for key, value in pairs if made[key] is not value]
        for name in misplaced((BODY, {key: value}) for key, value in hidden):
            raise InvalidRequest(f"{name!r:.100} stands there twice, and vLLM would see the last alone")
    return made


def _form_names(media_type: str, body: bytes) -> list[str]:
    if media_type == _FORMS[0]:
        return [name.decode("latin-1") for name in _PART_NAME.findall(body)]
    return [name for name, _ in parse_qsl(body.decode("latin-1"), keep_blank_values=True)]

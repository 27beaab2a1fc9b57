"""The fields of an HTTP request's body, read as vLLM reads them. Imports neither vLLM nor a web framework."""

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from email.message import Message as Head
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_plus

from prefix_service.client.vllm.requests import BODY, CONTAINER, PARAMETER, misplaced, refuse_misplaced
from prefix_service.errors import InvalidRequest, TooLarge

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

HEADER: Final = b"x-prefix-adapter"
"""The header that names an adapter."""

MAX_BODY: Final = 256 << 20  # bytes; vLLM itself has no limit
_MULTIPART: Final = "multipart/form-data"
_URLENCODED: Final = "application/x-www-form-urlencoded"

# Starlette takes 1,000 fields and 1,000 files, python-multipart 8 lines of 4,224 bytes before each.
_MAX_PARTS: Final = 2000
_MAX_HEAD: Final = 8 * (4224 + len("\r\n"))
_MAX_NAME: Final = 1200  # bytes of a name of 100 letters, each of 4 bytes, each written as %XX
_DISPOSITION: Final = re.compile(rb"^content-disposition:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_NAME: Final = re.compile(rb'\bname\*?="?([^";]*)', re.IGNORECASE)


async def read_body(receive: Receive) -> bytes | None:
    """Returns a request's whole body; None if the client leaves before its end.

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


async def has_left(receive: Receive) -> bool:
    """Returns True once the client of a request, whose body was read, has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    return True


def replay(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that yields a body that was read, then the messages that follow it."""
    waiting: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Message:
        return next(waiting, None) or await receive()

    return replayed


def refuse_misplaced_outside(scope: Message) -> None:
    """Refuses query parameters and header fields that look like an adapter.

    Raises:
        InvalidRequest: there is one.
    """
    query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))
    headers = {name.decode("latin-1"): "" for name, _ in scope["headers"] if name.lower() != HEADER}
    for name in misplaced({"query": query, "header": headers}.items()):
        raise InvalidRequest(
            f"the request has {name!r:.100}, which vLLM would ignore: name the adapter in the header X-Prefix-Adapter, "
            f'or in the body, as "model" or by "{CONTAINER}": {{"{PARAMETER}": "tenant/adapter@prod"}}'
        )


def fields_of(scope: Message, body: bytes) -> Mapping[str, Any]:
    """Returns the fields of a JSON object; none for any other body, from which vLLM generates no text.

    Raises:
        InvalidRequest: a form has a field that looks like an adapter, or more than 2,000 fields, or a JSON object has a
            field that looks like an adapter twice, or is nested too deeply.
    """
    head = Head()
    head["Content-Type"] = next(
        (value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"content-type"), ""
    )
    media_type = head.get_content_type()
    if media_type in (_MULTIPART, _URLENCODED):
        names = _part_names(body, head.get_boundary()) if media_type == _MULTIPART else _pair_names(body)
        refuse_misplaced([("form", dict.fromkeys(names, ""))])
        return {}
    try:
        fields = json.loads(body, object_pairs_hook=_object)
    except ValueError:  # vLLM, which reads bodies with the same parser, answers with the reason
        return {}
    except RecursionError as error:
        raise InvalidRequest("the body's JSON is nested too deeply") from error
    return fields if isinstance(fields, Mapping) else {}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the entries as a dict, in which the last entry of a name counts; vLLM does not see the others."""
    made = dict(pairs)
    if len(made) < len(pairs):
        hidden = [(key, value) for key, value in pairs if made[key] is not value]
        for name in misplaced((BODY, {key: value}) for key, value in hidden):
            raise InvalidRequest(f"{name!r:.100} is there twice, and vLLM would read only the last one")
    return made


def _part_names(body: bytes, boundary: str | None) -> Iterator[str]:
    """Yields the names in the heads of a multipart body's parts."""
    if not boundary:  # vLLM will answer with 400
        return
    _before, *parts = body.split(b"--" + boundary.encode("latin-1", "replace"), _MAX_PARTS + 2)
    if len(parts) > _MAX_PARTS + 1:  # one more ends the body
        raise InvalidRequest(f"the form has more than {_MAX_PARTS} parts")
    for part in parts:
        head = part[:_MAX_HEAD].partition(b"\r\n\r\n")[0]
        for disposition in _DISPOSITION.findall(head):
            yield from (name.decode("latin-1") for name in _NAME.findall(disposition))


def _pair_names(body: bytes) -> Iterator[str]:
    """Yields the names in an urlencoded body."""
    pairs = body.split(b"&", _MAX_PARTS)
    if len(pairs) > _MAX_PARTS:
        raise InvalidRequest(f"the form has more than {_MAX_PARTS} fields")
    names = (pair.partition(b"=")[0] for pair in pairs)
    yield from (unquote_plus(name.decode("latin-1")) for name in names if len(name) <= _MAX_NAME)

"""Options of the clients, checked before a request is made."""

import contextlib
import json
import math
import operator
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final, TypedDict, cast, get_args

from prefix_service.client.base_model_check import CHECKS, BaseModelCheck
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.fingerprint import Fingerprint
from prefix_service.prefix.ranks import Rank, check_rank
from prefix_service.prefix.variant import KVDtype, Span

_DTYPES: Final = get_args(KVDtype)
_DEFAULT_URL: Final = "http://127.0.0.1:8080"
_BETWEEN_URLS: Final = re.compile(r"\s*,\s*(?=https?://)")
_LONGEST: Final = 1_000_000
"""Seconds that a deadline may have: more than eleven days."""


class PrefixOptions(TypedDict, total=False):
    """The form in which a prefix is wanted; `PrefixClient.get` documents each."""

    batch_size: int
    dtype: KVDtype | None
    key_dtype: KVDtype | None
    value_dtype: KVDtype | None
    layers: Span | None
    kv_heads: Span | None
    tp: Rank | None
    pp: Span | None
    materialise: bool


def prefix_options(
    *,
    batch_size: int = 1,
    dtype: KVDtype | None = None,
    key_dtype: KVDtype | None = None,
    value_dtype: KVDtype | None = None,
    layers: Span | None = None,
    kv_heads: Span | None = None,
    tp: Rank | None = None,
    pp: Span | None = None,
    materialise: bool = False,
) -> PrefixOptions:
    """Returns the form in which a prefix is wanted.

    Raises:
        InvalidRequest: an option has a value that it cannot have.
    """
    return {
        "batch_size": whole("batch_size", batch_size, 1),
        "dtype": None if dtype is None else _dtype("dtype", dtype),
        "key_dtype": None if key_dtype is None else _dtype("key_dtype", key_dtype),
        "value_dtype": None if value_dtype is None else _dtype("value_dtype", value_dtype),
        "layers": None if layers is None else _span("layers", layers),
        "kv_heads": None if kv_heads is None else _span("kv_heads", kv_heads),
        "tp": None if tp is None else check_rank(_pair("tp", tp)),
        "pp": None if pp is None else _span("pp", pp),
        "materialise": flag("materialise", materialise),
    }


def whole(name: str, value: Any, least: int) -> int:
    """Returns a whole number of at least `least`.

    Raises:
        InvalidRequest: the value is something else.
    """
    try:
        number = value if type(value) is int else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or value is True or value is False:
        raise InvalidRequest(f"{name} must be a whole number of at least {least}, got {value!r:.100}")
    return number


def service_urls(given: Any, uds: Any) -> list[Any]:
    """Returns the URLs that were given: a list, or one text, with commas between several. Without one it is any with a
    Unix socket, else that of the environment, else the one at which `prefix-service serve` listens.

    Raises:
        InvalidRequest: there are none, or several with a Unix socket.
    """
    if given is None:
        given = _DEFAULT_URL if uds is not None else os.environ.get("PREFIX_URL") or _DEFAULT_URL
    urls = _BETWEEN_URLS.split(given) if isinstance(given, str) else list(given) if _is_list(given) else [given]
    if not urls:
        raise InvalidRequest("the list of the service's URLs is empty: name at least one")
    if len(urls) > 1 and uds is not None:
        raise InvalidRequest(f"uds leads to one service, and base_url names {len(urls)}: leave one of them out")
    return urls


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def service_key(given: str | None) -> str | None:
    """Returns the key that was given, or that of the environment; None if that is empty, or was given as empty."""
    return (os.environ.get("PREFIX_API_KEY") if given is None else given) or None


def deadline(name: str, value: Any) -> float:
    """Returns a number of seconds, infinity for None.

    Raises:
        InvalidRequest: the value is neither None nor a number above 0.
    """
    if value is None:
        return math.inf
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or not 0 < value <= _LONGEST:
        raise InvalidRequest(
            f"{name} must be a number of seconds above 0, at most {_LONGEST}, or None for no deadline, got "
            f"{value!r:.100}"
        )
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Returns True or False.

    Raises:
        InvalidRequest: the value is something else.
    """
    if value is not True and value is not False:
        raise InvalidRequest(f"{name} must be True or False, got {value!r:.100}")
    return bool(value)


def content(name: str, value: Any) -> bytes:
    """Returns the bytes of a file.

    Raises:
        InvalidRequest: the value is something else.
    """
    if not isinstance(value, bytes | bytearray | memoryview):
        raise InvalidRequest(f"{name} must be the bytes of a file, got {type(value).__name__}")
    return bytes(value)


def json_bytes(name: str, value: Any) -> bytes:
    """Returns a value as JSON.

    Raises:
        InvalidRequest: it cannot be written as JSON.
    """
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{name} cannot be sent as JSON: {error}") from error


def file(name: str, value: Any) -> BinaryIO:
    """Returns an open binary file, or the bytes of one.

    Raises:
        InvalidRequest: the value is something else, as a path.
    """
    if not isinstance(value, bytes) and not callable(getattr(value, "read", None)):
        raise InvalidRequest(f"{name} must be a file that is open for reading in binary mode, got {value!r:.100}")
    return cast("BinaryIO", value)


def fingerprint(name: str, value: Any) -> Fingerprint:
    """Returns a fingerprint that can be sent.

    Raises:
        InvalidRequest: the value is something else, or a field has another type.
    """
    if not isinstance(value, Fingerprint):
        raise InvalidRequest(f"{name} must be a Fingerprint, got {value!r:.100}")
    json_bytes(name, value.known())
    return Fingerprint.of(value.known())


def references(value: Any) -> list[str]:
    """Returns a list of references.

    Raises:
        InvalidRequest: the value is one text, or cannot be iterated.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidRequest(f"references must be a list of references, got {value!r:.100}")
    return list(value)


def base_model_check(name: str, value: Any) -> BaseModelCheck:
    """Returns what happens if base models differ.

    Raises:
        InvalidRequest: the value is something else.
    """
    if not isinstance(value, str) or value not in CHECKS:
        raise InvalidRequest(f"{name} must be one of {', '.join(CHECKS)}, got {value!r:.100}")
    return cast(BaseModelCheck, value)


def callback(name: str, value: Any, arguments: str = "the bytes so far and their total") -> Any:
    """Returns what can be called with some arguments, or None.

    Raises:
        InvalidRequest: the value is something else.
    """
    if value is not None and not callable(value):
        raise InvalidRequest(f"{name} must be a function of {arguments}, got {value!r:.100}")
    return value


def required_path(name: str, value: Any) -> Path:
    """Returns a path.

    Raises:
        InvalidRequest: the value is something else.
    """
    found = path(name, value)
    if found is None:
        raise InvalidRequest(f"{name} must be a path, got None")
    return found


def path(name: str, value: Any) -> Path | None:
    """Returns a path, or None.

    Raises:
        InvalidRequest: the value is something else.
    """
    if value is not None and not isinstance(value, str | Path):
        raise InvalidRequest(f"{name} must be a path, got {value!r:.100}")
    return None if value is None else Path(value)


def _dtype(name: str, value: Any) -> KVDtype:
    if not isinstance(value, str) or value not in _DTYPES:
        raise InvalidRequest(f"{name} must be one of {', '.join(_DTYPES)}, got {value!r:.100}")
    return cast(KVDtype, value)


def _span(name: str, value: Any) -> Span:
    first, last = _pair(name, value)
    if not 0 <= first < last:
        raise InvalidRequest(f"{name} must be a range (first, end) with 0 <= first < end, got {value!r:.100}")
    return first, last


def _pair(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, tuple | list) and len(value) == 2:
        with contextlib.suppress(TypeError):
            return operator.index(value[0]), operator.index(value[1])
    raise InvalidRequest(f"{name} must be a pair of whole numbers, got {value!r:.100}")

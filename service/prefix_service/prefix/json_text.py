"""Parses JSON from outside strictly, and counts its values before it is parsed."""

import json
import re
from collections.abc import Callable
from itertools import islice
from math import isfinite
from typing import Any, Final, NoReturn

from prefix_service.errors import InvalidConfig

MAX_CONFIG_BYTES: Final = 64 << 10  # PEFT writes about one KiB
MAX_BASE_CONFIG_BYTES: Final = 1 << 20  # it is not stored; the 21,000 label names of a classifier take half a megabyte

MOST_VALUES: Final = 1 << 20
"""The most values in a JSON text; a mask has that many."""

_MOST_CONTAINERS: Final = 1 << 17  # lists and objects
_MOST_NAMES: Final = 1 << 16
"""The most names of members: at most the number of colons."""

_AT_ONCE: Final = 1 << 18
"""The most bytes of JSON that are parsed without a call into Python for each integer.

`json.loads` holds the GIL between such calls: without them for 60 ms for 2 MiB, with them for at most 40 ms for 4 MiB,
at four times the cost.
"""

_MEMORY: Final = 40
"""Bytes of memory that a byte of JSON can take while it is parsed; lists in lists take 36."""

_MAX_DEPTH: Final = 32
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")  # half of a pair; it is not a character without the other half


def json_memory(nbytes: int) -> int:
    """Returns the bytes of memory that parsing `nbytes` bytes of JSON can take."""
    return _MEMORY * nbytes


def parse_config_json(data: bytes, what: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Returns the JSON object of a config file. It may hold infinities, since `json.dump` writes them.

    `parse_config` drops an infinity in a field that this service does not read, and refuses it in others.

    Raises:
        InvalidConfig: the text has too many bytes, values or names, is nested too deeply, or has duplicate keys, NaN or
            lone surrogates. The message begins with `what`.
    """
    return _parse(data, what, limit, float, _refuse_nan)


def parse_json(data: bytes, what: str, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Returns a JSON object from outside: UTF-8, at most `limit` bytes, and moderately nested.

    Raises:
        InvalidConfig: the text has too many bytes, values or names, is nested too deeply, or has duplicate keys, NaN,
            infinities or lone surrogates. The message begins with `what`.
    """
    return _parse(data, what, limit, _finite, _refuse_constant)


def _parse(
    data: bytes, what: str, limit: int, parse_float: Callable[[str], float], parse_constant: Callable[[str], float]
) -> dict[str, Any]:
    if len(data) > limit:
        raise InvalidConfig(f"{what} has {len(data)} bytes, more than {limit}")
    _require_few_values(data, what)
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=int if len(data) <= _AT_ONCE else _integer,
            parse_float=parse_float,
            parse_constant=parse_constant,
        )
        if _SURROGATE.search(text):
            _require_text(value)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"{what} is not usable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidConfig(f"{what} must be a JSON object, got {type(value).__name__}")
    if _deeper_than(_MAX_DEPTH, value):
        raise InvalidConfig(f"{what} is nested more than {_MAX_DEPTH} deep")
    return value


def _require_few_values(data: bytes, what: str) -> None:
    """Raises InvalidConfig if the text has too many values or names. Counts characters before anything is parsed, so
    those in strings count too.
    """
    containers = data.count(b"[") + data.count(b"{")
    values = containers + data.count(b",")
    if values > MOST_VALUES + _MOST_CONTAINERS or containers > _MOST_CONTAINERS:
        raise InvalidConfig(
            f"{what} has about {values} values, {containers} of them lists and objects, and at most {MOST_VALUES} "
            f"and {_MOST_CONTAINERS} are read"
        )
    if (names := data.count(b":")) > _MOST_NAMES:
        raise InvalidConfig(f"{what} has {names} colons, and at most {_MOST_NAMES} are read: it names too much")


def shown(value: Any, most: int = 80) -> str:
    """Returns a value as Python writes it, shortened to `most` characters; looks at little of it, whatever its size."""
    text = repr(_beginning(value, most, 3))
    return text if len(text) <= most else text[: most - 3] + "..."


def _beginning(value: Any, most: int, levels: int) -> Any:
    if isinstance(value, str):
        return value[: most + 1]
    if isinstance(value, list):
        return [_beginning(item, most // 2, levels - 1) for item in value[: most // 2]] if levels else ...
    if isinstance(value, dict):
        items = islice(value.items(), most // 4)
        return (
            {_beginning(key, most, 0): _beginning(item, most // 2, levels - 1) for key, item in items}
            if levels
            else ...
        )
    return value


def _require_text(value: Any) -> None:
    """Raises ValueError if a string holds half of a surrogate pair. In Python: one call of `json.dumps` would hold
    Python's lock for all of it."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            key.encode()
            _require_text(item)
    elif isinstance(value, list):
        for item in value:
            _require_text(item)


def _deeper_than(levels: int, value: dict[str, Any] | list[Any]) -> bool:
    if levels < 0:
        return True
    children = value.values() if isinstance(value, dict) else value
    if {dict, list}.isdisjoint(map(type, children)):  # so that Python does not visit the numbers of a mask one by one
        return False
    return any(_deeper_than(levels - 1, child) for child in children if isinstance(child, dict | list))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {shown(key)}")
        found[key] = value
    return found


def _integer(text: str) -> int:
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{shown(text)} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_nan(name: str) -> float:
    return _refuse_constant(name) if name == "NaN" else float(name)

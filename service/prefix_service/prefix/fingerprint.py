"""The fingerprint of a base model: what its keys and values depend on, checked and bounded."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import combinations
from typing import Any, Final, Self

from prefix_service.errors import InvalidRequest, TooLarge
from prefix_service.prefix.json_text import shown

MOST_FINGERPRINT: Final = 16 << 10
"""Bytes of a fingerprint, written as `check_fingerprint` writes it."""

MOST_MEMBERS: Final = 256
"""Members of one of its objects."""

MOST_TEXT: Final = 256
"""Characters of one of its texts."""

_MOST_SHOWN: Final = 120  # characters of a value in a message, so that a hash is shown whole
TEXTS: Final = ("architecture", "tokenizer", "weights_index")
OBJECTS: Final = ("sizes", "rope", "norms")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The properties of a base model that the keys and values of a prefix depend on; None where one is not known.

    `architecture` is the type of its language model, as in `model_type` of its config. `sizes`, `rope` and `norms` are
    settings of its config, by their names: dimensions, rotary embedding, normalisation. `tokenizer` and `weights_index`
    are hashes `kind:hash`, of the tokenizer's vocabulary and of a sample of the weights; hashes of different kinds are
    not compared.
    """

    architecture: str | None = None
    sizes: Mapping[str, Any] | None = None
    rope: Mapping[str, Any] | None = None
    norms: Mapping[str, Any] | None = None
    tokenizer: str | None = None
    weights_index: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Returns a fingerprint from its JSON object; fields beyond it are ignored, as those of a later release.

        Raises:
            InvalidRequest: a field has another type, a text is empty or too long, or an object has too many members.
        """
        return cls(**{name: _checked(name, values[name]) for name in (*TEXTS, *OBJECTS) if name in values})

    def known(self) -> dict[str, Any]:
        """Returns the fields that are known, as JSON has them."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def differences(self, other: Self) -> list[tuple[str, Any, Any]]:
        """Returns what differs from another base model: the name of each setting, its value here, its value there.

        What only one of the two knows is no difference.
        """
        return [
            *((name, *values) for name in TEXTS if _differ(*(values := (getattr(self, name), getattr(other, name))))),
            *(found for name in OBJECTS for found in _members(name, getattr(self, name), getattr(other, name))),
        ]


NO_FINGERPRINT: Final = Fingerprint()


def check_fingerprint(values: Mapping[str, Any]) -> str:
    """Returns a fingerprint as JSON, its names sorted and without blanks; empty if it has no field.

    Raises:
        InvalidRequest: a field is unknown or has another type, or a text is empty or too long.
        TooLarge: it has more than `MOST_FINGERPRINT` bytes.
    """
    unknown = next((name for name in values if name not in (*TEXTS, *OBJECTS)), None)
    if unknown is not None:
        raise InvalidRequest(f"a fingerprint has {', '.join((*TEXTS, *OBJECTS))}, and no {shown(unknown)}")
    known = Fingerprint.of(values).known()
    text = json.dumps(known, sort_keys=True, separators=(",", ":")) if known else ""
    if len(text) > MOST_FINGERPRINT:
        raise TooLarge(f"the fingerprint has {len(text)} bytes, and may have {MOST_FINGERPRINT}: leave out details")
    return text


def common_base_model(named: Sequence[tuple[str, Fingerprint]]) -> Fingerprint:
    """Returns the fingerprint of the one base model of several versions: the settings that all of them know.

    Raises:
        InvalidRequest: two versions differ in a setting that both know.
    """
    for (name, one), (other_name, other) in combinations(named, 2):
        if different := one.differences(other):
            field, *values = different[0]
            here, there = (shown(value, _MOST_SHOWN) for value in values)
            raise InvalidRequest(
                f"the base model of {other_name} has {field} {there}, and that of {name} {here}: they cannot be "
                "composed. If they have one base model, replace the fingerprint that is wrong (PUT …/base-model)"
            )
    return Fingerprint.of(reduce(_shared, (fingerprint.known() for _, fingerprint in named)))


def _shared(here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what both know and have in common, also in objects inside of objects, without empty ones."""
    found = {}
    for name in here.keys() & there.keys():
        one, other = here[name], there[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            one = other = _shared(one, other)
        if one not in (None, {}) and _equal(one, other):
            found[name] = one
    return found


def _differ(here: str | None, there: str | None) -> bool:
    """Returns whether two texts differ and are of the same kind, which stands in front of a colon."""
    return here is not None and there is not None and here != there and _kind(here) == _kind(there)


def _kind(text: str) -> str:
    return text.rpartition(":")[0]


def _members(name: str, here: Any, there: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the settings that both know and that differ, also those of objects inside of objects."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for member in sorted(here.keys() & there.keys()):
            yield from _members(f"{name}.{member}", here[member], there[member])
    elif here is not None and there is not None and not _equal(here, there):
        yield name, here, there


def _equal(here: Any, there: Any) -> bool:
    """Returns whether two settings are the same; GGUF files hold numbers in float32, other configs in float64."""
    if isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=1e-6)
    return bool(here == there)


def _checked(name: str, value: Any) -> Any:
    if name in OBJECTS:
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name} must be a JSON object, got {shown(value)}: leave it out if it is not known")
        if len(value) > MOST_MEMBERS:
            raise InvalidRequest(f"{name} has {len(value)} members, and may have {MOST_MEMBERS}: leave out details")
    elif not isinstance(value, str) or not 0 < len(value) <= MOST_TEXT:
        raise InvalidRequest(
            f"{name} must be a text of 1 to {MOST_TEXT} characters, got {shown(value)}: leave it out if it is not known"
        )
    return value

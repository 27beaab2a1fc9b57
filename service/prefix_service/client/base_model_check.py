"""Compares the base model of a version with the model that is about to use it, by their fingerprints."""

import warnings
from typing import Final, Literal, get_args

from prefix_service.errors import BaseModelMismatch
from prefix_service.prefix.fingerprint import Fingerprint
from prefix_service.prefix.json_text import shown

BaseModelCheck = Literal["off", "warn", "refuse"]
"""What happens if a version's base model is not the model that uses it: nothing, a warning, or an error."""

CHECKS: Final = get_args(BaseModelCheck)
_MOST_NAMED: Final = 4  # differences in one message
_MOST_SHOWN: Final = 120  # characters of a value, so that a hash is shown whole


class BaseModelWarning(UserWarning):
    """A prefix is used with another base model than its own."""


def mismatch(name: str, trained: Fingerprint, here: Fingerprint) -> str | None:
    """Returns what differs between the base model of the version `name` and the model `here`, as a sentence; None if
    nothing does."""
    found = trained.differences(here)
    if not found:
        return None
    parts = [
        f"{field} is {shown(now, _MOST_SHOWN)} here, and was {shown(then, _MOST_SHOWN)}"
        for field, then, now in found[:_MOST_NAMED]
    ]
    more = len(found) - _MOST_NAMED
    return (
        f"{name} was made for another base model: {'; '.join(parts)}{f'; and {more} more differ' if more > 0 else ''}. "
        "Use it with its own base model, or publish one that was made for this one"
    )


def compare_base_models(name: str, trained: Fingerprint, here: Fingerprint, mode: BaseModelCheck) -> None:
    """Warns the caller of `to_cache` or `generate`, or refuses, if the version `name` was made for another base model.

    Raises:
        BaseModelMismatch: it was, and `mode` is `refuse`.
    """
    message = None if mode == "off" else mismatch(name, trained, here)
    if message is None:
        return
    if mode == "refuse":
        raise BaseModelMismatch(message)
    warnings.warn(message, BaseModelWarning, stacklevel=5)

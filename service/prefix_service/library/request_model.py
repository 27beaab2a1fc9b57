"""The base class of JSON bodies and query parameters."""

from typing import Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


INTEGRAL: Final = BeforeValidator(_integral)
"""Annotates an integer that may be written as 5.0: in JSON Schema, it is an integer too (draft 2020-12, 6.1.1)."""


class RequestModel(BaseModel):
    """Rejects unknown fields, and validates only one of them. A number may not be sent as text or boolean, nor a
    boolean as a number.

    Every list, object and text of a subclass has a bound, and every list has `fail_fast`, so that a caller determines
    neither how many items are validated nor how many errors are collected.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, values: Any) -> Any:
        if not isinstance(values, dict) or len(values) <= len(cls.model_fields):
            return values
        unknown = next(name for name in values if name not in cls.model_fields)
        return {name: value for name, value in values.items() if name in cls.model_fields or name == unknown}

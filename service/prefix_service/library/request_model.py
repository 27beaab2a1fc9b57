"""The base of what callers send as JSON or as a query."""

from typing import Any, Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


INTEGRAL: Final = BeforeValidator(_integral)
"""Annotates an integer: JSON Schema has 5.0 for one as well as 5 (draft 2020-12, section 6.1.1)."""


class RequestModel(BaseModel):
    """Refuses unknown fields, and looks at one of them alone. Takes no text or boolean for a number, nor a number for a
    boolean.

    Every list, object and text of a subclass has a bound, and every list `fail_fast`: what a caller sends decides
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

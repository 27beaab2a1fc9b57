"""The base of what callers send as JSON or as a query."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class RequestModel(BaseModel):
    """Refuses unknown fields, and looks at one of them alone.

    Every list, object and text of a subclass has a bound, and every list `fail_fast`: what a caller sends decides
    neither how many items are validated nor how many errors are collected.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, values: Any) -> Any:
        if not isinstance(values, dict) or len(values) <= len(cls.model_fields):
            return values
        unknown = next(name for name in values if name not in cls.model_fields)
        return {name: value for name, value in values.items() if name in cls.model_fields or name == unknown}

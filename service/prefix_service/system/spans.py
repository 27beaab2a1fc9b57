"""Spans of OpenTelemetry, in a process that has loaded its API; in all others nothing, for the price of one lookup.

Nothing is imported for it: FastAPI brings the API into the service, and an application that traces has loaded it.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, Final, TypeVar

T = TypeVar("T")

_NOTHING: Final = nullcontext()


def span(name: str, attributes: Mapping[str, str | int] | None = None) -> AbstractContextManager[Any]:
    """Returns a block that is a span below the current one; an error that leaves the block is recorded.

    Where nothing is traced, and in background work, which no request waits for, it is nothing.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None or not trace.get_current_span().get_span_context().is_valid:
        return _NOTHING
    began: AbstractContextManager[Any] = trace.get_tracer("prefix_service").start_as_current_span(
        name, attributes=attributes
    )
    return began


def carried(call: Callable[[], T]) -> Callable[[], T]:
    """Returns a call that may be made in another thread, and whose spans are below the current one all the same."""
    return partial(copy_context().run, call)

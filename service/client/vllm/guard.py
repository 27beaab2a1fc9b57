"""Compares the adapter that an HTTP request names with the one that reaches vLLM's engine. Imports no vLLM.

vLLM's routes build the engine's parameters in many places: some leave out `kv_transfer_params`, some add what cannot be
served behind a prefix. Such a call raises ValueError, which vLLM answers with 400; an error in the engine would be a
500 without a reason.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final

from service.client.vllm.requests import CONTAINER, PARAMETER, refuse_sampling
from service.errors import InvalidRequest

ASKED: Final = ContextVar[str | None]("prefix_adapter", default=None)
"""The adapter that the HTTP request being served names; tasks that serve it inherit it."""

_METHODS: Final = {"generate": "sampling_params", "encode": "pooling_params"}


def guard_engine(engine_client: Any) -> None:
    """Make the engine client refuse calls that lost the adapter of their HTTP request, or cannot be served with it."""
    for name, params in _METHODS.items():
        method = getattr(engine_client, name, None)
        if method is not None:
            setattr(engine_client, name, _guarded(method, params))


def _guarded(method: Callable[..., Any], params: str) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        asked = ASKED.get()
        if asked is not None:
            _refuse_unfit(signature.bind(*args, **kwargs).arguments.get(params), asked)
        return method(*args, **kwargs)

    return guarded


def _refuse_unfit(params: Any, asked: str) -> None:
    if _handed(params) != asked:
        raise ValueError(
            f"vLLM left out {PARAMETER} {asked} on the way to its engine: this route, or one of the request's "
            "options, cannot be used with an adapter"
        )
    try:
        refuse_sampling(params)
    except InvalidRequest as error:
        raise ValueError(error.message) from error


def _handed(params: Any) -> Any:
    extra = getattr(params, "extra_args", None)
    container = extra.get(CONTAINER) if isinstance(extra, Mapping) else None
    return container.get(PARAMETER) if isinstance(container, Mapping) else None

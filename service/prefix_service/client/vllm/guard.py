"""Compares the adapter that an HTTP request names with the one that reaches vLLM's engine. Imports no vLLM.

vLLM's routes build the engine's parameters in many places. Whichever way a request names its adapter, the engine gets
the versions that were checked, by their digests. A route may change the adapter, or add what cannot be served behind a
prefix: such a call raises ValueError, which vLLM answers with 400. If the engine fails the request
nevertheless, its reason is raised where vLLM reads the outputs; vLLM alone would answer with 500 and no reason.
"""

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from prefix_service.client.vllm.composition import Composition, refuse_length
from prefix_service.client.vllm.failures import raise_for, unpack
from prefix_service.client.vllm.requests import (
    CONTAINER,
    PARAMETER,
    References,
    refuse_sampling,
)
from prefix_service.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Asked:
    """The adapters that an HTTP request names, the versions that these mean, and the longest sequence of the model."""

    references: References
    composition: Composition
    max_length: int
    model: str | None = None
    """The request's `model`, if that is what names the adapter."""


ASKED: Final = ContextVar[Asked | None]("prefix_adapter", default=None)
"""The adapters of the HTTP request that is being served; the tasks that serve it inherit this."""

_METHODS: Final = {"generate": "sampling_params", "encode": "pooling_params"}


def guard_engine(engine_client: Any) -> None:
    """Makes the engine client refuse a call that lost the adapter of its HTTP request, or cannot be served with it.

    The client also raises the engine's reason for a failure.
    """
    for name, params in _METHODS.items():
        method = getattr(engine_client, name, None)
        if method is not None:
            setattr(engine_client, name, _guarded(method, params))
    processor = getattr(engine_client, "output_processor", None)
    if processor is not None:
        processor.process_outputs = _unpacked(processor.process_outputs)


def guard_models(models: Any) -> None:
    """Makes vLLM's table of served models take the adapter that a request names as its `model` for the base model, and
    give it that name in the answer."""
    is_base_model, model_name = models.is_base_model, models.model_name

    def is_base_or_adapter(name: Any) -> bool:
        asked = ASKED.get()
        return (asked is not None and asked.model is not None and asked.model == name) or bool(is_base_model(name))

    def name_asked(lora_request: Any = None) -> Any:
        asked = ASKED.get()
        if asked is None or asked.model is None or lora_request is not None:
            return model_name(lora_request)
        return asked.model

    models.is_base_model, models.model_name = is_base_or_adapter, name_asked


def _guarded(method: Callable[..., Any], params: str) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        asked = ASKED.get()
        if asked is None:
            return method(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        try:
            _refuse_unfit(arguments.get(params), asked)
            refuse_length(asked.composition, _length(arguments.get("prompt")), asked.max_length)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        _hand_version(arguments[params], asked)
        return _reasoned(method(*args, **kwargs))

    return guarded


def _unpacked(process: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(process)
    def unpacked(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        unpack(outputs)
        return process(outputs, *args, **kwargs)

    return unpacked


async def _reasoned(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Yields a request's outputs, or raises the reason why it failed."""
    async with aclosing(outputs):
        async for output in outputs:
            raise_for(output)
            yield output


def _refuse_unfit(params: Any, asked: Asked) -> None:
    # Several prompts of one HTTP request may share their parameters, which then have the version already.
    if not hasattr(params, "extra_args") or _handed(params) not in (
        None,
        asked.references,
        asked.composition.references,
    ):
        raise InvalidRequest(
            f"vLLM changed or lost {PARAMETER} {', '.join(asked.references)} on the way to its engine: this route, or "
            "one of the request's options, cannot be used with an adapter"
        )
    refuse_sampling(params)


def _hand_version(params: Any, asked: Asked) -> None:
    named = {**_container(params), PARAMETER: asked.composition.parameter}
    params.extra_args = {**(params.extra_args or {}), CONTAINER: named}


def _handed(params: Any) -> Any:
    """Returns what a route hands to the engine as `prefix_adapter`; a text or a list becomes a tuple."""
    named = _container(params).get(PARAMETER)
    return (named,) if isinstance(named, str) else tuple(named) if isinstance(named, list) else named


def _container(params: Any) -> Mapping[str, Any]:
    """Returns the `kv_transfer_params` that a route hands to the engine; empty if it hands none."""
    container = (params.extra_args or {}).get(CONTAINER)
    return container if isinstance(container, Mapping) else {}


def _length(prompt: Any) -> int:
    """Returns a prompt's number of tokens; 0 if vLLM has yet to make them."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    return len(ids) if isinstance(ids, list) else 0

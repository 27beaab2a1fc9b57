"""Turns flows into methods of the two clients: one carries them out in the caller's thread, the other on an event loop.

`help`, Jupyter and type checkers see the flow's own arguments, and the flow's result.
"""

import inspect
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, get_args

from prefix_service.client.protocol import Flow

T = TypeVar("T")
P = ParamSpec("P")
Client = TypeVar("Client")
Call = TypeVar("Call", bound=Callable[..., Any])


def blocking(call: Callable[Concatenate[Any, P], Flow[T]]) -> Callable[Concatenate[Any, P], T]:
    """Returns the method of `PrefixClient` that carries out the flow of `call`."""

    @wraps(call)
    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = self._transport.run(call(self, *args, **kwargs))
        return result

    return _described(method, call)


def awaited(call: Callable[Concatenate[Any, P], Flow[T]]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Returns the method of `AsyncPrefixClient` that carries out the flow of `call`."""

    @wraps(call)
    async def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        result: T = await self._transport.run(call(self, *args, **kwargs))
        return result

    return _described(method, call)


def plain(flow: Callable[P, Flow[T]]) -> Callable[Concatenate[Any, P], Flow[T]]:
    """Returns a call for `blocking` and `awaited` from a flow that needs nothing of its client."""

    @wraps(flow)
    def call(_client: Any, /, *args: P.args, **kwargs: P.kwargs) -> Flow[T]:
        return flow(*args, **kwargs)

    signature = inspect.signature(flow)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    call.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    return call


def named(client: type[Client]) -> type[Client]:
    """Sets the names of a client's methods to those of its attributes, so that they can be pickled and found."""
    for name, method in vars(client).items():
        if hasattr(method, "__wrapped__"):
            method.__module__, method.__name__ = client.__module__, name
            method.__qualname__ = f"{client.__qualname__}.{name}"
    return client


def _described(method: Call, call: Callable[..., Any]) -> Call:
    """Sets the signature of a method: the arguments of a call, and the result of its flow."""
    signature = inspect.signature(call)
    own, *others = signature.parameters.values()
    found = signature.return_annotation
    result = found.removeprefix("Flow[").removesuffix("]") if isinstance(found, str) else get_args(found)[2]
    shown = [own.replace(annotation=inspect.Parameter.empty), *others]
    described: Any = method
    described.__signature__ = signature.replace(parameters=shown, return_annotation=result)
    described.__annotations__ = {each.name: each.annotation for each in others} | {"return": result}
    return method

"""Checks the adapters of a request to vLLM's OpenAI-compatible server before the engine sees it.

vLLM answers every failure inside of its engine with 500 and no reason, and ignores fields that it does not know.
`--middleware prefix_service.client.vllm.PrefixMiddleware` answers in vLLM's own form with the reason, and passes
all other requests on unchanged. It imports neither vLLM nor a web framework.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from prefix_service.client.vllm.answers import Labelled, Send, send_error, send_json
from prefix_service.client.vllm.base_model import BaseModel
from prefix_service.client.vllm.bodies import (
    Message,
    Receive,
    fields_of,
    has_left,
    read_body,
    refuse_misplaced_outside,
    replay,
)
from prefix_service.client.vllm.composition import Composition
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.guard import ASKED, Asked, guard_engine, guard_models
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.model_list import ModelList, page_of
from prefix_service.client.vllm.names import DEFAULT, FIELD, MODEL, Named, Permissions, Served, adapters_named
from prefix_service.client.vllm.requests import PARAMETER
from prefix_service.client.vllm.resolver import Resolver
from prefix_service.client.vllm.source import Source
from prefix_service.errors import InvalidInput, InvalidRequest, NotFound, PrefixServiceError, Unavailable

App = Callable[[Message, Receive, Send], Awaitable[None]]

ROUTES: Final = frozenset(
    {
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/invocations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
    }
)
"""Routes that hand `kv_transfer_params` to the engine. On every other one an adapter is refused."""

_PARSERS: Final = 2  # the interpreter runs one thread at a time: more would only slow each other
_SMALL: Final = 16 << 10  # bytes that are parsed in a few milliseconds at most
_MODELS: Final = "/v1/models"


@dataclass(frozen=True, slots=True)
class _Service:
    """The collaborators that ask the service, on the event loop of vLLM's server."""

    resolver: Resolver
    permissions: Permissions
    model_list: ModelList
    model: Model

    @classmethod
    def of(cls, config: ConnectorConfig, vllm_config: Any, models: Any) -> "_Service":
        """Connects to the service of the engine's configuration; `models` is vLLM's table of served models.

        Raises:
            InvalidRequest: the configuration is wrong.
        """
        source, model = Source(config), Model.of(vllm_config)
        permissions = Permissions(config, source)
        parent = models.base_model_paths[0].name if models is not None else ""
        resolver = Resolver(source, model, BaseModel(vllm_config, config.base_model_check))
        return cls(resolver, permissions, ModelList(source, permissions, model, parent), model)

    async def close(self) -> None:
        """Closes the connections."""
        await self.model_list.close()
        await self.resolver.close()


class PrefixMiddleware:
    """Checks requests between all middlewares of vLLM's application and its routes.

    vLLM puts the class that `--middleware` names around its own authentication. A check there would read the bodies of
    callers without an API key, and reveal to them which adapters exist.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._router: Any = None
        self._behind: App
        self._parsers = ThreadPoolExecutor(_PARSERS, "prefix-bodies")
        self._engine: Any = None
        self._models: Any = None
        self._served = Served(None)
        self._config: ConnectorConfig | InvalidRequest = InvalidRequest("this server has no engine")
        self._service: _Service | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes everything on; `_check` gets the requests that the other middlewares let through."""
        if self._router is None:
            self._router = scope["app"].router
            self._behind, self._router.middleware_stack = self._router.middleware_stack, self._check
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                await self.close()

    async def _check(self, scope: Message, receive: Receive, send: Send) -> None:
        """Checks a POST to a route and passes it on; answers a request for the models."""
        if scope["type"] != "http":
            await self._behind(scope, receive, send)
        elif scope["method"] == "GET" and f"{_path_of(scope)}/".startswith(f"{_MODELS}/"):
            await self._answer_models(scope, receive, send)
        elif scope["method"] == "POST" and self._has_route(scope):
            await self._check_posted(scope, receive, send)
        else:
            await self._behind(scope, receive, send)

    async def _check_posted(self, scope: Message, receive: Receive, send: Send) -> None:
        field, asked = FIELD, None
        try:
            body = await read_body(receive)
            if body is None:
                return
            self._find_engine(scope["app"].state)
            if len(body) <= _SMALL:
                named, fields = self._named(scope, body)
            else:  # other requests are served in the meantime
                named, fields = await asyncio.get_running_loop().run_in_executor(
                    self._parsers, self._named, scope, body
                )
            if named is not None:
                field = named.field
                composition = await self._resolved(named, receive)
                if composition is not None:
                    asked = self._asked(_path_of(scope), fields, named, composition)
        except PrefixServiceError as error:
            await send_error(send, error, field)
            return
        except _ClientLeft:
            return
        token = ASKED.set(asked)
        try:
            labelled = send if asked is None else Labelled(send, asked.composition)
            await self._behind(scope, replay(body, receive), labelled)
        finally:
            ASKED.reset(token)

    def _has_route(self, scope: Message) -> bool:
        return any(route.matches(scope)[0].name == "FULL" for route in self._router.routes)

    def _named(self, scope: Message, body: bytes) -> tuple[Named | None, Mapping[str, Any]]:
        """Returns the adapters that a request names, or that are the default on its route, and its body's fields."""
        refuse_misplaced_outside(scope)
        fields = fields_of(scope, body)
        config = self._config if isinstance(self._config, ConnectorConfig) else None
        return adapters_named(
            fields, scope["headers"], self._served, config, has_default=_path_of(scope) in ROUTES
        ), fields

    def _find_engine(self, state: Any) -> None:
        engine = getattr(state, "engine_client", None)
        if engine is None or self._engine is engine:
            return
        self._engine = engine
        guard_engine(engine)
        self._models = getattr(state, "openai_serving_models", None)
        self._served = Served(self._models)
        if self._models is not None:
            guard_models(self._models)
        try:
            self._config = ConnectorConfig.of_engine(engine.vllm_config.kv_transfer_config)
        except InvalidRequest as error:
            self._config = error

    def _connected(self) -> _Service:
        if isinstance(self._config, InvalidRequest):
            raise InvalidRequest(f"{PARAMETER}: {self._config.message}")
        if self._service is None:
            self._service = _Service.of(self._config, self._engine.vllm_config, self._models)
        return self._service

    async def _resolved(self, named: Named, receive: Receive) -> Composition | None:
        """Returns the versions that a request means; asks the service if necessary.

        Returns None if a `model` names no adapter: vLLM answers that itself.

        Raises:
            PrefixServiceError: the request cannot have those adapters, or the service does not answer.
            _ClientLeft: the client left before.
        """
        service = self._connected()
        if named.field == MODEL and await self._served.finds_lora(named.references[0]):
            return None
        try:
            await service.permissions.require(named)
            return service.resolver.recall(named.references) or await _unless_left(
                service.resolver.resolve(named.references), receive
            )
        except (NotFound, InvalidInput) as error:
            if named.field == MODEL and isinstance(error, NotFound):
                return None
            if isinstance(error, NotFound) and named.field != DEFAULT:
                raise NotFound(f"{error.message}, or this server may not read it") from error
            if named.field == DEFAULT:
                raise Unavailable(f"the server's default_adapter cannot be used: {error.message}") from error
            raise

    def _asked(self, path: str, fields: Mapping[str, Any], named: Named, composition: Composition) -> Asked:
        if path not in ROUTES:
            raise InvalidRequest(
                f"{path} takes no adapter, and the request names {named} in {named.field}: leave it out, "
                f"or use one of {', '.join(sorted(ROUTES))}"
            )
        refuse_options(fields)
        model = named.references[0] if named.field == MODEL else None
        return Asked(named.references, composition, self._connected().model.max_length, model)

    async def _answer_models(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers with vLLM's models followed by the adapters, or with the one model or adapter that the path names."""
        self._find_engine(scope["app"].state)
        if self._models is None or isinstance(self._config, InvalidRequest):
            await self._behind(scope, receive, send)
            return
        own = (await self._models.show_available_models()).model_dump()["data"]
        name = _path_of(scope).removeprefix(_MODELS).removeprefix("/")
        field = MODEL if name else "limit"
        try:
            model_list = self._connected().model_list
            if name:
                found = next((card for card in own if card["id"] == name), None) or await model_list.card(name)
            else:
                found = page_of(own, await model_list.cards(), scope.get("query_string", b"").decode("latin-1"))
        except PrefixServiceError as error:
            await send_error(send, error, field)
            return
        await send_json(send, 200, found)

    async def close(self) -> None:
        """Ends threads and connections."""
        self._parsers.shutdown(wait=False, cancel_futures=True)
        if self._service is not None:
            await self._service.close()


class _ClientLeft(Exception):
    """The client left before its request was answered."""


def _path_of(scope: Message) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _unless_left(work: Coroutine[Any, Any, Composition], receive: Receive) -> Composition:
    """Returns the result of `work`, which is cancelled if the client leaves.

    Raises:
        _ClientLeft: the client left.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(has_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        raise _ClientLeft
    finally:
        working.cancel()
        leaving.cancel()


def refuse_options(fields: Mapping[str, Any]) -> None:
    """Refuses options of a request body that vLLM cannot serve with an adapter.

    Raises:
        InvalidRequest: there is one.
    """
    sampling = fields.get("sampling_params")
    nested = sampling if isinstance(sampling, Mapping) else {}
    reasons = {
        "use_beam_search: vLLM's beam search leaves out the adapter": fields.get("use_beam_search")
        not in (None, False),
        "prompt_logprobs, or echo with logprobs: vLLM computes them from the tokens of the whole prompt, and a "
        "prefix has none": fields.get("prompt_logprobs") is not None
        or nested.get("prompt_logprobs") is not None
        or bool(fields.get("echo") and fields.get("logprobs") is not None),
        "prompt_embeds": fields.get("prompt_embeds") is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InvalidRequest(f"a request with an adapter cannot have {reason}")

"""For vLLM's OpenAI-compatible server: checks the adapter that a request names before the engine sees the request.

vLLM answers every failure inside of its engine with 500 and no reason, and ignores fields that it does not know.
`--middleware prefix_service.client.vllm.PrefixMiddleware` answers in vLLM's own form with the reason, and lets
everything else through as it came. It imports neither vLLM nor a web framework.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from prefix_service.client.vllm.bodies import (
    Message,
    Receive,
    fields_of,
    has_left,
    read_body,
    refuse_misplaced_outside,
    replay,
)
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.failures import status_of
from prefix_service.client.vllm.guard import ASKED, Asked, guard_engine
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.requests import CONTAINER, PARAMETER, adapter_asked
from prefix_service.client.vllm.resolver import Resolver, Version
from prefix_service.client.vllm.source import Source
from prefix_service.errors import InvalidRequest, PrefixServiceError, Unavailable

Send = Callable[[Message], Awaitable[None]]
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
_TYPES: Final = {  # vLLM's words
    400: "BadRequestError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    503: "ServiceUnavailableError",
}


class PrefixMiddleware:
    """Checks requests between all middlewares of vLLM's application and its routes.

    vLLM puts what `--middleware` names around its own authentication. A check there would read bodies of callers
    without an API key, and tell them which adapters there are.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._router: Any = None
        self._behind: App
        self._parsers = ThreadPoolExecutor(_PARSERS, "prefix-bodies")
        self._engine: Any = None
        self._config: ConnectorConfig | InvalidRequest = InvalidRequest("this server has no engine")
        self._service: tuple[Resolver, Model] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what arrives; `_check` meets what the other middlewares let through."""
        if self._router is None:
            self._router = scope["app"].router
            self._behind, self._router.middleware_stack = self._router.middleware_stack, self._check
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                await self.close()

    async def _check(self, scope: Message, receive: Receive, send: Send) -> None:
        """Check what is posted to a route, and pass it on."""
        if scope["type"] != "http" or scope["method"] != "POST" or not self._has_route(scope):
            await self._behind(scope, receive, send)
            return
        try:
            body = await read_body(receive)
            if body is None:
                return
            self._find_engine(scope["app"].state)
            if len(body) <= _SMALL:
                reference = self._asked(scope, body)
            else:  # other requests are served in the meantime
                reference = await asyncio.get_running_loop().run_in_executor(self._parsers, self._asked, scope, body)
            asked = None if reference is None else await self._resolved(reference, receive)
            if asked is None and reference is not None:
                return
        except PrefixServiceError as error:
            await _answer(send, error)
            return
        token = ASKED.set(asked)
        try:
            await self._behind(scope, replay(body, receive), send)
        finally:
            ASKED.reset(token)

    def _has_route(self, scope: Message) -> bool:
        return any(route.matches(scope)[0].name == "FULL" for route in self._router.routes)

    def _asked(self, scope: Message, body: bytes) -> str | None:
        """Return the adapter that a request names."""
        refuse_misplaced_outside(scope)
        fields = fields_of(scope, body)
        config = self._config
        reference = adapter_asked(fields, config.other_parameters if isinstance(config, ConnectorConfig) else None)
        if reference is not None:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path not in ROUTES:
                raise InvalidRequest(f"{path} takes no adapter: remove {PARAMETER}, or use one of {sorted(ROUTES)}")
            refuse_options(fields)
        return reference

    def _find_engine(self, state: Any) -> None:
        engine = getattr(state, "engine_client", None)
        if engine is None or self._engine is engine:
            return
        self._engine = engine
        guard_engine(engine)
        try:
            self._config = ConnectorConfig.of_engine(engine.vllm_config.kv_transfer_config)
        except InvalidRequest as error:
            self._config = error

    async def _resolved(self, reference: str, receive: Receive) -> Asked | None:
        """Returns what a reference means, by asking the service if necessary; None if the client leaves before."""
        if isinstance(self._config, InvalidRequest):
            raise InvalidRequest(f"{PARAMETER}: {self._config.message}")
        if self._service is None:
            model = Model.of(self._engine.vllm_config)
            self._service = Resolver(Source(self._config, self._config.cache_bytes), model), model
        resolver, model = self._service
        version = resolver.recall(reference) or await _unless_left(resolver.resolve(reference), receive)
        return None if version is None else Asked(reference, version, model.max_length)

    async def close(self) -> None:
        """End threads and connections."""
        self._parsers.shutdown(wait=False, cancel_futures=True)
        if self._service is not None:
            await self._service[0].close()


async def _unless_left(work: Coroutine[Any, Any, Version], receive: Receive) -> Version | None:
    """Returns what `work` does, or None if the client leaves before: then it is cancelled."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(has_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


def refuse_options(fields: Mapping[str, Any]) -> None:
    """Refuse options of a request body that cannot be had with an adapter.

    Raises:
        InvalidRequest: there is one.
    """
    sampling = fields.get("sampling_params")
    nested = sampling if isinstance(sampling, Mapping) else {}
    reasons = {
        "use_beam_search: vLLM's beam search leaves out the adapter": fields.get("use_beam_search")
        not in (None, False),
        "prompt_logprobs, or echo with logprobs: vLLM computes them from the whole prompt, of which a prefix is no "
        "text": fields.get("prompt_logprobs") is not None
        or nested.get("prompt_logprobs") is not None
        or bool(fields.get("echo") and fields.get("logprobs") is not None),
        "prompt_embeds": fields.get("prompt_embeds") is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InvalidRequest(f"a request with {PARAMETER} cannot have {reason}")


async def _answer(send: Send, error: PrefixServiceError) -> None:
    status = status_of(error)
    described = {
        "message": error.message,
        "type": _TYPES[status],
        "param": f"{CONTAINER}.{PARAMETER}",
        "code": status,
    }
    body = json.dumps({"error": described}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if isinstance(error, Unavailable):
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""For vLLM's OpenAI-compatible server: what is wrong with an adapter is told before the engine sees the request.

vLLM answers every failure inside of its engine with 500 and no reason. `--middleware
service.client.vllm.PrefixMiddleware` answers in vLLM's own form with the reason, and lets everything else through as it
came. Plain ASGI: it imports neither vLLM nor a web framework.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from service.client.client import PrefixClient
from service.client.vllm.config import ConnectorConfig
from service.client.vllm.model import Model
from service.client.vllm.requests import PARAMETER, adapter_of
from service.errors import InvalidInput, InvalidRequest, NotFound, PrefixServiceError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_THREADS: Final = 32
_SPAN: Final = (0, 1)
_NAMED: Final = PARAMETER.encode()
_TYPES: Final = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}  # vLLM's words


class PrefixMiddleware:
    """Around vLLM's application; takes where the service is from the engine's own configuration."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._threads = ThreadPoolExecutor(_THREADS, "prefix-middleware")
        self._service: tuple[PrefixClient, Model] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Look at what is posted."""
        if scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            finally:
                self.close()
            return
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        messages = await _all_of(receive)
        body = b"".join(message.get("body", b"") for message in messages)
        if _NAMED in body or b"\\u" in body:
            try:
                await asyncio.get_running_loop().run_in_executor(self._threads, self._check, body, scope["app"].state)
            except PrefixServiceError as error:
                await _tell(send, error)
                return
        await self._app(scope, _again(messages, receive), send)

    def _check(self, body: bytes, state: Any) -> None:
        """Blocking: the client's own deadline holds."""
        with contextlib.suppress(ValueError):  # not JSON: vLLM says so itself
            asked = json.loads(body)
            reference = adapter_of(asked.get("kv_transfer_params")) if isinstance(asked, Mapping) else None
            if reference is None:
                return
            if asked.get("prompt_logprobs") is not None or (asked.get("echo") and asked.get("logprobs") is not None):
                raise InvalidRequest(
                    f"a request with {PARAMETER} cannot have prompt_logprobs, or echo with logprobs: vLLM computes "
                    "them from the whole prompt, of which a prefix is no text"
                )
            client, model = self._of(state)
            model.check(client.get(reference, layers=_SPAN, kv_heads=_SPAN).metadata)

    def _of(self, state: Any) -> tuple[PrefixClient, Model]:
        if self._service is None:
            vllm_config = state.engine_client.vllm_config
            if vllm_config.kv_transfer_config is None:
                raise InvalidRequest(f"{PARAMETER}: this engine runs without PrefixConnector (--kv-transfer-config)")
            config = ConnectorConfig.of(vllm_config.kv_transfer_config.kv_connector_extra_config)
            self._service = (config.client(), Model.of(vllm_config))
        return self._service

    def close(self) -> None:
        """End threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._service is not None:
            self._service[0].close()


async def _all_of(receive: Receive) -> list[Message]:
    messages = []
    while True:
        messages.append(await receive())
        if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body", False):
            return messages


def _again(messages: list[Message], receive: Receive) -> Receive:
    """The messages that were taken, then those that come."""
    waiting = iter(messages)

    async def replayed() -> Message:
        return next(waiting, None) or await receive()

    return replayed


async def _tell(send: Send, error: PrefixServiceError) -> None:
    status = 404 if isinstance(error, NotFound) else 400 if isinstance(error, InvalidInput) else 503
    told = {
        "message": error.message,
        "type": _TYPES[status],
        "param": f"kv_transfer_params.{PARAMETER}",
        "code": status,
    }
    body = json.dumps({"error": told}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

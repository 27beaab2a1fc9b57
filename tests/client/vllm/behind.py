"""An application behind `PrefixMiddleware`, with the state of vLLM's application."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from prefix_service.client.vllm.middleware import PrefixMiddleware


def lifespan() -> Callable[[], Awaitable[Any]]:
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    return receive


async def ignore(message: Any) -> None:
    pass


class Models:
    """A stand-in for vLLM's `OpenAIServingModels`, with a model of two names and a LoRA."""

    def __init__(self) -> None:
        self.base_model_paths = [SimpleNamespace(name="base"), SimpleNamespace(name="org/base")]
        self.lora_requests: dict[Any, Any] = {"org/lora": SimpleNamespace(lora_name="org/lora")}
        self.lora_resolvers: list[Any] = []
        self.resolvable: set[str] = set()  # LoRAs that a resolver finds

    def is_base_model(self, model_name: str) -> bool:
        """Returns whether vLLM serves a base model of that name."""
        return any(model.name == model_name for model in self.base_model_paths)

    def model_name(self, lora_request: Any = None) -> str:
        """Returns the name of a LoRA, or of the base model."""
        name: str = self.base_model_paths[0].name if lora_request is None else lora_request.lora_name
        return name

    async def resolve_lora(self, lora_name: str) -> None:
        """Loads the LoRA that a resolver finds, as vLLM does."""
        if lora_name in self.resolvable:
            self.lora_requests[lora_name] = SimpleNamespace(lora_name=lora_name)

    async def show_available_models(self) -> Any:
        """Returns the served models in the form of vLLM's answer."""
        cards = [{"id": one.name, "parent": None} for one in self.base_model_paths]
        cards += [{"id": name, "parent": "base"} for name in self.lora_requests]
        return SimpleNamespace(model_dump=lambda: {"object": "list", "data": cards})


class Behind:
    """An application with the state of vLLM's, which answers with the request that it received."""

    def __init__(self, url: str, model: dict[str, Any], *, transfers: bool = True) -> None:
        self.url, self.key = url, os.environ["PREFIX_API_KEY"]
        self.extra: dict[str, Any] = {"url": url, "timeout": 60}  # kv_connector_extra_config
        transfer = SimpleNamespace(kv_connector_extra_config=self.extra) if transfers else None
        config = SimpleNamespace(
            kv_transfer_config=transfer,
            parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
            model_config=SimpleNamespace(
                get_total_num_hidden_layers=lambda: model["num_layers"],
                get_total_num_kv_heads=lambda: model["num_kv_heads"],
                get_head_size=lambda: model["head_dim"],
                dtype="torch.float32",
                max_model_len=128,
                hf_text_config=SimpleNamespace(model_type="gpt2"),
            ),
        )
        self.state = SimpleNamespace(engine_client=SimpleNamespace(vllm_config=config, generate=self._generate))
        self.models = Models()
        self.routes = ["/v1/completions", "/tokenize"]
        self.middlewares: list[Any] = []
        self.reached: list[Any] = []
        self.prompt: Any = "Why?"
        self.handed: Any = None  # the extra parameters that this application gives to its engine for each request
        self.sampling: dict[str, Any] = {"prompt_logprobs": None, "skip_reading_prefix_cache": False}  # the others

    def _generate(self, prompt: Any, sampling_params: Any, request_id: str = "") -> None:
        self.reached.append(sampling_params)

    def serve_models(self) -> None:
        """Gives the application a table of served models, by which it answers as vLLM's routes do."""
        self.state.openai_serving_models = self.models
        self.routes.append("/v1/models")

    async def _echo(self, request: Request) -> Response:
        body = await request.body()
        if hasattr(self.state, "openai_serving_models"):
            return await self._answer(request.url.path, json.loads(body or b"{}"))
        if self.handed is not None:
            await asyncio.create_task(self._task())
        return Response(body)

    async def _answer(self, path: str, fields: dict[str, Any]) -> Response:
        asked = fields.get("model")
        lora = self.models.lora_requests.get(asked)
        if path == "/v1/models":
            return JSONResponse({"from": "vLLM"})
        if asked and lora is None and not self.models.is_base_model(asked):
            return JSONResponse({"error": {"message": f"The model `{asked}` does not exist.", "code": 404}}, 404)
        self.handed = fields.get("kv_transfer_params") and {"kv_transfer_params": fields["kv_transfer_params"]}
        await asyncio.create_task(self._task())
        told = {"model": self.models.model_name(lora), "choices": [{"finish_reason": "stop"}]}
        if not fields.get("stream"):
            return JSONResponse({**told, "kv_transfer_params": None})
        first = {**told, "choices": [{"text": '"finish_reason":"', "finish_reason": None}]}
        chunks = [json.dumps(one, separators=(",", ":")) for one in (first, told)]
        events = [f"data: {chunk}\n\n" for chunk in (*chunks, "[DONE]")]
        return StreamingResponse(iter(events), media_type="text/event-stream")

    async def _task(self) -> None:
        self.state.engine_client.generate(
            self.prompt, SimpleNamespace(extra_args=self.handed, **self.sampling), request_id="1"
        )

    def post(self, content: Any, path: str = "/v1/completions", **headers: str) -> httpx.Response:
        """Starts the application, posts a request, and returns the answer."""
        app = Starlette(routes=[Route(one, self._echo, methods=["GET", "POST"]) for one in self.routes])
        app.state = State(vars(self.state))
        for middleware in (*self.middlewares, PrefixMiddleware):  # the last is the outermost
            app.add_middleware(middleware)
        named = {name.replace("_", "-"): value for name, value in headers.items()}

        async def live() -> httpx.Response:
            method = "GET" if content is None else "POST"
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://vllm") as client:
                try:
                    return await client.request(method, path, content=content, headers=named)
                finally:
                    await app({"type": "lifespan"}, lifespan(), ignore)

        return asyncio.run(live())

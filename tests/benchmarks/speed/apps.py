"""Runs peers in Python: small ASGI apps under uvicorn with the loop and the parser that ours has on loopback.

    python -m tests.benchmarks.speed.apps scatter 8001 /folder

The folder holds `head.json`, the fields that ours answers with, and `{batch}.safetensors`, what it answers.
"""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

ROUTE: Final = "/v1/tenants/{tenant}/adapters/{ref}/prefix"


class Files:
    """The service's answers, in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.head = {name: str(value) for name, value in json.loads((folder / "head.json").read_text()).items()}
        self.body = cache(self._body)
        self.buffers = cache(self._buffers)

    def _body(self, batch: str) -> bytes:
        return (self._folder / f"{batch}.safetensors").read_bytes()

    def _buffers(self, batch: str) -> tuple[int, list[memoryview]]:
        """Returns the same bytes as the header, the mask, and each layer's row, repeated for each row of the batch."""
        rows = int(batch)
        with (self._folder / f"{batch}.safetensors").open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            buffers = [memoryview(file.read(start))]
            tensors = json.loads(bytes(buffers[0][8:]))
            del tensors["__metadata__"]
            for tensor in sorted(tensors.values(), key=lambda one: one["data_offsets"]):
                first, last = tensor["data_offsets"]
                repeated = len(tensor["shape"]) == 4
                file.seek(start + first)
                row = memoryview(file.read((last - first) // rows if repeated else last - first))
                buffers += [row] * (rows if repeated else 1)
        return sum(map(len, buffers)), buffers


def _raw(head: dict[str, str], length: int | None = None) -> list[tuple[bytes, bytes]]:
    fields = head if length is None else {**head, "content-length": str(length)}
    return [(name.encode(), value.encode()) for name, value in fields.items()]


def one_object(files: Files) -> ASGIApp:
    """Returns an app that sends the whole body as one bytes object."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        body = files.body(scope["path"].strip("/"))
        await send({"type": "http.response.start", "status": 200, "headers": _raw(files.head, len(body))})
        await send({"type": "http.response.body", "body": body})

    return app


def scatter(files: Files) -> ASGIApp:
    """Returns an app that sends the same buffers one after another."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        length, buffers = files.buffers(scope["path"].strip("/"))
        await send({"type": "http.response.start", "status": 200, "headers": _raw(files.head, length)})
        for buffer in buffers:
            await send({"type": "http.response.body", "body": buffer, "more_body": True})
        await send({"type": "http.response.body"})

    return app


def fastapi_response(files: Files) -> ASGIApp:
    """Returns what a developer writes first: a FastAPI route that returns a `Response`."""
    app = FastAPI()

    @app.get("/{batch}")
    async def route(batch: int) -> Response:
        return Response(files.body(str(batch)), headers=files.head)

    return app


def bare_304(files: Files) -> ASGIApp:
    """Returns an app that answers 304 to everything, which shows the limit of uvicorn and the client."""
    start = {"type": "http.response.start", "status": 304, "headers": _raw(files.head)}

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(start)
        await send({"type": "http.response.body"})

    return app


def starlette_304(files: Files) -> ASGIApp:
    """Returns an app that answers 304 from a route with path parameters."""

    async def route(_request: Request) -> Response:
        return Response(status_code=304, headers=files.head)

    return Starlette(routes=[Route(ROUTE, route)])


def fastapi_304(files: Files) -> ASGIApp:
    """Returns an app that answers 304 from a FastAPI route that validates its path and query."""
    app = FastAPI()

    @app.get(ROUTE)
    async def route(tenant: str, ref: str, dtype: str, batch_size: int = 1) -> Response:
        return Response(status_code=304, headers=files.head)

    return app


APPS: Final[dict[str, Callable[[Files], ASGIApp]]] = {
    made.__name__: made for made in (one_object, scatter, fastapi_response, bare_304, starlette_304, fastapi_304)
}


def main() -> None:
    """Serves one of the apps until a signal."""
    name, port, folder = sys.argv[1:]
    options: dict[str, Any] = {"loop": "uvloop", "http": "httptools", "ws": "none", "lifespan": "off"}
    app = APPS[name](Files(Path(folder)))
    uvicorn.run(
        app,
        port=int(port),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=3600,
        **options,
    )


if __name__ == "__main__":
    main()

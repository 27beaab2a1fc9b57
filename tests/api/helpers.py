"""Parts that the HTTP suites share: uploads, well-formed and not, problem documents, safetensors bodies, raw
sockets."""

import json
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import sqlalchemy as sa
import torch
from safetensors.torch import load, load_file, save

from prefix_service.api.server.lingering import _LINGER
from prefix_service.catalog.schema import tenants, usage
from tests.conftest import CORPUS, Server
from tests.processes import eventually, is_alive

MEDIA_TYPE = "application/vnd.safetensors"
Tensors = dict[str, torch.Tensor]

# Two layers, two heads of four, three tokens: 2 * 2 * 2 * 4 * 3 = 96 numbers.
CONFIG: dict[str, Any] = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 3,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 8,
    "inference_mode": True,
}
SHAPE = (3, 32)


def weights(seed: int = 0) -> bytes:
    """Returns a sound weights file for CONFIG."""
    flat = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return save({"prompt_embeddings": flat})


def safetensors_file(header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a safetensors file with this header and data, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], start: int, stop: int, dtype: Any = "F32") -> dict[str, Any]:
    """Returns one tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def versions_path(tenant: str, adapter: str) -> str:
    """Returns the path where versions are published."""
    return f"/v1/tenants/{tenant}/adapters/{adapter}/versions"


def upload(
    client: httpx.Client,
    tenant: str,
    adapter: str,
    config: Mapping[str, Any] | bytes = CONFIG,
    file: bytes | None = None,
    base: Mapping[str, Any] | None = None,
) -> httpx.Response:
    """Publishes a version from parts, and returns the answer."""
    parts = {"adapter_config.json": config if isinstance(config, bytes) else json.dumps(config).encode()}
    if base is not None:
        parts["base_model_config"] = json.dumps(base).encode()
    parts["adapter_model.safetensors"] = weights() if file is None else file
    return client.post(versions_path(tenant, adapter), files=parts)


def accepted(send: Callable[[], httpx.Response]) -> httpx.Response:
    """Sends a request again, as callers do, while it is answered 503 because the machine is slow: a catalog that does
    not answer in time, or blobs that were collected because publishing took longer than the grace period. Returns the
    other answer."""

    def answered() -> httpx.Response | None:
        return None if (answer := send()).status_code == 503 else answer

    answer = eventually(answered)
    assert answer is not None
    return answer


def upload_directory(client: httpx.Client, tenant: str, adapter: str, directory: Path) -> dict[str, Any]:
    """Publishes an adapter directory of the corpus, and returns the new version's description."""
    config = (directory / "adapter_config.json").read_bytes()
    answer = upload(client, tenant, adapter, config, (directory / "adapter_model.safetensors").read_bytes())
    assert answer.status_code in (200, 201), answer.text
    version: dict[str, Any] = answer.json()
    return version


def adapter_of(case: str) -> Path:
    """Returns the adapter directory of a corpus case."""
    return CORPUS / "cases" / case / "adapter"


def expected_of(case: str) -> Tensors:
    """Returns the tensors that PEFT computes from a corpus case."""
    return load_file(CORPUS / "cases" / case / "expected.safetensors")


def problem(answer: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """Checks that an answer is a problem document with this status and code, and returns it; under `/v2` its member
    `error` must equal `detail`, and is not returned."""
    assert answer.status_code == status, f"{answer.status_code} {answer.text[:300]}"
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    if answer.request.url.path.startswith("/v2"):
        assert body.pop("error") == body["detail"]
    assert body.keys() == {"type", "title", "status", "detail", "code"}
    assert body["status"] == status
    assert body["type"] == f"urn:prefix-service:{body['code']}"
    if code is not None:
        assert body["code"] == code, body
    return body


def about_of(body: bytes) -> dict[str, Any]:
    """Returns the metadata of a prefix, and checks that its one key is `prefix`."""
    (length,) = struct.unpack("<Q", body[:8])
    metadata = json.loads(body[8 : 8 + length])["__metadata__"]
    assert list(metadata) == ["prefix"]
    about: dict[str, Any] = json.loads(metadata["prefix"])
    assert metadata["prefix"] == json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return about


def tensors_of(answer: httpx.Response) -> Tensors:
    """Returns the tensors of a successful answer, read by the safetensors library."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    tensors: Tensors = load(answer.content)
    return tensors


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Checks that tensors are equal in dtype, shape and every bit."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def count_reads(server: Server, at: datetime, tenant: str, adapter: str, version: int, *keys: str) -> None:
    """Writes into the catalog that each of these keys read a version once, in the hour of `at` (UTC)."""
    hour = at.replace(minute=0, second=0, microsecond=0, tzinfo=None)
    once = {"requests": 1, "bytes": 1, "cold_loads": 1, "prefix_tokens": 1}
    with server.writing() as catalog:
        id_ = catalog.scalar(sa.select(tenants.c.id).where(tenants.c.name == tenant))
        read = {"hour": hour, "tenant_id": id_, "adapter": adapter, "version": version, **once}
        catalog.execute(sa.insert(usage), [{**read, "key_id": key} for key in keys])


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came over the socket."""

    status: int
    headers: dict[str, str]
    body: bytes


def raw(server: Server, *pieces: bytes, timeout: float = 60) -> RawAnswer:
    """Sends bytes as they are, and reads one answer; the request need not be complete."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=timeout) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read_answer(connection)


def sent_whole(connection: socket.socket, *pieces: bytes) -> bool:
    """Sends a request that is answered early; returns whether the service read all of it. It reads on for a while, and
    a machine may be so slow that this is over before everything was sent."""
    began = time.monotonic()
    try:
        for piece in pieces:
            connection.sendall(piece)
    except (BrokenPipeError, ConnectionResetError):
        assert time.monotonic() - began > _LINGER, "the connection was reset while its client sent"
        return False
    return True


def read_answer(connection: socket.socket) -> RawAnswer:
    """Reads one answer with a Content-Length, or as much as comes before the connection ends."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection, received)
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        body += _more(connection, body)
    return RawAnswer(int(status.split()[1]), headers, body)


def _more(connection: socket.socket, so_far: bytes) -> bytes:
    chunk = connection.recv(65536)
    assert chunk, f"the connection ended after {so_far[:200]!r}"
    return chunk


def head(method: str, path: str, **headers: str) -> bytes:
    """Returns the head of a raw request; underscores in header names are hyphens."""
    fields = {"Host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def assert_alive(server: Server) -> None:
    """Checks that each process that was started still runs, and that the service is ready, as soon as a disk that was
    kept busy lets its checks end in time."""
    assert all(map(is_alive, server.pids()))
    eventually(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200)


def memory(server: Server, name: str) -> int:
    """Returns the bytes that the server's processes have in memory (`VmRSS`), or have had at most (`VmHWM`)."""
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in server.pids()]
    return sum(int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) << 10 for status in statuses)


def peak_memory(server: Server) -> int:
    """Returns the most bytes that the server's processes have ever had in memory."""
    return memory(server, "VmHWM")

"""Publishes many adapters of many tenants for the hosting benchmarks, and knows what each must come back as."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from safetensors.torch import save

from prefix_service.prefix.buffers import bytes_of


@dataclass(frozen=True, slots=True)
class Shape:
    """A prefix in bfloat16: Llama-3-8B has 32 layers, 8 key/value heads of 128, and 20 virtual tokens by default."""

    layers: int = 32
    heads: int = 8
    head_dim: int = 128
    tokens: int = 20
    peft_type: str = "PREFIX_TUNING"

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its keys and values."""
        return 2 * self.layers * self.heads * self.head_dim * self.tokens * 2

    @property
    def config(self) -> bytes:
        """Returns PEFT's `adapter_config.json`."""
        values = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "meta-llama/Meta-Llama-3-8B",
            "num_virtual_tokens": self.tokens,
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "token_dim": self.heads * self.head_dim,
            "inference_mode": True,
        }
        return json.dumps(values).encode()

    def weights(self, seed: int) -> tuple[bytes, str]:
        """Returns a trained adapter's file, and the SHA-256 of its keys and values `[1, L, 2, H, N, D]`."""
        size = self.layers * 2 * self.heads * self.head_dim
        flat = torch.randn((self.tokens, size), generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        # (tokens, layers*2*heads*dim) -> (layers, 2, heads, tokens, dim)
        kv = flat.view(self.tokens, self.layers, 2, self.heads, self.head_dim).permute(1, 2, 3, 0, 4).contiguous()
        return save({"prompt_embeddings": flat}), hashlib.sha256(bytes_of(kv)).hexdigest()


@dataclass(frozen=True, slots=True)
class Hosted:
    """A published adapter."""

    tenant: str
    adapter: str
    shape: Shape
    digest: str

    @property
    def path(self) -> str:
        """Returns the path of its prefix, version 1, in one tensor, which ends the file but for the mask."""
        return f"/v1/tenants/{self.tenant}/adapters/{self.adapter}@1/prefix?layout=stacked"

    def is_right(self, body: bytes) -> bool:
        """Returns whether the body has its keys and values."""
        length = 8 + int.from_bytes(body[:8], "little")
        entry = json.loads(body[8:length])["past_key_values"]["data_offsets"]
        return hashlib.sha256(memoryview(body)[length + entry[0] : length + entry[1]]).hexdigest() == self.digest


def publish_all(
    url: str,
    key: str,
    wanted: list[tuple[str, str, Shape]],
    threads: int,
    progress: Callable[[], None],
    uds: Path | None = None,
) -> list[Hosted]:
    """Publishes `(tenant, adapter, shape)` through the API, each with weights of its own; in the order of `wanted`."""

    def publish(clients: list[httpx.Client], number: int) -> Hosted:
        tenant, adapter, shape = wanted[number]
        weights, digest = shape.weights(number)
        files = {"adapter_config.json": shape.config, "adapter_model.safetensors": weights}
        path = f"/v1/tenants/{tenant}/adapters/{adapter}/versions"
        answer = clients[number % threads].post(path, files=files)
        if answer.status_code != 201:
            raise RuntimeError(f"publishing {tenant}/{adapter}: {answer.status_code} {answer.text}")
        progress()
        return Hosted(tenant, adapter, shape, digest)

    headers = {"Authorization": f"Bearer {key}"}
    sockets = [httpx.HTTPTransport(uds=None if uds is None else str(uds)) for _ in range(threads)]
    clients = [httpx.Client(base_url=url, headers=headers, timeout=60, transport=socket) for socket in sockets]
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda number: publish(clients, number), range(len(wanted))))
    finally:
        for client in clients:
            client.close()


def zipf(count: int, skew: float, seed: int) -> Iterator[int]:
    """Yields numbers below `count` without end, the k-th most popular with weight `1 / k ** skew`. The order of
    popularity depends on the count alone, so that every worker has the same favourites.
    """
    order = list(range(count))
    random.Random(count).shuffle(order)  # noqa: S311 - a benchmark's draw
    weights = [1 / (rank + 1) ** skew for rank in range(count)]
    draw = random.Random(seed)  # noqa: S311
    while True:
        yield from draw.choices(order, weights, k=1000)


def percentile(values: list[float], share: float) -> float:
    """Returns the value below which a share of the values lies."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

"""A service on a GPU answers with the bytes of one on the CPU, and clients copy from pinned memory."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch

from prefix_service.client import PrefixClient
from prefix_service.prefix.variant import KVDtype
from tests.client.conftest import LLAMA
from tests.conftest import Server, running_server
from tests.missing import needs_cuda
from tests.vllm.publishing import publish


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Yields a service on the CPU and one on the GPU, with the same adapter."""
    folder = tmp_path_factory.mktemp("servers")
    with (
        running_server(folder / "cpu", "--device", "cpu") as cpu,
        running_server(folder / "gpu", "--device", "cuda:0") as gpu,
    ):
        for server in (cpu, gpu):
            publish(server, "acme/a", LLAMA)
        yield cpu, gpu


@needs_cuda
@pytest.mark.parametrize("dtype", get_args(KVDtype))
def test_a_service_on_the_gpu_sends_the_bytes_of_one_on_the_cpu(servers: tuple[Server, Server], dtype: KVDtype) -> None:
    """Keys and values are equal bit for bit in each dtype, float8's scales included, whole and of a part."""
    parts: list[dict[str, Any]] = [{}, {"layers": (1, 2)}, {"tp": (1, 2)}]
    for part in parts:
        found = []
        for server in servers:
            with PrefixClient(server.url, server.admin_key, cache_bytes=0) as client:
                found.append(client.get("acme/a", dtype=dtype, **part).kv.tensor)
        assert torch.equal(*(one.contiguous().view(torch.uint8) for one in found)), part


@needs_cuda
def test_a_client_receives_into_pinned_memory_and_copies_it_to_the_gpu(servers: tuple[Server, Server]) -> None:
    """With `pin_memory` the tensors lie in pinned memory, from the service and from the cache, and a copy that does not
    wait has their values.
    """
    _, gpu = servers
    with PrefixClient(gpu.url, gpu.admin_key, pin_memory=True) as client:
        for _ in range(2):
            prefix = client.get("acme/a", batch_size=3)
            assert prefix.kv.tensor.is_pinned()
            copied = prefix.kv.tensor.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            assert torch.equal(copied.cpu(), prefix.kv.tensor)

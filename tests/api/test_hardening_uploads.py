"""A publication takes only the memory that was reserved for it, whatever a caller sends."""

import contextlib
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.api.helpers import CONFIG, assert_alive, memory, problem, upload, versions_path
from tests.conftest import Server, running_server

MIB = 1 << 20
WORK = 256 * MIB
SLACK = 64 * MIB
"""For buffers of bodies, for threads, and for what the allocator keeps."""

# 16 layers, 8 heads of 64, 1024 tokens, float32: 64 MiB.
LARGE: dict[str, Any] = {
    **CONFIG,
    "num_virtual_tokens": 1024,
    "num_layers": 16,
    "num_attention_heads": 8,
    "token_dim": 512,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with a small budget for work in progress."""
    folder = tmp_path_factory.mktemp("uploads") / "data"
    with running_server(folder, environment={"PREFIX_WORK_BYTES": str(WORK)}) as running:
        for tenant in ("acme", "calm"):
            assert upload(running.client(), tenant, "first").status_code == 201
        yield running


@contextlib.contextmanager
def takes_at_most(server: Server, nbytes: int) -> Iterator[None]:
    """Checks that the server's memory rises by at most this many bytes while the block runs."""
    for pid in server.pids():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is that of now
    before = memory(server, "VmHWM")  # as it was then: some may have been returned since
    yield
    rise = memory(server, "VmHWM") - before
    assert rise <= nbytes, f"{rise >> 20} MiB, more than {nbytes >> 20}"


def large(seed: int) -> bytes:
    return save({"prompt_embeddings": torch.randn((1024, 16384), generator=torch.Generator().manual_seed(seed))})


def test_a_small_upload_with_large_activations(server: Server) -> None:
    """An upload of 200 KB with 512 MiB of hidden activations is computed in blocks of 64 MiB."""
    tokens, hidden = 16384, 8192
    config = {
        **CONFIG,
        "inference_mode": False,
        "num_virtual_tokens": tokens,
        "num_layers": 1,
        "num_attention_heads": 1,
        "token_dim": 2,
        "prefix_projection": True,
        "encoder_hidden_size": hidden,
    }
    shapes = {
        "embedding.weight": (tokens, 2),
        "transform.0.weight": (hidden, 2),
        "transform.0.bias": (hidden,),
        "transform.2.weight": (4, hidden),
        "transform.2.bias": (4,),
    }
    file = save({name: torch.randn(shape).to(torch.float16) for name, shape in shapes.items()})
    assert len(file) < 256 << 10
    with takes_at_most(server, 64 * MIB + SLACK):
        assert upload(server.client(), "acme", "mlp", config, file).status_code == 201


def test_activations_without_end_are_refused(server: Server) -> None:
    """An upload of 3 MB with a terabyte of activations, minutes of work, is refused before any is computed."""
    tokens, hidden = 1 << 20, 1 << 18
    config = {
        **CONFIG,
        "inference_mode": False,
        "num_virtual_tokens": tokens,
        "num_layers": 1,
        "num_attention_heads": 1,
        "token_dim": 1,
        "prefix_projection": True,
        "encoder_hidden_size": hidden,
    }
    shapes = {
        "embedding.weight": (tokens, 1),
        "transform.0.weight": (hidden, 1),
        "transform.0.bias": (hidden,),
        "transform.2.weight": (2, hidden),
        "transform.2.bias": (2,),
    }
    file = save({name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()})
    with takes_at_most(server, SLACK):
        body = problem(upload(server.client(), "acme", "mlp", config, file), 422, "invalid-config")
    assert "the config's sizes make 1099511627776 bytes" in body["detail"]


@pytest.mark.one_process("each process bounds the memory of its own work")
def test_many_large_uploads(server: Server) -> None:
    """Five large uploads of one tenant wait for each other's memory, while a neighbour's small one is made. Where this
    machine is slow, one may be refused after it has waited for too long, and then comes again."""
    files = [large(seed) for seed in range(5)]

    def publish(number: int) -> int:
        for _ in range(5):
            answer = upload(server.client(), "acme", f"large{number}", LARGE, files[number])
            if answer.status_code != 503:
                break
            assert "of memory, which other work has held for" in answer.json()["detail"]
        return answer.status_code

    with takes_at_most(server, WORK + SLACK), ThreadPoolExecutor(5) as pool:
        answers = pool.map(publish, range(5))
        assert upload(server.client(), "calm", "small", {**CONFIG, "revision": "x"}).status_code == 201
        assert list(answers) == [201] * 5


def test_one_large_upload(server: Server) -> None:
    """A large upload takes the memory of its keys and values and one block, without the weights and without a copy for
    the disk."""
    file = large(7)
    with takes_at_most(server, (64 + 16) * MIB + SLACK):
        assert upload(server.client(), "acme", "one", LARGE, file).status_code == 201


def test_what_is_not_part_of_the_prefix_is_not_read(server: Server) -> None:
    """A task head of 128 MiB in the file of a small prefix takes no memory."""
    file = save({"prompt_embeddings": torch.randn(3, 32), "score.weight": torch.zeros(1 << 25)})
    with takes_at_most(server, SLACK):
        assert upload(server.client(), "acme", "head", file=file).status_code == 201


def test_an_untrained_version_that_the_quota_refuses(server: Server) -> None:
    """An untrained version of 512 MiB above the quota is neither computed nor written."""
    admin = server.client()
    assert admin.put("/v1/tenants/poor", json={"max_bytes": 64 * MIB}).status_code == 201
    config = {**LARGE, "num_virtual_tokens": 8192}
    before = sorted((server.data_dir / "blobs").rglob("*"))
    with takes_at_most(server, 16 * MIB):
        answer = admin.post(versions_path("poor", "a"), json={"config": config})
    assert "takes at least 1073" in problem(answer, 507, "quota-exceeded")["detail"]
    assert sorted((server.data_dir / "blobs").rglob("*")) == before


def test_an_untrained_version_above_the_budget(server: Server) -> None:
    """An untrained version above the budget gets 507 with the numbers, before it is computed."""
    config = {**LARGE, "num_virtual_tokens": 4096}
    with takes_at_most(server, 16 * MIB):
        answer = server.client().post(versions_path("acme", "fresh"), json={"config": config})
    body = problem(answer, 507, "out-of-space")
    assert "this takes 268435456 bytes of memory, and one request may take 134217728" in body["detail"]


def test_composing_takes_one_source_at_a_time(server: Server) -> None:
    """Composing two sources of 32 MiB takes the memory of the 64 MiB of keys and values at most."""
    admin, config = server.client(), {**LARGE, "num_virtual_tokens": 512}
    for name in ("left", "right"):
        file = save({"prompt_embeddings": torch.randn(512, 16384)})
        assert upload(admin, "acme", name, config, file).status_code == 201
    with takes_at_most(server, (64 + 16) * MIB + SLACK):
        answer = admin.post(versions_path("acme", "both"), json={"compose": ["acme/left", "acme/right"]})
    assert answer.status_code == 201, answer.text


def test_no_memory_for_an_upload(server: Server) -> None:
    """If the budget allows an upload and the machine has no memory, the answer is 507, and the next upload succeeds."""
    client, pid, file = server.client(), server.process.pid, large(8)
    unlimited = resource.prlimit(pid, resource.RLIMIT_AS)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + 40 * MIB, unlimited[1]))
    try:
        body = problem(upload(client, "acme", "none", LARGE, file), 507, "out-of-space")
        assert "this machine has no memory left" in body["detail"]
        assert upload(client, "acme", "small").status_code == 201
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
    assert upload(client, "acme", "none", LARGE, file).status_code == 201
    assert_alive(server)

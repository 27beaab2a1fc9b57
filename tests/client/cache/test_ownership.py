"""The result of `get` is the caller's own: no other call, cache, thread or process sees what is written to it."""

import asyncio
import contextlib
import ctypes
import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from prefix_service.client import AsyncPrefixClient, Prefix, PrefixClient
from prefix_service.client.cache import memory
from tests.client.conftest import Counting
from tests.client.hostile import answer, hostile_server, prefix_body, says
from tests.conftest import Server
from tests.sharing import sharing_server

# 2 layers, 2 heads of 8, float32 make 256 bytes a token. A small body is copied for each caller, a large one is mapped.
TOKENS = {"small": 4, "large": 16 << 10}
HUGE = 128 << 10  # tokens: 32 MiB


def config(tokens: int) -> dict[str, Any]:
    """Returns the config of an adapter of so many tokens."""
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": tokens,
        "num_layers": 2,
        "num_attention_heads": 2,
        "token_dim": 16,
        "inference_mode": True,
    }


def publish_all(server: Server) -> None:
    """Publishes untrained versions of each size."""
    with server.client() as http:
        for name, tokens in {**TOKENS, "huge": HUGE}.items():
            made = http.post(f"/v1/tenants/own/adapters/{name}/versions", json={"config": config(tokens)})
            assert made.is_success, made.text


@pytest.fixture(scope="module", autouse=True)
def adapters(server: Server) -> None:
    """Publishes adapters of each size."""
    publish_all(server)


sizes = pytest.mark.parametrize("size", TOKENS)


def zero(tensor: Tensor) -> None:
    """Writes by torch's own means."""
    tensor.zero_()


def zero_by_numpy(tensor: Tensor) -> None:
    """Writes by a view that torch does not watch."""
    tensor.numpy()[...] = 0


def zero_data(tensor: Tensor) -> None:
    """Writes past autograd and version counters."""
    tensor.data.fill_(0)


def zero_by_dlpack(tensor: Tensor) -> None:
    """Writes by another library's view."""
    from_dlpack(tensor).zero_()


def zero_storage(tensor: Tensor) -> None:
    """Writes to all memory that the tensor has."""
    storage = tensor.untyped_storage()
    ctypes.memset(storage.data_ptr(), 0, storage.nbytes())


WAYS = [zero, zero_by_numpy, zero_data, zero_by_dlpack, zero_storage]


@sizes
@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("reference", ["own/{}@1", "own/{}"], ids=["version", "latest"])
def test_what_is_written_reaches_no_other_call(
    connect: Callable[..., Any], server: Server, size: str, write: Callable[[Tensor], None], reference: str
) -> None:
    """Writing to a result changes neither later results nor earlier ones, cached or not."""
    name = reference.format(size)
    client = connect(server.url)
    with PrefixClient(server.url, server.admin_key) as other:
        right = other.get(name).kv.tensor.clone()
    first = client.get(name)
    for key, _ in first.past_key_values:
        write(key)
    second = client.get(name)
    assert torch.equal(second.kv.tensor, right)
    third = client.get(name)
    for _, value in second.past_key_values:
        write(value)
    assert torch.equal(third.kv.tensor, right)
    assert torch.equal(client.get(name).kv.tensor, right)
    assert not torch.equal(first.kv.tensor, right)


FORMS: list[dict[str, Any]] = [
    {"batch_size": 4},
    {"dtype": "float8_e4m3fn"},
    {"key_dtype": "bfloat16", "value_dtype": "float8_e4m3fn"},
    {"dtype": "bfloat16", "layers": (0, 1)},
    {"batch_size": 2, "materialise": True},
]


@sizes
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_the_callers_own(
    connect: Callable[..., Any], server: Server, size: str, form: dict[str, Any]
) -> None:
    """Rows of a batch, decoded float8, ranges, and materialised prefixes are each caller's own."""
    client = connect(server.url)
    first = client.get(f"own/{size}@1", **form)
    right = first.kv.tensor.clone()
    first.past_key_values[0][0].zero_()
    first.kv.tensor.zero_()
    second = client.get(f"own/{size}@1", **form)
    assert torch.equal(second.kv.tensor, right)
    second.for_batch(3).past_key_values[0][1].zero_()
    assert torch.equal(client.get(f"own/{size}@1", **form).kv.tensor, right)


@sizes
@pytest.mark.parametrize("pool", ["disk", "disk and memory", "httpx", "no cache", "ranges", "verified"])
def test_every_pool_hands_out_memory_of_its_own(server: Server, tmp_path: Path, size: str, pool: str) -> None:
    """A result is the caller's own however its bytes came: by disk, httpx, ranges, or without a cache."""
    options: dict[str, dict[str, Any]] = {
        "disk": {"cache_dir": tmp_path, "cache_bytes": 0},
        "disk and memory": {"cache_dir": tmp_path},
        "httpx": {"http": Counting()},
        "no cache": {"cache_bytes": 0},
        "ranges": {"connections": 2},
        "verified": {"verify_digest": True},
    }
    with PrefixClient(server.url, server.admin_key) as other:
        right = other.get(f"own/{size}@1").kv.tensor
    for _ in range(2):  # the second one finds the first one's disk
        with PrefixClient(server.url, server.admin_key, **options[pool]) as client:
            for _ in range(3):
                found = client.get(f"own/{size}@1").kv.tensor
                assert torch.equal(found, right)
                found.zero_()


@pytest.mark.parametrize("kind", ["blocking", "async"])
@sizes
def test_a_shared_file_is_mapped_for_each_call(shared: Server, kind: str, size: str) -> None:
    """Each call maps a shared file again, also a second call and a revalidation."""

    async def fetch() -> list[Tensor]:
        found = []
        async with AsyncPrefixClient(shared.url, shared.admin_key, uds=shared.uds) as client:
            for _ in range(3):
                found.append((await client.get(f"own/{size}")).kv.tensor.clone())
                (await client.get(f"own/{size}")).kv.tensor.zero_()
        return found

    if kind == "async":
        found = asyncio.run(fetch())
    else:
        found = []
        with PrefixClient(shared.url, shared.admin_key, uds=shared.uds) as client:
            for _ in range(3):
                found.append(client.get(f"own/{size}").kv.tensor.clone())
                client.get(f"own/{size}").kv.tensor.zero_()
    assert found[0].any()
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service that shares its files."""
    with sharing_server(tmp_path_factory.mktemp("sharing")) as server:
        publish_all(server)
        yield server


def test_metadata_is_the_callers_own(client: Any) -> None:
    """Metadata is the caller's own, nested lists too: a wrong range in the cache would be another prefix."""
    first = client.get("own/small@1")
    right = {**first.metadata, "layers": list(first.metadata["layers"])}
    first.metadata["layers"][0] = 1
    first.metadata["tenant"] = "changed"
    assert client.get("own/small@1").metadata == right
    client.clear_cache()
    assert client.get("own/small@1").metadata == right


@sizes
def test_a_batch_of_get_many_is_the_callers_own(client: Any, size: str) -> None:
    """A batch's rows share memory neither with the cache nor with another batch."""
    rows = [f"own/{size}@1", None, f"own/{size}@1"]
    first = client.get_many(rows)
    right = first.stacked.clone()
    first.stacked.zero_()
    assert torch.equal(client.get_many(rows).stacked, right)
    one = client.get(f"own/{size}@1").kv.tensor
    assert torch.equal(one, right[0])


@sizes
def test_threads_do_not_see_each_other(server: Server, size: str) -> None:
    """Each thread writes to its results while the others compare theirs."""
    wrong: list[int] = []
    with PrefixClient(server.url, server.admin_key) as client:
        right = client.get(f"own/{size}@1").kv.tensor.clone()

        def work() -> None:
            for turn in range(20):
                found = client.get(f"own/{size}@1").kv.tensor
                if not torch.equal(found, right):
                    wrong.append(turn)
                found.fill_(turn)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def in_child(work: Callable[[], bool]) -> bool:
    """Returns whether `work` returns a true value in a forked process."""
    if not (pid := os.fork()):
        os._exit(0 if work() else 1)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@sizes
@pytest.mark.parametrize("cache_bytes", [1 << 30, 0])
def test_a_forked_process_writes_to_its_own(server: Server, size: str, cache_bytes: int) -> None:
    """A child writes to inherited results and to those of the inherited cache, and neither side sees the other's."""
    with PrefixClient(server.url, server.admin_key, cache_bytes=cache_bytes) as client:
        inherited = client.get(f"own/{size}@1").kv.tensor
        right = inherited.clone()

        def writes() -> bool:
            inherited.zero_()
            found = client.get(f"own/{size}@1").kv.tensor if cache_bytes else inherited
            is_right = torch.equal(found, right) or not cache_bytes
            found.fill_(3)
            return is_right

        assert in_child(writes)
        assert torch.equal(inherited, right)
        inherited.fill_(5)
        assert in_child(lambda: bool((inherited == 5).all()))
        assert torch.equal(client.get(f"own/{size}@1").kv.tensor, right)


def test_what_get_returned_can_be_sent_to_another_process(server: Server) -> None:
    """A tensor can be sent to another process, as by a DataLoader's worker: torch copies it to shared memory."""
    with PrefixClient(server.url, server.admin_key) as client:
        found = client.get("own/large@1").kv.tensor
        right = found.clone()
        queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
        queue.put(found)
        assert torch.equal(queue.get(), right)
        assert torch.equal(client.get("own/large@1").kv.tensor, right)


def flags_of_memory(tensor: Tensor) -> list[str]:
    """Returns the kernel's flags of the mapping that a tensor begins in (proc_pid_smaps(5))."""
    begins = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            begins = int(found[1], 16) <= tensor.data_ptr() < int(found[2], 16)
        elif begins and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("the tensor is in no mapping")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no transparent huge pages"
)
def test_a_large_body_that_no_cache_keeps_is_received_into_huge_pages(server: Server) -> None:
    """Memory for it asks the kernel for huge pages: the first touch of small ones takes longer than the network."""
    with PrefixClient(server.url, server.admin_key, cache_bytes=0) as client:
        found, other = (client.get("own/huge@1").kv.tensor for _ in range(2))
        assert "hg" in flags_of_memory(found)
        assert torch.equal(found, other)
        found.zero_()
        assert not torch.equal(found, other)


def proportional_bytes() -> int:
    """Returns the memory of this process, in which what is mapped several times counts once."""
    gc.collect()
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.parametrize("way", ["received", "float8", "disk"])
def test_results_that_nobody_writes_to_cost_no_memory(server: Server, tmp_path: Path, way: str) -> None:
    """Eight results that are read take next to nothing beyond the cache's 32 MiB, and writing a page takes a page."""
    options: dict[str, Any] = {"cache_dir": tmp_path} if way == "disk" else {}
    form: dict[str, Any] = {"dtype": "float8_e4m3fn"} if way == "float8" else {}
    with PrefixClient(server.url, server.admin_key, **options) as client:
        client.get("own/small@1").kv.tensor.sum()
        if way == "disk":
            with PrefixClient(server.url, server.admin_key, **options) as earlier:
                earlier.get("own/huge@1", **form)
        client.get("own/huge@1", **form)
        before = proportional_bytes()
        kept = [client.get("own/huge@1", batch_size=2, **form) for _ in range(8)]
        sums = {float(prefix.past_key_values[0][0].sum()) for prefix in kept}
        assert len(sums) == 1
        assert proportional_bytes() - before < 8 << 20
        kept[0].kv.tensor[0, 0, 0, 0, 0] = 7
        assert proportional_bytes() - before < 8 << 20


def open_files() -> int:
    """Returns the number of open files of this process, without sockets, which threads of other tests may close."""
    gc.collect()
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(handle.readlink()))
    return len([file for file in found if not file.startswith("socket:")])


def test_results_hold_no_file_and_the_cache_one_each(server: Server) -> None:
    """The cache closes a prefix's file when it drops the prefix, and results outlive that."""
    with PrefixClient(server.url, server.admin_key) as client:
        client.get("own/small@1")
        client.resolve("own/large@1")  # opens a connection, if another replica has that adapter
        before = open_files()
        kept = [client.get("own/large@1") for _ in range(50)]
        assert open_files() <= before + 1
        client.clear_cache()
        assert open_files() == before
        assert torch.equal(kept[0].kv.tensor, kept[49].kv.tensor)
        kept[0].kv.tensor.zero_()
        assert kept[49].kv.tensor.any()


def test_where_too_many_files_are_open_results_are_copies(
    server: Server, shared: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too many open files results are copies, and as much the caller's own."""
    monkeypatch.setattr(memory, "_MOST_OPEN", 0)
    before = open_files()
    for url, uds in ((server.url, None), (shared.url, shared.uds)):
        with PrefixClient(url, server.admin_key if uds is None else shared.admin_key, uds=uds) as client:
            right = client.get("own/large@1").kv.tensor.clone()
            for _ in range(2):
                client.get("own/large@1").kv.tensor.zero_()
                assert torch.equal(client.get("own/large@1").kv.tensor, right)
            assert open_files() <= before
        client.close()


def test_a_tensor_that_is_not_aligned_is_never_taken_from_elsewhere() -> None:
    """A body that is not aligned, as another server may send it, is copied from the file that it arrived in."""
    body = prefix_body(tokens=8_000)  # 3 MB
    length = int.from_bytes(body[:8], "little")
    shifted = (length + 1).to_bytes(8, "little") + body[8 : 8 + length] + b" " + body[8 + length :]
    with hostile_server(says(answer(shifted))) as server, PrefixClient(server.url, timeout=60) as client:
        for _ in range(2):
            found: Prefix = client.get("a/b@1")
            assert torch.equal(found.kv.tensor.flatten(), torch.arange(found.kv.tensor.numel(), dtype=torch.float32))
            found.kv.tensor.zero_()


@pytest.mark.parametrize("size", ["large"])
def test_a_descriptor_that_the_program_closed_is_never_read(server: Server, size: str, tmp_path: Path) -> None:
    """If a program closed all descriptors, the client does not read the file that reuses a number."""
    other = tmp_path / "other"
    other.write_bytes(b"another tenant" * (1 << 19))
    with PrefixClient(server.url, server.admin_key) as client:
        right = client.get(f"own/{size}@1").kv.tensor.clone()
        handle = max(memory._open)
        with other.open("rb") as taken:
            os.dup2(taken.fileno(), handle)  # closes the handle first
        try:
            for _ in range(2):
                found = client.get(f"own/{size}@1")
                assert torch.equal(found.kv.tensor, right)
                found.kv.tensor.zero_()
            client.clear_cache()
            gc.collect()
            assert os.read(handle, 7) == b"another"  # the program's own file stays open
        finally:
            os.close(handle)

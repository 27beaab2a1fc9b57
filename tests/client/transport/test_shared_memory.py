"""A worker on the service's machine maps a shared file instead of receiving a body, and receives it if that fails."""

import asyncio
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefix_service.client import AsyncPrefixClient, Prefix, PrefixClient
from prefix_service.errors import InvalidResponse, NotFound
from tests.client.conftest import GPT2, LLAMA, Awaited
from tests.client.hostile import BODY, answer, hostile_server, prefix_body, says
from tests.client.test_client import published
from tests.conftest import CORPUS, Server
from tests.processes import eventually
from tests.sharing import shared_dir, shared_files, sharing_server

SHARED = "application/vnd.prefix-service.shared-file+json"
URL = "http://prefix-service"
# 8 layers, 8 heads of 64, 1024 tokens, float32: 32 MiB.
LARGE = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 1024,
    "num_layers": 8,
    "num_attention_heads": 8,
    "token_dim": 512,
    "inference_mode": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharing")


@pytest.fixture(scope="module")
def sharing(folder: Path) -> Iterator[Server]:
    """Yields a service on a Unix socket that shares its memory."""
    with sharing_server(folder) as server:
        made = server.client().post("/v1/tenants/same/adapters/large/versions", json={"config": LARGE, "seed": 1})
        assert made.status_code == 201, made.text
        with PrefixClient(URL, server.admin_key, uds=server.uds) as client:
            for name, case in (("llama", LLAMA), ("gpt2", GPT2)):
                published(client, f"same/{name}", case)
        yield server


@pytest.fixture(params=["blocking", "async"])
def client(request: pytest.FixtureRequest, sharing: Server) -> Iterator[Any]:
    """Yields each kind of client on the socket."""
    if request.param == "blocking":
        with PrefixClient(URL, sharing.admin_key, uds=sharing.uds) as blocking:
            yield blocking
        return
    loop = asyncio.new_event_loop()
    awaited = Awaited(AsyncPrefixClient(URL, sharing.admin_key, uds=sharing.uds), loop)
    yield awaited
    awaited.close()
    loop.close()


@pytest.fixture
def receiving(sharing: Server) -> Iterator[PrefixClient]:
    """Yields a client on the socket that asks for bytes."""
    with PrefixClient(URL, sharing.admin_key, uds=sharing.uds, shared_memory=False) as client:
        yield client


def mapped_file(prefix: Prefix) -> str | None:
    """Returns the file in which a prefix's tensors are, according to the kernel."""
    address = prefix.kv.tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return path[0] if path else None
    raise AssertionError("unmapped")


def is_shared(prefix: Prefix, folder: Path) -> bool:
    """Returns whether a prefix's tensors are in a file of the service."""
    return (mapped_file(prefix) or "").startswith(f"{shared_dir(folder)}/")


@pytest.mark.parametrize("adapter", ["same/llama@1", "same/gpt2", "same/large@1"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16", "batch_size": 3}, {"layers": (1, 2), "kv_heads": (0, 1)}, {"materialise": True}],
)
def test_the_tensors_are_those_that_travel(
    client: Any, receiving: PrefixClient, folder: Path, adapter: str, options: dict[str, Any]
) -> None:
    """Mapped tensors equal received ones bit for bit, and are in memory of the service."""
    prefix, received = client.get(adapter, **options), receiving.get(adapter, **options)
    assert is_shared(prefix, folder)
    assert not is_shared(received, folder)
    assert prefix.metadata == received.metadata
    for (key, value), (other_key, other_value) in zip(prefix.past_key_values, received.past_key_values, strict=True):
        assert torch.equal(key, other_key)
        assert torch.equal(value, other_value)


def test_they_are_what_peft_computes(client: Any) -> None:
    """Mapped tensors are what PEFT computes."""
    expected = load_file(CORPUS / "cases/llama-n20-emb/expected.safetensors")
    for layer, (key, value) in enumerate(client.get("same/llama", batch_size=3).past_key_values):
        assert torch.equal(key, expected[f"b3.layers.{layer}.key"])
        assert torch.equal(value, expected[f"b3.layers.{layer}.value"])


def test_two_dtypes_are_decoded(client: Any, receiving: PrefixClient) -> None:
    """A mapped prefix of two dtypes is the one that is received."""
    form: dict[str, Any] = {"key_dtype": "float16", "value_dtype": "bfloat16"}
    one, other = (each.get("same/llama", **form).kv.tensor for each in (client, receiving))
    assert one.dtype == torch.float32
    assert torch.equal(one, other)


def test_float8_is_decoded(client: Any, receiving: PrefixClient) -> None:
    """A mapped float8 prefix is decoded to float32, in memory of the worker."""
    one, other = (each.get("same/llama", dtype="float8_e4m3fn").kv.tensor for each in (client, receiving))
    assert one.dtype == torch.float32
    assert torch.equal(one, other)


def private_bytes() -> int:
    """Returns the bytes of memory that this process shares with no other."""
    told = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(found) << 10 for found in re.findall(r"^(?:Private_\w+|Anonymous):\s+(\d+) kB", told, re.MULTILINE))


def test_nothing_is_copied(client: Any) -> None:
    """A mapped prefix of 32 MiB takes no memory of the worker, before and after it is read."""
    client.get("same/llama@1")
    before = private_bytes()
    prefix = client.get("same/large@1", batch_size=8)
    assert private_bytes() - before < 2 << 20
    for key, value in prefix.past_key_values:
        key[0].sum()
        value[0].sum()
    assert private_bytes() - before < 4 << 20


def test_what_a_worker_writes_reaches_nobody(client: Any, receiving: PrefixClient, sharing: Server) -> None:
    """What a worker writes into a mapped prefix reaches neither another worker nor the service."""
    with PrefixClient(URL, sharing.admin_key, uds=sharing.uds) as neighbour:
        theirs = neighbour.get("same/llama@1").kv.tensor
        before = theirs.clone()
        client.get("same/llama@1").kv.tensor.fill_(7)
        assert torch.equal(theirs, before)
        assert torch.equal(receiving.get("same/llama@1").kv.tensor, before)


def test_what_is_mapped_outlives_its_eviction(client: Any, sharing: Server, folder: Path) -> None:
    """After an eviction the file's name is gone and mapped tensors stay; the next worker maps another file."""
    prefix = client.get("same/gpt2@1")
    before, file = prefix.kv.tensor.clone(), mapped_file(prefix)
    assert sharing.client().delete("/v1/tenants/same/adapters/gpt2@1/residency").status_code == 204
    # An answer that has arrived may still be read by the service for a moment.
    eventually(lambda: f"{mapped_file(prefix)}" == f"{file} (deleted)")
    assert torch.equal(prefix.kv.tensor, before)
    client.clear_cache()
    again = client.get("same/gpt2@1")
    assert mapped_file(again) not in (file, None)
    assert torch.equal(again.kv.tensor, before)


def test_revalidation(client: Any) -> None:
    """Revalidating `latest` costs a 304, and the same file stays mapped."""
    assert mapped_file(client.get("same/llama")) == mapped_file(client.get("same/llama"))


def test_errors_are_as_ever(client: Any) -> None:
    """A missing adapter is NotFound."""
    with pytest.raises(NotFound):
        client.get("same/nothing")


def test_a_digest_is_verified_where_it_is_wanted(sharing: Server, folder: Path) -> None:
    """A client with `verify_digest` maps a file too, after it has verified its content."""
    with PrefixClient(URL, sharing.admin_key, uds=sharing.uds, verify_digest=True) as verifying:
        assert is_shared(verifying.get("same/llama"), folder)


def test_a_cache_on_disk_keeps_what_was_mapped(sharing: Server, folder: Path, tmp_path: Path) -> None:
    """The cache on disk keeps a mapped prefix, also for a worker that cannot open the service's files."""
    options = {"uds": sharing.uds, "cache_dir": tmp_path / "cache"}
    with PrefixClient(URL, sharing.admin_key, **options) as first:  # type: ignore[arg-type]  # two of many options
        shared = first.get("same/llama@1")
        assert is_shared(shared, folder)
    with PrefixClient(URL, sharing.admin_key, **options) as second:  # type: ignore[arg-type]
        kept = second.get("same/llama@1")
        assert not is_shared(kept, folder)
        assert torch.equal(kept.kv.tensor, shared.kv.tensor)


def test_whoever_cannot_open_a_file_receives_it(
    client: Any, sharing: Server, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is behind another mount or group, or was just evicted, is received instead, with one line of the log
    at level debug."""
    prefix = client.get("same/llama@1")
    (parent,) = {file.parent for file in shared_files(folder)}
    moved = parent.with_name("moved")
    parent.rename(moved)
    try:
        client.clear_cache()
        with caplog.at_level(logging.INFO):
            received = client.get("same/llama@1")
        assert caplog.records == []
        assert not is_shared(received, folder)
        assert torch.equal(received.kv.tensor, prefix.kv.tensor)
        assert torch.equal(client.get("same/llama").kv.tensor, prefix.kv.tensor)
    finally:
        moved.rename(parent)
    client.clear_cache()
    assert is_shared(client.get("same/llama@1"), folder)


def test_eviction_under_way(tmp_path: Path) -> None:
    """Workers that ask while everything is evicted repeatedly always get correct bytes."""
    with sharing_server(tmp_path, environment={"PREFIX_RENDERING_BYTES": str(5 << 20)}) as server:
        config = {**LARGE, "num_virtual_tokens": 64, "num_layers": 8}  # 2 MiB
        for number in range(3):
            path = f"/v1/tenants/same/adapters/a{number}/versions"
            assert server.client().post(path, json={"config": config, "seed": number}).status_code == 201
        with (
            PrefixClient(URL, server.admin_key, uds=server.uds, cache_bytes=0) as client,
            PrefixClient(URL, server.admin_key, uds=server.uds, shared_memory=False) as receiving,
        ):
            expected = [receiving.get(f"same/a{number}@1").kv.tensor for number in range(3)]
            wrong: list[int] = []

            def work(offset: int) -> None:
                for step in range(40):
                    number = (step + offset) % 3
                    if not torch.equal(client.get(f"same/a{number}@1").kv.tensor, expected[number]):
                        wrong.append(number)

            threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []
        eventually(lambda: len(shared_files(tmp_path)) <= 2)


def told(**fields: Any) -> bytes:
    """Returns an answer that names a file."""
    return answer(json.dumps(fields).encode(), f"Content-Type: {SHARED}")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Makes a sound file, as the service would name it."""
    path = tmp_path / "file"
    path.write_bytes(BODY)
    path.chmod(0o440)
    return path


def asked_of(*answers: bytes, **options: Any) -> Prefix:
    """Returns what a client on a socket makes of these answers."""
    with (
        hostile_server(says(*answers), uds=True) as server,
        PrefixClient(URL, uds=server.uds, timeout=60, **options) as client,
    ):
        return client.get("a/b@1")


def test_a_sound_file_is_mapped(file: Path) -> None:
    """A sound file is mapped, so the refusals below have their own reasons."""
    assert mapped_file(asked_of(told(file=str(file), bytes=len(BODY)))) == str(file)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bytes": 1},
        {"file": "{file}"},
        {"file": "{file}", "bytes": "{size}"},
        {"file": "{file}", "bytes": True},
        {"file": "{file}", "bytes": len(BODY) + 1},
        {"file": "{file}", "bytes": len(BODY) - 1},
        {"file": "{file}", "bytes": -1},
        {"file": "{file}", "bytes": 10**30},
        {"file": "{file}", "bytes": len(BODY), "repr_digest": 5},
        {"file": 5, "bytes": len(BODY)},
        {"file": ["{file}"], "bytes": len(BODY)},
        {"file": "file", "bytes": len(BODY)},
        {"file": "../file", "bytes": len(BODY)},
        {"file": "{file}\0", "bytes": len(BODY)},
        {"file": "{folder}", "bytes": 4096},
        {"file": "/dev/zero", "bytes": len(BODY)},
        {"file": "{fifo}", "bytes": len(BODY)},
        {"file": "{writable}", "bytes": len(BODY)},
        {"file": "{other}", "bytes": 1000},
        {"file": "{empty}", "bytes": 0},
        {"file": "/proc/self/status", "bytes": 0},
        {"file": "{file}", "bytes": len(BODY), "padding": "x" * 20_000},
    ],
    ids=str,
)
def test_what_is_not_a_file_of_the_service_is_refused(
    file: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forged answer is InvalidResponse, whatever it names: nothing else is opened as a prefix, waited for or kept."""
    monkeypatch.chdir(file.parent)  # where a relative path would be found
    places = {"{file}": file, "{folder}": file.parent}
    for name in ("fifo", "writable", "other", "empty"):
        places[f"{{{name}}}"] = file.parent / name
    os.mkfifo(places["{fifo}"])
    places["{writable}"].write_bytes(BODY)
    places["{other}"].write_bytes(bytes(1000))
    places["{other}"].chmod(0o440)
    places["{empty}"].touch(0o440)
    filled = dict(fields)
    if isinstance(path := fields.get("file"), str):
        for placeholder, place in places.items():
            path = path.replace(placeholder, str(place))
        filled["file"] = path
    with pytest.raises(InvalidResponse):
        asked_of(told(**filled))


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'"x"', b"null", b"\xff"])
def test_what_is_no_json_object_is_refused(text: bytes) -> None:
    """An answer that is no JSON object is InvalidResponse."""
    with pytest.raises(InvalidResponse):
        asked_of(answer(text, f"Content-Type: {SHARED}"))


def test_a_file_of_another_content_is_refused_where_it_is_verified(file: Path) -> None:
    """With verification, a file with other content or without a digest is not used: the bytes are asked for, and
    verified."""
    fields: dict[str, Any] = {"file": str(file), "bytes": len(BODY)}
    for more in ({}, {"repr_digest": "sha-256=:" + "A" * 43 + "=:"}, {"repr_digest": "crc32c=:AAAAAA==:"}):
        prefix = asked_of(told(**fields, **more), answer(prefix_body(tokens=4)), verify_digest=True)
        assert prefix.num_virtual_tokens == 4
        with pytest.raises(InvalidResponse, match="damaged"):
            asked_of(told(**fields, **more), answer().replace(BODY, BODY[:-1] + b"x"), verify_digest=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    """A file is refused if its owner is neither the service's user, nor root, nor this process's: an owner can write to
    it at any time."""
    os.chown(file, 12345, -1)
    with pytest.raises(InvalidResponse, match="belongs to user 12345, who is not the service's"):
        asked_of(told(file=str(file), bytes=len(BODY)))


def test_a_link_is_not_followed(file: Path) -> None:
    """A symbolic link, which can point anywhere and change, is not followed: the bytes are asked for."""
    link = file.with_name("link")
    link.symlink_to(file)
    prefix = asked_of(told(file=str(link), bytes=len(BODY)), answer(prefix_body(tokens=4)))
    assert prefix.num_virtual_tokens == 4


def test_the_second_question_is_for_bytes_alone(tmp_path: Path) -> None:
    """After a file that is gone, the second request asks for bytes alone."""
    missing = told(file=str(tmp_path / "missing"), bytes=len(BODY))
    with hostile_server(says(missing, answer()), uds=True) as server:
        with PrefixClient(URL, uds=server.uds, timeout=60) as client:
            client.get("a/b@1")
        first, second = server.requests[0]
    assert f"Accept: {SHARED}, application/vnd.safetensors\r\n".encode() in first
    assert b"Accept: application/vnd.safetensors\r\n" in second


@pytest.mark.parametrize("options", [{"shared_memory": False}, {"uds": None}])
def test_who_does_not_want_it_does_not_ask(options: dict[str, Any]) -> None:
    """Clients over TCP, and those with `shared_memory=False`, do not ask for files, and refuse one that comes
    unasked."""
    with hostile_server(says(told(file="/x", bytes=1)), uds="uds" not in options) as server:
        wanted = {"uds": server.uds, "timeout": 5, **options}
        with PrefixClient(server.url, **wanted) as client, pytest.raises(InvalidResponse):
            client.get("a/b@1")
        assert all(SHARED.encode() not in request for requests in server.requests for request in requests)


def test_a_file_of_a_name_that_no_file_can_have_is_not_mapped() -> None:
    """A name with half a surrogate pair, which JSON can hold and no path can, is not mapped: the bytes are asked
    for."""
    named = b'{"file": "/tmp/\\ud800", "bytes": %d}' % len(BODY)
    prefix = asked_of(answer(named, f"Content-Type: {SHARED}"), answer(prefix_body(tokens=4)))
    assert prefix.num_virtual_tokens == 4


def test_what_is_mapped_reports_no_progress(client: Any) -> None:
    """A mapped prefix reports no progress, since no byte of it travels."""
    seen: list[tuple[int, int]] = []
    assert client.get("same/large", progress=lambda *sizes: seen.append(sizes)).num_virtual_tokens == 1024
    assert seen == []

"""Small requests of a small key that would take much memory or time: refused early, and nobody else notices."""

import contextlib
import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.api.attacks import SILENCE, harm
from tests.api.helpers import CONFIG, MEDIA_TYPE, assert_alive, head, problem, tensors_of, upload
from tests.conftest import Server, running_server

TENANT = "bounds"
PATH = f"/v1/tenants/{TENANT}/adapters/a/prefix"
INFER = f"/v2/models/{TENANT}/a/infer"
LONG: dict[str, Any] = {**CONFIG, "num_virtual_tokens": 8192, "num_layers": 1, "num_attention_heads": 1, "token_dim": 2}
LARGE: dict[str, Any] = {
    **CONFIG,
    "num_virtual_tokens": 512,
    "num_layers": 16,
    "num_attention_heads": 8,
    "token_dim": 512,
}
DEEP: dict[str, Any] = {**CONFIG, "num_virtual_tokens": 2, "num_layers": 1024, "num_attention_heads": 1, "token_dim": 2}
MIB = 1 << 20


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service whose memory nobody else's tests use, with a small adapter, one of many tokens, and large ones."""
    with running_server(tmp_path_factory.mktemp("bounds") / "data") as running:
        admin = running.client()
        assert upload(admin, TENANT, "a").status_code == 201
        assert upload(admin, TENANT, "long", LONG, save({"prompt_embeddings": torch.ones(8192, 4)})).status_code == 201
        yield running


@pytest.fixture(scope="module")
def reader(own: Server) -> httpx.Client:
    """A client with a key of scope read."""
    return own.client(own.key("read", TENANT))


def filled(unit: str, size: int, before: str = '{"attention_mask":[', after: str = "]}") -> bytes:
    """JSON of about `size` bytes."""
    count = (size - len(before) - len(after)) // (len(unit) + 1)
    return f"{before}{','.join([unit] * count)}{after}".encode()


MASKS: dict[str, tuple[bytes, int]] = {
    "empty lists": (filled("[]", 4 * MIB), 422),
    "lists in lists": (filled("[[]]", 2 * MIB), 422),
    "objects": (filled('{"a":1}', 4 * MIB), 422),
    "ones, too many": (filled("1", 4 * MIB), 422),
    "numbers": (filled("1.5", 4 * MIB), 422),
    "long numbers": (filled("9" * 4000, 4 * MIB), 422),
    "texts": (filled('"x"', 4 * MIB), 422),
    "a long text": (filled("\U0001f600" + "x" * 2 * MIB, 4 * MIB, '{"attention_mask":"', '"}'), 422),
    "deep": (b'{"attention_mask":' + b"[" * 100_000, 422),
    "unknown fields": (b"{" + ",".join(f'"k{number}":0' for number in range(200_000)).encode() + b"}", 422),
    "a field's long name": (json.dumps({"k" * 3 * MIB: 1}).encode(), 422),
    "too large": (filled("1", 6 * MIB), 413),
}


@pytest.mark.parametrize("case", MASKS)
def test_hostile_masks_cost_little(own: Server, reader: httpx.Client, case: str) -> None:
    """Refused in few words, whatever they hold."""
    body, status = MASKS[case]
    headers = {"Content-Type": "application/json"}
    with harm(own) as done, ThreadPoolExecutor(3) as pool:
        for answer in pool.map(lambda _: reader.post(PATH, content=body, headers=headers), range(3)):
            assert len(problem(answer, status)["detail"].encode()) <= 4096
            assert len(answer.content) < 40_000
    assert done.silence < SILENCE
    assert done.memory < 300 * MIB


ROWS: dict[str, bytes] = {
    "texts that are no references": filled('""', 3 * MIB, '{"rows":['),
    "numbers": filled("1", MIB, '{"rows":['),
    "lists": filled('["a/b"]', MIB, '{"rows":['),
    "wrong lists": filled("[1,2,3]", MIB, '{"rows":['),
    "more rows than a batch has": filled('"a/b"', MIB // 2, '{"rows":['),
}


@pytest.mark.parametrize("case", ROWS)
def test_hostile_rows_cost_little(own: Server, reader: httpx.Client, case: str) -> None:
    """The first wrong row is the only one that is looked at, and rows are counted before that."""
    with harm(own) as done:
        answer = reader.post("/v1/prefixes", content=ROWS[case], headers={"Content-Type": "application/json"})
        assert len(problem(answer, 422)["detail"].encode()) <= 4096
    assert done.silence < SILENCE
    assert done.memory < 150 * MIB


INFERENCES: dict[str, tuple[bytes, int]] = {
    "outputs": (filled("{}", 60 * MIB, '{"inputs":[],"outputs":['), 413),
    "lists": (filled("[]", 60 * MIB, '{"inputs":[{"name":"attention_mask","data":['), 413),
    "nothing": (bytes(64 * MIB), 413),
    "a megabyte": (filled("[]", MIB - 100, '{"inputs":[],"outputs":['), 400),
}


@pytest.mark.parametrize("case", INFERENCES)
def test_compressed_bodies_cost_little(own: Server, reader: httpx.Client, case: str) -> None:
    """Kilobytes of gzip become a megabyte, or a hundred times as much: no more."""
    body, status = INFERENCES[case]
    compressed = gzip.compress(body)
    assert len(compressed) < 70_000
    with harm(own) as done, ThreadPoolExecutor(4) as pool:
        headers = {"Content-Encoding": "gzip"}
        for answer in pool.map(lambda _: reader.post(INFER, content=compressed, headers=headers), range(8)):
            problem(answer, status)
    assert done.silence < SILENCE
    assert done.memory < 200 * MIB


def test_other_bodies_have_a_megabyte(reader: httpx.Client, own: Server) -> None:
    """Bodies other than uploads are refused above a megabyte, also without a declared length."""
    admin = own.client()
    body = json.dumps({"config": {"a": "x" * MIB}}).encode()
    for content in (body, iter([body])):
        headers = {"Content-Type": "application/json"}
        answer = admin.post(f"/v1/tenants/{TENANT}/adapters/b/versions", content=content, headers=headers)
        problem(answer, 413, "too-large")
    problem(reader.post(INFER, content=filled("1", 5 * MIB, '{"inputs":[')), 413, "too-large")


def test_the_largest_mask_as_json(own: Server, reader: httpx.Client) -> None:
    """A million tokens come back as the same mask as a safetensors file does, byte for byte."""
    mask = (torch.arange(256 * 4096) % 3 > 0).to(torch.int64).view(256, 4096)
    with harm(own) as done:
        by_json = reader.post(PATH, json={"attention_mask": mask.tolist(), "expand": False})
        headers = {"Content-Type": MEDIA_TYPE}
        by_file = reader.post(f"{PATH}?expand=false", content=save({"attention_mask": mask}), headers=headers)
    assert tensors_of(by_json)["attention_mask"][:, 3:].equal(mask)
    assert by_json.content == by_file.content
    assert by_json.headers["repr-digest"] == by_file.headers["repr-digest"]
    assert done.silence < SILENCE
    assert done.memory < 250 * MIB


def test_many_short_rows_leave_others_their_turn(own: Server, reader: httpx.Client) -> None:
    """Batches of a thousand layers of a few bytes each, of one adapter and of many, as they are and in float8."""
    file = save({"prompt_embeddings": torch.arange(2 * 4096, dtype=torch.float32).view(2, 4096)})
    assert upload(own.client(), TENANT, "deep", DEEP, file).status_code == 201
    rows = [[f"{TENANT}/deep"] * (1 + row % 4) for row in range(128)]
    for dtype in ("float32", "float8_e4m3fn"):
        with harm(own) as done:
            path = f"/v1/tenants/{TENANT}/adapters/deep/prefix"
            one = reader.get(path, params={"batch_size": 256, "dtype": dtype})
            many = reader.post("/v1/prefixes", json={"rows": rows, "dtype": dtype})
        found, expected = tensors_of(many), tensors_of(one)
        for name in ("past_key_values.0.key", "past_key_values.1023.value"):
            wanted = expected[name][:8].view(torch.uint8)
            assert found[name][:8, :, -2:].view(torch.uint8).equal(wanted)
        assert found["attention_mask"].sum(1).tolist() == [2 * len(row) for row in rows]
        assert done.silence < SILENCE


def test_numbers_as_json_leave_others_their_turn(own: Server, reader: httpx.Client) -> None:
    """A million of them, which take 25 MB of text."""
    file = save({"prompt_embeddings": torch.rand(8192, 4)})
    assert upload(own.client(), TENANT, "random", LONG, file).status_code == 201
    asked = {"inputs": [{"name": "batch_size", "shape": [1], "datatype": "INT32", "data": [25]}]}
    with harm(own) as done:
        answer = reader.post(f"/v2/models/{TENANT}/random/infer", json=asked)
        numbers = sum(len(output["data"]) for output in answer.json()["outputs"])
    assert numbers == 25 * 8192 * (1 + 4)
    assert done.silence < SILENCE
    assert done.memory < 250 * MIB


def unread(server: Server, request: bytes) -> socket.socket:
    """A connection that asks, and reads nothing but the first byte of the answer."""
    address = urlsplit(server.url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    connection.sendall(request)
    assert connection.recv(1) == b"H"
    return connection


def test_masks_of_slow_readers_take_no_memory(own: Server, reader: httpx.Client) -> None:
    """Large batches of long prefixes, and masks that were posted: what is sent is made when it is sent."""
    key = reader.headers["authorization"]
    get = head("GET", f"/v1/tenants/{TENANT}/adapters/long/prefix?batch_size=256", authorization=key)  # 16 MiB of mask
    body = save({"attention_mask": torch.ones(64, 16384, dtype=torch.bool)})  # 1 MiB, which makes 16 MiB
    fields = {"authorization": key, "content_type": MEDIA_TYPE, "content_length": str(len(body))}
    post = head("POST", f"{PATH}?mask_dtype=int64", **fields) + body
    with harm(own) as done, ExitStack() as stack:
        for request in [get, post] * 12:
            stack.enter_context(unread(own, request))
    assert done.silence < SILENCE
    assert done.memory < 160 * MIB


def test_digests_of_repeated_rows_keep_nobody_waiting(own: Server, reader: httpx.Client) -> None:
    """Who asks for many, and goes away, costs a neighbour's cold read nothing to speak of."""
    admin = own.client()
    elements = 512 * 8 * 64 * 2 * 16
    large = save({"prompt_embeddings": torch.ones(512, elements // 512, dtype=torch.float16)})
    assert upload(admin, TENANT, "large", LARGE, large).status_code == 201
    for number in range(2):
        assert upload(admin, "neighbour", f"n{number}", LARGE, large).status_code == 201
    key, address = reader.headers["authorization"], urlsplit(own.url)

    def cold(number: int) -> float:
        own.client().delete(f"/v1/tenants/neighbour/adapters/n{number}/residency")
        began = time.monotonic()
        assert admin.get(f"/v1/tenants/neighbour/adapters/n{number}/prefix").status_code == 200
        return time.monotonic() - began

    alone = cold(0)
    early = 0
    with harm(own) as done:
        for layer in range(16):  # each is another body of up to 256 MiB
            path = f"/v1/tenants/{TENANT}/adapters/large/prefix?batch_size=240&layers={layer}:{layer + 1}"
            connection = socket.create_connection((address.hostname, address.port))
            connection.sendall(head("HEAD", path, authorization=key, want_repr_digest="sha-256=9"))
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                connection.recv(1)
                early += 1
            connection.close()
        disturbed = cold(1)
    assert early < 8, "most answers were there before their client left"
    assert disturbed < 5 * alone + 10
    assert done.silence < SILENCE


@pytest.mark.one_process("HAProxy refuses longer heads itself")
def test_long_fields_and_paths_are_refused(reader: httpx.Client) -> None:
    """Lists in a header field have 8 KiB, path and query together 8,000 bytes."""
    for name in ("Accept", "If-None-Match", "Want-Repr-Digest"):
        long = ", ".join(["x/y"] * 3000)
        body = problem(reader.get(PATH, headers={name: long}), 431, "header-fields-too-large")
        assert "more than 8192" in body["detail"]
    problem(reader.get(f"{PATH}?{'x&' * 4000}"), 414, "uri-too-long")
    problem(reader.get(f"{PATH}/{'x' * 8000}"), 414, "uri-too-long")


def test_the_service_lives(own: Server) -> None:
    """After all of this."""
    assert_alive(own)

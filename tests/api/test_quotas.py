"""Quotas refuse before the work: at the first byte, while bytes arrive, and before anything is computed."""

import contextlib
import select
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.api.helpers import CONFIG, head, problem, read_answer, upload, versions_path, weights
from tests.conftest import Server, running_server

MIB = 1 << 20
QUOTA = 8 * MIB
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
PARTS = (
    b'--x\r\nContent-Disposition: form-data; name="adapter_config.json"\r\n\r\n{}\r\n'
    b'--x\r\nContent-Disposition: form-data; name="adapter_model.safetensors"\r\n\r\n'
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service whose disk no other suite changes."""
    with running_server(tmp_path_factory.mktemp("quotas") / "data") as running:
        yield running


@pytest.fixture
def tenant(request: pytest.FixtureRequest, server: Server) -> str:
    """Makes a tenant with a quota for one test."""
    name = f"quotas-{abs(hash(request.node.name)) % 10**9}"
    assert server.client().put(f"/v1/tenants/{name}", json={"max_bytes": QUOTA}).status_code == 201
    return name


def connect(server: Server) -> socket.socket:
    address = urlsplit(server.url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def begin(server: Server, one: socket.socket, tenant: str, **fields: str) -> None:
    fields = {"Authorization": f"Bearer {server.admin_key}", **FORM, **fields}
    one.sendall(head("POST", versions_path(tenant, "a"), **fields))


@pytest.mark.parametrize("expect", [False, True])
def test_a_declared_length_is_refused_at_the_first_byte(server: Server, tenant: str, expect: bool) -> None:
    """An upload that declares more than the quota is refused before any byte of its body is sent."""
    with connect(server) as one:
        begin(server, one, tenant, Content_Length=str(64 * MIB), **({"Expect": "100-continue"} if expect else {}))
        answer = read_answer(one)
    assert answer.status == 507
    assert b'"quota-exceeded"' in answer.body
    assert b"has 0 of 8388608 bytes, and this version takes at least" in answer.body


def test_chunks_are_counted_while_they_arrive(server: Server, tenant: str) -> None:
    """An upload in chunks without end is refused once they exceed the quota."""
    with connect(server) as one:
        begin(server, one, tenant, Transfer_Encoding="chunked")
        one.sendall(b"%x\r\n%b\r\n" % (len(PARTS), PARTS))
        sent = 0
        while not select.select([one], [], [], 0)[0] and sent < 512 * MIB:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # some time after the answer
                one.sendall(b"%x\r\n%b\r\n" % (MIB, bytes(MIB)))
            sent += MIB
        answer = read_answer(one)
    assert sent < 512 * MIB
    assert answer.status == 507
    assert b'"quota-exceeded"' in answer.body


@pytest.mark.one_process("uploads under way count in their own process; the catalog checks the total at the end")
def test_uploads_in_parallel_do_not_exceed_a_quota_together(server: Server, tenant: str) -> None:
    """An upload under way counts as used until it ends, so parallel ones do not exceed the quota together."""
    admin = server.client()
    large = {**CONFIG, "num_virtual_tokens": 1024, "num_layers": 16}
    file = save({"prompt_embeddings": torch.zeros(1024, 256, dtype=torch.float16)})  # 0.5 MiB, and as much again
    with connect(server) as one:
        begin(server, one, tenant, Content_Length=str(12 * MIB), Expect="100-continue")
        assert one.recv(100).startswith(b"HTTP/1.1 100")  # admitted, with at least 7.3 MiB of weights
        body = problem(upload(admin, tenant, "b", large, file), 507, "quota-exceeded")
        assert f"tenant {tenant!r} has 0 of {QUOTA} bytes and makes other versions of" in body["detail"]
        assert upload(admin, "other", "b", large, file).status_code in (200, 201)
    until_free(admin, tenant, large, file)


def until_free(admin: httpx.Client, tenant: str, config: dict[str, object], file: bytes) -> None:
    """Waits until the service has noticed that another upload ended."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        answer = upload(admin, tenant, "b", config, file)
        if answer.status_code == 201:
            return
        problem(answer, 507, "quota-exceeded")
    raise AssertionError("the bytes of an upload that ended count for ever")


def test_the_same_content_needs_no_room(server: Server, tenant: str) -> None:
    """Known content is accepted at a full quota, also if its length exceeds what the quota leaves, so that it can be
    repaired."""
    admin, large = server.client(), {**CONFIG, "num_virtual_tokens": 4096, "num_layers": 8, "token_dim": 16}
    file = save({"prompt_embeddings": torch.zeros(4096, 256)})  # 4 MiB, and as much again
    quota = {"max_bytes": 9 * MIB}
    admin.put(f"/v1/tenants/{tenant}", json=quota)
    assert upload(admin, tenant, "a", large, file).status_code == 201
    assert upload(admin, tenant, "a", large, file).status_code == 200
    problem(upload(admin, tenant, "other", large, file), 507, "quota-exceeded")


def test_json_forms_are_refused_before_anything_is_made(server: Server, tenant: str) -> None:
    """Untrained and composed versions above the quota are refused before anything is written, even for a moment."""
    admin = server.client()
    config = {**CONFIG, "num_virtual_tokens": 4096, "num_layers": 8, "token_dim": 128}
    half = {**config, "num_virtual_tokens": 600}
    assert admin.post(versions_path(tenant, "a"), json={"config": half}).status_code == 507  # 4.7 MiB, and as much
    admin.put(f"/v1/tenants/{tenant}", json={"max_bytes": 2 * QUOTA})
    assert admin.post(versions_path(tenant, "a"), json={"config": half}).status_code == 201
    before = changed(server)
    problem(admin.post(versions_path(tenant, "b"), json={"config": config}), 507, "quota-exceeded")
    compose = {"compose": [f"{tenant}/a", f"{tenant}/a"]}
    problem(admin.post(versions_path(tenant, "b"), json=compose), 507, "quota-exceeded")
    assert changed(server) == before


def changed(server: Server) -> int:
    """Returns when a file was last made or removed in the folder of staged uploads."""
    return (server.data_dir / "blobs" / "staging").stat().st_mtime_ns


def test_what_was_deleted_counts_until_it_is_collected(server: Server, tenant: str) -> None:
    """Publishing and deleting in turn fills twice the quota of the disk at most, and the tenant sees what counts."""
    admin, config = server.client(), {**CONFIG, "num_virtual_tokens": 1024, "num_layers": 16}
    before, made = blobs(server), 0
    while made < 20:
        wanted = {"config": config, "init_weights": "random", "seed": 1000 + made}  # 1 MiB, and as much again
        answer = admin.post(versions_path(tenant, f"a{made}"), json=wanted)
        if answer.status_code != 201:
            break
        assert admin.delete(f"/v1/tenants/{tenant}/adapters/a{made}").status_code == 204
        made += 1
    refused = problem(answer, 507, "quota-exceeded")["detail"]
    assert "bytes that it deleted are still on the disk, and what it makes now takes at least" in refused
    assert "more than twice its quota together: try again once they have been collected" in refused
    found = admin.get(f"/v1/tenants/{tenant}").json()
    assert (found["adapters"], found["bytes"]) == (0, 0)
    headers = 128 * made  # of the files of keys and values, which never count
    assert QUOTA < blobs(server) - before <= found["uncollected"] + headers
    assert found["uncollected"] <= 2 * QUOTA


def blobs(server: Server) -> int:
    """Returns the bytes of all blobs on the disk."""
    return sum(path.stat().st_size for path in (server.data_dir / "blobs").glob("??/*"))


def test_a_quota_of_adapters_is_looked_at_first(server: Server, tenant: str) -> None:
    """A quota of adapters refuses an upload before its body is read."""
    server.client().put(f"/v1/tenants/{tenant}", json={"max_adapters": 0})
    with connect(server) as one:
        begin(server, one, tenant, Content_Length="1000", Expect="100-continue")
        answer = read_answer(one)
    assert answer.status == 507
    assert b"has 0 adapters and may have 0" in answer.body


def test_the_config_counts(server: Server, tenant: str) -> None:
    """150 versions with long configs count as many bytes as they take in the catalog."""
    admin = server.client()
    for number in range(3):
        config = {**CONFIG, "revision": str(number) + "x" * 50_000}
        assert upload(admin, tenant, "a", config).status_code == 201
    assert admin.get(f"/v1/tenants/{tenant}").json()["bytes"] > 150_000


def test_configs_are_bounded(server: Server, tenant: str) -> None:
    """Configs are bounded as they arrive and as they are stored, and the base model's name by itself."""
    admin = server.client()
    config = {**CONFIG, "revision": "x" * 66_000}
    body = problem(upload(admin, tenant, "a", config), 413, "too-large")
    assert body["detail"] == "adapter_config.json has more than 65536 bytes"
    body = problem(admin.post(versions_path(tenant, "a"), json={"config": config}), 422, "invalid-config")
    assert "bytes as canonical JSON (RFC 8785), more than 65536" in body["detail"]
    digits = b'{"peft_type": "PREFIX_TUNING", "revision": [' + b"1e20," * 12_000 + b"1]}"
    digits = (
        digits[:-1]
        + str({key: value for key, value in CONFIG.items() if key != "peft_type"})[1:]
        .replace("'", '"')
        .replace("True", "true")
        .join((", ", ""))
        .encode()
    )
    body = problem(upload(admin, tenant, "a", digits), 422, "invalid-config")
    assert "bytes as canonical JSON (RFC 8785), more than 65536" in body["detail"]
    named = {**CONFIG, "base_model_name_or_path": "x" * 1001}
    body = problem(upload(admin, tenant, "a", named), 422, "invalid-config")
    assert body["detail"] == "base_model_name_or_path has 1001 characters, more than 1000"
    assert upload(admin, tenant, "a", {**CONFIG, "base_model_name_or_path": "x" * 1000}).status_code == 201


def test_a_large_base_config_is_read(server: Server, tenant: str) -> None:
    """A base model's config with a classifier's many labels is accepted, and none of them is stored."""
    base = {"id2label": {str(number): f"label {number}" * 3 for number in range(21_000)}}
    admin = server.client()
    assert upload(admin, tenant, "a", base=base, file=weights()).status_code == 201
    assert admin.get(f"/v1/tenants/{tenant}").json()["bytes"] < 5000

"""No log, URL, metric or error contains a key, a path or a host name; labels of metrics are bounded."""

import json
import re
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from prefix_service.blobs.folder import FolderBlobStore
from tests.api.helpers import CONFIG, head, problem, raw, upload, weights
from tests.conftest import Server, running_server

TENANT = "acme"
ADAPTERS = f"/v1/tenants/{TENANT}/adapters"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with the most verbose log, and the parser that accepts any method."""
    options = ("--host", "0.0.0.0")  # noqa: S104 - for as long as the tests run, and every route needs a key
    environment = {"PREFIX_LOG_LEVEL": "debug"}
    data = tmp_path_factory.mktemp("tenancy") / "data"
    with running_server(data, *options, environment=environment) as running:
        for name in ("a", "z"):  # two, so that a page may have a next
            assert upload(running.client(), TENANT, name).status_code == 201
        yield running


def _clumsy(key: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Returns requests of a client that puts its key where none belongs."""
    escaped = key.replace("_", "%5F")
    for path in (
        f"/{key}",
        f"/v1/{key}",
        f"/v1/keys/{key}",
        f"/v1/tenants/{key}",
        f"/v1/tenants/{escaped}/adapters/a",
        f"{ADAPTERS}/{key}",
        f"{ADAPTERS}/a@{key}",
        f"{ADAPTERS}/{escaped}/prefix",
        f"{ADAPTERS}/a/aliases/{key}",
        f"/v1/tenants/{TENANT}/keys/{key}",
    ):
        yield "GET", path, {}
        yield "PUT", path, {"json": {"version": 1}}
    for name in ("api_key", "key", "batch_size", "dtype", "layers", "limit", "cursor", "base_model", key):
        yield "GET", f"{ADAPTERS}/a/prefix", {"params": {name: key}}
        yield "GET", ADAPTERS, {"params": {name: key, "limit": 1} if name != "limit" else {"limit": key}}
    for name in (
        "X-Api-Key",
        "X-Request-ID",
        "Accept",
        "Accept-Encoding",
        "Content-Type",
        "Content-Encoding",
        "Cookie",
        "If-Match",
        "If-None-Match",
        "If-Range",
        "Range",
        "Referer",
        "User-Agent",
        "Want-Repr-Digest",
        key,
    ):
        yield "GET", f"{ADAPTERS}/a/prefix", {"headers": {name: key}}
        yield "POST", f"{ADAPTERS}/a/prefix", {"headers": {name: key}, "content": key}
    for value in (key, f"Basic {key}", f"Bearer {key} x", f"Bearer  {key}0", f"Bearer {key[:-1]}", f"Token {key}"):
        yield "GET", f"{ADAPTERS}/a", {"headers": {"Authorization": value}}
    for body in (
        key,
        {"scope": key},
        {"scope": "read", key: 1},
        {"scope": "read", "expires": key},
        {"version": key},
        {"config": {**CONFIG, "peft_type": key}},
        {"config": {**CONFIG, "num_layers": key}},
        {"config": {**CONFIG, key: key}, "init_weights": key},
        {"attention_mask": [[key]]},
        {"dtype": key, "attention_mask": key},
    ):
        for method, path in (
            ("POST", "/v1/keys"),
            ("POST", f"{ADAPTERS}/b/versions"),
            ("POST", f"{ADAPTERS}/a/prefix"),
            ("PUT", f"{ADAPTERS}/a/aliases/prod"),
            ("PUT", f"{ADAPTERS}/a/residency"),
        ):
            yield method, path, {"json": body}
    yield "POST", f"{ADAPTERS}/b/versions", {"content": key, "headers": {"Content-Type": "application/json"}}
    yield "POST", f"{ADAPTERS}/b/versions", {"files": {key: key.encode()}}
    yield "POST", f"{ADAPTERS}/b/versions", {"files": {"adapter_config.json": key.encode()}}
    named = {"adapter_config.json": (key, json.dumps(CONFIG)), "adapter_model.safetensors": (key, key.encode())}
    yield "POST", f"{ADAPTERS}/b/versions", {"files": named}
    yield key, ADAPTERS, {}


def test_hardening_35_keys_are_in_no_log_metric_or_answer(server: Server) -> None:
    """A key that a clumsy client puts anywhere in a request is in no line of the log, no metric, no error and no
    header."""
    admin = server.client()
    made = [
        admin.post("/v1/keys", json={"scope": "read"}).json(),
        admin.post("/v1/keys", json={"scope": "read"}).json(),
    ]
    admin.delete(f"/v1/keys/{made[1]['id']}")  # a revoked one is a secret too
    keys = [server.admin_key, *(item["key"] for item in made)]
    secret = re.compile("|".join(f"{key.split('_')[2][:12]}|{key.split('_')[3]}" for key in keys))
    statuses = set()
    for key in keys:
        for method, path, options in _clumsy(key):
            answer = admin.request(method, path, **options)
            statuses.add(answer.status_code)
            told = str(answer.headers) + (answer.text if answer.status_code >= 400 else "")
            assert not secret.search(told), (method, path, options, told)
        line = f"GET /{key} HTTP/9.9\r\nHost: {key}\r\n\r\n".encode()
        assert not secret.search(raw(server, line).body.decode("latin-1"))
    assert statuses >= {200, 401, 404, 405, 406, 415, 422}
    assert 500 not in statuses
    assert not secret.search(admin.get("/metrics").text)
    log = server.logs()
    assert log.count('"event":"request"') > 3 * 100
    assert not secret.search(log)
    assert "Authorization" not in log


def test_hardening_36_no_paths_hostnames_or_traces_in_errors(server: Server) -> None:
    """No internal failure makes an answer say where and how the service runs."""
    client = server.client()
    blobs = FolderBlobStore(server.data_dir / "blobs")
    for name, seed in (("corrupt", 1), ("lost", 2)):
        assert upload(client, TENANT, name, file=weights(seed)).status_code == 201
    digests = {
        name: client.get(f"{ADAPTERS}/{name}/parameters").headers["etag"].strip('"') for name in ("corrupt", "lost")
    }
    blobs.path(digests["corrupt"]).write_bytes(b"other bytes")
    blobs.path(digests["lost"]).unlink()
    answers = [client.get(f"{ADAPTERS}/{name}/parameters") for name in digests]
    assert {answer.status_code for answer in answers} == {503}
    staging = server.data_dir / "blobs" / "staging"
    staging.rename(staging.with_name("moved"))
    staging.write_bytes(b"")
    answers.append(upload(client, TENANT, "c", file=weights(3)))
    staging.unlink()
    staging.with_name("moved").rename(staging)
    catalog = server.data_dir / "catalog.sqlite"
    with closing(sqlite3.connect(catalog)) as other:
        other.execute("BEGIN IMMEDIATE")  # the service notes uses of keys, and may not be in the middle of it
        sound = catalog.read_bytes()
    catalog.write_bytes(b"no catalog" * 1000)
    answers += [
        client.get(f"{ADAPTERS}/a"),
        client.get("/v1/tenants"),
        client.get("/v1/keys"),
        upload(client, TENANT, "d"),
    ]
    catalog.write_bytes(sound)
    assert all(answer.status_code >= 500 for answer in answers), [
        (str(a.request.url), a.text) for a in answers if a.status_code < 500
    ]
    inside = [str(server.data_dir), str(server.data_dir.parent), socket.gethostname(), "Traceback", ".py", "sqlalchemy"]
    inside += ["sqlite", "site-packages", "Errno", "/tmp", "SELECT"]  # noqa: S108 - looked for, not written to
    for answer in answers:
        problem(answer, answer.status_code)
        told = answer.text + str(answer.headers)
        assert not [word for word in inside if word in told], told


def _series(client: httpx.Client) -> set[tuple[str, ...]]:
    """Returns every series of a scrape: its name and its labels."""
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items())))
        for family in parse(client.get("/metrics").text)
        for sample in family.samples
    }


@pytest.mark.one_process("each replica has its own metrics")
def test_hardening_37_metric_labels_are_bounded(server: Server) -> None:
    """Odd methods and hundreds of invented tenants, adapters, paths and parameters make no series."""
    client = server.client()

    def hammer(numbers: range) -> None:
        for number in numbers:
            name = f"made-up-{number}"
            client.get(f"/v1/tenants/{name}/adapters/{name}/prefix")
            client.get(f"/{name}/{name}", params={name: name})
            client.request(f"ODD{number}", f"{ADAPTERS}/{name}", headers={name: name})
            client.request(f"ODD{number}", f"/{name}")
            client.request("TRACE", f"/{name}")
            if number % 10 == 0:
                client.get(f"/v1/tenants/{TENANT}", headers={"Authorization": f"Bearer {name}"})
                client.put(f"/v1/tenants/{TENANT}/adapters/a/aliases/{name}", json={"version": 99})

    hammer(range(1))
    before = _series(client)
    hammer(range(1, 300))
    after = _series(client)
    assert len(after - before) <= 20  # of /metrics itself
    assert not any("made-up" in label or "ODD" in label for series in after for label in series)
    methods = {label for series in after for label in series if label.startswith("method=")}
    assert methods <= {
        f"method={name}" for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
    }
    assert ("prefix_service_requests_total", "method=other", "route=none", "status=404") in after


def test_hardening_37_odd_methods_are_in_no_log(server: Server) -> None:
    """An odd method, which a caller chooses, is in no line of the log."""
    assert raw(server, head("SECRETMETHOD", ADAPTERS, Authorization=f"Bearer {server.admin_key}")).status == 400
    assert "SECRETMETHOD" not in server.logs()

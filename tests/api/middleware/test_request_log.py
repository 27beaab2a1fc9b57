"""Every request gets an id, which its answer has, and one line in the log."""

import json
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from prefix_service.blobs.folder import FolderBlobStore
from tests.api.helpers import head, problem, raw, upload, weights
from tests.commands import PREFIX_SERVICE
from tests.conftest import Server, running_server

PREFIX = "/v1/tenants/acme/adapters/a/prefix"
MADE = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service whose log no other suite writes to, with one adapter."""
    with running_server(tmp_path_factory.mktemp("requests") / "data") as running:
        assert upload(running.client(), "acme", "a").status_code == 201
        yield running


def _lines(server: Server, request_id: str) -> list[dict[str, Any]]:
    """Returns the log's lines of a request, once its own line is there."""
    until = time.monotonic() + 60
    while True:
        whole = server.log.read_text().rpartition("\n")[0]  # another line may be half written
        lines = [line for line in map(json.loads, whole.splitlines()) if line.get("request_id") == request_id]
        if any(line["event"] == "request" for line in lines) or time.monotonic() > until:
            return lines
        time.sleep(0.02)


def _line(server: Server, answer: httpx.Response) -> dict[str, Any]:
    """Returns the one line of a request."""
    (line,) = _lines(server, answer.headers["x-request-id"])
    return line


@pytest.mark.parametrize("given", ["Z9", "0123456789", "Trace_1.2-3", "x" * 128])
def test_a_well_formed_request_id_is_taken_over(own: Server, given: str) -> None:
    """The service returns and logs a well-formed id of the caller."""
    answer = own.client().get(PREFIX, headers={"X-Request-ID": given})
    assert answer.headers["x-request-id"] == given
    assert [line["event"] for line in _lines(own, given)] == ["request"]


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a/b", 'a"b', "é", "a,b", "pfx_0123456789abcdef_55"])
def test_any_other_is_made_anew(own: Server, given: str) -> None:
    """The service replaces an id that is empty, long, of other characters, or may be a key."""
    answer = own.client().get(PREFIX, headers={b"X-Request-ID": given.encode()})
    assert MADE.fullmatch(answer.headers["x-request-id"])


def test_every_answer_has_an_id(own: Server) -> None:
    """Answers that no route gives have an id too: 401, 404, 405, 304, 206, 416 and 422."""
    client, anyone = own.client(), own.client("")
    etag = client.get(PREFIX).headers["etag"]
    answers = [
        anyone.get(PREFIX),
        client.get("/nowhere"),
        client.get("/v1/tenants/a%2Fb"),
        client.get("/livez"),
        client.delete("/livez"),
        client.get(PREFIX, headers={"If-None-Match": etag}),
        client.get(PREFIX, headers={"Range": "bytes=0-3"}),
        client.get(PREFIX, headers={"Range": "bytes=999999-"}),
        client.get(PREFIX, params={"batch_size": 0}),
        client.head(PREFIX),
    ]
    assert [answer.status_code for answer in answers] == [401, 404, 404, 200, 405, 304, 206, 416, 422, 200]
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(found) == 1 and MADE.fullmatch(found[0]) for found in ids)
    assert len({found[0] for found in ids}) == len(answers)


def test_one_line_for_each_request(own: Server) -> None:
    """The line has the path as a template, the outcome, how long it took, and who asked."""
    key = own.client().post("/v1/tenants/acme/keys", json={"scope": "read"}).json()
    client = own.client(key["key"])
    answer = client.get(PREFIX, params={"batch_size": 2})
    line = _line(own, answer)
    parts = [line.pop(f"{part}_seconds") for part in ("prepare", "load", "send")]
    assert 0 < line["seconds"] < 10
    assert sum(parts) == pytest.approx(line.pop("seconds"), abs=1e-5)
    assert line.pop("timestamp")
    assert line.pop("cold") in (False, True)
    assert line == {
        "event": "request",
        "level": "info",
        "method": "GET",
        "route": "/v1/tenants/{tenant}/adapters/{ref}/prefix",
        "status": 200,
        "bytes": len(answer.content),
        "tenant": "acme",
        "adapter": "a",
        "version": 1,
        "code": None,
        "request_id": answer.headers["x-request-id"],
        "key_id": key["id"],
    }
    failed = _line(own, client.get("/v1/tenants/acme/adapters/b"))
    assert (failed["status"], failed["code"], failed["level"]) == (404, "not-found", "info")
    refused = _line(own, own.client("").get(PREFIX))
    assert (refused["status"], refused["code"], refused["route"], refused["tenant"]) == (
        401,
        "unauthenticated",
        "none",
        None,
    )
    assert "key_id" not in refused
    assert not {"adapter", "version", "versions", "cold", "prepare_seconds"} & (failed.keys() | refused.keys())


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/ui", "/ui/app.js", "/"])
def test_public_pages_are_named(own: Server, path: str) -> None:
    """A page that needs no key has its own path as its route."""
    assert _line(own, own.client("").get(path))["route"] == path


def test_a_line_says_what_was_loaded(own: Server) -> None:
    """The first request for a version is logged as cold; a 304 and later requests are not. The routes of a batch and of
    /v2 log the same.
    """
    client = own.client()
    for name in ("cold", "colder"):
        assert upload(client, "acme", name, file=weights(1)).status_code == 201
    path = PREFIX.replace("/a/", "/cold/")
    first = client.get(path)
    unchanged = client.get(path, headers={"If-None-Match": first.headers["etag"]})
    lines = [_line(own, answer) for answer in (first, unchanged, client.get(path))]
    assert [(line["adapter"], line["version"], line["cold"]) for line in lines] == [
        ("cold", 1, True),
        ("cold", 1, False),
        ("cold", 1, False),
    ]
    assert lines[0]["load_seconds"] > 0
    assert lines[1]["load_seconds"] == lines[2]["load_seconds"] == 0
    mixed = _line(own, client.post("/v1/prefixes", json={"rows": ["acme/cold", None, "acme/colder@1", "acme/cold"]}))
    assert (mixed["versions"], mixed["num_versions"]) == (["acme/cold@1", "acme/colder@1"], 2)
    assert (mixed["cold"], mixed["load_seconds"] > 0, "adapter" in mixed) == (True, True, False)
    alone = _line(own, client.post("/v1/prefixes", json={"rows": [["acme/cold", "acme/cold"]]}))
    assert (alone["tenant"], alone["adapter"], alone["version"]) == ("acme", "cold", 1)
    body = {"inputs": [{"name": "batch_size", "datatype": "INT32", "shape": [1], "data": [1]}]}
    v2 = _line(own, client.post("/v2/models/acme%2Fcold/infer", json=body))
    assert (v2["status"], v2["adapter"], v2["version"], v2["cold"]) == (200, "cold", 1, False)


def test_a_batch_of_many_names_the_first_few(own: Server) -> None:
    """A batch's line names its first sixteen versions, and how many there were."""
    client = own.client()
    for seed in range(17):
        assert upload(client, "acme", f"many-{seed:02}", file=weights(seed)).status_code == 201
    rows = [f"acme/many-{seed:02}" for seed in range(17)]
    line = _line(own, client.post("/v1/prefixes", json={"rows": rows}))
    assert line["versions"] == [f"{row}@1" for row in rows[:16]]
    assert line["num_versions"] == 17


def test_an_error_of_a_batch_has_an_id_too(own: Server) -> None:
    """A batch's error has an id in its header, by which the log has its code."""
    answer = own.client().post("/v1/prefixes", json={"rows": ["acme/a", "acme/none"]})
    assert problem(answer, 404, "not-found")["detail"].startswith("row 1: ")
    assert _line(own, answer)["code"] == "not-found"


def test_the_tenant_is_the_one_that_was_authorised(own: Server) -> None:
    """A platform key's line has the path's tenant once it may be seen, and a tenant's key has its own."""
    admin = own.client()
    assert _line(own, admin.get(PREFIX))["tenant"] == "acme"
    assert _line(own, admin.get("/v1/keys"))["tenant"] is None
    mine = own.client(admin.post("/v1/tenants/acme/keys", json={"scope": "read"}).json()["key"])
    assert _line(own, mine.get("/v1/tenants/secret-other/adapters/a"))["tenant"] == "acme"
    assert "secret-other" not in own.log.read_text()


def test_bytes_are_those_of_the_body(own: Server) -> None:
    """A range and a 304 log the bytes that they send, and HEAD logs none."""
    client = own.client()
    etag = client.get(PREFIX).headers["etag"]
    assert _line(own, client.get(PREFIX, headers={"Range": "bytes=0-9"}))["bytes"] == 10
    assert _line(own, client.get(PREFIX, headers={"If-None-Match": etag}))["bytes"] == 0
    assert _line(own, client.head(PREFIX))["bytes"] == 0
    assert _line(own, client.head("/v1/tenants/acme/adapters/b/prefix"))["bytes"] == 0


def test_health_and_metrics_are_heard_at_debug_only(own: Server) -> None:
    """Probes and scrapes are not logged at the default level, because they come every second."""
    client = own.client()
    ids = [client.get(path).headers["x-request-id"] for path in ("/livez", "/readyz", "/metrics")]
    _line(own, client.get(PREFIX))
    assert not any(request_id in own.log.read_text() for request_id in ids)


def test_a_defect_tells_its_traceback_to_the_log_alone(own: Server) -> None:
    """A 500 has no traceback, the log has it once, under the request's id, and the service lives on."""
    client = own.client()
    assert upload(client, "acme", "broken").status_code == 201
    with sqlite3.connect(own.data_dir / "catalog.sqlite") as catalog:
        broken = "SELECT id FROM adapters WHERE name = 'broken'"
        catalog.execute(f"UPDATE versions SET manifest = 'no JSON' WHERE adapter_id = ({broken})")  # noqa: S608 - ours
    catalog.close()
    answer = client.get("/v1/tenants/acme/adapters/broken")
    body = problem(answer, 500, "internal")
    assert body["detail"] == "a defect of the service; its log says more"
    defect, line = sorted(_lines(own, answer.headers["x-request-id"]), key=lambda line: line["event"])
    assert defect["level"] == "error"
    assert "Traceback" in defect["exception"]
    assert defect["key_id"] == line["key_id"]
    assert (line["status"], line["code"], line["level"]) == (500, "internal", "warning")
    assert own.log.read_text().count("Traceback") == 1
    assert client.get(PREFIX).status_code == 200


def test_what_the_library_logs_has_the_requests_id(own: Server) -> None:
    """The id is bound before threads begin, so lines of the standard library's loggers have it too."""
    client = own.client()
    assert upload(client, "acme", "lost", file=weights(7)).status_code == 201
    with sqlite3.connect(own.data_dir / "catalog.sqlite") as catalog:
        (digest,) = catalog.execute(
            "SELECT key_values FROM versions JOIN adapters ON adapters.id = adapter_id WHERE name = 'lost'"
        ).fetchone()
    catalog.close()
    FolderBlobStore(own.data_dir / "blobs").path(digest).unlink()
    answer = client.get("/v1/tenants/acme/adapters/lost/prefix")
    lost, _ = sorted(_lines(own, answer.headers["x-request-id"]), key=lambda line: line["event"] == "request")
    assert (lost["event"], lost["version"]) == ("keys and values lost", "acme/lost@1")
    assert lost["key_id"]


def test_requests_on_one_connection_do_not_share_what_is_bound(own: Server) -> None:
    """A pipelined request without a key does not log the key of the first."""
    first = head("GET", PREFIX, Authorization=f"Bearer {own.admin_key}", X_Request_ID="pipelined-1")
    second = head("GET", "/v1/keys", X_Request_ID="pipelined-2", Connection="close")
    assert raw(own, first + second).status == 200
    (line,) = _lines(own, "pipelined-2")
    assert line["status"] == 401
    assert "key_id" not in line


def test_every_line_is_json(own: Server) -> None:
    """uvicorn's own lines, and those of a start and an end, are JSON too."""
    raw(own, b"nonsense\r\n\r\n")
    lines = [json.loads(line) for line in own.log.read_text().splitlines()]
    assert [line["event"] for line in lines[:2]] == ["audit", "serving"]
    assert {"timestamp", "level", "event"} <= set.intersection(*(set(line) for line in lines))


def test_the_command_line_logs_on_standard_error(own: Server) -> None:
    """A command's log does not mix with its output."""
    command = [*PREFIX_SERVICE, "key", "create", "--platform", "--scope", "read", "--json"]
    done = subprocess.run([*command, "--data-dir", str(own.data_dir)], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["scope"] == "read"


def test_no_header_names_the_server(own: Server) -> None:
    """No answer has a `Server` field."""
    assert "server" not in httpx.get(f"{own.url}/livez").headers

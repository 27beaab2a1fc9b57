"""Both parsers read the requests of `README.md`, and see the end of each at the same byte."""

import json
import socket

import httpx
import pytest

from tests.api.framing.table import Row, answers, exchange, filled, rows
from tests.api.framing.victim import ALIAS, TENANT, VICTIM, address, survives
from tests.api.helpers import CONFIG, head, raw, versions_path, weights
from tests.conftest import Server

ROWS = rows()


@pytest.fixture(scope="module")
def readers(servers: dict[str, Server]) -> dict[str, httpx.Client]:
    """Yields one client for each service, since making one costs more than sending a row."""
    return {parser: server.client() for parser, server in servers.items()}


def test_the_table_is_read_whole() -> None:
    """Each line of a table is a row, and no case occurs twice."""
    assert len(ROWS) >= 60
    assert len({row.case for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row.case for row in ROWS])
def test_both_parsers_answer_as_the_table_says(
    servers: dict[str, Server], readers: dict[str, httpx.Client], row: Row
) -> None:
    """Statuses and the end of the connection are those of the table, and the victim survives."""
    found = {}
    for parser, server in servers.items():
        steal = f"DELETE {VICTIM} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {server.admin_key}\r\n\r\n".encode()
        received = exchange(address(server.url), filled(row, server.admin_key, ALIAS, steal))
        found[parser] = answers(received)
        assert survives(readers[parser])
        assert (b"malformed-request" in received) == ("400" in row.answers)
    assert found == dict.fromkeys(servers, row.answers)


@pytest.mark.parametrize("fields", ["Connection: Upgrade\r\nUpgrade: h2c\r\n", "Expect: 100-continue\r\n", ""])
def test_a_delayed_body_is_never_a_request(server: Server, fields: str) -> None:
    """A delayed body that reads `DELETE …/victim` is not taken for a request."""
    key = f"Authorization: Bearer {server.admin_key}\r\n"
    body = f"DELETE {VICTIM} HTTP/1.1\r\nHost: x\r\n{key}\r\n"
    sent = f"POST {VICTIM}/prefix HTTP/1.1\r\nHost: a\r\n{key}{fields}Content-Type: application/json\r\n"
    sent += f"Content-Length: {len(body)}\r\n\r\n"
    received = answers(exchange(address(server.url), [sent.encode(), body.encode()]))
    assert survives(server.client())
    assert received.removeprefix("100, ") == "422, next"


def test_uploads_of_clients_that_offer_http_2_arrive(server: Server) -> None:
    """An upload with `Upgrade: h2c` becomes a version byte for byte, in one segment or in many."""
    request = server.client().build_request("POST", versions_path(TENANT, "h2c"), files=_files())
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQ"}
    fields = {"Content-Type": request.headers["content-type"], "Authorization": f"Bearer {server.admin_key}", **offer}
    body = request.read()
    for pieces in ([body], [body[:1], body[1:200], body[200:]]):
        sent = head("POST", request.url.path, Content_Length=str(len(body)), **fields)
        assert raw(server, sent, *pieces).status in (200, 201)
        assert raw(server, sent + pieces[0], *pieces[1:]).status == 200
    assert server.client().get(f"/v1/tenants/{TENANT}/adapters/h2c/parameters").content == weights()


def test_http_1_0_gets_no_chunks(server: Server) -> None:
    """For HTTP/1.0 a listing of unknown length ends with the connection; a HEAD and a 304 have no body."""
    path = f"{VICTIM}/prefix"
    key = f"Authorization: Bearer {server.admin_key}\r\n"
    etag = server.client().get(path).headers["etag"]
    for line, fields in (
        ("POST /v2/repository/index", ""),
        (f"GET {path}", ""),
        (f"HEAD {path}", ""),
        (f"GET {path}", f"If-None-Match: {etag}\r\n"),
    ):
        with socket.create_connection(address(server.url), timeout=60) as connection:
            connection.sendall(f"{line} HTTP/1.0\r\n{key}{fields}\r\n".encode())
            received = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        fields_received, _, body = received.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in fields_received.lower()
        assert b"connection: close" in fields_received.lower()
        if line.startswith("POST"):
            assert b"content-length" not in fields_received.lower()
            assert {model["name"] for model in json.loads(body)} >= {f"{TENANT}/victim"}
        elif line.startswith("HEAD") or fields:
            assert body == b""
        else:
            assert body == server.client().get(path).content


def _files() -> dict[str, bytes]:
    return {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": weights()}

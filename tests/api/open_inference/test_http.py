"""The Open Inference Protocol below `tritonclient`: framing, paths, bounds, tenants, and the log of a request."""

import gzip
import json
import socket
import sqlite3
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save

from prefix_service.api.app import create_app
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.data_folder.opening import catalog_file, keys_of, opened
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import CONFIG, assert_alive, head, problem, raw, tensors_of, upload
from tests.benchmarks.fleet import Shape
from tests.conftest import Server, running_server
from tests.processes import eventually, lines_of

LENGTH = "Inference-Header-Content-Length"
MODEL = "/v2/models/acme/a"
INFER = f"{MODEL}/infer"
PREFIX = "/v1/tenants/acme/adapters/a/prefix"
LIMIT = 1 << 16
ROWS = {"name": "batch_size", "shape": [1], "datatype": "INT32"}
MASK = {"name": "attention_mask", "shape": [2, 3], "datatype": "INT64"}
FLAT = [1, 1, 0, 0, 1, 1]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service that takes small bodies, and whose log no other suite writes to."""
    folder = tmp_path_factory.mktemp("inference") / "data"
    with running_server(folder, environment={"PREFIX_MAX_REQUEST_BYTES": str(LIMIT)}) as running:
        for tenant in ("acme", "beta"):
            assert upload(running.client(), tenant, "a").status_code == 201
        yield running


@pytest.fixture
def client(own: Server) -> httpx.Client:
    """Returns a platform admin's client."""
    return own.client()


def refused(answer: httpx.Response, status: int, code: str, *words: str) -> None:
    """Checks that an answer is a problem document, with the member that Open Inference clients read."""
    body = problem(answer, status, code)
    for word in words:
        assert word in body["detail"]


def framed(request: Any, *tensors: bytes) -> tuple[bytes, dict[str, str]]:
    """Returns a body with binary tensors, and its header."""
    text = request if isinstance(request, bytes) else json.dumps(request).encode()
    return b"".join((text, *tensors)), {LENGTH: str(len(text))}


def binary(item: dict[str, Any], size: int) -> dict[str, Any]:
    """Returns an input whose elements follow the JSON."""
    return {**item, "parameters": {"binary_data_size": size}}


def test_json_alone(client: httpx.Client) -> None:
    """Without the binary extension everything is JSON: flat, row by row, exact in every dtype."""
    for dtype, kind in (("float32", np.float32), ("float16", np.float16)):
        asked = {"parameters": {"dtype": dtype}, "inputs": [{**ROWS, "data": [2]}]}
        answer = client.post(INFER, json=asked)
        assert answer.headers["content-type"] == "application/json"
        assert LENGTH not in answer.headers
        expected = tensors_of(client.get(f"{PREFIX}?batch_size=2&dtype={dtype}"))
        for output in answer.json()["outputs"]:
            tensor = expected.pop(output["name"])
            found = np.array(output["data"], np.int64 if output["datatype"] == "INT64" else kind)
            assert output["shape"] == list(tensor.shape)
            assert found.tobytes() == tensor.numpy().tobytes()
        assert not expected


@pytest.mark.parametrize("data", [FLAT, [FLAT[:3], FLAT[3:]]], ids=["flat", "nested"])
def test_a_mask_is_flat_or_nested(client: httpx.Client, data: list[Any]) -> None:
    """A mask's data can be flat or nested, as the protocol allows."""
    answer = client.post(INFER, json={"inputs": [{**MASK, "data": data}]}).json()
    (mask,) = (output for output in answer["outputs"] if output["name"] == "attention_mask")
    assert (mask["shape"], mask["data"]) == ([2, 6], [1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1])


def test_binary_outputs_follow_in_order(client: httpx.Client) -> None:
    """The JSON has each output's size, and the headers the JSON's length and the version; nothing else is sent."""
    names = ["past_key_values.1.value", "attention_mask", "past_key_values.0.key"]
    asked = {"inputs": [{**ROWS, "data": [3]}], "outputs": [{"name": name} for name in names]}
    answer = client.post(INFER, json={**asked, "parameters": {"binary_data_output": True}})
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["prefix-version"] == "1"
    length, expected = int(answer.headers[LENGTH]), tensors_of(client.get(f"{PREFIX}?batch_size=3"))
    outputs = json.loads(answer.content[:length])["outputs"]
    assert [output["name"] for output in outputs] == names
    assert [output["parameters"]["binary_data_size"] for output in outputs] == [expected[name].nbytes for name in names]
    assert answer.content[length:] == b"".join(expected[name].numpy().tobytes() for name in names)


INT32 = (2).to_bytes(4, "little")
FRAMING: dict[str, tuple[bytes, dict[str, str], str]] = {
    "longer than the body": (b"{}", {LENGTH: "3"}, "is 3, and the body has 2 bytes"),
    "far longer": (b"{}", {LENGTH: "9" * 18}, "and the body has 2 bytes"),
    "more digits than a number has": (b"{}", {LENGTH: "9" * 5000}, "must be a number of bytes"),
    "negative": (b"{}", {LENGTH: "-1"}, "must be a number of bytes, got '-1'"),
    "zero: a raw request": (INT32, {LENGTH: "0"}, "is 0, and the body has 4 bytes"),
    "not a number": (b"{}", {LENGTH: "two"}, "got 'two'"),
    "not decimal": (b"{}", {LENGTH: "0x2"}, "got '0x2'"),
    "empty": (b"{}", {LENGTH: ""}, "must be a number of bytes, got ''"),
    "two numbers": (b"{}", {LENGTH: "2, 2"}, "got '2, 2'"),
    "too short": (*framed({"inputs": []})[:1], {LENGTH: "5"}, "not usable JSON"),
    "no body": (b"", {}, "not usable JSON"),
    "not JSON": (b"\x00\xff" * 9, {}, "not usable JSON"),
    "not an object": (b"[]", {}, "must be a JSON object"),
    "nested deeply": (b'{"inputs":' + b"[" * 30_000 + b"]" * 30_000 + b"}", {}, "the body"),
    "bytes that nobody owns": (*framed({"inputs": []}, b"xyz"), "3 bytes stand behind the JSON"),
    "more than was said": (*framed({"inputs": [binary(ROWS, 4)]}, INT32 * 2), "8 bytes stand behind the JSON"),
    "less than was said": (*framed({"inputs": [binary(ROWS, 4)]}, INT32[:3]), "4 bytes of binary data, and 3 are left"),
    "size of another shape": (*framed({"inputs": [binary(ROWS, 8)]}, INT32 * 2), "its shape needs 4"),
    "negative size": (*framed({"inputs": [binary(ROWS, -4)]}, INT32), "greater than or equal to 0"),
    "size of a fraction": (*framed({"inputs": [{**ROWS, "parameters": {"binary_data_size": 4.5}}]}, INT32), "integer"),
    "huge size": (*framed({"inputs": [binary(ROWS, 1 << 62)]}, INT32), "its shape needs 4"),
    "huge shape": (*framed({"inputs": [binary({**MASK, "shape": [1 << 40, 1 << 40]}, 48)]}, bytes(48)), "needs"),
    "data twice": (*framed({"inputs": [{**binary(ROWS, 4), "data": [2]}]}, INT32), "send one of them"),
    "data never": (*framed({"inputs": [ROWS]}), "neither data nor binary_data_size"),
    "no length": (framed({"inputs": [binary(ROWS, 4)]})[0], {}, "0 are left behind the JSON, whose length is I"),
    "negative rows": (*framed({"inputs": [binary(ROWS, 4)]}, b"\xff" * 4), "batch_size"),
    "flags of three": (*framed({"inputs": [binary(MASK, 48)]}, bytes([3]) * 48), "other than 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", FRAMING)
def test_wrong_framing_is_400(own: Server, client: httpx.Client, case: str) -> None:
    """The error says what does not fit, and nothing is allocated for what was only claimed."""
    body, headers, words = FRAMING[case]
    refused(client.post(INFER, content=body, headers=headers), 400, "invalid-request", words)
    assert_alive(own)


def test_the_length_is_told_once(own: Server) -> None:
    """Two fields with the length are refused."""
    body = b'{"inputs":[]}'
    sent = head("POST", INFER, authorization=f"Bearer {own.admin_key}", content_length=str(len(body)))
    field = f"{LENGTH}: 13\r\n".encode()
    answer = raw(own, sent.removesuffix(b"\r\n") + field * 2 + b"\r\n" + body)
    assert answer.status == 400
    assert "got '13, 13'" in json.loads(answer.body)["error"]


INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "no inputs": ({}, "inputs: Field required"),
    "another datatype": ({"inputs": [{**ROWS, "datatype": "INT64", "data": [1]}]}, "must have datatype INT32"),
    "a datatype of nobody": ({"inputs": [{**ROWS, "datatype": "UINT128", "data": [1]}]}, "datatype"),
    "a float mask": ({"inputs": [{**MASK, "datatype": "FP32", "data": FLAT}]}, "must have datatype INT64"),
    "another shape": ({"inputs": [{**ROWS, "shape": [1, 1], "data": [1]}]}, "must have shape [1]"),
    "a flat mask": ({"inputs": [{**MASK, "shape": [6], "data": FLAT}]}, "must have shape [-1, -1]"),
    "an empty mask": ({"inputs": [{**MASK, "shape": [2, 0], "data": []}]}, "must have shape"),
    "a negative mask": ({"inputs": [{**MASK, "shape": [-2, -3], "data": FLAT}]}, "must have shape"),
    "a shape of true": ({"inputs": [{**ROWS, "shape": [True], "data": [1]}]}, "inputs.0.shape.0"),
    "too few elements": ({"inputs": [{**MASK, "data": FLAT[:5]}]}, "attention_mask"),
    "another shape of data": ({"inputs": [{**MASK, "data": [FLAT]}]}, "has shape [2, 3], and its data [1, 6]"),
    "rows of two lengths": ({"inputs": [{**MASK, "data": [FLAT[:4], FLAT[4:]]}]}, "differ in length"),
    "half nested": ({"inputs": [{**MASK, "data": [FLAT[:3], 1, 1, 1]}]}, "rows of zeros and ones"),
    "true is not 1": ({"inputs": [{**MASK, "data": [True, *FLAT[1:]]}]}, "holds True"),
    "two sizes": ({"inputs": [{**ROWS, "data": [1, 2]}]}, "one number of rows"),
    "a nested size": ({"inputs": [{**ROWS, "data": [[1]]}]}, "one number of rows"),
    "a size beyond INT32": ({"inputs": [{**ROWS, "data": [1 << 31]}]}, "one number of rows"),
    "a number as id": ({"inputs": [], "id": 7}, "id: Input should be a valid string"),
    "binary_data of 1": ({"inputs": [], "outputs": [{"name": "a", "parameters": {"binary_data": 1}}]}, "binary_data"),
    "a field of nobody": ({"inputs": [], "input": []}, "input: Extra inputs are not permitted"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_wrong_inputs_are_400(client: httpx.Client, case: str) -> None:
    """Wrong inputs are refused instead of guessed at."""
    asked, words = INPUTS[case]
    refused(client.post(INFER, json=asked), 400, "invalid-request", words)


def test_bodies_are_bounded(own: Server, client: httpx.Client) -> None:
    """A body is refused if it is declared too large, before it is read; if it grows too large while it arrives; and if
    it would be too large once decompressed.
    """
    declared = head("POST", INFER, authorization=f"Bearer {own.admin_key}", content_length=str(LIMIT + 1))
    assert raw(own, declared).status == 413
    refused(client.post(INFER, content=iter([bytes(LIMIT), b"x"])), 413, "too-large", f"more than {LIMIT}")
    for body in (zlib.compress(bytes(32 << 20)), gzip.compress(bytes(32 << 20))):
        answer = client.post(INFER, content=body, headers={"Content-Encoding": "gzip"})
        refused(answer, 413, "too-large", "once it is decompressed")


COMPRESSED: dict[str, tuple[bytes, str]] = {
    "not compressed": (b'{"inputs":[]}', "the body is not gzip"),
    "truncated": (gzip.compress(b'{"inputs":[]}')[:-9], "truncated"),
    "with an appendix": (gzip.compress(b'{"inputs":[]}') + b"x", "goes on behind its end"),
    "nothing": (b"", "truncated"),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_wrong_compression_is_400(client: httpx.Client, case: str) -> None:
    """A compressed body must be whole, and nothing may follow it."""
    body, words = COMPRESSED[case]
    answer = client.post(INFER, content=body, headers={"Content-Encoding": "gzip"})
    refused(answer, 400, "invalid-request", words)


def test_other_compressions_are_415(client: httpx.Client) -> None:
    """The error names the encoding, and those that are read."""
    answer = client.post(INFER, content=b"{}", headers={"Content-Encoding": "br"})
    refused(answer, 415, "unsupported-media-type", "gzip or deflate, not 'br'")


def test_much_json_is_refused(client: httpx.Client) -> None:
    """More than a million elements are refused as JSON, and served as binary data."""
    weights, _ = Shape(tokens=56).weights(0)
    assert upload(client, "acme", "large", Shape(tokens=56).config, weights).status_code in (200, 201)
    path = "/v2/models/acme/large/infer"
    answer = client.post(path, json={"inputs": []})
    refused(answer, 400, "invalid-request", "more than the 1048576 that are written as JSON", "binary_data_output")
    outputs = [{"name": "attention_mask"}]
    assert client.post(path, json={"inputs": [], "outputs": outputs}).status_code == 200
    assert client.post(path, json={"inputs": [], "parameters": {"binary_data_output": True}}).status_code == 200


def test_infinity_is_no_json(client: httpx.Client) -> None:
    """A value that float16 rounds to infinity is refused as JSON, and served as binary data."""
    file = torch.full((3, 32), 1e30)
    assert upload(client, "acme", "loud", file=save({"prompt_embeddings": file})).status_code in (200, 201)
    asked: dict[str, Any] = {"inputs": [], "parameters": {"dtype": "float16"}}
    answer = client.post("/v2/models/acme/loud/infer", json=asked)
    refused(answer, 400, "invalid-request", "past_key_values.0.key", "infinity")
    asked["parameters"]["binary_data_output"] = True
    assert client.post("/v2/models/acme/loud/infer", json=asked).status_code == 200


ENCODED = ["/v2/models/acme%2Fa", "/v2/models/acme%2fa", "/v2/models/acme/a", "/v2/models/%61cme%2F%61"]
SPOILT = [
    "/v2/models/acme%252Fa",
    "/v2/models/acme%2F%2Fa",
    "/v2/models/acme%2Fa%2Finfer",
    "/v2/models%2Facme%2Fa",
    "/v2/models/acme/a%2Fready",
    "/v2/models/acme//a",
    "/v2/models/acme",
    "/v2/models/",
    "/v2/models/acme/a/",
    "/v2/",
]


@pytest.mark.parametrize("path", ENCODED)
def test_the_slash_of_a_name_may_be_encoded_once(own: Server, path: str) -> None:
    """A model's name is one segment with an encoded slash, or two, also before further segments."""
    key = f"Bearer {own.admin_key}"
    for rest in ("", "/ready", "/config", "/stats"):
        assert raw(own, head("GET", f"{path}/versions/1{rest}", authorization=key)).status == 200
        assert raw(own, head("GET", path + rest, authorization=key)).status == 200
    body = b'{"inputs":[]}'
    for rest in ("/infer", "/versions/1/infer"):
        sent = head("POST", path + rest, authorization=key, content_length=str(len(body)))
        assert raw(own, sent + body).status == 200
    for rest in ("/load", "/unload"):
        repository = path.replace("/models", "/repository/models") + rest
        assert raw(own, head("POST", repository, authorization=key, content_length="0")).status == 200


@pytest.mark.parametrize("path", SPOILT)
def test_other_slashes_are_404(own: Server, path: str) -> None:
    """A slash that is encoded twice, elsewhere, or one too many is a 404."""
    answer = raw(own, head("GET", path, authorization=f"Bearer {own.admin_key}"))
    assert answer.status == 404
    assert json.loads(answer.body)["error"] == "there is no such resource"


def test_what_is_anothers_is_missing(own: Server) -> None:
    """On every route another tenant's model is 404 like a missing one; the index lists what the key may see."""
    mine = own.client(own.key("admin", "acme"))
    calls = [("GET", version + rest) for version in ("", "/versions/1") for rest in ("", "/ready", "/config", "/stats")]
    calls += [("POST", "/infer"), ("POST", "/versions/1/infer")]
    for method, rest in calls:
        body = b'{"inputs":[]}' if method == "POST" else b""
        foreign = mine.request(method, f"/v2/models/beta/a{rest}", content=body)
        missing = mine.request(method, f"/v2/models/none/a{rest}", content=body)
        refused(foreign, 404, "not-found")
        assert foreign.json() == {**missing.json(), "detail": "there is no beta/a", "error": "there is no beta/a"}
    for action in ("load", "unload"):
        refused(mine.post(f"/v2/repository/models/beta/a/{action}"), 404, "not-found", "there is no beta/a")
    assert {entry["name"].partition("/")[0] for entry in mine.post("/v2/repository/index").json()} == {"acme"}
    assert _counted(mine) == {"acme"}
    assert _counted(own.client()) == {"acme", "beta"}
    every = own.client().post("/v2/repository/index").json()
    assert {entry["name"].partition("/")[0] for entry in every} == {"acme", "beta"}


def _counted(client: httpx.Client) -> set[str]:
    """Returns the tenants in the statistics of all models."""
    return {entry["name"].partition("/")[0] for entry in client.get("/v2/models/stats").json()["model_stats"]}


def test_load_and_unload_need_write(own: Server) -> None:
    """A reader can do everything but load and unload."""
    reader = own.client(own.key("read", "acme"))
    for action in ("load", "unload"):
        refused(reader.post(f"/v2/repository/models/acme/a/{action}"), 403, "forbidden", "scope write")
    for path in ("/v2", MODEL, f"{MODEL}/ready", f"{MODEL}/config", f"{MODEL}/stats", "/v2/models/stats"):
        assert reader.get(path).status_code == 200
    assert reader.post(INFER, json={"inputs": []}).status_code == 200
    assert reader.post("/v2/repository/index").status_code == 200


def test_changes_stand_in_the_audit(client: httpx.Client) -> None:
    """Loads and unloads are audited like those of `/v1`."""
    for action, row in (("load", "residency.loaded"), ("unload", "residency.unloaded")):
        assert client.post(f"/v2/repository/models/acme/a/{action}").status_code == 200
        latest = client.get("/v1/tenants/acme/audit").json()["items"][0]
        assert (latest["action"], latest["target"]) == (row, "acme/a@1")


def test_without_a_key_no_body_is_read(own: Server) -> None:
    """A 401 comes immediately, before a body that never comes."""
    answer = raw(own, head("POST", INFER, content_length="1000"))
    assert answer.status == 401
    assert json.loads(answer.body)["error"].startswith("a key is needed")


def test_other_methods_are_405(client: httpx.Client) -> None:
    """A 405 has the member that Open Inference clients read."""
    refused(client.delete(MODEL), 405, "method-not-allowed")
    refused(client.get(INFER), 405, "method-not-allowed")


def test_the_log_tells_the_route(own: Server, client: httpx.Client) -> None:
    """The log has the route's template, the tenant and the code of a failure."""
    for path, status, code in ((INFER, 200, None), ("/v2/models/acme/none/infer", 404, "not-found")):
        answer = client.post(path, json={"inputs": []})
        line = _line(own, answer.headers["x-request-id"])
        assert (line["route"], line["tenant"]) == ("/v2/models/{tenant}/{name}/infer", "acme")
        assert (line["status"], line["code"]) == (status, code)


def _line(server: Server, request_id: str) -> dict[str, Any]:
    """Returns the line of a request, once it is there."""

    def found() -> list[dict[str, Any]]:
        return [line for line in lines_of(server.log, "request") if line.get("request_id") == request_id]

    return eventually(found)[0]


def test_the_index_of_thousands(tmp_path: Path) -> None:
    """The index has every version once, in the order of names and numbers, and `ready` only those in memory."""
    settings = Settings(data_dir=tmp_path)
    with opened(settings), keys_of(settings) as (keyring, _):
        key = keyring.create(None, "admin", "", COMMAND_LINE)[1]
    with (
        served(create_app(settings)) as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as admin,
    ):
        assert admin.post("/v2/repository/index").json() == []
        assert admin.post("/v1/tenants/acme/adapters/a/versions", json={"config": CONFIG}).status_code == 201
        with sqlite3.connect(catalog_file(settings.data_dir)) as catalog:
            (columns,) = catalog.execute("SELECT group_concat(name) FROM pragma_table_info('versions')").fetchone()
            changed = {"id": "n + 1", "number": "n + 1", "digest": "'sha256:' || n"}
            values = ",".join(changed.get(name, name) for name in columns.split(","))
            numbers = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 2499)"
            catalog.execute(f"INSERT INTO versions ({columns}) {numbers} SELECT {values} FROM versions, c")  # noqa: S608
        catalog.close()
        admin.put("/v1/tenants/acme/adapters/a@1/residency")
        index = admin.post("/v2/repository/index", json={}).json()
        assert [entry["version"] for entry in index] == [str(number) for number in range(1, 2501)]
        assert [entry["state"] for entry in index] == ["READY"] + ["UNAVAILABLE"] * 2499
        assert admin.post("/v2/repository/index", json={"ready": True}).json() == index[:1]
        refused(admin.post("/v2/repository/index", json={"ready": 1}), 400, "invalid-request", "ready")


@pytest.mark.one_process("what is in memory is each replica's own")
def test_an_answer_that_is_not_read_holds_its_rendering(own: Server, client: httpx.Client) -> None:
    """A rendering stays pinned until the last byte of its rows has left, because they are sent from it."""
    weights, _ = Shape(tokens=56).weights(0)  # 7.3 MB a row, above what Linux buffers for a socket
    assert upload(client, "acme", "held", Shape(tokens=56).config, weights).status_code in (200, 201)
    path, asked = "/v2/models/acme/held/infer", {"inputs": [], "parameters": {"binary_data_output": True}}
    length, body = len(client.post(path, json=asked).content), json.dumps(asked).encode()

    def readers() -> int:
        found = client.get("/v1/residency").json()["resident"]
        return sum(int(row["readers"]) for row in found if row["adapter"] == "held")

    eventually(lambda: readers() == 0)
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        reader.connect((httpx.URL(own.url).host, httpx.URL(own.url).port))
        key = f"Bearer {own.admin_key}"
        reader.sendall(head("POST", path, authorization=key, content_length=str(len(body))) + body)
        reader.recv(1, socket.MSG_PEEK)
        time.sleep(0.3)
        assert readers() == 1
        received = 0
        while received < length:
            received += len(reader.recv(1 << 20))
    eventually(lambda: readers() == 0)

"""Model card, annotations, base model and config file are published with a version, read, and replaced."""

import itertools
import json
from typing import Any

import httpx
import pytest

from tests.api.helpers import CONFIG, problem, versions_path, weights
from tests.conftest import Server

TENANT = "described"
CARD = "# Résumé\r\n\nTrained on *x*.\n"
ANNOTATIONS = {"author": "Zoë", "run/id": "17"}
BASE_MODEL = {"architecture": "LlamaForCausalLM", "sizes": {"hidden_size": 8}, "rope": {"rope_theta": 5e5}}
Parts = dict[str, bytes]
_names = itertools.count()


@pytest.fixture
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client."""
    return server.client()


def _parts(**more: bytes) -> Parts:
    """Returns the parts of an upload in an allowed order."""
    before = {"README.md": CARD.encode(), "adapter_config.json": json.dumps(CONFIG).encode()}
    return before | {"annotations": json.dumps(ANNOTATIONS).encode(), "adapter_model.safetensors": weights()} | more


def _publish(client: httpx.Client, parts: Parts, name: str | None = None) -> httpx.Response:
    return client.post(versions_path(TENANT, name or f"a{next(_names)}"), files=list(parts.items()))


def _published(client: httpx.Client) -> str:
    """Returns the path of a version with CARD and ANNOTATIONS."""
    answer = _publish(client, _parts())
    assert answer.status_code == 201, answer.text
    return answer.headers["location"]


def _put_card(client: httpx.Client, path: str, card: str | bytes, **headers: str) -> httpx.Response:
    return client.put(f"{path}/card", content=card, headers={"Content-Type": "text/markdown", **headers})


def test_they_are_published_with_a_version(client: httpx.Client) -> None:
    """Card and annotations come back unchanged, with an entity tag and the version's number and digest."""
    path = _published(client)
    version = client.get(path).json()
    card, annotations = client.get(f"{path}/card"), client.get(f"{path}/annotations")
    assert (card.status_code, card.content) == (200, CARD.encode())
    assert card.headers["content-type"] == "text/markdown; charset=utf-8"
    assert annotations.json() == ANNOTATIONS
    for answer in (card, annotations):
        assert answer.headers["prefix-digest"] == version["digest"]
        assert answer.headers["prefix-version"] == "1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(answer.request.url, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_a_version_without_them(client: httpx.Client) -> None:
    """A version without them has an empty card, and no annotations."""
    parts = {name: data for name, data in _parts().items() if name.startswith("adapter")}
    path = _publish(client, parts).headers["location"]
    assert client.get(f"{path}/card").content == b""
    assert client.get(f"{path}/annotations").json() == {}


def test_neither_is_in_the_digest(client: httpx.Client) -> None:
    """Publishing equal content with another card finds the version, which keeps its own."""
    name = f"a{next(_names)}"
    first = _publish(client, _parts(), name)
    again = _publish(client, _parts(**{"README.md": b"another", "annotations": b"{}"}), name)
    assert (first.status_code, again.status_code, again.json()) == (201, 200, first.json())
    assert client.get(f"{first.headers['location']}/card").text == CARD
    assert client.get(f"{first.headers['location']}/annotations").json() == ANNOTATIONS


@pytest.mark.parametrize("order", [*itertools.permutations(["README.md", "annotations", "adapter_config.json"])])
def test_they_stand_anywhere_before_the_weights(client: httpx.Client, order: tuple[str, ...]) -> None:
    """The form may have them in any order before the weights."""
    parts = _parts()
    answer = _publish(client, {name: parts[name] for name in (*order, "adapter_model.safetensors")})
    assert answer.status_code == 201
    assert client.get(f"{answer.headers['location']}/card").text == CARD


@pytest.mark.parametrize("name", ["README.md", "annotations"])
def test_not_behind_the_weights_and_not_twice(client: httpx.Client, name: str) -> None:
    """The error names a field that comes after the weights or twice."""
    parts = _parts()
    own = parts.pop(name)
    late = client.post(versions_path(TENANT, "late"), files=[*parts.items(), (name, own)])
    assert f"form field {name} is out of order or sent twice" in problem(late, 422, "invalid-request")["detail"]
    twice = client.post(versions_path(TENANT, "late"), files=[(name, own), (name, own), *parts.items()])
    assert f"form field {name} is out of order or sent twice" in problem(twice, 422, "invalid-request")["detail"]


@pytest.mark.parametrize(
    ("part", "data", "status", "words"),
    [
        ("README.md", b"\xff", 422, "the card is not UTF-8"),
        ("README.md", b"\0", 422, "the card contains a NUL"),
        ("README.md", b"x" * (256 << 10) + b"x", 413, "README.md has more than 262144 bytes"),
        ("annotations", b"[]", 422, "annotations must be a JSON object, got list"),
        ("annotations", b"{", 422, "annotations is not usable JSON"),
        ("annotations", b'{"a": 1}', 422, "annotation a must be text, got 1"),
        ("annotations", json.dumps({f"k{n}": "" for n in range(65)}).encode(), 422, "a version may have 64"),
        ("annotations", b'{"a": "' + b"x" * (1 << 20) + b'"}', 413, "annotations has more than 1048576 bytes"),
    ],
)
def test_wrong_parts_are_refused(client: httpx.Client, part: str, data: bytes, status: int, words: str) -> None:
    """The error says what is wrong with a part, and no version is made."""
    name = f"a{next(_names)}"
    assert words in problem(_publish(client, _parts(**{part: data}), name), status)["detail"]
    problem(client.get(f"/v1/tenants/{TENANT}/adapters/{name}"), 404)


def test_the_largest_are_accepted(client: httpx.Client) -> None:
    """The largest card and annotations are accepted as form fields and as JSON."""
    card, annotations = "é" * (128 << 10), {f"k{number}": "€" * 1365 for number in range(64)}
    parts = _parts(**{"README.md": card.encode(), "annotations": json.dumps(annotations).encode()})
    fresh = {"config": {**CONFIG, "inference_mode": False}, "card": card, "annotations": annotations}
    for answer in (_publish(client, parts), client.post(versions_path(TENANT, "largest"), json=fresh)):
        assert answer.status_code == 201, answer.text
        assert client.get(f"{answer.headers['location']}/card").text == card
        assert client.get(f"{answer.headers['location']}/annotations").json() == annotations


def test_versions_made_of_json_have_them_too(client: httpx.Client) -> None:
    """An untrained prefix and a composition can have a card and annotations."""
    described = {"card": CARD, "annotations": ANNOTATIONS}
    client.post(versions_path(TENANT, "json"), json={"config": CONFIG}).raise_for_status()
    compose = {"compose": [f"{TENANT}/json@1", f"{TENANT}/json@1"]}
    for body in ({"config": CONFIG, "seed": 7}, compose):
        answer = client.post(versions_path(TENANT, "json"), json=body | described)
        assert answer.status_code == 201, answer.text
        assert client.get(f"{answer.headers['location']}/card").text == CARD
        assert client.get(f"{answer.headers['location']}/annotations").json() == ANNOTATIONS


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        ({"card": "x" * (256 << 10) + "x"}, 413, "the card has 262145 characters"),
        ({"card": None}, 422, "card"),
        ({"annotations": {"a": ["x"]}}, 422, "annotation a must be text"),
        ({"annotations": {"a b": "x"}}, 422, "key has 1 to 63 characters"),
    ],
)
def test_wrong_json_is_refused(client: httpx.Client, wrong: dict[str, Any], status: int, words: str) -> None:
    """The error says what is wrong, as it does for a form."""
    answer = client.post(versions_path(TENANT, "wrong"), json={"config": CONFIG, **wrong})
    assert words in problem(answer, status)["detail"]


def test_they_are_replaced_whole(client: httpx.Client) -> None:
    """A PUT replaces them on the version of the reference, whose content stays."""
    path = _published(client)
    before = client.get(path).json()
    assert _put_card(client, path, "new").status_code == 204
    changed = client.put(f"{path}/annotations", json={"b": "2", "a": "1"})
    assert (changed.status_code, changed.content) == (204, b"")
    assert client.get(f"{path}/card").text == "new"
    annotations = client.get(f"{path}/annotations")
    assert annotations.content == b'{"a":"1","b":"2"}'
    assert annotations.headers["etag"] == changed.headers["etag"]
    assert client.get(path).json() == before
    assert _put_card(client, path.replace("@1", "@latest"), "").status_code == 204
    assert client.get(f"{path}/card").content == b""


def test_if_match(client: httpx.Client) -> None:
    """A change is made only if the part is as the caller saw it; each part has its own tag."""
    path = _published(client)
    tag = client.get(f"{path}/card").headers["etag"]
    new = _put_card(client, path, "1", **{"If-Match": tag}).headers["etag"]
    refused = problem(_put_card(client, path, "2", **{"If-Match": tag}), 412, "precondition-failed")
    assert "read it again" in refused["detail"]
    assert client.get(f"{path}/card").text == "1"
    assert _put_card(client, path, "3", **{"If-Match": f'"other", {new}'}).status_code == 204
    assert _put_card(client, path, "4", **{"If-Match": "*"}).status_code == 204
    problem(client.put(f"{path}/annotations", json={}, headers={"If-Match": new}), 412)
    tag = client.get(f"{path}/annotations").headers["etag"]
    assert client.put(f"{path}/annotations", json={}, headers={"If-Match": tag}).status_code == 204


@pytest.mark.parametrize(
    ("part", "request_", "status", "code"),
    [
        ("card", {"content": b"\xff", "headers": {"Content-Type": "text/markdown"}}, 422, "invalid-request"),
        ("card", {"content": b"x" * 262_145, "headers": {"Content-Type": "text/markdown"}}, 413, "too-large"),
        ("card", {"json": {"card": "x"}}, 415, "unsupported-media-type"),
        ("annotations", {"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "unsupported-media-type"),
        ("annotations", {"json": ["x"]}, 422, "invalid-request"),
        ("annotations", {"json": {"x": 1}}, 422, "invalid-request"),
    ],
)
def test_wrong_changes_are_refused(
    client: httpx.Client, part: str, request_: dict[str, Any], status: int, code: str
) -> None:
    """A refused change changes nothing."""
    path = _published(client)
    problem(client.put(f"{path}/{part}", **request_), status, code)
    assert client.get(f"{path}/card").text == CARD
    assert client.get(f"{path}/annotations").json() == ANNOTATIONS


def test_what_is_missing_and_unwanted(client: httpx.Client) -> None:
    """A missing version is a 404, and an `Accept` for something else a 406."""
    path = _published(client)
    for part in ("card", "annotations"):
        problem(client.get(f"/v1/tenants/{TENANT}/adapters/nothing/{part}"), 404)
        problem(client.get(f"{path.replace('@1', '@9')}/{part}"), 404)
        problem(client.get(f"{path}/{part}", headers={"Accept": "text/html"}), 406)
    problem(_put_card(client, path.replace("@1", "@9"), "x"), 404)


def test_scopes_and_tenants(server: Server) -> None:
    """`read` reads and `write` replaces; another tenant's versions are missing."""
    admin = server.client()
    path = _published(admin)
    admin.put("/v1/tenants/stranger").raise_for_status()

    def client_of(tenant: str, scope: str) -> httpx.Client:
        made = admin.post(f"/v1/tenants/{tenant}/keys", json={"scope": scope})
        return server.client(made.json()["key"])

    base_model = f"{path}/base-model"
    reader, writer, stranger = (
        client_of(tenant, scope) for tenant, scope in ((TENANT, "read"), (TENANT, "write"), ("stranger", "admin"))
    )
    assert reader.get(f"{path}/card").text == CARD
    problem(_put_card(reader, path, "x"), 403)
    problem(reader.put(f"{path}/annotations", json={}), 403)
    assert (reader.get(base_model).json(), reader.get(f"{path}/config").status_code) == ({}, 200)
    problem(reader.put(base_model, json={}), 403)
    assert writer.put(base_model, json=BASE_MODEL).status_code == 204
    for part in ("base-model", "config"):
        problem(stranger.get(f"{path}/{part}"), 404)
    problem(stranger.put(base_model, json={}), 404)
    assert _put_card(writer, path, CARD).status_code == 204
    problem(stranger.get(f"{path}/card"), 404)
    problem(_put_card(stranger, path, "x"), 404)


def test_a_base_model_is_given_later_and_replaced_whole(client: httpx.Client) -> None:
    """A base model is empty until it is set, and changes neither version nor prefix."""
    path = _published(client)
    version, prefix = client.get(path).json(), client.get(f"{path}/prefix")
    before = client.get(f"{path}/base-model")
    assert "prefix-base-model" not in client.get(f"{path}/prefix").headers
    assert (before.status_code, before.json(), before.headers["prefix-digest"]) == (200, {}, version["digest"])
    given = client.put(f"{path}/base-model", json=BASE_MODEL, headers={"If-Match": before.headers["etag"]})
    assert (given.status_code, given.content) == (204, b"")
    found = client.get(f"{path.replace('@1', '@latest')}/base-model")
    assert found.json() == BASE_MODEL
    assert found.headers["etag"] == given.headers["etag"]
    assert found.headers["x-content-type-options"] == "nosniff"
    prefix = client.get(f"{path}/prefix")
    unchanged = client.get(f"{path}/prefix", headers={"If-None-Match": prefix.headers["etag"]})
    assert (prefix.headers["prefix-base-model"], unchanged.headers["prefix-base-model"]) == ("known", "known")
    again = client.get(f"{path}/base-model", headers={"If-None-Match": found.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    stale = {"If-Match": before.headers["etag"]}
    refused = problem(client.put(f"{path}/base-model", json={}, headers=stale), 412, "precondition-failed")
    assert "the base-model of" in refused["detail"]
    client.put(f"{path}/base-model", json={"tokenizer": "sha256:1"}).raise_for_status()
    assert client.get(f"{path}/base-model").json() == {"tokenizer": "sha256:1"}
    unchanged = client.get(f"{path}/prefix")
    assert client.get(path).json() == {**version, "residency": client.get(path).json()["residency"]}
    assert (unchanged.content, unchanged.headers["etag"]) == (prefix.content, prefix.headers["etag"])
    assert client.get(f"{path}/card").text == CARD


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"json": {"model": "x"}}, 422, "a fingerprint has architecture, tokenizer, weights_index, sizes, rope, norms"),
        ({"json": {"sizes": 32}}, 422, "sizes must be a JSON object, got 32"),
        ({"json": {"tokenizer": None}}, 422, "tokenizer must be a text of 1 to 256 characters, got None"),
        ({"json": []}, 422, "JSON object"),
        ({"json": {"rope": {"x": "y" * (16 << 10)}}}, 413, "and may have 16384"),
        ({"content": b'{"rope": {"x": NaN}}', "headers": {"Content-Type": "application/json"}}, 422, "NaN"),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415, "application/json"),
    ],
    ids=str,
)
def test_a_wrong_base_model_is_refused(client: httpx.Client, request_: dict[str, Any], status: int, words: str) -> None:
    """The error says what is wrong, and the stored base model stays."""
    path = _published(client)
    client.put(f"{path}/base-model", json=BASE_MODEL).raise_for_status()
    assert words in problem(client.put(f"{path}/base-model", **request_), status)["detail"]
    assert client.get(f"{path}/base-model").json() == BASE_MODEL


def test_a_base_model_counts_and_is_audited(client: httpx.Client) -> None:
    """A base model counts by the bytes of its JSON without blanks, and its change is audited."""
    path = _published(client)
    used = client.get(f"/v1/tenants/{TENANT}").json()["bytes"]
    client.put(f"{path}/base-model", json={"tokenizer": "x"}).raise_for_status()
    assert client.get(f"/v1/tenants/{TENANT}").json()["bytes"] == used + len('{"tokenizer":"x"}')
    (latest,) = client.get(f"/v1/tenants/{TENANT}/audit?limit=1").json()["items"]
    assert (latest["action"], latest["key_name"]) == ("base-model.changed", "bootstrap")
    assert f"/{latest['target'].partition('/')[2]}" in path
    client.put(f"{path}/base-model", json={}).raise_for_status()
    assert client.get(f"/v1/tenants/{TENANT}").json()["bytes"] == used


def test_the_config_file_comes_back_byte_for_byte(client: httpx.Client) -> None:
    """The config file keeps its order, blanks and unusual numbers, as it was uploaded first."""
    name = f"a{next(_names)}"
    file = json.dumps(dict(reversed(CONFIG.items())), indent=7).replace(" ", "\t").encode() + b"\r\n"
    file = file.replace(b"{", b'{"unread": 1e400, "z": "\\u00e9", ', 1)
    first = _publish(client, _parts(**{"adapter_config.json": file}), name)
    path = first.headers["location"]
    again = _publish(client, _parts(**{"adapter_config.json": file + b" "}), name)
    assert (first.status_code, again.status_code) == (201, 200)
    for reference in (path, path.replace("@1", f"@{first.json()['digest']}")):
        found = client.get(f"{reference}/config")
        assert (found.status_code, found.content) == (200, file)
        assert found.headers["content-type"] == "application/json"
    assert client.get(f"{path}/config", headers={"If-None-Match": found.headers["etag"]}).status_code == 304


def test_a_config_that_was_no_file_is_written_as_peft_does(client: httpx.Client) -> None:
    """A version that was made of JSON has its config as PEFT would write it."""
    path = client.post(versions_path(TENANT, "fresh"), json={"config": CONFIG, "seed": 3}).headers["location"]
    found = client.get(f"{path}/config")
    assert found.content == json.dumps(client.get(path).json()["config"], indent=2, sort_keys=True).encode()
    problem(client.get(f"{path.replace('@1', '@9')}/config"), 404)
    problem(client.put(f"{path}/config", json=CONFIG), 405)


def test_they_count_towards_the_quota(server: Server) -> None:
    """Published and replaced parts count, and the error says how much is used."""
    admin = server.client()
    path = _published(admin)
    used = admin.get(f"/v1/tenants/{TENANT}").json()["bytes"]
    _put_card(admin, path, CARD + "12345").raise_for_status()
    assert admin.get(f"/v1/tenants/{TENANT}").json()["bytes"] == used + 5
    admin.put(f"/v1/tenants/{TENANT}", json={"max_bytes": used + 5}).raise_for_status()
    try:
        refused = problem(_put_card(admin, path, CARD + "123456"), 507, "quota-exceeded")
        assert f"has {used + 5} of {used + 5} bytes, and this card takes another 1" in refused["detail"]
    finally:
        admin.put(f"/v1/tenants/{TENANT}", json={}).raise_for_status()

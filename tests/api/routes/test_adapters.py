"""Adapters are managed over HTTP: listing, versions, deletion, aliases, residency."""

from typing import Any

import httpx
import pytest

from tests.api.helpers import CONFIG, problem, tensors_of, upload, versions_path, weights
from tests.conftest import Server

TENANT = "managing"
ADAPTERS = f"/v1/tenants/{TENANT}/adapters"
NAMES = [f"listed-{n:02}" for n in range(7)]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client, and publishes seven adapters, two of them for another base model."""
    client = server.client()
    for index, name in enumerate(reversed(NAMES)):
        config = {**CONFIG, "base_model_name_or_path": "org/other" if index < 2 else "org/base model"}
        assert upload(client, TENANT, name, config).status_code == 201
    return client


def _listed(client: httpx.Client, **query: Any) -> dict[str, Any]:
    answer = client.get(ADAPTERS, params=query)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


def _names(page: dict[str, Any]) -> list[str]:
    return [item["adapter"] for item in page["items"] if item["adapter"] in NAMES]


def test_listing_is_in_the_order_of_names(client: httpx.Client) -> None:
    """A listing is sorted by name; if it fits one page, there is no cursor."""
    answer = client.get(ADAPTERS)
    assert _names(answer.json()) == NAMES
    assert answer.json()["next"] is None
    assert "link" not in answer.headers
    item = answer.json()["items"][0]
    assert item["latest"]["version"] == 1
    assert (item["versions"], item["aliases"]) == (1, {})


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("follow", ["cursor", "link"])
def test_pages_make_the_whole(client: httpx.Client, limit: int, follow: str) -> None:
    """Following `next`, or the Link header, lists every adapter once, with the filter kept."""
    path, found = f"{ADAPTERS}?limit={limit}&base_model=org/base%20model", []
    while path:
        answer = client.get(path)
        page = answer.json()
        assert len(page["items"]) <= limit
        found += _names(page)
        assert (page["next"] is None) == ("link" not in answer.headers)
        if follow == "link":
            path = answer.links["next"]["url"] if page["next"] else ""
        else:
            path = f"{ADAPTERS}?limit={limit}&base_model=org/base%20model&cursor={page['next']}" if page["next"] else ""
    assert found == NAMES[:5]


def test_listing_by_base_model(client: httpx.Client) -> None:
    """The filter lists only adapters of that base model, and an empty page if there are none."""
    assert _names(_listed(client, base_model="org/other")) == NAMES[5:]
    assert _listed(client, base_model="org/none") == {"items": [], "next": None}


@pytest.mark.parametrize("cursor", ["x", "!", "", "%00", "AAAA", "w6k", "Li4", "bGlzdGVkLTAx=", "a" * 1000])
def test_bad_cursor(client: httpx.Client, cursor: str) -> None:
    """A cursor that no listing gave is a 422."""
    for path in (ADAPTERS, "/v1/tenants"):
        problem(client.get(f"{path}?cursor={cursor}"), 422, "invalid-request")


def test_listing_of_a_missing_tenant(client: httpx.Client) -> None:
    """A tenant without adapters has an empty page, and a missing tenant is a 404."""
    client.put("/v1/tenants/managing-empty")
    assert client.get("/v1/tenants/managing-empty/adapters").json() == {"items": [], "next": None}
    problem(client.get("/v1/tenants/managing-none/adapters"), 404, "not-found")


def test_versions(client: httpx.Client) -> None:
    """The listing has every version, newest first, with its aliases."""
    for seed in range(3):
        upload(client, TENANT, "versions", file=weights(seed))
    client.put(f"{ADAPTERS}/versions/aliases/prod", json={"version": 2})
    items = client.get(versions_path(TENANT, "versions")).json()["items"]
    assert [item["version"] for item in items] == [3, 2, 1]
    assert [item["aliases"] for item in items] == [[], ["prod"], []]
    assert client.get(f"{ADAPTERS}/versions").json()["version"] == 3
    problem(client.get(versions_path(TENANT, "none")), 404, "not-found")
    problem(client.get(versions_path(TENANT, "versions@1")), 422, "invalid-reference")


def test_deleting_a_version(client: httpx.Client) -> None:
    """A version is deleted by number or digest, is gone for every reader, and `latest` falls back."""
    versions = [upload(client, TENANT, "gone", file=weights(seed)).json() for seed in range(4)]
    tensors_of(client.get(f"{ADAPTERS}/gone@4/prefix"))
    assert client.delete(f"{ADAPTERS}/gone@4").status_code == 204
    assert client.delete(f"{ADAPTERS}/gone@{versions[0]['digest']}").status_code == 204
    for ref in ("gone@4", "gone@1", f"gone@{versions[3]['digest']}"):
        for rest in ("", "/prefix", "/parameters", "/residency"):
            problem(client.get(f"{ADAPTERS}/{ref}{rest}"), 404, "not-found")
    assert client.get(f"{ADAPTERS}/gone").json()["version"] == 3
    problem(client.delete(f"{ADAPTERS}/gone@4"), 404, "not-found")


def test_deleting_what_an_alias_points_at(client: httpx.Client) -> None:
    """Deleting a version is a 409 while an alias points at it, by digest too."""
    version = upload(client, TENANT, "held").json()
    alias = f"{ADAPTERS}/held/aliases/prod"
    client.put(alias, json={"version": 1})
    problem(client.delete(f"{ADAPTERS}/held@1"), 409, "conflict")
    problem(client.delete(f"{ADAPTERS}/held@{version['digest']}"), 409, "conflict")
    assert client.delete(alias).status_code == 204
    assert client.delete(f"{ADAPTERS}/held@1").status_code == 204
    problem(client.get(f"{ADAPTERS}/held"), 404, "not-found")


@pytest.mark.parametrize("selector", ["latest", "prod"])
def test_deleting_by_another_selector(client: httpx.Client, selector: str) -> None:
    """A moving selector cannot name the version to delete."""
    upload(client, TENANT, "selector")
    client.put(f"{ADAPTERS}/selector/aliases/prod", json={"version": 1})
    problem(client.delete(f"{ADAPTERS}/selector@{selector}"), 422, "invalid-request")
    assert client.get(f"{ADAPTERS}/selector").status_code == 200


def test_deleting_an_adapter(client: httpx.Client) -> None:
    """Deleting an adapter deletes its versions and aliases; a second time it is missing."""
    upload(client, TENANT, "whole")
    client.put(f"{ADAPTERS}/whole/aliases/prod", json={"version": 1})
    assert client.delete(f"{ADAPTERS}/whole").status_code == 204
    for path in ("whole", "whole@1/prefix", "whole@prod/prefix", "whole/versions", "whole/aliases/prod"):
        problem(client.get(f"{ADAPTERS}/{path}"), 404, "not-found")
    problem(client.delete(f"{ADAPTERS}/whole"), 404, "not-found")


def test_numbers_are_never_used_again(client: httpx.Client) -> None:
    """A number names one content for ever, even after its version or its adapter was deleted."""
    first = upload(client, TENANT, "numbers").json()
    upload(client, TENANT, "numbers", file=weights(1))
    client.delete(f"{ADAPTERS}/numbers@2")
    assert upload(client, TENANT, "numbers", file=weights(2)).json()["version"] == 3
    client.delete(f"{ADAPTERS}/numbers")
    again = upload(client, TENANT, "numbers")
    assert (again.status_code, again.json()["version"]) == (201, 4)
    assert again.json()["digest"] == first["digest"]
    problem(client.get(f"{ADAPTERS}/numbers@1"), 404, "not-found")


@pytest.fixture
def alias(client: httpx.Client) -> str:
    """Returns the path of an alias that does not exist, of an adapter with three versions."""
    client.delete(f"{ADAPTERS}/aliased")
    for seed in range(3):
        upload(client, TENANT, "aliased", file=weights(seed))
    return f"{ADAPTERS}/aliased/aliases/prod"


def _third_from_last(client: httpx.Client, back: int) -> int:
    newest: int = client.get(f"{ADAPTERS}/aliased").json()["version"]
    return newest - back


def test_alias_is_made_moved_and_forgotten(client: httpx.Client, alias: str) -> None:
    """PUT answers 201 for a new alias and 200 for a move, which readers see at once; its deletion keeps the version."""
    old, new = _third_from_last(client, 2), _third_from_last(client, 1)
    answer = client.put(alias, json={"version": old})
    assert (answer.status_code, answer.json()) == (201, {"alias": "prod", "version": old})
    assert client.get(alias).headers["etag"] == answer.headers["etag"]
    assert client.get(f"{ADAPTERS}/aliased@prod/prefix").headers["prefix-version"] == str(old)
    assert client.put(alias, json={"version": new}).status_code == 200
    assert client.get(f"{ADAPTERS}/aliased@prod/prefix").headers["prefix-version"] == str(new)
    assert client.get(alias).json() == {"alias": "prod", "version": new, "previous": old}
    assert client.delete(alias).status_code == 204
    problem(client.get(alias), 404, "not-found")
    problem(client.delete(alias), 404, "not-found")
    problem(client.get(f"{ADAPTERS}/aliased@prod/prefix"), 404, "not-found")
    assert client.get(f"{ADAPTERS}/aliased@{new}").status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_alias_with_if_match(client: httpx.Client, alias: str, method: str) -> None:
    """A move or deletion happens only if the alias is as the caller saw it, by strong comparison."""
    old, new = _third_from_last(client, 2), _third_from_last(client, 1)
    body = {"json": {"version": new}} if method == "PUT" else {}

    def attempt(tag: str) -> httpx.Response:
        return client.request(method, alias, headers={"If-Match": tag}, **body)  # type: ignore[arg-type]

    problem(attempt("*"), 412, "precondition-failed")
    etag = client.put(alias, json={"version": old}).headers["etag"]
    for tag in ('"x"', f"W/{etag}", etag.strip('"'), f'"{new}"'):
        problem(attempt(tag), 412, "precondition-failed")
    assert client.get(alias).json()["version"] == old
    assert attempt(f'"x", {etag}').status_code in (200, 204)


def test_alias_with_if_none_match(client: httpx.Client, alias: str) -> None:
    """`If-None-Match: *` makes an alias, and moves none."""
    body, headers = {"version": _third_from_last(client, 2)}, {"If-None-Match": "*"}
    assert client.put(alias, json=body, headers=headers).status_code == 201
    problem(client.put(alias, json=body, headers=headers), 412, "precondition-failed")


@pytest.mark.parametrize("name", ["7", "latest", "A", "a..b", "-a"])
def test_alias_names(client: httpx.Client, alias: str, name: str) -> None:
    """An alias is a name that is neither all digits nor `latest`."""
    problem(client.put(alias.replace("prod", name), json={"version": 1}), 422, "invalid-reference")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"version": 0},
        {"version": "1"},
        {"version": 1.5},
        {"version": True},
        {"version": 10**30},
        {"version": 1, "more": 1},
    ],
    ids=str,
)
def test_alias_bodies(client: httpx.Client, alias: str, body: dict[str, Any]) -> None:
    """The body is a version number, and has no unknown fields."""
    problem(client.put(alias, json=body), 422, "invalid-request")


def test_alias_of_a_missing_version(client: httpx.Client, alias: str) -> None:
    """An alias of a missing version or adapter is a 404, and is not made."""
    problem(client.put(alias, json={"version": 10**6}), 404, "not-found")
    problem(client.put(alias.replace("aliased", "none"), json={"version": 1}), 404, "not-found")
    problem(client.get(alias), 404, "not-found")


def test_alias_with_preload(client: httpx.Client, alias: str) -> None:
    """`preload` moves the alias once the version is resident."""
    version = _third_from_last(client, 0)
    residency = f"{ADAPTERS}/aliased@{version}/residency"
    assert client.get(residency).json()["resident"] is False
    assert client.put(alias, json={"version": version, "preload": True}).status_code == 201
    assert client.get(residency).json()["resident"] is True


def test_residency(server: Server, client: httpx.Client) -> None:
    """The service loads and waits, pins, reports and unloads; the prefix is served all the same."""
    upload(client, TENANT, "resident")
    path = f"{ADAPTERS}/resident/residency"
    process = client.get(path).json()["process"]
    assert process in server.pids()
    away = {"resident": False, "pinned": False, "device": "cpu", "process": process, "processes": 1}
    assert client.get(path).json() == away
    assert client.put(path).json() == {**away, "resident": True}
    assert client.put(path, json={"pinned": True}).json()["pinned"] is True
    assert client.get(f"{ADAPTERS}/resident").json()["residency"]["pinned"] is True
    assert client.delete(path).status_code == 204
    assert client.get(path).json() == away
    assert client.get(f"{ADAPTERS}/resident/prefix").status_code == 200
    assert client.get(path).json()["resident"] is True


def test_residency_bodies(client: httpx.Client) -> None:
    """A body without a media type, or with other content, is refused."""
    upload(client, TENANT, "resident")
    path = f"{ADAPTERS}/resident/residency"
    problem(client.put(path, content=b'{"pinned": true}'), 415, "unsupported-media-type")
    problem(client.put(path, json={"pinned": 2}), 422, "invalid-request")
    problem(client.put(path, json={"pin": True}), 422, "invalid-request")
    problem(client.put(f"{ADAPTERS}/none/residency"), 404, "not-found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (f"{ADAPTERS}/{NAMES[0]}", "GET, DELETE"),
        (f"{ADAPTERS}/{NAMES[0]}/prefix", "GET, HEAD, POST"),
        (f"{ADAPTERS}/{NAMES[0]}/versions", "GET, POST"),
        (f"{ADAPTERS}/{NAMES[0]}/aliases/prod", "GET, PUT, DELETE"),
        (f"{ADAPTERS}/{NAMES[0]}/residency", "GET, PUT, DELETE"),
        ("/v1/prefixes", "POST"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_allow_names_every_method_of_the_path(client: httpx.Client, path: str, allowed: str) -> None:
    """405 is a problem document, and its `Allow` holds the methods of all routes (RFC 9110, section 15.5.6)."""
    answer = client.patch(path)
    assert allowed in problem(answer, 405, "method-not-allowed")["detail"]
    assert answer.headers["allow"] == allowed

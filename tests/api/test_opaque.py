"""`service.api.opaque`, and whatever else a tenant sees: what others do is not told by numbers."""

import itertools
from typing import Any, Final

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.app import create_app
from service.api.opaque import OpaqueNumbers
from service.errors import InvalidRequest
from service.settings import Settings
from tests.api.helpers import upload, weights
from tests.conftest import Server

NUMBERS = OpaqueNumbers(b"s" * 32)
COUNTED: Final = st.integers(min_value=0, max_value=2**64 - 1)


@given(COUNTED)
def test_a_number_comes_back(number: int) -> None:
    """From a text that is the same each time, and another under another secret."""
    text = NUMBERS.text(number)
    assert NUMBERS.number(text) == number
    assert NUMBERS.text(number) == text
    assert OpaqueNumbers(b"t" * 32).text(number) != text


def test_neighbours_have_nothing_in_common() -> None:
    """Neither order nor distance is left: among a thousand texts no half is like another's."""
    texts = [NUMBERS.text(number) for number in range(1000)]
    assert texts != sorted(texts)
    for half in (slice(16), slice(16, 32)):
        assert len({text[half] for text in texts}) == 1000


@given(COUNTED, st.integers(min_value=0, max_value=127))
def test_a_text_that_was_altered_is_refused(number: int, bit: int) -> None:
    """Wherever that is; so is one that another secret made."""
    altered = f"{int(NUMBERS.text(number), 16) ^ (1 << bit):032x}"
    for text in (altered, OpaqueNumbers(b"t" * 32).text(number)):
        with pytest.raises(InvalidRequest):
            NUMBERS.number(text)


@given(st.text(max_size=40))
def test_what_is_no_text_of_it_is_refused(text: str) -> None:
    """In words."""
    with pytest.raises(InvalidRequest, match="is not one that a listing gave"):
        NUMBERS.number(text)


def _seen(client: httpx.Client, tenant: str) -> dict[str, Any]:
    """Every answer that a tenant's admin gets without a body, by path: JSON, status, and what headers count."""
    document = create_app(Settings()).openapi()["paths"]
    found = {}
    for template in sorted(path for path, methods in document.items() if "get" in methods):
        key = client.get(f"/v1/tenants/{tenant}/keys").json()["items"][0]["id"]
        path = template.format(tenant=tenant, name="a", ref="a", alias="prod", key_id=key, version="1")
        answer = client.get(path)
        kept = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
        is_json = answer.headers.get("content-type", "").endswith("json")
        found[template] = [answer.status_code, kept, answer.json() if is_json else answer.content]
    index = client.post("/v2/repository/index")
    return {**found, "index": index.json()}


def _work(client: httpx.Client, tenant: str, seeds: range) -> None:
    for seed in seeds:
        made = upload(client, tenant, "a", file=weights(seed))
        assert made.status_code == 201, made.text
        client.put(f"/v1/tenants/{tenant}/adapters/a/aliases/prod", json={"version": made.json()["version"]})


def _numbers(value: Any) -> list[Any]:
    """Every number in an answer, in order, with text that is one."""
    if isinstance(value, dict):
        return list(itertools.chain.from_iterable(_numbers(value[key]) for key in sorted(value)))
    if isinstance(value, list):
        return list(itertools.chain.from_iterable(map(_numbers, value)))
    return [int(value)] if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else []


def test_what_a_tenant_sees_does_not_depend_on_the_work_of_others(server: Server) -> None:
    """Each answer is the same before and after; and of two tenants that do the same, one alone and one beside another,
    all numbers are the same."""
    admin = server.client()
    seen = []
    for tenant, busy in (("opaque-alone", False), ("opaque-beside", True)):
        admin.put(f"/v1/tenants/{tenant}", json={"requests_per_second": 100_000})
        key = admin.post(f"/v1/tenants/{tenant}/keys", json={"scope": "admin"}).json()["key"]
        client = server.client(key)
        _work(client, tenant, range(1))
        _seen(client, tenant)  # the first answers load what they need
        if busy:
            before = _seen(client, tenant)
            _work(admin, "opaque-other", range(20, 25))
            _seen(server.client(admin.post("/v1/tenants/opaque-other/keys", json={"scope": "admin"}).json()["key"]),
                  "opaque-other")  # fmt: skip
            after = _seen(client, tenant)
            for found in (before, after):  # a rate's own numbers are of this tenant's requests
                for template in list(found):
                    if "stats" in template or template.endswith("health"):
                        del found[template]
            assert [one for one in before if before[one] != after[one]] == []
        else:
            _seen(client, tenant)
            _seen(client, tenant)
        _work(client, tenant, range(1, 2))
        seen.append(
            _numbers([client.get(f"/v1/tenants/{tenant}/{kind}").json() for kind in ("audit", "adapters/a/versions")])
        )
    assert seen[0] == seen[1]
    assert seen[0]

"""`api.http.opaque`: ids and revisions that tenants see reveal nothing of what others do."""

import re
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_service.api.app import create_app
from prefix_service.api.http.opaque import OpaqueNumbers
from prefix_service.errors import InvalidRequest
from prefix_service.settings import Settings
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
    """A text that was altered anywhere, or made with another secret, is refused."""
    altered = f"{int(NUMBERS.text(number), 16) ^ (1 << bit):032x}"
    for text in (altered, OpaqueNumbers(b"t" * 32).text(number)):
        with pytest.raises(InvalidRequest):
            NUMBERS.number(text)


@given(st.text(max_size=40))
def test_what_is_no_text_of_it_is_refused(text: str) -> None:
    """A text of another form is InvalidRequest."""
    with pytest.raises(InvalidRequest, match="is not a value from a listing"):
        NUMBERS.number(text)


def _seen(client: httpx.Client, tenant: str) -> dict[str, Any]:
    """All that a tenant's admin gets without a body, by path: status, headers and content."""
    document = create_app(Settings()).openapi()["paths"]
    key = client.get(f"/v1/tenants/{tenant}/keys").json()["items"][0]["id"]
    names = {"tenant": tenant, "name": "a", "ref": "a", "alias": "prod", "key_id": key, "version": "1"}
    found = {}
    for template in sorted(path for path, methods in document.items() if "get" in methods):
        answer = client.get(template.format(**names))
        left_out = ("date", "x-request-id", "content-length")
        headers = {name: value for name, value in answer.headers.items() if name not in left_out}
        if template.endswith(("/live", "/usage", "/timeline")):  # numbers of its own requests, which go on
            continue
        # Two texts of one revision differ by chance; its own reads and uses of its keys are noted in the background.
        text = re.sub('"revision":"[0-9a-f]{32}"|"used":[0-9]+|"last_used":("[^"]*"|null)', "", answer.text)
        found[template] = [answer.status_code, headers, text]
    found["index"] = [client.post("/v2/repository/index").text]
    return found


def _work(client: httpx.Client, tenant: str, *seeds: int) -> None:
    for seed in seeds:
        made = upload(client, tenant, "a", file=weights(seed))
        assert made.status_code == 201, made.text
        client.put(f"/v1/tenants/{tenant}/adapters/a/aliases/prod", json={"version": made.json()["version"]})


def _owner(server: Server, tenant: str) -> httpx.Client:
    """The admin of a new tenant."""
    admin = server.client()
    admin.put(f"/v1/tenants/{tenant}")
    return server.client(admin.post(f"/v1/tenants/{tenant}/keys", json={"scope": "admin"}).json()["key"])


@pytest.mark.one_process("what is in memory is each replica's own")
def test_no_answer_to_a_tenant_depends_on_the_work_of_others(server: Server) -> None:
    """Every GET, before and after another tenant published, moved aliases and read."""
    mine, other = _owner(server, "opaque-mine"), _owner(server, "opaque-other")
    _work(mine, "opaque-mine", 0)
    _seen(mine, "opaque-mine")  # the first answers load what they need
    before = _seen(mine, "opaque-mine")
    _work(other, "opaque-other", 1, 2, 3)
    _seen(other, "opaque-other")
    assert _seen(mine, "opaque-mine") == before


def test_the_numbers_of_a_tenant_do_not_depend_on_the_work_of_others(server: Server) -> None:
    """Of two tenants that do the same, one alone and one beside another, all numbers are the same."""
    seen = []
    for tenant, others in (("opaque-alone", ()), ("opaque-beside", (4, 5, 6))):
        client = _owner(server, tenant)
        _work(client, tenant, 0)
        _work(server.client(), "opaque-others", *others)
        _work(client, tenant, 1)
        pages = [client.get(f"/v1/tenants/{tenant}/{page}").json() for page in ("audit", "adapters/a/versions", "keys")]
        seen.append(list(_numbers(pages)))
    assert seen[0] == seen[1] != []


def _numbers(value: Any) -> Iterator[int]:
    """Every number in an answer, in order, and every text that is one."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
        yield int(value)

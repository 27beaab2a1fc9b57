"""The list of a tenant's 20,000 adapters in a browser: rows of a real catalog, compared with what the API lists."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from prefix_service.data_folder.opening import catalog_file
from tests.api.helpers import upload
from tests.api.page.conftest import Seen
from tests.benchmarks.growth.folder import BIG, fill, name_of
from tests.conftest import Server, running_server

pytestmark = pytest.mark.one_process("it fills a data folder")

MANY = 20_000
MODELS = 100
SEEN = """() => {
    window.seenRows = new Map();
    window.mostRows = 0;
    window.scrolls = setInterval(() => {
        const box = document.querySelector(".scroll");
        const rows = [...box.querySelectorAll("[role=row]")];
        window.mostRows = Math.max(window.mostRows, rows.length);
        for (const row of rows) window.seenRows.set(Number(row.ariaRowIndex), row.querySelector("a").textContent);
        box.scrollBy(0, 1e6);
    }, 10);
}"""
"""Scrolls to the end, again and again as more rows come, and notes the rows that were in the page, by their number."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service whose catalog has 20,001 adapters of one tenant: of 100 base models, with different bytes, and
    published at different moments."""
    data = tmp_path_factory.mktemp("many") / "data"
    with running_server(data) as running:
        assert upload(running.client(), BIG, "first").status_code == 201
    fill(data, MANY)
    with closing(sqlite3.connect(catalog_file(data))) as catalog, catalog:
        catalog.execute("UPDATE adapters SET bytes = bytes + (id * 7919) % 20011, used = id % 211")
        moments = "datetime(created, '-' || ((adapter_id * 7919) % 20011) || ' minutes')"
        named = f"'model/' || (adapter_id % {MODELS})"
        catalog.execute(f"UPDATE versions SET created = {moments}, base_model = {named}")  # noqa: S608
    with running_server(data) as running:
        yield running


def listed(client: httpx.Client, most: int = 10 * MANY, **parameters: str) -> list[str]:
    """Returns the names of adapters as the API lists them, at most so many."""
    found: list[str] = []
    cursor: dict[str, str] = {}
    while len(found) < most:
        asked: dict[str, Any] = {"limit": min(1000, most - len(found)), **parameters, **cursor}
        page = client.get(f"/v1/tenants/{BIG}/adapters", params=asked).json()
        found += [item["adapter"] for item in page["items"]]
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}
    return found


def shown(page: Page) -> list[str]:
    """Returns the names in the page's rows, from the first one on."""
    found: list[str] = page.locator(".scroll [role=row] a").all_inner_texts()
    return found


def scrolled(page: Page, count: int) -> dict[int, str]:
    """Scrolls until so many rows are loaded; returns the name of each row that was in the page, by its place."""
    page.evaluate(SEEN)
    expect(page.get_by_text(f"{count:,} shown")).to_be_visible(timeout=120_000)
    last = page.locator(f".scroll [role=row][aria-rowindex='{count + 1}']")
    expect(last).to_be_visible()
    page.evaluate("clearInterval(window.scrolls)")
    assert page.evaluate("window.mostRows") < 80
    rows: list[tuple[int, str]] = page.evaluate("[...window.seenRows]")
    return {number - 2: name for number, name in rows} | {count - 1: last.get_by_role("link").inner_text()}


def test_twenty_thousand_adapters(service: Server, admin_page: Seen) -> None:
    """Pages come as the end comes near, only rows in sight are in the page, and each row is what the API lists at its
    place."""
    page, names = admin_page.page, listed(service.client())
    assert len(names) == MANY + 1
    admin_page.open(f"adapters/{BIG}", f"Adapters of {BIG}")
    expect(page.get_by_text(f"{MANY + 1:,} adapters, ")).to_be_visible()
    page.get_by_text(name_of(0)).wait_for()
    found = scrolled(page, len(names))
    assert found == {place: names[place] for place in found}
    assert len(found) > MANY / 20
    assert max(found) - min(found) == MANY


def test_search_sort_and_filter_of_many(service: Server, admin_page: Seen) -> None:
    """What is found, and in which order, is what the API finds."""
    page, client = admin_page.page, service.client()
    admin_page.open(f"adapters/{BIG}", f"Adapters of {BIG}")
    search, model, sort = (page.get_by_label(name) for name in ("Search by name", "Base model", "Sort by"))
    for label, order in (("most read", "-used"), ("bytes", "-bytes"), ("latest publication", "-created")):
        sort.select_option(label)
        first = listed(client, 12, sort=order)
        expect(page.locator(".scroll [role=row] a").first).to_have_text(first[0])
        assert shown(page)[:12] == first
    search.fill("0123")
    names = listed(client, search="0123", sort="-created")
    expect(page.get_by_text(f"{len(names)} shown")).to_be_visible()
    found = scrolled(page, len(names))
    assert found == {place: names[place] for place in found}
    search.fill("")
    model.fill("model/7")
    names = listed(client, base_model="model/7", sort="-created")
    expect(page.get_by_text(f"{len(names)} shown")).to_be_visible()
    found = scrolled(page, len(names))
    assert found == {place: names[place] for place in found}
    search.fill("no-such")
    expect(page.get_by_text("No adapter matches.")).to_be_visible()
    search.fill(name_of(7_007)[2:])
    model.fill("")
    expect(page.get_by_text(re.compile("^1 shown$"))).to_be_visible()
    assert shown(page) == [name_of(7_007)]

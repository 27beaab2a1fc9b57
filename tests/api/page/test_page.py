"""The page in a browser: every view and flow."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect
from safetensors.torch import save

from prefix_service.catalog.schema import usage, versions
from prefix_service.prefix.kv import PrefixKV
from tests.api.helpers import CONFIG, count_reads, upload, weights
from tests.api.page.conftest import HOSTILE, Seen, publish
from tests.conftest import Server
from tests.processes import eventually

VIEWS = {
    "now": "Now",
    "adapters/acme": "Adapters of acme",
    "adapters/acme/summarize": "acme/summarize",
    "residency": "Memory",
    "tenants": "Tenants and keys",
    "tenants/acme": "acme",
    "tenants/@platform": "Keys of the platform",
    "usage": "Usage",
    "audit": "Audit",
    "console": "Console",
}
OVERVIEW = re.compile(r"/v1/residency\?")


def test_signing_in_and_out(service: Server, seen: Seen) -> None:
    """A wrong key is refused in words; a right one is kept nowhere in the browser, and signing out ends it."""
    page = seen.page
    page.goto(f"{service.url}/")
    assert page.url == f"{service.url}/ui"
    page.get_by_label("Key", exact=True).fill("pfx_wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("malformed")
    seen.expect_refusal(401)
    page.get_by_label("Key", exact=True).fill(service.admin_key)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Now")
    kept = page.evaluate("[...Object.values(localStorage), ...Object.values(sessionStorage), document.cookie].join()")
    assert kept == ""
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("Now")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Key", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_label("Key", exact=True)).to_be_visible()


def test_a_key_that_is_revoked_is_signed_out(service: Server, seen: Seen) -> None:
    """The live stream ends, and the page asks for a key again."""
    made = service.client().post("/v1/keys", json={"scope": "read"}).json()
    seen.sign_in(made["key"])
    assert service.client().delete(f"/v1/keys/{made['id']}").status_code == 204
    expect(seen.page.get_by_label("Key", exact=True)).to_be_visible()
    expect(seen.page.get_by_role("status").filter(has_text="Your session has ended")).to_be_visible()
    seen.expect_refusal(401)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_every_view(admin_page: Seen, scheme: str, width: int) -> None:
    """Each has its heading, shows no failure, fits into the window, and axe finds nothing serious in it."""
    page = admin_page.page
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 900})
    for view, title in VIEWS.items():
        admin_page.open(view, title)
        page.wait_for_load_state("networkidle") if view != "now" else page.get_by_text(
            "requests a second", exact=True
        ).wait_for()
        expect(page.get_by_role("alert")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        found = Axe().run(page).response["violations"]
        assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == [], view


def test_a_reader_sees_what_it_may(service: Server, seen: Seen) -> None:
    """A tenant's reader has its tenant's numbers and adapters, and no buttons that would be refused."""
    made = service.client().post("/v1/tenants/acme/keys", json={"scope": "read"}).json()
    seen.sign_in(made["key"])
    expect(seen.page.get_by_role("navigation").get_by_role("link")).to_have_text(["Now", "Adapters", "Console"])
    seen.page.get_by_text("requests a second", exact=True).wait_for()
    seen.open("adapters", "Adapters of acme")
    expect(seen.page.get_by_text("Drop an adapter's folder")).to_have_count(0)
    seen.open("adapters/acme/summarize", "acme/summarize")
    expect(seen.page.get_by_role("button", name=re.compile("Pin|Delete|move|New alias"))).to_have_count(0)


@pytest.mark.one_process("each replica counts its own requests")
def test_now_is_live(service: Server, admin_page: Seen) -> None:
    """The view shows requests that come after it was opened, and explains refusals."""
    page = admin_page.page
    page.get_by_text("requests a second", exact=True).wait_for()
    assert service.client().get("/v1/tenants/acme/adapters/now-missing").status_code == 404
    row = page.get_by_role("row").filter(has_text="not-found")
    expect(row).to_contain_text("belongs to another tenant")
    expect(page.locator(".u-wrap")).to_have_count(4)


@pytest.mark.one_process("what is in memory is each replica's own")
def test_upload_and_residency(admin_page: Seen, adapter_folder: Path) -> None:
    """A folder is published, with the line for the worker; it is found, pinned, seen in memory, and unloaded."""
    page = admin_page.page
    admin_page.open("adapters/acme", "Adapters of acme")
    page.get_by_label("Files of an adapter").set_input_files(list(adapter_folder.iterdir()))
    page.get_by_label("Name of the adapter").fill("dropped")
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("status").filter(has_text="Published")).to_contain_text("acme/dropped@1")
    expect(page.get_by_text('client.get("acme/dropped@1"')).to_be_visible()
    page.get_by_label("Search by name").fill("dropp")
    page.get_by_role("row").filter(has_text="dropped").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("acme/dropped")
    expect(page.get_by_label("The model card")).to_have_text("# Dropped")
    page.get_by_role("button", name="Pin", exact=True).click()
    expect(page.get_by_text("in memory on cpu, pinned")).to_be_visible()
    admin_page.open("residency", "Memory")
    page.get_by_role("button", name="acme/dropped@1").click()
    chosen = page.get_by_role("region", name="The chosen version")
    chosen.get_by_role("button", name="Unpin").click()
    chosen.get_by_role("button", name="Pin", exact=True).wait_for()
    chosen.get_by_role("button", name="Unload").click()
    expect(page.get_by_role("button", name="acme/dropped@1")).to_have_count(0)


def test_evictions_are_explained(admin_page: Seen) -> None:
    """The view shows which version was evicted, for whom, and explains the reason."""
    reasons = {
        "probation": "beta needed room, and it was new and hardly used",
        "idle": "beta needed room, and it had not been used lately",
        "memory": "the machine had no memory left",
    }
    common = {"at": "2027-01-31T12:00:00Z", "tier": "device", "tenant": "acme", "adapter": "gone", "nbytes": 2048}
    evicted = [
        {**common, "version": number, "uses": 3, "for_tenant": "beta", "reason": reason}
        for number, reason in enumerate(reasons, 1)
    ]
    page = admin_page.page

    def answer(route: Route) -> None:
        found = route.fetch()
        route.fulfill(response=found, json={**found.json(), "evicted": evicted})

    page.route(OVERVIEW, answer)
    admin_page.open("residency", "Memory")
    table = page.get_by_role("group", name="Evicted lately")
    for number, words in enumerate(reasons.values(), 1):
        expect(table.get_by_role("row").filter(has_text=f"acme/gone@{number}")).to_contain_text(words)


def _pixels(page: Page, title: str) -> str:
    """What a treemap shows."""
    found: str = page.get_by_role("application", name=re.compile(f"^{title} by tenant")).evaluate(
        "(canvas) => canvas.toDataURL()"
    )
    return found


@pytest.mark.one_process("what is in memory is each replica's own")
def test_memory_by_tenant_adapter_and_form(service: Server, admin_page: Seen) -> None:
    """A map of each budget down to forms: each box is read by pointer, hatched if it is pinned, and chosen to pin its
    version; what the service advises is there, with the versions that it names."""
    client, page = service.client(), admin_page.page
    client.put("/v1/tenants/acme/adapters/summarize@2/residency", json={"pinned": True})
    reader = client.post("/v1/tenants/acme/keys", json={"scope": "read", "name": "reader"}).json()
    for dtype in ("float32", "float16"):
        answer = service.client(reader["key"]).get(
            "/v1/tenants/acme/adapters/summarize@2/prefix", params={"dtype": dtype}
        )
        assert answer.status_code == 200
    # The service counts reads later: what it has not counted yet would be there again once it was deleted.
    counted = sa.select(sa.func.sum(usage.c.requests)).where(usage.c.key_id == reader["id"])
    eventually(lambda: _scalar(service, counted) == 2)
    with service.writing() as catalog:
        old = datetime.fromisoformat("2020-01-01")
        catalog.execute(sa.update(versions).where(versions.c.number == 2).values(created=old))
        catalog.execute(sa.delete(usage).where(usage.c.version == 2))

    def only_pinned(route: Route) -> None:
        found = route.fetch()
        resident = [one for one in found.json()["resident"] if one["pinned"]]
        route.fulfill(response=found, json={**found.json(), "resident": resident})

    page.route(OVERVIEW, only_pinned)
    admin_page.open("residency", "Memory")
    advice = page.get_by_text("1 pinned version unread for 7 days holds ")
    advice.get_by_role("button", name="acme/summarize@2").click()
    chosen = page.get_by_role("region", name="The chosen version")
    forms = chosen.get_by_role("group", name="Its renderings").get_by_role("row")
    # Both have a few hundred bytes, and count for the least that a rendering counts for.
    expect(forms.nth(1)).to_contain_text("float16, layers 0:2, heads 0:216.0 KiB")
    expect(forms.nth(2)).to_contain_text("float32, layers 0:2, heads 0:216.0 KiB")
    hosts, device = (
        page.get_by_role("application", name=re.compile(f"^{tier} memory.* by tenant")) for tier in ("Host", "Device")
    )
    hosts.hover(position={"x": 30, "y": 30})
    expect(page.get_by_text("acme/summarize@2: float16, layers 0:2, heads 0:2, 16.0 KiB", exact=True)).to_be_visible()
    box = hosts.bounding_box()
    assert box is not None
    hosts.hover(position={"x": box["width"] - 8, "y": box["height"] - 8})
    expect(page.get_by_text("acme/summarize@2: float32, layers 0:2, heads 0:2, 16.0 KiB", exact=True)).to_be_visible()
    device.hover(position={"x": 30, "y": 30})
    expect(page.get_by_text(re.compile("^acme/summarize@2, 16[.]0 KiB, pinned$"))).to_be_visible()
    hatched = _pixels(page, "Device memory")
    page.unroute(OVERVIEW)
    page.route(OVERVIEW, lambda route: route.fulfill(json=_unpinned(route.fetch().json())))
    page.get_by_role("button", name="Refresh").click()
    expect(chosen.get_by_role("button", name="Pin", exact=True)).to_be_visible()
    eventually(lambda: _pixels(page, "Device memory") != hatched)
    client.delete("/v1/tenants/acme/adapters/summarize@2/residency")


def _scalar(service: Server, query: sa.Select[Any]) -> Any:
    with service.writing() as catalog:
        return catalog.scalar(query)


def _overview(overview: dict[str, Any]) -> dict[str, Any]:
    """The same overview, with three versions of 400, 200 and 200 bytes on the device, and nothing in host memory."""
    like = {"tenant": "acme", "adapter": "boxes", "host_bytes": 0, "renderings": 0, "largest_renderings": []}
    like |= {"uses": 1, "readers": 0, "pinned": False, "reason": "kept"}
    sizes = {1: 400, 2: 200, 3: 200}
    resident = [{**like, "version": number, "device_bytes": size} for number, size in sizes.items()]
    return {**overview, "resident": resident, "next": None}


def test_the_map_of_memory_by_keyboard(admin_page: Seen) -> None:
    """Arrow keys lead to the box beside, Page Down and Page Up through all boxes; a live region reads each of them, and
    Enter chooses its version."""
    page = admin_page.page
    page.route(OVERVIEW, lambda route: route.fulfill(json=_overview(route.fetch().json())))
    admin_page.open("residency", "Memory")
    card = page.locator("section").filter(has=page.get_by_role("heading", name="Device memory"))
    treemap, words = (
        card.get_by_role("application", name=re.compile("3 boxes. The arrow keys")),
        card.get_by_role("status"),
    )
    expect(words).to_contain_text("press the arrow keys")
    treemap.focus()
    expect(words).to_have_text("acme/boxes@1, 400 B")  # on the left, as high as both others
    steps = [("ArrowUp", 1), ("ArrowRight", 2), ("ArrowDown", 3), ("ArrowUp", 2), ("ArrowLeft", 1), ("ArrowLeft", 1)]
    steps += [("PageDown", 2), ("PageDown", 3), ("PageDown", 3), ("PageUp", 2), ("Home", 1), ("End", 3)]
    for key, version in steps:
        page.keyboard.press(key)
        expect(words).to_have_text(f"acme/boxes@{version}, {400 if version == 1 else 200} B")
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="The chosen version")).to_contain_text("acme/boxes@3")
    expect(treemap).to_be_focused()
    expect(words).to_have_text("acme/boxes@3, 200 B")
    page.keyboard.press("Tab")
    expect(treemap).not_to_be_focused()


def _unpinned(overview: dict[str, Any]) -> dict[str, Any]:
    """The same overview, if nothing were pinned, and its pinned versions were all that is in memory."""
    return {**overview, "resident": [{**one, "pinned": False} for one in overview["resident"] if one["pinned"]]}


def test_a_folder_is_dropped(admin_page: Seen) -> None:
    """Files that are dragged onto the page are read as those that are chosen."""
    page = admin_page.page
    admin_page.open("adapters/acme", "Adapters of acme")
    transfer = page.evaluate_handle(
        """() => {
            const dropped = new DataTransfer();
            for (const name of ["adapter_config.json", "adapter_model.safetensors"]) {
                dropped.items.add(new File(["{}"], name));
            }
            return dropped;
        }"""
    )
    page.locator(".drop").dispatch_event("drop", {"dataTransfer": transfer})
    expect(page.get_by_text("2 files, 4 B")).to_be_visible()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, "is a pickle"),
        ({"adapter_model.safetensors": b"x"}, "adapter_config.json is missing"),
    ],
)
def test_files_that_cannot_be_sent(admin_page: Seen, tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    """The page says what is wrong, and asks the service nothing."""
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    admin_page.open("adapters/acme", "Adapters of acme")
    admin_page.page.get_by_label("Files of an adapter").set_input_files([tmp_path / name for name in files])
    expect(admin_page.page.get_by_role("alert")).to_contain_text(words)
    expect(admin_page.page.get_by_role("button", name="Publish")).to_have_count(0)


def test_an_upload_that_the_service_refuses(admin_page: Seen, adapter_folder: Path) -> None:
    """The service's findings are shown in its words."""
    (adapter_folder / "adapter_model.safetensors").write_bytes(b"not safetensors at all")
    admin_page.open("adapters/acme", "Adapters of acme")
    page = admin_page.page
    page.get_by_label("Files of an adapter").set_input_files(list(adapter_folder.iterdir()))
    page.get_by_label("Name of the adapter").fill("bad")
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("alert")).to_contain_text("safetensors")
    admin_page.expect_refusal(422)


def test_a_quota_that_is_reached(service: Server, admin_page: Seen, adapter_folder: Path) -> None:
    """Quotas are set in a dialog, shown as bars, and an upload beyond them is refused in words."""
    page = admin_page.page
    service.client().put("/v1/tenants/small")
    admin_page.open("tenants/small", "small")
    page.get_by_role("button", name="Change quotas").click()
    page.get_by_label("Adapters", exact=True).fill("0")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("0 of 0")).to_be_visible()
    admin_page.open("adapters/small", "Adapters of small")
    page.get_by_label("Files of an adapter").set_input_files(list(adapter_folder.iterdir()))
    page.get_by_label("Name of the adapter").fill("one")
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("alert")).to_contain_text("adapters")
    admin_page.expect_refusal(507)


def _count_reads(service: Server, adapter: str, version: int, *keys: str) -> None:
    """Has the catalog count a read of a version in this hour by each key."""
    count_reads(service, datetime.now(UTC), "acme", adapter, version, *keys)


def test_an_alias_is_moved_and_rolled_back(service: Server, admin_page: Seen) -> None:
    """The dialog shows what changes, and who reads the old version and not yet the new one, before and after; then the
    first button is the way back, to where the service says that the alias was."""
    client, page, alias = service.client(), admin_page.page, "/v1/tenants/acme/adapters/rolled/aliases/prod"
    for seed in range(3):
        publish(client, "rolled", {**CONFIG, "revision": f"r{seed}"}, seed, "", {})
    client.put(alias, json={"version": 1})
    fleet = client.post("/v1/tenants/acme/keys", json={"scope": "read", "name": "the fleet"}).json()
    _count_reads(service, "rolled", 1, "a", "b", fleet["id"])
    _count_reads(service, "rolled", 3, fleet["id"])
    page.clock.install()
    admin_page.open("adapters/acme/rolled@3", "acme/rolled")
    expect(page.get_by_text("read in the hour that begins here, and in no other")).to_be_visible()
    page.get_by_role("button", name="Move alias prod").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("row").filter(has_text="revision")).to_contain_text('"r0""r2"')
    expect(dialog.get_by_role("status")).to_contain_text("2 keys have read version 1 in the last hour")
    expect(dialog.get_by_role("status")).to_contain_text("and not yet version 3.")
    found = Axe().run(page).response["violations"]
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
    dialog.get_by_role("button", name="Move it").click()
    expect(dialog.get_by_role("heading")).to_have_text("prod points at 3 now")
    assert client.get(alias).json()["version"] == 3
    expect(dialog.get_by_role("status")).to_contain_text("2 keys have read version 1")
    _count_reads(service, "rolled", 3, "a")
    page.clock.fast_forward(10_000)
    expect(dialog.get_by_role("status")).to_contain_text("1 key has read version 1")
    expect(dialog.get_by_role("button").first).to_have_text("Roll back")
    dialog.get_by_role("button", name="Roll back").click()
    expect(page.get_by_text("prod points at 1 again")).to_be_visible()
    expect(dialog).to_have_count(0)
    assert client.get(alias).json() == {"alias": "prod", "version": 1, "previous": 3}
    readers = page.get_by_role("group", name="Who reads it").get_by_role("row")
    expect(readers.filter(has_text="the fleet")).to_contain_text("the fleet" + fleet["id"] + "2")
    expect(readers).to_have_count(4)


def test_a_rollback_that_is_too_late(service: Server, admin_page: Seen) -> None:
    """A new alias is deleted again. Whoever moved an alias meanwhile is not overruled: the page says where it is."""
    page, alias = admin_page.page, "/v1/tenants/acme/adapters/summarize/aliases/next"
    dialog = page.get_by_role("dialog")
    admin_page.open("adapters/acme/summarize@3", "acme/summarize")
    page.get_by_role("button", name="New alias").click()
    dialog.get_by_label("Name").fill("next")
    dialog.get_by_role("button", name="Make it").click()
    expect(dialog.get_by_role("heading")).to_have_text("next points at 3 now")
    dialog.get_by_role("button", name="Roll back").click()
    expect(page.get_by_text("next is deleted again")).to_be_visible()
    assert service.client().put(alias, json={"version": 1}).status_code == 201
    page.reload()
    page.get_by_role("button", name="Move alias next").click()
    dialog.get_by_role("button", name="Move it").click()
    expect(dialog.get_by_role("heading")).to_have_text("next points at 3 now")
    service.client().put(alias, json={"version": 2})
    dialog.get_by_role("button", name="Roll back").click()
    expect(dialog.get_by_role("alert")).to_contain_text("points at 2")
    assert service.client().get(alias).json()["version"] == 2
    admin_page.expect_refusal(412)
    service.client().delete(alias)


def test_two_versions_are_compared(admin_page: Seen) -> None:
    """Only what differs between the configs is shown; the timeline of a version has its publication and its reads."""
    page = admin_page.page
    admin_page.open("adapters/acme/summarize@1", "acme/summarize")
    page.get_by_label("Compare with version").select_option("2")
    rows = page.get_by_role("row").filter(has=page.get_by_role("cell", name="revision", exact=True))
    expect(rows).to_contain_text('"r1""r0"')
    expect(page.get_by_role("row").filter(has_text="peft_type")).to_have_count(0)
    timeline = page.get_by_role("list").filter(has_text="published")
    expect(timeline).to_contain_text("alias prod was moved to this version by the platform (bootstrap)")
    expect(timeline.get_by_role("link").first).to_have_attribute("href", re.compile("^#/audit/[0-9a-f]{32}$"))


def _publish_sinks(client: httpx.Client) -> None:
    """Publishes two versions of two layers, two heads and 40 tokens. Token 7 of the first is sink-like in layer 1; the
    second has opposite values in head 0 of layer 0."""
    kv = torch.randn(2, 2, 2, 40, 4, generator=torch.Generator().manual_seed(0))
    kv[1, 0, :, 7] *= 100
    kv[1, 1, :, 7] = 0
    for _ in range(2):
        file = save({"prompt_embeddings": PrefixKV.whole(kv).flat().contiguous()})
        assert upload(client, "acme", "sinks", {**CONFIG, "num_virtual_tokens": 40}, file).status_code == 201
        kv[0, 1, 0] *= -1


def test_heat_maps(service: Server, admin_page: Seen) -> None:
    """Norms by layer and head and along virtual tokens, with sink-like tokens marked, and the differences of two
    versions: by pointer, by keyboard and as a table."""
    _publish_sinks(service.client())
    page = admin_page.page
    admin_page.open("adapters/acme/sinks@1", "acme/sinks")
    card = page.locator("section").filter(has=page.get_by_role("heading", name="Keys and values"))
    expect(card.get_by_text("Sink-like virtual tokens (dots): 7 in 1 layer.")).to_be_visible()
    figure = card.get_by_role("figure").filter(has_text="Norm of keys by layer and virtual token")
    found, norms = figure.locator("output"), service.client().get("/v1/tenants/acme/adapters/sinks@1/statistics").json()
    canvas = figure.locator("canvas")
    canvas.focus()
    expect(found).to_contain_text("layer 0, token 0: ")
    page.keyboard.press("ArrowDown")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    value = f"{norms['keys']['by_token'][1][7]:.4g}"
    expect(found).to_have_text(f"layer 1, token 7: {value}, sink-like")
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    expect(found).to_contain_text("layer 1, token 39: ")
    box = canvas.bounding_box()
    assert box is not None
    canvas.hover(position={"x": box["width"] * 7.5 / 40, "y": box["height"] * 0.75})
    expect(found).to_have_text(f"layer 1, token 7: {value}, sink-like")
    figure.get_by_text("As a table").click()
    expect(figure.get_by_role("row").filter(has_text="layer 1").get_by_role("cell").nth(7)).to_have_text(f"{value} •")
    page.get_by_label("Compare with version").select_option("2")
    for title, cells in (
        ("Cosine similarity of values", ["-1", "1"]),
        ("Relative distance of values", ["2", "0"]),
    ):
        figure = page.get_by_role("figure").filter(has_text=title)
        figure.get_by_text("As a table").click()
        expect(figure.get_by_role("row").filter(has_text="layer 0").get_by_role("cell")).to_have_text(cells)
    expect(page.get_by_text("only the weights can differ")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        violations = Axe().run(page).response["violations"]
        assert [one["id"] for one in violations if one["impact"] in ("serious", "critical")] == []


def test_versions_of_two_shapes_are_not_compared(service: Server, admin_page: Seen) -> None:
    """The configs are, and the page says why there are no heat maps."""
    longer = save({"prompt_embeddings": torch.ones(4, 32)})
    for config, file in ((CONFIG, weights(1)), ({**CONFIG, "num_virtual_tokens": 4}, longer)):
        assert upload(service.client(), "acme", "shapes", config, file).status_code == 201
    admin_page.open("adapters/acme/shapes@2", "acme/shapes")
    admin_page.page.get_by_label("Compare with version").select_option("1")
    expect(admin_page.page.get_by_role("row").filter(has_text="num_virtual_tokens")).to_contain_text("34")
    expect(
        admin_page.page.get_by_text("of different shapes are not compared: 2 layers of 2 heads, 3 tokens")
    ).to_be_visible()
    expect(admin_page.page.get_by_role("alert")).to_have_count(0)
    admin_page.expect_refusal(422)


def test_an_alias_that_somebody_else_moved(service: Server, admin_page: Seen) -> None:
    """The move is refused: it would undo what the page has not shown."""
    page = admin_page.page
    path = "/v1/tenants/acme/adapters/summarize/aliases/canary"
    service.client().put(path, json={"version": 1})
    admin_page.open("adapters/acme/summarize@3", "acme/summarize")
    page.get_by_role("button", name="Move alias canary").click()
    service.client().put(path, json={"version": 2})
    page.get_by_role("button", name="Move it").click()
    expect(page.get_by_role("alert")).to_contain_text("points at 2")
    admin_page.expect_refusal(412)


def test_keys_are_made_rotated_and_revoked(service: Server, admin_page: Seen) -> None:
    """A key is shown once; its successor too; and what is revoked is gone."""
    page = admin_page.page
    admin_page.open("tenants/acme", "acme")
    page.get_by_role("button", name="New key").click()
    page.get_by_label("What it is for").fill("workers")
    page.get_by_role("button", name="Make it").click()
    first = page.locator("pre.secret").inner_text()
    assert service.client(first).get("/v1/whoami").json()["name"] == "workers"
    page.get_by_role("button", name="I have it").click()
    expect(page.locator("pre.secret")).to_have_count(0)
    assert first not in page.content()
    row = page.get_by_role("row").filter(has_text="workers")
    row.get_by_role("button", name="Rotate").click()
    page.get_by_role("dialog").get_by_role("button", name="Rotate").click()
    second = page.locator("pre.secret").inner_text()
    assert second != first
    page.get_by_role("button", name="I have it").click()
    expect(row).to_have_count(2)
    assert service.client(first).get("/v1/whoami").json()["expires"] is not None
    old = row.filter(has_text=first.split("_")[1])
    old.get_by_role("button", name="Revoke").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row).to_have_count(1)
    assert service.client(first).get("/v1/whoami").status_code == 401
    assert service.client(second).get("/v1/whoami").status_code == 200


def _require_text(page: Page) -> None:
    """Nothing of what others wrote has become markup, a script or an address, turns text, or makes the page wide."""
    assert page.evaluate("document.querySelectorAll('main script, main svg, main img, main iframe').length") == 0
    assert page.evaluate("[...document.links].filter((link) => !/^https?:/.test(link.href)).length") == 0
    assert page.evaluate("window.pwned") is None
    assert "\u202e" not in page.locator("body").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.one_process("what is in memory is each replica's own")
def test_foreign_text_is_text(service: Server, admin_page: Seen) -> None:
    """Markup, scripts and addresses are shown as they were written, long ones fit, and the direction of text stays."""
    client, page, written = service.client(), admin_page.page, HOSTILE[:20]
    assert client.get("/v1/tenants/acme/adapters/hostile/prefix").status_code == 200
    assert client.put("/v1/tenants/acme/adapters/hostile/aliases/prod", json={"version": 2}).status_code == 201
    page.set_viewport_size({"width": 400, "height": 900})
    for view, shown in (
        ("adapters/acme", "hostile"),
        ("tenants/acme", written),
        ("audit", "acme/hostile@2"),
        ("usage", "Requests an hour"),
        ("residency", "acme/hostile@2"),
        ("now", "requests a second"),
        ("adapters/acme/hostile@2", written),
    ):
        page.goto(f"{admin_page.url}/ui#/{view}")
        page.get_by_role("heading", level=1).wait_for()
        expect(page.get_by_text(shown).first).to_be_visible()
        _require_text(page)
    expect(page.get_by_label("The model card")).to_contain_text("<script>window.pwned=1</script><svg onload")
    expect(page.get_by_role("definition").filter(has_text=written).last).to_be_visible()
    expect(page.get_by_role("list").filter(has_text="published")).to_contain_text("alias prod was moved")
    expect(page.get_by_role("figure").first).to_be_visible()
    page.get_by_label("Compare with version").select_option("1")
    expect(page.get_by_role("row").filter(has_text="revision").get_by_text(written)).to_be_visible()
    expect(page.get_by_text("Relative distance of keys")).to_be_visible()
    _require_text(page)
    page.get_by_role("button", name="Move alias prod").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("From version 2 to").select_option("1")
    expect(dialog.get_by_role("row").filter(has_text="revision").get_by_text(written)).to_be_visible()
    _require_text(page)
    dialog.get_by_role("button", name="Cancel").click()
    admin_page.open("console", "Console")
    page.route(re.compile(r"/adapters/hostile\?"), lambda route: route.fulfill(json={"name": HOSTILE * 16_384}))
    page.get_by_label("Path").fill(f"v1/tenants/acme/adapters/hostile?{HOSTILE}")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("The answer")).to_contain_text(written)
    expect(page.get_by_role("button", name=re.compile("Show all 1,[0-9]{3},[0-9]{3} characters"))).to_be_visible()
    _require_text(page)
    admin_page.open("audit", "Audit")
    admin_page.open("console", "Console")
    expect(page.get_by_text("acme/adapters/hostile?%3Cscript").first).to_be_visible()
    _require_text(page)


def test_names_that_every_object_has(service: Server, admin_page: Seen) -> None:
    """An address or a config with the name of what JavaScript's objects inherit is nothing special."""
    page = admin_page.page
    for name in ("constructor", "__proto__"):
        page.goto(f"{admin_page.url}/ui#/{name}")
        expect(page.get_by_text("There is no such view")).to_be_visible()
    for config in (CONFIG, {**CONFIG, "constructor": 1}):
        assert upload(service.client(), "acme", "inherited", config, weights(1)).status_code == 201
    admin_page.open("adapters/acme/inherited@2", "acme/inherited")
    page.get_by_label("Compare with version").select_option("1")
    expect(page.get_by_role("row").filter(has_text="constructor")).to_contain_text("absent1")


def test_characters_that_nobody_sees(admin_page: Seen) -> None:
    """Those that hide text or turn its direction are written out; the ends of lines of Windows are ends of lines."""
    shown = admin_page.page.evaluate(
        "async (text) => (await import(`${location.origin}/ui/format.js`)).visible(text)",
        "a\tb\r\nc\nsoft\u00adhyphen \u202eturned \U000e0041tag \u2028line",
    )
    assert shown == "a\tb\nc\nsoft⟨U+00AD⟩hyphen ⟨U+202E⟩turned ⟨U+E0041⟩tag ⟨U+2028⟩line"


@pytest.mark.parametrize(("heads", "tokens"), [(128, 8), (1, 4096)])
def test_large_tables(service: Server, admin_page: Seen, heads: int, tokens: int) -> None:
    """512 layers, and many heads or tokens: few bytes come and few elements are made, each cell can be read, and the
    page keeps up with the pointer."""
    shape = {"num_layers": 512, "num_attention_heads": heads, "token_dim": heads, "num_virtual_tokens": tokens}
    flat = torch.rand(tokens, 1024 * heads, generator=torch.Generator().manual_seed(0))
    file = save({"prompt_embeddings": flat})
    assert upload(service.client(), "acme", f"large-{heads}", {**CONFIG, **shape}, file).status_code == 201
    page = admin_page.page
    with page.expect_response("**/statistics") as answered:
        admin_page.open(f"adapters/acme/large-{heads}@1", f"acme/large-{heads}")
    assert len(answered.value.body()) < 300_000
    name = "head" if heads > 1 else "virtual token"
    figure = page.get_by_role("figure").filter(has_text=f"Norm of keys by layer and {name}")
    canvas, words = figure.locator("canvas"), figure.locator("output")
    canvas.focus()
    for key in ("ArrowDown", "End"):
        page.keyboard.press(key)
    last = "heads 124\u2013127" if heads > 1 else "tokens 3968\u20134095"
    expect(words).to_contain_text(f"layers 4\u20137, {last}: ")
    assert page.evaluate("document.querySelectorAll('*').length") < 2000
    box = canvas.bounding_box()
    assert box is not None
    for step in range(0, 64, 7):
        canvas.hover(position={"x": box["width"] * (step + 0.5) / 64, "y": box["height"] * (step + 0.9) / 64})
    expect(words).to_contain_text("layers 508\u2013511, ")
    figure.get_by_text("As a table").click()
    expect(figure.get_by_role("cell")).to_have_count(4096)


def test_the_keyboard(admin_page: Seen) -> None:
    """`g a` goes to the adapters, `/` searches, `?` lists the shortcuts, Escape closes them."""
    page = admin_page.page
    page.get_by_role("heading", level=1, name="Now").wait_for()
    page.keyboard.press("g")
    page.keyboard.press("a")
    page.get_by_label("Search by name").wait_for()
    page.keyboard.press("/")
    expect(page.get_by_label("Search by name")).to_be_focused()
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Go to Adapters")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_the_console_asks_its_own_origin_alone(admin_page: Seen) -> None:
    """Calls of the views are there as curl, without a key; an address of elsewhere is a path here."""
    page = admin_page.page
    admin_page.open("adapters/acme", "Adapters of acme")
    page.get_by_role("row").filter(has_text="summarize").wait_for()
    admin_page.open("console", "Console")
    expect(page.get_by_text("/v1/tenants/acme/adapters?sort=name").first).to_be_visible()
    assert "pfx_" not in page.content()
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("The answer")).to_contain_text('"scope": "admin"')
    page.get_by_label("Path").fill("https://elsewhere.example/v1/whoami")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_be_visible()
    admin_page.errors.clear()
    page.get_by_label("Path").fill("x:https://elsewhere.example/v1/whoami")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("no path of this service")
    page.get_by_label("Method").select_option("PUT")
    page.get_by_label("Path").fill("v1/tenants/from-the-console")
    page.get_by_label("JSON").fill('{"max_adapters": 3}')
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("The answer")).to_contain_text('"max_adapters": 3')


def test_enter_does_what_a_dialog_is_for(service: Server, admin_page: Seen) -> None:
    """Whoever types a name and presses Enter has made the tenant or the alias, and not closed the dialog."""
    page, dialog = admin_page.page, admin_page.page.get_by_role("dialog")
    admin_page.open("tenants", "Tenants and keys")
    page.get_by_role("button", name="New tenant").click()
    dialog.get_by_label("Name").fill("entered")
    page.keyboard.press("Enter")
    expect(page.get_by_role("row").filter(has_text="entered")).to_be_visible()
    admin_page.open("adapters/acme/summarize@3", "acme/summarize")
    page.get_by_role("button", name="New alias").click()
    dialog.get_by_label("Name").fill("entered")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("heading")).to_have_text("entered points at 3 now")
    service.client().delete("/v1/tenants/acme/adapters/summarize/aliases/entered")


def _drop(page: Page, folder: str) -> None:
    """Drops an adapter's folder onto the page."""
    page.locator(".drop").evaluate(
        """(place, folder) => {
            const files = ["adapter_config.json", "adapter_model.safetensors"].map((name) =>
                Object.defineProperty(new File(["{}"], name), "webkitRelativePath", {value: `${folder}/${name}`}));
            place.dispatchEvent(Object.assign(new Event("drop", {bubbles: true}), {dataTransfer: {items: [], files}}));
        }""",
        folder,
    )


def test_the_name_of_an_upload(service: Server, admin_page: Seen, adapter_folder: Path) -> None:
    """It is that of the folder that was dropped last, unless somebody typed one; after a publication none is left over,
    and mended files can be chosen again."""
    page = admin_page.page
    admin_page.open("adapters/acme", "Adapters of acme")
    name, picker = page.get_by_label("Name of the adapter"), page.get_by_label("Files of an adapter")
    for folder in ("first", "second"):
        _drop(page, folder)
        expect(name).to_have_value(folder)
    name.fill("typed")
    _drop(page, "third")
    expect(page.get_by_text("2 files, 4 B")).to_be_visible()
    expect(name).to_have_value("typed")
    picker.set_input_files(list(adapter_folder.iterdir()))
    expect(picker).to_have_value("")
    page.get_by_role("button", name="Publish").click()
    expect(page.get_by_role("status").filter(has_text="ublished: ")).to_contain_text("acme/typed@1")
    picker.set_input_files(list(adapter_folder.iterdir()))
    expect(name).to_have_value("")
    assert service.client().delete("/v1/tenants/acme/adapters/typed").status_code == 204


def test_the_first_upload_of_a_service(admin_page: Seen, adapter_folder: Path) -> None:
    """Without any tenant, it names one; the line for the worker stays in view."""
    page = admin_page.page
    page.route("**/v1/tenants?**", lambda route: route.fulfill(json={"items": [], "next": None}))
    admin_page.open("adapters", "Adapters")
    page.get_by_label("Name of the tenant").fill("newcomer")
    page.get_by_label("Files of an adapter").set_input_files(list(adapter_folder.iterdir()))
    page.get_by_label("Name of the adapter").fill("first")
    page.get_by_role("button", name="Publish").click()
    page.wait_for_load_state("networkidle")
    expect(page.get_by_text('client.get("newcomer/first@1"')).to_be_visible()
    expect(page.get_by_text("There is no tenant yet")).to_have_count(0)


def test_copying_without_tls(seen: Seen, service: Server) -> None:
    """Browsers give a page of another machine no clipboard unless it comes over TLS; a key in a dialog, which makes the
    rest of the page inert, is copied nevertheless."""
    seen.page.add_init_script("Object.defineProperty(Navigator.prototype, 'clipboard', {value: undefined})")
    seen.sign_in(service.admin_key)
    page = seen.page
    seen.open("tenants/acme", "acme")
    page.get_by_role("button", name="New key").click()
    page.get_by_role("button", name="Make it").click()
    key = page.locator("pre.secret").inner_text()
    page.get_by_role("button", name="Copy the key").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    page.get_by_role("button", name="I have it").click()
    seen.open("console", "Console")
    page.get_by_label("Path").fill("")
    page.get_by_label("Path").press("Control+V")
    expect(page.get_by_label("Path")).to_have_value(key)


def test_a_link_to_an_old_entry_of_the_audit(service: Server, admin_page: Seen) -> None:
    """The view goes back until it has the entry, however many are newer; the entry names the key that did it."""
    page = admin_page.page
    oldest = service.client().get("/v1/audit", params={"limit": 1000}).json()["items"][-1]
    page.route("**/v1/audit?**", lambda route: route.continue_(url=route.request.url.replace("limit=200", "limit=5")))
    page.goto(f"{admin_page.url}/ui#/audit/{oldest['id']}")
    row = page.get_by_role("row").filter(has_text=oldest["action"])
    expect(row.get_by_role("link")).to_have_attribute("href", f"#/audit/{oldest['id']}")
    expect(row).to_contain_text(oldest["key_name"] or oldest["key_id"])


def test_the_service_filters_the_audit(service: Server, admin_page: Seen) -> None:
    """An entry is found however many are newer; the page offers every action, and says if nothing matches."""
    page, client = admin_page.page, service.client()
    made = client.post("/v1/tenants/acme/keys", json={"scope": "read", "name": "of long ago"}).json()
    page.route("**/v1/audit?**", lambda route: route.continue_(url=route.request.url.replace("limit=200", "limit=1")))
    client.put("/v1/tenants/acme/adapters/summarize/aliases/later", json={"version": 1})
    client.delete("/v1/tenants/acme/adapters/summarize/aliases/later")
    admin_page.open("audit", "Audit")
    rows = page.locator("tbody").get_by_role("row")
    expect(rows).to_contain_text(["alias.deleted"])
    page.get_by_label("Action").select_option("key.created")
    expect(rows).to_contain_text([made["id"]])
    page.get_by_role("button", name="Load older ones").click()
    expect(rows).to_have_count(2)
    page.get_by_label("Search").fill(made["id"][:12].upper())
    expect(rows).to_have_count(1)
    page.get_by_label("Action").select_option("tenant.deleted")
    expect(page.get_by_text("No change matches")).to_be_visible()
    client.delete(f"/v1/tenants/acme/keys/{made['id']}")


def test_bytes_in_the_console(service: Server, admin_page: Seen) -> None:
    """An answer that is no text is not written out as if it were some; the size is."""
    page = admin_page.page
    admin_page.open("console", "Console")
    page.get_by_label("Path").fill("v1/tenants/acme/adapters/summarize@1/prefix")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_label("The answer")).to_contain_text("that are no text: save them with curl -o FILE")


def test_usage_of_keys(service: Server, admin_page: Seen) -> None:
    """Each key has its name beside its id, the platform's too."""
    made = service.client().post("/v1/tenants/acme/keys", json={"scope": "read", "name": "the workers"}).json()
    platform = service.client().get("/v1/whoami").json()["id"]
    _count_reads(service, "summarize", 9, made["id"], f"platform:{platform}")
    admin_page.open("usage", "Usage")
    admin_page.page.get_by_label("Count by").select_option("key")
    table = admin_page.page.get_by_role("group", name="Total usage")
    for name in (f"the workers {made['id']} · acme", f"bootstrap {platform} · acme"):
        expect(table.get_by_role("row").filter(has_text=name)).to_be_visible()


def test_usage_of_days(admin_page: Seen) -> None:
    """Curves of more than a day and a half name the days, and say from when they are."""
    page = admin_page.page
    admin_page.open("usage", "Usage")
    page.get_by_label("Of the last").select_option("720")
    chart = page.get_by_role("img", name=re.compile("^Since [0-9]+ [A-Z][a-z]+, [0-9]{2}:[0-9]{2}; now requests: "))
    chart.locator(".u-over").hover()  # which is there once the chart is drawn
    expect(page.locator(".u-legend")).to_contain_text(re.compile("[0-9]+ [A-Z][a-z]{2}"))


def test_the_first_numbers(admin_page: Seen) -> None:
    """A chart of a single moment, or of none, shows ten minutes and no years."""
    spans = admin_page.page.evaluate(
        "async (all) => { const { range } = await import(`${location.origin}/ui/views/chart.js`);"
        " return all.map((at) => range({ data: [at] })); }",
        [[1_800_000_000], [], [1_800_000_000, 1_800_003_600]],
    )
    assert spans == [[1_799_999_400, 1_800_000_000], [0, 600], [1_800_000_000, 1_800_003_600]]


def minute(at: int = 1_800_000_000, *, replica: str = "local", requests: int) -> dict[str, Any]:
    """Returns the live numbers of one slot."""
    numbers: dict[str, Any] = {"replica": replica, "seconds": 5, "at": [at], "requests": [requests], "bytes": [1]}
    numbers |= {"cold_loads": [0], "p50": [0.1], "p99": [0.1], "problems": {}, "in_flight": [0]}
    return numbers | {"in_flight_limit": None, "tiers": [], "tenants": []}


def test_now_shows_one_replica(admin_page: Seen) -> None:
    """If another replica answers after the stream ended, the view begins anew with its numbers, and names it."""
    page, asked = admin_page.page, list[str]()
    answers = [
        [minute(replica="aa", requests=50)],
        [minute(1_800_000_005, replica="bb", requests=7)],
        [minute(replica="bb", requests=10), minute(1_800_000_005, replica="bb", requests=20)],
    ]

    def answer(route: Route) -> None:
        asked.append(route.request.url.partition("since=")[2])
        documents = answers[min(len(asked), len(answers)) - 1]
        body = "".join(f"data: {json.dumps(document)}\n\n" for document in documents)
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/live?**", answer)
    admin_page.open("adapters/acme", "Adapters of acme")
    admin_page.open("now", "Now")
    expect(page.get_by_text("the last hour of replica aa; others count their own")).to_be_visible()
    tile = page.locator(".tile").filter(has_text="requests a second")
    expect(tile).to_contain_text("10")
    expect(page.get_by_text("the last hour of replica bb; others")).to_be_visible()
    expect(tile).to_contain_text("3")  # (10 + 20) / 10 s, without the 50 of the other
    assert asked[:3] == ["0", "1800000005", "0"]


def test_now_claims_only_what_it_knows(admin_page: Seen) -> None:
    """Nothing is said of memory without its numbers, which a tenant does not get; no failure is not no request."""
    page = admin_page.page
    quiet = minute(requests=3)
    body = f"data: {json.dumps(quiet)}\n\n"
    page.route("**/v1/live?**", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    admin_page.open("adapters/acme", "Adapters of acme")
    admin_page.open("now", "Now")
    expect(page.get_by_text("Nothing needs attention: in the last minute")).to_be_visible()
    expect(page.get_by_text("No request was refused and none failed in the last hour.")).to_be_visible()
    quiet["problems"] = {"unavailable": [2]}
    page.unroute("**/v1/live?**")
    body = f"data: {json.dumps(quiet)}\n\n"
    page.route("**/v1/live?**", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    admin_page.open("adapters/acme", "Adapters of acme")
    admin_page.open("now", "Now")
    expect(page.locator(".notice.bad")).to_contain_text("unavailable: 2 in the last minute")


def test_two_fields_at_once(admin_page: Seen) -> None:
    """Whoever fills one field right after another has both."""
    page = admin_page.page
    admin_page.open("adapters/acme", "Adapters of acme")
    with page.expect_response(re.compile("search=summar&base_model=none")):
        page.evaluate(
            """() => [["[type=search]", "summar"], ["[placeholder='exact name']", "none"]].forEach(([which, text]) => {
                const field = document.querySelector(which);
                field.value = text;
                field.dispatchEvent(new Event("input", {bubbles: true}));
            })"""
        )


def test_the_most_read_come_first(admin_page: Seen) -> None:
    """Adapters are sorted by what the API sorts by, reads included."""
    admin_page.open("adapters/acme", "Adapters of acme")
    with admin_page.page.expect_response(re.compile("sort=-used")) as answered:
        admin_page.page.get_by_label("Sort by").select_option("most read")
    assert answered.value.status == 200


def test_a_tenants_admin_sees_the_tenant(service: Server, seen: Seen) -> None:
    """A tenant's admin manages its keys and reads its usage and audit, and sees nothing of the platform."""
    made = service.client().post("/v1/tenants/acme/keys", json={"scope": "admin"}).json()
    seen.sign_in(made["key"])
    seen.open("tenants", "acme")
    expect(seen.page.get_by_role("button", name="Change quotas")).to_have_count(0)
    expect(seen.page.get_by_role("row").filter(has_text="yours")).to_have_count(1)
    seen.open("audit", "Audit")
    expect(seen.page.get_by_role("row").filter(has_text="version.published").first).to_be_visible()
    seen.open("usage", "Usage")

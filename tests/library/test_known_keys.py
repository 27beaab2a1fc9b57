"""`library.known_keys` checks keys in memory, and asks the catalog once for each, seldom for wrong ones."""

import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio import to_thread

from prefix_service.catalog import keys
from prefix_service.catalog.changes import EverythingChanged
from prefix_service.catalog.database import Database
from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.keys import Keyring, StoredKey
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.catalog.tenants import Tenants
from prefix_service.errors import Overloaded, StorageFailed, Unauthenticated
from prefix_service.library import known_keys
from prefix_service.library.known_keys import KnownKeys
from prefix_service.library.unknown_ids import UnknownIds
from tests.conftest import running_server

pytestmark = pytest.mark.anyio
STRANGERS = 50  # lookups of unknown ids in a second


class CountedKeyring(Keyring):
    """A keyring that counts its lookups, and can be made to wait in them."""

    def __init__(self, database: Database, secret: Path) -> None:
        super().__init__(database, secret)
        self.asked: list[str] = []
        self.looks, self.answers = threading.Event(), threading.Event()
        self.answers.set()

    def find(self, key_id: str) -> StoredKey | None:
        """Returns a key by its id."""
        found = super().find(key_id)
        self.asked.append(key_id)
        self.looks.set()
        self.answers.wait(600)
        return found


class Catalog:
    """A catalog as one process sees it, which hears of changes when `feed.catch_up` is called or it writes."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(folder / "catalog.sqlite")
        self.keyring = CountedKeyring(self.database, folder / "key.secret")
        self.feed = ChangeFeed(self.database)
        self.tenants = Tenants(self.database)
        self.are_known = True
        self.tenants.put("acme", COMMAND_LINE)
        # This is another process's view: it makes keys of which this one hears later.
        self.other = Database(folder / "catalog.sqlite")
        self.elsewhere = Keyring(self.other, folder / "key.secret")

    def known(self) -> KnownKeys:
        known = KnownKeys(self.keyring, UnknownIds(), lambda: self.are_known)
        self.feed.listen(known.on_changes)
        return known


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    made = Catalog(tmp_path)
    yield made
    made.keyring.answers.set()
    made.database.close()
    made.other.close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a slow machine take its time for lookups, also for fifty of them, which are counted within one second."""
    monkeypatch.setattr(known_keys, "_PATIENCE", 60.0)
    monkeypatch.setattr("limits.storage.memory.time", SimpleNamespace(time=lambda: 1000.0))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Returns a function that lets the stopwatch of keys go on by so many seconds."""
    more = 0.0

    def go_on(seconds: float) -> None:
        nonlocal more
        more += seconds

    for module in (keys, known_keys):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + more))
    return go_on


def made(keyring: Keyring, expires: datetime | None = None) -> tuple[str, bytes, str]:
    """Returns a new key: its id, a header with it, and its text."""
    key, text = keyring.create("acme", "read", "", COMMAND_LINE, expires)
    return key.id, f"Bearer {text}".encode(), text


def wrong(number: int) -> str:
    """Returns a key that is well-formed, and was never made."""
    return checked(f"pfx_{number:016x}_{'5' * 48}")


def forged(text: str) -> str:
    """Returns a key of the same id with another secret."""
    return checked(f"{text[:20]}_{'5' * 48}")


def checked(body: str) -> str:
    """Returns a key's text with its checksum."""
    return f"{body}_{zlib.crc32(body.encode()):08x}"


async def refused(known: KnownKeys, text: str) -> None:
    with pytest.raises(Unauthenticated):
        await known.verify(b"Bearer " + text.encode(), text)


async def test_a_key_is_looked_up_once(catalog: Catalog) -> None:
    """After one lookup a key is known by its header, without a hash, and another text is refused from memory."""
    key_id, header, text = made(catalog.keyring)
    known = catalog.known()
    assert known.recall(header) is None
    principal = await known.verify(header, text)
    assert (principal.key_id, principal.tenant, principal.tenant_id) == (
        key_id,
        "acme",
        catalog.tenants.require("acme"),
    )
    assert known.recall(header) == principal
    assert await known.verify(b"bearer  " + header[7:], text) == principal
    await refused(known, forged(text))
    assert catalog.keyring.asked == [key_id]


async def test_keys_that_were_there_are_no_strangers(catalog: Catalog) -> None:
    """Known keys are served however many wrong keys are tried: those of the start, and those heard of later."""
    early = made(catalog.elsewhere)
    catalog.feed.catch_up()
    known = catalog.known()
    await exhausted(known)
    late = made(catalog.elsewhere)
    with pytest.raises(Overloaded):  # for the quarter of a second until it is heard
        await known.verify(late[1], late[2])
    catalog.feed.catch_up()
    for _, header, text in (early, late):
        assert (await known.verify(header, text)).tenant == "acme"
    assert catalog.keyring.asked[-2:] == [early[0], late[0]]


async def exhausted(known: KnownKeys) -> None:
    """Tries wrong keys until they are no longer looked up."""
    for number in range(3 * STRANGERS):
        text = wrong(number)
        try:
            await refused(known, text)
        except Overloaded:
            return
    raise AssertionError("wrong keys are looked up without end")


async def test_a_key_that_another_process_has_just_made_works_immediately(catalog: Catalog) -> None:
    """The service looks an unknown key up, so it need not have heard of its creation."""
    known = catalog.known()
    _, header, text = made(catalog.elsewhere)
    assert (await known.verify(header, text)).tenant == "acme"
    assert known.recall(header) is not None


async def test_wrong_keys_are_looked_up_at_a_bounded_rate(catalog: Catalog) -> None:
    """A wrong key is looked up once and then refused from memory, even while others are refused for their number."""
    known = catalog.known()
    first = wrong(10**6)
    await refused(known, first)
    await exhausted(known)
    assert len(catalog.keyring.asked) == STRANGERS
    before = list(catalog.keyring.asked)
    for _ in range(100):
        await refused(known, first)
    for text in ("", "x", "pfx_" + "0" * 16 + "_" + "0" * 48 + "_00000000", first[:-1]):
        with pytest.raises(Unauthenticated, match="malformed"):
            await known.verify(b"", text)
    assert catalog.keyring.asked == before


async def test_an_earlier_end_holds_when_it_is_heard(catalog: Catalog, passes: Callable[[float], None]) -> None:
    """A known key gets the earlier end that another process has given it."""
    key_id, header, text = made(catalog.keyring)
    known = catalog.known()
    await known.verify(header, text)
    catalog.elsewhere.shorten("acme", key_id, datetime.now(UTC) + timedelta(seconds=60), COMMAND_LINE)
    catalog.feed.catch_up()
    assert known.recall(header) is None
    await known.verify(header, text)
    assert known.recall(header) is not None
    passes(60)
    assert known.recall(header) is None
    await refused(known, text)
    assert catalog.keyring.asked == [key_id, key_id]


@pytest.mark.parametrize(
    "end",
    [
        lambda catalog, key_id: catalog.elsewhere.revoke("acme", key_id, COMMAND_LINE),
        lambda catalog, _: Tenants(catalog.other).delete("acme", COMMAND_LINE),
    ],
    ids=["revoked", "tenant deleted"],
)
async def test_what_ended_is_forgotten_when_it_is_heard(catalog: Catalog, end: Callable[[Catalog, str], Any]) -> None:
    """A known key is refused once another process has revoked it or deleted its tenant."""
    key_id, header, text = made(catalog.keyring)
    known = catalog.known()
    await known.verify(header, text)
    end(catalog, key_id)
    catalog.feed.catch_up()
    assert known.recall(header) is None
    for _ in range(3):
        await refused(known, text)
    assert catalog.keyring.asked in ([key_id], [key_id, key_id])


async def test_where_changes_were_missed_each_key_is_looked_up_again(catalog: Catalog) -> None:
    """After missed changes each key is looked up again, known and missing ids alike."""
    key_id, header, text = made(catalog.keyring)
    known = catalog.known()
    await known.verify(header, text)
    late_id, _, late = made(catalog.elsewhere)
    known._missing[late_id] = None
    await refused(known, late)
    known.on_changes([EverythingChanged()])
    assert known.recall(header) is None
    assert (await known.verify(b"Bearer " + late.encode(), late)).key_id == late_id
    await exhausted(known)
    assert (await known.verify(header, text)).key_id == key_id


async def test_what_ends_while_it_is_looked_up_is_not_remembered(catalog: Catalog) -> None:
    """A lookup during which the key was revoked is not remembered, because it may be older than the change."""
    key_id, header, text = made(catalog.keyring)
    known = catalog.known()
    catalog.keyring.answers.clear()

    async def revoke() -> None:
        await to_thread.run_sync(catalog.keyring.looks.wait, 60)
        catalog.keyring.revoke("acme", key_id, COMMAND_LINE)
        catalog.keyring.answers.set()

    async with anyio.create_task_group() as group:
        group.start_soon(revoke)
        await known.verify(header, text)
    assert known.recall(header) is None


async def test_a_key_expires_in_memory(catalog: Catalog, passes: Callable[[float], None]) -> None:
    """A key expires by the database's clock at its lookup and a stopwatch since then."""
    _, header, text = made(catalog.keyring, datetime.now(UTC) + timedelta(seconds=60))
    known = catalog.known()
    await known.verify(header, text)
    assert known.recall(header) is not None
    passes(60)
    assert known.recall(header) is None
    await refused(known, text)
    assert len(catalog.keyring.asked) == 1


async def test_what_is_in_memory_holds_while_changes_are_heard(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While changes are not heard each key is looked up again, within a bounded time, and in few threads."""
    _, header, text = made(catalog.keyring)
    known = catalog.known()
    await known.verify(header, text)
    catalog.keyring.answers.clear()  # the catalog hangs
    monkeypatch.setattr(known_keys, "_PATIENCE", 0.5)
    assert known.recall(header) is not None
    catalog.are_known = False
    assert known.recall(header) is None

    async def ask() -> None:
        with pytest.raises(StorageFailed, match=r"has not answered within 0\.5 seconds"):
            await known.verify(header, text)

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(ask)
    assert len(catalog.keyring.asked) <= 1 + 4
    catalog.keyring.answers.set()
    catalog.are_known = True
    assert known.recall(header) is not None


async def test_uses_are_noted_beside_the_requests(catalog: Catalog) -> None:
    """Each used key's last use is written by the time that the block ends, and others have none."""
    key_id, header, text = made(catalog.keyring)
    other, _, _ = made(catalog.keyring)
    known = catalog.known()
    with known.running():
        for _ in range(5):
            await known.verify(header, text)
            known.recall(header)
    used = catalog.keyring.get("acme", key_id).last_used
    assert used is not None
    assert abs(used.replace(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=10)
    assert catalog.keyring.get("acme", other).last_used is None


def test_many_wrong_keys_leave_known_ones_alone(tmp_path: Path) -> None:
    """Many wrong keys get 401, then 503 `overloaded`; known ones are served, and revoked ones get 401."""
    with running_server(tmp_path / "data") as server:
        admin, anyone = server.client(), server.client("")
        revoked = admin.post("/v1/keys", json={"scope": "read"}).json()
        assert server.client(revoked["key"]).get("/v1/tenants/none").status_code == 404
        assert admin.delete(f"/v1/keys/{revoked['id']}").status_code == 204
        path, found = "/v1/tenants", set()
        for number in range(3 * STRANGERS):
            answer = anyone.get(path, headers={"Authorization": f"Bearer {wrong(number)}"})
            found.add((answer.status_code, answer.json()["code"], answer.headers.get("retry-after")))
            if answer.status_code == 503:
                late = anyone.get(path, headers={"Authorization": f"Bearer {revoked['key']}"})
                assert late.status_code == 401
            assert admin.get(path).status_code == 200
        assert (401, "unauthenticated", None) in found
        assert found <= {(401, "unauthenticated", None), (503, "overloaded", "1")}

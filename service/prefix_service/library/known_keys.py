"""Keys that this process knows: checked in memory, and looked up at a bounded rate if they are new."""

import asyncio
import contextlib
import hashlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from prefix_service.catalog.changes import (
    Change,
    EverythingChanged,
    KeyCreated,
    KeyRevoked,
    KeyShortened,
    TenantDeleted,
)
from prefix_service.catalog.keys import USE_GRANULARITY, Keyring, StoredKey
from prefix_service.catalog.records import Principal
from prefix_service.errors import OutOfSpace, StorageFailed, Unauthenticated
from prefix_service.library.unknown_ids import UnknownIds
from prefix_service.system.background import in_background
from prefix_service.system.bounded import put_last

_MOST_KEYS: Final = 65_536
_MOST_MISSING: Final = 4096
_LOOKUPS: Final = 4  # threads
_PATIENCE: Final = 2.0  # seconds that a lookup may take
_PAUSE: Final = 5.0  # seconds between two writes of the keys' last uses


class KnownKeys:
    """The keys that were used or created last, by id. `on_changes` keeps them up to date. They are trusted while
    `are_known` returns True; otherwise each key is looked up in the catalog again. `notes_uses` is False where the
    catalog is read-only.

    Belongs to the event loop, `running` aside.
    """

    def __init__(
        self, keyring: Keyring, unknown_ids: UnknownIds, are_known: Callable[[], bool], *, notes_uses: bool = True
    ) -> None:
        self._keyring, self._unknown_ids = keyring, unknown_ids
        self._are_known, self._notes_uses = are_known, notes_uses
        # None: the key exists, or did, and has not been looked up since.
        self._keys: dict[str, StoredKey | None] = dict.fromkeys(keyring.latest_ids(_MOST_KEYS))
        self._missing: dict[str, None] = {}
        self._verified: dict[bytes, StoredKey] = {}
        self._changes = 0
        self._noted: dict[str, float] = {}
        self._uses: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        # An executor of its own: if the catalog hangs, no more threads than these hang with it.
        self._threads = ThreadPoolExecutor(_LOOKUPS, "keys")

    def recall(self, header: bytes) -> Principal | None:
        """Returns the principal whose key was verified by this very
        `Authorization` header, if the key is still valid.
        """
        stored = self._verified.get(hashlib.sha256(header).digest())
        if stored is None or self._keys.get(stored.principal.key_id) is not stored or not self._are_known():
            return None
        return self._used(stored)

    async def verify(self, header: bytes, text: str) -> Principal:
        """Returns the principal of a key, and remembers it by the `header` that it came in.

        Raises:
            Unauthenticated: the key is malformed, unknown, expired or revoked.
            Overloaded: this process does not know the key's id, and too many unknown ids were looked up within a
            second.
            StorageFailed: the key must be looked up, and the catalog does not answer.
        """
        key_id, found = self._keyring.parse(text)
        stored = await self._stored(key_id)
        if stored is None or not stored.admits(found) or (principal := self._used(stored)) is None:
            raise Unauthenticated("the key is unknown, expired or revoked")
        put_last(self._verified, hashlib.sha256(header).digest(), stored, _MOST_KEYS)
        return principal

    def ends(self, key_id: str) -> float:
        """Returns the moment of `time.monotonic` when a key ends that was verified just now."""
        stored = self._keys.get(key_id)
        return math.inf if stored is None else stored.ends

    def on_changes(self, changes: Sequence[Change]) -> None:
        """Forget keys that changed, and those of deleted tenants; learn of new ones."""
        for change in changes:
            match change:
                case TenantDeleted(tenant):
                    gone = [known.principal for known in self._keys.values() if known is not None]
                    self._keys |= {one.key_id: None for one in gone if one.tenant == tenant}
                case KeyRevoked(_, key_id):
                    self._keys.pop(key_id, None)
                    put_last(self._missing, key_id, None, _MOST_MISSING)
                case KeyCreated(_, key_id) | KeyShortened(_, key_id):
                    put_last(self._keys, key_id, None, _MOST_KEYS)
                    self._missing.pop(key_id, None)
                case EverythingChanged():
                    self._keys = dict.fromkeys(self._keys)
                    self._missing.clear()
                case _:
                    continue
            self._changes += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Writes the keys' last uses to the catalog, in a thread, while the block runs.

        At its end, the lookup threads end too.
        """
        try:
            with in_background("uses of keys", self._note) if self._notes_uses else contextlib.nullcontext():
                yield
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _stored(self, key_id: str) -> StoredKey | None:
        known = self._keys.get(key_id)
        if self._are_known() and (known is not None or key_id in self._missing):
            return known
        if key_id not in self._keys:
            self._unknown_ids.admit()
        changes = self._changes
        try:
            async with asyncio.timeout(_PATIENCE):
                found = await asyncio.get_running_loop().run_in_executor(self._threads, self._keyring.find, key_id)
        except TimeoutError as error:
            raise StorageFailed(f"the catalog has not answered within {_PATIENCE:g} seconds: try again") from error
        if changes == self._changes:  # else it may have been read before a change that came meanwhile
            if found is not None:
                put_last(self._keys, key_id, found, _MOST_KEYS)
            else:
                self._keys.pop(key_id, None)
                put_last(self._missing, key_id, None, _MOST_MISSING)
        return found

    def _used(self, stored: StoredKey) -> Principal | None:
        """Returns the principal of a key that has not expired, and notes its use; None if it has expired."""
        now, key_id = time.monotonic(), stored.principal.key_id
        if now >= stored.ends:
            return None
        if now - self._noted.get(key_id, -math.inf) >= USE_GRANULARITY.total_seconds():
            put_last(self._noted, key_id, now, _MOST_KEYS)
            if self._notes_uses:
                self._uses.put((key_id, now))
            if self._keys.get(key_id) is stored:  # recently used keys are dropped last
                put_last(self._keys, key_id, stored, _MOST_KEYS)
        return stored.principal

    def _note(self, stop: threading.Event) -> None:
        while True:
            is_last = stop.wait(_PAUSE)
            if uses := dict(self._uses.get_nowait() for _ in range(self._uses.qsize())):
                # A full disk must not make a valid key unusable.
                present = time.monotonic()
                with contextlib.suppress(OutOfSpace, StorageFailed):
                    self._keyring.note_uses({key: present - at for key, at in uses.items()})
            if is_last:
                return

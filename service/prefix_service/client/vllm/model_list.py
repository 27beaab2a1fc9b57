"""`GET /v1/models`: vLLM's own models, then the adapters that requests may name and that fit its model.

Imports neither vLLM nor a web framework.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, Final
from urllib.parse import parse_qs

from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.names import MODEL, Named, Permissions
from prefix_service.client.vllm.source import Source
from prefix_service.errors import (
    DimensionMismatch,
    InvalidReference,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    PrefixServiceError,
)
from prefix_service.prefix.references import parse_qualified

Card = dict[str, Any]

MOST_LISTED: Final = 10_000  # adapters in one answer
_MOST_KEPT: Final = 100_000
_PAGE: Final = 500  # adapters; parsing them blocks the event loop for a few milliseconds
_FRESH: Final = 10.0  # seconds
_TIMES_READ: Final = 10
_PATIENCE: Final = 5.0  # seconds that a caller waits for the service; then the last list is returned
_INSPECTIONS: Final = 8  # in parallel
_WILDCARDS: Final = frozenset("*?")

log = logging.getLogger("vllm.prefix_service")


class ModelList:
    """The adapters that are listed, as cards of vLLM's form; used on one event loop.

    One reading serves all callers. The next one begins when the list is 10 seconds old, or ten times as old as reading
    took, whichever is later. While the service does not answer, callers get the last list. `parent` is the name of the
    served base model.
    """

    def __init__(self, source: Source, permissions: Permissions, model: Model, parent: str) -> None:
        self._source, self._permissions, self._model, self._parent = source, permissions, model, parent
        self._cards: list[Card] = []
        self._until = 0.0
        self._reading: asyncio.Task[None] | None = None
        self._inspections = asyncio.Semaphore(_INSPECTIONS)

    async def cards(self) -> list[Card]:
        """Returns the cards of the newest version of each adapter that is allowed and fits, in the order of names."""
        if self._reading is None and time.monotonic() >= self._until:
            self._reading = asyncio.create_task(self._read())
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=_PATIENCE)
        return self._cards

    async def card(self, name: str) -> Card:
        """Returns the card of an adapter, or of the version that a reference means.

        Raises:
            NotFound: there is no such adapter, or requests may not name it.
            DimensionMismatch: it is for another base model.
            PrefixServiceError: the service did not answer.
        """
        try:
            parse_qualified(name)
            await self._permissions.require(Named((name,), MODEL))
            async with self._inspections:
                version = await self._source.inspect(name)
        except (InvalidReference, NotFound) as error:
            raise NotFound(f"The model `{name:.200}` does not exist.") from error
        return self._card_of(name, version)

    async def _read(self) -> None:
        began = time.monotonic()
        try:
            found = [card async for card in self._found()]
            self._cards = sorted(found, key=lambda card: str(card["id"]))
        except PrefixServiceError as error:
            log.warning("the adapters could not be listed: %s", error)
        finally:
            now, self._reading = time.monotonic(), None
            self._until = now + max(_FRESH, _TIMES_READ * (now - began))

    async def _found(self) -> AsyncIterator[Card]:
        patterns, count = await self._permissions.patterns(), 0
        for tenant in await self._tenants(patterns):
            async for item in self._adapters(tenant):
                name = f"{tenant}/{item.get('adapter')}"
                if not any(fnmatchcase(name, pattern) for pattern in patterns):
                    continue
                with suppress(DimensionMismatch):
                    yield self._card_of(name, item.get("latest"))
                    count += 1
                if count == _MOST_KEPT:
                    log.warning("there are more than %d adapters; the others are not listed", _MOST_KEPT)
                    return

    async def _tenants(self, patterns: tuple[str, ...]) -> list[str]:
        """Returns the tenants that patterns allow: of a tenant's key its own, of a platform's key any."""
        wanted = {pattern.partition("/")[0] for pattern in patterns}
        own = await self._source.tenant() if wanted else None
        if own is not None:
            known = {own}
        elif any(_WILDCARDS & set(tenant) for tenant in wanted):
            known = {str(item.get("tenant")) for item in await self._source.tenants()}
        else:
            return sorted(wanted)
        return sorted(one for one in known if any(fnmatchcase(one, pattern) for pattern in wanted))

    async def _adapters(self, tenant: str) -> AsyncIterator[dict[str, Any]]:
        cursor: str | None = None
        while True:
            try:
                items, cursor = await self._source.list_page(tenant, cursor, _PAGE)
            except NotFound:  # a pattern may name a tenant before it exists
                return
            for item in items:
                yield item
            if cursor is None:
                return

    def _card_of(self, name: str, version: Any) -> Card:
        try:
            self._model.check(version)
            left = self._model.max_length - version["num_virtual_tokens"]
            if left <= 1:  # a prompt of one token, and no room for an answer
                raise DimensionMismatch(
                    f"{name} has {version['num_virtual_tokens']} virtual tokens, which leave no room for an answer in "
                    f"vLLM's max_model_len {self._model.max_length}"
                )
            tenant, adapter, digest = version["tenant"], version["adapter"], version["digest"]
            return {
                "id": name,
                "object": "model",
                "created": int(datetime.fromisoformat(version["created"]).timestamp()),
                "owned_by": tenant,
                "root": f"{tenant}/{adapter}@{digest}",
                "parent": self._parent,
                "max_model_len": left,
                "permission": [],
            }
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidResponse(
                f"the service describes {name} without what belongs to a version: {error!r}"
            ) from error

    async def close(self) -> None:
        """Cancels reading."""
        if self._reading is not None:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading


def page_of(own: list[Card], adapters: list[Card], query: str) -> Card:
    """Returns a list of models as the OpenAI API has it: all, or a page of `limit` behind the model `after`.

    `own` are the cards of vLLM's models, and `adapters` the cards of adapters in the order of their names.

    Raises:
        InvalidRequest: `limit` is no number from 1 to 10,000.
    """
    asked = parse_qs(query)
    after, limit = asked.get("after", [""])[-1], asked.get("limit", [str(MOST_LISTED)])[-1]
    if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= MOST_LISTED):
        raise InvalidRequest(f"limit must be a number from 1 to {MOST_LISTED}, got {limit!r:.100}")
    names = [card["id"] for card in own]
    if after in names:
        own = own[names.index(after) + 1 :]
    elif after:
        own, adapters = [], [card for card in adapters if card["id"] > after]
    count = int(limit) if "limit" in asked else MOST_LISTED + len(own)
    cards = [*own, *adapters]
    return {"object": "list", "data": cards[:count], "has_more": len(cards) > count}

"""Revisions of the catalog as callers see them."""

import secrets
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from prefix_service.api.http.opaque import OpaqueNumbers
from prefix_service.catalog.records import Principal
from prefix_service.errors import InvalidRequest

_BITS: Final = 40  # of a number, the revision: 35 years of a thousand changes a second
_RANDOM_BITS: Final = 24


class Revisions:
    """Revisions as opaque texts, of which each is another, so that order, gaps and equality of two texts say nothing of
    what other tenants do. A text belongs to the tenant that got it, or to the platform: other keys cannot use it.

    `derive` makes a secret for a purpose.
    """

    def __init__(self, derive: Callable[[str], bytes]) -> None:
        self._derive = derive
        self._numbers = lru_cache(1024)(self._make_numbers)

    def text(self, by: Principal, revision: int) -> str:
        """Returns a revision for a caller."""
        return self._numbers(by.tenant_id).text(secrets.randbits(_RANDOM_BITS) << _BITS | revision)

    def revision(self, by: Principal, text: str) -> int:
        """Returns the revision in a caller's text.

        Raises:
            InvalidRequest: the service did not give this text to the caller's tenant.
        """
        numbers = self._numbers(by.tenant_id)
        if not numbers.holds(text):
            raise InvalidRequest(f"{text!r:.80} is no revision that this service gave to a key of your tenant")
        return numbers.number(text) & ((1 << _BITS) - 1)

    def _make_numbers(self, tenant_id: int | None) -> OpaqueNumbers:
        return OpaqueNumbers(self._derive(f"revisions {tenant_id}"))

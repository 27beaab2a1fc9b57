"""The revision up to which this process knows the catalog's changes."""

from typing import Final

import anyio

from prefix_service.catalog.feed import ChangeFeed
from prefix_service.catalog.threads import read_catalog
from prefix_service.errors import StorageFailed, Unavailable

_PATIENCE: Final = 1.0  # seconds


class Following:
    """The catalog that this process follows, by its random id, and the revision up to which its changes are known."""

    def __init__(self, feed: ChangeFeed, catalog_id: str) -> None:
        self._feed, self.catalog_id = feed, catalog_id

    @property
    def revision(self) -> int:
        """The revision up to which changes are known."""
        return self._feed.revision

    @property
    def are_known(self) -> bool:
        """Whether the catalog could be read lately: what is remembered of it may be relied on."""
        return self._feed.are_known

    async def reach(self, revision: int) -> None:
        """Looks for changes up to a revision that was committed, if they are not known yet.

        Raises:
            Unavailable: they cannot be read now.
        """
        if self._feed.revision < revision:
            try:
                with anyio.fail_after(_PATIENCE):
                    await read_catalog(self._feed.catch_up)
            except (TimeoutError, StorageFailed) as error:
                raise _too_early() from error
        if self._feed.revision < revision:
            raise _too_early()


def _too_early() -> Unavailable:
    return Unavailable("this process does not know the changes up to Prefix-Min-Revision yet: try again")

"""Streams that stay open have a bound, and each tenant a quarter of it."""

import contextlib

import pytest

from prefix_service.api.http.watchers import Watchers
from prefix_service.errors import Overloaded


def test_streams_are_bounded() -> None:
    """One tenant takes its share, the platform what is left, and a place that is given back is taken again."""
    watchers = Watchers(8)
    with contextlib.ExitStack() as open_streams:
        first = contextlib.ExitStack()
        first.enter_context(watchers.watching("acme"))
        open_streams.enter_context(watchers.watching("acme"))
        with pytest.raises(Overloaded, match="tenant 'acme' has 2 streams open"), watchers.watching("acme"):
            pass
        for _ in range(6):
            open_streams.enter_context(watchers.watching(None))
        with pytest.raises(Overloaded, match="8 streams are open"), watchers.watching("beta"):
            pass
        first.close()
        with watchers.watching("beta"):
            pass
    assert not watchers._of

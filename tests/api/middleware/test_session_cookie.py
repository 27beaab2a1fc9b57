"""`api.middleware.session_cookie` reads the id of a session from the cookies of a request."""

import pytest

from prefix_service.api.middleware.session_cookie import session_of


def _found(value: str) -> str | None:
    headers = [(b"x-prefix-csrf", b"1"), (b"cookie", f"theme=dark; prefix-session={value}".encode())]
    return session_of({"type": "http", "method": "GET", "headers": headers})


def test_a_cookie_among_others() -> None:
    """The id is found behind another cookie."""
    assert _found("y" * 55) == "y" * 55


@pytest.mark.parametrize("value", ["", "x", "y" * 54, "y" * 56, "é" * 55])
def test_cookies_that_are_none(value: str) -> None:
    """A value that is no id is no session."""
    assert _found(value) is None

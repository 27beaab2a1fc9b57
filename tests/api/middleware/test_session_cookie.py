"""`api.middleware.session_cookie` reads the id of a session from the cookies of a request."""

import pytest

from prefix_service.api.middleware.session_cookie import cookie_of, session_of
from prefix_service.errors import Unauthenticated


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


@pytest.mark.parametrize("origin", [None, "https://prefix.example.com", "http://prefix.example.com"])
def test_the_cookie_of_the_host_counts_before_others(origin: str | None) -> None:
    """A session that another host has planted, which cannot have the prefix `__Host-`, displaces none."""
    planted, own = f"prefix-session={'x' * 55}", f"__Host-prefix-session={'y' * 55}"
    assert _found_in(f"{planted}; {own}", origin) == "y" * 55


@pytest.mark.parametrize(("origin", "counts"), [(None, True), ("http://h", True), ("https://h", False)])
def test_the_cookie_without_a_prefix_counts_without_tls(origin: str | None, counts: bool) -> None:
    """Behind TLS it was planted."""
    assert _found_in(f"prefix-session={'x' * 55}", origin) == ("x" * 55 if counts else None)


def test_a_session_behind_tls_counts_for_its_own_page_alone() -> None:
    """A page of another site that has the cookie sent is refused, and the message says why."""
    headers = [
        (b"x-prefix-csrf", b"1"),
        (b"cookie", f"__Host-prefix-session={'y' * 55}".encode()),
        (b"origin", b"https://evil.example"),
        (b"host", b"prefix.example.com"),
    ]
    with pytest.raises(Unauthenticated, match=r"has the Origin 'https://evil.example' and the Host"):
        session_of({"type": "http", "method": "POST", "headers": headers})


def _found_in(cookies: str, origin: str | None) -> str | None:
    headers = [(b"cookie", cookies.encode())] + ([] if origin is None else [(b"origin", origin.encode())])
    return cookie_of({"type": "http", "method": "GET", "headers": headers})

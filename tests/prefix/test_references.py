"""`prefix.references`: which names and references are valid, and what each refers to."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_service.errors import InvalidReference
from prefix_service.prefix.references import Reference, check_alias, check_name, parse_qualified, parse_reference

NAME = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
DIGEST = "sha256:" + "0123456789abcdef" * 4
names = st.from_regex(NAME, fullmatch=True).filter(lambda name: ".." not in name)
aliases = names.filter(lambda name: not name.isdigit() and name != "latest")
versions = st.integers(1, 10**18 - 1)
digests = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
texts = st.text(max_size=8) | st.text("a0.-_@/:A\n", max_size=70) | names


@given(texts)
def test_a_name_is_what_the_contract_says(text: str) -> None:
    """Accepted exactly when the published expression matches and no two dots meet."""
    if re.fullmatch(NAME, text) and ".." not in text:
        assert check_name("tenant", text) == text
    else:
        with pytest.raises(InvalidReference, match=r"tenant .* is not a name"):
            check_name("tenant", text)


@pytest.mark.parametrize(
    "name", ["", "A", "a/b", "a\n", "\u00e4", "-a", "a-", ".a", "a..b", "a" * 65, "a%2fb", "\u0663"]
)
def test_a_bad_name(name: str) -> None:
    """Empty, upper case, separators, line ends, other scripts, edges, length."""
    with pytest.raises(InvalidReference):
        check_name("adapter", name)


@given(names)
def test_an_alias_is_never_taken_for_a_version(name: str) -> None:
    """Neither all digits nor `latest`."""
    if name.isdigit() or name == "latest":
        with pytest.raises(InvalidReference, match="would be taken for a version"):
            check_alias(name)
    else:
        assert check_alias(name) == name


@given(names)
def test_a_bare_name_means_its_latest(name: str) -> None:
    """In reads; whether a selector was written is remembered."""
    reference = parse_reference(name)
    assert reference == Reference(name, "latest", explicit=False)
    assert not reference.immutable
    assert parse_reference(f"{name}@latest") == Reference(name, "latest", explicit=True)


@given(names, versions)
def test_a_number_means_that_version(name: str, number: int) -> None:
    """For ever."""
    reference = parse_reference(f"{name}@{number}")
    assert (reference.version, reference.digest, reference.immutable) == (number, None, True)


@given(names, digests)
def test_a_digest_means_that_content(name: str, digest: str) -> None:
    """For ever."""
    reference = parse_reference(f"{name}@{digest}")
    assert (reference.version, reference.digest, reference.immutable) == (None, digest, True)


@given(names, aliases)
def test_another_selector_is_an_alias(name: str, alias: str) -> None:
    """It may move."""
    reference = parse_reference(f"{name}@{alias}")
    assert (reference.selector, reference.immutable) == (alias, False)


@given(names, names, st.none() | versions.map(str) | digests | aliases)
def test_a_reference_is_written_as_it_was_read(tenant: str, name: str, selector: str | None) -> None:
    """`str` is the inverse of parsing, also behind a tenant."""
    text = name if selector is None else f"{name}@{selector}"
    assert str(parse_reference(text)) == text
    assert parse_qualified(f"{tenant}/{text}") == (tenant, parse_reference(text))


@pytest.mark.parametrize(
    "text",
    [
        "a@",
        "@1",
        "a@0",
        "a@01",
        "a@-1",
        "a@1000000000000000000",
        "a@\u0661",
        "a@\u00b2",
        "a@sha256:",
        f"a@{DIGEST}0",
        f"a@{DIGEST.upper()}",
        "a@md5:0",
        "a@b@c",
        "a@b/c",
        "a@B",
        "a/b@1",
        "a@1\n",
    ],
)
def test_another_reference_is_refused(text: str) -> None:
    """Half a selector, zero, other digits, other digests, too many parts."""
    with pytest.raises(InvalidReference):
        parse_reference(text)


@pytest.mark.parametrize("text", ["a", "/a", "a/", "a/b/c", "A/b"])
def test_a_qualified_reference_has_one_tenant(text: str) -> None:
    """A tenant, a slash, and a reference."""
    with pytest.raises(InvalidReference):
        parse_qualified(text)

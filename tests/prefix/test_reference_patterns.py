"""The patterns of the OpenAPI document match exactly the texts that parsing accepts."""

import re
from collections.abc import Callable

import pytest

from prefix_service.errors import InvalidReference
from prefix_service.prefix import references
from prefix_service.prefix.references import check_alias, check_name, parse_qualified, parse_reference

DIGEST = "sha256:" + "0" * 64
NAMES = ("a", "0", "a.b", "a..b", "a-_b", ".a", "a.", "A", "", "a" * 64, "a" * 65, "latest", "latest1", "12", "1a")
SELECTORS = ("", "@", "@1", "@0", "@01", "@" + "9" * 18, "@" + "9" * 19, f"@{DIGEST}", f"@{DIGEST}0", "@sha256:", "@@")
REFERENCES = sorted({name + selector for name in NAMES for selector in (*SELECTORS, *(f"@{name}" for name in NAMES))})
PARSED: dict[str, tuple[Callable[[str], object], list[str]]] = {
    references.NAME_PATTERN: (lambda text: check_name("adapter", text), list(NAMES)),
    references.ALIAS_PATTERN: (check_alias, list(NAMES)),
    references.REFERENCE_PATTERN: (parse_reference, REFERENCES),
    references.SELECTOR_PATTERN: (
        lambda text: parse_reference(f"a@{text}"),
        [selector.removeprefix("@") for selector in SELECTORS] + list(NAMES),
    ),
    references.QUALIFIED_PATTERN: (
        parse_qualified,
        [*REFERENCES, *(f"{tenant}/{reference}" for tenant in ("a", "a..b", "") for reference in REFERENCES)],
    ),
}


def is_parsed(parse: Callable[[str], object], text: str) -> bool:
    """Returns whether parsing accepts the text."""
    try:
        parse(text)
    except InvalidReference:
        return False
    return True


@pytest.mark.parametrize("pattern", PARSED, ids=["name", "alias", "reference", "selector", "qualified"])
def test_a_pattern_matches_what_is_parsed(pattern: str) -> None:
    """Each pattern matches exactly the accepted texts, among which some are accepted and some refused."""
    parse, texts = PARSED[pattern]
    expected = {text: is_parsed(parse, text) for text in texts}
    assert {text: re.search(pattern, text) is not None for text in texts} == expected
    assert set(expected.values()) == {True, False}


@pytest.mark.parametrize("text", REFERENCES, ids=range(len(REFERENCES)))
def test_what_can_be_deleted(text: str) -> None:
    """`DELETABLE_PATTERN` matches an adapter, or the version that a number or digest names."""
    can_be = is_parsed(parse_reference, text) and (
        not parse_reference(text).explicit or parse_reference(text).immutable
    )
    assert (re.search(references.DELETABLE_PATTERN, text) is not None) == can_be

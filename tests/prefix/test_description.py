"""`prefix.description`: what a model card and annotations may be."""

from typing import Any

import pytest

from prefix_service.errors import InvalidRequest, TooLarge
from prefix_service.prefix.description import (
    MOST_ANNOTATIONS,
    MOST_CARD,
    MOST_VALUE,
    Description,
    check_annotations,
    check_card,
    decode_card,
)


def test_a_card_is_kept_as_it_is() -> None:
    """Line ends, a byte order mark and characters of other languages included."""
    text = "\ufeff# Résumé\r\n\t日本語\n"
    assert decode_card(text.encode()) == text
    assert decode_card(b"") == ""


@pytest.mark.parametrize("text", ["x" * MOST_CARD, "é" * (MOST_CARD // 2)])
def test_a_card_may_be_as_long_as_it_may_be(text: str) -> None:
    """The bound is in bytes of UTF-8."""
    assert check_card(text) == text
    with pytest.raises(TooLarge, match=f"may have {MOST_CARD} bytes: shorten it"):
        check_card(text + "x")


def test_a_card_is_text() -> None:
    """The error names the place."""
    with pytest.raises(InvalidRequest, match="not UTF-8: byte 2 is 0xff"):
        decode_card(b"# \xff")
    with pytest.raises(InvalidRequest, match="the card contains a NUL at character 2"):
        decode_card(b"# \0")


def test_annotations_are_ordered_by_key() -> None:
    """So that the same ones have the same entity tag."""
    assert list(check_annotations({"b": "2", "a/x_.-9": ""}).items()) == [("a/x_.-9", ""), ("b", "2")]


def test_annotations_may_be_as_large_as_they_may_be() -> None:
    """In number, key and value; the value's bound is in bytes of UTF-8."""
    most = {f"k{number}": "é" * (MOST_VALUE // 2) for number in range(MOST_ANNOTATIONS - 1)} | {"k" * 63: "v"}
    assert check_annotations(most) == most


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({f"k{number}": "" for number in range(MOST_ANNOTATIONS + 1)}, "65 annotations, and a version may have 64"),
        ({"": "x"}, "key has 1 to 63 characters"),
        ({"k" * 64: "x"}, "key has 1 to 63 characters"),
        ({"a b": "x"}, "got 'a b'"),
        ({"é": "x"}, "letters, digits"),
        ({"a\n": "x"}, "key has 1 to 63"),
        ({"loss": 0.5}, "annotation loss must be text, got 0.5: write it in quotes"),
        ({"loss": None}, "annotation loss must be text"),
        ({"a": "x" * (MOST_VALUE + 1)}, "annotation a has more than 4096 bytes"),
        ({"a": "é" * (MOST_VALUE // 2) + "x"}, "annotation a has more than 4096 bytes"),
        ({"a": "\0"}, "annotation a contains a NUL"),
    ],
)
def test_wrong_annotations_are_refused(wrong: dict[str, Any], words: str) -> None:
    """In words that name the entry."""
    with pytest.raises(InvalidRequest, match=words):
        check_annotations(wrong)


def test_bytes_are_those_of_all_texts() -> None:
    """In UTF-8, keys included."""
    assert Description("é", {"ab": "ö", "c": ""}).nbytes == 2 + 2 + 2 + 1
    assert Description().nbytes == 0

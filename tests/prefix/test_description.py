"""`prefix.description` bounds and checks model cards and annotations."""

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
    """Decoding keeps line ends, a byte order mark and characters of other languages."""
    text = "\ufeff# Résumé\r\n\t日本語\n"
    assert decode_card(text.encode()) == text
    assert decode_card(b"") == ""


@pytest.mark.parametrize("text", ["x" * MOST_CARD, "é" * (MOST_CARD // 2)])
def test_a_card_may_be_as_long_as_it_may_be(text: str) -> None:
    """A card of exactly the allowed number of UTF-8 bytes is accepted, and one more byte is refused."""
    assert check_card(text) == text
    with pytest.raises(TooLarge, match=f"may have {MOST_CARD} bytes: shorten it"):
        check_card(text + "x")


def test_a_card_is_text() -> None:
    """The error names the byte or character of a card that is not text."""
    with pytest.raises(InvalidRequest, match="not UTF-8: byte 2 is 0xff"):
        decode_card(b"# \xff")
    with pytest.raises(InvalidRequest, match="the card contains a NUL at character 2"):
        decode_card(b"# \0")


def test_annotations_are_ordered_by_key() -> None:
    """Annotations are sorted by key, so that equal annotations have equal entity tags."""
    assert list(check_annotations({"b": "2", "a/x_.-9": ""}).items()) == [("a/x_.-9", ""), ("b", "2")]


def test_annotations_may_be_as_large_as_they_may_be() -> None:
    """Annotations are accepted up to their bounds in number, key length, and value length in UTF-8 bytes."""
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
    """The error names the annotation that breaks a rule."""
    with pytest.raises(InvalidRequest, match=words):
        check_annotations(wrong)


def test_bytes_are_those_of_all_texts() -> None:
    """`nbytes` counts the UTF-8 bytes of the card and of every key and value."""
    assert Description("é", {"ab": "ö", "c": ""}).nbytes == 2 + 2 + 2 + 1
    assert Description().nbytes == 0

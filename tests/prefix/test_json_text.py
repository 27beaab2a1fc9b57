"""`prefix.json_text` refuses lone surrogates, and shortens values in messages."""

import pytest

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.json_text import parse_json, shown


def test_a_surrogate_pair_is_text() -> None:
    """A pair of escaped surrogates is one character, as RFC 8259, section 7, writes those beyond the first plane."""
    assert parse_json(b'{"\\ud83d\\ude00": ["\\ud83d\\ude00"]}', "it") == {"😀": ["😀"]}


@pytest.mark.parametrize("text", [b'"\\ud83d"', b'["\\ude00"]', b'{"\\ud83d": 1}', b'[[{"a": ["\\ud83dx"]}]]'])
def test_half_of_a_pair_is_none(text: bytes) -> None:
    """Half of a surrogate pair is refused wherever it stands."""
    with pytest.raises(InvalidConfig, match="surrogates not allowed"):
        parse_json(b'{"a": ' + text + b"}", "it")


def test_a_shown_value_is_short_whatever_its_size() -> None:
    """`shown` writes a value as Python does and cuts it at its bound."""
    assert shown({"a": [1, "x"]}) == "{'a': [1, 'x']}"
    for value in ("x" * 1000, [1] * 1000, {str(number): number for number in range(1000)}, [[["x" * 1000] * 99] * 99]):
        assert len(shown(value)) == 80
        assert shown(value).endswith("...")
        assert len(shown(value, 40)) == 40

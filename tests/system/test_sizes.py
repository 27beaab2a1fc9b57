"""Sizes as a person writes them."""

import pytest

from prefix_service.errors import InvalidInput
from prefix_service.system.sizes import parse_bytes, written_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("500MB", 500_000_000),
        ("4GB", 4_000_000_000),
        ("20GiB", 20 << 30),
        ("1.5 GiB", 3 << 29),
        ("10gib", 10 << 30),
        (" 7 b ", 7),
        ("0.5KiB", 512),
        ("1TB", 10**12),
    ],
)
def test_binary_and_decimal_units(text: str, nbytes: int) -> None:
    """With or without a blank, in any case."""
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "plenty", "-1", "7 parsecs", "4,5GB", "4GB or so", "GiB", "1e9", "٤GB", "4 G iB"])
def test_what_is_no_size(text: str) -> None:
    """The text is read to its end, and is in the error."""
    with pytest.raises(InvalidInput, match="is not a size: write it as in 20GiB"):
        parse_bytes(text)


def test_a_part_of_a_byte() -> None:
    """Sizes are exact: nothing is rounded."""
    with pytest.raises(InvalidInput, match="not a whole number of bytes"):
        parse_bytes("1.0001KB")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(4 << 30, "4GiB"), (3 << 29, "1536MiB"), (64 << 20, "64MiB"), (4096, "4096"), (10**9, "1000000000"), (0, "0")],
)
def test_a_size_is_written_exactly(nbytes: int, text: str) -> None:
    """In the largest unit without a remainder, and read again as the same."""
    assert written_bytes(nbytes) == text
    assert parse_bytes(text) == nbytes

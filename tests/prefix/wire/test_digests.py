"""`prefix.wire.digests` writes and parses digests as HTTP fields hold them."""

import hashlib

import pytest

from prefix_service.prefix.wire.digests import Algorithm, format_digest, new_hasher, parse_digests, wanted_algorithm

CHECKED = b"123456789"


def test_crc32c_has_the_known_check_value() -> None:
    """The CRC-32C of "123456789", whole or in pieces, is 0xE3069283, as in RFC 3720, appendix B.4."""
    hasher = new_hasher("crc32c")
    for piece in (CHECKED[:4], bytearray(CHECKED[4:5]), memoryview(CHECKED)[5:]):
        hasher.update(piece)
    assert hasher.digest() == bytes.fromhex("e3069283")
    assert format_digest("crc32c", hasher.digest()) == "crc32c=:4waSgw==:"


def test_sha_256_is_hashlibs() -> None:
    """The hasher for sha-256 gives hashlib's digest."""
    hasher = new_hasher("sha-256")
    hasher.update(CHECKED)
    assert hasher.digest() == hashlib.sha256(CHECKED).digest()


@pytest.mark.parametrize(
    ("field", "algorithm"),
    [
        ("", None),
        ("sha-256", "sha-256"),
        ("sha-256=1", "sha-256"),
        ("SHA-256=1", "sha-256"),
        ("crc32c=10", "crc32c"),
        (" sha-256=3 ,  crc32c=7", "crc32c"),
        ("sha-256=5, crc32c=5", "sha-256"),
        ("sha-512=10, unixsum=4, crc32c=1", "crc32c"),
        ("sha-256=0, crc32c=0", None),
        ("sha-256=0", None),
        ("sha-2560=1, xcrc32c=3", None),
        ("sha-256=²", "sha-256"),
        ("sha-256=999999", "sha-256"),
    ],
)
def test_the_highest_preference_is_wanted(field: str, algorithm: Algorithm | None) -> None:
    """Unknown algorithms are ignored, zero excludes one, and a malformed preference counts as a wish."""
    assert wanted_algorithm(field) == algorithm


def test_digests_are_read_by_algorithm() -> None:
    """Parsing returns a field's digests but for those that are malformed, unknown or of a wrong length."""
    sha256 = hashlib.sha256(CHECKED).digest()
    field = ", ".join([format_digest("sha-256", sha256), "crc32c=:4waSgw==:", "md5=:AAAA:"])
    assert parse_digests(field) == {"sha-256": sha256, "crc32c": bytes.fromhex("e3069283")}
    values = ("crc32c", "crc32c=", "crc32c=:", "crc32c=4waSgw==", "crc32c=:4waS*w==:", "crc32c=:4waS\xaaw==:")
    for damaged in ("", *values, "crc32c=:4waS:"):
        assert parse_digests(damaged) == {}

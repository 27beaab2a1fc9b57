"""`client.cache.fingerprints`: bounded in number."""

from prefix_service.client.cache import fingerprints
from prefix_service.client.cache.fingerprints import Fingerprints
from prefix_service.prefix.fingerprint import Fingerprint


def test_what_was_read_first_leaves_first() -> None:
    """Reading it again makes it the last one."""
    known = Fingerprints()
    for number in range(fingerprints._MOST):
        known.put(f"a/b@{number}", Fingerprint(tokenizer=str(number)))
    known.put("a/b@0", Fingerprint(tokenizer="again"))
    known.put("a/b@new", Fingerprint())
    assert known.get("a/b@1") is None
    assert known.get("a/b@0") == Fingerprint(tokenizer="again")
    assert known.get("a/b@2") == Fingerprint(tokenizer="2")
    assert known.get("a/b@new") == Fingerprint()

"""Salts for the hashes of vLLM's blocks, so that blocks behind a prefix are found for that prefix only.

The placeholders of all adapters are the same ids. Without a salt, vLLM's prefix cache would take one adapter's blocks
for another's, or for those of a plain prompt.
"""

import hashlib
import hmac
import json
import secrets

from prefix_service.client.vllm.composition import Composition


class Salts:
    """The salts of one engine. A secret of this process keeps a request from guessing the salt of another."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def of(self, composition: Composition, own: str | None) -> str:
        """Returns the salt of a composition for a request with a salt of its `own`."""
        versions = [[version.tenant, version.adapter, version.digest] for version in composition.versions]
        named = json.dumps([versions, own]).encode()
        return hmac.new(self._secret, named, hashlib.sha256).hexdigest()


def shown_salt(salt: str) -> str:
    """Returns what others may see of a salt: equal for equal salts, and no salt that a request could be sent with.

    A salt has 256 bits that nobody can guess, so its hash needs no key.
    """
    return hashlib.sha256(f"shown:{salt}".encode()).hexdigest()

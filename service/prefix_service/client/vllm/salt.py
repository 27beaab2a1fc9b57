"""The salt under which vLLM keeps blocks: what stands behind a prefix belongs to that prefix alone.

Placeholders of all adapters are the same ids, so that vLLM's prefix cache would take one adapter's blocks for
another's, or for those of a plain prompt.
"""

import hashlib
import hmac
import json
import secrets


class Salts:
    """Salts of one engine: a secret of this process keeps requests from naming another's salt."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def of(self, tenant: str, adapter: str, digest: str, own: str | None) -> str:
        """The salt of a version for a request with a salt of its `own`."""
        named = json.dumps([tenant, adapter, digest, own]).encode()
        return hmac.new(self._secret, named, hashlib.sha256).hexdigest()

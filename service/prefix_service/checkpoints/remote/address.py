"""Addresses of adapters that are kept elsewhere: `hf://…`, `s3://…`, `oci://…`."""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

from prefix_service.errors import InvalidRequest

FORMS: Final = {
    "hf": "hf://owner/repo[@revision][/path]",
    "s3": "s3://bucket/path",
    "oci": "oci://registry/repository:tag or oci://registry/repository@sha256:…",
}
"""The form of the addresses of each scheme."""

_MOST: Final = 1024  # characters
_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_PATTERNS: Final = {
    "hf": re.compile(rf"(?P<place>{_NAME}/{_NAME})(?:@(?P<revision>[^/@]+))?(?:/(?P<path>.+))?"),
    "s3": re.compile(r"(?P<place>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/(?P<path>.+)"),
    "oci": re.compile(
        r"(?P<place>(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?)/"
        r"(?P<path>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
        r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})|@(?P<revision>sha256:[0-9a-f]{64}))"
    ),
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where an adapter is kept.

    `place` is the repository of a hub, the bucket, or the registry; `revision` a branch, tag or commit, or the tag or
    digest of an artifact; `path` a folder or a file in the place, or the artifact's repository.
    """

    scheme: str
    place: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        path = f"/{self.path}" if self.path else ""
        if self.scheme == "oci":
            return f"oci://{self.place}{path}{'@' if ':' in str(self.revision) else ':'}{self.revision}"
        return f"{self.scheme}://{self.place}{'' if self.revision is None else f'@{self.revision}'}{path}"


def is_address(word: str) -> bool:
    """Returns whether a word of the command line is an address, and not a path of this machine."""
    return "://" in word


def parse_address(word: str) -> Address:
    """Returns the address that a word is.

    Raises:
        InvalidRequest: the scheme is unknown; or the address is malformed, too long, or has a user, a query or a
            fragment. The message does not repeat the address, in which a secret may stand.
    """
    scheme, _, rest = word.partition("://")
    if scheme not in FORMS:
        raise InvalidRequest(
            f"{scheme!r:.20} is no scheme that is known: give a folder, or {', '.join(FORMS.values())}"
        )
    if "?" in rest or "#" in rest or "@" in rest.split("/", 1)[0]:
        raise InvalidRequest(
            f"an address takes no user, query or fragment: give {FORMS[scheme]}, and credentials as that service's own "
            "tools take them"
        )
    found = _PATTERNS[scheme].fullmatch(rest) if len(rest) <= _MOST and rest.isprintable() else None
    if found is None:
        raise InvalidRequest(f"the address is malformed: give {FORMS[scheme]}")
    parts = found.groupdict()
    path = (parts["path"] or "").strip("/")
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise InvalidRequest(
            f"the path {path!r:.100} has an empty part, . or ..: name a folder or file below the place"
        )
    revision = parts.get("tag") or parts.get("revision")
    return Address(scheme, parts["place"], None if revision is None else unquote(revision), path)

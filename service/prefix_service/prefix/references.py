"""Names and references: `tenant/adapter@version`, where a version is a number, `latest`, an alias or a digest."""

import re
from dataclasses import dataclass
from typing import Final

from prefix_service.errors import InvalidReference

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
LATEST: Final = "latest"

_NO_DOTS: Final = r"(?!.*\.\.)"
_NO_NUMBER: Final = r"(?![0-9]+$)"
_REFERENCE: Final = f"{_NAME.pattern}(?:@(?:{_DIGEST.pattern}|{_VERSION.pattern}|{_NO_NUMBER}{_NAME.pattern}))?"
NAME_PATTERN: Final = f"^{_NO_DOTS}{_NAME.pattern}$"
ALIAS_PATTERN: Final = f"^{_NO_DOTS}{_NO_NUMBER}(?!{LATEST}$){_NAME.pattern}$"
SELECTOR_PATTERN: Final = f"^{_NO_DOTS}(?:{_DIGEST.pattern}|{_VERSION.pattern}|{_NO_NUMBER}{_NAME.pattern})$"
DELETABLE_PATTERN: Final = f"^{_NO_DOTS}{_NAME.pattern}(?:@(?:{_DIGEST.pattern}|{_VERSION.pattern}))?$"
REFERENCE_PATTERN: Final = f"^{_NO_DOTS}{_REFERENCE}$"
QUALIFIED_PATTERN: Final = f"^{_NO_DOTS}{_NAME.pattern}/{_REFERENCE}$"
"""The names and references that the functions below accept, as patterns (ECMA-262) for the OpenAPI document."""


@dataclass(frozen=True, slots=True)
class Reference:
    """An adapter and the selector behind `@`: a version number, a digest, an alias, or `latest`."""

    adapter: str
    selector: str = LATEST
    explicit: bool = False
    """Whether the text of the reference has a selector."""

    def __str__(self) -> str:
        return f"{self.adapter}@{self.selector}" if self.explicit else self.adapter

    @property
    def version(self) -> int | None:
        """The version number, if the selector is one."""
        return int(self.selector) if self.selector.isdigit() else None

    @property
    def digest(self) -> str | None:
        """The digest, if the selector is one."""
        return self.selector if self.selector.startswith("sha256:") else None

    @property
    def immutable(self) -> bool:
        """Whether the reference always means the same version."""
        return self.version is not None or self.digest is not None


def is_digest(text: str) -> bool:
    """Returns whether a text is a version's digest, `sha256:<64 hex>`."""
    return _DIGEST.fullmatch(text) is not None


def check_name(kind: str, name: str) -> str:
    """Returns the name of a tenant, adapter or alias if it is well-formed.

    Raises:
        InvalidReference: the name is malformed.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidReference(
            f"{kind} {name!r:.100} is not a name: 1 to 64 of a-z 0-9 . _ -, beginning and ending with a letter or "
            "digit, never two dots in a row"
        )
    return name


def check_alias(name: str) -> str:
    """Returns an alias if it is well-formed: a name that is neither all digits nor `latest`.

    Raises:
        InvalidReference: the alias is malformed.
    """
    check_name("alias", name)
    if name.isdigit() or name == LATEST:
        raise InvalidReference(
            f"alias {name!r} would be taken for a version: choose one that is not {LATEST} or a number"
        )
    return name


def parse_reference(text: str) -> Reference:
    """Returns the reference `name`, `name@7`, `name@prod`, `name@latest` or `name@sha256:<64 hex>`.

    Raises:
        InvalidReference: the text has another form.
    """
    adapter, at, selector = text.partition("@")
    check_name("adapter", adapter)
    if not at:
        return Reference(adapter)
    if selector.isdigit() or selector.startswith("sha256:"):
        if not (_VERSION.fullmatch(selector) or _DIGEST.fullmatch(selector)):
            raise InvalidReference(f"{selector!r:.100} is neither a version number nor sha256:<64 hex digits>")
    elif selector != LATEST:
        check_alias(selector)
    return Reference(adapter, selector, explicit=True)


def parse_qualified(text: str) -> tuple[str, Reference]:
    """Returns the tenant and the reference in `tenant/reference`.

    Raises:
        InvalidReference: the text has another form.
    """
    tenant, slash, rest = str(text).partition("/")
    if not slash:
        raise InvalidReference(f"{text!r:.100} names no tenant: write it as tenant/adapter, tenant/adapter@7, …")
    return check_name("tenant", tenant), parse_reference(rest)

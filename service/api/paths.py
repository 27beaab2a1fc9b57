"""What stands in paths, as the OpenAPI document tells it; the routes check it themselves, with this project's codes."""

from typing import Annotated, Final

from fastapi import Path

HEALTH: Final = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""The paths of the health routes, which need no key and are always answered."""

_NAME: Final = "[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
_SELECTOR: Final = f"(?:@(?:sha256:[0-9a-f]{{64}}|{_NAME}))?"

TenantPath = Annotated[str, Path(description="the tenant", json_schema_extra={"pattern": f"^{_NAME}$"})]
NamePath = Annotated[str, Path(description="the adapter", json_schema_extra={"pattern": f"^{_NAME}$"})]
AliasPath = Annotated[
    str, Path(description="the alias: not a number, not latest", json_schema_extra={"pattern": f"^{_NAME}$"})
]
RefPath = Annotated[
    str,
    Path(
        description="name, name@7, name@alias, name@latest or name@sha256:…",
        json_schema_extra={"pattern": f"^{_NAME}{_SELECTOR}$"},
    ),
]
KeyPath = Annotated[str, Path(description="the key's id")]

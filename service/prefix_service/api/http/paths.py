"""Path parameters for the OpenAPI document. Routes check the values themselves, with this project's error codes."""

import re
from typing import Annotated, Final

from fastapi import Path

from prefix_service.prefix.references import (
    ALIAS_PATTERN,
    DELETABLE_PATTERN,
    NAME_PATTERN,
    REFERENCE_PATTERN,
    SELECTOR_PATTERN,
)

HEALTH: Final = frozenset({"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""The paths of the health routes, which need no key and are never refused."""

WATCHED: Final = "/v1/changes"
"""The path whose requests wait for changes."""

LIVE: Final = re.compile(r"/v1/(?:tenants/[^/]+/)?live")
"""The paths whose answers can be streams."""

REFERENCE_FILES: Final = {
    "/docs": ("page.html", "text/html; charset=utf-8"),
    "/docs/start.js": ("start.js", "text/javascript; charset=utf-8"),
    "/docs/swagger-ui-bundle.js": ("swagger-ui-bundle.js", "text/javascript; charset=utf-8"),
    "/docs/swagger-ui.css": ("swagger-ui.css", "text/css; charset=utf-8"),
    "/docs/favicon-32x32.png": ("favicon-32x32.png", "image/png"),
}
"""The paths of the API reference, which need no key: each with its file in `api/swagger_ui/` and its media type."""

TenantPath = Annotated[str, Path(description="the tenant", json_schema_extra={"pattern": NAME_PATTERN})]
NamePath = Annotated[str, Path(description="the adapter", json_schema_extra={"pattern": NAME_PATTERN})]
AliasPath = Annotated[
    str, Path(description="the alias: not a number, not latest", json_schema_extra={"pattern": ALIAS_PATTERN})
]
RefPath = Annotated[
    str,
    Path(
        description="name, name@7, name@alias, name@latest or name@sha256:…",
        json_schema_extra={"pattern": REFERENCE_PATTERN},
    ),
]
DeletablePath = Annotated[
    str,
    Path(description="name, name@7 or name@sha256:…", json_schema_extra={"pattern": DELETABLE_PATTERN}),
]
SelectorPath = Annotated[
    str,
    Path(
        description="the version's number, or an alias, digest or latest",
        json_schema_extra={"pattern": SELECTOR_PATTERN},
    ),
]
KeyPath = Annotated[str, Path(description="the key's id", json_schema_extra={"pattern": "^[0-9a-f]{16}$"})]

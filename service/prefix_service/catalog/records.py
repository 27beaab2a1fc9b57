"""The rows that the catalog returns. They are immutable."""

import json
import sys
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Final, Literal

from prefix_service.prefix.config import PrefixConfig, parse_read_fields
from prefix_service.prefix.variant import KVDtype

Scope = Literal["metrics", "read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("metrics", "read", "write", "admin")
"""From the smallest to the largest; each holds those before it. Only keys of the platform have `metrics`."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller of a request: a tenant, or the platform (`tenant` None), with a scope.

    `tenant_id` is the tenant's id in the catalog. `acts_on` is the id of the tenant whose things the request changes,
    as it was when the request began; None if the request names no tenant, or one that did not exist. Without a key
    (`has_key` false) it is somebody whom the operating system has let in, and nothing has to be proved.
    `session` is the hash of the session of the page that stands for the key in this request; None for the key itself.
    """

    key_id: str
    tenant: str | None
    scope: Scope
    tenant_id: int | None = None
    acts_on: int | None = None
    has_key: bool = True
    session: str | None = None

    def may_see(self, tenant: str) -> bool:
        """Whether this tenant's resources exist for the caller."""
        return self.tenant is None or self.tenant == tenant

    def has(self, scope: Scope) -> bool:
        """Whether the caller's scope holds this one."""
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


SERVICE: Final = Principal("service", None, "admin", has_key=False)
"""The service itself, where it mends what is its own."""

COMMAND_LINE: Final = Principal("command-line", None, "admin", has_key=False)
"""Who works on a data folder with the command line."""

DEV: Final = Principal("dev", None, "admin", has_key=False)
"""Every caller of a service in dev mode, which has no keys."""


PLATFORM: Final = "platform"
"""The actor in the audit of changes by keys of the platform."""

WITHOUT_KEY: Final = frozenset(by.key_id for by in (SERVICE, COMMAND_LINE, DEV))
"""What stands in the audit in place of a key's id."""


@dataclass(frozen=True, slots=True)
class Quotas:
    """Limits on what a tenant stores, and on its requests in a second; None is no limit."""

    max_adapters: int | None = None
    max_bytes: int | None = None
    requests_per_second: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant, its quotas, and what it has: adapters, bytes of all their versions, and bytes that it deleted and that
    have not been collected yet."""

    name: str
    created: datetime
    quotas: Quotas
    adapters: int
    bytes: int
    uncollected: int


@dataclass(frozen=True)
class NewVersion:
    """A version to be added to the catalog: its manifest, and values derived from it.

    `weights` and `key_values` are blob digests, sizes are bytes, `weights_dtype` is the dtype of the stored weights.
    """

    digest: str
    manifest: str
    base_model: str | None
    weights: str
    weights_bytes: int
    weights_dtype: KVDtype
    key_values: str
    key_values_bytes: int

    @property
    def manifest_bytes(self) -> int:
        """The length of the manifest in UTF-8."""
        return len(self.manifest.encode())

    @property
    def nbytes(self) -> int:
        """The bytes that count towards the tenant's quota, also if other tenants store the same content."""
        return self.weights_bytes + self.key_values_bytes + self.manifest_bytes


@dataclass(frozen=True)
class Version(NewVersion):
    """An immutable version of an adapter."""

    tenant: str
    adapter: str
    number: int
    created: datetime
    has_fingerprint: bool = False
    """Whether the fingerprint of its base model was given; not part of the version, since that may come later."""

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}@{self.number}"

    @property
    def config(self) -> dict[str, Any]:
        """The adapter's config, dimensions filled: parsed each time, which takes milliseconds where it is long."""
        config: dict[str, Any] = json.loads(self.manifest)["config"]
        return config

    @cached_property
    def prefix_config(self) -> PrefixConfig:
        """The fields of the config that the service reads, parsed once."""
        return parse_read_fields(self.config)

    @property
    def memory(self) -> int:
        """An estimate of the bytes of memory that this object takes, `prefix_config` included."""
        # The name of the base model is kept a second time in `prefix_config`; only these two may be long.
        return 3072 + sys.getsizeof(self.manifest) + 2 * sys.getsizeof(self.base_model)


@dataclass(frozen=True, slots=True)
class VersionName:
    """A version in the index of all: its name and digest."""

    tenant: str
    adapter: str
    number: int
    digest: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.adapter}@{self.number}"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in a listing: its newest version, how many there are, the bytes of all of them that count towards the
    tenant's quota, the requests for its prefixes that usage has counted, and its aliases."""

    latest: Version
    versions: int
    bytes: int
    used: int
    aliases: dict[str, int]


AdapterOrder = Literal["name", "-created", "-bytes", "-used"]
"""How a listing of adapters is sorted: by name; the latest publication, the most bytes, or the most used first."""


@dataclass(frozen=True, slots=True)
class AdapterPlace:
    """The position of an adapter in a listing. The listing is sorted by `key` before the name: None by name, the
    moment of the newest version with `-created`, the bytes of all versions with `-bytes`, requests with `-used`."""

    key: datetime | int | None
    name: str

    @classmethod
    def of(cls, adapter: Adapter, order: AdapterOrder) -> "AdapterPlace":
        """Returns the place of an adapter in a listing that is sorted so."""
        latest = adapter.latest
        key = {"name": None, "-created": latest.created, "-bytes": adapter.bytes, "-used": adapter.used}[order]
        return cls(key, latest.adapter)


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret; `tenant` is None for a platform key."""

    id: str
    tenant: str | None
    scope: Scope
    name: str
    created: datetime
    expires: datetime | None
    last_used: datetime | None


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change: who did what to which resource, and when. `tenant` is whose resource it was (None: the platform's),
    `actor` is the key's tenant, or `platform`. `key_name` is what the key is called, or was until it was revoked; None
    if there was no key, or the audit no longer says."""

    id: int
    at: datetime
    tenant: str | None
    actor: str
    key_id: str
    action: str
    target: str
    details: dict[str, Any]
    key_name: str | None = None


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Selects changes by their action, and by a text in their target, tenant, actor, key id or key name; case does not
    matter. With `hides_platform` the ids and names of the platform's keys are not searched, since the caller sees none
    of them."""

    action: str | None = None
    search: str | None = None
    hides_platform: bool = False


Dimension = Literal["adapter", "version", "key"]
"""What usage can be listed by, beside hour and tenant."""

OF_PLATFORM: Final = "platform:"
"""Begins the id under which a key of the platform is stored."""


@dataclass(slots=True)
class Use:
    """Requests for one version by one key within an hour, named by its beginning (naive, in UTC): bytes that were sent,
    loads that they began, and prefix tokens, those of every row counted.

    Adapter "", version 0 and key "" mean any: in a listing that is not by them, and of what a tenant used beyond what
    is counted apart.
    """

    hour: datetime
    tenant: str
    adapter: str = ""
    version: int = 0
    key: str = ""
    requests: int = 0
    bytes: int = 0
    cold_loads: int = 0
    prefix_tokens: int = 0

    @property
    def place(self) -> tuple[datetime, str, str, int, str]:
        """Returns the position in a listing, which is sorted by it: no other entry of the listing has the same."""
        return self.hour, self.tenant, self.adapter, self.version, self.key

    def add(self, other: "Use") -> None:
        """Adds the counts of another."""
        self.requests += other.requests
        self.bytes += other.bytes
        self.cold_loads += other.cold_loads
        self.prefix_tokens += other.prefix_tokens


@dataclass(frozen=True, slots=True)
class Serving:
    """A serving process: its address, its release, the revision that it has applied, and its memory: the number of
    prefixes, their bytes on the device, and the bytes of renderings in host memory."""

    address: str | None
    release: str
    revision: int
    adapters: int
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica that serves now: when it started, when it was last seen, by the database's clock, and the sums of its
    processes; `revision` is that of the process that is furthest behind."""

    id: str
    started: datetime
    seen: datetime
    serving: Serving

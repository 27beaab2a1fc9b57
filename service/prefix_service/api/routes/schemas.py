"""The JSON of versions, adapters, tenants and problems, for routes and for the OpenAPI document. What one route alone
sends or takes is beside it."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field, PlainSerializer

from prefix_service.catalog.records import Adapter, Quotas, Tenant, Version
from prefix_service.library.request_model import INTEGRAL, RequestModel

Moment = Annotated[
    datetime, PlainSerializer(lambda at: at.replace(tzinfo=UTC).isoformat().replace("+00:00", "Z"), return_type=str)
]
"""A point in time, sent as RFC 3339 in UTC."""


class Problem(BaseModel):
    """RFC 9457; `code` is what a client may branch on."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    error: str = Field(default="", description="under /v2 alone: the detail, where Open Inference clients look for it")


class VersionSize(BaseModel):
    """Bytes that a version takes in the store."""

    weights: int
    key_values: int


class ResidencyState(BaseModel):
    """Whether a version is in memory, and where: in the worker process that answered, `process`. The service has so
    many `processes`, each with its own memory and pins."""

    resident: bool
    pinned: bool
    device: str
    process: int
    processes: int

    @classmethod
    def of(cls, found: Mapping[str, bool | str], processes: int) -> "ResidencyState":
        """Returns what was found in this process, which is one of `processes`."""
        return cls.model_validate({**found, "process": os.getpid(), "processes": processes})


class VersionSummary(BaseModel):
    """An immutable version of an adapter."""

    tenant: str
    adapter: str
    version: int
    digest: str
    created: Moment
    peft_type: str
    base_model_name_or_path: str | None
    dtype: str
    num_virtual_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    size: VersionSize
    aliases: list[str]

    @classmethod
    def of(cls, version: Version, aliases: dict[str, int]) -> "VersionSummary":
        """From the catalog's row and the adapter's aliases."""
        return cls(**_summary(version, aliases))


class VersionDetail(VersionSummary):
    """A version with its config, its parameter counts as PEFT defines them, and where it is in memory."""

    weights: str
    config: dict[str, Any]
    total_virtual_tokens: int
    prefix_embedding_dim: int
    trainable_parameters: int
    residency: ResidencyState

    @classmethod
    def about(cls, version: Version, aliases: dict[str, int], residency: ResidencyState) -> "VersionDetail":
        """Returns the detail of a version, with its adapter's aliases and its state in memory."""
        config = version.prefix_config
        return cls(
            **_summary(version, aliases),
            weights=version.weights,
            config=version.config,
            total_virtual_tokens=config.total_virtual_tokens,
            prefix_embedding_dim=config.prefix_embedding_dim or 0,
            trainable_parameters=config.trainable_parameters or 0,
            residency=residency,
        )


def _summary(version: Version, aliases: dict[str, int]) -> dict[str, Any]:
    config = version.prefix_config
    return {
        "tenant": version.tenant,
        "adapter": version.adapter,
        "version": version.number,
        "digest": version.digest,
        "created": version.created,
        "peft_type": config.peft_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "dtype": version.weights_dtype,
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_layers": config.num_layers,
        "num_kv_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "size": VersionSize(weights=version.weights_bytes, key_values=version.key_values_bytes),
        "aliases": sorted(name for name, number in aliases.items() if number == version.number),
    }


class AdapterItem(BaseModel):
    """An adapter in a listing: its newest version, the bytes of all versions, how often they are used, and all its
    aliases."""

    tenant: str
    adapter: str
    versions: int
    bytes: int = Field(description="of all versions, as they count towards the tenant's quota")
    used: int = Field(description="requests for its prefixes since it was made, as usage counts them")
    aliases: dict[str, int]
    latest: VersionSummary

    @classmethod
    def of(cls, adapter: Adapter) -> "AdapterItem":
        """From the catalog's row."""
        latest = VersionSummary.of(adapter.latest, adapter.aliases)
        return cls(
            tenant=latest.tenant,
            adapter=latest.adapter,
            versions=adapter.versions,
            bytes=adapter.bytes,
            used=adapter.used,
            aliases=adapter.aliases,
            latest=latest,
        )


class AdapterPage(BaseModel):
    """A page of a listing; `next` is the cursor of the following one, or null."""

    items: list[AdapterItem]
    next: str | None


class VersionPage(BaseModel):
    """Versions of an adapter, newest first; `next` is the cursor of older ones, or null."""

    items: list[VersionSummary]
    next: str | None


_Quota = Annotated[int | None, Field(ge=0, lt=1 << 63), INTEGRAL]


class TenantQuotas(RequestModel):
    """The limits of a tenant: adapters, bytes of all their versions, and requests per second; null means no limit."""

    max_adapters: _Quota = None
    max_bytes: _Quota = None
    requests_per_second: Annotated[int | None, Field(ge=1, lt=1 << 31), INTEGRAL] = None

    def quotas(self) -> Quotas:
        """For the catalog."""
        return Quotas(**self.model_dump())


class TenantItem(BaseModel):
    """A tenant, its quotas, and what it has: adapters, bytes of all their versions, and bytes that it deleted."""

    tenant: str
    created: Moment
    max_adapters: int | None
    max_bytes: int | None
    requests_per_second: int | None
    adapters: int
    bytes: int
    uncollected: int = Field(
        description="bytes that the tenant deleted and that are still on the disk; together with `bytes` they may be "
        "twice `max_bytes`"
    )

    @classmethod
    def of(cls, tenant: Tenant) -> "TenantItem":
        """From the catalog's row."""
        used = {"adapters": tenant.adapters, "bytes": tenant.bytes, "uncollected": tenant.uncollected}
        return cls(tenant=tenant.name, created=tenant.created, **asdict(tenant.quotas), **used)


class TenantPage(BaseModel):
    """Tenants in the order of their names."""

    items: list[TenantItem]
    next: str | None

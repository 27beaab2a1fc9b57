"""Pydantic models of the JSON that routes send and accept; the OpenAPI document is generated from them."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from prefix_service.catalog.records import Adapter, Quotas, Scope, Tenant, Version
from prefix_service.library.plan import QualifiedReference
from prefix_service.library.request_model import INTEGRAL, RequestModel
from prefix_service.prefix.description import (
    KEY_PATTERN,
    MOST_ANNOTATIONS,
    MOST_CARD,
    MOST_VALUE,
    Description,
    check_annotations,
    check_card,
)
from prefix_service.prefix.fingerprint import MOST_FINGERPRINT, MOST_MEMBERS, MOST_TEXT, OBJECTS, TEXTS
from prefix_service.prefix.mixed import MOST_IN_A_ROW

Moment = Annotated[
    datetime, PlainSerializer(lambda at: at.replace(tzinfo=UTC).isoformat().replace("+00:00", "Z"), return_type=str)
]
"""A point in time, sent as RFC 3339 in UTC."""


def _no_number(value: Any) -> Any:
    if not isinstance(value, str) or len(value) > 64:
        raise ValueError("a moment is written as text, as in 2027-01-31T12:00:00Z")
    return value


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
    """Whether a version is in memory, and where."""

    resident: bool
    pinned: bool
    device: str


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
    def about(cls, version: Version, aliases: dict[str, int], residency: dict[str, bool | str]) -> "VersionDetail":
        """Returns the detail of a version, with its adapter's aliases and its state in the registry."""
        config = version.prefix_config
        return cls(
            **_summary(version, aliases),
            weights=version.weights,
            config=version.config,
            total_virtual_tokens=config.total_virtual_tokens,
            prefix_embedding_dim=config.prefix_embedding_dim or 0,
            trainable_parameters=config.trainable_parameters or 0,
            residency=ResidencyState.model_validate(residency),
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


JSONObject = dict[Annotated[str, Field(max_length=1024)], Any]
"""An object with any members, whose number a field bounds."""


_CONFIG = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 20,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 8,
}


ANNOTATIONS_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "description": "texts by key: author, run, commit, metrics, …",
    "maxProperties": MOST_ANNOTATIONS,
    "propertyNames": {"pattern": KEY_PATTERN},
    "additionalProperties": {"type": "string", "maxLength": MOST_VALUE, "pattern": "^[^\\u0000]*$"},
    "examples": [{"run": "2026-11-26/3", "accuracy": "0.93"}],
}


FINGERPRINT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "description": f"the fingerprint of a base model: up to {MOST_FINGERPRINT >> 10} KiB of JSON, of what is known",
    "properties": {
        **{name: {"type": "string", "minLength": 1, "maxLength": MOST_TEXT} for name in TEXTS},
        **{name: {"type": "object", "maxProperties": MOST_MEMBERS} for name in OBJECTS},
    },
    "additionalProperties": False,
    "examples": [{"architecture": "LlamaForCausalLM", "sizes": {"hidden_size": 4096}, "rope": {"rope_theta": 500000}}],
}


class DescribedVersion(RequestModel):
    """The description that a version published as JSON can have."""

    # The bounds are those of the whole body: `description` looks at them once more, in bytes and with better words.
    card: str = Field(
        default="",
        max_length=1 << 20,
        description="the model card in Markdown: up to 256 KiB of UTF-8",
        json_schema_extra={"maxLength": MOST_CARD, "pattern": "^[^\\u0000]*$"},
    )
    annotations: Annotated[JSONObject, Field(max_length=1 << 16), WithJsonSchema(ANNOTATIONS_SCHEMA)] = Field(
        default_factory=dict
    )

    def description(self) -> Description:
        """Returns card and annotations.

        Raises:
            TooLarge, InvalidRequest: they are not what a version may have.
        """
        return Description(check_card(self.card), check_annotations(self.annotations))


class FreshVersion(DescribedVersion):
    """An untrained prefix from a config alone, to try a worker's shapes before training."""

    config: JSONObject = Field(max_length=1024, examples=[_CONFIG])
    init_weights: Literal["random", "zero"] = "random"
    seed: Annotated[int, Field(ge=0, lt=1 << 63), INTEGRAL] = 0


class ComposedVersion(DescribedVersion):
    """A version that is the concatenation of others, in their order."""

    compose: list[QualifiedReference] = Field(
        min_length=2,
        max_length=MOST_IN_A_ROW,
        fail_fast=True,
        description="tenant/adapter@… each",
        examples=[["acme/summarize@1", "acme/summarize@2"]],
    )


class AliasTarget(RequestModel):
    """Where an alias points; `preload` moves it once the version is resident."""

    version: Annotated[int, Field(ge=1, lt=10**18), INTEGRAL]  # as in references: at most 18 digits
    preload: bool = False


class Alias(BaseModel):
    """An alias of an adapter."""

    alias: str
    version: int


class AliasState(Alias):
    """An alias of an adapter; `previous` is the version that it pointed at before, null if there was none."""

    previous: int | None


class ResidencyRequest(RequestModel):
    """Whether the version stays until it is unloaded."""

    pinned: bool = False


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
    """A tenant, its quotas, and what it has: adapters, and bytes of all their versions."""

    tenant: str
    created: Moment
    max_adapters: int | None
    max_bytes: int | None
    requests_per_second: int | None
    adapters: int
    bytes: int

    @classmethod
    def of(cls, tenant: Tenant) -> "TenantItem":
        """From the catalog's row."""
        used = {"adapters": tenant.adapters, "bytes": tenant.bytes}
        return cls(tenant=tenant.name, created=tenant.created, **asdict(tenant.quotas), **used)


class TenantPage(BaseModel):
    """Tenants in the order of their names."""

    items: list[TenantItem]
    next: str | None


_Expires = Annotated[datetime, BeforeValidator(_no_number), Field(strict=False)]


class _NewKey(RequestModel):
    name: str = Field(default="", max_length=200)
    expires: _Expires | None = None


class NewTenantKey(_NewKey):
    """A key of a tenant to make; `expires` is in the future."""

    scope: Literal["read", "write", "admin"]


class NewPlatformKey(_NewKey):
    """A key of the platform to make; `expires` is in the future."""

    scope: Scope


class KeyEnd(RequestModel):
    """An end for a key: in the future, and not later than the end that it has."""

    expires: _Expires


class Identity(BaseModel):
    """The key that asks; `tenant` is null for a key of the platform."""

    id: str
    name: str
    tenant: str | None
    scope: Scope
    expires: Moment | None


class KeyItem(BaseModel):
    """A key without its secret; `tenant` is null for a key of the platform."""

    id: str
    tenant: str | None
    scope: Scope
    name: str
    created: Moment
    expires: Moment | None
    last_used: Moment | None


class CreatedKey(KeyItem):
    """A new key with its text, which no later answer contains."""

    key: str


class KeyPage(BaseModel):
    """Keys, oldest first; `next` is the cursor of younger ones, or null."""

    items: list[KeyItem]
    next: str | None


class Health(BaseModel):
    """Live or ready."""

    status: Literal["ok"] = "ok"

"""An answer before a tensor is touched: what was asked, checked against a version, with its length and entity tag."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated

import torch
from pydantic import ConfigDict, Field

from prefix_service.catalog.records import Version
from prefix_service.errors import InvalidRequest
from prefix_service.library.request_model import INTEGRAL, RequestModel
from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.config import PrefixConfig
from prefix_service.prefix.form import Form, Identity, KVDtype, Layout, MaskDtype, Span
from prefix_service.prefix.kv import check_span
from prefix_service.prefix.mixed import MOST_IN_A_ROW, MixedBatch, Part, Row
from prefix_service.prefix.ranks import kv_heads_of_rank
from prefix_service.prefix.references import QUALIFIED_PATTERN
from prefix_service.prefix.wire.extras import AttentionMask, Extra, InputMask, PositionIds
from prefix_service.prefix.wire.message import MASK_DTYPES, Message
from prefix_service.prefix.wire.mixed_message import MixedMessage

_RANGE = r"^[0-9]{1,4}:[0-9]{1,4}$"
_RANK = r"^[0-9]{1,4}/[0-9]{1,4}$"


class PrefixRequest(RequestModel):
    """The options of one prefix, as a query has them; a default of None means what the version or the mask says."""

    model_config = ConfigDict(frozen=True, strict=False)

    batch_size: Annotated[int, Field(ge=1, lt=1 << 31), INTEGRAL] | None = Field(
        default=None, description="rows; default 1, or those of attention_mask"
    )
    dtype: KVDtype | None = Field(default=None, description="of keys and values; default that of the stored weights")
    layout: Layout = Field(default="layers", description="one key and one value tensor a layer, or one tensor")
    layers: str | None = Field(
        default=None, pattern=_RANGE, max_length=9, description="half-open range of layers, a:b; default all"
    )
    kv_heads: str | None = Field(
        default=None, pattern=_RANGE, max_length=9, description="half-open range of heads, a:b; default all"
    )
    tp: str | None = Field(
        default=None, pattern=_RANK, max_length=9, description="heads of a tensor-parallel rank, rank/size"
    )
    mask_dtype: MaskDtype | None = Field(default=None, description="default int64, or that of attention_mask")
    expand: bool = Field(default=True, description="false: keys and values come with one row")


class PrefixBody(PrefixRequest):
    """The options of one prefix, as JSON."""

    model_config = ConfigDict(strict=True)


QualifiedReference = Annotated[
    str, Field(min_length=1, max_length=300, json_schema_extra={"pattern": QUALIFIED_PATTERN})
]
"""`tenant/reference`, which is parsed after the model was validated."""
_References = Annotated[list[QualifiedReference], Field(min_length=1, max_length=MOST_IN_A_ROW, fail_fast=True)]
_MOST_ROWS = 65536  # the largest PREFIX_MAX_BATCH_SIZE


class MixedRequest(PrefixBody):
    """The options of a batch for many adapters, and its rows."""

    rows: list[QualifiedReference | _References | None] = Field(
        min_length=1,
        max_length=_MOST_ROWS,
        fail_fast=True,
        description="one each: tenant/adapter@…; a list of these, concatenated in that order; or null for no prefix",
        examples=[["acme/summarize@1", None, ["acme/summarize@1", "acme/summarize"]]],
    )


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what one request may ask for: rows, tokens a row, bytes of a weights file."""

    batch_size: int
    sequence_length: int
    upload_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned answer: its version, its message, and its strong entity tag (RFC 9110)."""

    version: Version
    message: Message
    etag: str

    @property
    def is_one_rendering(self) -> bool:
        """Whether keys and values are sent once."""
        return self.message.form.rows == 1

    @property
    def is_stored(self) -> bool:
        """Whether the body holds the version's stored keys and values as they are, once and in one piece."""
        identity, form = self.message.identity, self.message.form
        whole = (form.layers, form.kv_heads) == ((0, identity.num_layers), (0, identity.num_kv_heads))
        return self.is_one_rendering and whole and form.dtype == self.version.weights_dtype

    def renewed(self, version: Version) -> "Plan":
        """Return the plan of the same answer after the version's keys and values were encoded again."""
        return replace(self, version=version, etag=_entity_tag(version, self.message))


def make_plan(version: Version, request: PrefixRequest, mask: InputMask | None, limits: Limits) -> Plan:
    """Check a request against a version; `mask` is the input's.

    Raises:
        InvalidRequest: an option is out of bounds, or contradicts the mask.
    """
    config = version.prefix_config
    identity = _identity(version, config)
    form = Form(
        dtype=request.dtype or version.weights_dtype,
        batch_size=_batch_size(request, mask, limits),
        layers=check_span("layers", _span(request.layers), identity.num_layers),
        kv_heads=_kv_heads(request, identity.num_kv_heads),
        layout=request.layout,
        expand=request.expand,
    )
    mask_dtype = None if request.mask_dtype is None else MASK_DTYPES[request.mask_dtype]
    tokens = identity.num_virtual_tokens
    mask_dtype = mask_dtype or (torch.int64 if mask is None else mask.dtype)
    extras: dict[str, Extra] = {"attention_mask": AttentionMask(form.batch_size, tokens, mask_dtype, mask)}
    if mask is not None and config.num_transformer_submodules == 1:
        extras["position_ids"] = PositionIds(tokens, mask)
    message = Message(identity, form, extras)
    _ = message.content_length, message.rendering_nbytes, message.planned_nbytes  # here, and not on the event loop
    return Plan(version, message, _entity_tag(version, message))


def _entity_tag(version: Version, message: Message) -> str:
    """Hash everything that the body depends on: stored bits, form, and the input's mask."""
    tag = hashlib.sha256(version.key_values.encode() + message.header)
    mask = message.extras["attention_mask"]
    if isinstance(mask, AttentionMask) and mask.input is not None:
        tag.update(bytes_of(mask.input.flags))
    return f'"{tag.hexdigest()[:40]}"'


MixedVersions = Sequence[Sequence[tuple[str, Version]]]
"""The prefixes of each row: the reference as it was asked for, and what it means."""


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """A planned batch for many adapters: its message, and for each prefix in its rows the plan that its rendering is
    made by; the same plan where it is the same version."""

    message: MixedMessage
    rows: list[list[Plan]]


def make_mixed_plan(rows: MixedVersions, request: MixedRequest, mask: InputMask | None, limits: Limits) -> MixedPlan:
    """Check the rows of a request; `mask` is the input's.

    Raises:
        InvalidRequest: rows do not agree, or an option is out of bounds or contradicts rows or mask.
    """
    _check_mixed(request, mask, limits)
    parts = {ref: _part(ref, version) for ref, version in dict(chain.from_iterable(rows)).items()}
    asked = zip(rows, request.rows, strict=True)
    found = [Row(tuple(parts[ref] for ref, _ in row), isinstance(ask, list)) for row, ask in asked]
    batch = MixedBatch.of(found, request.dtype)
    # The form in which this project's client asks for one prefix: what is made for either serves the other.
    options = request.model_dump(exclude={"rows", "mask_dtype"})
    options |= {"batch_size": 1, "dtype": batch.dtype, "layout": "stacked", "expand": False}
    single = PrefixRequest.model_validate(options)
    versions = {_name(version): version for row in rows for _, version in row}
    plans = {name: make_plan(version, single, None, limits) for name, version in versions.items()}
    planned = [[plans[_name(version)] for _, version in row] for row in rows]
    form = replace(next(iter(plans.values())).message.form, batch_size=len(rows), layout=request.layout, expand=True)
    message = MixedMessage(batch, form, _mixed_extras(batch, request, mask))
    _ = message.content_length  # its header takes milliseconds: here, and not where it is sent
    return MixedPlan(message, planned)


def _check_mixed(request: MixedRequest, mask: InputMask | None, limits: Limits) -> None:
    rows = len(request.rows)
    if not request.expand:
        raise InvalidRequest("expand=false is for one adapter: the rows of this batch differ")
    if request.batch_size not in (None, rows):
        raise InvalidRequest(f"batch_size is {request.batch_size}, and there are {rows} rows")
    require_few_rows(rows, limits)
    if mask is not None and _batch_size(request, mask, limits) != rows:
        raise InvalidRequest(f"attention_mask has {mask.shape[0]} rows, and the batch has {rows}")


def require_few_rows(rows: int, limits: Limits) -> None:
    """Raises InvalidRequest if there are more rows than a batch may have."""
    if rows > limits.batch_size:
        raise InvalidRequest(f"a batch has at most {limits.batch_size} rows, got {rows}")


def _mixed_extras(batch: MixedBatch, request: MixedRequest, mask: InputMask | None) -> dict[str, Extra]:
    wanted = None if request.mask_dtype is None else MASK_DTYPES[request.mask_dtype]
    dtype = wanted or (torch.int64 if mask is None else mask.dtype)
    tokens, lengths = batch.num_virtual_tokens, batch.lengths
    extras: dict[str, Extra] = {"attention_mask": AttentionMask(len(batch.rows), tokens, dtype, mask, lengths)}
    if mask is not None and not batch.first.is_encoder_decoder:
        extras["position_ids"] = PositionIds(tokens, mask, lengths)
    return extras


def _part(ref: str, version: Version) -> Part:
    config = version.prefix_config
    is_encoder_decoder = config.num_transformer_submodules == 2
    return Part(ref, _identity(version, config), version.weights_dtype, is_encoder_decoder)


def _name(version: Version) -> tuple[str, str, int, str]:
    return version.tenant, version.adapter, version.number, version.digest


def _identity(version: Version, config: PrefixConfig) -> Identity:
    return Identity(
        tenant=version.tenant,
        adapter=version.adapter,
        version=version.number,
        digest=version.digest,
        peft_type=config.peft_type,
        base_model_name_or_path=config.base_model_name_or_path,
        num_virtual_tokens=config.num_virtual_tokens,
        num_layers=config.num_layers or 0,
        num_kv_heads=config.num_attention_heads or 0,
        head_dim=config.head_dim or 0,
    )


def _batch_size(request: PrefixRequest, mask: InputMask | None, limits: Limits) -> int:
    rows = request.batch_size or 1
    if mask is not None:
        rows = mask.shape[0]
        if request.batch_size not in (None, rows):
            raise InvalidRequest(f"batch_size is {request.batch_size}, and attention_mask has {rows} rows")
        if mask.shape[1] > limits.sequence_length:
            raise InvalidRequest(
                f"attention_mask has rows of {mask.shape[1]} tokens, more than {limits.sequence_length}"
            )
    if rows > limits.batch_size:
        raise InvalidRequest(f"batch_size must be at most {limits.batch_size}, got {rows}")
    return rows


def _kv_heads(request: PrefixRequest, num_kv_heads: int) -> Span:
    if request.tp is None:
        return check_span("kv_heads", _span(request.kv_heads), num_kv_heads)
    if request.kv_heads is not None:
        raise InvalidRequest(f"tp={request.tp} says which heads, and kv_heads={request.kv_heads} too: send one of them")
    rank, _, size = request.tp.partition("/")
    return kv_heads_of_rank(num_kv_heads, (int(rank), int(size)))


def _span(text: str | None) -> Span | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    return int(first), int(last)

"""Plans an answer before a tensor is touched: checks a request against a
version, and computes length and entity tag.
"""

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
from prefix_service.prefix.kv import check_span
from prefix_service.prefix.mixed import MOST_IN_A_ROW, MixedBatch, Row, RowPrefix
from prefix_service.prefix.ranks import kv_heads_of_rank
from prefix_service.prefix.references import QUALIFIED_PATTERN
from prefix_service.prefix.variant import DtypePair, Identity, KVDtype, Layout, MaskDtype, Span, Variant
from prefix_service.prefix.wire.masks import AttentionMask, Extra, InputMask, PositionIds
from prefix_service.prefix.wire.mixed_prefix_file import MixedPrefixFile
from prefix_service.prefix.wire.prefix_file import MASK_DTYPES, PrefixFile

_RANGE = r"^[0-9]{1,4}:[0-9]{1,4}$"
_RANK = r"^[0-9]{1,4}/[0-9]{1,4}$"


class PrefixRequest(RequestModel):
    """The options of one prefix, as query parameters. None means the version's own value, or the mask's."""

    model_config = ConfigDict(frozen=True, strict=False)

    batch_size: Annotated[int, Field(ge=1, lt=1 << 31), INTEGRAL] | None = Field(
        default=None, description="rows; default 1, or those of attention_mask"
    )
    dtype: KVDtype | None = Field(default=None, description="of keys and values; default that of the stored weights")
    key_dtype: KVDtype | None = Field(default=None, description="of keys alone; default `dtype`")
    value_dtype: KVDtype | None = Field(default=None, description="of values alone; default `dtype`")
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
"""`tenant/reference`; the reference is parsed after the model was validated."""
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
    """Bounds on one request: rows of a batch, tokens of a row, bytes of a weights file."""

    batch_size: int
    sequence_length: int
    upload_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned answer: its version, its file, and its strong entity tag (RFC 9110)."""

    version: Version
    file: PrefixFile
    etag: str

    @property
    def is_one_rendering(self) -> bool:
        """Whether keys and values are sent once, without repeated rows."""
        return self.file.variant.rows == 1

    @property
    def is_stored(self) -> bool:
        """Whether the body contains the version's stored keys and values unchanged, once and in one piece."""
        identity, variant = self.file.identity, self.file.variant
        whole = (variant.layers, variant.kv_heads) == ((0, identity.num_layers), (0, identity.num_kv_heads))
        return self.is_one_rendering and whole and variant.dtypes.single == self.version.weights_dtype

    def renewed(self, version: Version) -> "Plan":
        """Returns the plan of the same answer for a version whose keys and values were encoded again."""
        return replace(self, version=version, etag=_entity_tag(version, self.file))


def make_plan(version: Version, request: PrefixRequest, mask: InputMask | None, limits: Limits) -> Plan:
    """Checks a request against a version, and returns the plan of its answer; `mask` is the input's.

    Raises:
        InvalidRequest: an option is out of bounds, or contradicts the mask.
    """
    file = make_file(version, request, mask, limits)
    file.plan()  # here, and not on the event loop
    return Plan(version, file, _entity_tag(version, file))


def make_file(version: Version, request: PrefixRequest, mask: InputMask | None, limits: Limits) -> PrefixFile:
    """Checks a request against a version, and returns the file of its answer, of which nothing is computed yet; `mask`
    is the input's.

    Raises:
        InvalidRequest: an option is out of bounds, or contradicts the mask.
    """
    config = version.prefix_config
    identity = _identity(version, config)
    variant = Variant(
        dtypes=_dtypes(request, version.weights_dtype),
        batch_size=_batch_size(request, mask, limits),
        layers=check_span("layers", _span(request.layers), identity.num_layers),
        kv_heads=_kv_heads(request, identity.num_kv_heads),
        layout=request.layout,
        expand=request.expand,
    )
    extras = _extras(
        variant.batch_size,
        identity.num_virtual_tokens,
        mask,
        request.mask_dtype,
        is_encoder_decoder=_is_encoder_decoder(config),
    )
    return PrefixFile(identity, variant, extras)


def _entity_tag(version: Version, file: PrefixFile) -> str:
    """Returns the hash of everything that the body depends on: stored bits, variant, and the input's mask."""
    tag = hashlib.sha256(version.key_values.encode() + file.header)
    mask = file.extras["attention_mask"]
    if isinstance(mask, AttentionMask) and mask.input is not None:
        tag.update(bytes_of(mask.input.flags))
    return f'"{tag.hexdigest()[:40]}"'


MixedVersions = Sequence[Sequence[tuple[str, Version]]]
"""The prefixes of each row: the reference as the caller wrote it, and its version."""


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """A planned batch for many adapters.

    `rows` has, for each prefix of a row, the plan that makes its rendering; prefixes of one version share a plan.
    """

    file: MixedPrefixFile
    rows: list[list[Plan]]


def make_mixed_plan(rows: MixedVersions, request: MixedRequest, mask: InputMask | None, limits: Limits) -> MixedPlan:
    """Checks the rows of a request, and returns the plan of their answer; `mask` is the input's.

    Raises:
        InvalidRequest: the rows do not fit together, or an option is out of bounds or contradicts rows or mask.
    """
    _check_mixed(request, mask, limits)
    prefixes = {ref: _row_prefix(ref, version) for ref, version in dict(chain.from_iterable(rows)).items()}
    asked = zip(rows, request.rows, strict=True)
    found = [Row(tuple(prefixes[ref] for ref, _ in row), isinstance(ask, list)) for row, ask in asked]
    batch = MixedBatch.of(found, request.key_dtype or request.dtype, request.value_dtype or request.dtype)
    # One row of each prefix, as this project's client asks for it, so that both share renderings.
    options = request.model_dump(exclude={"rows", "mask_dtype"}) | {"batch_size": 1, "expand": False}
    options |= {"key_dtype": batch.dtypes.key, "value_dtype": batch.dtypes.value}
    if batch.dtypes.single is not None:
        options["layout"] = "stacked"
    single = PrefixRequest.model_validate(options)
    versions = {_key(version): version for row in rows for _, version in row}
    plans = {name: make_plan(version, single, None, limits) for name, version in versions.items()}
    planned = [[plans[_key(version)] for _, version in row] for row in rows]
    variant = replace(next(iter(plans.values())).file.variant, batch_size=len(rows), layout=request.layout, expand=True)
    extras = _extras(
        len(batch.rows),
        batch.num_virtual_tokens,
        mask,
        request.mask_dtype,
        is_encoder_decoder=batch.first.is_encoder_decoder,
        lengths=batch.lengths,
    )
    file = MixedPrefixFile(batch, variant, extras)
    _ = file.content_length  # writing the header takes milliseconds, so it is not left to the response
    return MixedPlan(file, planned)


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


def _extras(
    rows: int,
    tokens: int,
    mask: InputMask | None,
    wanted: MaskDtype | None,
    *,
    is_encoder_decoder: bool,
    lengths: torch.Tensor | None = None,
) -> dict[str, Extra]:
    """Returns the masks of an answer, and position ids if there is an input that a decoder reads behind the prefix: an
    encoder-decoder's input goes to the encoder, whose positions no prefix shifts.
    """
    dtype = MASK_DTYPES[wanted] if wanted is not None else torch.int64 if mask is None else mask.dtype
    extras: dict[str, Extra] = {"attention_mask": AttentionMask(rows, tokens, dtype, mask, lengths)}
    if mask is not None and not is_encoder_decoder:
        extras["position_ids"] = PositionIds(tokens, mask, lengths)
    return extras


def _row_prefix(ref: str, version: Version) -> RowPrefix:
    config = version.prefix_config
    return RowPrefix(ref, _identity(version, config), version.weights_dtype, _is_encoder_decoder(config))


def _is_encoder_decoder(config: PrefixConfig) -> bool:
    return config.num_transformer_submodules == 2


def _key(version: Version) -> tuple[str, str, int, str]:
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


def _dtypes(request: PrefixRequest, stored: KVDtype) -> DtypePair:
    found = DtypePair(request.key_dtype or request.dtype or stored, request.value_dtype or request.dtype or stored)
    if request.layout == "stacked" and found.single is None:
        raise InvalidRequest(
            f"layout=stacked is one tensor of one dtype, and keys would be {found.key} and values {found.value}: ask "
            "for layout=layers"
        )
    return found


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

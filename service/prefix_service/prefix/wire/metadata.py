"""Parses the metadata of an answer: the version that it holds, and in which variant. Needs no torch."""

from collections.abc import Mapping
from typing import Any, Final, cast, get_args

from prefix_service.errors import InvalidResponse
from prefix_service.prefix.references import is_digest
from prefix_service.prefix.variant import DtypePair, Identity, KVDtype, Layout, Span, Variant

_DTYPES: Final = get_args(KVDtype)
_LAYOUTS: Final = get_args(Layout)


def read_metadata(metadata: Mapping[str, Any]) -> tuple[Identity, Variant]:
    """Returns the identity and the variant in the metadata of a prefix; ignores other keys.

    Raises:
        InvalidResponse: a value is missing, has another type, or is out of range.
    """
    identity = read_identity(metadata)
    variant = Variant(
        dtypes=read_dtypes(metadata),
        batch_size=_size(metadata, "batch_size"),
        layers=_span(metadata, "layers", identity.num_layers),
        kv_heads=_span(metadata, "kv_heads", identity.num_kv_heads),
        layout=_one_of(metadata, "layout", _LAYOUTS),
        expand=_one_of(metadata, "expand", (True, False)),
    )
    return identity, variant


def read_identity(metadata: Mapping[str, Any]) -> Identity:
    """Returns the version that metadata, or the description of a version, is about; ignores other keys.

    Raises:
        InvalidResponse: a value is missing, has another type, or is out of range.
    """
    base_model = metadata.get("base_model_name_or_path")
    return Identity(
        tenant=_text(metadata, "tenant"),
        adapter=_text(metadata, "adapter"),
        version=_size(metadata, "version"),
        digest=_digest(metadata),
        peft_type=_text(metadata, "peft_type"),
        base_model_name_or_path=None if base_model is None else _text(metadata, "base_model_name_or_path"),
        num_virtual_tokens=_size(metadata, "num_virtual_tokens"),
        num_layers=_size(metadata, "num_layers"),
        num_kv_heads=_size(metadata, "num_kv_heads"),
        head_dim=_size(metadata, "head_dim"),
    )


def read_dtype(metadata: Mapping[str, Any]) -> KVDtype:
    """Returns the dtype of keys and values.

    Raises:
        InvalidResponse: the dtype is missing, or not one that this service sends.
    """
    return cast(KVDtype, _one_of(metadata, "dtype", _DTYPES))


def read_dtypes(metadata: Mapping[str, Any]) -> DtypePair:
    """Returns the dtypes of keys and of values; there is `dtype` alone if they have one.

    Raises:
        InvalidResponse: a dtype is missing, is not one that this service sends, or contradicts another.
    """
    if not metadata.keys() & {"key_dtype", "value_dtype"}:
        return DtypePair.both(read_dtype(metadata))
    found = DtypePair(*(_one_of(metadata, name, _DTYPES) for name in ("key_dtype", "value_dtype")))
    if metadata.get("dtype", found.single) != found.single:
        raise _wrong(metadata, "dtype", f"{found.single!r} beside key_dtype and value_dtype")
    return found


def _text(metadata: Mapping[str, Any], name: str) -> str:
    value = metadata.get(name)
    if not isinstance(value, str):
        raise _wrong(metadata, name, "a text")
    return value


def _digest(metadata: Mapping[str, Any]) -> str:
    value = _text(metadata, "digest")  # it becomes a part of URLs, and vLLM's answers have it as a header
    if not is_digest(value):
        raise _wrong(metadata, "digest", "sha256:<64 hex digits>")
    return value


def _size(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata.get(name)
    if type(value) is not int or value < 1:
        raise _wrong(metadata, name, "a positive integer")
    return value


def _span(metadata: Mapping[str, Any], name: str, size: int) -> Span:
    value = metadata.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(type(end) is int for end in value):
        raise _wrong(metadata, name, "two integers")
    if not 0 <= value[0] < value[1] <= size:
        raise _wrong(metadata, name, f"a range within 0:{size}")
    return value[0], value[1]


def _one_of(metadata: Mapping[str, Any], name: str, values: tuple[Any, ...]) -> Any:
    value = metadata.get(name)
    if not any(value is each or (isinstance(value, str) and value == each) for each in values):
        raise _wrong(metadata, name, f"one of {', '.join(map(str, values))}")
    return value


def _wrong(metadata: Mapping[str, Any], name: str, wanted: str) -> InvalidResponse:
    return InvalidResponse(
        f"the metadata of the answer is not that of a prefix: {name} should be {wanted}, got {metadata.get(name)!r:.80}"
    )

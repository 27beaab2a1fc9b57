"""The variant in which a prefix is asked for, and the identity of a prefix: names and numbers alone, without torch."""

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Self

MEDIA_TYPE: Final = "application/vnd.safetensors"
SHARED_FILE_TYPE: Final = "application/vnd.prefix-service.shared-file+json"
"""Media type of an answer that names a file on this host: `{"file": <absolute path>, "bytes": <its size>}`. The file is
the safetensors file that the answer would have been.
"""

FORMAT: Final = 1

Layout = Literal["layers", "stacked"]
KVDtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn"]
MaskDtype = Literal["int64", "float32", "bool"]
Span = tuple[int, int]
"""A half-open range `a:b`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The version that a prefix file holds, and the dimensions of the whole prefix."""

    tenant: str
    adapter: str
    version: int
    digest: str
    peft_type: str
    base_model_name_or_path: str | None
    num_virtual_tokens: int
    num_layers: int
    num_kv_heads: int
    head_dim: int


class DtypePair(NamedTuple):
    """The dtype of keys, and that of values."""

    key: KVDtype
    value: KVDtype

    @classmethod
    def both(cls, dtype: KVDtype) -> Self:
        """Returns the pair of keys and values in one dtype."""
        return cls(dtype, dtype)

    @property
    def single(self) -> KVDtype | None:
        """The dtype of keys and values; None if they have two."""
        return self.key if self.key == self.value else None

    def as_metadata(self) -> dict[str, KVDtype | None]:
        """Returns `dtype`, and if keys and values have two, None for it, beside `key_dtype` and `value_dtype`.

        One dtype has one name alone, as before there could be two: the bytes of such answers stay what they were.
        """
        if self.single is not None:
            return {"dtype": self.single}
        return {"dtype": None, "key_dtype": self.key, "value_dtype": self.value}


@dataclass(frozen=True, slots=True)
class Variant:
    """The variant in which a prefix is asked for; `layers` and `kv_heads` are half-open ranges."""

    dtypes: DtypePair
    batch_size: int
    layers: Span
    kv_heads: Span
    layout: Layout
    expand: bool

    @property
    def rows(self) -> int:
        """The number of times that each key and value is sent: `batch_size` if `expand`, else 1."""
        return self.batch_size if self.expand else 1

    def as_metadata(self) -> dict[str, Any]:
        """Returns the variant as metadata, by the names of a request's options."""
        return {
            **self.dtypes.as_metadata(),
            "batch_size": self.batch_size,
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "layout": self.layout,
            "expand": self.expand,
        }

"""The variant in which a prefix is asked for, and the identity of a prefix: names and numbers alone, without torch."""

from dataclasses import dataclass
from typing import Final, Literal

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


@dataclass(frozen=True, slots=True)
class Variant:
    """The variant in which a prefix is asked for; `layers` and `kv_heads` are half-open ranges."""

    dtype: KVDtype
    batch_size: int
    layers: Span
    kv_heads: Span
    layout: Layout
    expand: bool

    @property
    def rows(self) -> int:
        """How many times each key and value is sent: `batch_size` if `expand`, else once."""
        return self.batch_size if self.expand else 1

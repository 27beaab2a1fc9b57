"""`PrefixKV`, the value that everything else handles: the keys and values of one prefix, batch 1."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.variant import Span


@dataclass(frozen=True, slots=True, repr=False)
class PrefixKV:
    """The keys and values of a prefix for a range of layers and heads.

    `tensor` is `[L', 2, H', N, D]`: layer, key or value, key/value head, virtual token, head size. `layers` and
    `kv_heads` tell which of the model's `num_layers` layers and `num_kv_heads` heads those are. Keys are used as they
    are: they stand after the rotary embedding and are never rotated (PEFT).
    """

    tensor: Tensor
    layers: Span
    kv_heads: Span
    num_layers: int
    num_kv_heads: int

    def __repr__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return (
            f"<PrefixKV {list(self.tensor.shape)}: layers {self.layers} of {self.num_layers}, heads {self.kv_heads} of "
            f"{self.num_kv_heads}, {dtype} on {self.tensor.device}>"
        )

    @classmethod
    def whole(cls, tensor: Tensor) -> Self:
        """All layers and heads of a prefix, from `[L, 2, H, N, D]`."""
        layers, _, heads, _, _ = tensor.shape
        return cls(tensor, (0, layers), (0, heads), layers, heads)

    @classmethod
    def from_flat(cls, flat: Tensor, *, num_layers: int, num_kv_heads: int, num_transformer_submodules: int) -> Self:
        """From PEFT's flat prefix `[N, L * 2 * H * D]`, as `peft.PeftModel.get_prompt` reads it.

        With two submodules (encoder-decoder) PEFT doubles the tensor and groups it by four, so that decoder layer
        `i` receives pair `2i mod L`; adapters were trained that way.
        """
        tokens, width = flat.shape
        tensor = flat.new_empty(num_layers, 2, num_kv_heads, tokens, width // (num_layers * 2 * num_kv_heads))
        made = cls.whole(tensor)
        made.put_rows(0, flat, num_transformer_submodules)
        return made

    def put_rows(self, first: int, flat: Tensor, num_transformer_submodules: int) -> None:
        """Write the tokens that begin with `first`, from rows of the flat prefix `[n, L * 2 * H * D]`, as `from_flat`
        reads them."""
        layers, _, heads, _, size = self.tensor.shape
        # (n, L*2*H*D) -> (n, L, 2, H, D) -> (L, 2, H, n, D)
        found = flat.view(len(flat), layers, 2, heads, size).permute(1, 2, 3, 0, 4)
        tokens = slice(first, first + len(flat))
        if num_transformer_submodules == 1:
            self.tensor[:, :, :, tokens] = found
        else:
            for layer in range(layers):
                self.tensor[layer, :, :, tokens] = found[2 * layer % layers]

    def flat(self, first: int = 0, last: int | None = None) -> Tensor:
        """Returns the tokens `first:last` as PEFT saves them, `[n, L * 2 * H * D]`.

        This is `from_flat` the other way round, but not for two submodules, where that leaves layers out.
        """
        # (L, 2, H, n, D) -> (n, L, 2, H, D) -> (n, L*2*H*D)
        return self.tensor[:, :, :, first:last].permute(3, 0, 1, 2, 4).flatten(1)

    @property
    def num_virtual_tokens(self) -> int:
        """N."""
        return self.tensor.shape[3]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.tensor.shape[4]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.tensor.nbytes

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """On another device, or rounded to another dtype (to nearest even)."""
        return replace(self, tensor=self.tensor.to(device=device, dtype=dtype))

    def sliced(self, layers: Span | None = None, kv_heads: Span | None = None) -> Self:
        """The layers and heads of these half-open ranges, numbered as in the model; a view.

        Raises:
            InvalidRequest: a range that is empty or reaches outside.
        """
        first_layer, last_layer = check_span("layers", layers, self.num_layers)
        first_head, last_head = check_span("kv_heads", kv_heads, self.num_kv_heads)
        tensor = self.tensor[first_layer:last_layer, :, first_head:last_head]
        return replace(self, tensor=tensor, layers=(first_layer, last_layer), kv_heads=(first_head, last_head))

    def pairs(self, batch_size: int = 1) -> list[tuple[Tensor, Tensor]]:
        """One `(key, value)` a layer, each `[B, H', N, D]`; rows share memory: do not write."""
        # (L', 2, H', N, D) -> L' x 2 x (B, H', N, D)
        rows = self.tensor.unsqueeze(2).expand(-1, -1, batch_size, -1, -1, -1)
        return [(layer[0], layer[1]) for layer in rows]

    def stacked(self, batch_size: int = 1) -> Tensor:
        """`[B, L', 2, H', N, D]`; rows share memory: do not write."""
        return self.tensor.unsqueeze(0).expand(batch_size, -1, -1, -1, -1, -1)


def check_span(name: str, span: Span | None, size: int) -> Span:
    """`span`, or all of `size` where it is None.

    Raises:
        InvalidRequest: the range is empty or reaches outside `0:size`.
    """
    if span is None:
        return (0, size)
    if not 0 <= span[0] < span[1] <= size:
        raise InvalidRequest(f"{name} must be a range within 0:{size}, got {span[0]}:{span[1]}")
    return span


def prefix_mask(batch_size: int, num_virtual_tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """The mask of the prefix alone: ones, `[B, N]`."""
    return torch.ones(batch_size, num_virtual_tokens, dtype=dtype)


def extend_mask(attention_mask: Tensor, num_virtual_tokens: int, dtype: torch.dtype | None = None) -> Tensor:
    """Ones for the prefix in front of an input's mask: `[B, S]` -> `[B, N + S]`, in the mask's own dtype by default.

    PEFT makes it float32 whatever came in; models accept integers too, but for Falcon with ALiBi and 16 or more heads.
    """
    mask = attention_mask.to(dtype or attention_mask.dtype)
    ones = mask.new_ones(mask.shape[0], num_virtual_tokens)
    return torch.cat([ones, mask], dim=1)


def position_ids(attention_mask: Tensor, num_virtual_tokens: int | Tensor) -> Tensor:
    """`N + clamp(cumsum(mask) - 1, min=0)`, int64 `[B, S]`: right for left and for right padding. N is one number, or
    `[B, 1]`."""
    return num_virtual_tokens + (attention_mask.to(torch.int64).cumsum(dim=1) - 1).clamp(min=0)

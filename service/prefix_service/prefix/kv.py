"""`PrefixKV`: the keys and values of one prefix, batch 1, which every other module passes around."""

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
    `kv_heads` are the half-open ranges that it covers of the model's `num_layers` layers and `num_kv_heads` heads. Keys
    enter attention as they are: as in PEFT, they are not rotated by the rotary embedding.
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
        """Returns all layers and heads of a prefix, from a tensor `[L, 2, H, N, D]`."""
        layers, _, heads, _, _ = tensor.shape
        return cls(tensor, (0, layers), (0, heads), layers, heads)

    @classmethod
    def from_flat(cls, flat: Tensor, *, num_layers: int, num_kv_heads: int, num_transformer_submodules: int) -> Self:
        """Returns the keys and values of PEFT's flat prefix `[N, L * 2 * H * D]`, as `peft.PeftModel.get_prompt` reads
        it.

        With two submodules (encoder-decoder) PEFT doubles the tensor and groups it by four, so that decoder layer `i`
        receives pair `2i mod L`; adapters were trained that way.
        """
        tokens, width = flat.shape
        tensor = flat.new_empty(num_layers, 2, num_kv_heads, tokens, width // (num_layers * 2 * num_kv_heads))
        made = cls.whole(tensor)
        made.put_rows(0, flat, num_transformer_submodules)
        return made

    def put_rows(self, first: int, flat: Tensor, num_transformer_submodules: int) -> None:
        """Writes the tokens from `first` on, from rows `[n, L * 2 * H * D]` of the flat prefix.

        With two submodules, layer `i` receives pair `2i mod L` of a row, as in PEFT.
        """
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

        It inverts `from_flat` for one submodule; with two, `from_flat` leaves layers out, so they cannot be restored.
        """
        # (L, 2, H, n, D) -> (n, L, 2, H, D) -> (n, L*2*H*D)
        return self.tensor[:, :, :, first:last].permute(3, 0, 1, 2, 4).flatten(1)

    @property
    def num_virtual_tokens(self) -> int:
        """N, the number of virtual tokens."""
        return self.tensor.shape[3]

    @property
    def head_dim(self) -> int:
        """D, the size of a head."""
        return self.tensor.shape[4]

    @property
    def nbytes(self) -> int:
        """The size of the keys and values in bytes."""
        return self.tensor.nbytes

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Returns the prefix on another device, or rounded (to nearest even) to another dtype."""
        return replace(self, tensor=self.tensor.to(device=device, dtype=dtype))

    def sliced(self, layers: Span | None = None, kv_heads: Span | None = None) -> Self:
        """Returns a view of the given layers and heads, half-open ranges in the model's numbering; None means all.

        Raises:
            InvalidRequest: a range is empty or reaches outside the model.
        """
        first_layer, last_layer = check_span("layers", layers, self.num_layers)
        first_head, last_head = check_span("kv_heads", kv_heads, self.num_kv_heads)
        tensor = self.tensor[first_layer:last_layer, :, first_head:last_head]
        return replace(self, tensor=tensor, layers=(first_layer, last_layer), kv_heads=(first_head, last_head))

    def pairs(self, batch_size: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Returns one `(key, value)` per layer, each `[B, H', N, D]`; rows share memory, so do not write to them."""
        # (L', 2, H', N, D) -> L' x 2 x (B, H', N, D)
        rows = self.tensor.unsqueeze(2).expand(-1, -1, batch_size, -1, -1, -1)
        return [(layer[0], layer[1]) for layer in rows]

    def stacked(self, batch_size: int = 1) -> Tensor:
        """Returns one tensor `[B, L', 2, H', N, D]`; rows share memory, so do not write to them."""
        return self.tensor.unsqueeze(0).expand(batch_size, -1, -1, -1, -1, -1)


def check_span(name: str, span: Span | None, size: int) -> Span:
    """Returns `span`, or `(0, size)` if it is None.

    Raises:
        InvalidRequest: the range is empty or reaches outside `0:size`.
    """
    if span is None:
        return (0, size)
    if not 0 <= span[0] < span[1] <= size:
        raise InvalidRequest(f"{name} must be a range within 0:{size}, got {span[0]}:{span[1]}")
    return span


def prefix_mask(batch_size: int, num_virtual_tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Returns the attention mask of the prefix alone: ones, `[B, N]`."""
    return torch.ones(batch_size, num_virtual_tokens, dtype=dtype)


def extend_mask(attention_mask: Tensor, num_virtual_tokens: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the attention mask of prefix and input, `[B, S]` -> `[B, N + S]`, with ones for the prefix.

    Its dtype is the mask's own by default. PEFT always makes it float32; models accept integers too, except Falcon with
    ALiBi and 16 or more heads.
    """
    mask = attention_mask.to(dtype or attention_mask.dtype)
    ones = mask.new_ones(mask.shape[0], num_virtual_tokens)
    return torch.cat([ones, mask], dim=1)


def position_ids(attention_mask: Tensor, num_virtual_tokens: int | Tensor) -> Tensor:
    """Returns `N + clamp(cumsum(mask) - 1, min=0)`, int64 `[B, S]`, which is right for left and for right padding.

    `num_virtual_tokens` is one number N, or one per row as `[B, 1]`.
    """
    return num_virtual_tokens + (attention_mask.to(torch.int64).cumsum(dim=1) - 1).clamp(min=0)

"""A batch whose rows have prefixes of their own, and its use in a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor

from prefix_service.client.base_model_check import BaseModelCheck
from prefix_service.client.prefixes.prefix import Prefix
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.fingerprint import Fingerprint
from prefix_service.prefix.kv import position_ids
from prefix_service.prefix.mixed import MixedBatch, Row, RowPrefix, mixed_mask
from prefix_service.prefix.variant import Identity
from prefix_service.prefix.wire.mixed_prefix_file import stacked

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

_IDENTITY = [each.name for each in fields(Identity)]


_SHOWN: Final = 3  # rows in the `repr` of a batch


@dataclass(frozen=True, slots=True, repr=False)
class MixedPrefix:
    """The prefixes of a batch, one per row. Shorter ones, and rows without one, have zeros on the left, which the mask
    hides.

    The batch has memory of its own.
    """

    stacked: Tensor
    """Keys and values, `[B, L', 2, H', N, D]`; N is the length of the longest row."""
    lengths: Tensor
    """The virtual tokens of each row, int64 `[B, 1]`."""
    metadata: Mapping[str, Any]
    """`rows`: for each row its `ref`, `version`, `digest` and `num_virtual_tokens`, or a list of these, or None."""
    inputs_mask: Tensor | None = None
    """The input's mask `[B, S]`, if it was given."""
    base_models: Mapping[str, Fingerprint] = field(default_factory=dict)
    """The fingerprint of each version's base model, by the version's name, as far as the service knew it."""
    base_model_check: BaseModelCheck = "off"
    """What `to_cache` and `generate` do with another model: the client's `base_model_check`."""

    def __repr__(self) -> str:
        batch, layers, _, heads, tokens, size = self.stacked.shape
        rows = [_shown(row) for row in self.metadata["rows"][:_SHOWN]] + ["…"] * (batch > _SHOWN)
        dtype = str(self.stacked.dtype).removeprefix("torch.")
        return (
            f"<MixedPrefix [{', '.join(rows)}]: {batch} x {tokens} tokens, {layers} layers, {heads} heads of {size}, "
            f"{dtype} on {self.stacked.device}>"
        )

    @property
    def past_key_values(self) -> list[tuple[Tensor, Tensor]]:
        """One `(key, value)` per layer, each `[B, H', N, D]`."""
        # (B, L', 2, H', N, D) -> L' x 2 x (B, H', N, D)
        return [(layer[:, 0], layer[:, 1]) for layer in self.stacked.unbind(1)]

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self.stacked.shape[0]

    @property
    def num_virtual_tokens(self) -> int:
        """N, the virtual tokens of the longest row."""
        return self.stacked.shape[4]

    @property
    def prefix_mask(self) -> Tensor:
        """The mask of the prefixes, int64 `[B, N]`: 1 for virtual tokens, 0 in front of them."""
        return mixed_mask(self.lengths)

    @property
    def attention_mask(self) -> Tensor:
        """`prefix_mask`, followed by the input's mask if it was given: `[B, N]` or `[B, N + S]`."""
        return self.prefix_mask if self.inputs_mask is None else self.extend_mask(self.inputs_mask)

    @property
    def position_ids(self) -> Tensor:
        """Positions of the input's tokens, int64 `[B, S]`, starting behind each row's own prefix; not for
        encoder-decoder models.

        Raises:
            InvalidRequest: the input's mask was not given.
        """
        if self.inputs_mask is None:
            raise InvalidRequest("position_ids follow from the input's attention_mask: give it to for_inputs")
        return position_ids(self.inputs_mask, self.lengths.to(self.inputs_mask.device))

    def for_inputs(self, attention_mask: Tensor) -> Self:
        """Returns the same prefixes for other inputs, whose mask `[B, S]` this is, without a copy.

        Raises:
            InvalidRequest: the mask has another number of rows.
        """
        if attention_mask.ndim != 2 or len(attention_mask) != self.batch_size:
            raise InvalidRequest(
                f"attention_mask must have {self.batch_size} rows, [batch, seq], got {list(attention_mask.shape)}"
            )
        return replace(self, inputs_mask=attention_mask)

    def extend_mask(self, attention_mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns `prefix_mask` followed by an input's mask: `[B, S]` -> `[B, N + S]`.

        The dtype is that of the input's mask by default.
        """
        mask = attention_mask.to(dtype or attention_mask.dtype)
        return torch.cat([self.prefix_mask.to(mask), mask], dim=1)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Returns the batch with keys, values and masks on another device, and keys and values in another dtype."""
        target = None if device is None else torch.device(device)
        inputs = None if self.inputs_mask is None else self.inputs_mask.to(device=target)
        moved = self.stacked.to(device=target, dtype=dtype)
        return replace(self, stacked=moved, lengths=self.lengths.to(device=target), inputs_mask=inputs)

    def to_cache(self, config: "PreTrainedConfig | PreTrainedModel") -> "Cache":
        """Returns transformers' own cache for a model, filled with the prefixes; needs the extra `transformers`.

        Pass `attention_mask` and `position_ids` to the model with it.

        Raises:
            DimensionMismatch: the prefixes do not fit the model.
            BaseModelMismatch: the base model of one is another, and the client refuses that.
            InvalidRequest: a layer of the model keeps something other than keys and values.
        """
        from prefix_service.client.transformers.caches import to_cache

        self._check_base_models(config)
        return to_cache(self.past_key_values, config)

    def generate(self, model: Any, /, *args: Any, **options: Any) -> Any:
        """Returns the result of `model.generate`, with each row behind its own prefix.

        See `prefix_service.client.transformers.generation`. The input's mask is the one given before, unless it is
        given here.

        Raises:
            DimensionMismatch: the prefixes do not fit the model.
            BaseModelMismatch: the base model of one is another, and the client refuses that.
            InvalidRequest: an option cannot be used with a prefix, or the model cannot have prefixes of several
            lengths.
        """
        from prefix_service.client.transformers.generation import generate

        self._check_base_models(model)
        if self.inputs_mask is not None and len(args) < 2:
            options.setdefault("attention_mask", self.inputs_mask)
        return generate(model, self.past_key_values, *args, prefix_mask=self.prefix_mask, **options)

    def _check_base_models(self, model: Any) -> None:
        from prefix_service.client.transformers.fingerprints import check_base_model

        for name, trained in self.base_models.items():
            check_base_model(name, trained, model, self.base_model_check)


def assemble(
    rows: Sequence[tuple[tuple[str, ...], bool]],
    prefixes: Mapping[str, Prefix],
    attention_mask: Tensor | None,
    allocate: Callable[[int], memoryview],
) -> MixedPrefix:
    """Returns a batch of the prefixes of its rows; each row has its references, and whether the caller gave a list.

    Raises:
        InvalidRequest: the rows do not fit together, or the mask has another number of rows.
    """
    row_prefix = partial(_row_prefix, prefixes)
    batch = MixedBatch.of([Row(tuple(map(row_prefix, references)), is_list) for references, is_list in rows])
    tensors = [[prefixes[reference].kv.tensor for reference in references] for references, _ in rows]
    layers, _, heads, _, head_dim = prefixes[batch.first.ref].kv.tensor.shape
    shape = (len(rows), layers, 2, heads, batch.num_virtual_tokens, head_dim)
    memory = allocate(prod(shape) * prefixes[batch.first.ref].kv.tensor.itemsize)
    metadata = {"rows": [row.as_metadata() for row in batch.rows]}
    base_models = {prefix.name: prefix.base_model for prefix in prefixes.values()}
    check = prefixes[batch.first.ref].base_model_check
    rows_of = stacked(batch, tensors, memory).view(shape)
    mixed = MixedPrefix(rows_of, batch.lengths, metadata, base_models=base_models, base_model_check=check)
    return mixed if attention_mask is None else mixed.for_inputs(attention_mask)


def _shown(row: Any) -> str:
    """Returns one row of the metadata as a short text."""
    if row is None:
        return "no prefix"
    return str(row["ref"]) if isinstance(row, Mapping) else " + ".join(map(_shown, row))


def _row_prefix(prefixes: Mapping[str, Prefix], reference: str) -> RowPrefix:
    prefix = prefixes[reference]
    identity = Identity(**{name: prefix.metadata[name] for name in _IDENTITY})
    return RowPrefix(reference, identity, str(prefix.kv.tensor.dtype).removeprefix("torch."))  # type: ignore[arg-type]

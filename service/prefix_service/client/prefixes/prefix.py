"""The keys and values of one prefix, and their use in a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from prefix_service.client.base_model_check import BaseModelCheck
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.kv import PrefixKV, extend_mask, position_ids, prefix_mask

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, repr=False)
class Prefix:
    """A prefix for a batch.

    A prefix from `get` is the caller's own, and may be written to: no other call and no cache sees it. The rows of one
    batch share memory, also with prefixes that `for_batch` returns: a value that is written to one row is in all of
    them. `materialise` gives each row memory of its own.
    """

    kv: PrefixKV
    metadata: Mapping[str, Any]
    """The service's metadata: tenant, adapter, version, digest, peft_type, num_virtual_tokens, …"""
    batch_size: int = 1
    rows: Tensor | None = None
    """`[L', 2, B, H', N, D]`, if the rows have memory of their own."""
    base_model: Fingerprint = NO_FINGERPRINT
    """The fingerprint of the version's base model, as far as the service knew it when the prefix was asked for."""
    base_model_check: BaseModelCheck = "off"
    """What `to_cache` and `generate` do with another model: the client's `base_model_check`."""

    def __repr__(self) -> str:
        metadata, tensor = self.metadata, self.kv.tensor
        layers, _, heads, tokens, size = tensor.shape
        dtype = str(tensor.dtype).removeprefix("torch.")
        return (
            f"<Prefix {metadata.get('tenant')}/{metadata.get('adapter')}@{metadata.get('version')}: "
            f"{self.batch_size} x {tokens} tokens, {layers} layers, {heads} heads of {size}, "
            f"{dtype} on {tensor.device}>"
        )

    @property
    def past_key_values(self) -> list[tuple[Tensor, Tensor]]:
        """One `(key, value)` per layer, each `[B, H', N, D]`."""
        if self.rows is None:
            return self.kv.pairs(self.batch_size)
        return [(layer[0], layer[1]) for layer in self.rows]

    @property
    def attention_mask(self) -> Tensor:
        """The mask of the prefix alone: int64 ones `[B, N]`."""
        return prefix_mask(self.batch_size, self.num_virtual_tokens).to(self.kv.tensor.device)

    @property
    def num_virtual_tokens(self) -> int:
        """N, the number of virtual tokens."""
        return self.kv.num_virtual_tokens

    @property
    def version(self) -> int:
        """The version's number."""
        return int(self.metadata["version"])

    @property
    def digest(self) -> str:
        """The version's digest."""
        return str(self.metadata["digest"])

    @property
    def name(self) -> str:
        """The version as people name it, `tenant/adapter@7`."""
        return f"{self.metadata['tenant']}/{self.metadata['adapter']}@{self.version}"

    @property
    def reference(self) -> str:
        """The version's immutable name, `tenant/adapter@sha256:…`."""
        return f"{self.metadata['tenant']}/{self.metadata['adapter']}@{self.digest}"

    def for_batch(self, batch_size: int) -> Self:
        """Returns the same prefix for another number of rows, which share one memory; nothing is copied.

        Raises:
            InvalidRequest: `batch_size` is less than 1.
        """
        if batch_size < 1:
            raise InvalidRequest(f"batch_size must be at least 1, got {batch_size}")
        return replace(self, batch_size=batch_size, rows=None)

    def materialise(self) -> Self:
        """Returns the prefix with memory of its own for each row, which may be
        written to: one copy, pinned if the prefix is.
        """
        shared = self.kv.tensor
        # (L', 2, H', N, D) -> (L', 2, B, H', N, D)
        shape = (*shared.shape[:2], self.batch_size, *shared.shape[2:])
        rows = torch.empty(shape, dtype=shared.dtype, device=shared.device, pin_memory=shared.is_pinned())
        return replace(self, rows=rows.copy_(shared.unsqueeze(2)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Returns the prefix on another device, or in another dtype."""
        target = None if device is None else torch.device(device)
        rows = None if self.rows is None else self.rows.to(device=target, dtype=dtype)
        return replace(self, kv=self.kv.to(device=target, dtype=dtype), rows=rows)

    def extend_mask(self, attention_mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the mask of prefix and input, `[B, S]` -> `[B, N + S]`, by default in the dtype of the input's mask.

        Falcon with ALiBi and 16 or more heads needs `torch.float32`, which PEFT always passes.
        """
        return extend_mask(attention_mask, self.num_virtual_tokens, dtype)

    def position_ids(self, attention_mask: Tensor) -> Tensor:
        """Returns the positions of the input's tokens behind the prefix, int64 `[B, S]`, for left and for right
        padding.

        They are for text models that count from 0, such as Llama or GPT-2. Models that compute positions themselves
        (with several dimensions, as Qwen2-VL, or counting from another number, as RoBERTa) get them from `generate`.
        """
        return position_ids(attention_mask, self.num_virtual_tokens)

    def to_cache(self, config: "PreTrainedConfig | PreTrainedModel", max_cache_len: int | None = None) -> "Cache":
        """Returns transformers' own cache for a model, filled with the prefix; needs the extra `transformers`.

        With the model's config, keys and values keep the device and dtype of the prefix: move it to the model's first
        (`to`). With the model itself, they take its dtype, and those of each layer go to that layer's device, even if
        the model is spread over devices or offloaded (`device_map`).

        With `max_cache_len` it is a static cache, for `torch.compile`, with room for that many tokens, including the
        prefix. BLOOM then needs a mask of that length, with zeros behind the tokens.

        Raises:
            DimensionMismatch: the prefix does not fit the model.
            BaseModelMismatch: its base model is another one, and the client refuses that.
            InvalidRequest: `max_cache_len` leaves no room, the architecture has no static cache, or a layer keeps
            something
                other than keys and values.
        """
        from prefix_service.client.transformers.caches import to_cache

        self._check_base_model(config)
        return to_cache(self.past_key_values, config, max_cache_len)

    def generate(self, model: Any, /, *args: Any, **options: Any) -> Any:
        """Returns the result of `model.generate` behind this prefix, with padding on either side.

        Images and other inputs of the model are passed in `options`. See
        `prefix_service.client.transformers.generation.generate`.

        Raises:
            DimensionMismatch: the prefix does not fit the model.
            BaseModelMismatch: its base model is another one, and the client refuses that.
            InvalidRequest: an option or an architecture cannot be used with a prefix.
        """
        from prefix_service.client.transformers.generation import generate

        self._check_base_model(model)
        pairs = self.kv.pairs() if self.rows is None else self.past_key_values
        return generate(model, pairs, *args, **options)

    def _check_base_model(self, model: Any) -> None:
        if self.base_model_check == "off":
            return
        from prefix_service.client.transformers.fingerprints import check_base_model

        check_base_model(self.name, self.base_model, model, self.base_model_check)

"""`PrefixEncoder` runs trained weights once on a device, and returns the keys and values of a prefix."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial, reduce
from math import prod, sqrt
from typing import Final, Literal, Self, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor, nn

from prefix_service.errors import InvalidCheckpoint
from prefix_service.prefix.checkpoint import BLOCK, LocatedPrefix, PrefixWeights
from prefix_service.prefix.config import CartridgeConfig, PrefixConfig, PrefixTuningConfig
from prefix_service.prefix.kv import PrefixKV

T = TypeVar("T")
InitWeights = Literal["random", "zero"]

HIDDEN_BLOCK: Final = 64 << 20
"""The size of an MLP's hidden activations in bytes above which its rows are computed in blocks."""

BLOCK_FLOPS: Final = 1 << 37
"""The floating-point operations of an MLP above which its rows are computed in blocks: about two seconds of one core.

For Llama 2 7B (32 layers, 4096) this is 63 tokens with 4096 hidden units, or 253 with 1024. Usual sizes are computed in
one block, as PEFT does, since other shapes can give other last bits.
"""

_DRAWN: Final = 1 << 24  # random numbers drawn per step; a multiple of the 16 that torch draws together

_ROWS: Final = ("prompt_embeddings", "embedding", "frozen_embedding", "trainable_embedding")

# hf_peft_ex multiplies from the right: its matrices are [in, out], nn.Linear's are [out, in].
_TRANSPOSED = frozenset({"transform.w1", "transform.w2"})


class PrefixEncoder:
    """An embedding of virtual tokens, optionally followed by a two-layer MLP (Li & Liang 2021, section 4.3).

    `P = E`, or `P = tanh(E W1 + b1) W2 + b2`, as in PEFT's `PrefixEncoder` and `CartridgeEncoder`. The MLP runs in
    float32 whatever the stored dtype is, and on batch 1, since all rows of a batch are equal. Without an MLP the stored
    values are never changed, so they stay bit-identical to PEFT's.

    The service calls the constructors, `rows`, `encode` and `encoding`. `forward`, `trainable_parameters` and
    `set_trainable_parameters` have no caller in the service: they are the interface of hf_peft_ex's encoder, for
    training code that uses this class as a library.
    """

    def __init__(self, config: PrefixConfig, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.config = config
        self.device = device
        self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    @classmethod
    def from_weights(cls, config: PrefixConfig, weights: PrefixWeights, device: torch.device) -> Self:
        """Returns the encoder of weights that `prefix_service.prefix.checkpoint.load_weights` read for this config."""
        return cls(config, weights.tensors, device)

    @classmethod
    def fresh(cls, config: PrefixConfig, init: InitWeights, seed: int, device: torch.device) -> Self:
        """Returns an untrained float32 encoder, with the distributions of `nn.Embedding` and `nn.Linear`.

        With `zero`, every key and value is zero, as with PEFT's `init_weights="zero"`. A seed gives the same weights on
        every device.

        Raises:
            InvalidConfig: a dimension is missing.
        """
        return finished(cls.drawing(config, init, seed, device))

    @classmethod
    def drawing(
        cls, config: PrefixConfig, init: InitWeights, seed: int, device: torch.device
    ) -> Generator[None, None, Self]:
        """Draws an untrained encoder in steps of at most 32 million random numbers, and returns it as `fresh` does.

        Raises:
            InvalidConfig: a dimension is missing.
        """
        config.require_dimensions()
        draw = torch.Generator().manual_seed(seed)
        tokens, width, token_dim = config.num_virtual_tokens, config.prefix_embedding_dim or 0, config.token_dim or 0
        projected = isinstance(config, PrefixTuningConfig) and config.prefix_projection and not config.inference_mode
        if isinstance(config, PrefixTuningConfig) and projected:
            config.require_projection_size()
        tensors = {"embedding": torch.empty(tokens, token_dim if projected else width)}
        yield from _filled(tensors["embedding"], partial(nn.init.normal_, generator=draw))
        if isinstance(config, PrefixTuningConfig) and projected:
            hidden = config.encoder_hidden_size or 0
            for name, inputs, shape in (
                ("transform.w1", token_dim, (hidden, token_dim)),
                ("transform.b1", token_dim, (hidden,)),
                ("transform.w2", hidden, (width, hidden)),
                ("transform.b2", hidden, (width,)),
            ):
                tensors[name], most = torch.empty(shape), 1 / sqrt(inputs)
                yield from _filled(tensors[name], partial(nn.init.uniform_, a=-most, b=most, generator=draw))
        if init == "zero":
            for name in ("transform.w2", "transform.b2") if projected else ("embedding",):
                tensors[name].zero_()
        if isinstance(config, CartridgeConfig):
            frozen, trainable = tensors["embedding"].tensor_split([config.num_frozen_tokens])
            tensors = {"frozen_embedding": frozen, "trainable_embedding": trainable}
        return cls(config, tensors, device)

    def rows(self) -> Iterator[Tensor]:
        """Yields the prefix as PEFT saves it, `[n, L * 2 * token_dim]`: float32 from an MLP, else in the stored dtype.

        All rows come in one block, unless an MLP's hidden activations exceed `HIDDEN_BLOCK` bytes or its work exceeds
        `BLOCK_FLOPS`. A block exceeds either bound only if it is a single row.

        Raises:
            InvalidCheckpoint: the MLP's result is not finite.
        """
        if "transform.w1" not in self._tensors:
            yield from (self._tensors[name] for name in _ROWS if name in self._tensors)
            return
        w = {name: tensor.to(torch.float32) for name, tensor in self._tensors.items()}
        for embedding in torch.split(w["embedding"], _rows_in_block(self.config)):
            hidden = F.linear(embedding, w["transform.w1"], w["transform.b1"]).tanh_()  # (n, hidden)
            rows = F.linear(hidden, w["transform.w2"], w["transform.b2"])  # (n, L*2*token_dim)
            del hidden
            if not all(bool(extreme.isfinite()) for extreme in rows.aminmax()):
                raise InvalidCheckpoint("the projection's result holds NaN or infinite values")
            yield rows

    def flat(self) -> Tensor:
        """Returns all rows, `[N, L * 2 * token_dim]`.

        Raises:
            InvalidCheckpoint: the MLP's result is not finite.
        """
        first, *others = self.rows()
        return torch.cat([first, *others]) if others else first

    def encode(self) -> PrefixKV:
        """Returns the keys and values of the prefix, on the encoder's device.

        Raises:
            InvalidCheckpoint: the MLP's result is not finite.
        """
        with torch.inference_mode():
            return finished(self.encoding())

    def encoding(self) -> Generator[None, None, PrefixKV]:
        """Computes the keys and values in one step per block of rows, and returns them. Run each step in inference
        mode.

        Raises:
            InvalidCheckpoint: the MLP's result is not finite.
        """
        dtype = torch.float32 if "transform.w1" in self._tensors else _common_dtype(self._tensors.values())
        return assembling(self.config, self.rows(), dtype, self.device)

    def forward(self, batch_size: int) -> Tensor:
        """Returns `past_key_values` of a batch, `[B, L, 2, H, N, D]`; its rows share one memory, so do not write to it.

        Raises:
            InvalidCheckpoint: the MLP's result is not finite.
        """
        return self.encode().stacked(batch_size)

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Returns the tensors that training changes, by hf_peft_ex's names.

        These are `embedding` and, with a projection, `transform.w1` `[in, out]`, `transform.b1`, `transform.w2` and
        `transform.b2`; for a CARTRIDGE `trainable_embedding`.
        """
        return {
            name: tensor.T if name in _TRANSPOSED else tensor
            for name, tensor in self._tensors.items()
            if name != "frozen_embedding"
        }

    def set_trainable_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Replaces the named parameters; the others keep their values.

        Raises:
            InvalidCheckpoint: a name is unknown, or a shape differs.
        """
        current = self.trainable_parameters()
        for name, tensor in parameters.items():
            if name not in current:
                raise InvalidCheckpoint(f"no parameter {name!r}; there are {', '.join(current)}")
            if tensor.shape != current[name].shape:
                raise InvalidCheckpoint(f"{name} has shape {list(current[name].shape)}, got {list(tensor.shape)}")
        for name, tensor in parameters.items():
            self._tensors[name] = (tensor.T if name in _TRANSPOSED else tensor).contiguous().to(self.device)


def finished(steps: Generator[None, None, T]) -> T:
    """Runs a generator to its end, and returns its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value


def assemble(config: PrefixConfig, rows: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> PrefixKV:
    """Returns the keys and values in the rows of a flat prefix, given as blocks `[n, L * 2 * token_dim]`."""
    return finished(assembling(config, rows, dtype, device))


def assembling(
    config: PrefixConfig, rows: Iterable[Tensor], dtype: torch.dtype, device: torch.device
) -> Generator[None, None, PrefixKV]:
    """Returns the keys and values in the rows of a flat prefix; each step takes one block `[n, L * 2 * token_dim]`."""
    shape = (
        config.num_layers or 0,
        2,
        config.num_attention_heads or 0,
        config.num_virtual_tokens,
        config.head_dim or 0,
    )
    kv, first = PrefixKV.whole(torch.empty(shape, dtype=dtype, device=device)), 0
    for block in rows:
        kv.put_rows(first, block, config.num_transformer_submodules)
        first += len(block)
        yield
    return kv


def _filled(tensor: Tensor, fill: Callable[[Tensor], object]) -> Iterator[None]:
    """Fills a tensor with the random numbers that one call would draw, a part of it in each step.

    The last part is at least as long as the others, since torch draws fewer than 16 normal numbers in another way.
    """
    flat = tensor.view(-1)
    count = max(1, len(flat) // _DRAWN)
    for part in range(count):
        fill(flat[part * _DRAWN : None if part == count - 1 else (part + 1) * _DRAWN])
        yield


def hidden_nbytes(config: PrefixConfig) -> int:
    """Returns the size in bytes of the MLP's hidden activations of all tokens."""
    hidden = config.encoder_hidden_size if isinstance(config, PrefixTuningConfig) else None
    return 4 * config.num_virtual_tokens * (hidden or 0)


def encoding_nbytes(config: PrefixConfig, file: LocatedPrefix) -> int:
    """Returns the peak host memory, in bytes, of reading and encoding a prefix, its keys and values included."""
    width = config.prefix_embedding_dim or 0
    key_values = config.num_virtual_tokens * width * file.encoded_dtype.itemsize
    if not file.is_projected:
        return key_values + max(BLOCK, width * file.dtype.itemsize)
    elements = sum(prod(entry.shape) for entry in file.entries.values())
    copied = 0 if file.dtype == torch.float32 else 4 * elements  # float32 of everything
    turned = 0 if file.layout.linear else max(prod(file.entries[name].shape) for name in _TRANSPOSED) * 4
    return file.nbytes + copied + turned + _running_nbytes(config) + key_values


def fresh_nbytes(config: PrefixConfig) -> int:
    """Returns the peak host memory, in bytes, of making an untrained prefix and its rows."""
    if isinstance(config, PrefixTuningConfig) and config.prefix_projection and not config.inference_mode:
        return 4 * (config.trainable_parameters or 0) + _running_nbytes(config)
    return 4 * config.num_virtual_tokens * (config.prefix_embedding_dim or 0)


def _running_nbytes(config: PrefixConfig) -> int:
    """Returns the size in bytes of the MLP's activations for one block, and of its result."""
    tokens = min(config.num_virtual_tokens, _rows_in_block(config))
    return tokens * (hidden_nbytes(config) // config.num_virtual_tokens + 4 * (config.prefix_embedding_dim or 0))


def _rows_in_block(config: PrefixConfig) -> int:
    row = hidden_nbytes(config) // config.num_virtual_tokens
    operations = 2 * (row // 4) * ((config.token_dim or 0) + (config.prefix_embedding_dim or 0))
    return max(1, min(config.num_virtual_tokens, HIDDEN_BLOCK // max(row, 1), BLOCK_FLOPS // max(operations, 1)))


def _common_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))

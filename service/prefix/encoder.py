"""`PrefixEncoder`: trained weights on a device, run once to the keys and values of a prefix."""

from collections.abc import Mapping
from math import sqrt
from typing import Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor

from service.errors import InvalidCheckpoint
from service.prefix.checkpoint import PrefixWeights
from service.prefix.config import CartridgeConfig, PrefixConfig, PrefixTuningConfig
from service.prefix.kv import PrefixKV

InitWeights = Literal["random", "zero"]

# hf_peft_ex multiplies from the right: its matrices are [in, out], nn.Linear's are [out, in].
_TRANSPOSED = frozenset({"transform.w1", "transform.w2"})


class PrefixEncoder:
    """An embedding of virtual tokens, with or without a two-layer MLP behind it (Li & Liang 2021, section 4.3).

    `P = tanh(E W1 + b1) W2 + b2`, or `P = E`; PEFT's `PrefixEncoder` and `CartridgeEncoder`. The MLP runs in float32
    whatever the weights were stored in, on batch 1: its rows are all equal. Values that need no MLP are never
    changed, so they stay bit-identical to PEFT's.
    """

    def __init__(self, config: PrefixConfig, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self.config = config
        self.device = device
        self._tensors = {name: tensor.to(device) for name, tensor in tensors.items()}

    @classmethod
    def from_weights(cls, config: PrefixConfig, weights: PrefixWeights, device: torch.device) -> Self:
        """The encoder of a checkpoint that `service.prefix.checkpoint.load_weights` read for this config."""
        return cls(config, weights.tensors, device)

    @classmethod
    def fresh(cls, config: PrefixConfig, init: InitWeights, seed: int, device: torch.device) -> Self:
        """An untrained encoder, float32, with the distributions of `nn.Embedding` and `nn.Linear`.

        `zero` makes every key and value zero, as PEFT's `init_weights="zero"` does. The same seed gives the same
        weights on every device.
        """
        config.require_dimensions()
        draw = torch.Generator().manual_seed(seed)
        tokens, width, token_dim = config.num_virtual_tokens, config.prefix_embedding_dim or 0, config.token_dim or 0
        projected = isinstance(config, PrefixTuningConfig) and config.prefix_projection and not config.inference_mode
        if isinstance(config, PrefixTuningConfig) and projected:
            config.require_projection_size()
        tensors = {"embedding": torch.randn(tokens, token_dim if projected else width, generator=draw)}
        if isinstance(config, PrefixTuningConfig) and projected:
            hidden = config.encoder_hidden_size or 0
            for name, inputs, shape in (
                ("transform.w1", token_dim, (hidden, token_dim)),
                ("transform.b1", token_dim, (hidden,)),
                ("transform.w2", hidden, (width, hidden)),
                ("transform.b2", hidden, (width,)),
            ):
                tensors[name] = torch.empty(shape).uniform_(-1 / sqrt(inputs), 1 / sqrt(inputs), generator=draw)
        if init == "zero":
            for name in ("transform.w2", "transform.b2") if projected else ("embedding",):
                tensors[name].zero_()
        if isinstance(config, CartridgeConfig):
            frozen, trainable = tensors["embedding"].tensor_split([config.num_frozen_tokens])
            tensors = {"frozen_embedding": frozen, "trainable_embedding": trainable}
        return cls(config, tensors, device)

    def flat(self) -> Tensor:
        """The prefix as PEFT saves it, `[N, L * 2 * token_dim]`; float32 from an MLP, else in the stored dtype.

        Raises:
            InvalidCheckpoint: the MLP's result is not finite.
        """
        found = self._tensors
        if "prompt_embeddings" in found:
            return found["prompt_embeddings"]
        if "trainable_embedding" in found:
            parts = [found[n] for n in ("frozen_embedding", "trainable_embedding") if n in found]
            return torch.cat(parts)  # (frozen, width) + (trainable, width) -> (N, width)
        if "transform.w1" not in found:
            return found["embedding"]
        w = {name: tensor.to(torch.float32) for name, tensor in found.items()}
        hidden = torch.tanh(F.linear(w["embedding"], w["transform.w1"], w["transform.b1"]))  # (N, hidden)
        flat = F.linear(hidden, w["transform.w2"], w["transform.b2"])  # (N, L*2*token_dim)
        if not bool(torch.isfinite(flat).all()):
            raise InvalidCheckpoint("the projection's result holds NaN or infinite values")
        return flat

    def encode(self) -> PrefixKV:
        """The keys and values of the prefix, on the encoder's device."""
        with torch.inference_mode():
            return PrefixKV.from_flat(
                self.flat(),
                num_layers=self.config.num_layers or 0,
                num_kv_heads=self.config.num_attention_heads or 0,
                num_transformer_submodules=self.config.num_transformer_submodules,
            )

    def forward(self, batch_size: int) -> Tensor:
        """`past_key_values` of a batch, `[B, L, 2, H, N, D]`; the rows are one memory."""
        return self.encode().stacked(batch_size)

    def trainable_parameters(self) -> dict[str, Tensor]:
        """What training moves, by stable name (hf_peft_ex's): `embedding`, and with a projection `transform.w1`
        `[in, out]`, `transform.b1`, `transform.w2`, `transform.b2`; for a cartridge `trainable_embedding`."""
        return {
            name: tensor.T if name in _TRANSPOSED else tensor
            for name, tensor in self._tensors.items()
            if name != "frozen_embedding"
        }

    def set_trainable_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Replace parameters by name; those not named stay.

        Raises:
            InvalidCheckpoint: an unknown name, or a shape that differs.
        """
        current = self.trainable_parameters()
        for name, tensor in parameters.items():
            if name not in current:
                raise InvalidCheckpoint(f"no parameter {name!r}; there are {', '.join(current)}")
            if tensor.shape != current[name].shape:
                raise InvalidCheckpoint(f"{name} has shape {list(current[name].shape)}, got {list(tensor.shape)}")
        for name, tensor in parameters.items():
            self._tensors[name] = (tensor.T if name in _TRANSPOSED else tensor).contiguous().to(self.device)

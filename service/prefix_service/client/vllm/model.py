"""The model that vLLM serves: whether it can take prefixes, and whether one fits. Imports no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, cast

from prefix_service.client.vllm.config import GARBAGE
from prefix_service.errors import DimensionMismatch, InvalidRequest
from prefix_service.prefix.variant import KVDtype

_DRAFTS_WITHOUT_A_MODEL: Final = ("ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True, slots=True)
class Model:
    """Totals over all ranks, the dtype of keys and values, the longest sequence in tokens, and the ranks that divide
    heads and layers among them."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KVDtype
    max_length: int
    tensor_ranks: int = 1
    pipeline_ranks: int = 1

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """Reads the model from vLLM's configuration."""
        model = vllm_config.model_config
        return cls(
            model.get_total_num_hidden_layers(),
            model.get_total_num_kv_heads(),
            model.get_head_size(),
            cast("KVDtype", str(model.dtype).removeprefix("torch.")),
            model.max_model_len,
            vllm_config.parallel_config.tensor_parallel_size,
            vllm_config.parallel_config.pipeline_parallel_size,
        )

    def nbytes_on_worker(self, num_virtual_tokens: int) -> int:
        """Returns the bytes of one rank's part of a prefix."""
        heads = -(-self.num_kv_heads // self.tensor_ranks)
        layers = -(-self.num_layers // self.pipeline_ranks)
        return 2 * layers * heads * num_virtual_tokens * self.head_dim * (4 if self.dtype == "float32" else 2)

    def check(self, metadata: Mapping[str, Any]) -> None:
        """Checks that a prefix fits.

        Raises:
            DimensionMismatch: it does not.
        """
        for name, wanted in (
            ("num_layers", self.num_layers),
            ("num_kv_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
        ):
            if metadata[name] != wanted:
                raise DimensionMismatch(
                    f"{metadata['tenant']}/{metadata['adapter']}@{metadata['version']} has {name} {metadata[name]}, "
                    f"the model that vLLM serves has {wanted}: it was trained for another model"
                )


def refuse_model(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuses a configuration of vLLM in which prefixes would be wrong, or were never tried.

    Raises:
        InvalidRequest: it is one.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    speculative, groups = vllm_config.speculative_config, kv_cache_config.kv_cache_groups
    reasons = {
        GARBAGE: transfer.kv_load_failure_policy != "fail",
        "models with latent attention (MLA) keep no keys and values of heads, which prefixes are": (
            vllm_config.model_config.use_mla
        ),
        "models with layers of other kinds than full attention (sliding windows, state spaces) are not supported": (
            len(groups) > 1
            or any(type(group.kv_cache_spec).__name__ != "FullAttentionSpec" for group in groups)
            or any(group.kv_cache_spec.sliding_window is not None for group in groups)
        ),
        "context parallelism is not supported": (
            parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "speculation with a draft model is not supported (ngram and suffix are): the draft has no prefix": (
            speculative is not None and speculative.method not in _DRAFTS_WITHOUT_A_MODEL
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise InvalidRequest(f"PrefixConnector: {reason}")

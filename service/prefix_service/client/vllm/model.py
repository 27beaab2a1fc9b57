"""The model that vLLM serves: whether it can take prefixes, and whether one fits. Imports no vLLM."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, cast

from prefix_service.client.vllm.config import GARBAGE
from prefix_service.errors import DimensionMismatch, InvalidRequest
from prefix_service.prefix.variant import KVDtype

_DRAFTS_WITHOUT_A_MODEL: Final = ("ngram", "ngram_gpu", "suffix")
_KEYS_AND_VALUES: Final = ("FullAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec")
"""vLLM's kinds of layers that keep a key and a value of each head and token; layers with a window keep the last."""
_STATES: Final = "MambaSpec"
_REORDERED: Final = "llama4_text"
"""The model whose keys vLLM keeps in another order than transformers (`permute_qk_weight_for_rotary`): in each head all
even dimensions before all odd ones."""


@dataclass(frozen=True, slots=True)
class Model:
    """Totals over all ranks, the dtype of keys and values, the longest sequence in tokens, and the ranks that divide
    heads and layers among them. Where layers differ in their heads or their size (Gemma 4), both are the largest.
    `evens_first`: vLLM keeps all even dimensions of a head's key before all odd ones (Llama 4)."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KVDtype
    max_length: int
    tensor_ranks: int = 1
    pipeline_ranks: int = 1
    layers_differ: bool = False
    evens_first: bool = False

    @classmethod
    def of(cls, vllm_config: Any) -> Self:
        """Reads the model from vLLM's configuration."""
        model = vllm_config.model_config
        shapes = _layer_shapes(model)
        return cls(
            model.get_total_num_hidden_layers(),
            max(heads for heads, _ in shapes),
            max(size for _, size in shapes),
            cast("KVDtype", str(model.dtype).removeprefix("torch.")),
            model.max_model_len,
            vllm_config.parallel_config.tensor_parallel_size,
            vllm_config.parallel_config.pipeline_parallel_size,
            len(shapes) > 1,
            model.hf_text_config.model_type == _REORDERED,
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
            if metadata[name] == wanted:
                continue
            reason = "it was trained for another model"
            if self.layers_differ and name != "num_layers" and metadata[name] < wanted:
                reason = "PEFT leaves its wider layers without a prefix, which vLLM cannot"
            raise DimensionMismatch(
                f"{metadata['tenant']}/{metadata['adapter']}@{metadata['version']} has {name} {metadata[name]}, "
                f"the model that vLLM serves has {wanted}: {reason}"
            )


def _layer_shapes(model: Any) -> set[tuple[int, int]]:
    """Returns the (heads, head size) of the model's layers, several if layers override the model's (Gemma 4)."""
    layers = getattr(model.hf_text_config, "per_layer_config", None) or ()
    shapes = {(getattr(one, "num_key_value_heads", None), getattr(one, "head_dim", None)) for one in layers}
    if len(shapes) > 1 and all(isinstance(number, int) for shape in shapes for number in shape):
        return cast("set[tuple[int, int]]", shapes)
    return {(model.get_total_num_kv_heads(), model.get_head_size())}


def refuse_model(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuses a configuration of vLLM in which prefixes would be wrong, or were never tried.

    Raises:
        InvalidRequest: it is one.
    """
    transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    kinds = {type(spec).__name__ for spec in _specs(kv_cache_config)}
    unknown = sorted(kinds - {*_KEYS_AND_VALUES, _STATES})
    reasons = {
        GARBAGE: transfer.kv_load_failure_policy != "fail",
        "models with latent attention (MLA) keep no keys and values of heads, which prefixes are": (
            vllm_config.model_config.use_mla
        ),
        "models with state-space layers (Mamba, gated delta nets, linear attention) are not supported: these keep a "
        "state in place of keys and values": _STATES in kinds,
        f"models with layers of the kind {', '.join(unknown)} are not supported": bool(unknown),
        "models whose layers differ in their heads or head sizes (Gemma 4) are not supported on several "
        "tensor-parallel ranks": parallel.tensor_parallel_size > 1 and len(_layer_shapes(vllm_config.model_config)) > 1,
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


def _specs(kv_cache_config: Any) -> Iterator[Any]:
    """Yields vLLM's descriptions of the layers' caches, of each group one or one for each layer."""
    for group in kv_cache_config.kv_cache_groups:
        yield from getattr(group.kv_cache_spec, "kv_cache_specs", {"all": group.kv_cache_spec}).values()

"""The parts of vLLM that the connector touches; they are looked for in its source at start, before vLLM is changed."""

from pathlib import Path
from typing import Final

from prefix_service.system import source_probe
from prefix_service.system.source_probe import Touched

_BASE: Final = "distributed/kv_transfer/kv_connector/v1/base.py"
_STATS: Final = "distributed/kv_transfer/kv_connector/v1/metrics.py"
_MULTI: Final = "distributed/kv_transfer/kv_connector/v1/multi_connector.py"

TOUCHED: Final[Touched] = {
    "v1/request.py": {
        "Request": {
            "__init__": ("sampling_params", "pooling_params", "lora_request", "cache_salt"),
            "update_block_hashes": (),
            **dict.fromkeys(
                (
                    "request_id", "prompt_token_ids", "_all_token_ids", "num_prompt_tokens", "block_hashes",
                    "kv_transfer_params", "skip_reading_prefix_cache", "trace_headers", "mm_features", "resumable",
                    "prompt_is_token_ids",
                ),
                (),
            ),
        }
    },
    "sampling_params.py": {
        "SamplingParams": dict.fromkeys(
            ("extra_args", "prompt_logprobs", "repetition_penalty", "skip_reading_prefix_cache"), ()
        )
    },
    "pooling_params.py": {"PoolingParams": {"extra_kwargs": ()}},
    _BASE: {
        "KVConnectorBase_V1": {
            "__init__": ("vllm_config", "role", "kv_cache_config"),
            "on_new_request": ("request",),
            "get_num_new_matched_tokens": ("request", "num_computed_tokens"),
            "update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
            "build_connector_meta": ("scheduler_output",),
            "update_connector_output": ("connector_output",),
            "request_finished": ("request", "block_ids"),
            "reset_cache": (),
            "register_kv_caches": ("kv_caches",),
            "start_load_kv": ("forward_context",),
            "get_transfer_results": ("finished_req_ids",),
            "build_connector_worker_meta": (),
            "get_kv_connector_stats": (),
            "build_kv_connector_stats": ("data",),
            "build_prom_metrics": ("vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
            "shutdown": (),
            "_get_connector_metadata": (),
            "_kv_transfer_config": (),
            "_kv_cache_config": (),
            "_vllm_config": (),
        },
        "SupportsHMA": {"request_finished_all_groups": ("request", "block_ids")},
        "KVConnectorTransferResults": {"finished_recving": (), "failed_recving": ()},
        "KVConnectorWorkerMetadata": {"aggregate": ("other",)},
        "KVConnectorMetadata": {},
    },
    _STATS: {
        "KVConnectorStats": {"aggregate": ("other",), "reduce": (), "is_empty": (), "data": ()},
        "KVConnectorPromMetrics": {"observe": ("transfer_stats_data", "engine_idx"), "per_engine_labelvalues": ()},
    },
    _MULTI: {"MultiConnector": {"_connectors": (), "_get_connector_classes_and_configs": ("vllm_config",)}},
    "v1/kv_cache_interface.py": {
        "KVCacheConfig": {"kv_cache_groups": ()},
        "KVCacheGroupSpec": {"layer_names": (), "kv_cache_spec": ()},
        "KVCacheSpec": {"block_size": ()},
        "UniformTypeKVCacheSpecs": {"kv_cache_specs": ()},
        "FullAttentionSpec": {},
        "SlidingWindowSpec": {},
        "ChunkedLocalAttentionSpec": {},
    },
    "v1/core/block_pool.py": {"BlockPool": {"null_block": ()}},
    "model_executor/layers/attention/attention.py": {
        "Attention": dict.fromkeys(
            ("impl", "kv_cache", "num_kv_heads", "head_size", "kv_sharing_target_layer_name"), ()
        )
    },
    "v1/outputs.py": {
        "KVConnectorOutput": dict.fromkeys(
            ("kv_connector_worker_meta", "finished_sending", "finished_recving", "failed_recving"), ()
        )
    },
    "v1/core/sched/output.py": {
        "SchedulerOutput": dict.fromkeys(
            (
                "scheduled_new_reqs", "scheduled_cached_reqs", "num_scheduled_tokens", "total_num_scheduled_tokens",
                "scheduled_spec_decode_tokens", "scheduled_encoder_inputs", "finished_req_ids", "preempted_req_ids",
                "kv_connector_block_state",
            ),
            (),
        ),
        "CachedRequestData": dict.fromkeys(
            (
                "req_ids", "resumed_req_ids", "new_token_ids", "all_token_ids", "new_block_ids", "num_computed_tokens",
                "num_output_tokens",
            ),
            (),
        ),
    },
    "v1/engine/__init__.py": {"EngineCoreOutput": {"trace_headers": (), "kv_transfer_params": ()}},
    "v1/engine/async_llm.py": {
        "AsyncLLM": {"generate": ("prompt", "sampling_params"), "encode": ("prompt", "pooling_params")}
    },
    "v1/engine/output_processor.py": {"OutputProcessor": {"process_outputs": ()}},
    "entrypoints/openai/models/serving.py": {
        "OpenAIServingModels": {
            "is_base_model": ("model_name",),
            "model_name": ("lora_request",),
            "show_available_models": (),
            "resolve_lora": ("lora_name",),
            "base_model_paths": (),
            "lora_requests": (),
            "lora_resolvers": (),
        }
    },
    "exceptions.py": {"GracefulHTTPError": {}},
}  # fmt: skip


def missing(package: Path) -> list[str]:
    """Returns the parts that the connector touches and that the vLLM in this folder lacks, described for people."""
    return source_probe.missing("vllm", package, TOUCHED)

"""What the connector touches in vLLM: looked for in vLLM's own source at start, before anything of it is changed.

The source is read, not imported: so nothing starts, and a vLLM for another machine can be looked at too.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_BASE: Final = "distributed/kv_transfer/kv_connector/v1/base.py"
_STATS: Final = "distributed/kv_transfer/kv_connector/v1/metrics.py"
_MULTI: Final = "distributed/kv_transfer/kv_connector/v1/multi_connector.py"

_Names = Mapping[str, tuple[str, ...]]

TOUCHED: Final[Mapping[str, Mapping[str, _Names]]] = {
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
            "_vllm_config": (),
        },
        "KVConnectorTransferResults": {"finished_recving": (), "failed_recving": ()},
        "KVConnectorWorkerMetadata": {"aggregate": ("other",)},
        "KVConnectorMetadata": {},
    },
    _STATS: {
        "KVConnectorStats": {"aggregate": ("other",), "reduce": (), "is_empty": (), "data": ()},
        "KVConnectorPromMetrics": {"observe": ("transfer_stats_data", "engine_idx"), "per_engine_labelvalues": ()},
    },
    _MULTI: {"MultiConnector": {"_connectors": (), "_get_connector_classes_and_configs": ("vllm_config",)}},
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
"""By file and class: fields, and methods with the parameters that they must have."""


def missing(package: Path) -> list[str]:
    """Returns what is touched and the vLLM in this folder does not have, as people read it."""
    return [name for file, classes in TOUCHED.items() for name in _missing_in(package / file, file, classes)]


def _missing_in(path: Path, file: str, classes: Mapping[str, _Names]) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        yield f"vllm/{file}"
        return
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, members in classes.items():
        if name not in found:
            yield f"{name} (vllm/{file})"
            continue
        has = _members(found[name])
        for member, parameters in members.items():
            if member not in has:
                yield f"{name}.{member} (vllm/{file})"
            for parameter in parameters:
                if member in has and parameter not in has[member]:
                    yield f"the parameter {parameter} of {name}.{member} (vllm/{file})"


def _members(found: ast.ClassDef) -> dict[str, set[str]]:
    """Returns the fields, and the methods with their parameters, that a class has itself."""
    has: dict[str, set[str]] = {}
    for node in ast.walk(found):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
            has.setdefault(node.name, set()).update(one.arg for one in named)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
                if isinstance(target, ast.Name | ast.Attribute):
                    has.setdefault(target.id if isinstance(target, ast.Name) else target.attr, set())
    return has

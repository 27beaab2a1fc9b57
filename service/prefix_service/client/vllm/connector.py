"""The connector that vLLM loads: passes its hooks to the scheduler's or the worker's half. Read against vLLM 0.32.0.

`vllm.v1.core.sched.scheduler.Scheduler` asks for matched tokens before it allocates; `(None, False)` leaves a request
waiting while others run, and `(n, True)` holds its blocks until every worker has reported it as done or failed.
Metadata goes to the workers with each step, and comes back (`KVConnectorOutput.kv_connector_worker_meta`). Steps,
though empty, happen while any request waits (`EngineCore.step`, `KVConnectorModelRunnerMixin.kv_connector_no_forward`),
so workers can fetch bytes, and report them, before a block is claimed.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from prefix_service.client.vllm.base_model import BaseModel
from prefix_service.client.vllm.config import CONNECTOR, MODULE, MULTI_CONNECTOR, ConnectorConfig
from prefix_service.client.vllm.events import name_adapters
from prefix_service.client.vllm.metrics import PrefixMetrics, PrefixStats
from prefix_service.client.vllm.model import Model, refuse_model
from prefix_service.client.vllm.resolver import Resolver
from prefix_service.client.vllm.reused_memory import ReusedMemory
from prefix_service.client.vllm.scheduler import SchedulerHalf
from prefix_service.client.vllm.shelf import Orders, Reports, Shelf
from prefix_service.client.vllm.source import Source
from prefix_service.client.vllm.tally import Tally
from prefix_service.client.vllm.worker import Layer, WorkerHalf
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.ranks import kv_heads_of_rank


@dataclass
class PrefixOrders(KVConnectorMetadata):  # type: ignore[misc] # vLLM is not installed where mypy runs
    """The message that the scheduler sends to the workers with each step."""

    orders: Orders = field(default_factory=Orders)


@dataclass
class PrefixReports(KVConnectorWorkerMetadata):  # type: ignore[misc] # vLLM is not installed where mypy runs
    """The message that the workers send back."""

    reports: Reports

    def aggregate(self, other: "PrefixReports") -> "PrefixReports":
        """Returns the reports of two groups of workers as one."""
        return PrefixReports(self.reports.aggregate(other.reports))


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc] # vLLM is not installed where mypy runs
    """Prefixes of prefix-service as keys and values that vLLM need not compute.

    Raises:
        InvalidRequest: `kv_connector_extra_config` is wrong, or this engine cannot serve prefixes.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        refuse_model(vllm_config, kv_cache_config)
        config = ConnectorConfig.of(self._kv_transfer_config.kv_connector_extra_config)
        model = Model.of(vllm_config)
        self.half: Any
        if role == KVConnectorRole.SCHEDULER:
            tally = Tally()
            shelf = Shelf(config.cache_bytes, vllm_config.parallel_config.world_size, tally)
            base_model = BaseModel(vllm_config, config.base_model_check)
            resolver = Resolver(Source(config), model, base_model)
            self.half = SchedulerHalf(resolver, shelf, model, config, tally)
        else:
            rank = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            heads = kv_heads_of_rank(model.num_kv_heads, rank)
            source = Source(config, ReusedMemory(config.cache_bytes))  # no cache: the scheduler decides what stays
            self.half = WorkerHalf(source, model, heads, config.cache_bytes)

    # --- The scheduler ---

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Has the pool of blocks name adapters in its KV events."""
        name_adapters(gpu_block_pool, self.half.adapter_of)

    def on_new_request(self, request: Any) -> None:
        """Prepares a request that arrived."""
        self.half.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Returns how many tokens of a request come from its prefix, and whether they come later."""
        answer: tuple[int | None, bool] = self.half.matched(request, num_computed_tokens)
        return answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Notes the blocks of a request, so that this step fills them."""
        self.half.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> PrefixOrders:
        """Returns the orders for the workers."""
        return PrefixOrders(self.half.take_orders(has_work=scheduler_output.total_num_scheduled_tokens > 0))

    def update_connector_output(self, connector_output: Any) -> None:
        """Notes the reports of the workers."""
        metadata = connector_output.kv_connector_worker_meta
        if metadata is not None:
            self.half.take_reports(metadata.reports)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forgets a request that ended; its blocks may be freed immediately."""
        return False, self.half.finished(request)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Forgets a request that ended; vLLM calls this instead of `request_finished`, with the blocks of each group
        of layers."""
        return False, self.half.finished(request)

    def reset_cache(self) -> bool:
        """Forgets versions and bytes; vLLM calls this for `reset_prefix_cache` with `reset_connector`."""
        self.half.forget()
        return True

    # --- Metrics ---

    def get_kv_connector_stats(self) -> PrefixStats | None:
        """Returns the scheduler's counts since the last step; workers count nothing."""
        if self.role != KVConnectorRole.SCHEDULER:
            return None
        counted = self.half.counted()
        return None if counted is None else PrefixStats(counted)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PrefixStats:
        """Returns the counts in the process that serves `/metrics`, to which vLLM sent them as `data`."""
        return PrefixStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PrefixMetrics:
        """Returns the metrics of the process that serves `/metrics`."""
        return PrefixMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- The worker ---

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Registers the layers of this rank.

        Raises:
            InvalidRequest: prefixes cannot be written to them, or vLLM's own MultiConnector holds this connector.
        """
        holder = get_kv_transfer_group()
        if holder is not self and getattr(holder, "prefixes", None) is not self:
            raise InvalidRequest(
                f"{CONNECTOR} cannot be used in vLLM's {MULTI_CONNECTOR}, whose other connectors would take one "
                f'adapter\'s keys and values for another\'s: add "kv_connector_module_path": "{MODULE}" beside '
                f'"kv_connector": "{MULTI_CONNECTOR}", which then keeps requests with adapters from the others'
            )
        modules = self._vllm_config.compilation_config.static_forward_context
        groups = {
            name: (number, group.kv_cache_spec.block_size)
            for number, group in enumerate(self._kv_cache_config.kv_cache_groups)
            for name in group.layer_names
        }
        layers = {}
        for name in kv_caches:
            if modules[name].kv_sharing_target_layer_name is None:  # else it reads another layer's keys and values
                layers[extract_layer_index(name)] = Layer(modules[name], *groups[name])
        self.half.register(layers)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begins the scheduler's orders."""
        self.half.start(self._get_connector_metadata().orders)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Writes the prefixes that this step loads, and reports their requests."""
        done, failed = self.half.finish()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def build_connector_worker_meta(self) -> PrefixReports | None:
        """Returns the fetches that ended since the last step, and what this step could not write."""
        reports = self.half.reports()
        return PrefixReports(reports) if reports.arrived or reports.failed or reports.unwritten else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: a request begins when all of its layers are written."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Does nothing: prefixes are only read."""

    def wait_for_save(self) -> None:
        """Does nothing: prefixes are only read."""

    # --- Both ---

    def shutdown(self) -> None:
        """Ends threads and connections."""
        self.half.close()

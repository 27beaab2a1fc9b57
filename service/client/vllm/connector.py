"""The class that vLLM loads: its hooks, handed to the half that this process is. Read against vLLM 0.32.0.

`vllm.v1.core.sched.scheduler.Scheduler` asks for matched tokens before it allocates; `(None, False)` leaves a request
waiting and others running, `(n, True)` holds its blocks until every worker has reported it, done or failed.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from service.client.vllm.config import CONNECTOR, MODULE, MULTI_CONNECTOR, ConnectorConfig
from service.client.vllm.model import Model, refuse_model
from service.client.vllm.scheduler import Load, SchedulerHalf
from service.client.vllm.worker import WorkerHalf
from service.errors import InvalidRequest
from service.prefix.ranks import kv_heads_of_rank


@dataclass
class PrefixLoads(KVConnectorMetadata):  # type: ignore[misc] # vLLM is not installed where mypy runs
    """What travels from the scheduler to the workers with each step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):  # type: ignore[misc] # as above
    """Prefixes of prefix-service as keys and values that vLLM need not compute.

    Raises:
        InvalidRequest: `kv_connector_extra_config` is wrong, or this engine cannot serve prefixes.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        refuse_model(vllm_config, kv_cache_config)
        config = ConnectorConfig.of(self._kv_transfer_config.kv_connector_extra_config)
        client = config.client()
        model = Model.of(vllm_config)
        self.half: Any
        if role == KVConnectorRole.SCHEDULER:
            self.half = SchedulerHalf(client, model, config.other_parameters)
        else:
            rank = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            heads = kv_heads_of_rank(model.num_kv_heads, rank)
            self.half = WorkerHalf(client, model, heads, vllm_config.cache_config.block_size)

    # --- The scheduler ---

    def on_new_request(self, request: Any) -> None:
        """A request arrived."""
        self.half.arrived(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """What of a request comes from its prefix."""
        answer: tuple[int | None, bool] = self.half.matched(request, num_computed_tokens)
        return answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has its blocks."""
        self.half.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> PrefixLoads:
        """What workers have to load."""
        return PrefixLoads(self.half.take_loads())

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request ended; its blocks may go at once."""
        return False, self.half.finished(request.request_id)

    # --- The worker ---

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """The layers of this rank.

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
        layers = self._vllm_config.compilation_config.static_forward_context
        self.half.register({extract_layer_index(name): layers[name] for name in kv_caches})

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin what the scheduler asked for."""
        self.half.start(self._get_connector_metadata().loads)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Write what has arrived, and tell."""
        done, failed = self.half.finish()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: a request begins when all its layers are there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: prefixes are only read."""

    def wait_for_save(self) -> None:
        """Nothing: prefixes are only read."""

    # --- Both ---

    def shutdown(self) -> None:
        """End threads and connections."""
        self.half.close()

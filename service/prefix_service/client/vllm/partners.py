"""vLLM's `MultiConnector`, with partners that never see a request that names an adapter. Read against vLLM 0.32.0.

A partner may key what it stores by token ids, as vLLM's ExampleConnector does, or by hashes that it takes when a
request arrives. The placeholders of all adapters are the same ids, so such a partner would give one adapter's keys and
values to another, or to a plain request. Here each partner's hooks pass over the requests that name an adapter: nothing
of an adapter is stored in a partner, and nothing that a partner stored is loaded for an adapter.
"""

from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import multi_connector
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

from prefix_service.client.vllm.config import CONNECTOR, refuse_partners
from prefix_service.client.vllm.connector import PrefixConnector


class MultiConnector(multi_connector.MultiConnector):  # type: ignore[misc] # vLLM is not installed where mypy runs
    """A `PrefixConnector` and its partners, in any order.

    Raises:
        InvalidRequest: a request could be answered without its adapter, or with another's, in this configuration.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        refuse_partners(vllm_config.kv_transfer_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._claimed = set[str]()  # requests that name an adapter, until a step has reported them as finished
        (self.prefixes,) = (one for one in self._connectors if isinstance(one, PrefixConnector))
        for partner in self._partners():
            partner.claimed = self._claimed

    def _partners(self) -> list[Any]:
        return [one for one in self._connectors if one is not self.prefixes]

    @classmethod
    def _get_connector_classes_and_configs(cls, vllm_config: Any) -> list[tuple[type, Any]]:
        found = super()._get_connector_classes_and_configs(vllm_config)
        return [(kind if issubclass(kind, PrefixConnector) else _unseeing(kind), config) for kind, config in found]

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """Returns the connectors' statistics; vLLM knows only the classes of its own connectors by name."""
        if data is not None and CONNECTOR in data:
            data = {**data, CONNECTOR: PrefixConnector.build_kv_connector_stats(data[CONNECTOR])}
        return super().build_kv_connector_stats(data)

    def on_new_request(self, request: Any) -> None:
        """Asks the PrefixConnector first: partners must not see a request that names an adapter."""
        self.prefixes.on_new_request(request)
        if self.prefixes.half.claims(request.request_id):
            self._claimed.add(request.request_id)
        for partner in self._partners():
            partner.on_new_request(request)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """Describes this step to the workers, then forgets the claimed requests that it reports as finished."""
        metadata = super().build_connector_meta(scheduler_output)
        self._claimed -= scheduler_output.finished_req_ids
        return metadata


class _Unseeing:
    """The scheduler's hooks of a partner, without the requests in `claimed`; its workers act on what these return."""

    claimed: AbstractSet[str] = frozenset()

    def on_new_request(self, request: Any) -> None:
        if request.request_id not in self.claimed:
            super().on_new_request(request)  # type: ignore[misc] # of the partner's class, here and below

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if request.request_id in self.claimed:
            return 0, False
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)  # type: ignore[misc]
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if request.request_id not in self.claimed:
            super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[misc]

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return super().build_connector_meta(_without(scheduler_output, self.claimed))  # type: ignore[misc]

    def update_connector_output(self, connector_output: Any) -> None:
        seen = replace(
            connector_output,
            finished_sending=_less(connector_output.finished_sending, self.claimed),
            finished_recving=_less(connector_output.finished_recving, self.claimed),
            failed_recving=_less(connector_output.failed_recving, self.claimed),
        )
        super().update_connector_output(seen)  # type: ignore[misc]

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if request.request_id in self.claimed:
            return False, None
        finished: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)  # type: ignore[misc]
        return finished

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if request.request_id in self.claimed:
            return False, None
        finished: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(request, block_ids)  # type: ignore[misc]
        return finished

    def register_finished_partial_tail(self, request: Any, block_ids: Any, partial_tail_offloads: Any) -> bool:
        if request.request_id in self.claimed:
            return False
        return bool(super().register_finished_partial_tail(request, block_ids, partial_tail_offloads))  # type: ignore[misc]


def _unseeing(kind: type) -> type:
    """Returns a subclass of the same name, by which vLLM finds a connector's statistics."""
    return type(kind.__name__, (_Unseeing, kind), {"__module__": kind.__module__})


def _less(ids: set[str] | None, claimed: AbstractSet[str]) -> set[str] | None:
    return None if ids is None else ids - claimed


def _without(output: SchedulerOutput, claimed: AbstractSet[str]) -> SchedulerOutput:
    """Returns a step's output without some of its requests."""
    if not claimed:
        return output
    scheduled = {name: count for name, count in output.num_scheduled_tokens.items() if name not in claimed}
    state = output.kv_connector_block_state
    return replace(
        output,
        scheduled_new_reqs=[one for one in output.scheduled_new_reqs if one.req_id not in claimed],
        scheduled_cached_reqs=_cached_without(output.scheduled_cached_reqs, claimed),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens=_kept(output.scheduled_spec_decode_tokens, claimed),
        scheduled_encoder_inputs=_kept(output.scheduled_encoder_inputs, claimed),
        finished_req_ids=output.finished_req_ids - claimed,
        preempted_req_ids=_less(output.preempted_req_ids, claimed),
        kv_connector_block_state=state
        and replace(
            state,
            req_ids=state.req_ids - claimed,
            boundary_state_offloads=_kept(state.boundary_state_offloads, claimed),
        ),
    )


def _cached_without(cached: CachedRequestData, claimed: AbstractSet[str]) -> CachedRequestData:
    rows = [row for row, name in enumerate(cached.req_ids) if name not in claimed]

    def kept(column: list[Any]) -> list[Any]:
        return [column[row] for row in rows] if column else column  # some columns are empty in some configurations

    return CachedRequestData(
        req_ids=kept(cached.req_ids),
        resumed_req_ids=cached.resumed_req_ids - claimed,
        new_token_ids=kept(cached.new_token_ids),
        all_token_ids=_kept(cached.all_token_ids, claimed),
        new_block_ids=kept(cached.new_block_ids),
        num_computed_tokens=kept(cached.num_computed_tokens),
        num_output_tokens=kept(cached.num_output_tokens),
    )


def _kept(entries: dict[str, Any], claimed: AbstractSet[str]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if name not in claimed}

"""Adapters in vLLM's `/metrics`, in the shapes that vLLM gives to its LoRAs, and in its log.

`vllm:prefix_adapter_loaded` is of the shape that vLLM is settling for loaded LoRAs (its pull request 54830), and
`vllm:prefix_adapter_info` of that of `vllm:lora_requests_info`, which today's routers read.

Read against vLLM 0.32.0: the engine's process counts (`tally.py`), and vLLM hands the counts to the process that serves
`/metrics` as `SchedulerStats.kv_connector_stats`.
"""

import os
from collections.abc import Callable
from typing import Any, Final

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from prefix_service.client.vllm import tally

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_CHANGES: Final = (tally.LOADED, tally.LEFT)
_MAX_LORA: Final = str(tally.MOST_NAMED + 1)  # routers take an engine with so many for full, and none of ours ever is
_SHARED: Final = "PROMETHEUS_MULTIPROC_DIR"  # several API servers write their metrics into files, and remove none


class PrefixStats(KVConnectorStats):  # type: ignore[misc] # vLLM is not installed where mypy runs
    """The scheduler's counts since its last step."""

    def reset(self) -> None:
        """Forgets the counts."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: "PrefixStats") -> "PrefixStats":
        """Returns these counts and later ones as one."""
        return PrefixStats(tally.added(self.data, other.data) if self.data and other.data else self.data or other.data)

    def reduce(self) -> dict[str, int | float]:
        """Returns a summary for vLLM's log."""
        seconds = self.data[tally.LOAD_SECONDS]
        return {
            "Prefix loads": len(seconds),
            "Avg prefix load time (ms)": round(1000 * sum(seconds) / max(1, len(seconds)), 3),
            "Prefix bytes loaded (MB)": round(self.data[tally.LOAD_BYTES] / 1e6, 3),
            "Prefix requests failed": self.data[tally.FAILURES],
        }

    def is_empty(self) -> bool:
        """Returns whether nothing was counted."""
        return not self.data


class PrefixMetrics(KVConnectorPromMetrics):  # type: ignore[misc] # vLLM is not installed where mypy runs
    """The metrics of a process that serves `/metrics`, with series for each engine."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, labelvalues)
        gauge, counter, histogram = (metric_types[kind] for kind in (Gauge, Counter, Histogram))
        self._gauge = gauge(
            name="vllm:prefix_adapter_loaded",
            documentation="Prefix adapters that are loaded: level cpu, in the host memory of every worker; level gpu, "
            "in the KV cache of a request under way. 1 while an adapter is loaded.",
            labelnames=[*labelnames, "adapter_name", "level"],
            multiprocess_mode="mostrecent",
        )
        self._removes = _SHARED not in os.environ and hasattr(self._gauge, "remove")  # Ray's gauges have none
        self._listed: dict[int, tuple[str, ...]] = {}
        if self._removes:  # each set of adapters has a series of its own: the last one must go
            self._info = gauge(
                name="vllm:prefix_adapter_info",
                documentation="Prefix adapters in the host memory of every worker, as routers read vLLM's LoRAs: one "
                "list, whose value is the time in seconds since 1970 at which it was made.",
                labelnames=[*labelnames, "running_lora_adapters", "waiting_lora_adapters", "max_lora"],
            )
            for engine in self.per_engine_labelvalues:
                self._list(set(), engine)
        self._load_seconds = self._of_engines(
            histogram,
            "vllm:prefix_adapter_load_seconds",
            "Time from the first request for a prefix adapter until every worker has its bytes.",
            buckets=_SECONDS,
        )
        self._load_bytes = self._of_engines(
            counter, "vllm:prefix_adapter_load_bytes", "Bytes of prefix adapters that workers took from the service."
        )
        self._wait_seconds = self._of_engines(
            histogram,
            "vllm:prefix_adapter_wait_seconds",
            "Time that a request waited for the versions and bytes of its prefix adapters.",
            buckets=_SECONDS,
        )
        self._failures = self._of_engines(
            counter, "vllm:prefix_adapter_failures", "Requests that failed because of their prefix adapters."
        )
        self._shown: dict[int, set[tuple[str, str]]] = {}

    def _of_engines(self, kind: Callable[..., Any], name: str, documentation: str, **more: Any) -> dict[int, Any]:
        metric = kind(name=name, documentation=documentation, labelnames=self._labelnames, **more)
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds the counts of an engine's scheduler."""
        for seconds in transfer_stats_data[tally.LOAD_SECONDS]:
            self._load_seconds[engine_idx].observe(seconds)
        for seconds in transfer_stats_data[tally.WAIT_SECONDS]:
            self._wait_seconds[engine_idx].observe(seconds)
        self._load_bytes[engine_idx].inc(transfer_stats_data[tally.LOAD_BYTES])
        self._failures[engine_idx].inc(transfer_stats_data[tally.FAILURES])
        if tally.LOADED in transfer_stats_data:
            loaded, left = ({(name, level) for name, level in transfer_stats_data[key]} for key in _CHANGES)
            self._show(loaded, left, engine_idx)
            if self._removes:
                self._list({name for name, level in loaded if level == tally.HOST}, engine_idx)

    def _show(self, loaded: set[tuple[str, str]], left: set[tuple[str, str]], engine: int) -> None:
        """Sets the series of loaded adapters to 1, and removes the others.

        Series that cannot be removed are set to 0, those of other servers too: of all servers' values, the one that was
        set last counts, so each of them is set each time.
        """
        values, shown = self.per_engine_labelvalues[engine], self._shown.setdefault(engine, set())
        if self._removes:
            for key in shown - loaded:
                self._gauge.remove(*map(str, values), *key)
                shown.remove(key)
        for key in loaded - shown if self._removes else [*loaded, *(left | shown) - loaded]:
            if key in shown or len(shown) < tally.MOST_NAMED:
                shown.add(key)
                self._gauge.labels(*values, *key).set(int(key in loaded))

    def _list(self, names: set[str], engine: int) -> None:
        """Replaces an engine's list of adapters. Several in one request are left out: a comma ends a name there."""
        running = ",".join(sorted(name for name in names if "," not in name))
        values = (*map(str, self.per_engine_labelvalues[engine]), running, "", _MAX_LORA)
        self._info.labels(*values).set_to_current_time()
        last = self._listed.get(engine, values)
        if last != values:
            self._info.remove(*last)
        self._listed[engine] = values

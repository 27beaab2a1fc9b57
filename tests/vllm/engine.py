"""Runs one `LLM()` for lines of JSON. .venv-vllm's Python runs it, so it imports nothing of the tests.

Connects to the Unix socket in argv[1], and reads a line of JSON each, `{"engine": {<arguments of LLM>}}` first, then
any of these:

- `{"jobs": [{"prompt": [ids], "adapter": …, …}], "max_tokens": n}`; a job's `extra` replaces its `extra_args`
- `{"salted": false}`: blocks are hashed without our salt
- `{"salt_of": {<a job>}}`: the salt of its blocks, which nobody outside of the engine sees
- `{"default": "tenant/adapter"}`: the configuration has this default adapter from now on; null removes it
- `{"hidden": false}`: partners see requests with adapters
- `{"connect": {<kv_transfer_config>}}`: another connector for this engine, as if it had started with it
- `{"hooks": true}`: vLLM's hooks that take a request, of which partners are kept from some
- `{"metrics": true}`: the lines of its metrics that are ours
- `{"series": {"readings": [[names, names], …], "shared": …}}`: the series after each reading in turn of what is loaded
  and what has left, with or without files that several servers share
- `{"events": [<jobs>]}`: the blocks that its KV events report for these jobs, without other requests: name, tokens,
  and the extra keys of their hashes
- `{"written": true}`: what the code of vLLM's backends for GPUs makes of a prefix, by `writers.py`
- `{"loaded": {<a job>}}`: what the blocks of a prefix hold after its load, as a digest
- `{"spare": n}`: the worker keeps at most so many bytes of memory that prefixes have left
- `{"forget": "blocks"}` (vLLM's prefix cache) or `"all"` (what the connectors remember too)

Writes a line of JSON for each.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers lines until the connection ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        with connection.makefile() as questions, connection.makefile("w") as answers:
            _answer(questions, answers)


def _answer(questions: Any, answers: Any) -> None:
    from vllm import LLM
    from vllm.config import KVEventsConfig

    arguments = json.loads(questions.readline())["engine"]
    if "kv_events_config" in arguments:
        arguments["kv_events_config"] = KVEventsConfig(**arguments["kv_events_config"])
    llm = LLM(**arguments)
    _say(answers, {"ready": True})
    for line in questions:
        _say(answers, _done(llm, json.loads(line)))


def _done(llm: Any, asked: dict[str, Any]) -> dict[str, Any] | list[list[float]]:
    (verb, value), *_ = asked.items()
    verbs: dict[str, Callable[..., Any]] = {
        "salted": _switch_salt,
        "salt_of": _salt_of,
        "default": _switch_default,
        "hidden": _switch_hiding,
        "connect": _connect,
        "hooks": _open_hooks,
        "metrics": _metrics,
        "series": _series,
        "events": _events,
        "written": _written,
        "loaded": _digest_loaded,
        "spare": _limit_spare,
        "forget": _forget,
    }
    return verbs[verb](llm, value) if verb in verbs else _run(llm, **asked)


def _say(answers: Any, what: Any) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def _run(llm: Any, jobs: list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams

    prompts, params = [], []
    for job in jobs:
        prompt = {"prompt_token_ids": job["prompt"]}
        if "salt" in job:
            prompt["cache_salt"] = job["salt"]
        prompts.append(prompt)
        adapter = job.get("adapter")
        named = {"kv_transfer_params": {"prefix_adapter": adapter}} if adapter is not None else None
        extra = job.get("extra", named)
        options = {"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": 1, **job.get("options", {})}
        params.append(SamplingParams(max_tokens=max_tokens, extra_args=extra, **options))
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"outputs": [_told(output) for output in outputs], "preemptions": _preemptions(llm), "seconds": seconds}


def _told(output: Any) -> dict[str, Any]:
    made = output.outputs[0]
    return {
        "tokens": list(made.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(made.logprobs or [], made.token_ids, strict=True)],
        "finish": made.finish_reason,
        "cached": output.num_cached_tokens,
        "params": output.kv_transfer_params,
        "prompt": list(output.prompt_token_ids),
    }


def _preemptions(llm: Any) -> int:
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"))


def _forget(llm: Any, what: str) -> dict[str, Any]:
    return {"reset": llm.reset_prefix_cache(reset_connector=what == "all")}


def _limit_spare(llm: Any, nbytes: int) -> dict[str, int]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    get_kv_transfer_group().half._source._memory._budget = nbytes
    return {"spare": nbytes}


def _switch_salt(llm: Any, salted: bool) -> dict[str, Any]:
    """Removes our salt, as a negative control, or restores it."""
    from prefix_service.client.vllm.salt import Salts

    half = llm.llm_engine.engine_core.engine_core.scheduler.connector.half
    half._salts = Salts() if salted else _Unsalted()
    return {"reset": llm.reset_prefix_cache()}


def _salt_of(llm: Any, job: dict[str, Any]) -> dict[str, str]:
    salts = llm.llm_engine.engine_core.engine_core.scheduler.connector.half._salts
    made, of = [], salts.of

    def noted(*what: Any) -> str:
        made.append(of(*what))
        return str(made[-1])

    salts.of = noted
    try:
        _run(llm, [job], 1)
    finally:
        del salts.of
    return {"salt": made[-1]}


def _switch_default(llm: Any, adapter: str | None) -> dict[str, Any]:
    half = llm.llm_engine.engine_core.engine_core.scheduler.connector.half
    half._config = half._config.model_copy(update={"default_adapter": adapter})
    return {"default": half._config.default_adapter}


def _switch_hiding(llm: Any, hidden: bool) -> dict[str, Any]:
    """Lets partners see requests that name an adapter, as a negative control, or hides them again."""
    connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
    for partner in connector._partners():
        partner.claimed = connector._claimed if hidden else frozenset()
    return {"reset": llm.reset_prefix_cache()}


def _connect(llm: Any, transfer: dict[str, Any]) -> dict[str, Any]:
    """Makes a worker's connector as vLLM does at its start; returns the error that ends the start, if any."""
    import copy

    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer import kv_transfer_state
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole

    config = copy.copy(llm.llm_engine.vllm_config)
    config.kv_transfer_config = KVTransferConfig(**transfer)
    kept, layers = kv_transfer_state._KV_CONNECTOR_AGENT, config.compilation_config.static_forward_context
    kv_cache_config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    try:
        made = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_cache_config)
        kv_transfer_state._KV_CONNECTOR_AGENT = made
        made.register_kv_caches({name: layer.kv_cache for name, layer in layers.items()})
        made.shutdown()
    except Exception as error:  # noqa: BLE001 - the test compares its words
        return {"error": str(error)}
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = kept
    return {"error": None}


def _open_hooks(llm: Any, _: bool) -> dict[str, list[str]]:
    import inspect

    from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA

    from prefix_service.client.vllm.partners import _Unseeing

    of_requests = {"request", "scheduler_output", "connector_output"}
    found = [*inspect.getmembers(KVConnectorBase_V1, callable), *inspect.getmembers(SupportsHMA, callable)]
    own = [(name, hook) for name, hook in found if not name.startswith("__")]
    hooks = {name for name, hook in own if of_requests & set(inspect.signature(hook).parameters)}
    return {"open": sorted(hooks - set(vars(_Unseeing))), "closed": sorted(hooks & set(vars(_Unseeing)))}


def _metrics(llm: Any, _: bool) -> dict[str, list[str]]:
    import prometheus_client

    lines = prometheus_client.generate_latest().decode().splitlines()
    return {"lines": [line for line in lines if line.startswith("vllm:prefix_adapter_")]}


def _series(llm: Any, asked: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """Returns, after each reading, the values of `prefix_adapter_loaded` and the lists of `prefix_adapter_info`."""
    import functools

    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

    from prefix_service.client.vllm.metrics import PrefixMetrics

    registry = CollectorRegistry()
    kinds = {kind: functools.partial(kind, registry=registry) for kind in (Gauge, Counter, Histogram)}
    if asked["shared"]:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = "/"
    try:
        made = PrefixMetrics(llm.llm_engine.vllm_config, kinds, ["engine"], {0: ["0"]})
    finally:
        os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    values, lists = [], []
    counted: dict[str, Any] = {"load_seconds": [], "load_bytes": 0, "wait_seconds": [], "failures": 0}
    for loaded, left in asked["readings"]:
        made.observe({**counted, "loaded": loaded, "left": left})
        samples = [sample for metric in registry.collect() for sample in metric.samples]
        values.append([sample.value for sample in samples if sample.name == "vllm:prefix_adapter_loaded"])
        lists.append(
            [sample.labels["running_lora_adapters"] for sample in samples if sample.name == "vllm:prefix_adapter_info"]
        )
    return {"values": values, "lists": lists}


def _events(llm: Any, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Takes the place of the publisher of KV events while jobs run one by one, without blocks in the prefix cache."""
    publisher = llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
    publish, seen = publisher.publish, []
    llm.reset_prefix_cache()
    publisher.publish = lambda batch: seen.extend(batch.events)
    try:
        for job in jobs:
            _run(llm, [job], 2)
            seen.append(None)
    finally:
        publisher.publish = publish
    stored: list[list[Any]] = [[]]
    for event in seen[:-1]:
        if event is None:
            stored.append([])
        elif type(event).__name__ == "BlockStored":
            keys = [key for keys in event.extra_keys or [] for key in keys or []]
            stored[-1].append([event.lora_name, len(event.token_ids), keys])
    return {"stored": stored}


def _written(llm: Any, _: bool) -> dict[str, str]:
    import runpy

    found: dict[str, str] = runpy.run_path(str(Path(__file__).with_name("writers.py")))["written"]()
    return found


def _digest_loaded(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Loads into a cache that was set to zero, and reads each layer's blocks of the request back."""
    import hashlib

    from vllm.distributed.kv_transfer import get_kv_transfer_group

    half = get_kv_transfer_group().half
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    llm.reset_prefix_cache()
    for layer in half._layers.values():
        layer.module.kv_cache.zero_()
    digest, tokens, write = hashlib.sha256(), [], half._write

    def write_and_read(load: Any, prefixes: Any) -> None:
        write(load, prefixes)
        tokens.append(load.end - load.start)
        for layer in half._layers.values():
            cache = layer.module.kv_cache
            axis = list(cache.shape).index(blocks)
            for block in load.block_ids[layer.group]:
                digest.update(cache.select(axis, block).contiguous().numpy().tobytes())

    half._write = write_and_read
    try:
        _run(llm, [job], 1)
    finally:
        half._write = write
    return {"digest": digest.hexdigest(), "tokens": tokens}


class _Unsalted:
    def of(self, *_: Any) -> None:
        """Returns no salt."""


if __name__ == "__main__":
    main()

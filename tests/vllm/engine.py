"""Run by .venv-vllm's Python: one `LLM()`, told by lines of JSON what to generate. Imports nothing of the tests.

In, a line of JSON each: `{"engine": {<arguments of LLM>}}`, then any of `{"jobs": [{"prompt": [ids], "adapter": …, …}],
"max_tokens": n}`, `{"salted": false}`, and `{"forget": "blocks"}` (vLLM's prefix cache) or `"all"` (what the clients
have fetched too). Out, on the descriptor in argv[1]: a line of JSON for each.
"""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """The loop."""
    answers = os.fdopen(int(sys.argv[1]), "w")
    from vllm import LLM

    llm = LLM(**json.loads(sys.stdin.readline())["engine"])
    _say(answers, {"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        if "salted" in asked:
            _say(answers, _switch_salt(llm, asked["salted"]))
        elif "forget" in asked:
            _say(answers, _forget(llm, asked["forget"]))
        else:
            _say(answers, _run(llm, **asked))


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
        extra = {"kv_transfer_params": {"prefix_adapter": adapter}} if adapter is not None else None
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
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    if what == "all":
        for connector in (llm.llm_engine.engine_core.engine_core.scheduler.connector, get_kv_transfer_group()):
            connector.half._client.clear_cache()
    return {"reset": llm.reset_prefix_cache()}


def _switch_salt(llm: Any, salted: bool) -> dict[str, Any]:
    """The negative control: what happens without our salt."""
    from service.client.vllm.salt import Salts

    half = llm.llm_engine.engine_core.engine_core.scheduler.connector.half
    half._salts = Salts() if salted else _Unsalted()
    return {"reset": llm.reset_prefix_cache()}


class _Unsalted:
    def of(self, *_: Any) -> None:
        """No salt."""


if __name__ == "__main__":
    main()

"""Measures the time to vLLM's first token behind a document, as text in front of the question and as a prefix.

    python -m tests.benchmarks.vllm.document

SmolLM2-135M-Instruct in float32 reads a document of this repository as its system message, on vLLM without and with the
prefix that `compile_prefix` makes of it. Both ways answer the same questions in turns; every greedy token is compared.
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from prefix_service.cli.demo.model import HOW_TO_GET_IT, find_model
from prefix_service.client import PrefixClient
from prefix_service.client.transformers import compile_prefix
from tests.benchmarks.compiling import NEW_TOKENS, QUESTIONS, document
from tests.benchmarks.tables import Grid
from tests.benchmarks.vllm.first_token import engine_behind, request_seconds
from tests.conftest import running_server
from tests.vllm.driver import PYTHON, Engine
from tests.vllm.smollm2 import save_model

_ADAPTER: Final = "bench/document"
_Jobs = list[dict[str, Any]]


def main() -> None:
    """Measures and prints a table."""
    options = argparse.ArgumentParser()
    options.add_argument("--tokens", type=int, default=2000)
    wanted: int = options.parse_args().tokens
    gguf = find_model()
    if gguf is None or not PYTHON.exists():
        raise SystemExit(f"this needs the model ({HOW_TO_GET_IT}) and vLLM (bash tests/vllm/install)")
    with tempfile.TemporaryDirectory(prefix="prefix-vllm-") as name, ExitStack() as stack:
        folder = Path(name)
        language = save_model(gguf, folder / "model")
        text = document(language.tokenizer, wanted)
        compiled = compile_prefix(language.model, text=text, tokenizer=language.tokenizer)
        compiled.save(folder / "document")
        server = stack.enter_context(running_server(folder / "data"))
        with PrefixClient(server.url, server.admin_key) as client:
            client.publish(_ADAPTER, folder / "document")
        tokens = len(compiled.flat)
        started = stack.enter_context(engine_behind(server, folder, tokens))
        wholes = [_whole(language.tokenizer, text, question) for question in QUESTIONS]
        as_text: _Jobs = [{"prompt": whole} for whole in wholes]
        as_prefix: _Jobs = [{"prompt": whole[tokens:], "adapter": _ADAPTER} for whole in wholes]
        rows = [
            ["text", _first_token(started, as_text, "blocks")],
            ["text, in vLLM's blocks", _first_token(started, as_text, None)],
            ["prefix, never seen by this worker", _first_token(started, as_prefix, "all")],
            ["prefix, fetched before", _first_token(started, as_prefix, "blocks")],
            ["prefix, in vLLM's blocks", _first_token(started, as_prefix, None)],
        ]
        same = sum(
            one == other for one, other in zip(*(_answers(started, jobs) for jobs in (as_text, as_prefix)), strict=True)
        )
    rows.append([f"answers of {NEW_TOKENS} equal tokens", f"{same} of {len(QUESTIONS)}"])
    title = "SmolLM2-135M-Instruct, float32, on the processor, in vLLM"
    Console().print(Grid(title, [f"time to the first token behind {tokens:,} tokens", "median"], rows).rich())
    if same < len(QUESTIONS):
        raise SystemExit("answers differ")


def _whole(tokenizer: Any, text: str, question: str) -> list[int]:
    """Returns the ids of an input that begins with the document."""
    messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(ids)


def _first_token(started: Engine, jobs: _Jobs, forget: str | None) -> str:
    """Returns the median time to the first token; `forget` is what vLLM forgets before each request."""
    return f"{statistics.median(request_seconds(started, job, forget) for job in jobs):.3f} s"


def _answers(started: Engine, jobs: _Jobs) -> list[list[int]]:
    """Returns the greedy tokens of each request alone, computed without blocks of earlier ones."""
    answers = []
    for job in jobs:
        started.ask({"forget": "blocks"})
        answers += [output["tokens"] for output in started.run([job], NEW_TOKENS)["outputs"]]
    return answers


if __name__ == "__main__":
    main()

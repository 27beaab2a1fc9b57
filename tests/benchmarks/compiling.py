"""Measures the time to the first token behind a document, as text in front of the question and as a compiled prefix.

    python -m tests.benchmarks.compiling

SmolLM2-135M-Instruct in float32 reads a document of this repository as its system message. Both ways answer the same
questions in turns; every greedy token is compared. The prefix is fetched from a service on this machine: the first
time cold, by a new client, then from the client's cache.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prefix_service.cli.demo.model import HOW_TO_GET_IT, find_model, load_model
from prefix_service.client import PrefixClient
from prefix_service.client.transformers import compile_prefix, text_tokens
from tests.benchmarks.tables import Grid
from tests.conftest import running_server
from tests.vllm.smollm2 import TEMPLATE

PAGES = Path(__file__).parents[2] / "service" / "prefix_service"
QUESTIONS = (
    "Which command publishes a folder?",
    "What does the service never open?",
    "How does a worker get a prefix?",
    "Name one thing that is measured.",
    "Who makes keys?",
)
NEW_TOKENS = 24


def document(tokenizer: Any, tokens: int) -> str:
    """Returns the beginning of this repository's pages that has so many tokens."""
    pages = "\n".join(path.read_text() for path in sorted(PAGES.rglob("README.md")))
    return str(tokenizer.decode(tokenizer(pages)["input_ids"][:tokens]))


def timed(generate: Any, **inputs: Any) -> tuple[float, float, list[int]]:
    """Returns the seconds to the first token and to all of them, and the new tokens."""
    began = time.perf_counter()
    generate(**inputs, max_new_tokens=1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    width = inputs["input_ids"].shape[1]
    tokens = generate(**inputs, max_new_tokens=NEW_TOKENS)[0, width:].tolist()
    return first, time.perf_counter() - began, tokens


def main() -> None:
    """Measures and prints a table."""
    options = argparse.ArgumentParser()
    options.add_argument("--tokens", type=int, default=2000)
    wanted: int = options.parse_args().tokens
    path = find_model()
    if path is None:
        raise SystemExit(HOW_TO_GET_IT)
    loaded = load_model(path)
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.chat_template = TEMPLATE
    text = document(tokenizer, wanted)
    began = time.perf_counter()
    compiled = compile_prefix(model, text=text, tokenizer=tokenizer)
    compiling = time.perf_counter() - began
    as_text: list[tuple[float, float, list[int]]] = []
    as_prefix: list[tuple[float, float, list[int]]] = []
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder) / "data") as server:
        compiled.save(Path(folder) / "document")
        with PrefixClient(server.url, server.admin_key) as client:
            client.publish("bench/document", Path(folder) / "document")
        with PrefixClient(server.url, server.admin_key) as client, torch.inference_mode():
            began = time.perf_counter()
            prefix = client.get("bench/document@1")
            fetching = time.perf_counter() - began
            for question in QUESTIONS:
                messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
                whole = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )["input_ids"]
                as_text.append(timed(model.generate, input_ids=whole, attention_mask=torch.ones_like(whole)))
                behind = whole[:, prefix.num_virtual_tokens :]

                def generate(**inputs: Any) -> Any:
                    return client.get("bench/document@1").generate(model, **inputs)

                as_prefix.append(timed(generate, input_ids=behind, attention_mask=torch.ones_like(behind)))
    same = sum(one[2] == other[2] for one, other in zip(as_text, as_prefix, strict=True))
    first = [statistics.median(one[0] for one in ways) for ways in (as_text, as_prefix)]
    whole_answer = [statistics.median(one[1] for one in ways) for ways in (as_text, as_prefix)]
    tokens = len(text_tokens(tokenizer, text))
    rows = [
        [f"time to the first token behind {tokens:,} tokens", f"{first[0]:.2f} s", f"{first[1]:.3f} s"],
        [f"{NEW_TOKENS} tokens", f"{whole_answer[0]:.2f} s", f"{whole_answer[1]:.2f} s"],
        ["once: compiled", "", f"{compiling:.1f} s, {compiled.flat.nbytes / 2**20:.0f} MiB"],
        ["once: fetched by a new client", "", f"{fetching:.3f} s"],
        ["answers with equal tokens", "", f"{same} of {len(QUESTIONS)}"],
    ]
    grid = Grid("SmolLM2-135M-Instruct, float32, on the processor", ["", "as text", "as prefix"], rows)
    Console().print(grid.rich())
    if same < len(QUESTIONS):
        raise SystemExit("answers differ")


if __name__ == "__main__":
    main()

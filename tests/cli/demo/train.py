"""Trains the demo's soft prompt with PEFT, and writes what PEFT makes the model say with it.

    python -m tests.cli.demo.train [OUT_FOLDER]

The folder that the demo has was made this way, in some minutes on two cores. Sixteen virtual tokens, which begin as the
embeddings of an instruction, learn to answer a question about a capital with its name alone. The countries that are
asked are not among those of the training.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any, Final

import peft
import torch

import prefix_service.cli.demo
from prefix_service.cli.demo.model import HOW_TO_GET_IT, LanguageModel, find_model, load_model

FOLDER: Final = Path(prefix_service.cli.demo.__file__).parent / "soft_prompts" / "capitals-word"
_BASE: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
_TOKENS: Final = 16
_INSTRUCTION: Final = "Answer each question with one word, the name of the city alone, as in: Paris."
_STEPS, _ROWS, _RATE = 80, 6, 1e-2
_ASKED: Final = ("Spain", "Hungary", "Japan", "Norway")
_CAPITALS: Final = (
    "France Paris;Germany Berlin;Italy Rome;Portugal Lisbon;Austria Vienna;Greece Athens;Sweden Stockholm;"
    "Finland Helsinki;Denmark Copenhagen;Ireland Dublin;Iceland Reykjavik;Belgium Brussels;Netherlands Amsterdam;"
    "Switzerland Bern;Romania Bucharest;Bulgaria Sofia;Ukraine Kyiv;Russia Moscow;Turkey Ankara;Kenya Nairobi;"
    "Nigeria Abuja;Ghana Accra;Morocco Rabat;Algeria Algiers;Tunisia Tunis;China Beijing;Thailand Bangkok;"
    "Vietnam Hanoi;Indonesia Jakarta;Philippines Manila;Australia Canberra;Canada Ottawa;Cuba Havana;Jamaica Kingston;"
    "Brazil Brasilia;Chile Santiago;Peru Lima;Colombia Bogota;Venezuela Caracas;Ecuador Quito;Iran Tehran;"
    "Iraq Baghdad;Jordan Amman;Lebanon Beirut;Syria Damascus;Nepal Kathmandu;Pakistan Islamabad;Bangladesh Dhaka"
)


def _question(country: str) -> str:
    return f"What is the capital of {country}?"


def _prompt(country: str) -> str:
    return f"<|im_start|>user\n{_question(country)}<|im_end|>\n<|im_start|>assistant\n"


def _batch(tokenizer: Any, pairs: list[list[str]]) -> dict[str, torch.Tensor]:
    """Returns rows padded on the right, whose labels are the answers alone."""
    rows = [
        (tokenizer(_prompt(country)).input_ids, tokenizer(f"{city}<|im_end|>").input_ids) for country, city in pairs
    ]
    width = max(len(asked) + len(answer) for asked, answer in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for row, (asked, answer) in enumerate(rows):
        whole = torch.tensor(asked + answer)
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, len(asked) : len(whole)] = whole[len(asked) :]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(language: LanguageModel, folder: Path) -> Any:
    """Trains, saves, and returns PEFT's model."""
    random.seed(0)
    torch.manual_seed(0)
    model, tokenizer = language.model, language.tokenizer
    model.config._name_or_path = model.name_or_path = _BASE
    tuned: Any = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=_TOKENS))
    (virtual,) = (parameter for parameter in tuned.parameters() if parameter.requires_grad)
    words = tokenizer(_INSTRUCTION, return_tensors="pt")["input_ids"][0]
    beginning = model.get_input_embeddings()(words.repeat(_TOKENS)[:_TOKENS])
    virtual.data.copy_(beginning.detach())
    optimiser = torch.optim.AdamW([virtual], lr=_RATE, weight_decay=0)
    pairs = [each.split(" ") for each in _CAPITALS.split(";")]
    for step in range(_STEPS):
        for group in optimiser.param_groups:
            group["lr"] = _RATE * min(1, (step + 1) / 3) * (1 - step / _STEPS)
        loss = tuned(**_batch(tokenizer, random.sample(pairs, _ROWS))).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)  # noqa: T201 - this is a command
    tuned.eval().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty model card
    return tuned


def main() -> None:
    """Writes the folder."""
    path = find_model()
    if path is None:
        raise SystemExit(HOW_TO_GET_IT)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    language = load_model(path)
    bare = {country: language.answer([_prompt(country)])[0] for country in _ASKED}
    tuned = LanguageModel(train(language, folder), language.tokenizer)
    questions = []
    for country in _ASKED:
        (answer,) = tuned.answer([_prompt(country)])
        question = {"question": _question(country), "prompt": _prompt(country)}
        question |= {"without": language.text(bare[country]), "with": language.text(answer)}
        questions.append(question | {"without_ids": bare[country], "with_ids": answer})
        print(question["without"], "|", question["with"])  # noqa: T201 - this is a command
    (folder / "questions.json").write_text(json.dumps(questions, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

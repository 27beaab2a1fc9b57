"""The demo's steps, in the order of a worker's life, and their output."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.cli.console import print_json, print_table, say
from prefix_service.cli.demo.compiled import (
    SOFT_PROMPT,
    DocumentAnswers,
    ask_about_document,
    fetch_soft_prompt,
    soft_prompt_questions,
)
from prefix_service.cli.demo.embedded import Embedded, embedded_service
from prefix_service.cli.demo.model import HOW_TO_GET_IT, LanguageModel, find_model, load_model
from prefix_service.client import Prefix, PrefixClient
from prefix_service.system.sizes import human_bytes

_FOLDER: Final = Path(__file__).parent
_TENANT: Final = "demo"
_MODEL: Final = "SmolLM2-135M-Instruct"
_ADAPTERS: Final = {
    "capitals-json": "a prefix that answers with JSON",
    "sentiment": "a prefix that says positive or negative",
    "sentiment-trainstate": "the same, its MLP not yet applied",
    "handbook-cartridge": "a cartridge that holds a bakery's handbook",
}
_SAYS: Final = {**_ADAPTERS, SOFT_PROMPT: "a compiled soft prompt that answers with one word"}
_QUESTIONS_OF: Final = {"sentiment-trainstate": "sentiment"}


@dataclass(frozen=True, slots=True)
class _Spoken:
    """The number of answers, of those equal to PEFT's, and the answers about a document."""

    equal: int
    total: int
    document: DocumentAnswers

    @property
    def all_equal(self) -> bool:
        """Whether every answer is what it should be."""
        return self.equal == self.total and self.document.equal == len(self.document.questions)


@dataclass(frozen=True, slots=True)
class _Fetched:
    """One adapter on its way: the prefix, and milliseconds to publish, to fetch, and to ask whether it is current."""

    prefix: Prefix
    published_ms: float
    fetched_ms: float
    revalidated_ms: float


def run_demo(console: Console, *, stay: bool, as_json: bool = False) -> bool:
    """Run the demo; whether every answer was what it should be: PEFT's, and the same behind a document's text and
    behind its prefix (True without the model, which leaves the answers out). `as_json` prints the results as a JSON
    document, and the steps on standard error."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prefix-service-demo-"))
        with _output(as_json=as_json):
            say("1 of 5: start a service of its own, in a folder that is deleted in the end")
            with console.status("starting the service"):
                service = stack.enter_context(embedded_service(Path(folder)))
            say(f"It listens on {service.url}")
            say()
            say(f"2 of 5: publish {len(_ADAPTERS)} adapters, and fetch them as a worker would")
            fetched: dict[str, _Fetched] = {}
            with PrefixClient(service.url, service.api_key) as client:
                for name in _ADAPTERS:
                    with console.status(f"publishing and fetching {name}, {_place(name)}"):
                        fetched[name] = _travel(client, name)
            _show_travel(fetched)
            spoken = _ask(console, service, Path(folder), {name: one.prefix for name, one in fetched.items()})
        if as_json:
            there = {"url": service.url, "api_key": service.api_key} if stay else {}
            print_json({**there, "adapters": [_described(*it) for it in fetched.items()], **_told(spoken)})
        with _output(as_json=as_json):
            _stay(service) if stay else _say_what_next()
    return spoken is None or spoken.all_equal


def _output(*, as_json: bool) -> contextlib.AbstractContextManager[object]:
    """Send the block's sentences and tables to standard error if standard output is for a JSON document alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def _described(name: str, one: _Fetched) -> dict[str, Any]:
    return {
        "adapter": f"{_TENANT}/{name}",
        "tensors": 2 * len(one.prefix.past_key_values),
        "shape": list(one.prefix.past_key_values[0][0].shape),
        "bytes": one.prefix.kv.nbytes,
        "published_ms": one.published_ms,
        "fetched_ms": one.fetched_ms,
        "revalidated_ms": one.revalidated_ms,
    }


def _place(name: str) -> str:
    """Returns the place of an adapter among all, as in `2 of 4`."""
    return f"{list(_ADAPTERS).index(name) + 1} of {len(_ADAPTERS)}"


def _told(spoken: _Spoken | None) -> dict[str, Any]:
    """Returns the part of the JSON document about answers."""
    if spoken is None:
        return {"answers": None, "document": None}
    document = spoken.document
    return {
        "answers": {"equal": spoken.equal, "total": spoken.total},
        "document": {
            "num_virtual_tokens": document.tokens,
            "bytes": document.nbytes,
            "compile_seconds": document.compile_seconds,
            "first_token_seconds_as_text": [answer.first_token for answer in document.as_text],
            "first_token_seconds_as_prefix": [answer.first_token for answer in document.as_prefix],
            "equal": document.equal,
            "total": len(document.questions),
        },
    }


def _ask(console: Console, service: Embedded, folder: Path, prefixes: Mapping[str, Prefix]) -> _Spoken | None:
    """Let the model speak without and with each prefix, and with compiled ones; None without the model."""
    say()
    say(f"3 of 5: load {_MODEL}, the model of these adapters")
    path = find_model()
    if path is None:
        say("It is not installed, so there are no answers to compare. To install it:")
        say(f"  {HOW_TO_GET_IT}")
        return None
    with console.status(f"loading {_MODEL}"):
        model = load_model(path)
    say()
    say("4 of 5: ask it without and with each prefix")
    asked = json.loads((_FOLDER / "questions.json").read_text())
    total = equal = 0
    for name, prefix in prefixes.items():
        questions = asked[_QUESTIONS_OF.get(name, name)]
        with console.status(f"asking without and with {name}, {_place(name)}"):
            equal += _speak(model, name, prefix, questions)
        total += len(questions)
    say()
    say("5 of 5: compile what is no prefix yet: a soft prompt, and a document")
    with PrefixClient(service.url, service.api_key) as client:
        with console.status(f"compiling {SOFT_PROMPT}, and asking without and with it"):
            prefix, questions = fetch_soft_prompt(client, _TENANT, model, folder), soft_prompt_questions()
            equal += _speak(model, SOFT_PROMPT, prefix, questions)
        total += len(questions)
        with console.status("compiling a document, and asking about it as text and as a prefix"):
            document = ask_about_document(client, _TENANT, model, folder)
    _show_document(model, document)
    say()
    say(f"{equal} of {total} answers equal PEFT's own, token for token.")
    say(f"{document.equal} of {len(document.questions)} about the document equal those behind its text.")
    return _Spoken(equal, total, document)


def _travel(client: PrefixClient, name: str) -> _Fetched:
    upload = prepare_upload(_FOLDER / "adapters" / name)
    with upload.weights as weights:
        _, published = _timed(lambda: client.publish_files(f"{_TENANT}/{name}", upload.config, weights))
    prefix, fetched = _timed(lambda: client.get(f"{_TENANT}/{name}", dtype="float32"))
    _, revalidated = _timed(lambda: client.get(f"{_TENANT}/{name}", dtype="float32"))
    return _Fetched(prefix, published, fetched, revalidated)


def _timed(call: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - began) * 1000


def _show_travel(fetched: Mapping[str, _Fetched]) -> None:
    rows: list[list[object]] = []
    for name, one in fetched.items():
        pairs = one.prefix.past_key_values
        tensors = f"{2 * len(pairs)} of {'x'.join(str(size) for size in pairs[0][0].shape)}"
        times = [round(ms) for ms in (one.published_ms, one.fetched_ms, one.revalidated_ms)]
        rows.append([name, tensors, human_bytes(one.prefix.kv.nbytes), *times])
    columns = ["adapter", "tensors", "size", "publish", "fetch", "again"]
    print_table("Tensors in float32; times in ms (again: is the cached one current?)", columns, rows)


def _speak(model: LanguageModel, name: str, prefix: Prefix, questions: list[dict[str, Any]]) -> int:
    """Ask questions without and with a prefix, and show the answers. Returns how many with it equal PEFT's."""
    prompts = [question["prompt"] for question in questions]
    answers = model.answer(prompts, prefix)
    if name not in _QUESTIONS_OF:
        _show_answers(model, name, questions, model.answer(prompts), answers)
    return sum(answer == question["with_ids"] for answer, question in zip(answers, questions, strict=True))


def _show_answers(
    model: LanguageModel,
    name: str,
    questions: list[dict[str, Any]],
    bare: list[list[int]],
    answers: list[list[int]],
) -> None:
    rows = [
        [question["question"], _in_one_line(model.text(without)), _in_one_line(model.text(answer))]
        for question, without, answer in zip(questions, bare, answers, strict=True)
    ]
    say()
    print_table(f"{name}: {_SAYS[name]}", ["question", "without the prefix", "with the prefix"], rows)


def _show_document(model: LanguageModel, document: DocumentAnswers) -> None:
    rows: list[list[object]] = [
        [question, _in_one_line(model.text(prefix.ids)), round(text.first_token, 2), round(prefix.first_token, 2)]
        for question, text, prefix in zip(document.questions, document.as_text, document.as_prefix, strict=True)
    ]
    say()
    title = f"seconds to the first token behind the licence: {document.tokens:,} tokens"
    print_table(title, ["question", "with the prefix", "text", "prefix"], rows)
    say(f"compiled once in {document.compile_seconds:.1f} s, {human_bytes(document.nbytes)}")


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _stay(service: Embedded) -> None:
    say()
    say(f"The service goes on at {service.url} until Ctrl+C. Next, in another terminal:")
    say(f"  export PREFIX_URL={service.url}")
    say(f"  export PREFIX_API_KEY={service.api_key}")
    say(f"  prefix-service list {_TENANT}")
    try:
        service.process.wait()
    except KeyboardInterrupt:
        say("stopping")


def _say_what_next() -> None:
    say()
    say("The demo's service is stopped. Next, a service of your own:")
    say("  prefix-service serve")
    say("and in another terminal, in the same folder:")
    say("  export PREFIX_API_KEY=$(cat data/bootstrap.key)")
    say("  prefix-service publish YOUR_ADAPTER_FOLDER acme/first")
    say("  prefix-service fetch acme/first")

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
_QUESTIONS_OF: Final = {"sentiment-trainstate": "sentiment"}


@dataclass(frozen=True, slots=True)
class _Fetched:
    """One adapter on its way: the prefix, and milliseconds to publish, to fetch, and to ask whether it is current."""

    prefix: Prefix
    published_ms: float
    fetched_ms: float
    revalidated_ms: float


def run_demo(console: Console, *, stay: bool, as_json: bool = False) -> bool:
    """Run the demo; whether every answer was PEFT's (True without the model, which leaves the answers out). `as_json`
    prints the results as a JSON document, and the steps on standard error."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prefix-service-demo-"))
        with _output(as_json=as_json):
            say("1 of 4: start a service of its own, in a folder that is deleted in the end")
            with console.status("starting the service"):
                service = stack.enter_context(embedded_service(Path(folder)))
            say(f"It listens on {service.url}")
            say()
            say(f"2 of 4: publish {len(_ADAPTERS)} adapters, and fetch them as a worker would")
            fetched: dict[str, _Fetched] = {}
            with PrefixClient(service.url, service.api_key) as client:
                for name in _ADAPTERS:
                    with console.status(f"publishing and fetching {name}, {_place(name)}"):
                        fetched[name] = _travel(client, name)
            _show_travel(fetched)
            answers = _ask(console, {name: one.prefix for name, one in fetched.items()})
        if as_json:
            there = {"url": service.url, "api_key": service.api_key} if stay else {}
            print_json({**there, "adapters": [_described(*it) for it in fetched.items()], "answers": answers})
        with _output(as_json=as_json):
            _stay(service) if stay else _say_what_next()
    return answers is None or answers["equal"] == answers["total"]


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


def _ask(console: Console, prefixes: Mapping[str, Prefix]) -> dict[str, int] | None:
    """Let the model speak without and with each prefix. Returns how many answers there are in `total`, and how many
    are `equal` to PEFT's; None without the model."""
    say()
    say(f"3 of 4: load {_MODEL}, the model of these adapters")
    path = find_model()
    if path is None:
        say("It is not installed, so there are no answers to compare. To install it:")
        say(f"  {HOW_TO_GET_IT}")
        return None
    with console.status(f"loading {_MODEL}"):
        model = load_model(path)
    say()
    say("4 of 4: ask it without and with each prefix")
    return _speak(console, model, prefixes)


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


def _speak(console: Console, model: LanguageModel, prefixes: Mapping[str, Prefix]) -> dict[str, int]:
    asked = json.loads((_FOLDER / "questions.json").read_text())
    total = equal = 0
    for name, prefix in prefixes.items():
        questions = asked[_QUESTIONS_OF.get(name, name)]
        prompts = [question["prompt"] for question in questions]
        with console.status(f"asking without and with {name}, {_place(name)}"):
            bare = [] if name in _QUESTIONS_OF else model.answer(prompts)
            answers = model.answer(prompts, prefix)
        same = [answer == question["with_ids"] for answer, question in zip(answers, questions, strict=True)]
        total, equal = total + len(same), equal + sum(same)
        if bare:
            _show_answers(model, name, questions, bare, answers)
    say()
    say(f"{equal} of {total} answers equal PEFT's own, token for token.")
    return {"equal": equal, "total": total}


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
    print_table(f"{name}: {_ADAPTERS[name]}", ["question", "without the prefix", "with the prefix"], rows)


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

"""What the demo does, in the order of a worker's life, and what it shows of it."""

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.cli.console import human_bytes, print_table
from prefix_service.cli.demo.embedded import Embedded, embedded_service
from prefix_service.cli.demo.model import HOW_TO_GET_IT, LanguageModel, find_model, load_model
from prefix_service.client import Prefix, PrefixClient

_FOLDER: Final = Path(__file__).parent
_TENANT: Final = "demo"
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


def run_demo(console: Console, *, stay: bool) -> bool:
    """Run the demo; whether every answer was PEFT's (True without the model, which leaves the answers out)."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="prefix-service-demo-"))
        with console.status("starting the service"):
            service = stack.enter_context(embedded_service(Path(folder)))
        console.print(f"prefix-service runs on {service.url}", highlight=False)
        with PrefixClient(service.url, service.api_key) as client:
            fetched = {name: _travel(client, name) for name in _ADAPTERS}
        _show_travel(fetched)
        path = find_model()
        if path is None:
            line = f"The model is not installed, so nobody speaks. To hear it: {HOW_TO_GET_IT}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            correct = True
        else:
            with console.status("loading SmolLM2-135M-Instruct"):
                model = load_model(path)
            correct = _speak(console, model, {name: one.prefix for name, one in fetched.items()})
        if stay:
            _stay(console, service)
    return correct


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
    print_table("What travelled, in float32; times in ms (again: is the cached one current?)", columns, rows)


def _speak(console: Console, model: LanguageModel, prefixes: Mapping[str, Prefix]) -> bool:
    asked = json.loads((_FOLDER / "questions.json").read_text())
    total = equal = 0
    for name, prefix in prefixes.items():
        questions = asked[_QUESTIONS_OF.get(name, name)]
        prompts = [question["prompt"] for question in questions]
        with console.status(f"asking with and without {name}"):
            bare = [] if name in _QUESTIONS_OF else model.answer(prompts)
            answers = model.answer(prompts, prefix)
        same = [answer == question["with_ids"] for answer, question in zip(answers, questions, strict=True)]
        total, equal = total + len(same), equal + sum(same)
        if bare:
            _show_answers(console, model, name, questions, bare, answers)
    console.print(f"{equal} of {total} answers equal PEFT's own, token for token.", highlight=False)
    return equal == total


def _show_answers(
    console: Console,
    model: LanguageModel,
    name: str,
    questions: list[dict[str, Any]],
    bare: list[list[int]],
    answers: list[list[int]],
) -> None:
    table = Table(title=f"{name}, {_ADAPTERS[name]}", title_justify="left", box=box.SIMPLE_HEAD, show_lines=True)
    for column, share in (("question", 2), ("without the prefix", 3), ("with the prefix", 3)):
        table.add_column(column, ratio=share, overflow="fold")
    for question, without, answer in zip(questions, bare, answers, strict=True):
        table.add_row(*map(Text, (question["question"], model.text(without), model.text(answer))))
    console.print(table)


def _stay(console: Console, service: Embedded) -> None:
    console.print(f"The service goes on at {service.url} until Ctrl+C. Try it:", highlight=False)
    console.print(
        f"  export PREFIX_URL={service.url} PREFIX_API_KEY={service.api_key}", soft_wrap=True, highlight=False
    )
    console.print(f"  prefix-service list {_TENANT}", highlight=False)
    try:
        service.process.wait()
    except KeyboardInterrupt:
        console.print("stopping", highlight=False)

"""`compile`: soft prompts, texts and tokens become prefixes, by one forward pass of the base model on this machine."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefix_service.cli.console import errors_console, print_json, say, working
from prefix_service.cli.models import Dtype, auto_class, load_model, loaded, quiet_transformers
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Device, Json, Url, connect
from prefix_service.errors import InvalidRequest, NotFound, QuotaExceeded, TooLarge
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from prefix_service.client import PrefixClient


class Role(StrEnum):
    """The role of a text in the input; `prefix_service.client.transformers.texts` explains each."""

    system = "system"
    user = "user"
    plain = "plain"


@dataclass(frozen=True, slots=True)
class _Job:
    """One prefix to compile: the arguments of `compile_prefix`, its number of tokens, and where it goes.

    `name` is how messages call it, `recipe` what the recipe says of the file.
    """

    name: str
    source: Mapping[str, Any]
    tokens: int
    folder: Path
    recipe: Mapping[str, str]


_STORED_TWICE: Final = 2  # the weights, and the keys and values that the service makes of them


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command("compile")(compile_)


def compile_(
    words: Annotated[
        list[Path],
        typer.Argument(
            metavar="[ADAPTER_FOLDER] OUT_FOLDER",
            help="A folder of PEFT, unless there is --text or --tokens; and where the prefix goes.",
        ),
    ],
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="The base model: a folder, or a name on Hugging Face.")
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="A text in UTF-8; or a folder, each file of which becomes a prefix in OUT_FOLDER.",
            exists=True,
        ),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            metavar="FILE",
            help="Token ids, a JSON list or numbers between blanks.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    role: Annotated[
        Role,
        typer.Option(
            "--as",
            help="What the text is in the chat template: the system message, or the beginning of the user's first "
            "message; plain: there is no template.",
        ),
    ] = Role.system,
    task: Annotated[
        int | None, typer.Option("--task", metavar="N", help="The task of a MULTITASK_PROMPT_TUNING adapter.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="What the model computes in; default: that of its weights.")
    ] = None,
    device: Device = "cpu",
    tenant: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="TENANT",
            help="Who will publish it: first check the tenant's quota and the service's bound.",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Compile a soft prompt, a text or tokens into a prefix.

    The base model reads them once, on this machine. `publish` takes the folder that this writes, with a recipe that
    becomes the version's annotations.
    """
    from prefix_service.checkpoints.folders import check_folder
    from prefix_service.client.transformers.compiling import check_compiles, require_positions

    *adapters, folder = words
    if len(adapters) + (text is not None) + (tokens is not None) != 1:
        raise typer.BadParameter("name one ADAPTER_FOLDER, --text FILE or --tokens FILE, and one OUT_FOLDER")
    if task is not None and not adapters:
        raise typer.BadParameter(f"--task {task} belongs to an ADAPTER_FOLDER: leave it out")
    with quiet_transformers():
        with working(f"reading the config of {model}"):  # seconds, if the hub does not answer
            config = loaded(model, lambda: auto_class("AutoConfig").from_pretrained(model))
        check_compiles(config)
        if text is not None:
            jobs = list(_texts(model, text, role.value, folder))
        elif tokens is not None:
            jobs = [_tokens(tokens, folder)]
        else:
            jobs = [_adapter(adapters[0], task, folder)]
        for job in jobs:
            check_folder(job.folder)
            require_positions(config, job.tokens)
        if tenant is not None:
            _check_room(jobs, config, dtype, tenant, url, api_key)
        with working(f"loading {model}"):
            base = loaded(model, lambda: load_model(model, dtype, device))
        done = _compile(base, jobs)
    if as_json:
        print_json(done[0] if text is None or not text.is_dir() else {"items": done})
        return
    for each in done:
        say(f"compiled {each['num_virtual_tokens']} tokens to {each['folder']}: {human_bytes(each['bytes'])}")


def _compile(model: Any, jobs: Sequence[_Job]) -> list[dict[str, Any]]:
    """Compile and write each prefix, with a bar for the tokens of all; returns what became of them."""
    from prefix_service.client.transformers.compiling import compile_prefix

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    done: list[dict[str, Any]] = []
    with Progress(*columns, console=errors_console, transient=True, disable=not errors_console.is_terminal) as progress:
        bar = progress.add_task("", total=sum(job.tokens for job in jobs))
        read = 0
        for job in jobs:
            progress.update(bar, description=f"reading {job.name}")

            def advance(tokens: int, _total: int, before: int = read) -> None:
                progress.update(bar, completed=before + tokens)

            compiled = compile_prefix(model, **job.source, progress=advance).with_recipe(**job.recipe)
            compiled.save(job.folder)
            read += job.tokens
            done.append(
                {
                    "folder": str(job.folder),
                    "num_virtual_tokens": job.tokens,
                    "bytes": compiled.flat.nbytes,
                    "recipe": dict(compiled.recipe),
                }
            )
    return done


def _adapter(source: Path, task: int | None, folder: Path) -> _Job:
    from prefix_service.client.transformers.virtual_tokens import read_soft_prompt

    prompt = read_soft_prompt(source, task)
    return _Job(str(source), {"adapter": source, "task": task}, prompt.num_virtual_tokens, folder, {})


def _tokens(path: Path, folder: Path) -> _Job:
    ids = _parsed_tokens(path)
    return _Job(str(path), {"token_ids": ids}, len(ids), folder, {"file": path.name})


def _parsed_tokens(path: Path) -> list[Any]:
    content = _read(path)
    try:
        if not content.lstrip().startswith("["):
            return [int(word) for word in content.split()]
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"{path} must have token ids, as a JSON list or as numbers between blanks: {error}"
        ) from error
    return list(found)


def _texts(model: str, source: Path, role: str, folder: Path) -> Iterator[_Job]:
    """Yields a prefix to compile for a file, or for each file of a folder.

    Raises:
        InvalidRequest: a file is not UTF-8, two files have one name but for their ending, or the folder has none.
    """
    from prefix_service.client.transformers.texts import text_tokens

    tokenizer = loaded(model, lambda: auto_class("AutoTokenizer").from_pretrained(model))
    files = {source: folder}
    if source.is_dir():
        files = {path: folder / path.stem for path in sorted(source.iterdir()) if _is_document(path)}
        if not files:
            raise InvalidRequest(f"there are no files in {source}")
        if len(set(files.values())) < len(files):
            raise InvalidRequest(
                f"files in {source} differ in their endings alone: rename one, for its prefix's folder"
            )
    for path, where in files.items():
        text = _read(path)
        try:
            tokens = len(text_tokens(tokenizer, text, role))  # type: ignore[arg-type]
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error}") from error
        yield _Job(str(path), {"text": text, "tokenizer": tokenizer, "role": role}, tokens, where, {"file": path.name})


def _is_document(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: look at byte {error.start}, and save it as UTF-8") from error


def _check_room(
    jobs: Sequence[_Job], config: Any, dtype: Dtype | None, tenant: str, url: str, api_key: str | None
) -> None:
    """Checks that the service would accept the prefixes, and that its tenant has room for them.

    Raises:
        TooLarge, QuotaExceeded: it would not; nothing was computed yet.
    """
    import torch

    from prefix_service.client.transformers.compiling import num_bytes

    computed = getattr(torch, dtype.value) if dtype is not None else config.dtype or torch.float32
    sizes = {job.name: num_bytes(config, job.tokens, computed) for job in jobs}
    with connect(url, api_key) as client:
        _require_room(client, tenant, sizes)


def _require_room(client: "PrefixClient", tenant: str, sizes: Mapping[str, int]) -> None:
    caller = client.whoami()
    most = caller.get("max_upload_bytes")  # a service before this release does not say
    for name, nbytes in sizes.items():
        if most is not None and nbytes > most:
            raise TooLarge(
                f"the prefix of {name} would have {nbytes} bytes, and the service accepts {most} in one upload: "
                "shorten it, use a smaller --dtype, or raise PREFIX_MAX_UPLOAD_BYTES"
            )
    try:
        found = client.tenant(tenant)
    except NotFound:
        if caller["tenant"] is None:  # publishing makes the tenant
            return
        raise
    needed = _STORED_TWICE * sum(sizes.values())
    if found["max_bytes"] is not None and found["bytes"] + needed > found["max_bytes"]:
        raise QuotaExceeded(
            f"tenant {tenant!r} has {found['bytes']} of {found['max_bytes']} bytes, and what was named would take "
            f"{needed}, weights with their keys and values: shorten it, delete versions, or ask the platform for more"
        )

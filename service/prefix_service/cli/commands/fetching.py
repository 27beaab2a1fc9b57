"""`fetch` and `pull`: what is published comes here again, as tensors or as the folder that it was."""

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args

import typer
from rich.progress import Progress

from prefix_service.checkpoints.remote.address import FORMS, Address, is_address, parse_address
from prefix_service.cli.console import errors_console, print_json, print_table, say, working
from prefix_service.cli.files import check_output, written
from prefix_service.cli.options import DEFAULT_URL, ApiKey, Json, Ref, Url, connect
from prefix_service.errors import Conflict, InvalidRequest, InvalidResponse, StorageFailed
from prefix_service.prefix.file_names import BASE_MODEL_NAME, CARD_NAME, CONFIG_NAME, RECIPE_NAME, WEIGHTS_NAME
from prefix_service.prefix.variant import DtypePair, KVDtype
from prefix_service.system.disk import translated
from prefix_service.system.sizes import human_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from prefix_service.client import PrefixClient

_PIECE: Final = 32 << 20  # bytes of weights that are in memory together
_MEDIA_TYPES: Final = {
    CONFIG_NAME: "application/json",
    BASE_MODEL_NAME: "application/json",
    RECIPE_NAME: "application/json",
    CARD_NAME: "text/markdown",
    WEIGHTS_NAME: "application/vnd.safetensors",
}
"""The files of a version, and their media types as layers of an artifact."""

_OS_ERROR: Final = re.compile(r"\(os error ([0-9]+)\)")
"""The text in which safetensors reports the operating system's error."""


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(fetch)
    app.command()(pull)


def fetch(
    reference: Ref,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: only show.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="float32, float16, bfloat16 or float8_e4m3fn.")
    ] = None,
    key_dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="That of keys alone; default: --dtype.")
    ] = None,
    value_dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="That of values alone; default: --dtype.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Fetch a prefix as a worker would; show or save its tensors.

    A file that is saved is safetensors, with the metadata that the service sends. float8, and keys and values of two
    dtypes, are decoded to float32.
    """
    if output is not None:
        check_output(output)
    asked = {"dtype": dtype, "key_dtype": key_dtype, "value_dtype": value_dtype}
    dtypes = {name: _checked_dtype(name, one) for name, one in asked.items()}
    import torch  # noqa: F401 - takes longer than the fetch that is timed

    with connect(url, api_key) as client:
        began = time.perf_counter()
        prefix = client.get(reference, batch_size=batch_size, **dtypes)
        seconds = time.perf_counter() - began
    tensors = {"attention_mask": prefix.attention_mask}
    for layer, (key, value) in enumerate(prefix.past_key_values):
        tensors |= {f"past_key_values.{layer}.key": key, f"past_key_values.{layer}.value": value}
    if output is not None:
        _save(tensors, {**prefix.metadata, "batch_size": batch_size, "layout": "layers", "expand": True}, output)
    if as_json:
        print_json({**prefix.metadata, "batch_size": batch_size, "seconds": seconds, "bytes": prefix.kv.nbytes})
        return
    rows: list[list[object]] = [
        [name, " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in list(tensors.items())[:5]
    ]
    if len(tensors) > len(rows):
        rows.append([f"… {len(tensors) - len(rows)} more", "", ""])
    title = f"{reference} = version {prefix.version}, {human_bytes(prefix.kv.nbytes)} in {seconds * 1000:.1f} ms"
    print_table(title, ["tensor", "shape", "dtype"], rows)
    if output is not None:
        say(f"saved to {output}")


def _save(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any], output: Path) -> None:
    """Write a prefix as the service sends it: tensors, and the metadata as JSON under `prefix`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    saved: Any = str(tensors["past_key_values.0.key"].dtype).removeprefix("torch.")
    described = {name: value for name, value in metadata.items() if name not in ("key_dtype", "value_dtype")}
    described |= DtypePair.both(saved).as_metadata()
    with written(output) as aside:
        try:
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, aside, {"prefix": json.dumps(described)})
        except SafetensorError as error:
            if (number := _OS_ERROR.search(str(error))) is not None:
                raise OSError(int(number[1]), str(error)) from error
            raise StorageFailed(f"cannot write {output}: {error}") from error


def pull(
    reference: Ref,
    target: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|oci://…",
            help="Where the files go: a folder, made if it is missing, or an artifact oci://registry/repository:tag.",
        ),
    ],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Write the PEFT folder of a version again.

    Config and weights come byte for byte as they were uploaded, the model card as README.md, the fingerprint of the
    base model as prefix_base_model.json, the recipe of a compiled prefix as prefix_recipe.json; `publish` reads them
    all. Annotations are printed. A version that was made of others, or published to an older service, has its config as
    PEFT writes it. An artifact in an OCI registry has the same files as layers, and the annotations in its manifest.
    """
    if is_address(target):
        address = parse_address(target)
        if address.scheme != "oci":
            raise InvalidRequest(
                f"pull writes a folder, or an artifact {FORMS['oci']}, and nothing to {address.scheme}://"
            )
        with connect(url, api_key) as client:
            pulled = _to_registry(client, reference, address)
        _tell_pulled(pulled, as_json=as_json)
        return
    folder = Path(target)
    for name in _MEDIA_TYPES:
        if (folder / name).exists():
            raise Conflict(f"{folder / name} exists: choose an empty folder")
    with connect(url, api_key) as client:
        version = client.inspect(reference)
        annotations = client.annotations(_by_digest(version))
        try:
            _write(client, version, annotations, folder)
        except OSError as error:
            raise StorageFailed(f"{folder} cannot be written: {error.strerror}") from error
    _tell_pulled({**version, "annotations": annotations, "folder": str(folder)}, as_json=as_json)


def _to_registry(client: "PrefixClient", reference: str, address: Address) -> dict[str, Any]:
    """Writes a version to an OCI registry; returns its metadata, its annotations and the artifact's address."""
    from prefix_service.checkpoints.remote.oci import store

    version = client.inspect(reference)
    annotations = client.annotations(_by_digest(version))
    with tempfile.TemporaryDirectory(prefix="prefix-service-") as scratch, translated("write the artifact's files"):
        folder = Path(scratch)
        _write(client, version, annotations, folder)
        files = {name: (folder / name, kind) for name, kind in _MEDIA_TYPES.items() if (folder / name).exists()}
        with working(f"storing {address}"):
            digest = store(address, files, annotations)
    artifact = replace(address, revision=digest)
    return {**version, "annotations": annotations, "artifact": str(artifact)}


def _tell_pulled(pulled: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(dict(pulled))
        return
    name = f"{pulled['tenant']}/{pulled['adapter']}@{pulled['version']}"
    say(f"pulled {name} to {pulled.get('folder') or pulled['artifact']}")
    say(f"digest {pulled['digest']}")
    for key, text in pulled["annotations"].items():
        say(f"annotation {key}={text}")


def _by_digest(version: Mapping[str, Any]) -> str:
    """Returns a version's name by its digest, which means the same version even if an alias moves."""
    return f"{version['tenant']}/{version['adapter']}@{version['digest']}"


def _write(client: "PrefixClient", version: Mapping[str, Any], annotations: Mapping[str, str], folder: Path) -> None:
    """Writes the config and the weights of a version, with its model card, its recipe and its base model's fingerprint
    if it has them; after a failure there are no weights.

    Raises:
        InvalidResponse: what came is not the weights file of this version.
        OSError: the disk refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{WEIGHTS_NAME}.partial"
    try:
        _download(client, version, partial)
        (folder / CONFIG_NAME).write_bytes(client.config_file(_by_digest(version)))
        if card := client.card(_by_digest(version)):
            (folder / CARD_NAME).write_bytes(card.encode())
        from prefix_service.checkpoints.folders import write_base_model, write_recipe

        write_recipe(folder, annotations)
        write_base_model(folder, client.base_model(_by_digest(version)))
        partial.rename(folder / WEIGHTS_NAME)
    finally:
        partial.unlink(missing_ok=True)


def _download(client: "PrefixClient", version: Mapping[str, Any], file: Path) -> None:
    reference = _by_digest(version)
    size, digest = version["size"]["weights"], hashlib.sha256()
    bar = Progress(console=errors_console, transient=True, disable=not errors_console.is_terminal)
    with file.open("wb") as opened, bar as progress:
        task = progress.add_task("downloading", total=size)
        for first in range(0, size, _PIECE):
            piece = client.parameters(reference, first, min(first + _PIECE, size))
            digest.update(piece)
            opened.write(piece)
            progress.advance(task, len(piece))
    if f"sha256:{digest.hexdigest()}" != version["weights"]:
        raise InvalidResponse(f"the weights that came for {reference} are not {version['weights']}")


def _checked_dtype(name: str, dtype: str | None) -> Any:
    known = get_args(KVDtype)
    if dtype is not None and dtype not in known:
        raise InvalidRequest(f"{name} must be one of {', '.join(known)}, got {dtype!r}")
    return dtype

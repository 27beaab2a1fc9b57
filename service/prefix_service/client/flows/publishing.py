"""The methods of both clients that publish versions, as flows that need nothing of their client."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from prefix_service.client import options
from prefix_service.client.cache.fingerprints import Fingerprints
from prefix_service.client.flows import base_models
from prefix_service.client.flows.flows import adapter_alone
from prefix_service.client.flows.question import require_version
from prefix_service.client.protocol import Answer, Flow, Progress, Request, Together, Work, adapter_path
from prefix_service.errors import InvalidRequest, PrefixServiceError
from prefix_service.prefix.file_names import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.prefix.references import Reference

if TYPE_CHECKING:
    from prefix_service.checkpoints.sources import Upload


def publish(
    adapter: str,
    folder: str | Path,
    *,
    base_model_config: str | Path | None = None,
    annotations: Mapping[str, str] | None = None,
    base_model: Fingerprint | None = None,
    progress: Progress | None = None,
) -> Flow[tuple[Mapping[str, Any], bool]]:
    """Publishes a local folder as a version of `tenant/name`. Returns the version's metadata, and whether it is new.

    Args:
        adapter: where to publish, `tenant/name`.
        folder: the output of PEFT's `save_pretrained`: `adapter_config.json`, `adapter_model.safetensors`, and a
            `README.md`, which becomes the model card. The prefix is cut out of a full training checkpoint. The
            `prefix_recipe.json` of a compiled prefix becomes annotations.
        base_model_config: the base model's `config.json`, for dimensions that the adapter's config lacks.
        annotations: texts by key, such as author, run, metrics; they replace those of a recipe by the same key. They
            belong to a new version; an existing one keeps its own.
        base_model: the fingerprint of the base model, from `fingerprint_of` or `read_fingerprint`; by default that of a
            compiled prefix, from its folder. It is stored for an existing version too.
        progress: called with the bytes that were sent and their total, as in `get`.

    Raises:
        InvalidRequest: there is no such folder, or a file cannot be read.
        InvalidConfig, InvalidCheckpoint: the folder lacks a file, or the service refused one; nothing was published.
        TooLarge, QuotaExceeded, …: the service reported the error; nothing was published.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer did not come from the service.
    """
    path = options.required_path("folder", folder)
    model_path = options.path("base_model_config", base_model_config)
    known = None if base_model is None else options.fingerprint("base_model", base_model)
    told = options.callback("progress", progress)
    adapter_alone(adapter)
    upload, model = yield Work(partial(_opened, path, model_path))
    described = upload.recipe if annotations is None else {**upload.recipe, **annotations}
    own = upload.base_model if known is None else known
    with upload.weights as weights:
        return (yield from _publish(adapter, upload.config, weights, model, upload.card, described, own, told))


def publish_files(
    adapter: str,
    config: bytes,
    weights: BinaryIO,
    base_model_config: bytes | None = None,
    *,
    card: bytes | None = None,
    annotations: Mapping[str, str] | None = None,
    base_model: Fingerprint = NO_FINGERPRINT,
) -> Flow[tuple[Mapping[str, Any], bool]]:
    """Publishes a version of `tenant/name` from open files. Returns the version's metadata, and whether it is new.

    Args:
        adapter: where to publish, `tenant/name`.
        config: the bytes of `adapter_config.json`.
        weights: `adapter_model.safetensors`, open for reading in binary mode.
        base_model_config: the bytes of the base model's `config.json`, for dimensions that the adapter's config lacks.
        card: the model card, a `README.md` as PEFT writes it.
        annotations: texts by key, such as author, run, metrics. Like the card, they belong to a new version; an
            existing one keeps its own.
        base_model: the fingerprint of the base model, stored for an existing version too.

    Raises:
        InvalidConfig, InvalidCheckpoint, TooLarge, …: the service reported the error; nothing was published.
        InvalidRequest: an argument is not a readable file.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer did not come from the service.
    """
    model = None if base_model_config is None else options.content("base_model_config", base_model_config)
    text = None if card is None else options.content("card", card)
    config, weights = options.content("config", config), options.file("weights", weights)
    known = options.fingerprint("base_model", base_model)
    return _publish(adapter, config, weights, model, text, annotations, known)


def compose(adapter: str, references: Iterable[str]) -> Flow[tuple[Mapping[str, Any], bool]]:
    """Publishes the concatenation of prefixes as a version of `tenant/name`, a CARTRIDGE as made by PEFT's
    `compose_cartridge_adapters`. Returns the version's metadata, and whether it is new.

    Raises:
        NotFound, InvalidRequest, …: the service reported the error; nothing was published.
        ConnectionFailed: the service did not answer before the deadline.
        InvalidResponse: the answer did not come from the service.
    """
    tenant, name = adapter_alone(adapter)
    wanted = options.references(references)
    answer: Answer = yield Request("POST", adapter_path(tenant, name, "versions"), json={"compose": wanted})
    return _published(tenant, name, answer)


def _publish(
    adapter: str,
    config: bytes,
    weights: BinaryIO,
    base_model_config: bytes | None,
    card: bytes | None,
    annotations: Mapping[str, str] | None,
    base_model: Fingerprint,
    progress: Progress | None = None,
) -> Flow[tuple[Mapping[str, Any], bool]]:
    """Publishes a version of `tenant/name`, then stores the fingerprint of its base model; returns its metadata, and
    whether it is new."""
    tenant, name = adapter_alone(adapter)
    files: dict[str, bytes | BinaryIO] = {CONFIG_NAME: config}
    if base_model_config is not None:
        files["base_model_config"] = base_model_config
    if card is not None:
        files[CARD_NAME] = card
    if annotations:
        files["annotations"] = options.json_bytes("annotations", annotations)
    files[WEIGHTS_NAME] = weights
    path = adapter_path(tenant, name, "versions")
    answer: Answer = yield Request("POST", path, files=files, progress=progress)
    version, is_new = _published(tenant, name, answer)
    if base_model != NO_FINGERPRINT:
        (stored,) = yield Together([_put_base_model(f"{adapter}@{version['digest']}", base_model)], 1)
        if isinstance(stored, PrefixServiceError):
            stored.message = (
                f"{adapter}@{version['version']} is published, but the fingerprint of its base model is not stored "
                f"(publish it again): {stored.message}"
            )
            stored.args = (stored.message,)
            raise stored
    return version, is_new


def _put_base_model(reference: str, fingerprint: Fingerprint) -> Flow[None]:
    yield from base_models.put_base_model(Fingerprints(), reference, fingerprint.known())


def _opened(folder: Path, base_model_config: Path | None) -> "tuple[Upload, bytes | None]":
    """Open the weights of an adapter's folder, and read its config and the base model's."""
    from prefix_service.checkpoints.sources import prepare_upload

    if not folder.exists():
        raise InvalidRequest(f"there is no folder {folder} to publish")
    try:
        model = None if base_model_config is None else base_model_config.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"base_model_config {base_model_config} cannot be read: {error.strerror}") from error
    return prepare_upload(folder), model


def _published(tenant: str, name: str, answer: Answer) -> tuple[Mapping[str, Any], bool]:
    """Returns the version in the answer to a publication, and whether it is new.

    It has `tenant_created` if its tenant was created with it.
    """
    found = require_version(answer.json_object(), tenant, Reference(name), answer.headers.get("location"))
    if answer.headers.get("prefix-tenant-created") == "true":
        found = {**found, "tenant_created": True}
    return found, answer.status == 201

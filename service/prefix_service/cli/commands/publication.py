"""One adapter on its way to the service: the call that sends it, and what is said of its version."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from prefix_service.cli.console import say

if TYPE_CHECKING:
    from prefix_service.checkpoints.sources import Upload
    from prefix_service.client import Fingerprint, PrefixClient


@dataclass(frozen=True, slots=True)
class Extras:
    """Optional inputs that are published with an adapter's files.

    `base_config` is the base model's `config.json`. `base_model` and `annotations` replace those of the adapter's
    folder.
    """

    base_config: bytes | None
    base_model: "Fingerprint | None"
    annotations: Mapping[str, str]


def send(
    client: "PrefixClient", adapter: str, upload: "Upload", weights: BinaryIO, extras: Extras
) -> tuple[Mapping[str, Any], bool]:
    """Publishes an upload, whose weights are read from `weights`. Returns the version, and whether it is new."""
    return client.publish_files(
        adapter,
        upload.config,
        weights,
        extras.base_config,
        card=upload.card,
        annotations={**upload.recipe, **extras.annotations},
        base_model=extras.base_model or upload.base_model,
    )


def published(version: Mapping[str, Any], *, is_new: bool) -> str:
    """Returns the line that says that a version is published, or was already there."""
    done = "published" if is_new else "already there as"
    return f"{done} {version['tenant']}/{version['adapter']}@{version['version']}"


def tell_new_tenant(tenant: str) -> None:
    """Says that publishing has made a tenant."""
    say(f"made tenant {tenant}")

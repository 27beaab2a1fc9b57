"""`publish hf://…` downloads what an adapter needs from a hub, of one commit, and shows its token to the hub alone."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from huggingface_hub import constants

from prefix_service.checkpoints.remote.address import parse_address
from prefix_service.checkpoints.remote.download import downloaded
from prefix_service.client import PrefixClient
from prefix_service.errors import (
    ConnectionFailed,
    Forbidden,
    InvalidCheckpoint,
    NotFound,
    PrefixServiceError,
    TooLarge,
    UnsafeCheckpoint,
)
from tests.cli.remote.local_servers import COMMIT, Seen, hub_handler, serving, storage_handler
from tests.cli.test_control_trans import FILES
from tests.cli.test_convert import Harmful
from tests.commands import run_process
from tests.conftest import CORPUS, Server, free_port

ADAPTER: Final = CORPUS / "cases" / "llama-n20-emb" / "adapter"
_MOST: Final = 1 << 20


@dataclass
class Hub:
    """A hub, and the server of its large files."""

    hub: Seen
    storage: Seen


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Yields a hub with adapters and with traps."""
    config, weights = ((ADAPTER / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    sound = {"adapter_config.json": config, "adapter_model.safetensors": weights}
    adapterhub = {
        path.name: path.read_bytes()
        for path in (FILES / "adapterhub-gpt2-bottleneck").iterdir()
        if path.name not in ("expected.safetensors", "base_config.json")
    }
    harmful = io.BytesIO()
    torch.save({"prompt_embeddings": torch.zeros(20, 96), "harm": Harmful(Path("/nowhere"))}, harmful)
    cartridge = (CORPUS / "variants" / "hazy_cartridge-f1" / "cache-step4.pt").read_bytes()
    repositories = {
        "acme/adapter": {
            **sound,
            "README.md": b"# A card",
            "model.safetensors": b"of the base",
            "training_args.bin": b"a pickle",
            "checkpoint-1/adapter_config.json": config,
            "checkpoint-1/adapter_model.safetensors": weights,
        },
        "acme/cartridges": {"a/cache-step4.pt": cartridge, "a/cache-step8.pt": cartridge},
        "acme/adapterhub": {**adapterhub, "pytorch_model_head.bin": b"a head"},
        "acme/harmful": {"adapter_config.json": config, "adapter_model.bin": harmful.getvalue()},
        "acme/large": {"large.safetensors": b"x", "adapter_config.json": config},
        "acme/empty": {"notes.txt": b"nothing"},
        "acme/terms-gated": sound,
    }
    large = {f"{name}/{file}": data for name, files in repositories.items() for file, data in files.items()}
    with serving(storage_handler(large)) as storage:
        handler = hub_handler(repositories, storage.url, {"large.safetensors": _MOST + 1})
        with serving(handler) as seen:
            yield Hub(seen, storage)


def _lead_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets what huggingface_hub makes of HF_ENDPOINT when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


@pytest.fixture
def asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Returns the hub, to which this process's huggingface_hub is led as HF_ENDPOINT does."""
    _lead_to(hub.hub.url, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.hub.requests.clear()
    hub.storage.requests.clear()
    return hub


def fetched(address: str, **options: Any) -> tuple[list[str], dict[str, str], str | None]:
    """Downloads an adapter; returns the names of its folder's files, its annotations, and how it was converted."""
    with downloaded(parse_address(address), _MOST, **options) as found:
        return (
            sorted(path.name for path in found.folder.iterdir() if path.is_file()),
            found.annotations,
            found.converted,
        )


def test_an_adapter_is_published_with_its_commit(hub: Hub, server: Server) -> None:
    """The version's annotations name the commit, the files are of that commit, and no others came."""
    hub.hub.requests.clear()
    hub.storage.requests.clear()
    environment = {
        "PREFIX_URL": server.url,
        "PREFIX_API_KEY": server.admin_key,
        "HF_ENDPOINT": hub.hub.url,
        "HF_TOKEN": "hf_secret",
    }
    done = run_process("publish", "hf://acme/adapter@v1", "hub/adapter", "--note", "tried", environment=environment)
    assert done.returncode == 0, done.stderr
    with PrefixClient(server.url, server.admin_key) as client:
        assert client.annotations("hub/adapter@1") == {
            "note": "tried",
            "source": f"hf://acme/adapter@{COMMIT}",
            "source.revision": "v1",
        }
        assert client.card("hub/adapter@1") == "# A card"
        weights = (ADAPTER / "adapter_model.safetensors").read_bytes()
        assert bytes(client.parameters("hub/adapter@1", 0, len(weights))) == weights
    assert {path for path in hub.hub.paths("GET") if "/resolve/" in path} == {
        f"/acme/adapter/resolve/{COMMIT}/{name}" for name in ("adapter_config.json", "README.md")
    }
    assert hub.storage.paths("GET") == ["/acme/adapter/adapter_model.safetensors?signature=secret"]
    # The library asks the hub for a list of its own too, without the token.
    told = {headers.get("authorization") for _, path, headers in hub.hub.requests if "/acme/" in path}
    assert told == {"Bearer hf_secret"}
    assert hub.storage.authorizations() == {None}


def test_a_folder_of_a_repository(asked: Hub) -> None:
    """A path names a folder of the repository."""
    names, annotations, converted = fetched("hf://acme/adapter/checkpoint-1")
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert annotations == {"source": f"hf://acme/adapter@{COMMIT}/checkpoint-1", "source.revision": "main"}
    assert converted is None


def test_a_pickle_is_converted(asked: Hub) -> None:
    """A file that is a cartridge comes alone, and is converted on this machine."""
    names, annotations, converted = fetched("hf://acme/cartridges/a/cache-step4.pt")
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert annotations["source"] == f"hf://acme/cartridges@{COMMIT}/a/cache-step4.pt"
    assert str(converted).startswith("Cartridges: ")
    assert len(asked.storage.paths("GET")) == 1


def test_a_foreign_layout_is_converted_with_the_base_models_config(asked: Hub) -> None:
    """AdapterHub's files are read as `convert` reads them; its head stays where it is."""
    base = FILES / "adapterhub-gpt2-bottleneck" / "base_config.json"
    _, _, converted = fetched("hf://acme/adapterhub", base_config=base)
    assert str(converted).startswith("AdapterHub: 2 layers, 3 tokens")
    assert not any("head" in path for path in asked.hub.paths("GET"))


@pytest.mark.parametrize(
    ("address", "error", "reason"),
    [
        ("hf://acme/missing", NotFound, "there is no repository acme/missing"),
        ("hf://acme/adapter@v9", NotFound, "acme/adapter has no revision v9"),
        ("hf://acme/adapter/nowhere", NotFound, "there are no files at nowhere"),
        ("hf://acme/terms-gated", Forbidden, "acme/terms-gated is gated"),
        ("hf://acme/empty", InvalidCheckpoint, r"no weights among notes\.txt"),
        ("hf://acme/cartridges/a", InvalidCheckpoint, r"several checkpoints \(cache-step4\.pt, cache-step8\.pt\)"),
        ("hf://acme/large", TooLarge, rf"large\.safetensors has {_MOST + 1} bytes"),
        ("hf://acme/harmful", UnsafeCheckpoint, "needs more than tensors"),
    ],
)
def test_what_cannot_be_published_is_told(
    asked: Hub, address: str, error: type[PrefixServiceError], reason: str
) -> None:
    """The error says what is missing, too large or unsafe; what is too large is not downloaded."""
    with pytest.raises(error, match=reason):
        fetched(address)
    assert not any("large.safetensors" in path for path in asked.storage.paths("GET"))


def test_a_hub_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is an error of the connection."""
    _lead_to(f"http://127.0.0.1:{free_port()}", monkeypatch)
    with pytest.raises(ConnectionFailed, match="the hub did not answer for hf://acme/adapter: ConnectError"):
        fetched("hf://acme/adapter")

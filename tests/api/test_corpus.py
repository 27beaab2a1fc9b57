"""The conformance corpus over HTTP: what PEFT computed is what a worker gets, for every case and variant."""

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from safetensors import safe_open

from tests.api.helpers import Tensors, about_of, assert_same, expected_of, tensors_of, upload_directory
from tests.conftest import CORPUS, PREFIX_SERVICE, Server

TENANT = "corpus"
BATCHES = (1, 3)


class Adapter(NamedTuple):
    """An adapter directory, and the case whose expectations hold for it."""

    name: str
    directory: Path
    case: str

    @property
    def kv_dtype(self) -> str:
        """What PEFT's values have on its base model."""
        found: str = json.loads((CORPUS / "cases" / self.case / "case.json").read_text())["kv_dtype"]
        return found


def _cases() -> list[Adapter]:
    return [Adapter(path.name, path / "adapter", path.name) for path in sorted((CORPUS / "cases").iterdir())]


def _variants() -> list[Adapter]:
    told = [(path, json.loads((path / "variant.json").read_text())) for path in sorted((CORPUS / "variants").iterdir())]
    return [Adapter(path.name.lower().replace("_", "-"), path, about["equivalent_case"]) for path, about in told]


def _is_uploadable(adapter: Adapter) -> bool:
    return (adapter.directory / "adapter_model.safetensors").exists()


UPLOADED = _cases() + [variant for variant in _variants() if _is_uploadable(variant)]
CONVERTED = [variant for variant in _variants() if not _is_uploadable(variant)]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """A platform admin."""
    return server.client()


def _assert_as_peft(client: httpx.Client, adapter: Adapter, rows: int) -> None:
    """Fetched at `rows` rows, the tensors are those of the case: bit-equal, or within 1e-5 behind an MLP."""
    query: dict[str, Any] = {"batch_size": rows, "dtype": adapter.kv_dtype}
    answer = client.get(f"/v1/tenants/{TENANT}/adapters/{adapter.name}/prefix", params=query)
    tensors, about = tensors_of(answer), about_of(answer.content)
    mask = tensors.pop("attention_mask")
    assert_same(mask, torch.ones(rows, about["num_virtual_tokens"], dtype=torch.int64))
    expected = _served(expected_of(adapter.case), rows)
    assert tensors.keys() == expected.keys()
    exact = not adapter.case.endswith("proj-trainstate")
    for name, wanted in expected.items():
        if exact:
            assert_same(tensors[name], wanted)
        else:
            torch.testing.assert_close(tensors[name], wanted, rtol=0, atol=1e-5)


def _served(expected: Tensors, rows: int) -> Tensors:
    """What the service returns: untrimmed tensors where PEFT's cache was trimmed to a sliding window."""
    served = {
        name.replace(f"b{rows}.layers", "past_key_values"): tensor
        for name, tensor in expected.items()
        if name.startswith(f"b{rows}.layers")
    }
    whole = {
        name.replace("full.b1.layers", "past_key_values"): tensor.expand(rows, -1, -1, -1)
        for name, tensor in expected.items()
        if name.startswith("full.b1.layers")
    }
    return served | whole


def test_the_corpus_is_there() -> None:
    """Every case and variant is covered by one of the two tests below."""
    assert len(_cases()) >= 14
    assert {adapter.name for adapter in UPLOADED + CONVERTED} == {adapter.name for adapter in _cases() + _variants()}
    assert len(CONVERTED) == 3


@pytest.mark.parametrize("adapter", UPLOADED, ids=lambda adapter: adapter.name)
def test_uploaded_adapter(client: httpx.Client, adapter: Adapter) -> None:
    """An adapter directory, uploaded as it is, is served as PEFT computes it."""
    version = upload_directory(client, TENANT, adapter.name, adapter.directory)
    stored = adapter.directory / "adapter_model.safetensors"
    assert client.get(f"/v1/tenants/{TENANT}/adapters/{adapter.name}/parameters").content == stored.read_bytes()
    with safe_open(stored, "pt") as file:
        dtypes = {str(file.get_tensor(name).dtype).removeprefix("torch.") for name in file.keys()}  # noqa: SIM118
    assert {version["dtype"]} == dtypes
    for rows in BATCHES:
        _assert_as_peft(client, adapter, rows)


# What `prefix-service convert` is told about the variants that are no adapter directories of safetensors.
CONVERSIONS = {
    "hazy-cartridge-f1": ["--unsafe", "--base-config", str(CORPUS / "bases" / "llama" / "config.json")],
    "legacy-bin-gpt2-n20-emb": [],
    "peft-full-accelerate-gpt2-proj": [],
}


@pytest.mark.parametrize("adapter", CONVERTED, ids=lambda adapter: adapter.name)
def test_converted_adapter(client: httpx.Client, adapter: Adapter, tmp_path: Path) -> None:
    """A pickle or a full checkpoint, converted on the owner's machine and uploaded, is served as PEFT computes it."""
    pickles = list(adapter.directory.glob("*.pt"))
    source = pickles[0] if pickles else adapter.directory
    command = [*PREFIX_SERVICE, "convert", str(source), str(tmp_path / "safe"), *CONVERSIONS[adapter.name]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    upload_directory(client, TENANT, adapter.name, tmp_path / "safe")
    for rows in BATCHES:
        _assert_as_peft(client, adapter, rows)

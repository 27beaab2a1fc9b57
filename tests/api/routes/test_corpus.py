"""The conformance corpus over HTTP: what PEFT computed is what a worker gets, for every case and variant."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from safetensors import safe_open

from tests.api.helpers import Tensors, about_of, assert_same, expected_of, tensors_of, upload_directory
from tests.commands import run_command
from tests.conftest import CORPUS, Server

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


# The digest of a version never changes: it is computed from the config as parsed and the file as uploaded.
DIGESTS = {
    "gemma2-n20-emb": "6bcfca43a28dd89e1e393a6f8bc2f442e58e83db386854e47a4f613c4820f3c2",
    "gpt2-n20-emb": "ba8b5b66e67966990eb93ee69dadd688e725ae6a965af728fa8e1aaa02daf376",
    "gpt2-n20-proj": "3b702257e38cd1c8109c2f4c33abc71b3490cba0e6e712fa4aa50ecef3ae770e",
    "gpt2-n20-proj-trainstate": "beaec88e8ed7aefef34fb9f33fcaf3eea2519dc4584b870698e9ce75c23e78fc",
    "hf-peft-ex-plain": "b6e70dae09881513c7428f065dfc3a654a36079e90607ec3d6ec527abaf934c0",
    "hf-peft-ex-prefixed": "53454b0cd43b4790c2cf7651296b62077d6575e7e4adb1ce04f1a6266e5b0316",
    "legacy-bin-gpt2-n20-emb": "8a73a821ff5b504a1a9bb9ebc12136bbd848ba57fa1666d4df99ea1b60b732ff",
    "llama-cartridge-n20-f1": "32e6eb0c13b8fd8b428de4cb7cf05c477eed95009789882d794360917fd69d8e",
    "llama-cartridge-n20-f1-trainstate": "559cbbd88f73c1481cc38685012bebbdb5e35e321339dad7abf2969a564fac4d",
    "llama-n20-emb": "119bc648131d8ab0ea876a81dfc4934fdc69e930e35786702b65717cc0abafae",
    "llama-n20-emb-bf16base": "b63e2c80460d908ddfc57553938fbbbb0106be5b3a413da591816791eeeff1ac",
    "llama-n20-emb-stored_bf16-on_fp32": "a7a0dbf474d8bfc5d1d8ae51a97c80a56910281d49001d2d3df1e1c97ab050f0",
    "llama-n20-proj": "b2734bc52d06f82466c4344c1d99e139d301cdd7782257cb4019d546537cc979",
    "llama-n20-proj-trainstate": "5b9c9b86e144ddda688eb056486c9b5939f7ff818e2a7a584de3933861792e05",
    "opt-n20-emb": "9892b2abc91fb09dad16379237d984eec6a34d2c57527510357923ea667a1c60",
    "peft-full-accelerate-gpt2-proj": "021483cb6cbc9c3113858ee68b53472c2b579fe7caab46946c5f088c3c8761a3",
    "ptuning-v2-llama-proj": "f99c391b99d37d785e344096556bf5685d3940f16c6fc246b1a996e6c408cd20",
    "t5-n20-emb": "f67a9678dd1125b5f7bd3a22c099819445c2437f1ae1171860432ed0c2cc1d31",
    "t5-n20-proj": "16225323e5a53942f08f6b08add4ab49ec733606713aaa1c069c9e469eabba47",
}


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
    assert version["digest"] == f"sha256:{DIGESTS[adapter.name]}"
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
    done = run_command("convert", source, tmp_path / "safe", *CONVERSIONS[adapter.name])
    assert done.returncode == 0, done.stderr
    upload_directory(client, TENANT, adapter.name, tmp_path / "safe")
    for rows in BATCHES:
        _assert_as_peft(client, adapter, rows)

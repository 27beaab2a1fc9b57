"""Malicious configs are refused with 422, and nothing that they name is imported or fetched."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.api.helpers import CONFIG, assert_alive, problem, upload, versions_path, weights
from tests.conftest import Server, running_server

TENANT = "hard-config"
Refused = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Yields a client with a key of the platform's admin."""
    client = server.client()
    assert client.put(f"/v1/tenants/{TENANT}").status_code == 201
    return client


@pytest.fixture
def refused(server: Server, client: httpx.Client) -> Iterator[Refused]:
    """Uploads a config, and checks that it is refused with 422 and leaves no adapter."""

    def attempt(config: Any, code: str = "invalid-config", file: bytes | None = None) -> dict[str, Any]:
        return problem(upload(client, TENANT, "refused", config, file), 422, code)

    yield attempt
    problem(client.get(f"/v1/tenants/{TENANT}/adapters/refused"), 404, "not-found")
    assert client.get(f"/v1/tenants/{TENANT}/adapters").json()["items"] == []
    assert_alive(server)


@pytest.mark.parametrize("name", ["num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"])
def test_sizes_beyond_every_model(refused: Refused, name: str) -> None:
    """A size of 10^9 is refused by itself, before it is multiplied."""
    assert name in refused({**CONFIG, name: 10**9})["detail"]


@pytest.mark.parametrize(
    "change",
    [{"num_virtual_tokens": 4}, {"num_layers": 1}, {"token_dim": 16}, {"num_virtual_tokens": 6, "num_layers": 1}],
    ids=str,
)
def test_sizes_whose_product_is_not_that_of_the_tensors(refused: Refused, change: dict[str, int]) -> None:
    """Config and tensors must agree in every dimension, not only in the number of bytes."""
    refused({**CONFIG, **change}, "invalid-checkpoint")


def test_sizes_that_do_not_divide(refused: Refused) -> None:
    """token_dim must be a multiple of the heads."""
    refused({**CONFIG, "num_attention_heads": 3})


def test_small_projection_that_describes_a_huge_prefix(refused: Refused) -> None:
    """A projection of a few megabytes that describes gigabytes of keys and values is refused."""
    config = {**CONFIG, "inference_mode": False, "prefix_projection": True, "encoder_hidden_size": 1}
    config |= {"num_virtual_tokens": 1 << 20, "num_layers": 1 << 10, "num_attention_heads": 1, "token_dim": 1}
    tensors = {
        "embedding.weight": torch.zeros(1 << 20, 1),
        "transform.0.weight": torch.zeros(1, 1),
        "transform.0.bias": torch.zeros(1),
        "transform.2.weight": torch.zeros(2048, 1),
        "transform.2.bias": torch.zeros(2048),
    }
    refused(config, file=save(tensors))


@pytest.mark.parametrize(
    "change",
    [
        {"num_virtual_tokens": 1 << 20, "num_layers": 1 << 10, "token_dim": 1 << 18, "num_attention_heads": 1},
        {"prefix_projection": True, "encoder_hidden_size": 1 << 18, "token_dim": 4096, "num_layers": 32},
    ],
    ids=["prefix", "projection"],
)
def test_untrained_prefix_that_is_too_large(client: httpx.Client, server: Server, change: dict[str, Any]) -> None:
    """A hundred bytes of JSON that describe gigabytes of a prefix or its projection are refused."""
    config = {**CONFIG, "inference_mode": False, **change}
    problem(client.post(versions_path(TENANT, "refused"), json={"config": config}), 422, "invalid-config")
    assert_alive(server)


def _with(name: str, value: str) -> bytes:
    """Returns CONFIG with one raw JSON value."""
    return json.dumps({**CONFIG, name: "HERE"}).replace('"HERE"', value).encode()


@pytest.mark.parametrize("name", ["num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim"])
@pytest.mark.parametrize("value", ["-1", "0", "true", "3.0", "3.5", '"3"', "[3]", "1e400"])
def test_sizes_that_are_no_positive_integers(refused: Refused, name: str, value: str) -> None:
    """Negative, boolean, float and textual sizes are refused, not converted."""
    refused(_with(name, value))


@pytest.mark.parametrize("name", ["num_virtual_tokens", "unknown"])
@pytest.mark.parametrize("value", ["9" * 60_000, "NaN", "9" * 300], ids=lambda v: f"{v[:9]}/{len(v)}")
def test_numbers_that_json_or_its_canonical_form_cannot_hold(refused: Refused, name: str, value: str) -> None:
    """Integers of 60,000 digits and NaN are refused wherever they stand."""
    refused(_with(name, value))


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "1e999"])
def test_infinities(refused: Refused, value: str) -> None:
    """An infinite size is refused; an unknown key may be infinite, and is not stored."""
    refused(_with("num_virtual_tokens", value))


@pytest.mark.parametrize(
    "config",
    [
        b'{"peft_type": "CARTRIDGE", "peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}',
        json.dumps(CONFIG).replace("}", ', "more": {"a": 1, "a": 2}}').encode(),
    ],
    ids=["outer", "inner"],
)
def test_duplicate_keys(refused: Refused, config: bytes) -> None:
    """A duplicate key is refused at every depth."""
    assert "duplicate" in refused(config)["detail"]


@pytest.mark.parametrize(
    "config",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"a":' * 10_000 + b"1" + b"}" * 10_000],
    ids=["empty", "cut", "list", "null", "not utf-8", "byte order mark", "10,000 deep"],
)
def test_config_that_is_no_json_object(refused: Refused, config: bytes) -> None:
    """The config is one JSON object of moderate depth."""
    refused(config)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_config_that_is_nested_too_deep(refused: Refused, opening: str) -> None:
    """A config that is nested too deep is refused long before the parser's own stack ends."""
    closing = "]" if opening == "[" else "}"
    refused(_with("unknown", opening * 40 + "1" + closing * 40))


@pytest.mark.parametrize("where", ["base_model_name_or_path", "unknown", "more"])
def test_text_that_utf_8_cannot_hold(refused: Refused, where: str) -> None:
    """A lone surrogate has no canonical form, and is refused wherever it stands."""
    value = '{"\\ud800": 1}' if where == "more" else '"\\ud800"'
    refused(_with(where, value))


def test_config_of_more_than_a_megabyte(client: httpx.Client) -> None:
    """A config is bounded by itself, far below the bound of weights."""
    answer = upload(client, TENANT, "refused", {**CONFIG, "padding": "x" * (1 << 20)})
    problem(answer, 413, "too-large")


def test_base_model_config_is_held_to_the_same_rules(client: httpx.Client) -> None:
    """The base model's config fills dimensions, so its numbers are checked like the adapter's."""
    config = {**CONFIG, "num_layers": None}
    for base in ({"num_hidden_layers": -2}, {"num_hidden_layers": True}, {"num_hidden_layers": 10**9}, {}):
        answer = upload(client, TENANT, "refused", config, base={"hidden_size": 8, "num_attention_heads": 2, **base})
        problem(answer, 422, "invalid-config")


def test_auto_mapping_is_kept_and_never_imported(tmp_path: Path) -> None:
    """`auto_mapping.parent_library`, which PEFT imports, is stored and shown, and never imported."""
    (tmp_path / "canary_of_a_config.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    mapping = {"base_model_class": "Anything", "parent_library": "canary_of_a_config"}
    with running_server(tmp_path / "data", environment={"PYTHONPATH": str(tmp_path)}) as server:
        answer = upload(server.client(), "acme", "mapped", {**CONFIG, "auto_mapping": mapping})
        assert answer.status_code == 201
        assert answer.json()["config"]["auto_mapping"] == mapping
        assert server.client().get("/v1/tenants/acme/adapters/mapped/prefix").status_code == 200
        modules = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in server.pids())
    assert not (tmp_path / "imported").exists()
    assert "peft" not in modules


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "state.pt", "weights.pkl", "last.ckpt"])
def test_field_named_like_a_pickle(client: httpx.Client, name: str) -> None:
    """A field that is named like a pickle is refused before its content is read, and the error names the converter."""
    parts = {"adapter_config.json": json.dumps(CONFIG).encode(), name: b"\x80\x04N."}
    answer = problem(client.post(versions_path(TENANT, "refused"), files=parts), 422, "unsafe-checkpoint")
    assert "prefix-service convert" in answer["detail"]


@pytest.mark.parametrize("source", ["http://127.0.0.1:1/adapter", "file:///etc/passwd", "/etc/passwd", "s3://b/k"])
def test_paths_and_urls_are_no_sources(client: httpx.Client, server: Server, source: str) -> None:
    """Nothing is loaded from a path or URL that a request names (CVE-2023-43654, CVE-2026-0599)."""
    for body in ({"source": source}, {"config": CONFIG, "path": source}, {"config": source}, {"url": source}):
        problem(client.post(versions_path(TENANT, "refused"), json=body), 422, "invalid-request")
    parts = {"adapter_config.json": source.encode(), "adapter_model.safetensors": weights()}
    problem(client.post(versions_path(TENANT, "refused"), files=parts), 422, "invalid-config")
    parts = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": source.encode()}
    problem(client.post(versions_path(TENANT, "refused"), files=parts), 422, "invalid-checkpoint")
    problem(client.post(versions_path(TENANT, "refused"), files={"source": source.encode()}), 422, "invalid-request")
    assert_alive(server)


@pytest.mark.parametrize(
    "peft_type", ["LORA", "PROMPT_TUNING", "P_TUNING", "prefix_tuning", "", None, 1, ["PREFIX_TUNING"]]
)
def test_wrong_peft_type(refused: Refused, peft_type: Any) -> None:
    """Only the two PEFT types that are prefixes are accepted, in PEFT's spelling."""
    assert "peft_type" in refused({**CONFIG, "peft_type": peft_type})["detail"]


@pytest.mark.parametrize("frozen", [4, -1, True, 1.0, 10**9])
def test_frozen_tokens_above_the_virtual_ones(refused: Refused, frozen: Any) -> None:
    """A cartridge that freezes more tokens than it has is refused."""
    refused({**CONFIG, "peft_type": "CARTRIDGE", "num_frozen_tokens": frozen})


def test_missing_number_of_tokens(refused: Refused) -> None:
    """A config without num_virtual_tokens, which PEFT always writes, is refused."""
    refused({name: value for name, value in CONFIG.items() if name != "num_virtual_tokens"})

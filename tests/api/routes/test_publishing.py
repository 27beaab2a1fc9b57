"""Versions are published by uploads or as untrained prefixes, numbered, and described."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import rfc8785
import torch

from tests.api.helpers import (
    CONFIG,
    adapter_of,
    problem,
    tensors_of,
    upload,
    upload_directory,
    versions_path,
    weights,
)
from tests.conftest import CORPUS, Server

TENANT = "publishing"
_CREATED = "Prefix-Tenant-Created"
Parts = list[tuple[str, bytes]]
CONFIG_PART = ("adapter_config.json", json.dumps(CONFIG).encode())
WEIGHTS_PART = ("adapter_model.safetensors", weights())


@pytest.fixture
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client."""
    return server.client()


def _multipart(client: httpx.Client, adapter: str, parts: Parts) -> httpx.Response:
    return client.post(versions_path(TENANT, adapter), files=[(name, ("any name", data)) for name, data in parts])


def test_first_upload(client: httpx.Client) -> None:
    """A new version is a 201 with its path in Location."""
    answer = upload(client, TENANT, "first")
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/tenants/{TENANT}/adapters/first@1"
    assert answer.json() == client.get(answer.headers["location"]).json()


def test_the_same_content_is_the_same_version(client: httpx.Client) -> None:
    """Uploading equal content is a 200 with the existing version, and `latest` does not move."""
    first = upload(client, TENANT, "same")
    assert upload(client, TENANT, "same", file=weights(1)).json()["version"] == 2
    again = upload(client, TENANT, "same")
    assert again.status_code == 200
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert client.get(f"/v1/tenants/{TENANT}/adapters/same").json()["version"] == 2


def test_a_tenant_that_comes_into_being_is_told(client: httpx.Client, server: Server) -> None:
    """Only the answer to the publication that creates a tenant has a header that says so, however it was published."""
    for number, body in enumerate(({"config": CONFIG}, {"compose": [f"{TENANT}/told", f"{TENANT}/told"]})):
        upload(client, TENANT, "told")
        assert client.post(versions_path(f"{TENANT}-json-{number}", "a"), json=body).headers[_CREATED] == "true"
    broken = upload(client, f"{TENANT}-new", "a", file=b"")
    made = upload(client, f"{TENANT}-new", "a")
    writer = upload(server.client(server.key("write", f"{TENANT}-new")), f"{TENANT}-new", "b")
    later = [upload(client, f"{TENANT}-new", "a"), upload(client, f"{TENANT}-new", "b", file=weights(1)), writer]
    assert [answer.status_code for answer in (broken, made, *later)] == [422, 201, 200, 201, 201]
    assert made.headers[_CREATED] == "true"
    assert all(_CREATED not in answer.headers for answer in (broken, *later))


def test_the_same_weights_with_another_config_are_another_version(client: httpx.Client) -> None:
    """Equal weights with another config are another version."""
    first = upload(client, TENANT, "config").json()
    other = upload(client, TENANT, "config", {**CONFIG, "revision": "main"}).json()
    assert (first["version"], other["version"]) == (1, 2)
    assert first["weights"] == other["weights"]


def test_digest_is_that_of_the_canonical_manifest(client: httpx.Client) -> None:
    """The digest is the SHA-256 of RFC 8785 JSON: format, parsed config, and digest of the weights."""
    version = upload(client, TENANT, "digest").json()
    assert version["weights"] == f"sha256:{hashlib.sha256(weights()).hexdigest()}"
    manifest = {"format": 1, "config": version["config"], "weights": version["weights"]}
    assert version["digest"] == f"sha256:{hashlib.sha256(rfc8785.dumps(manifest)).hexdigest()}"
    assert CONFIG.items() <= version["config"].items()


@pytest.mark.parametrize(
    "parts",
    [
        [CONFIG_PART],
        [WEIGHTS_PART],
        [WEIGHTS_PART, CONFIG_PART],
        [CONFIG_PART, WEIGHTS_PART, ("base_model_config", b"{}")],
        [("base_model_config", b"{}"), CONFIG_PART, WEIGHTS_PART],
        [CONFIG_PART, CONFIG_PART, WEIGHTS_PART],
        [CONFIG_PART, WEIGHTS_PART, WEIGHTS_PART],
        [CONFIG_PART, ("other", b""), WEIGHTS_PART],
        [("", b""), CONFIG_PART, WEIGHTS_PART],
    ],
    ids=lambda parts: ",".join(name[:10] for name, _ in parts),
)
def test_parts_in_another_order(client: httpx.Client, parts: Parts) -> None:
    """A missing, repeated, unknown or misplaced field is a 422."""
    problem(_multipart(client, "parts", parts), 422, "invalid-request")
    problem(client.get(f"/v1/tenants/{TENANT}/adapters/parts"), 404)


def test_upload_that_ends_early(client: httpx.Client) -> None:
    """A body without its closing boundary is a 422."""
    body = b'--x\r\nContent-Disposition: form-data; name="adapter_config.json"\r\n\r\n' + CONFIG_PART[1]
    body += b'\r\n--x\r\nContent-Disposition: form-data; name="adapter_model.safetensors"\r\n\r\n' + WEIGHTS_PART[1]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post(versions_path(TENANT, "early"), content=body, headers=headers)
    problem(answer, 422, "invalid-request")
    answer = client.post(versions_path(TENANT, "early"), content=body + b"\r\n--x--\r\n", headers=headers)
    assert answer.status_code == 201


def test_file_names_do_not_matter(client: httpx.Client) -> None:
    """Only field names count; a file name is neither used nor needed."""
    assert _multipart(client, "names", [CONFIG_PART, WEIGHTS_PART]).status_code == 201
    files = {name: ("../../etc/passwd", data) for name, data in (CONFIG_PART, WEIGHTS_PART)}
    assert client.post(versions_path(TENANT, "names"), files=files).status_code == 200


@pytest.mark.parametrize("case", ["llama-n20-emb", "gemma2-n20-emb", "t5-n20-emb", "opt-n20-emb", "gpt2-n20-emb"])
def test_base_model_config_fills_dimensions(client: httpx.Client, case: str) -> None:
    """Dimensions that the adapter's config lacks come from the base model's, and the version has them."""
    full = json.loads((adapter_of(case) / "adapter_config.json").read_text())
    bare = {**full, "num_layers": None, "token_dim": None, "num_attention_heads": None}
    file = (adapter_of(case) / "adapter_model.safetensors").read_bytes()
    base = json.loads((CORPUS / "bases" / case.split("-")[0] / "config.json").read_text())
    problem(upload(client, TENANT, f"bare-{case}", bare, file), 422, "invalid-config")
    version = upload(client, TENANT, f"bare-{case}", bare, file, base).json()
    whole = upload(client, TENANT, f"full-{case}", full, file).json()
    assert version["config"] == whole["config"]
    assert version["digest"] == whole["digest"]


def test_final_values_of_the_adapter_stand(client: httpx.Client) -> None:
    """A number in the adapter's config is used although the base model's differs."""
    base = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
    assert upload(client, TENANT, "stands", base=base).json()["num_layers"] == 2


def test_base_model_config_that_contradicts_the_weights(client: httpx.Client) -> None:
    """A wrong base model is noticed by the shapes, and refused."""
    base = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
    bare = {name: value for name, value in CONFIG.items() if name not in {"num_layers", "token_dim"}}
    problem(upload(client, TENANT, "wrong-base", bare, base=base), 422)


def _fresh(client: httpx.Client, adapter: str, **body: Any) -> httpx.Response:
    return client.post(versions_path(TENANT, adapter), json={"config": {**CONFIG, "inference_mode": False}, **body})


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_untrained_prefix_of_zeros(client: httpx.Client, peft_type: str) -> None:
    """`init_weights: zero` makes keys and values of zeros, in the shapes that training would give."""
    answer = _fresh(
        client, f"zero-{peft_type.lower()[:4]}", config={**CONFIG, "peft_type": peft_type}, init_weights="zero"
    )
    assert answer.status_code == 201
    tensors = tensors_of(client.get(answer.headers["location"] + "/prefix"))
    assert tensors.pop("attention_mask").shape == (1, 3)
    assert len(tensors) == 4
    for tensor in tensors.values():
        assert torch.equal(tensor, torch.zeros(1, 2, 3, 4))


@pytest.mark.parametrize("projection", [False, True])
def test_untrained_prefix_of_random_numbers(client: httpx.Client, projection: bool) -> None:
    """Equal seeds give the same version, and another seed another one."""
    config = {**CONFIG, "inference_mode": False, "prefix_projection": projection, "encoder_hidden_size": 16}
    name = f"random-{projection}".lower()
    seeds = [_fresh(client, name, config=config, seed=seed) for seed in (0, 0, 1)]
    assert [answer.status_code for answer in seeds] == [201, 200, 201]
    default = _fresh(client, name, config=config)
    assert default.json()["version"] == 1
    key = tensors_of(client.get(f"/v1/tenants/{TENANT}/adapters/{name}@1/prefix"))["past_key_values.0.key"]
    assert len(set(key.flatten().tolist())) > 1


@pytest.mark.parametrize(
    "body",
    [{"init_weights": "ones"}, {"seed": -1}, {"seed": 1 << 63}, {"seed": "x"}, {"config": None}, {"more": 1}],
    ids=str,
)
def test_untrained_prefix_that_is_malformed(client: httpx.Client, body: dict[str, Any]) -> None:
    """A malformed or unknown field is a 422."""
    problem(_fresh(client, "malformed", **body), 422, "invalid-request")


def test_untrained_prefix_needs_dimensions(client: httpx.Client) -> None:
    """Without a base model's config every dimension must be given."""
    config = {name: value for name, value in CONFIG.items() if name != "num_layers"}
    assert "num_layers" in problem(_fresh(client, "malformed", config=config), 422, "invalid-config")["detail"]


def test_parameters_are_the_uploaded_file(client: httpx.Client) -> None:
    """Every version's weights come back byte for byte."""
    files = [weights(seed) for seed in range(3)]
    for file in files:
        upload(client, TENANT, "parameters", file=file)
    for number, file in enumerate(files, 1):
        answer = client.get(f"/v1/tenants/{TENANT}/adapters/parameters@{number}/parameters")
        assert answer.content == file
        assert answer.headers["content-type"] == "application/vnd.safetensors"


@pytest.mark.parametrize("case", ["llama-n20-proj-trainstate", "llama-cartridge-n20-f1", "t5-n20-emb", "llama-n20-emb"])
def test_inspect(client: httpx.Client, case: str) -> None:
    """A version's description has config, shapes, parameter counts, digest, size, aliases and residency."""
    version = upload_directory(client, TENANT, case, adapter_of(case))
    told = json.loads((adapter_of(case) / "adapter_config.json").read_text())
    size = (adapter_of(case) / "adapter_model.safetensors").stat().st_size
    tokens, layers, width = told["num_virtual_tokens"], told["num_layers"], told["token_dim"]
    assert (version["tenant"], version["adapter"]) == (TENANT, case)
    assert version["peft_type"] == told["peft_type"]
    assert version["base_model_name_or_path"] == told["base_model_name_or_path"]
    assert version["dtype"] == "float32"
    assert (version["num_virtual_tokens"], version["num_layers"]) == (tokens, layers)
    assert version["num_kv_heads"] == told["num_attention_heads"]
    assert version["head_dim"] == width // told["num_attention_heads"]
    assert version["prefix_embedding_dim"] == layers * 2 * width
    assert version["total_virtual_tokens"] == tokens * (2 if case.startswith("t5") else 1)
    assert version["size"] == {"weights": size, "key_values": tokens * layers * 2 * width * 4}
    assert version["aliases"] == []
    assert version["residency"].keys() == {"resident", "pinned", "device", "process", "processes"}
    assert version["created"].endswith("Z")
    hidden, flat = told.get("encoder_hidden_size"), tokens * layers * 2 * width
    if case == "llama-n20-proj-trainstate":
        flat = tokens * width + width * hidden + hidden + hidden * layers * 2 * width + layers * 2 * width
    if case == "llama-cartridge-n20-f1":
        flat = (tokens - told["num_frozen_tokens"]) * layers * 2 * width
    assert version["trainable_parameters"] == flat


def test_concurrent_uploads_of_one_content(server: Server) -> None:
    """Of N parallel uploads of equal content one is a 201, the others are 200, with one version."""
    clients = [server.client() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda client: upload(client, TENANT, "race-same"), clients))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert {answer.json()["version"] for answer in answers} == {1}


def test_concurrent_uploads_of_different_contents(server: Server) -> None:
    """N parallel uploads of different contents get consecutive versions, each with its own bytes."""
    clients = [(server.client(), weights(seed)) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: upload(pair[0], TENANT, "race-other", file=pair[1]), clients))
    assert sorted(answer.json()["version"] for answer in answers) == list(range(1, 9))
    for answer, (client, file) in zip(answers, clients, strict=True):
        assert client.get(answer.headers["location"] + "/parameters").content == file

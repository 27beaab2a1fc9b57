"""`POST …/versions` with `compose` makes a version that is the concatenation of others."""

import json
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import torch
from safetensors.torch import load, load_file, save
from transformers import AutoModelForCausalLM

from prefix_service.client import PrefixClient
from prefix_service.errors import NotFound
from tests.api.helpers import (
    CONFIG,
    adapter_of,
    assert_same,
    problem,
    tensors_of,
    upload,
    upload_directory,
    versions_path,
)
from tests.conftest import CORPUS, Server

TENANT = "composing"
CARTRIDGE = adapter_of("llama-cartridge-n20-f1")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a second cartridge for the same model: fewer of the first one's rows, in another order."""
    folder = tmp_path_factory.mktemp("other")
    config = json.loads((CARTRIDGE / "adapter_config.json").read_text())
    config |= {"num_virtual_tokens": 7, "num_frozen_tokens": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    flat = load_file(CARTRIDGE / "adapter_model.safetensors")["prompt_embeddings"]
    (folder / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": flat.flip(0)[:7].contiguous()}))
    return folder


@pytest.fixture(scope="module")
def client(server: Server, other: Path) -> httpx.Client:
    """Returns a platform admin's client, and publishes what can be composed."""
    client = server.client()
    upload_directory(client, TENANT, "cartridge", CARTRIDGE)
    upload_directory(client, "composing-too", "other", other)
    for name, case in (
        ("plain", "llama-n20-emb"),
        ("half", "llama-n20-emb-stored_bf16-on_fp32"),
        ("mlp", "llama-n20-proj-trainstate"),
        ("gpt2", "gpt2-n20-emb"),
        ("t5", "t5-n20-emb"),
        ("t5-too", "t5-n20-proj"),
    ):
        upload_directory(client, TENANT, name, adapter_of(case))
    return client


def _compose(client: httpx.Client, name: str, *references: Any) -> httpx.Response:
    return client.post(versions_path(TENANT, name), json={"compose": list(references)})


def _weights(client: httpx.Client, name: str) -> dict[str, torch.Tensor]:
    answer = client.get(f"/v1/tenants/{TENANT}/adapters/{name}/parameters")
    return load(answer.content)


# This is transformers' warning, for a property that PEFT reads.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# This is PEFT's warning, for a base model whose name is that of another machine's folder.
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_it_is_what_peft_composes(client: httpx.Client, other: Path, tmp_path: Path) -> None:
    """The service stores PEFT's weights and config, bit for bit; PEFT loads them, and computes what is served."""
    peft.compose_cartridge_adapters([CARTRIDGE, other], output_path=tmp_path / "theirs")
    answer = _compose(client, "both", f"{TENANT}/cartridge@1", "composing-too/other")
    assert answer.status_code == 201, answer.text
    found, ours = answer.json(), tmp_path / "ours"
    ours.mkdir()
    (ours / "adapter_config.json").write_text(json.dumps(found["config"]))
    (ours / "adapter_model.safetensors").write_bytes(
        client.get(f"/v1/tenants/{TENANT}/adapters/both/parameters").content
    )
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert theirs.keys() == {"prompt_embeddings"} == load_file(ours / "adapter_model.safetensors").keys()
    assert_same(load_file(ours / "adapter_model.safetensors")["prompt_embeddings"], theirs["prompt_embeddings"])
    composed, expected = (peft.PeftConfig.from_pretrained(str(tmp_path / name)) for name in ("ours", "theirs"))
    assert composed.to_dict() == expected.to_dict() | {"inference_mode": True}
    assert (found["num_virtual_tokens"], found["config"]["num_frozen_tokens"]) == (27, 1)

    base = AutoModelForCausalLM.from_pretrained(CORPUS / "bases" / "llama")
    prompt: Any = peft.PeftModel.from_pretrained(base, ours).get_prompt(1)
    tensors = tensors_of(client.get(f"/v1/tenants/{TENANT}/adapters/both@1/prefix"))
    for index, layer in enumerate(prompt.layers):
        assert_same(tensors[f"past_key_values.{index}.key"], layer.keys)
        assert_same(tensors[f"past_key_values.{index}.value"], layer.values)


@pytest.mark.parametrize(
    "names",
    [
        ("plain", "mlp"),
        ("mlp", "plain", "mlp"),
        ("cartridge", "mlp"),
        ("t5", "t5-too"),
        ("half", "plain"),
        ("half",) * 2,
    ],
    ids="+".join,
)
def test_it_is_the_row_of_a_mixed_batch(client: httpx.Client, names: tuple[str, ...]) -> None:
    """A composed version has the keys and values of a concatenation, bit for bit, even of MLPs. Its dtype is that of
    its parts, or float32 if they differ.
    """
    name = "-".join(names)
    references = [f"{TENANT}/{part}@1" for part in names]
    made = _compose(client, name, *references)
    assert made.status_code == 201, made.text
    assert made.json()["dtype"] == ("bfloat16" if set(names) == {"half"} else "float32")
    found = tensors_of(client.get(f"/v1/tenants/{TENANT}/adapters/{name}/prefix"))
    mixed = client.post("/v1/prefixes", json={"rows": [references], "dtype": made.json()["dtype"]})
    for key, tensor in tensors_of(mixed).items():
        assert_same(found[key], tensor)


def test_what_it_is_afterwards(client: httpx.Client) -> None:
    """A composed version is a CARTRIDGE without a projection, and without frozen tokens if its first part had none."""
    _compose(client, "described", f"{TENANT}/mlp", f"{TENANT}/plain")
    found = client.get(f"/v1/tenants/{TENANT}/adapters/described").json()
    assert (found["peft_type"], found["num_virtual_tokens"], found["config"]["num_frozen_tokens"]) == (
        "CARTRIDGE",
        40,
        0,
    )
    assert not {"prefix_projection", "encoder_hidden_size"} & found["config"].keys()
    assert _weights(client, "described")["prompt_embeddings"].shape == (40, found["prefix_embedding_dim"])


def test_the_same_again_is_the_same_version(client: httpx.Client) -> None:
    """Composing the same parts again finds the version, and another order makes another version."""
    first = _compose(client, "again", f"{TENANT}/plain", f"{TENANT}/cartridge")
    again = _compose(client, "again", f"{TENANT}/plain@1", f"{TENANT}/cartridge@latest")
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["version"] == 1
    assert _compose(client, "again", f"{TENANT}/cartridge", f"{TENANT}/plain").json()["version"] == 2


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (["composing/plain"], "compose"),
        (["composing/plain"] * 33, "compose"),
        (["composing/plain", 7], "compose.1"),
        (["composing/plain", "plain"], "'plain' names no tenant"),
        (["composing/plain", "composing/gpt2"], "composing/gpt2 has token_dim 32, and composing/plain has 16"),
        (
            ["composing/plain", "composing/t5"],
            "composing/t5 has task_type SEQ_2_SEQ_LM, and composing/plain has CAUSAL_LM",
        ),
    ],
)
def test_what_cannot_be_composed(client: httpx.Client, references: list[Any], said: str) -> None:
    """A 422 says why parts cannot be composed, and nothing is published."""
    assert said in problem(_compose(client, "refused", *references), 422)["detail"]
    problem(client.get(f"/v1/tenants/{TENANT}/adapters/refused"), 404)


def test_it_has_the_base_model_of_its_parts(client: httpx.Client) -> None:
    """A composition has what all parts know of their base model; parts of different ones are refused by the field."""
    for name, values in (
        ("based", {"architecture": "llama", "rope": {"rope_theta": 1e4}, "weights_index": "sampled-bfloat16:1"}),
        ("based-too", {"architecture": "llama", "rope": {"rope_theta": 1e4}}),
        ("instruct", {"architecture": "llama", "weights_index": "sampled-bfloat16:2"}),
    ):
        upload_directory(client, TENANT, name, CARTRIDGE)
        assert client.put(f"/v1/tenants/{TENANT}/adapters/{name}@1/base-model", json=values).status_code == 204
    for name, parts, expected in (
        ("same", ("based", "based"), {"architecture", "rope", "weights_index"}),
        ("common", ("based", "based-too"), {"architecture", "rope"}),
        ("unknown", ("based", "cartridge"), set()),
    ):
        assert _compose(client, name, *(f"{TENANT}/{part}@1" for part in parts)).status_code == 201
        assert client.get(f"/v1/tenants/{TENANT}/adapters/{name}/base-model").json().keys() == expected
    refused = _compose(client, "refused", f"{TENANT}/based-too", f"{TENANT}/based", f"{TENANT}/instruct@1")
    said = (
        "the base model of composing/instruct@1 has weights_index 'sampled-bfloat16:2', and that of composing/based "
        "'sampled-bfloat16:1': they cannot be composed"
    )
    assert said in problem(refused, 422, "invalid-request")["detail"]
    problem(client.get(f"/v1/tenants/{TENANT}/adapters/refused"), 404)


def test_options_of_an_untrained_prefix_do_not_belong_here(client: httpx.Client) -> None:
    """A body has either `compose` or a config."""
    body = {"compose": [f"{TENANT}/plain"] * 2, "config": CONFIG}
    problem(client.post(versions_path(TENANT, "refused"), json=body), 422, "invalid-request")


def test_more_tokens_than_a_prefix_may_have(client: httpx.Client) -> None:
    """The bound of tokens holds for the sum."""
    config = CONFIG | {"num_virtual_tokens": (1 << 19) + 1, "num_layers": 1, "num_attention_heads": 1, "token_dim": 1}
    flat = torch.zeros((1 << 19) + 1, 2)
    assert upload(client, TENANT, "long", config, save({"prompt_embeddings": flat})).status_code == 201
    said = problem(_compose(client, "longer", f"{TENANT}/long", f"{TENANT}/long"), 422, "invalid-config")["detail"]
    assert "num_virtual_tokens must be at most 1048576, got 1048578" in said


def test_who_may_compose(server: Server, client: httpx.Client) -> None:
    """A key must be able to write there and read every part; another tenant's part is 404 like a missing one."""
    writer, reader = (server.client(server.key(scope, TENANT)) for scope in ("write", "read"))
    assert _compose(writer, "own", f"{TENANT}/plain", f"{TENANT}/plain").status_code == 201
    problem(_compose(reader, "own", f"{TENANT}/plain", f"{TENANT}/plain"), 403, "forbidden")
    for name in ("other", "none"):
        answer = _compose(writer, "foreign", f"{TENANT}/plain", f"composing-too/{name}@1")
        assert problem(answer, 404, "not-found")["detail"] == f"there is no composing-too/{name}@1"
    problem(_compose(client, "own", f"{TENANT}/plain", f"{TENANT}/none"), 404, "not-found")


def test_quota_and_audit(server: Server, client: httpx.Client) -> None:
    """A composed version counts against the quota and is audited, like an uploaded one."""
    upload_directory(client, "composing-quota", "a", CARTRIDGE)
    used = client.get("/v1/tenants/composing-quota").json()["bytes"]
    body = {"compose": ["composing-quota/a", "composing-quota/a"]}
    client.put("/v1/tenants/composing-quota", json={"max_bytes": used + 100})
    problem(client.post(versions_path("composing-quota", "b"), json=body), 507, "quota-exceeded")
    client.put("/v1/tenants/composing-quota", json={"max_bytes": 10 * used})
    assert client.post(versions_path("composing-quota", "b"), json=body).status_code == 201
    latest = client.get("/v1/tenants/composing-quota/audit").json()["items"][0]
    assert (latest["action"], latest["target"]) == ("version.published", "composing-quota/b@1")


def test_the_client_composes(server: Server, client: httpx.Client) -> None:
    """`client.compose` returns the version, and raises the service's errors as classes."""
    with PrefixClient(server.url, server.admin_key) as worker:
        version, is_new = worker.compose(f"{TENANT}/by-client", [f"{TENANT}/plain@1", "composing-too/other"])
        assert (version["num_virtual_tokens"], is_new) == (27, True)
        assert not worker.compose(f"{TENANT}/by-client", [f"{TENANT}/plain@1", "composing-too/other"])[1]
        assert worker.get(f"{TENANT}/by-client@1").num_virtual_tokens == 27
        with pytest.raises(NotFound, match="there is no composing/none"):
            worker.compose(f"{TENANT}/by-client", [f"{TENANT}/plain", f"{TENANT}/none"])

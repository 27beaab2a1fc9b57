"""Statistics and comparison over HTTP: the numbers of plain torch, and of `prefix-service diff`."""

from dataclasses import asdict
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from prefix_service.client import PrefixClient
from prefix_service.client.prefixes.difference import differences
from tests.api.helpers import CONFIG, adapter_of, expected_of, problem, upload, upload_directory
from tests.conftest import Server

TENANT = "figures"
CASES = ["llama-n20-emb", "gpt2-n20-proj-trainstate", "gemma2-n20-emb", "t5-n20-emb"]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client, of a service with the cases of the corpus."""
    client = server.client()
    for case in (*CASES, "llama-n20-proj"):
        upload_directory(client, TENANT, case, adapter_of(case))
    return client


def _path(reference: str, what: str) -> str:
    return f"/v1/tenants/{TENANT}/adapters/{reference}/{what}"


def _from_peft(case: str) -> Tensor:
    """Returns the keys and values `[L, 2, H, N, D]` that PEFT computes."""
    found = expected_of(case)
    layers = sum(name.startswith("b1.") and name.endswith(".key") for name in found)
    pairs = [[found[f"b1.layers.{layer}.{part}"][0] for part in ("key", "value")] for layer in range(layers)]
    return torch.stack([torch.stack(pair) for pair in pairs]).double()


@pytest.mark.parametrize("case", CASES)
def test_norms_are_those_of_plain_torch(client: httpx.Client, case: str) -> None:
    """The tables are computed from the keys and values that PEFT hands to the model."""
    answer = client.get(_path(case, "statistics"))
    assert answer.status_code == 200, answer.text
    found, expected = answer.json(), _from_peft(case).norm(dim=-1).square()
    layers, _, heads, tokens = expected.shape
    assert [found[name] for name in ("layers", "kv_heads", "tokens")] == [
        {"count": count, "step": 1} for count in (layers, heads, tokens)
    ]
    for part, name in enumerate(("keys", "values")):
        for table, other in (("by_head", 3), ("by_token", 2)):
            cells = torch.tensor(found[name][table], dtype=torch.float64)
            torch.testing.assert_close(cells, expected.mean(other)[:, part].sqrt(), rtol=1e-6, atol=0)
    assert (len(found["sink_like"]["by_token"]), len(found["sink_like"]["by_token"][0])) == (layers, tokens)


@pytest.mark.parametrize("pair", [("llama-n20-emb", "llama-n20-proj"), ("llama-n20-proj", "llama-n20-proj")])
def test_two_versions_are_compared(client: httpx.Client, server: Server, pair: tuple[str, str]) -> None:
    """Cells are those of plain torch; layers are, to the last bit, those that `prefix-service diff` shows."""
    found = client.get(_path(f"{pair[0]}@1", "compare"), params={"with": pair[1]}).json()
    first, second = (_from_peft(case).flatten(3) for case in pair)
    off, norms = (second - first).norm(dim=-1), torch.maximum(first.norm(dim=-1), second.norm(dim=-1))
    cosine = torch.cosine_similarity(first, second, dim=-1)
    for part, name in enumerate(("keys", "values")):
        for table, expected in (("relative", off / norms), ("cosine", cosine)):
            cells = torch.tensor(found[name][table], dtype=torch.float64)
            torch.testing.assert_close(cells, expected[:, part], rtol=1e-6, atol=1e-7)
    with PrefixClient(server.url, api_key=server.admin_key) as worker:
        layers = differences(*(worker.get(f"{TENANT}/{case}@1") for case in pair))
    assert found["by_layer"] == [asdict(layer) for layer in layers]
    assert [found[side]["adapter"] for side in ("first", "second")] == list(pair)


def test_configs_are_compared(client: httpx.Client) -> None:
    """Fields that differ come with both values, and null where a config has none."""
    for more in ({}, {"revision": "main"}):
        assert upload(client, TENANT, "configs", {**CONFIG, **more}).status_code == 201
    found = client.get(_path("configs@1", "compare"), params={"with": "configs@2"}).json()
    assert found["config"] == {"revision": [None, "main"]}
    assert found["by_layer"][0]["keys"] == {"max_absolute": 0.0, "relative": 0.0, "cosine": 1.0}


def test_other_shapes_are_refused(client: httpx.Client) -> None:
    """The error names both shapes."""
    answer = client.get(_path("llama-n20-emb", "compare"), params={"with": "gpt2-n20-proj-trainstate@1"})
    detail = problem(answer, 422, "invalid-request")["detail"]
    assert "3 layers of 2 heads, 20 tokens and head size 8 and 3 layers of 4 heads" in detail


@pytest.mark.parametrize(
    ("parameters", "status"),
    [({}, 422), ({"with": "../x"}, 422), ({"with": "none"}, 404), ({"with": "llama-n20-emb", "also": "x"}, 422)],
)
def test_a_reference_that_cannot_be_compared(client: httpx.Client, parameters: dict[str, Any], status: int) -> None:
    """The other version must be named, by a reference of the tenant."""
    problem(client.get(_path("llama-n20-emb", "compare"), params=parameters), status)


@pytest.mark.parametrize("what", ["statistics", "compare?with=llama-n20-emb@1"])
def test_caches_can_keep_the_answer(client: httpx.Client, what: str) -> None:
    """A comparison of two numbers can be cached for ever; one of names is revalidated, and is 304 if it is the same."""
    fixed, moving = (client.get(_path(reference, what)) for reference in ("llama-n20-emb@1", "llama-n20-emb"))
    assert fixed.headers["cache-control"].endswith("immutable")
    assert moving.headers["cache-control"] == "private, no-cache"
    assert moving.headers["prefix-version"] == "1"
    again = client.get(moving.request.url, headers={"If-None-Match": moving.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")

"""`POST /v1/prefixes` answers rows with different adapters, lengths and tenants, none, or several prefixes."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.api.helpers import (
    CONFIG,
    MEDIA_TYPE,
    Tensors,
    about_of,
    adapter_of,
    assert_same,
    problem,
    tensors_of,
    upload,
    upload_directory,
)
from tests.conftest import Server, running_server
from tests.processes import eventually

PATH = "/v1/prefixes"
ROWS: list[Any] = ["mixa/three", None, "mixb/five@1", ["mixa/three@1", "mixb/five"], "mixb/two@prod", "mixa/three"]
LENGTHS = [3, 0, 5, 8, 2, 3]
MASK = [[1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
POSITIONS = [[3, 4, 5], [0, 0, 1], [5, 6, 6], [8, 8, 8], [2, 2, 2], [3, 3, 3]]


def _publish(client: httpx.Client, tenant: str, adapter: str, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    flat = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    made = upload(client, tenant, adapter, CONFIG | {"num_virtual_tokens": tokens}, save({"prompt_embeddings": flat}))
    assert made.status_code in (200, 201), made.text


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client, and publishes adapters of two tenants."""
    client = server.client()
    for tenant, adapter, tokens in (("mixa", "three", 3), ("mixb", "five", 5), ("mixb", "two", 2)):
        _publish(client, tenant, adapter, tokens)
    _publish(client, "mixa", "half", 4, torch.bfloat16)
    client.put("/v1/tenants/mixb/adapters/two/aliases/prod", json={"version": 1})
    upload(client, "mixb", "wide", CONFIG | {"token_dim": 16}, save({"prompt_embeddings": torch.zeros(3, 64)}))
    upload_directory(client, "mixa", "t5", adapter_of("t5-n20-emb"))
    return client


def _alone(client: httpx.Client, ref: str, **options: Any) -> Tensors:
    tenant, _, reference = ref.partition("/")
    return tensors_of(client.get(f"/v1/tenants/{tenant}/adapters/{reference}/prefix", params=options))


def _expected(client: httpx.Client, rows: Sequence[Any], name: str, axis: int, **options: Any) -> Tensor:
    """Returns what each row would get alone, padded on the left with zeros; `axis` counts tokens in a row's tensor."""
    parts = [
        [_alone(client, ref, **options)[name] for ref in (row if isinstance(row, list) else [row] if row else [])]
        for row in rows
    ]
    empty = next(part for row in parts for part in row).narrow(axis, 0, 0)
    joined = [torch.cat([empty, *row], axis) for row in parts]
    longest = max(row.shape[axis] for row in joined)
    padded = []
    for tensor in joined:
        shape = list(tensor.shape)
        shape[axis] = longest - shape[axis]
        padded.append(torch.cat([torch.zeros(shape, dtype=tensor.dtype), tensor], axis))
    return torch.cat(padded)


def _prefix_mask() -> Tensor:
    return torch.tensor([[0] * (8 - length) + [1] * length for length in LENGTHS])


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_each_row_is_what_it_would_get_alone(client: httpx.Client, dtype: str | None) -> None:
    """Keys and values are those of `GET`, bit for bit, after zeros, where the mask is 0."""
    options = {} if dtype is None else {"dtype": dtype}
    found = tensors_of(client.post(PATH, json={"rows": ROWS, **options}))
    assert found.keys() == {"attention_mask", *(f"past_key_values.{n}.{k}" for n in (0, 1) for k in ("key", "value"))}
    for name in found.keys() - {"attention_mask"}:
        assert_same(found[name], _expected(client, ROWS, name, 2, **options))
    assert_same(found["attention_mask"], _prefix_mask())


def test_stacked(client: httpx.Client) -> None:
    """`layout=stacked` is one tensor `[B, L', 2, H', N, D]`."""
    found = tensors_of(client.post(PATH, json={"rows": ROWS, "layout": "stacked"}))
    assert found.keys() == {"attention_mask", "past_key_values"}
    assert_same(found["past_key_values"], _expected(client, ROWS, "past_key_values", 4, layout="stacked"))


def test_ranges(client: httpx.Client) -> None:
    """`layers` and `kv_heads` are applied before the layout; layers keep their number."""
    options = {"layers": "1:2", "kv_heads": "1:2", "dtype": "bfloat16"}
    answer = client.post(PATH, json={"rows": ROWS, **options})
    found = tensors_of(answer)
    assert found.keys() == {"attention_mask", "past_key_values.1.key", "past_key_values.1.value"}
    assert_same(found["past_key_values.1.key"], _expected(client, ROWS, "past_key_values.1.key", 2, **options))
    assert about_of(answer.content)["layers"] == [1, 2]
    assert about_of(answer.content)["kv_heads"] == [1, 2]


@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_float8_has_the_scales_of_each_token(client: httpx.Client, layout: str) -> None:
    """Each prefix keeps its scales, so its bits are those of `GET`, even after another one in its row."""
    name = "past_key_values" if layout == "stacked" else "past_key_values.1.value"
    axis = 4 if layout == "stacked" else 2
    options = {"dtype": "float8_e4m3fn", "layout": layout}
    found = tensors_of(client.post(PATH, json={"rows": ROWS, **options}))
    expected = []
    for row in ROWS:
        for ref in row if isinstance(row, list) else [row] if row else []:
            alone = _alone(client, ref, **options)
            expected.append((alone[name].to(torch.float32) * alone[f"{name}_scale"]).movedim(axis, 0))
    decoded = found[name].to(torch.float32) * found[f"{name}_scale"]
    assert found[name].dtype == torch.float8_e4m3fn
    assert found[f"{name}_scale"].shape == (*found[name].shape[:-1], 1)
    visible = found["attention_mask"].bool()
    # (B, …, N, D) -> (tokens of all rows, …, D), as the prefixes are in the rows
    tokens = decoded.movedim(axis, 1)[visible]
    assert_same(tokens, torch.cat([part[:, 0] for part in expected]))
    assert not decoded.movedim(axis, 1)[~visible].any()


@pytest.mark.parametrize(("key", "value"), list(permutations(["float32", "float16", "bfloat16", "float8_e4m3fn"], 2)))
def test_keys_and_values_in_two_dtypes(client: httpx.Client, key: str, value: str) -> None:
    """Each half has the bits that the same batch has in its dtype alone."""
    options = {"rows": ROWS, "layers": "1:2", "kv_heads": "0:1"}
    answer = client.post(PATH, json={**options, "key_dtype": key, "value_dtype": value})
    found = tensors_of(answer)
    for dtype, part in ((key, ".key"), (value, ".value")):
        alone = tensors_of(client.post(PATH, json={**options, "dtype": dtype}))
        names = {name for name in alone if part in name}
        assert names == {name for name in found if part in name}
        for name in names:
            assert_same(found[name], alone[name])
    assert about_of(answer.content)["dtype"] is None
    refused = client.post(PATH, json={**options, "key_dtype": key, "value_dtype": value, "layout": "stacked"})
    assert f"keys would be {key} and values {value}" in problem(refused, 422, "invalid-request")["detail"]


def test_both_dtypes_are_required_where_stored_ones_differ(client: httpx.Client) -> None:
    """One of them leaves the other one open."""
    rows = ["mixa/three", "mixa/half"]
    assert (
        "say in dtype"
        in problem(client.post(PATH, json={"rows": rows, "key_dtype": "float16"}), 422, "invalid-request")["detail"]
    )
    both = client.post(PATH, json={"rows": rows, "key_dtype": "float16", "value_dtype": "float32"})
    assert about_of(both.content)["key_dtype"] == "float16"


@pytest.mark.parametrize("mask_dtype", [None, "int64", "float32", "bool"])
def test_masks_and_positions(client: httpx.Client, mask_dtype: str | None) -> None:
    """The input's mask follows that of the prefixes, and positions begin after the row's own prefix."""
    options = {} if mask_dtype is None else {"mask_dtype": mask_dtype}
    found = tensors_of(client.post(PATH, json={"rows": ROWS, "attention_mask": MASK, **options}))
    dtype = getattr(torch, mask_dtype or "int64")
    assert_same(found["attention_mask"], torch.cat([_prefix_mask(), torch.tensor(MASK)], 1).to(dtype))
    assert_same(found["position_ids"], torch.tensor(POSITIONS))
    alone = tensors_of(client.post(PATH, json={"rows": ROWS, **options}))
    assert_same(alone["attention_mask"], _prefix_mask().to(dtype))
    assert "position_ids" not in alone


def test_metadata_tells_the_rows(client: httpx.Client) -> None:
    """`rows` has each row as it was asked for, with its version; null and lists stay what they are."""
    answer = client.post(PATH, json={"rows": ROWS, "dtype": "float32"})
    about = about_of(answer.content)
    digests = {
        name: client.get(f"/v1/tenants/{name.replace('/', '/adapters/')}").json()["digest"]
        for name in ("mixa/three", "mixb/five", "mixb/two")
    }

    def told(ref: str, tokens: int) -> dict[str, Any]:
        return {"ref": ref, "version": 1, "digest": digests[ref.partition("@")[0]], "num_virtual_tokens": tokens}

    assert about.pop("rows") == [
        told("mixa/three", 3),
        None,
        told("mixb/five@1", 5),
        [told("mixa/three@1", 3), told("mixb/five", 5)],
        told("mixb/two@prod", 2),
        told("mixa/three", 3),
    ]
    assert about == {
        "format": 1,
        "num_virtual_tokens": 8,
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
        "dtype": "float32",
        "batch_size": 6,
        "layers": [0, 2],
        "kv_heads": [0, 2],
        "layout": "layers",
        "expand": True,
    }


def test_headers(client: httpx.Client) -> None:
    """A mixed batch is not cached, and has the headers of every answer but none of a single version."""
    headers = client.post(PATH, json={"rows": ROWS}).headers
    assert headers["content-type"] == MEDIA_TYPE
    assert headers["cache-control"] == "no-store"
    assert [name for name in headers if name.startswith("prefix-")] == ["prefix-catalog"]
    assert not {"etag", "accept-ranges"} & set(headers)


def test_a_single_row_is_as_that_prefix(client: httpx.Client) -> None:
    """A batch of one row, or of a list of one, equals that prefix."""
    for row in ("mixb/five", ["mixb/five"]):
        found = tensors_of(client.post(PATH, json={"rows": [row]}))
        alone = _alone(client, "mixb/five")
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for name, tensor in alone.items()
        }


def test_stored_dtypes_that_differ(client: httpx.Client) -> None:
    """Rows of different stored dtypes need `dtype`, and the error names the row that differs."""
    rows = [None, "mixa/three", "mixa/half"]
    said = problem(client.post(PATH, json={"rows": rows}), 422, "invalid-request")["detail"]
    assert said.startswith("row 2: mixa/half is stored as bfloat16, but row 1: mixa/three as float32")
    assert tensors_of(client.post(PATH, json={"rows": rows, "dtype": "float16"}))
    half = tensors_of(client.post(PATH, json={"rows": ["mixa/half", None]}))
    assert half["past_key_values.0.key"].dtype == torch.bfloat16


def test_rows_that_do_not_agree(client: httpx.Client) -> None:
    """Layers, heads, head size and kind of model must agree; the error names the first row that differs."""
    for other in ("mixb/wide", "mixa/t5"):
        rows = [None, "mixa/three", ["mixb/five", other], other]
        said = problem(client.post(PATH, json={"rows": rows, "dtype": "float32"}), 422, "invalid-request")["detail"]
        assert said.startswith(f"row 2: {other} has ")
        assert "but row 1: mixa/three has 2 layers and 2 key/value heads of size 4" in said


def test_encoder_decoder_rows_have_no_positions(client: httpx.Client) -> None:
    """An encoder-decoder's answer has no positions, because its decoder computes them."""
    found = tensors_of(client.post(PATH, json={"rows": ["mixa/t5", None], "attention_mask": [[1], [1]]}))
    assert "position_ids" not in found
    assert found["attention_mask"].shape == (2, 21)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"rows": [None, None]}, "no row has a prefix"),
        ({"rows": []}, "rows"),
        ({}, "rows"),
        ({"rows": ["mixa/three", []]}, "rows.1"),
        ({"rows": ["mixa/three", 7]}, "rows.1"),
        ({"rows": ["mixa/three", ["mixa/three"] * 33]}, "rows.1"),
        ({"rows": ["mixa/three", "three"]}, "row 1: 'three' names no tenant"),
        ({"rows": ["mixa/three", ["mixa/three", "mixa/Three"]]}, "row 1: adapter 'Three' is not a name"),
        ({"rows": ["mixa/three"], "expand": False}, "expand=false is for one adapter"),
        ({"rows": ["mixa/three"], "batch_size": 2}, "batch_size is 2, and there are 1 rows"),
        ({"rows": ["mixa/three"] * 257}, "a batch has at most 256 rows, got 257"),
        ({"rows": [7] * 257}, "a batch has at most 256 rows, got 257"),  # counted before pydantic reads them
        ({"rows": ["mixa/three"], "attention_mask": [[1], [1]]}, "attention_mask has 2 rows, and the batch has 1"),
        ({"rows": ["mixa/three"], "attention_mask": [[2]]}, "attention_mask row 0 holds 2"),
        ({"rows": ["mixa/three"], "layers": "1:3"}, "layers must be a range within 0:2, got 1:3"),
        ({"rows": ["mixa/three"], "kv_heads": "2:2"}, "kv_heads must be a range within 0:2, got 2:2"),
        ({"rows": ["mixa/three"], "dtype": "int8"}, "dtype"),
        ({"rows": ["mixa/three"], "row": 1}, "row"),
    ],
)
def test_what_is_refused(client: httpx.Client, body: dict[str, Any], said: str) -> None:
    """A 422 names the value or the row that is wrong."""
    assert said in problem(client.post(PATH, json=body), 422)["detail"]


@pytest.mark.parametrize(
    "ref", ["mixa/none", "mixa/three@9", "mixa/three@prod", "none/three", "mixa/three@sha256:" + 64 * "0"]
)
def test_a_row_that_is_missing(client: httpx.Client, ref: str) -> None:
    """A 404 has the row's index."""
    for row in (ref, ["mixa/three", ref]):
        said = problem(client.post(PATH, json={"rows": ["mixb/two", None, row]}), 404, "not-found")["detail"]
        assert said.startswith("row 2: there is no ")


def test_a_tenant_reads_its_own_rows_alone(server: Server, client: httpx.Client) -> None:
    """Another tenant's row is 404 like a missing one; a platform key of scope `read` reads all."""
    own = server.client(server.key("read", "mixa"))
    assert tensors_of(own.post(PATH, json={"rows": ["mixa/three", None]}))
    for name in ("five", "none"):
        ref = f"mixb/{name}@1"
        for row in (ref, ["mixa/three", ref]):
            answer = own.post(PATH, json={"rows": ["mixa/three", row]})
            assert problem(answer, 404, "not-found")["detail"] == f"row 1: there is no {ref}"
    fleet = server.client(server.key("read"))
    assert tensors_of(fleet.post(PATH, json={"rows": ROWS}))
    problem(server.client("").post(PATH, json={"rows": ROWS}), 401, "unauthenticated")


def test_bodies_and_answers_of_another_kind(client: httpx.Client) -> None:
    """The route takes JSON, answers safetensors, and refuses other media types and methods."""
    problem(client.post(PATH, content=b"x", headers={"Content-Type": MEDIA_TYPE}), 415, "unsupported-media-type")
    problem(client.post(PATH, json={"rows": ROWS}, headers={"Accept": "application/json"}), 406, "not-acceptable")
    problem(client.get(PATH), 405, "method-not-allowed")


def test_every_row_of_a_large_batch(client: httpx.Client) -> None:
    """256 rows of tensors that are sent in pieces equal 256 single requests."""
    rows = (ROWS * 43)[:256]
    found = tensors_of(client.post(PATH, json={"rows": rows}))
    assert_same(
        found["past_key_values.1.key"], _expected(client, ROWS, "past_key_values.1.key", 2).repeat(43, 1, 1, 1)[:256]
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Yields a service whose memory has room for one rendering of 512 KiB in a request, not for two."""
    with running_server(
        tmp_path_factory.mktemp("small") / "data", environment={"PREFIX_RENDERING_BYTES": str(1900 << 10)}
    ) as running:
        yield running


def test_rows_that_do_not_fit_memory_together(small: Server) -> None:
    """Rows that do not fit together are a 507; each alone is served, and a batch of one version."""
    client = small.client()
    for adapter in ("a", "b"):
        config = CONFIG | {"num_virtual_tokens": 64, "num_layers": 64, "token_dim": 16}
        flat = torch.randn(64, 64 * 2 * 16)
        assert upload(client, "t", adapter, config, save({"prompt_embeddings": flat})).status_code == 201
    said = problem(client.post(PATH, json={"rows": ["t/a", "t/b"]}), 507, "out-of-space")["detail"]
    assert said == (
        "1048576 bytes are needed in memory, and one request may hold 972800: ask for less, or raise "
        "PREFIX_RENDERING_BYTES (the limit is half of it)"
    )
    for rows in (["t/a", "t/a", None, ["t/a", "t/a"]], ["t/b"]):
        assert client.post(PATH, json={"rows": rows}).status_code == 200


@pytest.mark.one_process("replicas divide a tenant's rate")
def test_a_platform_key_charges_the_tenants_of_the_rows(client: httpx.Client) -> None:
    """A request charges each tenant of its rows once, and gets 429 above a rate."""
    _publish(client, "mixslow", "a", 2)
    client.put("/v1/tenants/mixslow", json={"requests_per_second": 1})

    def status() -> int:
        return client.post(PATH, json={"rows": ["mixslow/a"] * 9}).status_code

    assert status() == 200
    eventually(lambda: status() == 429)  # as soon as this machine sends two within a second
    client.put("/v1/tenants/mixslow", json={"requests_per_second": None})


def test_it_is_counted(client: httpx.Client) -> None:
    """The metrics have the route of mixed batches."""
    client.post(PATH, json={"rows": ROWS})
    assert 'route="/v1/prefixes"' in client.get("/metrics").text

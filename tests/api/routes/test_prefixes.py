"""`GET …/prefix` answers every option with the values that PEFT computed for the corpus."""

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.api.helpers import (
    about_of,
    adapter_of,
    assert_same,
    expected_of,
    problem,
    tensors_of,
    upload_directory,
)
from tests.conftest import Server, running_server

TENANT = "prefixes"
LLAMA, BF16, T5, MLP = "llama-n20-emb", "llama-n20-emb-stored_bf16-on_fp32", "t5-n20-emb", "gpt2-n20-proj-trainstate"
PREFIX = f"/v1/tenants/{TENANT}/adapters/llama/prefix"
LAYERS, HEADS, TOKENS, DIM = 3, 2, 20, 8


@pytest.fixture(scope="module")
def versions(server: Server) -> dict[str, dict[str, Any]]:
    """Publishes four adapters of the corpus."""
    client = server.client()
    cases = {"llama": LLAMA, "bf16": BF16, "t5": T5, "mlp": MLP}
    return {name: upload_directory(client, TENANT, name, adapter_of(case)) for name, case in cases.items()}


@pytest.fixture(scope="module")
def client(server: Server, versions: dict[str, dict[str, Any]]) -> httpx.Client:
    """Returns a platform admin's client, once the four adapters are published."""
    assert versions
    return server.client()


def _stacked(case: str) -> torch.Tensor:
    """Returns PEFT's keys and values of a case as one tensor, `[1, L, 2, H, N, D]`."""
    found = expected_of(case)
    layers = [torch.stack([found[f"b1.layers.{i}.{part}"] for part in ("key", "value")], 1) for i in range(LAYERS)]
    return torch.stack(layers, 1)


def test_defaults(client: httpx.Client) -> None:
    """By default an answer has one row, the stored dtype, one key and one value a layer, and an int64 mask of ones."""
    tensors, expected = tensors_of(client.get(PREFIX)), expected_of(LLAMA)
    names = {f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")}
    assert tensors.keys() == names | {"attention_mask"}
    for name in names:
        assert_same(tensors[name], expected[name.replace("past_key_values", "b1.layers")])
    assert_same(tensors["attention_mask"], torch.ones(1, TOKENS, dtype=torch.int64))


@pytest.mark.parametrize("rows", [1, 2, 3, 256])
@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_batch_size(client: httpx.Client, rows: int, layout: str) -> None:
    """Every row of a batch is the same prefix."""
    tensors = tensors_of(client.get(PREFIX, params={"batch_size": rows, "layout": layout}))
    whole = _stacked(LLAMA)
    assert_same(tensors.pop("attention_mask"), torch.ones(rows, TOKENS, dtype=torch.int64))
    if layout == "stacked":
        assert_same(tensors.pop("past_key_values"), whole.expand(rows, -1, -1, -1, -1, -1))
    for name, tensor in tensors.items():
        _, layer, part = name.split(".")
        assert_same(tensor, whole[:, int(layer), ["key", "value"].index(part)].expand(rows, -1, -1, -1))


@pytest.mark.parametrize("case", [LLAMA, BF16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype(client: httpx.Client, case: str, dtype: str) -> None:
    """The cast is torch's own, from the exact values."""
    path = PREFIX if case == LLAMA else PREFIX.replace("llama", "bf16")
    tensors = tensors_of(client.get(path, params={"dtype": dtype, "layout": "stacked"}))
    assert_same(tensors["past_key_values"], _stacked(case).to(getattr(torch, dtype)))


def test_dtype_defaults_to_that_of_the_stored_weights(client: httpx.Client) -> None:
    """A bf16 file is served as bf16, even if an MLP made the values."""
    answer = client.get(PREFIX.replace("llama", "bf16"), params={"layout": "stacked"})
    assert about_of(answer.content)["dtype"] == "bfloat16"
    assert_same(tensors_of(answer)["past_key_values"], _stacked(BF16).to(torch.bfloat16))


DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")


@pytest.mark.parametrize(("case", "heads"), [("llama", "0:2"), ("bf16", "1:2"), ("t5", "0:4"), ("mlp", "0:1")])
def test_keys_and_values_in_two_dtypes(client: httpx.Client, case: str, heads: str) -> None:
    """Each half is torch's own cast, as it is alone, for any layers, heads and rows; float8 has its scales."""
    path = PREFIX.replace("llama", case)
    options: dict[str, Any] = {"layers": "1:3", "kv_heads": heads, "batch_size": 2}
    exact = tensors_of(client.get(path, params={**options, "dtype": "float32"}))
    alone = {dtype: tensors_of(client.get(path, params={**options, "dtype": dtype})) for dtype in DTYPES}
    for key, value in permutations(DTYPES, 2):
        answer = client.get(path, params={**options, "key_dtype": key, "value_dtype": value})
        about, tensors = about_of(answer.content), tensors_of(answer)
        assert (about["dtype"], about["key_dtype"], about["value_dtype"]) == (None, key, value)
        assert_same(tensors.pop("attention_mask"), alone[key]["attention_mask"])
        names = {name for name in alone[key] if ".key" in name} | {name for name in alone[value] if ".value" in name}
        assert tensors.keys() == names
        for name, tensor in tensors.items():
            dtype = key if ".key" in name else value
            assert_same(tensor, alone[dtype][name])
            if dtype != "float8_e4m3fn":
                assert_same(tensor, exact[name].to(getattr(torch, dtype)))
            elif not name.endswith("_scale"):
                assert_same(tensor, (exact[name] / tensors[f"{name}_scale"]).to(torch.float8_e4m3fn))


def test_each_dtype_falls_back_to_dtype(client: httpx.Client) -> None:
    """`key_dtype` and `value_dtype` fall back to `dtype`, and that to the stored one; two names mean one answer."""

    def about(**options: Any) -> tuple[str | None, str | None, str | None]:
        answer = client.get(PREFIX, params=options)
        found = about_of(answer.content)
        assert answer.headers["etag"] not in seen or seen[answer.headers["etag"]] == answer.content
        seen[answer.headers["etag"]] = answer.content
        return found["dtype"], found.get("key_dtype"), found.get("value_dtype")

    seen: dict[str, bytes] = {}
    assert about() == ("float32", None, None)
    assert about(key_dtype="float16") == (None, "float16", "float32")
    assert about(value_dtype="float16") == (None, "float32", "float16")
    assert about(dtype="float16", value_dtype="bfloat16") == (None, "float16", "bfloat16")
    assert about(key_dtype="float16", value_dtype="bfloat16") == (None, "float16", "bfloat16")
    assert about(dtype="float16", key_dtype="float32", value_dtype="float32") == ("float32", None, None)
    assert len(seen) == 4, "equal pairs have equal entity tags"


def test_two_dtypes_are_not_stacked(client: httpx.Client) -> None:
    """One tensor has one dtype: the error says which two it would have."""
    refused = client.get(PREFIX, params={"layout": "stacked", "key_dtype": "float16"})
    assert "keys would be float16 and values float32" in problem(refused, 422, "invalid-request")["detail"]
    answer = client.get(PREFIX, params={"layout": "stacked", "key_dtype": "float16", "value_dtype": "float16"})
    assert_same(tensors_of(answer)["past_key_values"], _stacked(LLAMA).to(torch.float16))


@pytest.mark.parametrize("rows", [1, 3])
def test_float8_layers(client: httpx.Client, rows: int) -> None:
    """float8 comes with one float32 scale a layer, part and head; their product is within half a step."""
    tensors, exact = (
        tensors_of(client.get(PREFIX, params={"dtype": "float8_e4m3fn", "batch_size": rows})),
        _stacked(LLAMA),
    )
    for layer in range(LAYERS):
        for index, part in enumerate(("key", "value")):
            value, scale = (tensors.pop(f"past_key_values.{layer}.{part}{end}") for end in ("", "_scale"))
            assert value.dtype == torch.float8_e4m3fn
            assert value.shape == (rows, HEADS, TOKENS, DIM)
            assert scale.dtype == torch.float32
            assert scale.shape == (1, HEADS, 1, 1)
            wanted = exact[:, layer, index]
            torch.testing.assert_close(scale, wanted.abs().amax((2, 3), keepdim=True) / 448, rtol=1e-6, atol=0)
            found = value.to(torch.float32) * scale
            assert bool(((found - wanted).abs() <= wanted.abs() / 16 + scale / 512).all())
    assert tensors.keys() == {"attention_mask"}


def test_float8_stacked(client: httpx.Client) -> None:
    """The stacked layout carries the same bits, and its scales in the same shape."""
    stacked = tensors_of(client.get(PREFIX, params={"dtype": "float8_e4m3fn", "layout": "stacked"}))
    layers = tensors_of(client.get(PREFIX, params={"dtype": "float8_e4m3fn"}))
    assert stacked["past_key_values_scale"].shape == (1, LAYERS, 2, HEADS, 1, 1)
    for layer in range(LAYERS):
        for index, part in enumerate(("key", "value")):
            assert_same(stacked["past_key_values"][:, layer, index], layers[f"past_key_values.{layer}.{part}"])
            assert_same(
                stacked["past_key_values_scale"][:, layer, index], layers[f"past_key_values.{layer}.{part}_scale"]
            )


@pytest.mark.parametrize(
    ("layers", "heads"), [("1:2", None), ("1:3", "1:2"), ("0:3", "0:2"), ("2:3", "0:1"), (None, "1:2"), ("00:01", None)]
)
@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_ranges_of_layers_and_heads(client: httpx.Client, layers: str | None, heads: str | None, layout: str) -> None:
    """Half-open ranges are cut before the layout, and layers keep the model's numbers."""
    options = {name: value for name, value in (("layers", layers), ("kv_heads", heads)) if value is not None}
    answer = client.get(PREFIX, params={**options, "layout": layout, "batch_size": 2})
    tensors, about = tensors_of(answer), about_of(answer.content)
    first, last = (int(n) for n in (layers or f"0:{LAYERS}").split(":"))
    low, high = (int(n) for n in (heads or f"0:{HEADS}").split(":"))
    assert (about["layers"], about["kv_heads"]) == ([first, last], [low, high])
    assert (about["num_layers"], about["num_kv_heads"]) == (LAYERS, HEADS)
    wanted = _stacked(LLAMA)[:, first:last, :, low:high].expand(2, -1, -1, -1, -1, -1)
    if layout == "stacked":
        assert_same(tensors["past_key_values"], wanted)
    else:
        numbers = {int(name.split(".")[1]) for name in tensors if name != "attention_mask"}
        assert numbers == set(range(first, last))
        for layer in numbers:
            assert_same(tensors[f"past_key_values.{layer}.value"], wanted[:, layer - first, 1])


@pytest.mark.parametrize(("tp", "heads"), [("0/1", "0:2"), ("1/2", "1:2"), ("1/4", "0:1"), ("3/4", "1:2")])
def test_the_heads_of_a_rank(client: httpx.Client, tp: str, heads: str) -> None:
    """`tp=rank/size` is answered like the range that it means, with the same entity tag."""
    by_rank, by_range = (client.get(PREFIX, params=params) for params in ({"tp": tp}, {"kv_heads": heads}))
    assert by_rank.headers["etag"] == by_range.headers["etag"]
    assert by_rank.content == by_range.content


@pytest.mark.parametrize("dtype", ["int64", "float32", "bool"])
def test_mask_dtype(client: httpx.Client, dtype: str) -> None:
    """The mask has the requested dtype."""
    tensors = tensors_of(client.get(PREFIX, params={"mask_dtype": dtype, "batch_size": 2}))
    assert_same(tensors["attention_mask"], torch.ones(2, TOKENS, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_expand_false_sends_one_row_and_all_masks(client: httpx.Client, layout: str) -> None:
    """With expand=false keys and values have one row, and masks still have `batch_size` rows."""
    answer = client.get(PREFIX, params={"batch_size": 5, "expand": "false", "layout": layout})
    tensors, about = tensors_of(answer), about_of(answer.content)
    assert tensors.pop("attention_mask").shape == (5, TOKENS)
    assert {tensor.shape[0] for tensor in tensors.values()} == {1}
    assert (about["batch_size"], about["expand"]) == (5, False)


def test_metadata(client: httpx.Client, versions: dict[str, dict[str, Any]]) -> None:
    """`__metadata__` has one key, `prefix`: canonical JSON of the version and the form of the answer."""
    options: dict[str, Any] = {
        "batch_size": 2,
        "dtype": "float16",
        "layout": "stacked",
        "layers": "1:3",
        "kv_heads": "0:1",
    }
    config = json.loads((adapter_of(LLAMA) / "adapter_config.json").read_text())
    assert about_of(client.get(PREFIX, params=options).content) == {
        "format": 1,
        "tenant": TENANT,
        "adapter": "llama",
        "version": 1,
        "digest": versions["llama"]["digest"],
        "peft_type": "PREFIX_TUNING",
        "base_model_name_or_path": config["base_model_name_or_path"],
        "num_virtual_tokens": TOKENS,
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "dtype": "float16",
        "batch_size": 2,
        "layers": [1, 3],
        "kv_heads": [0, 1],
        "layout": "stacked",
        "expand": True,
    }


def test_tensors_are_aligned(client: httpx.Client) -> None:
    """The data begins at a multiple of 64, so that a reader can map tensors in place."""
    body = client.get(PREFIX, params={"mask_dtype": "bool", "dtype": "float16"}).content
    assert (8 + int.from_bytes(body[:8], "little")) % 64 == 0


def test_encoder_decoder(client: httpx.Client) -> None:
    """Decoder layer i has the pair that PEFT gives it, and the mask is the decoder's."""
    tensors, expected = tensors_of(client.get(PREFIX.replace("llama", "t5"))), expected_of(T5)
    for layer in range(3):
        for part in ("key", "value"):
            assert_same(tensors[f"past_key_values.{layer}.{part}"], expected[f"b1.layers.{layer}.{part}"])
    assert tensors.keys() == {
        "attention_mask",
        *(f"past_key_values.{i}.{p}" for i in range(3) for p in ("key", "value")),
    }


@pytest.mark.parametrize(
    "options",
    [
        "dtype=float64",
        "dtype=int8",
        "dtype=",
        "layout=rows",
        "layers=0:4",
        "layers=2:2",
        "layers=2:1",
        "layers=1",
        "layers=:2",
        "layers=-1:2",
        "layers=0:99999999",
        "layers=a:b",
        "kv_heads=0:3",
        "kv_heads=1:1",
        "kv_heads=0:1,1:2",
        "tp=2/2",
        "tp=0/3",
        "tp=0/0",
        "tp=0:2",
        "tp=-1/2",
        "tp=0/2&kv_heads=0:1",
        "mask_dtype=float16",
        "expand=maybe",
        "batch_size=0",
        "batch_size=257",
        "unknown=1",
        "Batch_size=2",
    ],
)
def test_options_out_of_bounds(client: httpx.Client, options: str) -> None:
    """A 422 names the option that is malformed, unknown or out of bounds."""
    answer = problem(client.get(f"{PREFIX}?{options}"), 422, "invalid-request")
    assert options.partition("=")[0] in answer["detail"]


@pytest.mark.parametrize("ref", ["llama@2", "llama@prod", "none", "none@1", "llama@sha256:" + "0" * 64])
def test_missing_references(client: httpx.Client, ref: str) -> None:
    """A version, alias, digest or adapter that does not exist is a 404."""
    problem(client.get(f"/v1/tenants/{TENANT}/adapters/{ref}/prefix"), 404, "not-found")


@pytest.mark.parametrize("ref", ["llama@01", "llama@", "llama@@1", "llama@sha256:abc", "Llama", "llama@La", "a@b@c"])
def test_malformed_references(client: httpx.Client, ref: str) -> None:
    """Text that cannot be a reference is a 422."""
    problem(client.get(f"/v1/tenants/{TENANT}/adapters/{ref}/prefix"), 422, "invalid-reference")


def test_every_way_to_name_a_version(client: httpx.Client, versions: dict[str, dict[str, Any]]) -> None:
    """Name, number, digest, `latest` and alias give the same bytes; `@` and `:` raw or percent-encoded."""
    digest = versions["llama"]["digest"]
    assert client.put(f"/v1/tenants/{TENANT}/adapters/llama/aliases/prod", json={"version": 1}).status_code == 201
    selectors = ["", "@1", "@latest", "@prod", f"@{digest}", "%401", f"%40{digest.replace(':', '%3A')}", "%40prod"]
    bodies = {client.get(f"/v1/tenants/{TENANT}/adapters/llama{s}/prefix").content for s in selectors}
    assert len(bodies) == 1
    assert client.delete(f"/v1/tenants/{TENANT}/adapters/llama/aliases/prod").status_code == 204


def test_bytes_from_an_mlp_survive_a_restart_with_other_threads(tmp_path: Path) -> None:
    """The encoder runs once in a version's life, so bytes and ETag outlast a restart with other threads."""
    seen = []
    for threads in ("1", "2"):
        with running_server(tmp_path / "data", environment={"OMP_NUM_THREADS": threads}) as server:
            client = server.client()
            if threads == "1":
                upload_directory(client, "acme", "mlp", adapter_of(MLP))
            answers = [client.get("/v1/tenants/acme/adapters/mlp/prefix", params={"batch_size": n}) for n in (1, 3)]
            seen.append([(answer.content, answer.headers["etag"]) for answer in answers])
    assert seen[0] == seen[1]
    found, expected = seen[0][0][0], expected_of(MLP)
    tensors = tensors_of(httpx.Response(200, content=found, headers={"content-type": "application/vnd.safetensors"}))
    for layer in range(3):
        wanted = expected[f"b1.layers.{layer}.key"]
        torch.testing.assert_close(tensors[f"past_key_values.{layer}.key"], wanted, rtol=0, atol=1e-5)

"""`POST …/prefix` extends the input's attention mask, and computes the position ids that follow from it."""

from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.api.helpers import (
    MEDIA_TYPE,
    about_of,
    adapter_of,
    assert_same,
    entry,
    expected_of,
    problem,
    safetensors_file,
    tensors_of,
    upload_directory,
)
from tests.conftest import Server

TENANT, TOKENS = "masks", 20
PREFIX = f"/v1/tenants/{TENANT}/adapters/llama/prefix"
MASK = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
# The positions are N + clamp(cumsum(mask) - 1, min=0): left padding, right padding, and a row of nothing.
POSITIONS = [[20, 21, 22, 23], [20, 20, 20, 21], [20, 21, 21, 21], [20, 20, 20, 20]]
MASK_DTYPES = [torch.int64, torch.float32, torch.bool]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client, and publishes two adapters of the corpus."""
    client = server.client()
    upload_directory(client, TENANT, "llama", adapter_of("llama-n20-emb"))
    upload_directory(client, TENANT, "t5", adapter_of("t5-n20-emb"))
    return client


def _post(client: httpx.Client, mask: torch.Tensor, query: str = "", path: str = PREFIX) -> httpx.Response:
    body = save({"attention_mask": mask})
    return client.post(f"{path}{query}", content=body, headers={"Content-Type": MEDIA_TYPE})


def _extended(dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.ones(4, TOKENS), torch.tensor(MASK)], 1).to(dtype)


def test_json_mask(client: httpx.Client) -> None:
    """A mask of integers comes back as int64, with ones for the prefix first, and positions after the prefix."""
    answer = client.post(PREFIX, json={"attention_mask": MASK})
    tensors, expected = tensors_of(answer), expected_of("llama-n20-emb")
    assert_same(tensors["attention_mask"], _extended(torch.int64))
    assert_same(tensors["position_ids"], torch.tensor(POSITIONS))
    wanted = expected["b1.layers.1.value"].expand(4, -1, -1, -1)
    assert_same(tensors["past_key_values.1.value"], wanted)
    assert about_of(answer.content)["batch_size"] == 4


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_safetensors_mask(client: httpx.Client, dtype: torch.dtype) -> None:
    """A mask keeps its dtype unless another is requested; positions are always int64."""
    tensors = tensors_of(_post(client, torch.tensor(MASK).to(dtype)))
    assert_same(tensors["attention_mask"], _extended(dtype))
    assert_same(tensors["position_ids"], torch.tensor(POSITIONS))


@pytest.mark.parametrize("wanted", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_mask_dtype(client: httpx.Client, dtype: torch.dtype, wanted: torch.dtype) -> None:
    """`mask_dtype` converts from every dtype to every other."""
    name = str(wanted).removeprefix("torch.")
    tensors = tensors_of(_post(client, torch.tensor(MASK).to(dtype), f"?mask_dtype={name}"))
    assert_same(tensors["attention_mask"], _extended(wanted))


def test_both_bodies_give_the_same_bytes(client: httpx.Client) -> None:
    """JSON and safetensors are two forms of one request, and all options count in both."""
    options = {"dtype": "float16", "layout": "stacked", "layers": "0:2", "kv_heads": "1:2", "expand": False}
    by_json = client.post(PREFIX, json={"attention_mask": MASK, **options})
    by_tensor = _post(client, torch.tensor(MASK), "?dtype=float16&layout=stacked&layers=0:2&kv_heads=1:2&expand=false")
    assert by_json.content == by_tensor.content
    assert by_json.headers["etag"] == by_tensor.headers["etag"]
    tensors = tensors_of(by_json)
    assert tensors["past_key_values"].shape == (1, 2, 2, 1, TOKENS, 8)
    assert tensors["position_ids"].shape == (4, 4)


def test_json_without_a_mask_is_the_query_in_a_body(client: httpx.Client) -> None:
    """A JSON body takes the query's names and strings, and has the same answer."""
    options: dict[str, Any] = {"batch_size": 2, "dtype": "bfloat16", "layers": "1:2", "mask_dtype": "bool"}
    get, post = client.get(PREFIX, params=options), client.post(PREFIX, json=options)
    assert post.content == get.content
    assert post.headers["etag"] == get.headers["etag"]
    assert client.post(PREFIX, json={}).content == client.get(PREFIX).content


def test_etag_tells_masks_apart(client: httpx.Client) -> None:
    """Two masks of one shape have two entity tags."""
    masks: list[list[list[int]]] = [[[1, 1]], [[0, 1]], [[1, 0]], [[1, 1, 1]]]
    tags = {client.post(PREFIX, json={"attention_mask": mask}).headers["etag"] for mask in masks}
    assert len(tags) == 4


def test_conditions_and_ranges_are_for_reading(client: httpx.Client) -> None:
    """A POST with a condition and a range is answered whole, with the digest of its one rendering."""
    first = client.post(PREFIX, json={"attention_mask": [[1, 1]]})
    headers = {"If-None-Match": first.headers["etag"], "Range": "bytes=0-3"}
    answer = client.post(PREFIX, json={"attention_mask": [[1, 1]]}, headers=headers)
    assert answer.status_code == 200
    assert answer.content == first.content
    assert "repr-digest" in answer.headers


def test_encoder_decoder_has_no_positions(client: httpx.Client) -> None:
    """An encoder-decoder's decoder derives its own positions."""
    tensors = tensors_of(client.post(PREFIX.replace("llama", "t5"), json={"attention_mask": MASK}))
    assert "position_ids" not in tensors
    assert_same(tensors["attention_mask"], _extended(torch.int64))


@pytest.mark.parametrize(
    "mask",
    [
        [],
        [[]],
        [[1], []],
        [[1, 1], [1]],
        [[2]],
        [[-1]],
        [[True]],
        [[1.0]],
        [["1"]],
        [[None]],
        [1, 1],
        [[[1]]],
        "1",
        {"0": [1]},
        [[10**30]],
        [[1]] * 257,
        [[1] * 131_073],
    ],
    ids=lambda mask: str(mask)[:20] + str(len(mask)),
)
def test_json_masks_that_are_none(client: httpx.Client, mask: Any) -> None:
    """A mask has rows of zeros and ones, of one length, within the bounds; anything else is a 422."""
    problem(client.post(PREFIX, json={"attention_mask": mask}), 422, "invalid-request")


@pytest.mark.parametrize(
    "tensors",
    [
        {"attention_mask": torch.tensor([[2]])},
        {"attention_mask": torch.tensor([[-1]])},
        {"attention_mask": torch.tensor([[0.5]])},
        {"attention_mask": torch.tensor([[float("nan")]])},
        {"attention_mask": torch.tensor([1, 1])},
        {"attention_mask": torch.ones(1, 1, 1, dtype=torch.int64)},
        {"attention_mask": torch.ones(1, 1, dtype=torch.int32)},
        {"attention_mask": torch.ones(1, 1, dtype=torch.float16)},
        {"attention_mask": torch.ones(0, 1, dtype=torch.int64)},
        {"attention_mask": torch.ones(1, 0, dtype=torch.int64)},
        {"attention_mask": torch.ones(257, 1, dtype=torch.int64)},
        {"attention_mask": torch.ones(1, 131_073, dtype=torch.int64)},
        {"mask": torch.ones(1, 1, dtype=torch.int64)},
        {"attention_mask": torch.ones(1, 1, dtype=torch.int64), "more": torch.ones(1)},
    ],
    ids=lambda tensors: " ".join(f"{k}{list(t.shape)}{t.dtype}{t.flatten()[:1].tolist()}" for k, t in tensors.items()),
)
def test_tensor_masks_that_are_none(client: httpx.Client, tensors: dict[str, torch.Tensor]) -> None:
    """A body has one tensor `attention_mask` `[batch, seq]` of zeros and ones, in a dtype of masks."""
    answer = client.post(PREFIX, content=save(tensors), headers={"Content-Type": MEDIA_TYPE})
    problem(answer, 422, "invalid-request")


def test_bool_mask_with_bytes_that_are_no_bools(client: httpx.Client) -> None:
    """A byte of 2 in a bool mask is refused."""
    body = safetensors_file({"attention_mask": entry([1, 2], 0, 2, "BOOL")}, b"\x01\x02")
    problem(client.post(PREFIX, content=body, headers={"Content-Type": MEDIA_TYPE}), 422, "invalid-request")


@pytest.mark.parametrize("body", [b"", b"{}", b"\x80\x02N.", b"\xff" * 100], ids=str)
def test_bodies_that_are_no_safetensors(client: httpx.Client, body: bytes) -> None:
    """A body that does not fit its media type is a 422."""
    answer = client.post(PREFIX, content=body, headers={"Content-Type": MEDIA_TYPE})
    problem(answer, 422, "invalid-request")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b'{"dtype": "float32", "dtype": "float16"}', b'{"x": 1}'])
def test_bodies_that_are_no_options(client: httpx.Client, body: bytes) -> None:
    """JSON that is no object, or has duplicate or unknown keys, is 422."""
    answer = client.post(PREFIX, content=body, headers={"Content-Type": "application/json"})
    problem(answer, 422, "invalid-request")


def test_contradictions(client: httpx.Client) -> None:
    """A batch size must equal the mask's rows, and options come from one place."""
    problem(client.post(PREFIX, json={"attention_mask": MASK, "batch_size": 3}), 422, "invalid-request")
    problem(_post(client, torch.tensor(MASK), "?batch_size=5"), 422, "invalid-request")
    problem(client.post(f"{PREFIX}?dtype=float16", json={"attention_mask": MASK}), 422, "invalid-request")
    assert client.post(PREFIX, json={"attention_mask": MASK, "batch_size": 4}).status_code == 200

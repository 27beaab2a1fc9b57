"""Malformed weights are refused with 422, and leave nothing visible behind."""

import json
import pickle
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from tests.api.helpers import (
    CONFIG,
    assert_alive,
    entry,
    peak_memory,
    problem,
    safetensors_file,
    tensors_of,
    upload,
    versions_path,
    weights,
)
from tests.conftest import Server, running_server

TENANT = "hard-weights"
KEPT = "kept"
BYTES = 3 * 32 * 4
SOUND = {"prompt_embeddings": entry([3, 32], 0, BYTES)}
Refused = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Yields a client with a key of the platform's admin, and publishes one version that must survive everything
    here."""
    client = server.client()
    assert upload(client, TENANT, KEPT).status_code == 201
    return client


@pytest.fixture
def refused(server: Server, client: httpx.Client) -> Iterator[Refused]:
    """Uploads weights, and checks that they are refused with 422 and a stable code, leave nothing visible, and the
    service goes on."""
    before = client.get(versions_path(TENANT, KEPT)).json()
    body = client.get(f"/v1/tenants/{TENANT}/adapters/{KEPT}/prefix").content

    def attempt(file: bytes, code: str = "invalid-checkpoint", config: Any = CONFIG) -> dict[str, Any]:
        problem(upload(client, TENANT, KEPT, config, file), 422, code)
        return problem(upload(client, "hard-nobody", "new", config, file), 422, code)

    yield attempt
    assert client.get(versions_path(TENANT, KEPT)).json() == before
    assert client.get(f"/v1/tenants/{TENANT}/adapters/{KEPT}/prefix").content == body
    problem(client.get("/v1/tenants/hard-nobody/adapters/new"), 404, "not-found")
    problem(client.get("/v1/tenants/hard-nobody/adapters"), 404, "not-found")
    assert_alive(server)


def _with_header(header: dict[str, Any] | bytes, data: bytes = b"\0" * BYTES) -> bytes:
    return safetensors_file(header, data)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_shorter_than_eight_bytes(refused: Refused, size: int) -> None:
    """A file too short for a header's length is refused."""
    refused(b"\0" * size)


@pytest.mark.parametrize("length", [BYTES + 1_000, 100_000_000, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_header_length_beyond_the_file(refused: Refused, length: int) -> None:
    """A header that claims more bytes than the file has, up to 2^64-1, is refused before memory is taken for it."""
    refused(safetensors_file(SOUND, b"\0" * BYTES, length))


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe{}",
        b'{"prompt_embeddings": ',
        b"[]",
        b'"text"',
        b"null",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=["not utf-8", "not json", "list", "string", "null", "100,000 lists", "100,000 objects"],
)
def test_header_that_is_no_json_object_or_too_deep(refused: Refused, header: bytes) -> None:
    """A header that is not UTF-8, not a JSON object, or nested 100,000 deep is refused."""
    refused(_with_header(header))


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({"prompt_embeddings": entry([3, 32], 0, BYTES), "score": entry([1], BYTES - 4, BYTES)}, BYTES),
        ({"prompt_embeddings": entry([3, 32], 0, BYTES), "score": entry([3, 32], 0, BYTES)}, BYTES),
        ({"prompt_embeddings": entry([3, 32], 8, BYTES + 8)}, BYTES + 8),
        ({"prompt_embeddings": entry([3, 32], 0, BYTES), "score": entry([1], BYTES + 4, BYTES + 8)}, BYTES + 8),
        (SOUND, BYTES + 1),
        (SOUND, BYTES - 1),
        (SOUND, 0),
    ],
    ids=["overlap", "same bytes twice", "hole in front", "hole between", "trailing", "truncated", "no data"],
)
def test_data_that_overlaps_or_has_holes_or_trails_or_is_cut(
    refused: Refused, tensors: dict[str, Any], size: int
) -> None:
    """Tensors must fill the data exactly, one behind the other."""
    refused(_with_header(tensors, b"\0" * size))


@pytest.mark.parametrize(
    "shape",
    [
        [3, 31],
        [3, 33],
        [1 << 32, 1 << 32],
        [1 << 61, 8],
        [(1 << 64) - 1, 2],
        [10**30],
        [-3, -32],
        [3, 32.0],
        [True, 96],
    ],
    ids=str,
)
def test_shape_that_does_not_match_its_bytes_or_overflows(refused: Refused, shape: list[Any]) -> None:
    """A tensor's byte range must be its shape times its dtype, in numbers that do not overflow."""
    refused(_with_header({"prompt_embeddings": entry(shape, 0, BYTES)}))


@pytest.mark.parametrize(("dtype", "size"), [("F16", BYTES), ("BF16", BYTES), ("F32", BYTES // 2), ("F32", 2 * BYTES)])
def test_bytes_that_do_not_match_shape_and_dtype(refused: Refused, dtype: str, size: int) -> None:
    """The shape that the config requires is refused over a byte range of another size."""
    refused(_with_header({"prompt_embeddings": entry([3, 32], 0, size, dtype)}, b"\0" * size))


@pytest.mark.parametrize(("start", "stop"), [(BYTES, 0), (-BYTES, 0), (0.0, BYTES), (0, 1 << 64), ("0", BYTES)])
def test_offsets_that_are_no_positions(refused: Refused, start: Any, stop: Any) -> None:
    """Byte positions must be integers, in order, inside the file."""
    refused(_with_header({"prompt_embeddings": entry([3, 32], start, stop)}))


class _Explosive:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("a pickle was opened",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_under_the_name_of_safetensors(refused: Refused, server: Server, protocol: int) -> None:
    """A pickle is recognised, never opened, and the answer names the converter (CVE-2025-32434)."""
    answer = refused(pickle.dumps(_Explosive(), protocol), "unsafe-checkpoint")
    assert "prefix-service convert" in answer["detail"]
    assert "a pickle was opened" not in server.logs()


def test_zip_as_torch_writes_it(refused: Refused, tmp_path: Path) -> None:
    """torch.save's zip archive is refused like a bare pickle."""
    torch.save({"prompt_embeddings": torch.zeros(3, 32)}, tmp_path / "adapter_model.bin")
    refused((tmp_path / "adapter_model.bin").read_bytes(), "unsafe-checkpoint")


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_header_length_that_looks_like_a_pickle_is_none(client: httpx.Client, length: int) -> None:
    """A sound file whose header's length begins with a pickle's two magic bytes is accepted."""
    header = json.dumps({"__metadata__": {"about": str(length)}, **SOUND}).encode().ljust(length)
    assert struct.pack("<Q", length)[:1] == b"\x80"
    assert upload(client, TENANT, f"length-{length}", file=_with_header(header)).status_code == 201


@pytest.mark.parametrize(
    "header",
    [
        f'{{"prompt_embeddings":{json.dumps(SOUND["prompt_embeddings"])},'
        f'"prompt_embeddings":{json.dumps(SOUND["prompt_embeddings"])}}}',
        f'{{"prompt_embeddings":{{"dtype":"F32","dtype":"F32","shape":[3,32],"data_offsets":[0,{BYTES}]}}}}',
        f'{{"__metadata__":{{}},"__metadata__":{{}},"prompt_embeddings":{json.dumps(SOUND["prompt_embeddings"])}}}',
    ],
    ids=["tensor", "field", "metadata"],
)
def test_duplicate_keys(refused: Refused, header: str) -> None:
    """A key that stands twice in the header is refused: two readers would disagree on what it means."""
    refused(_with_header(header.encode()))


@pytest.mark.parametrize(
    "name",
    ["", "prompt\0embeddings", "../prompt_embeddings", "x" * (1 << 20), "new\nline", "\ud800"],
    ids=["empty", "NUL", "dots", "megabyte", "line break", "lone surrogate"],
)
def test_hostile_names(refused: Refused, name: str) -> None:
    """A tensor's name has at most 64 Ki characters, all printable, and no `..`, also beside the prefix. A slash is
    allowed: a module may be named so, and no file is ever named after a tensor."""
    refused(
        _with_header(
            {"prompt_embeddings": entry([3, 32], 0, BYTES), name: entry([1], BYTES, BYTES + 4)}, b"\0" * (BYTES + 4)
        )
    )


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ({"prompt_embeddings": entry([0, 32], 0, 0)}, 0),
        ({"prompt_embeddings": entry([3, 0], 0, 0)}, 0),
        ({**SOUND, "score": entry([0], BYTES, BYTES + 4)}, BYTES + 4),
        ({**SOUND, "score": entry([1] * 10_000, BYTES, BYTES + 4)}, BYTES + 4),
        ({"prompt_embeddings": {**SOUND["prompt_embeddings"], "stride": [1]}}, BYTES),
        ({"prompt_embeddings": {"dtype": "F32", "shape": [3, 32]}}, BYTES),
        ({"prompt_embeddings": [3, 32]}, BYTES),
        ({}, 0),
        ({"__metadata__": {"format": "pt"}}, 0),
        ({"__metadata__": {"format": 1}, **SOUND}, BYTES),
        ({"__metadata__": [], **SOUND}, BYTES),
    ],
    ids=[
        "no tokens",
        "no width",
        "empty neighbour with bytes",
        "rank 10,000",
        "unknown field",
        "missing field",
        "no object",
        "no tensors",
        "metadata alone",
        "metadata of numbers",
        "metadata as a list",
    ],
)
def test_empty_dimensions_ranks_fields_and_no_tensors(refused: Refused, tensors: dict[str, Any], size: int) -> None:
    """Zero-sized dimensions, absurd ranks, unknown or missing fields, and files without tensors are refused."""
    refused(_with_header(tensors, b"\0" * size))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_finite(refused: Refused, value: float, dtype: torch.dtype) -> None:
    """One NaN or infinity anywhere in the prefix is refused."""
    flat = torch.zeros(3, 32)
    flat[2, 31] = value
    refused(save({"prompt_embeddings": flat.to(dtype)}))


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("F8_E4M3", 1), ("F8_E5M2", 1), ("F4", 1), ("C64", 8), ("BOOL", 1), ("I64", 8), ("I8", 1), ("F64", 8), ("X", 4)],
)
def test_dtypes_outside_the_allowlist(refused: Refused, dtype: str, size: int) -> None:
    """A prefix of another dtype than float32, float16 and bfloat16 is refused."""
    refused(_with_header({"prompt_embeddings": entry([3, 32], 0, 96 * size, dtype)}, b"\0" * 96 * size))


@pytest.mark.parametrize(
    ("neighbour", "size"),
    [
        (entry([3], BYTES - 8, BYTES, "I64"), 0),
        (entry([1], BYTES + 8, BYTES + 16, "I64"), 16),
        (entry([1], BYTES, BYTES + 4, "F64"), 4),
        (entry([2], BYTES, BYTES + 8, "X"), 8),
        (entry([1 << 61, 1 << 61], BYTES, BYTES + 8, "I64"), 8),
    ],
    ids=["overlap", "hole", "size", "unknown dtype", "overflow"],
)
def test_a_neighbour_of_another_dtype_is_checked_all_the_same(
    refused: Refused, neighbour: dict[str, Any], size: int
) -> None:
    """A tensor that is not the prefix is skipped only after its place in the file was checked."""
    refused(_with_header({**SOUND, "count": neighbour}, b"\0" * (BYTES + size)))


def test_a_million_empty_tensors(refused: Refused, server: Server) -> None:
    """A header of tens of megabytes is refused by its length, before it is parsed."""
    empty = ",".join(f'"t{i:07}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    before = peak_memory(server)
    refused(_with_header(f"{{{empty}}}".encode(), b""))
    assert peak_memory(server) - before < 300 << 20


def test_more_tensors_than_any_model_has(refused: Refused) -> None:
    """70,000 tiny tensors, whose header is short enough, are refused by their number."""
    starts = range(BYTES, BYTES + 4 * 70_000, 4)
    many = {**SOUND, **{f"t{start}": entry([1], start, start + 4) for start in starts}}
    refused(safetensors_file(json.dumps(many, separators=(",", ":")).encode(), b"\0" * starts.stop))


def test_a_blob_that_is_cut_short_is_noticed_and_the_process_lives(tmp_path: Path) -> None:
    """A stored blob that was cut short is 503 for its version, and others are served: blobs are read and hashed, never
    mapped."""
    with running_server(tmp_path / "data") as server:
        client = server.client()
        broken = upload(client, "acme", "broken").json()
        assert upload(client, "acme", "whole", file=weights(1)).status_code == 201
        tensors_of(client.get("/v1/tenants/acme/adapters/broken/prefix"))
        assert "/blobs/" not in Path(f"/proc/{server.process.pid}/maps").read_text()
        assert client.delete("/v1/tenants/acme/adapters/broken/residency").status_code == 204
        for blob in (tmp_path / "data" / "blobs").glob("??/*"):
            if blob.name in _blobs_of(tmp_path / "data", broken):
                blob.write_bytes(blob.read_bytes()[:-5])
        for path in ("prefix", "parameters"):
            problem(client.get(f"/v1/tenants/acme/adapters/broken/{path}"), 503, "corrupt-blob")
            assert client.get(f"/v1/tenants/acme/adapters/whole/{path}").status_code == 200
        assert_alive(server)


def _blobs_of(data_dir: Path, version: dict[str, Any]) -> set[str]:
    """Returns the names of the blobs of a version."""
    query = "SELECT weights, key_values FROM versions WHERE digest = ?"
    with sqlite3.connect(data_dir / "catalog.sqlite") as catalog:
        row = catalog.execute(query, [version["digest"]]).fetchone()
    catalog.close()
    return {digest.removeprefix("sha256:") for digest in row}

"""`prefix.safetensors_header`: everything is refused before it is touched, one test row for each defect."""

import io
import json
import pickle
import struct
import zipfile
from typing import Any

import pytest
import torch
from safetensors.torch import save

from prefix_service.errors import InvalidCheckpoint, UnsafeCheckpoint
from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.safetensors_header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    WEIGHT_DTYPES,
    Header,
    parse_checkpoint_header,
    parse_header,
)
from prefix_service.prefix.safetensors_tensors import DTYPES, header_of, tensor_at


def file_of(header: Any, data: bytes = b"\0" * 8) -> bytearray:
    """A safetensors file with this header (an object, or its text) and these bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text)) + text + data)


def tensor(**changes: Any) -> dict[str, Any]:
    """A sound entry of two float32, with changes."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def parse(data: bytes | bytearray) -> Header:
    return parse_header(memoryview(data), dtypes=WEIGHT_DTYPES)


def test_what_safetensors_wrote_is_read() -> None:
    """Names, dtypes, shapes, metadata and values, of every dtype that this project reads."""
    tensors = {name: torch.arange(6).view(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    data = bytearray(save(tensors, metadata={"a": "b"}))
    header = parse_header(memoryview(data), dtypes=frozenset(DTYPES))
    assert header.metadata == {"a": "b"}
    assert header.size == len(data)
    for name, wanted in tensors.items():
        assert header.tensors[name].dtype == name
        assert torch.equal(tensor_at(memoryview(data), header.tensors[name]), wanted)


def test_a_tensor_shares_the_files_memory() -> None:
    """Nothing is copied on the way in."""
    data = file_of({"a": tensor()})
    tensor_at(memoryview(data), parse(data).tensors["a"]).fill_(1.0)
    assert data[-8:] == struct.pack("<2f", 1, 1)


def test_a_scalar_is_a_tensor() -> None:
    """An empty shape holds one value."""
    assert parse(file_of({"a": tensor(shape=[], data_offsets=[0, 4])}, b"\0" * 4)).tensors["a"].shape == ()


def test_the_header_alone_suffices() -> None:
    """A reader that knows the file's size needs only its beginning."""
    data = file_of({"a": tensor()})
    start = memoryview(data)[:-8]
    assert parse_header(start, dtypes=WEIGHT_DTYPES, size=len(data)) == parse(data)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x10280])
def test_a_header_length_that_looks_like_a_pickle(length: int) -> None:
    """A length of 640 begins with the bytes of a pickle of protocol 2; it is a safetensors file none the less."""
    text = json.dumps({"a": tensor()}).encode().ljust(length)
    assert parse(file_of(text)).tensors.keys() == {"a"}


def pickled(protocol: int) -> bytes:
    return pickle.dumps({"embedding.weight": [0.5] * 10}, protocol=protocol)


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"embedding.weight": torch.zeros(2)}, buffer)
    assert zipfile.is_zipfile(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [*map(pickled, (2, 3, 4, 5)), zipped()], ids=["2", "3", "4", "5", "torch.save"])
def test_a_pickle_is_named_and_never_opened(data: bytes) -> None:
    """The message says what it is and how to make it safe."""
    with pytest.raises(UnsafeCheckpoint, match=r"are a pickle, which is never opened here.*prefix-service convert"):
        parse(data)


HEADERS: dict[str, tuple[bytes | bytearray, str]] = {
    "empty file": (b"", "has 0 bytes, too few"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "has 7 bytes, too few"),
    "large length": (struct.pack("<Q", MAX_HEADER_BYTES + 1), "claims 8388609 bytes, more than 8388608"),
    "huge length": (struct.pack("<Q", 1 << 63), "claims 9223372036854775808 bytes, more than"),
    "length beyond the file": (struct.pack("<Q", 3) + b"{}", "claims 3 bytes, and the file has 10"),
    "not UTF-8": (file_of(b"\xff\xfe"), "not usable JSON"),
    "no JSON": (file_of(b""), "not usable JSON"),
    "half of a JSON": (file_of(b"{"), "not usable JSON"),
    "deep JSON": (file_of(b'{"a": ' + b"[" * 100_000), "not usable JSON"),
    "a float": (file_of({"a": tensor(shape=[2.0])}), "not usable JSON: '2.0' is no integer"),
    "an infinity": (file_of({"a": tensor(shape=[float("inf")])}), "not usable JSON: 'Infinity' is no integer"),
    "a long integer": (file_of(b'{"a": [' + b"1" * 4000 + b"]}" + b" " * 65_536), "has 4000 digits"),
    "a million numbers": (file_of(b'{"a": [' + b"1," * 1_000_000 + b"1]}"), "than 65536 tensors have"),
    "a million lists": (file_of(b'{"a": [' + b"[]" * 1_000_000 + b"]}"), "than 65536 tensors have"),
    "a million members": (file_of(b'{"a": [' + b":" * 1_000_000 + b"]}"), "than 65536 tensors have"),
    "two tensors of one name": (file_of(b'{"a": {}, "a": {}}'), "duplicate keys"),
    "two dtypes": (file_of(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "duplicate keys"),
    "list": (file_of([1]), "must be a JSON object"),
    "nothing": (file_of({}), "holds no tensors"),
    "metadata alone": (file_of({"__metadata__": {}}), "holds no tensors"),
    "metadata is a list": (file_of({"__metadata__": [], "a": tensor()}), "must map strings to strings"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, "a": tensor()}), "must map strings to strings"),
    "too many": (file_of({str(n): 0 for n in range(MAX_TENSORS + 1)}), "holds 65537 tensors, more than 65536"),
}


@pytest.mark.parametrize("defect", HEADERS)
def test_a_malformed_header(defect: str) -> None:
    """Length, encoding, JSON, duplicates, metadata and the number of tensors."""
    data, message = HEADERS[defect]
    with pytest.raises(InvalidCheckpoint, match=message):
        parse(data)


@pytest.mark.parametrize("name", ["", "x" * 65_537, "a\0b", "a\nb", "../a", "a..b", "\u202ea"])
def test_a_hostile_name(name: str) -> None:
    """A name is shown on terminals; the message shows it escaped and shortened."""
    with pytest.raises(InvalidCheckpoint, match=r"tensor name .{2,80} is not acceptable"):
        parse(file_of({name: tensor()}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "must have exactly dtype, shape and data_offsets"),
        ({"dtype": "F32", "shape": [2]}, "must have exactly dtype, shape and data_offsets"),
        (tensor(extra=1), "must have exactly dtype, shape and data_offsets"),
        (tensor(dtype="F64", data_offsets=[0, 16]), "has dtype 'F64', not one of BF16, F16, F32"),
        (tensor(dtype="I64", data_offsets=[0, 16]), "has dtype 'I64', not one of BF16, F16, F32"),
        (tensor(dtype=["F32"]), "has dtype .*, not one of"),
        (tensor(shape=2), "not up to 64 sizes"),
        (tensor(shape=[-2]), "not up to 64 sizes"),
        (tensor(shape=[True, 2]), "not up to 64 sizes"),
        (tensor(shape=[1] * 65), "not up to 64 sizes"),
        (tensor(shape=[1 << 62]), "not up to 64 sizes"),
        (tensor(shape=[1 << 61, 1 << 61]), "needs .* bytes, its offsets span 8"),
        (tensor(shape=[3]), "needs 12 bytes, its offsets span 8"),
        (tensor(dtype="BF16"), "needs 4 bytes, its offsets span 8"),
        (tensor(data_offsets=[0]), "not two byte positions"),
        (tensor(data_offsets=[0, 8, 8]), "not two byte positions"),
        (tensor(data_offsets=[-8, 0]), "not two byte positions"),
        (tensor(data_offsets=[8, 0]), "needs 8 bytes, its offsets span -8"),
        (tensor(data_offsets=[8, 16]), "begins at byte .*: overlap or hole"),
    ],
)
def test_a_malformed_entry(entry: Any, message: str) -> None:
    """Keys, dtype, shape and offsets of one tensor, each by name."""
    with pytest.raises(InvalidCheckpoint, match=f"tensor 'a' .*{message}"):
        parse(file_of({"a": entry}, b"\0" * 16))


def test_an_empty_tensor_is_refused_where_it_would_be_read() -> None:
    """A reader of prefixes or masks never meets one."""
    with pytest.raises(InvalidCheckpoint, match=r"tensor 'e' of shape .2, 0. is empty"):
        parse(file_of({"a": tensor(), "e": tensor(shape=[2, 0], data_offsets=[0, 0])}))


def test_a_checkpoint_may_hold_every_dtype_of_the_format() -> None:
    """Each tensor spans its elements' bits, whole bytes; empty ones may stand anywhere."""
    names = {"F4": 1, "F6_E2M3": 3, "BOOL": 4, "U16": 8, "I32": 16, "C64": 32, "F64": 32}
    header: dict[str, Any] = {"empty": tensor(dtype="I64", shape=[0, 3], data_offsets=[0, 0]), "__metadata__": None}
    position = 0
    for name, size in names.items():
        shape = [2] if name == "F4" else [4]
        header[name] = tensor(dtype=name, shape=shape, data_offsets=[position, position + size])
        position += size
    data = file_of(header, b"\0" * position)
    assert parse_checkpoint_header(memoryview(data)).tensors.keys() == {"empty", *names}
    odd = file_of({"a": tensor(dtype="F4", shape=[3], data_offsets=[0, 1])}, b"\0")
    with pytest.raises(InvalidCheckpoint, match="needs 1 bytes"):
        parse_checkpoint_header(memoryview(odd))


@pytest.mark.parametrize(
    ("second", "size", "message"),
    [
        ([4, 12], 12, "tensor 'b' begins at byte .*: overlap or hole"),
        ([0, 8], 8, "begins at byte .*: overlap or hole"),
        ([12, 20], 20, "tensor 'b' begins at byte .*: overlap or hole"),
        ([8, 16], 15, "truncated or trailing"),
        ([8, 16], 17, "truncated or trailing"),
    ],
    ids=["overlap", "alias", "hole", "truncated", "trailing"],
)
def test_tensors_that_do_not_tile_the_file(second: list[int], size: int, message: str) -> None:
    """Every byte behind the header belongs to exactly one tensor."""
    with pytest.raises(InvalidCheckpoint, match=message):
        parse(file_of({"a": tensor(), "b": tensor(data_offsets=second)}, b"\0" * size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 2, 2, 10, 4), (1024, 123)])
def test_a_file_of_one_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Byte for byte as the safetensors library writes it: digests of stored blobs rely on it."""
    tensor = torch.randn(shape).to(dtype)
    for name in ("past_key_values", "prompt_embeddings"):
        assert header_of(name, dtype, shape) + bytes(bytes_of(tensor)) == save({name: tensor})

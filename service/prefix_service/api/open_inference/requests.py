"""The body of an inference request: JSON, and the tensors behind it (Triton's extension `binary_tensor_data`)."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from starlette.datastructures import Headers

from prefix_service.api.dependencies.input_masks import mask_of_rows, mask_of_tensor
from prefix_service.api.http.json_objects import MOST_JSON, MOST_MASK_JSON, json_object, validated
from prefix_service.api.open_inference.models import INPUTS, JSON_LENGTH
from prefix_service.api.open_inference.schemas import InferenceInput, InferenceRequest, InputName
from prefix_service.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from prefix_service.library.plan import PrefixRequest
from prefix_service.prefix.json_text import json_memory, shown
from prefix_service.prefix.wire.masks import InputMask

_MOST_RATIO: Final = 100  # of a decompressed body to what was sent


@dataclass(frozen=True, slots=True)
class Inference:
    """A request that was read: what is asked for, and the input's mask.

    A request without a mask has one of no tokens, `[batch, 0]`, so its outputs are those of every other request.
    """

    asked: InferenceRequest
    options: PrefixRequest
    mask: InputMask


def parse_inference(body: bytearray, headers: Headers, limit: int) -> Inference:
    """Returns the inference request that a body is; it may have `limit` bytes once it is decompressed. Blocking.

    A compressed body may become a hundred times as large, or a megabyte.

    Raises:
        InvalidRequest: a field, an input or the framing is wrong.
        TooLarge: it has more bytes.
        UnsupportedMediaType: it is compressed in a way that is not read here.
    """
    view = memoryview(_decompressed(body, _encoding(headers), most_inflated(headers, len(body), limit)))
    length = _json_length(headers.getlist(JSON_LENGTH), len(view))
    if length > MOST_MASK_JSON:
        raise TooLarge(f"the body has {length} bytes of JSON, more than {MOST_MASK_JSON}: send masks as binary data")
    asked = validated(InferenceRequest, json_object(bytes(view[:length])))
    rows, mask = _inputs(asked.inputs, view[length:])
    found = validated(PrefixRequest, {"batch_size": rows, "dtype": asked.parameters.dtype})
    return Inference(asked, found, InputMask.empty(found.batch_size or 1) if mask is None else mask)


def most_inflated(headers: Headers, nbytes: int, limit: int) -> int:
    """Returns how many bytes a body of `nbytes` may have once it is decompressed."""
    if _encoding(headers) == "identity":
        return min(nbytes, limit)
    return min(max(_MOST_RATIO * nbytes, MOST_JSON), limit)


def memory_of_parsing(headers: Headers, nbytes: int, limit: int) -> int:
    """Returns the bytes of memory that `parse_inference` takes for a body of `nbytes`."""
    size = most_inflated(headers, nbytes, limit)
    lengths = headers.getlist(JSON_LENGTH)
    length = _json_length(lengths, size) if lengths else size
    return size + json_memory(min(length, MOST_MASK_JSON))


def _encoding(headers: Headers) -> str:
    return headers.get("content-encoding", "identity").lower()


def _decompressed(body: bytearray, encoding: str, limit: int) -> bytes | bytearray:
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise UnsupportedMediaType(f"bodies come as they are, or with gzip or deflate, not {encoding!r:.40}")
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either, according to its first bytes
    try:
        found = inflate.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {encoding}: {error}") from error
    if len(found) > limit:
        raise TooLarge(
            f"the body of {len(body)} bytes has more than {limit} once it is decompressed, and at most {_MOST_RATIO} "
            "times as many are read: send it as it is"
        )
    if not inflate.eof or inflate.unused_data:
        raise InvalidRequest(f"the body is not {encoding}: it is truncated, or goes on behind its end")
    return found


def _json_length(values: Sequence[str], size: int) -> int:
    if not values:
        return size
    # int() takes more than decimal digits, and refuses very many of them.
    if len(values) > 1 or not values[0].isascii() or not values[0].isdigit() or len(values[0]) > 18:
        raise InvalidRequest(f"{JSON_LENGTH} must be a number of bytes, got {', '.join(values)!r:.80}")
    if not 0 < int(values[0]) <= size:
        raise InvalidRequest(f"{JSON_LENGTH} is {values[0]}, and the body has {size} bytes")
    return int(values[0])


def _inputs(inputs: Sequence[InferenceInput], binary: memoryview) -> tuple[int | None, InputMask | None]:
    """Returns the batch size and the mask, each if it is among the inputs."""
    rows: int | None = None
    mask: InputMask | None = None
    seen: set[InputName] = set()
    position = 0
    for item in inputs:
        if item.name in seen:
            raise InvalidRequest(f"input {item.name} is there twice")
        seen.add(item.name)
        _require_form(item)
        size = item.parameters.binary_data_size
        piece = None if size is None else _piece(item, binary[position : position + size], size)
        position += size or 0
        if item.name == "batch_size":
            rows = _rows(item, piece)
        else:
            mask = _mask(item, piece)
    if position != len(binary):
        raise InvalidRequest(
            f"{len(binary)} bytes stand behind the JSON, and the binary_data_size of the inputs make {position}"
        )
    return rows, mask


def _require_form(item: InferenceInput) -> None:
    datatype, _, shape = INPUTS[item.name]
    if item.datatype != datatype:
        raise InvalidRequest(f"input {item.name} must have datatype {datatype}, got {item.datatype}")
    fits = len(item.shape) == len(shape) and all(
        found == wanted or (wanted < 0 < found) for found, wanted in zip(item.shape, shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(f"input {item.name} must have shape {list(shape)}, -1 for 1 and more, got {item.shape}")
    if item.data is None and item.parameters.binary_data_size is None:
        raise InvalidRequest(f"input {item.name} has neither data nor binary_data_size")


def _piece(item: InferenceInput, piece: memoryview, size: int) -> bytearray:
    _, dtype, _ = INPUTS[item.name]
    needed = prod(item.shape) * dtype.itemsize
    if item.data is not None:
        raise InvalidRequest(f"input {item.name} has data as well as binary_data_size: send one of them")
    if size != needed:
        raise InvalidRequest(f"input {item.name} has {size} bytes of binary data, and its shape needs {needed}")
    if len(piece) < size:
        raise InvalidRequest(
            f"input {item.name} has {size} bytes of binary data, and {len(piece)} are left behind the JSON, whose "
            f"length is {JSON_LENGTH}"
        )
    return bytearray(piece)


def _rows(item: InferenceInput, piece: bytearray | None) -> int:
    if piece is not None:
        return int.from_bytes(piece, "little", signed=True)
    data: list[Any] = item.data or []
    if len(data) != 1 or type(data[0]) is not int or not 0 < data[0] < 1 << 31:
        raise InvalidRequest(f"input batch_size must be one number of rows, got {shown(data)}")
    rows: int = data[0]
    return rows


def _mask(item: InferenceInput, piece: bytearray | None) -> InputMask:
    if piece is not None:
        return mask_of_tensor(torch.frombuffer(piece, dtype=torch.int64).view(item.shape))
    data: list[Any] = item.data or []
    rows, length = item.shape
    if not any(isinstance(value, list) for value in data) and len(data) == rows * length:
        data = [data[at : at + length] for at in range(0, len(data), length)]  # (rows*length) -> (rows, length)
    mask = mask_of_rows(data)
    if list(mask.shape) != item.shape:
        raise InvalidRequest(f"input attention_mask has shape {item.shape}, and its data {list(mask.shape)}")
    return mask

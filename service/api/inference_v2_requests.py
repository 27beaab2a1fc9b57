"""The body of an inference request: JSON, and the tensors behind it (Triton's extension `binary_tensor_data`)."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from starlette.datastructures import Headers
from torch import Tensor

from service.api.bodies import json_object, validated
from service.api.inference_v2_schemas import InferenceInput, InferenceRequest, InputName
from service.api.masks import mask_of_rows, require_flags
from service.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from service.plan import PrefixRequest

JSON_LENGTH: Final = "Inference-Header-Content-Length"
"""The header field that tells how many bytes of a body are JSON; the rest are tensors."""

INPUTS: Final[dict[InputName, tuple[str, torch.dtype, tuple[int, ...]]]] = {
    "batch_size": ("INT32", torch.int32, (1,)),
    "attention_mask": ("INT64", torch.int64, (-1, -1)),
}
"""Datatype, dtype and shape of each input; -1 is any size."""


@dataclass(frozen=True, slots=True)
class Inference:
    """A request that was read: what is asked for, and the input's mask `[batch, seq]`, int64.

    A request without a mask has one of no tokens, `[batch, 0]`, so its outputs are those of every other request.
    """

    asked: InferenceRequest
    options: PrefixRequest
    mask: Tensor


def parse_inference(body: bytearray, headers: Headers, limit: int) -> Inference:
    """Returns the inference request that a body is; it may have `limit` bytes once it is decompressed. Blocking.

    Raises:
        InvalidRequest: a field, an input or the framing is wrong.
        TooLarge: it has more bytes.
        UnsupportedMediaType: it is compressed in a way that is not read here.
    """
    view = memoryview(_decompressed(body, headers.get("content-encoding", "identity").lower(), limit))
    length = _json_length(headers.getlist(JSON_LENGTH), len(view))
    asked = validated(InferenceRequest, json_object(bytes(view[:length])))
    inputs = _tensors(asked.inputs, view[length:])
    rows = inputs.get("batch_size")
    options = {"batch_size": None if rows is None else int(rows), "dtype": asked.parameters.dtype}
    found = validated(PrefixRequest, options)
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.zeros(found.batch_size or 1, 0, dtype=torch.int64)
    return Inference(asked, found, mask)


def _decompressed(body: bytearray, encoding: str, limit: int) -> bytes | bytearray:
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise UnsupportedMediaType(f"bodies come as they are, or with gzip or deflate, not {encoding!r:.40}")
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either, as its first bytes tell
    try:
        found = inflate.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not {encoding}: {error}") from error
    if len(found) > limit:
        raise TooLarge(f"the body has more than {limit} bytes once it is decompressed")
    if not inflate.eof or inflate.unused_data:
        raise InvalidRequest(f"the body is not {encoding}: it is truncated, or goes on behind its end")
    return found


def _json_length(told: Sequence[str], size: int) -> int:
    if not told:
        return size
    # int() takes more than decimal digits, and refuses very many of them.
    if len(told) > 1 or not told[0].isascii() or not told[0].isdigit() or len(told[0]) > 18:
        raise InvalidRequest(f"{JSON_LENGTH} must be a number of bytes, got {', '.join(told)!r:.80}")
    if not 0 < int(told[0]) <= size:
        raise InvalidRequest(f"{JSON_LENGTH} is {told[0]}, and the body has {size} bytes")
    return int(told[0])


def _tensors(inputs: Sequence[InferenceInput], binary: memoryview) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    position = 0
    for item in inputs:
        if item.name in found:
            raise InvalidRequest(f"input {item.name} is there twice")
        _require_form(item)
        size = item.parameters.binary_data_size
        if size is None:
            found[item.name] = _from_json(item)
        else:
            found[item.name] = _from_bytes(item, binary[position : position + size], size)
            position += size
    if position != len(binary):
        raise InvalidRequest(
            f"{len(binary)} bytes stand behind the JSON, and the binary_data_size of the inputs make {position}"
        )
    return found


def _require_form(item: InferenceInput) -> None:
    datatype, _, shape = INPUTS[item.name]
    if item.datatype != datatype:
        raise InvalidRequest(f"input {item.name} must have datatype {datatype}, got {item.datatype}")
    fits = len(item.shape) == len(shape) and all(
        found == wanted or (wanted < 0 < found) for found, wanted in zip(item.shape, shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(f"input {item.name} must have shape {list(shape)}, -1 for 1 and more, got {item.shape}")


def _from_bytes(item: InferenceInput, piece: memoryview, size: int) -> Tensor:
    _, dtype, _ = INPUTS[item.name]
    needed = prod(item.shape) * dtype.itemsize
    if item.data is not None:
        raise InvalidRequest(f"input {item.name} has data as well as binary_data_size: send one of them")
    if size != needed:
        raise InvalidRequest(f"input {item.name} has {size} bytes of binary data, and its shape needs {needed}")
    if len(piece) < size:
        raise InvalidRequest(
            f"input {item.name} has {size} bytes of binary data, and {len(piece)} are left behind the JSON, whose "
            f"length {JSON_LENGTH} tells"
        )
    tensor = torch.frombuffer(bytearray(piece), dtype=dtype).view(item.shape)
    return require_flags(tensor) if item.name == "attention_mask" else tensor


def _from_json(item: InferenceInput) -> Tensor:
    data: list[Any] | None = item.data
    if data is None:
        raise InvalidRequest(f"input {item.name} has neither data nor binary_data_size")
    if item.name == "batch_size":
        if len(data) != 1 or type(data[0]) is not int or not 0 < data[0] < 1 << 31:
            raise InvalidRequest(f"input batch_size must be one number of rows, got {data!r:.80}")
        return torch.tensor(data, dtype=torch.int32)
    rows, length = item.shape
    if not any(isinstance(value, list) for value in data) and len(data) == rows * length:
        data = [data[at : at + length] for at in range(0, len(data), length)]  # (rows*length) -> (rows, length)
    mask = mask_of_rows(data)
    if list(mask.shape) != item.shape:
        raise InvalidRequest(f"input attention_mask has shape {item.shape}, and its data {list(mask.shape)}")
    return mask

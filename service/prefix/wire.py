"""A prefix as a safetensors file, with canonical bytes and without copies; and its reader.

The header is written here because the bytes stand behind an ETag and a digest, and safetensors' own writer orders
metadata by a hash map. Layout: 8 bytes little-endian header length, a JSON header padded with spaces so that the
data begins at a multiple of 64, then the tensors, widest dtype first, so that each is aligned to its element.
"""

import ctypes
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from service.errors import InvalidCheckpoint, InvalidResponse
from service.prefix.form import FORMAT, Form, Identity, KVDtype, MaskDtype, Span
from service.prefix.kv import PrefixKV, prefix_mask
from service.prefix.safetensors_header import DTYPES, NAMES, TensorEntry, parse_header
from service.prefix.streams import own_stream

_ALIGNMENT: Final = 64
_FLOAT8_MAX: Final = 448.0  # the largest float8_e4m3fn
JOINED: Final = 1 << 16  # bytes: what is cheaper to copy once than to send by itself
_REMEMBERED: Final = 4096  # bytes of a header that is read once: twice what a stacked prefix has
CHUNK: Final = 8 << 20  # bytes: what a slow reader may hold where the event loop copies what it cannot send at once

KV_DTYPES: Final[Mapping[KVDtype, torch.dtype]] = {name: getattr(torch, name) for name in get_args(KVDtype)}
MASK_DTYPES: Final[Mapping[MaskDtype, torch.dtype]] = {name: getattr(torch, name) for name in get_args(MaskDtype)}


_Source = Literal["values", "scales", "extra"]


@dataclass(frozen=True)
class Rendering:
    """Keys and values as they travel, in host memory: `values` `[L', 2, H', N, D]`, and for float8 `scales`
    float32 `[L', 2, H', 1, 1]`."""

    values: Tensor
    scales: Tensor | None
    file: str | None = None
    """The file in which they lie, where others on this host may map it."""

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def bytes_of(self, part: _Source) -> memoryview:
        """The memory of `values` or `scales`."""
        return self._values_bytes if part == "values" else self._scales_bytes

    @cached_property
    def _values_bytes(self) -> memoryview:
        return bytes_of(self.values)

    @cached_property
    def _scales_bytes(self) -> memoryview:
        if self.scales is None:
            raise AssertionError("a float8 message needs a float8 rendering")
        return bytes_of(self.scales)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file, before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Slot(TensorSpec):
    """One tensor of a message: a row of it lies at `index` in its source, and is sent `times` times."""

    source: _Source
    index: tuple[int, ...] = ()
    times: int = 1


class _Span(NamedTuple):
    """Bytes `start:stop` of a part of a rendering, sent `times` times."""

    source: _Source
    start: int
    stop: int
    times: int

    def chunks(self, rendering: Rendering) -> list[memoryview]:
        row = rendering.bytes_of(self.source)[self.start : self.stop]
        return [row[at : at + CHUNK] for at in range(0, len(row), CHUNK)] * self.times


def write_header(about: Mapping[str, Any], tensors: Iterable[TensorSpec]) -> bytes:
    """Length and JSON header of a file that has these tensors one behind the other, padded; `about` is its metadata."""
    # RFC 8785 for what stands here: ASCII keys, strings, integers, booleans, null, and lists and objects of these.
    prefix = json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    fields: dict[str, Any] = {"__metadata__": {"prefix": prefix}}
    position = 0
    for tensor in tensors:
        offsets = [position, position := position + tensor.nbytes]
        fields[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def render(kv: PrefixKV, dtype: KVDtype) -> Rendering:
    """Sliced and cast on the device of `kv`, then one copy to host memory, pinned; no copy where nothing changes on
    the CPU. Renderings of several threads do not wait for each other.

    float8 values are divided by `max |x| / 448` of their layer and head, which travels beside them; never by less
    than the smallest normal float32, so that a head of zeros or of subnormals divides too.
    """
    with own_stream(kv.tensor.device):
        tensor, scales = kv.tensor, None
        if dtype == "float8_e4m3fn":
            exact = tensor.to(torch.float32)
            largest = exact.abs().amax(dim=(3, 4), keepdim=True)  # (L', 2, H', 1, 1)
            scales = (largest / _FLOAT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
            tensor = (exact / scales).clamp(-_FLOAT8_MAX, _FLOAT8_MAX)
        values = tensor.to(dtype=KV_DTYPES[dtype])
        return Rendering(to_host(values), None if scales is None else to_host(scales))


def to_host(tensor: Tensor) -> Tensor:
    """The contiguous values in host memory; from a device pinned, and there once the current stream's work is done."""
    tensor = tensor.contiguous()
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class Message:
    """A response planned from sizes alone: header and length are known before a tensor is touched."""

    identity: Identity
    form: Form
    extras: Mapping[str, Tensor]

    @property
    def canonical(self) -> "Message":
        """The message in which this project's client asks for the same rendering: one tensor, one row."""
        form = replace(self.form, batch_size=1, layout="stacked", expand=False)
        return Message(self.identity, form, {"attention_mask": prefix_mask(1, self.identity.num_virtual_tokens)})

    @property
    def is_canonical(self) -> bool:
        """Whether this is that message: the header tells every form apart, and also a mask that was posted."""
        return self.header == self.canonical.header

    @cached_property
    def _slots(self) -> list[Slot]:
        extras = [Slot(name, tensor.dtype, tuple(tensor.shape), "extra") for name, tensor in self.extras.items()]
        slots = extras + (self._layer_slots() if self.form.layout == "layers" else self._stacked_slots())
        return sorted(slots, key=lambda slot: -slot.dtype.itemsize)

    @cached_property
    def tensors(self) -> Mapping[str, Slot]:
        """What the message holds, in the order of the file."""
        return {slot.name: slot for slot in self._slots}

    def _layer_slots(self) -> list[Slot]:
        form, heads = self.form, self.form.kv_heads[1] - self.form.kv_heads[0]
        shape = (form.rows, heads, self.identity.num_virtual_tokens, self.identity.head_dim)
        dtype, slots = KV_DTYPES[form.dtype], []
        for index, layer in enumerate(range(*form.layers)):
            for part, name in enumerate(("key", "value")):
                full = f"past_key_values.{layer}.{name}"
                slots.append(Slot(full, dtype, shape, "values", (index, part), form.rows))
                if form.dtype == "float8_e4m3fn":
                    slots.append(Slot(f"{full}_scale", torch.float32, (1, heads, 1, 1), "scales", (index, part)))
        return slots

    def _stacked_slots(self) -> list[Slot]:
        form = self.form
        layers, heads = form.layers[1] - form.layers[0], form.kv_heads[1] - form.kv_heads[0]
        shape = (form.rows, layers, 2, heads, self.identity.num_virtual_tokens, self.identity.head_dim)
        slots = [Slot("past_key_values", KV_DTYPES[form.dtype], shape, "values", (), form.rows)]
        if form.dtype == "float8_e4m3fn":
            slots.append(Slot("past_key_values_scale", torch.float32, (1, layers, 2, heads, 1, 1), "scales"))
        return slots

    @cached_property
    def rendering_nbytes(self) -> int:
        """Bytes of the rendering that this is made of."""
        return sum(slot.nbytes // slot.times for slot in self._slots if slot.source != "extra")

    @cached_property
    def header(self) -> bytes:
        """Length and JSON header, padded."""
        return write_header({"format": FORMAT, **asdict(self.identity), **asdict(self.form)}, self._slots)

    @cached_property
    def content_length(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(slot.nbytes for slot in self._slots)

    def around_values(self) -> tuple[bytes, bytes]:
        """What stands in front of keys and values, and behind them, where they are sent once and without scales."""
        known = [b"" if isinstance(piece, _Span) else piece for piece in self._pieces]
        at = next(at for at, piece in enumerate(self._pieces) if isinstance(piece, _Span))
        return b"".join(known[:at]), b"".join(known[at:])

    @cached_property
    def _pieces(self) -> list[bytes | memoryview | _Span]:
        """The file in order: what is known without a rendering, and spans of one. Neighbours are joined where they can
        be."""
        pieces: list[bytes | memoryview | _Span] = [self.header]
        for slot in self._slots:
            last = pieces[-1]
            if slot.source == "extra":
                extra = bytes_of(self.extras[slot.name].contiguous())
                if isinstance(last, bytes) and len(extra) <= JOINED:
                    pieces[-1] = b"".join((last, extra))
                else:
                    pieces.append(extra)
                continue
            span = self._span_of(slot)
            if isinstance(last, _Span) and _adjoin(last, span):
                span, pieces = last._replace(stop=span.stop), pieces[:-1]
            pieces.append(span)
        return pieces

    def _span_of(self, slot: Slot) -> _Span:
        row = slot.nbytes // slot.times
        # (layer, part) of (L', 2, …) in the order of memory; one tensor of all begins at 0
        start = row * (2 * slot.index[0] + slot.index[1]) if slot.index else 0
        return _Span(slot.source, start, start + row, slot.times)

    def chunks(self, rendering: Rendering, start: int = 0, stop: int | None = None) -> list[bytes | memoryview]:
        """The bytes `start:stop` of the file in chunks of at most 8 MiB; the same row comes again, never a copy."""
        stop = self.content_length if stop is None else stop
        whole = self._chunks(rendering)
        if (start, stop) == (0, self.content_length):
            return whole
        found, position = [], 0
        for chunk in whole:
            first, last = max(start - position, 0), min(stop - position, len(chunk))
            if first < last:
                found.append(chunk[first:last])
            position += len(chunk)
        return found

    def _chunks(self, rendering: Rendering) -> list[bytes | memoryview]:
        chunks: list[bytes | memoryview] = []
        for piece in self._pieces:
            if isinstance(piece, _Span):
                chunks += piece.chunks(rendering)
            else:
                chunks.append(piece)
        return chunks

    def chunks_of(self, name: str, rendering: Rendering) -> list[bytes | memoryview]:
        """The bytes of one tensor, in the same way."""
        slot = self.tensors[name]
        if slot.source == "extra":
            return [bytes_of(self.extras[name].contiguous())]
        return [*self._span_of(slot).chunks(rendering)]


def _adjoin(first: _Span, second: _Span) -> bool:
    """Whether two spans that are sent once are one."""
    return first.source == second.source and first.stop == second.start and first.times == second.times == 1


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, kept alive by the view."""
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]  # ctypes instances take attributes; this one owns the memory
    return memoryview(array).cast("B")


@dataclass(frozen=True, slots=True)
class Received:
    """A message that was read: its metadata and its tensors, which share the memory that was read into."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def read_message(data: bytearray | memoryview) -> Received:
    """Read a response of the service; nothing is copied.

    Raises:
        InvalidResponse: not a sound safetensors file, or not one of this service.
    """
    view = memoryview(data)
    stop = 8 + int.from_bytes(view[:8], "little")
    if stop <= min(len(view), _REMEMBERED):
        tensors, metadata = _remembered(bytes(view[:stop]), len(view))
    else:
        tensors, metadata = _read_header(view, len(view))
    memory = memory_of(view)
    return Received(dict(metadata), {name: _tensor_in(memory, entry) for name, entry in tensors.items()})


def _read_header(start: memoryview, size: int) -> tuple[Mapping[str, TensorEntry], dict[str, Any]]:
    """Tensors and metadata of a message of `size` bytes that begins with `start`."""
    try:
        header = parse_header(start, dtypes=frozenset(DTYPES), size=size)
        metadata = json.loads(header.metadata.get("prefix", "null"))
    except (InvalidCheckpoint, ValueError, RecursionError) as error:
        raise InvalidResponse(f"the answer is not a prefix: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise InvalidResponse("the answer is a safetensors file, but not a prefix in a format that this client reads")
    return header.tensors, metadata


@lru_cache(maxsize=256)
def _remembered(start: bytes, size: int) -> tuple[Mapping[str, TensorEntry], dict[str, Any]]:
    """The same of a header that is short: reading it takes longer than half a megabyte on the wire."""
    return _read_header(memoryview(start), size)


def memory_of(view: memoryview) -> Tensor:
    """uint8 `[len(view)]` over the same bytes. The tensor that `bytes_of` made a view of is found again: CUDA follows a
    copy out of pinned memory by the storage that owns it, and would not know a new one over a part of it."""
    owner = getattr(view.obj, "tensor", None)
    return owner if isinstance(owner, Tensor) else torch.frombuffer(view, dtype=torch.uint8)


def _tensor_in(memory: Tensor, entry: TensorEntry) -> Tensor:
    """A view, but of what is not aligned to its dtype, which this service never sends: a copy."""
    dtype, part = DTYPES[entry.dtype], memory[entry.start : entry.stop]
    return (part.clone() if entry.start % dtype.itemsize else part).view(dtype).view(entry.shape)


def read_kv(received: Received) -> PrefixKV:
    """The keys and values of a message in the layout `stacked` and one row; float8 comes back as float32.

    Raises:
        InvalidResponse: the tensor is missing, or its shape contradicts the metadata.
    """
    about = received.metadata
    tensor = received.tensors.get("past_key_values")
    try:
        layers, heads = _span(about["layers"]), _span(about["kv_heads"])
        num_layers, num_kv_heads = int(about["num_layers"]), int(about["num_kv_heads"])
        expected = (1, layers[1] - layers[0], 2, heads[1] - heads[0], about["num_virtual_tokens"], about["head_dim"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidResponse(f"the metadata of the answer is not that of a prefix: {error!r:.80}") from error
    if tensor is None or tuple(tensor.shape) != expected:
        found = "none" if tensor is None else list(tensor.shape)
        raise InvalidResponse(f"past_key_values should have shape {list(expected)}, got {found}")
    if (scale := received.tensors.get("past_key_values_scale")) is not None:
        if tuple(scale.shape) != (*expected[:4], 1, 1):
            raise InvalidResponse(f"past_key_values_scale has shape {list(scale.shape)}, beside {list(expected)}")
        tensor = tensor.to(torch.float32) * scale
    return PrefixKV(tensor[0], layers, heads, num_layers, num_kv_heads)


def _span(values: Any) -> Span:
    first, last = values
    return int(first), int(last)

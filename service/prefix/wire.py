"""A prefix as a safetensors file, with canonical bytes and without copies; `received` reads it.

The header is written here because the bytes stand behind an ETag and a digest, and safetensors' own writer orders
metadata by a hash map. Layout: 8 bytes little-endian header length, a JSON header padded with spaces so that the
data begins at a multiple of 64, then the tensors, widest dtype first, so that each is aligned to its element.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from service.prefix.buffers import bytes_of
from service.prefix.form import FORMAT, Form, Identity, MaskDtype
from service.prefix.kv import prefix_mask
from service.prefix.rendering import KV_DTYPES, Part, Rendering
from service.prefix.safetensors_header import NAMES

_ALIGNMENT: Final = 64
JOINED: Final = 1 << 16  # bytes: what is cheaper to copy once than to send by itself
CHUNK: Final = 8 << 20  # bytes: what a slow reader may hold where the event loop copies what it cannot send at once

MASK_DTYPES: Final[Mapping[MaskDtype, torch.dtype]] = {name: getattr(torch, name) for name in get_args(MaskDtype)}


_Source = Part | Literal["extra"]


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

    source: Part
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
            span = self._span_of(slot, slot.source)
            if isinstance(last, _Span) and _adjoin(last, span):
                span, pieces = last._replace(stop=span.stop), pieces[:-1]
            pieces.append(span)
        return pieces

    def _span_of(self, slot: Slot, source: Part) -> _Span:
        row = slot.nbytes // slot.times
        # (layer, part) of (L', 2, …) in the order of memory; one tensor of all begins at 0
        start = row * (2 * slot.index[0] + slot.index[1]) if slot.index else 0
        return _Span(source, start, start + row, slot.times)

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
        return [*self._span_of(slot, slot.source).chunks(rendering)]


def _adjoin(first: _Span, second: _Span) -> bool:
    """Whether two spans that are sent once are one."""
    return first.source == second.source and first.stop == second.start and first.times == second.times == 1

"""A prefix as a safetensors file, with canonical bytes and without copies; `received` reads it.

The header is written here because the bytes stand behind an ETag and a digest, and safetensors' own writer orders
metadata by a hash map. Layout: 8 bytes little-endian header length, a JSON header padded with spaces so that the
data begins at a multiple of 64, then the tensors, widest dtype first, so that each is aligned to its element.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import repeat
from math import prod
from typing import Any, Final, Literal, NamedTuple, get_args

import torch

from prefix_service.prefix.form import FORMAT, Form, Identity, MaskDtype
from prefix_service.prefix.safetensors_tensors import NAMES
from prefix_service.prefix.wire.extras import AttentionMask, Bytes, Extra, Piece
from prefix_service.prefix.wire.rendering import KV_DTYPES, Part, Rendering

_ALIGNMENT: Final = 64
JOINED: Final = 1 << 16  # bytes: what is cheaper to copy once than to send by itself
_BLOCK: Final = 1 << 18  # bytes of short rows that are joined
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


class Slot(NamedTuple):
    """One tensor of a message: a row of it lies at `place` in its source, and is sent `times` times."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    source: _Source
    place: tuple[int, ...] = ()
    times: int = 1


class _Span(NamedTuple):
    """Bytes `start:stop` of a part of a rendering, sent `times` times."""

    source: Part
    start: int
    stop: int
    times: int

    def piece(self, rendering: Rendering) -> Piece:
        return rendering.bytes_of(self.source)[self.start : self.stop], self.times


def write_header(about: Mapping[str, Any], tensors: Iterable[TensorSpec | Slot]) -> bytes:
    """Length and JSON header of a file that has these tensors one behind the other, padded; `about` is its metadata."""
    # RFC 8785 for what stands here: ASCII keys, strings, integers, booleans, null, and lists and objects of these.
    prefix = json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    members = [json.dumps({"__metadata__": {"prefix": prefix}}, separators=(",", ":"), ensure_ascii=False)[1:-1]]
    position = 0
    # Thousands of tensors of very few shapes: what is the same for many is written once.
    known: dict[tuple[torch.dtype, tuple[int, ...]], tuple[str, int]] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.shape
        if kind not in known:
            shape = ",".join(map(str, tensor.shape))
            known[kind] = f'"dtype":"{NAMES[tensor.dtype]}","shape":[{shape}]', tensor.nbytes
        told, nbytes = known[kind]
        members.append(f'"{tensor.name}":{{{told},"data_offsets":[{position},{position + nbytes}]}}')
        position += nbytes
    text = f"{{{','.join(members)}}}".encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Message:
    """A response planned from sizes alone: header and length are known before a tensor is touched."""

    identity: Identity
    form: Form
    extras: Mapping[str, Extra]

    @property
    def canonical(self) -> "Message":
        """The message in which this project's client asks for the same rendering: one tensor, one row."""
        form = replace(self.form, batch_size=1, layout="stacked", expand=False)
        mask = AttentionMask(1, self.identity.num_virtual_tokens, torch.int64)
        return Message(self.identity, form, {"attention_mask": mask})

    @property
    def is_canonical(self) -> bool:
        """Whether this is that message: the header tells every form apart, and also a mask that was posted."""
        return self.header == self.canonical.header

    @cached_property
    def _slots(self) -> list[Slot]:
        extras = [Slot(name, extra.dtype, extra.shape, extra.nbytes, "extra") for name, extra in self.extras.items()]
        slots = extras + (self._layer_slots() if self.form.layout == "layers" else self._stacked_slots())
        widths = {dtype: dtype.itemsize for dtype in {slot.dtype for slot in slots}}
        return sorted(slots, key=lambda slot: -widths[slot.dtype])

    @cached_property
    def tensors(self) -> Mapping[str, Slot]:
        """What the message holds, in the order of the file."""
        return {slot.name: slot for slot in self._slots}

    def _layer_slots(self) -> list[Slot]:
        form, heads = self.form, self.form.kv_heads[1] - self.form.kv_heads[0]
        shape = (form.rows, heads, self.identity.num_virtual_tokens, self.identity.head_dim)
        dtype, slots = KV_DTYPES[form.dtype], []
        nbytes = prod(shape) * dtype.itemsize
        for index, layer in enumerate(range(*form.layers)):
            for part, name in enumerate(("key", "value")):
                full, place = f"past_key_values.{layer}.{name}", (index, part)
                slots.append(Slot(full, dtype, shape, nbytes, "values", place, form.rows))
                if form.dtype == "float8_e4m3fn":
                    slots.append(Slot(f"{full}_scale", torch.float32, (1, heads, 1, 1), 4 * heads, "scales", place))
        return slots

    def _stacked_slots(self) -> list[Slot]:
        form, dtype = self.form, KV_DTYPES[self.form.dtype]
        layers, heads = form.layers[1] - form.layers[0], form.kv_heads[1] - form.kv_heads[0]
        shape = (form.rows, layers, 2, heads, self.identity.num_virtual_tokens, self.identity.head_dim)
        slots = [Slot("past_key_values", dtype, shape, prod(shape) * dtype.itemsize, "values", (), form.rows)]
        if form.dtype == "float8_e4m3fn":
            scales, nbytes = (1, layers, 2, heads, 1, 1), 4 * 2 * layers * heads
            slots.append(Slot("past_key_values_scale", torch.float32, scales, nbytes, "scales"))
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
        """Returns what stands in front of keys and values, and behind them, where they are sent once and without
        scales."""
        before, after = bytearray(), bytearray()
        found = before
        for part in self._parts:
            if isinstance(part, _Span):
                found = after
            else:
                found += part if isinstance(part, bytes) else b"".join(chunks_of(part.pieces()))
        return bytes(before), bytes(after)

    @cached_property
    def _parts(self) -> list[bytes | Extra | _Span]:
        """The file in order: what is known without a rendering, what is made when it is sent, and spans of a rendering.
        Neighbours are joined where they can be."""
        parts: list[bytes | Extra | _Span] = [self.header]
        for slot in self._slots:
            last = parts[-1]
            if slot.source == "extra":
                extra = self.extras[slot.name]
                if isinstance(last, bytes) and extra.nbytes <= JOINED:
                    parts[-1] = b"".join((last, *chunks_of(extra.pieces())))
                else:
                    parts.append(extra)
                continue
            span = self._span_of(slot, slot.source)
            if isinstance(last, _Span) and _adjoin(last, span):
                parts[-1] = _Span(last.source, last.start, span.stop, 1)
            else:
                parts.append(span)
        return parts

    @property
    def planned_nbytes(self) -> int:
        """An estimate of the memory that the plan takes, but for a mask that was posted."""
        return 4096 + 4 * len(self.header) + sum(len(part) for part in self._parts if isinstance(part, bytes))

    def _span_of(self, slot: Slot, source: Part) -> _Span:
        row = slot.nbytes // slot.times
        # (layer, part) of (L', 2, …) in the order of memory; one tensor of all begins at 0
        start = row * (2 * slot.place[0] + slot.place[1]) if slot.place else 0
        return _Span(source, start, start + row, slot.times)

    def pieces(self, rendering: Rendering) -> Iterator[Piece]:
        """Yields the bytes of the file in order; rows that are repeated come once, with their number."""
        for part in self._parts:
            if isinstance(part, _Span):
                yield part.piece(rendering)
            elif isinstance(part, bytes):
                yield part, 1
            else:
                yield from part.pieces()

    def chunks(self, rendering: Rendering, start: int = 0, stop: int | None = None) -> Iterator[Bytes]:
        """Yields the bytes `start:stop` of the file in chunks of at most 8 MiB; long rows are sent where they lie."""
        stop = self.content_length if stop is None else stop
        if (start, stop) == (0, self.content_length):
            return chunks_of(self.pieces(rendering))
        return chunks_of(_clipped(self.pieces(rendering), start, stop))

    def chunks_of(self, name: str, rendering: Rendering) -> Iterator[Bytes]:
        """Yields the bytes of one tensor, in the same way."""
        slot = self.tensors[name]
        if slot.source == "extra":
            return chunks_of(self.extras[name].pieces())
        return chunks_of([self._span_of(slot, slot.source).piece(rendering)])


def chunks_of(pieces: Iterable[Piece]) -> Iterator[Bytes]:
    """Yields pieces in chunks of at most 8 MiB. Short rows that are repeated are copied, many to a chunk."""
    for row, times in pieces:
        together = min(times, _BLOCK // len(row)) if 0 < len(row) < JOINED else 1
        if together > 1:
            yield from repeat(bytes(row) * together, times // together)
            times %= together
            if times:
                yield bytes(row) * times
            continue
        for _ in range(times):
            yield from (row[at : at + CHUNK] for at in range(0, len(row), CHUNK))


def _clipped(pieces: Iterable[Piece], start: int, stop: int) -> Iterator[Piece]:
    """Yields the bytes `start:stop` of pieces."""
    position = 0
    for row, times in pieces:
        if position >= stop:
            return
        size = len(row)
        first, last = max(start - position, 0), min(stop - position, size * times)
        position += size * times
        if first >= last:
            continue
        head, tail = first // size, (last - 1) // size  # the rows of the first byte and of the last
        if head == tail:
            yield row[first - head * size : last - head * size], 1
        else:
            yield row[first - head * size :], 1
            yield row, tail - head - 1
            yield row[: last - tail * size], 1


def _adjoin(first: _Span, second: _Span) -> bool:
    """Whether two spans that are sent once are one."""
    return first.source == second.source and first.stop == second.start and first.times == second.times == 1

"""A prefix as a safetensors file, with canonical bytes and without copies; `received` parses it.

The header is written here because an ETag and a digest cover the bytes, and safetensors' own writer orders metadata by
a hash map. Layout: 8 bytes little-endian header length, a JSON header padded with spaces so that the data begins at a
multiple of 64, then the tensors, widest dtype first, so that each is aligned to its element.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product, repeat
from math import prod
from typing import Any, Final, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from prefix_service.prefix.buffers import memory_of
from prefix_service.prefix.safetensors_tensors import NAMES
from prefix_service.prefix.variant import FORMAT, Identity, Layout, MaskDtype, Variant
from prefix_service.prefix.wire.masks import AttentionMask, Bytes, Extra, Piece
from prefix_service.prefix.wire.rendering import BufferName, DtypeGroup, Rendering, dtype_groups

_ALIGNMENT: Final = 64
_LENGTH: Final = struct.Struct("<Q")
JOINED: Final = 1 << 16  # bytes, below which a copy is cheaper than a send of its own
_BLOCK: Final = 1 << 18  # bytes of short rows that are joined
CHUNK: Final = 8 << 20  # bytes, which the event loop copies at most for a slow reader

MASK_DTYPES: Final[Mapping[MaskDtype, torch.dtype]] = {name: getattr(torch, name) for name in get_args(MaskDtype)}


SlotSource = BufferName | Literal["extra"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a file, known before its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class Slot(NamedTuple):
    """One tensor of a file. `source` has one row of it, behind `place` others of its size; the row is sent `times`
    times."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    source: SlotSource
    place: int = 0
    times: int = 1


_ByteRun = tuple[BufferName, int, int, int]
"""The bytes `start:stop` of a rendering's buffer, by its name, and how many times they are sent.

Plans are kept, and may have thousands of runs: a collection of garbage does not look through plain tuples of texts and
numbers, as it would through instances of a class.
"""


def write_header(metadata: Mapping[str, Any], tensors: Iterable[TensorSpec | Slot]) -> bytes:
    """Returns length and JSON header, padded, of a file with `metadata` and with these tensors in order."""
    # RFC 8785 for what stands here: ASCII keys, strings, integers, booleans, null, and lists and objects of these.
    prefix = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    members = [json.dumps({"__metadata__": {"prefix": prefix}}, separators=(",", ":"), ensure_ascii=False)[1:-1]]
    position = 0
    # A file may have thousands of tensors of very few shapes: the text of each shape is written once.
    known: dict[tuple[torch.dtype, tuple[int, ...]], tuple[str, int]] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.shape
        if kind not in known:
            shape = ",".join(map(str, tensor.shape))
            known[kind] = f'"dtype":"{NAMES[tensor.dtype]}","shape":[{shape}]', tensor.nbytes
        fields, nbytes = known[kind]
        members.append(f'"{tensor.name}":{{{fields},"data_offsets":[{position},{position + nbytes}]}}')
        position += nbytes
    text = f"{{{','.join(members)}}}".encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


@dataclass(frozen=True)
class PrefixFile:
    """A response planned from sizes alone: header and length are known before a tensor is touched.

    The tensors are those of `identity` in `variant`, and `extras` (masks and position ids) by name.
    """

    identity: Identity
    variant: Variant
    extras: Mapping[str, Extra]

    @property
    def canonical(self) -> "PrefixFile":
        """The file in which this project's client asks for the same rendering: one row, and one tensor if keys and
        values have one dtype.
        """
        layout: Layout = "layers" if self.variant.dtypes.single is None else "stacked"
        variant = replace(self.variant, batch_size=1, layout=layout, expand=False)
        mask = AttentionMask(1, self.identity.num_virtual_tokens, torch.int64)
        return PrefixFile(self.identity, variant, {"attention_mask": mask})

    @property
    def is_canonical(self) -> bool:
        """Whether this is the canonical file.

        The headers differ for every other variant, and for a mask that was posted.
        """
        return self.header == self.canonical.header

    @cached_property
    def _slots(self) -> list[Slot]:
        extras = [Slot(name, extra.dtype, extra.shape, extra.nbytes, "extra") for name, extra in self.extras.items()]
        slots = extras + (self._layer_slots() if self.variant.layout == "layers" else self._stacked_slots())
        widths = {dtype: dtype.itemsize for dtype in {slot.dtype for slot in slots}}
        return sorted(slots, key=lambda slot: -widths[slot.dtype])

    @cached_property
    def tensors(self) -> Mapping[str, Slot]:
        """The tensors by name, in the order of the file."""
        return {slot.name: slot for slot in self._slots}

    def _layer_slots(self) -> list[Slot]:
        variant, slots = self.variant, []
        for group, (source, dtype, suffix) in self._buffers:
            rows, tail = self._rows_and_tail(suffix)
            shape = (rows, variant.kv_heads[1] - variant.kv_heads[0], *tail)
            nbytes = prod(shape) * dtype.itemsize
            places = product(range(*variant.layers), group.parts)
            for place, (layer, part) in enumerate(places):  # as the buffer has them: (L', P, …)
                name = f"past_key_values.{layer}.{('key', 'value')[part]}{suffix}"
                slots.append(Slot(name, dtype, shape, nbytes, source, place, rows))
        return slots

    def _stacked_slots(self) -> list[Slot]:
        variant, slots = self.variant, []
        layers, heads = variant.layers[1] - variant.layers[0], variant.kv_heads[1] - variant.kv_heads[0]
        for group, (source, dtype, suffix) in self._buffers:
            rows, tail = self._rows_and_tail(suffix)
            shape = (rows, layers, len(group.parts), heads, *tail)
            nbytes = prod(shape) * dtype.itemsize
            slots.append(Slot(f"past_key_values{suffix}", dtype, shape, nbytes, source, 0, rows))
        return slots

    @property
    def _buffers(self) -> Iterator[tuple[DtypeGroup, tuple[BufferName, torch.dtype, str]]]:
        return ((group, buffer) for group in dtype_groups(self.variant.dtypes) for buffer in group.buffers)

    def _rows_and_tail(self, suffix: str) -> tuple[int, tuple[int, int]]:
        """Returns the rows of a tensor, and its last two sizes: scales have one row, and stand for all tokens."""
        tail = self.identity.num_virtual_tokens, self.identity.head_dim
        return (1, (1, 1)) if suffix else (self.variant.rows, tail)

    @cached_property
    def rendering_nbytes(self) -> int:
        """The size in bytes of the rendering that the file is made of."""
        return sum(slot.nbytes // slot.times for slot in self._slots if slot.source != "extra")

    @property
    def header(self) -> bytes:
        """Length and JSON header, padded."""
        first = cast(bytes, self._parts[0])  # kept once, with the small tensors that are sent behind it
        return first[: _LENGTH.size + _LENGTH.unpack_from(first)[0]]

    @cached_property
    def content_length(self) -> int:
        """The size of the whole file in bytes."""
        return len(self.header) + sum(slot.nbytes for slot in self._slots)

    def plan(self) -> None:
        """Computes everything that is needed to send the file, and keeps nothing else: milliseconds for a thousand
        layers.
        """
        _ = self.content_length, self.rendering_nbytes, self.planned_nbytes
        self.__dict__.pop("_slots")

    def around_values(self) -> tuple[bytes, bytes]:
        """Returns the bytes in front of keys and values and behind them, for a
        file that sends them once and without scales.
        """
        before, after = bytearray(), bytearray()
        found = before
        for part in self._parts:
            if isinstance(part, tuple):
                found = after
            else:
                found += part if isinstance(part, bytes) else b"".join(chunks_of(part.pieces()))
        return bytes(before), bytes(after)

    @cached_property
    def _parts(self) -> list[bytes | Extra | _ByteRun]:
        """The file in order: bytes that need no rendering, extras that are made when they are sent, and runs of a
        rendering.

        Adjacent bytes are joined, and so are adjacent runs.
        """
        metadata = {"format": FORMAT, **asdict(self.identity), **self.variant.as_metadata()}
        parts: list[bytes | Extra | _ByteRun] = [write_header(metadata, self._slots)]
        for slot in self._slots:
            last = parts[-1]
            if slot.source == "extra":
                extra = self.extras[slot.name]
                if isinstance(last, bytes) and extra.nbytes <= JOINED:
                    parts[-1] = b"".join((last, *chunks_of(extra.pieces())))
                else:
                    parts.append(extra)
                continue
            run = self._run_of(slot, slot.source)
            if isinstance(last, tuple) and _adjoin(last, run):
                source, start, _, _ = last
                parts[-1] = source, start, run[2], 1
            else:
                parts.append(run)
        return parts

    @property
    def planned_nbytes(self) -> int:
        """An estimate of the memory that the plan takes, in bytes, without a mask that was posted."""
        return 4096 + sum(160 + (len(part) if isinstance(part, bytes) else 0) for part in self._parts)

    def _run_of(self, slot: Slot, source: BufferName) -> _ByteRun:
        row = slot.nbytes // slot.times
        start = row * slot.place
        return source, start, start + row, slot.times

    def mapped(self, rendering: Rendering, body: memoryview) -> Mapping[BufferName, Tensor]:
        """Returns the buffers of a rendering as views of the body of its canonical file, which this is."""
        memory, position = memory_of(body), len(self.header)
        starts: dict[SlotSource, int] = {}
        for slot in self._slots:  # those of a buffer are adjacent, in its order
            starts.setdefault(slot.source, position)
            position += slot.nbytes
        return {
            name: memory[starts[name] :][: buffer.nbytes].view(buffer.dtype).view(buffer.shape)
            for name, buffer in rendering.buffers.items()
        }

    def pieces(self, rendering: Rendering) -> Iterator[Piece]:
        """Yields the bytes of the file in order; a repeated row is one piece with its number of repetitions."""
        for part in self._parts:
            if isinstance(part, tuple):
                yield _piece(part, rendering)
            elif isinstance(part, bytes):
                yield part, 1
            else:
                yield from part.pieces()

    def chunks(self, rendering: Rendering, start: int = 0, stop: int | None = None) -> Iterator[Bytes]:
        """Yields the bytes `start:stop` of the file in chunks of at most 8 MiB; long rows are not copied."""
        stop = self.content_length if stop is None else stop
        if (start, stop) == (0, self.content_length):
            return chunks_of(self.pieces(rendering))
        return chunks_of(_clipped(self.pieces(rendering), start, stop))

    def chunks_of(self, name: str, rendering: Rendering) -> Iterator[Bytes]:
        """Yields the bytes of one tensor in chunks of at most 8 MiB; long rows are not copied."""
        slot = self.tensors[name]
        if slot.source == "extra":
            return chunks_of(self.extras[name].pieces())
        return chunks_of([_piece(self._run_of(slot, slot.source), rendering)])


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
    """Yields the pieces that hold the bytes `start:stop`."""
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


def _piece(run: _ByteRun, rendering: Rendering) -> Piece:
    source, start, stop, times = run
    return rendering.bytes_of(source)[start:stop], times


def _adjoin(first: _ByteRun, second: _ByteRun) -> bool:
    """Returns whether two runs are adjacent and sent once, so that they can be joined."""
    return (first[0], first[2], first[3]) == (second[0], second[1], 1) and second[3] == 1

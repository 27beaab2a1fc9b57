"""`prefix.wire.prefix_file` writes canonical bytes that every safetensors reader understands, without copies."""

import gc
import json
import struct
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import rfc8785
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from prefix_service.errors import InvalidResponse
from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.variant import DtypePair, Identity, KVDtype, Layout, MaskDtype, Span, Variant
from prefix_service.prefix.wire.masks import AttentionMask
from prefix_service.prefix.wire.prefix_file import MASK_DTYPES, PrefixFile
from prefix_service.prefix.wire.received import Received, read_kv, read_prefix_file
from prefix_service.prefix.wire.rendering import KV_DTYPES, Rendering, render

L, H, N, D = 3, 2, 5, 4
WHOLE = PrefixKV.whole(torch.randn(L, 2, H, N, D, generator=torch.Generator().manual_seed(0)))
IDENTITY = Identity("acme", "summarize", 7, "sha256:" + "ab" * 32, "PREFIX_TUNING", "gpt2", N, L, H, D)


def asked(
    dtype: KVDtype = "float32",
    rows: int = 1,
    layout: Layout = "layers",
    *,
    expand: bool = True,
    layers: Span = (0, L),
    heads: Span = (0, H),
    value_dtype: KVDtype | None = None,
) -> Variant:
    return Variant(DtypePair(dtype, value_dtype or dtype), rows, layers, heads, layout, expand)


def file_of(variant: Variant, mask: MaskDtype = "int64", identity: Identity = IDENTITY) -> PrefixFile:
    return PrefixFile(identity, variant, {"attention_mask": AttentionMask(variant.batch_size, N, MASK_DTYPES[mask])})


def rendering_of(variant: Variant, kv: PrefixKV = WHOLE) -> Rendering:
    return render(kv.sliced(variant.layers, variant.kv_heads), variant.dtypes)


def body_of(file: PrefixFile, kv: PrefixKV = WHOLE, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join(file.chunks(rendering_of(file.variant, kv), start, stop))


dtypes = st.sampled_from(list(KV_DTYPES))
variants = st.builds(
    asked,
    dtype=dtypes,
    value_dtype=dtypes,
    rows=st.integers(1, 3),
    layout=st.sampled_from(["layers", "stacked"]),
    expand=st.booleans(),
    layers=st.sampled_from([(0, L), (1, 2), (1, 3)]),
    heads=st.sampled_from([(0, H), (1, 2)]),
).filter(lambda variant: variant.dtypes.single is not None or variant.layout == "layers")
files = st.builds(file_of, variants, st.sampled_from(list(MASK_DTYPES)))

# A version of one layer, one head, one token of size 2: the key is [1, -2], the value [0.5, 3].
TINY = PrefixKV.whole(torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, 2, 1, 1, 2))
TINY_IDENTITY = Identity("t", "a", 1, "sha256:0", "PREFIX_TUNING", 'm\u00fc"\\\n\u007f', 1, 1, 1, 2)
GOLDEN = (
    b"\x78\x02\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"prefix":"{\\"adapter\\":\\"a\\",\\"base_model_name_or_path\\":\\"m\xc3\xbc\\\\\\"\\\\\\\\\\\\n\x7f\\",'
    b'\\"batch_size\\":2,\\"digest\\":\\"sha256:0\\",\\"dtype\\":\\"bfloat16\\",\\"expand\\":true,\\"format\\":1,'
    b'\\"head_dim\\":2,\\"kv_heads\\":[0,1],\\"layers\\":[0,1],\\"layout\\":\\"layers\\",\\"num_kv_heads\\":1,'
    b'\\"num_layers\\":1,\\"num_virtual_tokens\\":1,\\"peft_type\\":\\"PREFIX_TUNING\\",\\"tenant\\":\\"t\\",'
    b'\\"version\\":1}"},'
    b'"attention_mask":{"dtype":"I64","shape":[2,1],"data_offsets":[0,16]},'
    b'"past_key_values.0.key":{"dtype":"BF16","shape":[2,1,1,2],"data_offsets":[16,24]},'
    b'"past_key_values.0.value":{"dtype":"BF16","shape":[2,1,1,2],"data_offsets":[24,32]}}'
    b"          "
    b"\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00"
    b"\x80\x3f\x00\xc0\x80\x3f\x00\xc0"
    b"\x00\x3f\x40\x40\x00\x3f\x40\x40"
)


def test_golden_bytes() -> None:
    """A tiny answer has exactly these bytes: changing one of them would change every ETag and digest in the world."""
    variant = Variant(DtypePair.both("bfloat16"), 2, (0, 1), (0, 1), "layers", expand=True)
    file = PrefixFile(TINY_IDENTITY, variant, {"attention_mask": AttentionMask(2, 1, torch.int64)})
    assert body_of(file, TINY) == GOLDEN


@given(st.text(max_size=20))
def test_the_metadata_is_canonical_json(name: str) -> None:
    """The metadata is canonical JSON (RFC 8785), whatever the base model's name."""
    file = file_of(asked(), identity=replace(IDENTITY, base_model_name_or_path=name))
    text = json.loads(file.header[8:])["__metadata__"]["prefix"]
    assert text.encode() == rfc8785.dumps(json.loads(text))
    assert json.loads(text)["base_model_name_or_path"] == name


def cast(part: Tensor, dtype: KVDtype) -> tuple[Tensor, Tensor | None]:
    """Returns keys or values `[H', N, D]` as torch itself casts them, and the scales `[H', 1, 1]` of float8."""
    if dtype != "float8_e4m3fn":
        return part.to(KV_DTYPES[dtype]), None
    scale = part.abs().amax(dim=(1, 2), keepdim=True) / 448
    return (part / scale).to(torch.float8_e4m3fn), scale


def expected_tensors(variant: Variant, mask: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that the contract promises, made by torch alone."""
    found = {"attention_mask": mask}
    for layer in range(*variant.layers):
        for part, (name, dtype) in enumerate(zip(("key", "value"), variant.dtypes, strict=True)):
            values, scale = cast(WHOLE.tensor[layer, part, slice(*variant.kv_heads)], dtype)
            found[f"past_key_values.{layer}.{name}"] = values.expand(variant.rows, *values.shape)
            if scale is not None:
                found[f"past_key_values.{layer}.{name}_scale"] = scale[None]
    if variant.layout == "layers":
        return found
    stacked = {"attention_mask": mask}
    for suffix in ("", "_scale") if variant.dtypes.single == "float8_e4m3fn" else ("",):
        pairs = [
            torch.stack([found[f"past_key_values.{layer}.{name}{suffix}"] for name in ("key", "value")], 1)
            for layer in range(*variant.layers)
        ]
        stacked[f"past_key_values{suffix}"] = torch.stack(pairs, 1)
    return stacked


@given(files)
def test_any_safetensors_reader_understands_it(file: PrefixFile) -> None:
    """safetensors itself reads the right names, shapes, dtypes and values, in every variant."""
    body = body_of(file)
    assert len(body) == file.content_length
    wanted = expected_tensors(file.variant, file.extras["attention_mask"].rows(0, file.variant.batch_size))
    found = load(body)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(found[name].float(), tensor.float())


@given(files)
def test_the_client_reads_it_too(file: PrefixFile) -> None:
    """The client reads the tensors and the metadata that the contract promises."""
    data = bytearray(body_of(file))
    received = read_prefix_file(data)
    wanted = expected_tensors(file.variant, file.extras["attention_mask"].rows(0, file.variant.batch_size))
    assert received.tensors.keys() == wanted.keys()
    assert all(torch.equal(received.tensors[name].float(), tensor.float()) for name, tensor in wanted.items())
    assert received.metadata.items() >= {"format": 1, "tenant": "acme", "batch_size": file.variant.batch_size}.items()
    assert received.metadata["layers"] == list(file.variant.layers)


@given(files)
def test_every_tensor_is_aligned(file: PrefixFile) -> None:
    """The data begins at a multiple of 64 and each tensor at one of its element's size, so the file can be mapped."""
    (length,) = struct.unpack("<Q", file.header[:8])
    fields = json.loads(file.header[8:])
    del fields["__metadata__"]
    assert (8 + length) % 64 == 0
    assert len(file.header) == 8 + length
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "BOOL": 1}
    assert all(field["data_offsets"][0] % sizes[field["dtype"]] == 0 for field in fields.values())


@given(files)
def test_the_same_question_has_the_same_bytes(file: PrefixFile) -> None:
    """Two files that are planned apart from equal requests have equal bytes."""
    again = PrefixFile(replace(file.identity), replace(file.variant), dict(file.extras))
    assert body_of(again) == body_of(file)


@settings(deadline=None, max_examples=200)
@given(files, st.data())
def test_a_range_is_that_slice_of_the_whole(file: PrefixFile, data: st.DataObject) -> None:
    """`chunks` sends any `start:stop` of the body, header included, as that slice of the whole."""
    whole = body_of(file)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert body_of(file, WHOLE, start, stop) == whole[start:stop]


@given(files)
def test_a_tensor_alone_is_that_part_of_the_whole(file: PrefixFile) -> None:
    """Header and tensors in their order are the whole body, and each tensor has the bytes that the file announces."""
    rendering = rendering_of(file.variant)
    bodies = {name: b"".join(file.chunks_of(name, rendering)) for name in file.tensors}
    assert file.header + b"".join(bodies.values()) == body_of(file)
    assert {name: len(body) for name, body in bodies.items()} == {
        name: tensor.nbytes for name, tensor in file.tensors.items()
    }


def test_chunks_are_small_enough_for_a_slow_reader() -> None:
    """Chunks from any offset have at most 8 MiB each and are together the rest of the body."""
    kv = PrefixKV.whole(torch.zeros(1, 2, 1, 5, 1 << 19))
    identity = replace(IDENTITY, num_layers=1, num_kv_heads=1, head_dim=1 << 19)
    file = PrefixFile(identity, asked(layers=(0, 1), heads=(0, 1)), {})
    sizes = [len(chunk) for chunk in file.chunks(rendering_of(file.variant, kv), 3)]
    assert max(sizes) == 8 << 20
    assert sum(sizes) == file.content_length - 3


def test_chunks_share_memory_with_the_rendering() -> None:
    """Every long row is the rendering's own memory, sent again for each row."""
    kv = PrefixKV.whole(torch.randn(1, 2, 1, 1, 1 << 14))  # rows of 64 KiB
    identity = replace(IDENTITY, num_layers=1, num_kv_heads=1, num_virtual_tokens=1, head_dim=1 << 14)
    file = file_of(asked(rows=3, layers=(0, 1), heads=(0, 1)), identity=identity)
    rendering = rendering_of(file.variant, kv)
    chunks = list(file.chunks(rendering))[1:]  # behind header and mask
    before = bytes(chunks[0])
    rendering.buffers["key_value"].neg_()
    assert len(chunks) == 2 * 3
    assert chunks[0] == chunks[1] == chunks[2] != before


def test_short_rows_are_joined() -> None:
    """A thousand rows of 40 bytes are sent in fewer than five chunks."""
    file = file_of(asked(rows=1000, layout="stacked", layers=(0, 1), heads=(0, 1)))
    chunks = list(file.chunks(rendering_of(file.variant)))
    assert b"".join(chunks) == body_of(file)
    assert len(chunks) < 5


def test_a_large_batch_takes_no_memory() -> None:
    """256 rows of 1.3 MB are sent from the memory of one."""
    kv = PrefixKV.whole(torch.zeros(4, 2, 8, 20, 256))
    identity = replace(IDENTITY, num_layers=4, num_kv_heads=8, num_virtual_tokens=20, head_dim=256)
    variant = asked(rows=256, layers=(0, 4), heads=(0, 8))
    file, rendering = PrefixFile(identity, variant, {}), rendering_of(variant, kv)
    tracemalloc.start()
    sent = sum(len(chunk) for chunk in file.chunks(rendering))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sent == file.content_length > 256 * kv.nbytes
    assert peak < 100_000
    assert rendering.buffers["key_value"].data_ptr() == kv.tensor.data_ptr()


@pytest.mark.parametrize("layers", [1, 32, 1000])
@pytest.mark.parametrize(("layout", "rows"), [("layers", 1), ("layers", 8), ("stacked", 1)])
def test_a_plan_takes_the_memory_that_is_counted_for_it(layers: int, layout: Layout, rows: int) -> None:
    """Plans are kept by the bytes that `planned_nbytes` estimates: they hold at most that, and not much less."""
    identity = replace(IDENTITY, num_layers=layers)
    asked_for = asked("bfloat16", rows, layout, layers=(0, layers))
    file_of(asked_for, identity=identity).plan()  # what all plans share
    gc.collect()  # also empties CPython's lists of free tuples, which would be used again without being traced
    tracemalloc.start()
    try:
        kept = [file_of(asked_for, identity=identity) for _ in range(20)]
        for file in kept:
            file.plan()
        real = tracemalloc.get_traced_memory()[0] / len(kept)
    finally:
        tracemalloc.stop()
    assert real <= kept[0].planned_nbytes <= real + 4096 + 0.2 * real


def test_bytes_outlive_their_tensor() -> None:
    """A view keeps its memory alive, so a transfer can go on when its version is evicted."""
    view = bytes_of(torch.full((1000,), 7, dtype=torch.int64))
    torch.full((1000,), 8, dtype=torch.int64)
    assert bytes(view) == struct.pack("<Q", 7) * 1000


def test_unexpanded_values_come_once() -> None:
    """With `expand=false` keys and values have one row, and the mask has all rows."""
    received = read_prefix_file(bytearray(body_of(file_of(asked(rows=5, expand=False)))))
    assert received.tensors["past_key_values.0.key"].shape == (1, H, N, D)
    assert received.tensors["attention_mask"].shape == (5, N)
    assert received.metadata["batch_size"] == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_rounded_to_nearest_even(dtype: KVDtype) -> None:
    """Rendering rounds to a half as torch's own cast does."""
    assert torch.equal(render(WHOLE, DtypePair.both(dtype)).buffers["key_value"], WHOLE.tensor.to(KV_DTYPES[dtype]))


tensors = st.lists(st.floats(-1e6, 1e6, width=32, allow_nan=False), min_size=N * D, max_size=N * D)


@given(tensors, st.sampled_from([1.0, 1e-20, 1e-38, 1e-44, 1e30]))
def test_float8_is_within_its_error(values: list[float], magnitude: float) -> None:
    """With a head's largest value at 448, any value is off by half a step: 1/16 of itself, or 2^-10 of the scale."""
    exact = (torch.tensor(values) * magnitude).view(1, 1, 1, N, D).expand(1, 2, 1, N, D)
    rendering = render(PrefixKV.whole(exact), DtypePair.both("float8_e4m3fn"))
    assert rendering.buffers["key_value_scale"].shape == (1, 2, 1, 1, 1)
    scales = rendering.buffers["key_value_scale"]
    error = (rendering.buffers["key_value"].float() * scales - exact).abs()
    assert bool((error <= exact.abs() * (1 / 16 + 1e-6) + scales * 2**-10 * (1 + 1e-6)).all())


def test_float8_scales_belong_to_layer_and_head() -> None:
    """Each layer's and head's largest value reaches 448; a head of zeros stays zero and has a positive scale."""
    kv = WHOLE.tensor.clone()
    kv[0, 0, 0] = 0
    kv[1] *= 1000
    rendering = render(PrefixKV.whole(kv), DtypePair.both("float8_e4m3fn"))
    largest = rendering.buffers["key_value"].float().abs().amax(dim=(3, 4))
    assert largest[0, 0, 0] == 0
    assert bool((rendering.buffers["key_value_scale"] > 0).all())
    largest[0, 0, 0] = 448
    assert bool((largest == 448).all())


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("value_dtype", list(KV_DTYPES))
@pytest.mark.parametrize("dtype", list(KV_DTYPES))
def test_a_row_comes_back_as_a_prefix(dtype: KVDtype, value_dtype: KVDtype, layout: Layout) -> None:
    """`read_kv` returns the values that were sent, with the model's numbers; float8 and two dtypes as float32."""
    variant = asked(dtype, layout=layout, layers=(1, 3), heads=(1, 2), value_dtype=value_dtype)
    if layout == "stacked" and dtype != value_dtype:
        return
    kv = read_kv(read_prefix_file(bytearray(body_of(file_of(variant)))))
    assert (kv.layers, kv.kv_heads, kv.num_layers, kv.num_kv_heads) == ((1, 3), (1, 2), L, H)
    one = dtype == value_dtype != "float8_e4m3fn"
    assert kv.tensor.dtype == (KV_DTYPES[dtype] if one else torch.float32)
    for part, kind in enumerate((dtype, value_dtype)):
        for layer in (1, 2):
            values, scale = cast(WHOLE.tensor[layer, part, 1:2], kind)
            wanted = values.float() if scale is None else values.float() * scale
            assert torch.equal(kv.tensor[layer - 1, part].float(), wanted)


def test_two_dtypes_have_the_bytes_of_each() -> None:
    """Keys and values take the bytes of their own dtype, and float8 four more for each of its layers and heads."""
    for dtype, value_dtype in product(KV_DTYPES, repeat=2):
        file = file_of(asked(dtype, value_dtype=value_dtype))
        sizes = [
            KV_DTYPES[kind].itemsize * L * H * N * D + 4 * L * H * (kind == "float8_e4m3fn")
            for kind in (dtype, value_dtype)
        ]
        assert file.rendering_nbytes == rendering_of(file.variant).nbytes == sum(sizes)


def test_a_canonical_file_is_mapped_as_its_rendering() -> None:
    """Each buffer of a rendering lies in one piece in the canonical file, whatever the two dtypes."""
    for dtype, value_dtype in product(KV_DTYPES, repeat=2):
        file = file_of(asked(dtype, rows=3, value_dtype=value_dtype))
        rendering = rendering_of(file.variant)
        mapped = file.canonical.mapped(rendering, memoryview(bytearray(body_of(file.canonical))))
        assert mapped.keys() == rendering.buffers.keys()
        for name, buffer in rendering.buffers.items():
            assert torch.equal(mapped[name].view(torch.uint8), buffer.view(torch.uint8))


SOUND = body_of(file_of(asked(layout="stacked")))


def foreign(prefix: str | None) -> bytes:
    return save({"a": torch.zeros(1)}, metadata=None if prefix is None else {"prefix": prefix})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SOUND[:-1], "not a prefix: .*truncated"),
        (SOUND + b"\0", "not a prefix: .*trailing"),
        (b"", "not a prefix: .*too few"),
        (b"<html>502 Bad Gateway</html>", "not a prefix: "),
        (foreign(None), "not a prefix in a format that this client reads"),
        (foreign("[]"), "not a prefix in a format that this client reads"),
        (foreign('{"format":2}'), "not a prefix in a format that this client reads"),
        (foreign("{"), "not a prefix: "),
        (foreign("[" * 100_000), "not a prefix: "),
    ],
    ids=["truncated", "trailing", "empty", "html", "foreign", "list", "newer", "half", "deep"],
)
def test_an_answer_that_is_no_prefix(data: bytes, message: str) -> None:
    """The reader raises InvalidResponse for any bytes that are not a prefix."""
    with pytest.raises(InvalidResponse, match=message):
        read_prefix_file(bytearray(data))


def changed(metadata: Mapping[str, Any] | None = None, **tensors: Tensor) -> Received:
    sound = read_prefix_file(bytearray(SOUND))
    return Received({**sound.metadata, **(metadata or {})}, {**sound.tensors, **tensors})


@pytest.mark.parametrize(
    ("received", "message"),
    [
        (changed({"layers": None}), "not that of a prefix: layers should be two integers, got None"),
        (changed({"layers": [0]}), r"not that of a prefix: layers should be two integers, got \[0\]"),
        (changed({"layers": [0, 4]}), r"layers should be a range within 0:3, got \[0, 4\]"),
        (changed({"kv_heads": [1, 1]}), r"kv_heads should be a range within 0:2, got \[1, 1\]"),
        (changed({"num_layers": None}), "num_layers should be a positive integer, got None"),
        (changed({"num_layers": True}), "num_layers should be a positive integer, got True"),
        (changed({"version": "1"}), "version should be a positive integer, got '1'"),
        (changed({"digest": "sha256:1\r\nX: 1"}), r"digest should be sha256:<64 hex digits>, got 'sha256:1\\r"),
        (changed({"tenant": 7}), "tenant should be a text, got 7"),
        (
            changed({"key_dtype": "int8", "value_dtype": "float32"}),
            "key_dtype should be one of float32, .*, got 'int8'",
        ),
        (changed({"key_dtype": "float32"}), "value_dtype should be one of float32, .*, got None"),
        (
            changed({"dtype": "float16", "key_dtype": "float32", "value_dtype": "float32"}),
            "dtype should be 'float32' beside key_dtype and value_dtype, got 'float16'",
        ),
        (
            changed({"key_dtype": "float32", "value_dtype": "float16"}),
            "dtype should be None beside key_dtype and value_dtype, got 'float32'",
        ),
        (
            changed({"dtype": None, "key_dtype": "float32", "value_dtype": "float16"}),
            "the layout stacked, and two dtypes",
        ),
        (changed({"expand": 0}), "expand should be one of True, False, got 0"),
        (Received({"format": 1}, {}), "tenant should be a text, got None"),
        (
            changed({"head_dim": 9}),
            r"past_key_values .* float32 \[1, 3, 2, 2, 5, 9\], got float32 \[1, 3, 2, 2, 5, 4\]",
        ),
        (changed({"layers": [0, 2]}), r"past_key_values .* float32 \[1, 2, 2, 2, 5, 4\], got"),
        (changed(DtypePair.both("float16").as_metadata()), "past_key_values .* float16 .*, got float32"),
        (changed(DtypePair.both("float8_e4m3fn").as_metadata()), "past_key_values .* float8_e4m3fn .*, got float32"),
        (read_prefix_file(bytearray(body_of(file_of(asked(rows=2))))), "has 2 rows, where one row was expected"),
        (changed({"layout": "layers"}), "has 2 tensors, too few for 3 layers"),
        (changed(past_key_values_scale=torch.ones(7)), r"past_key_values_scale .* should be none, got float32 \[7\]"),
        (changed({"num_virtual_tokens": 6}), r"attention_mask .* int64 \[1, 6\], got int64 \[1, 5\]"),
        (changed(past_key_values=torch.zeros(1)), r"past_key_values .* got float32 \[1\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_contradicts_itself(received: Received, message: str) -> None:
    """The reader makes a prefix only of metadata and tensors that agree."""
    with pytest.raises(InvalidResponse, match=message):
        read_kv(received)

"""float8 on the wire is compared, bit by bit, with the definition of OCP's E4M3, in which 0x7f is NaN."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefix_service.prefix.kv import PrefixKV
from prefix_service.prefix.variant import DtypePair, Identity, Variant
from prefix_service.prefix.wire import rendering as wire_rendering
from prefix_service.prefix.wire.masks import AttentionMask
from prefix_service.prefix.wire.prefix_file import PrefixFile
from prefix_service.prefix.wire.received import read_kv, read_prefix_file
from prefix_service.prefix.wire.rendering import Rendering, render

L, H, N, D = 2, 3, 5, 16
IDENTITY = Identity("a", "b", 1, "sha256:" + "0" * 64, "PREFIX_TUNING", "base", N, L, H, D)


def e4m3(byte: int) -> float:
    """Returns the number of eight bits: sign, four bits of exponent with bias 7, three bits of fraction."""
    sign, exponent, fraction = -1.0 if byte >> 7 else 1.0, byte >> 3 & 15, byte & 7
    if (exponent, fraction) == (15, 7):
        return float("nan")
    return sign * (fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2 ** (exponent - 7))


POSITIVE = torch.tensor([e4m3(byte) for byte in range(127)], dtype=torch.float64)


def nearest(values: Tensor) -> Tensor:
    """Returns, as int64, the bits of the number that is nearest to each value, and of two equally near the even one."""
    distance = (values.double().abs()[..., None] - POSITIVE).abs()
    ties = distance == distance.amin(-1, keepdim=True)
    bits = torch.where(ties, torch.arange(127) + 1000 * (torch.arange(127) % 2), 10_000).argmin(-1)
    return bits + 128 * values.signbit()


def drawn(spread: float) -> PrefixKV:
    """Returns values over many powers of two, with one head of zeros, and half of another on ties."""
    draw = torch.Generator().manual_seed(int(spread))
    values = torch.randn(L, 2, H, N, D, generator=draw) * torch.exp(spread * torch.randn(L, 2, H, N, D, generator=draw))
    values[0, 0, 0] = 0
    between = (POSITIVE[1:] + POSITIVE[:-1]) / 2
    values[1, 1, 2].view(-1)[:] = between[-N * D :].float()
    values[1, 1, 2, 0, 0] = 448  # the scale is 1: those stay ties
    return PrefixKV.whole(values)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_every_byte_is_the_nearest_number_to_value_by_scale(spread: float) -> None:
    """Each byte is the float32 quotient rounded to nearest, ties to even, as by torch's own cast."""
    kv = drawn(spread)
    rendering = render(kv, DtypePair.both("float8_e4m3fn"))
    quotients = kv.tensor / rendering.buffers["key_value_scale"]
    bits = rendering.buffers["key_value"].view(torch.uint8).to(torch.int64)
    assert torch.equal(bits, nearest(quotients))
    assert torch.equal(bits, quotients.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int64))


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Notes the most values of a float32 tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation."""
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32 and not func.is_view:
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("block", [1, 2 * N * D, 2 * H * N * D, 3 * 2 * H * N * D])
def test_scaling_takes_the_memory_of_a_block(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The bits are those of one step for all, for blocks of one head, of one layer, or of several layers."""
    kv = PrefixKV.whole(drawn(1.0).tensor.repeat(4, 1, 1, 1, 1))
    whole = render(kv, DtypePair.both("float8_e4m3fn"))
    monkeypatch.setattr(wire_rendering, "_BLOCK", block)
    with _Made() as made:  # type: ignore[no-untyped-call]
        found = render(kv, DtypePair.both("float8_e4m3fn"))
    assert torch.equal(found.buffers["key_value"].view(torch.uint8), whole.buffers["key_value"].view(torch.uint8))
    assert torch.equal(found.buffers["key_value_scale"], whole.buffers["key_value_scale"])
    assert made.most <= max(block, 2 * N * D)


def test_values_are_divided_by_their_scale() -> None:
    """Rendering divides by the scale: multiplying by its reciprocal would round twice and send 9 instead of 10 here."""
    largest, value = float.fromhex("0x1.3e1558p+1"), float.fromhex("0x1.afaf4p-14")
    values = torch.zeros(L, 2, H, N, D)
    values[0, 0, 0, 0, :2] = torch.tensor([largest, value])
    found = render(PrefixKV.whole(values), DtypePair.both("float8_e4m3fn")).buffers["key_value"].view(torch.uint8)
    assert found[0, 0, 0, 0, :2].tolist() == [126, 10]


def test_what_arrives_is_byte_times_scale() -> None:
    """The client decodes each byte as the definition's number times the scale of its head, in float32."""
    rendering = render(drawn(2.0), DtypePair.both("float8_e4m3fn"))
    numbers = torch.tensor([e4m3(byte) for byte in range(256)], dtype=torch.float32)
    expected = (
        numbers[rendering.buffers["key_value"].view(torch.uint8).to(torch.int64)] * rendering.buffers["key_value_scale"]
    )
    assert torch.equal(sent(rendering).tensor, expected)
    assert not sent(rendering).tensor[0, 0, 0].any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_head(wrong: float) -> None:
    """A value that is not finite makes its whole head NaN and leaves other heads alone (checkpoints have none)."""
    kv = drawn(1.0)
    whole = sent(render(kv, DtypePair.both("float8_e4m3fn"))).tensor
    kv.tensor[0, 1, 1, 2, 3] = wrong
    found = sent(render(kv, DtypePair.both("float8_e4m3fn"))).tensor
    assert bool(found[0, 1, 1].isnan().all())
    found[0, 1, 1] = whole[0, 1, 1]
    assert torch.equal(found, whole)


def test_it_has_half_the_bytes_of_bfloat16_and_its_scales() -> None:
    """float8 takes one byte for each value instead of two, and four for each layer, part and head."""
    half, float8 = (
        PrefixFile(IDENTITY, Variant(DtypePair.both(dtype), 1, (0, L), (0, H), "stacked", expand=False), {})
        for dtype in ("bfloat16", "float8_e4m3fn")
    )
    assert float8.rendering_nbytes == half.rendering_nbytes // 2 + 4 * L * 2 * H


def sent(rendering: Rendering) -> PrefixKV:
    """Returns a rendering as the client reads it from the wire."""
    variant = Variant(DtypePair.both("float8_e4m3fn"), 1, (0, L), (0, H), "stacked", expand=False)
    file = PrefixFile(IDENTITY, variant, {"attention_mask": AttentionMask(1, IDENTITY.num_virtual_tokens, torch.int64)})
    return read_kv(read_prefix_file(bytearray(b"".join(file.chunks(rendering)))))

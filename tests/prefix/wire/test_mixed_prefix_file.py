"""A mixed batch of long prefixes is sent from where they lie, in bounded pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_service.prefix.mixed import MixedBatch, Row, RowPrefix
from prefix_service.prefix.variant import DtypePair, Identity, Layout, Variant
from prefix_service.prefix.wire.masks import AttentionMask
from prefix_service.prefix.wire.mixed_prefix_file import MixedPrefixFile
from prefix_service.prefix.wire.received import read_prefix_file
from prefix_service.prefix.wire.rendering import Rendering

LENGTHS = (80_000, 30, 50_000)  # lines of 2.4 MiB, 960 bytes, 1.5 MiB


def _part(tokens: int) -> RowPrefix:
    identity = Identity("acme", f"a{tokens}", 1, "sha256:0", "CARTRIDGE", None, tokens, 1, 2, 8)
    return RowPrefix(f"acme/a{tokens}", identity, "float32")


@pytest.fixture(scope="module")
def tensors() -> list[Tensor]:
    """Returns tensors `[1, 2, 2, n, 8]`, one for each length."""
    return [torch.randn(1, 2, 2, tokens, 8) for tokens in LENGTHS]


@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_long_rows_are_sent_where_they_lie(layout: Layout, tensors: list[Tensor]) -> None:
    """Only small pieces are copied, no chunk exceeds 8 MiB, and the bytes are those of the assembled tensor."""
    long, short, middle = (_part(tokens) for tokens in LENGTHS)
    rows = [Row((long,)), Row((short,)), Row(), Row((middle, short), is_list=True)]
    batch = MixedBatch.of(rows)
    variant = Variant(DtypePair.both("float32"), 4, (0, 1), (0, 2), layout, expand=True)
    file = MixedPrefixFile(
        batch, variant, {"attention_mask": AttentionMask(4, LENGTHS[0], torch.int64, lengths=batch.lengths)}
    )
    renderings = [Rendering({"key_value": tensor}) for tensor in tensors]
    sources = [[renderings[0]], [renderings[1]], [], [renderings[2], renderings[1]]]
    chunks: list[Any] = list(file.chunks(sources))
    assert max(map(len, chunks)) <= 8 << 20
    assert sum(map(len, chunks)) == file.content_length
    copied = sum(len(chunk) for chunk in chunks if isinstance(chunk, bytes))
    assert copied < 1 << 17, "zeros, masks and long prefixes are views"
    received = read_prefix_file(bytearray(b"".join(chunks))).tensors
    expected = torch.zeros(4, 1, 2, 2, LENGTHS[0], 8)
    for row, own in enumerate(([tensors[0]], [tensors[1]], [], [tensors[2], tensors[1]])):
        if own:
            joined = torch.cat(own, 3)
            expected[row, :, :, :, -joined.shape[3] :] = joined
    if layout == "stacked":
        assert torch.equal(received["past_key_values"], expected)
    else:
        assert torch.equal(received["past_key_values.0.key"], expected[:, 0, 0])
        assert torch.equal(received["past_key_values.0.value"], expected[:, 0, 1])
    assert received["attention_mask"].sum(1).tolist() == [80_000, 30, 0, 50_030]

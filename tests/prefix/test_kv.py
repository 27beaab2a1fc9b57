"""`prefix.kv` holds the value `[L, 2, H, N, D]`, its slices and rows, masks and positions."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.kv import PrefixKV, extend_mask, position_ids, prefix_mask

N, L, H, D = 5, 4, 3, 2
FLAT = torch.arange(N * L * 2 * H * D, dtype=torch.float32).view(N, -1)
masks = st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=3).map(torch.tensor)


def kv_of(submodules: int = 1, layers: int = L, flat: Tensor = FLAT) -> PrefixKV:
    return PrefixKV.from_flat(flat, num_layers=layers, num_kv_heads=H, num_transformer_submodules=submodules)


def pefts_pairs(flat: Tensor, layers: int, submodules: int, batch_size: int) -> list[Tensor]:
    """Returns what `get_prompt` of PEFT 0.21 makes of its flat prefix: one tensor a layer, keys and values stacked."""
    view = flat.unsqueeze(0).expand(batch_size, -1, -1).reshape(batch_size, N, layers * 2, H, D)
    if submodules == 2:
        view = torch.cat([view, view], dim=2)
    return list(view.permute([2, 0, 3, 1, 4]).reshape(layers, submodules * 2, batch_size, H, N, D))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("submodules", [1, 2])
def test_layers_come_in_pefts_order(layers: int, submodules: int) -> None:
    """Slot 2i is the key of layer i; with two submodules decoder layer i receives pair 2i mod L, as PEFT regroups."""
    flat = FLAT[:, : layers * 2 * H * D]
    theirs = pefts_pairs(flat, layers, submodules, batch_size=2)
    ours = kv_of(submodules, layers, flat).pairs(2)
    assert len(ours) == len(theirs) == layers
    for (key, value), both in zip(ours, theirs, strict=True):
        assert torch.equal(key, both[0])
        assert torch.equal(value, both[1])


def test_a_value_knows_its_sizes() -> None:
    """A value has its tokens, head size and bytes, and the model's layers and heads."""
    kv = kv_of()
    assert (kv.num_virtual_tokens, kv.head_dim, kv.num_layers, kv.num_kv_heads) == (N, D, L, H)
    assert (kv.layers, kv.kv_heads, kv.nbytes) == ((0, L), (0, H), FLAT.nbytes)
    assert kv.tensor.is_contiguous()


@given(st.integers(0, L - 1), st.integers(1, L), st.integers(0, H - 1), st.integers(1, H))
def test_a_slice_is_a_view_and_keeps_the_models_numbers(a: int, b: int, c: int, d: int) -> None:
    """A slice is a view of layers `a:b` and heads `c:d` that copies nothing and keeps the model's numbers."""
    kv, layers, heads = kv_of(), (a, max(a + 1, b)), (c, max(c + 1, d))
    part = kv.sliced(layers, heads)
    assert torch.equal(part.tensor, kv.tensor[slice(*layers), :, slice(*heads)])
    assert (part.layers, part.kv_heads, part.num_layers, part.num_kv_heads) == (layers, heads, L, H)
    assert part.tensor.untyped_storage().data_ptr() == kv.tensor.untyped_storage().data_ptr()


def test_ranks_together_are_the_whole() -> None:
    """Pipeline and tensor parallel shards tile the prefix."""
    kv = kv_of()
    rows = [
        torch.cat([kv.sliced(span, (head, head + 1)).tensor for head in range(H)], dim=2) for span in ((0, 3), (3, 4))
    ]
    assert torch.equal(torch.cat(rows), kv.tensor)


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (0, L + 1), (L, L + 1)])
def test_a_range_lies_within(span: tuple[int, int]) -> None:
    """An empty range, or one that reaches outside, is refused with the bounds."""
    with pytest.raises(InvalidRequest, match=rf"layers must be a range within 0:4, got {span[0]}:{span[1]}"):
        kv_of().sliced(layers=span)
    with pytest.raises(InvalidRequest, match="kv_heads must be a range within 0:3, got 0:9"):
        kv_of().sliced(kv_heads=(0, 9))


@pytest.mark.parametrize("batch_size", [1, 256])
def test_rows_are_not_copied(batch_size: int) -> None:
    """A batch takes the memory of one row, in either layout."""
    kv = kv_of()
    tensors = [kv.stacked(batch_size), *(tensor for pair in kv.pairs(batch_size) for tensor in pair)]
    assert all(tensor.untyped_storage().data_ptr() == kv.tensor.data_ptr() for tensor in tensors)
    assert kv.stacked(batch_size).shape == (batch_size, L, 2, H, N, D)
    assert {tensor.shape for tensor in tensors[1:]} == {(batch_size, H, N, D)}


@pytest.mark.parametrize(("bits", "rounded"), [(0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81)])
def test_a_cast_rounds_to_nearest_even(bits: int, rounded: int) -> None:
    """A cast to bfloat16 rounds ties to the even neighbour."""
    value = torch.tensor([bits], dtype=torch.int32).view(torch.float32).view(1, 1, 1, 1, 1)
    assert PrefixKV.whole(value).to(dtype=torch.bfloat16).tensor.view(torch.int16).item() == rounded


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_a_prefix_alone_has_a_mask_of_ones(dtype: torch.dtype) -> None:
    """`prefix_mask` returns `[B, N]` ones in the given dtype."""
    assert torch.equal(prefix_mask(2, N, dtype), torch.ones(2, N, dtype=dtype))


@given(masks, st.sampled_from([torch.int64, torch.int32, torch.float32, torch.bool]), st.integers(1, 5))
def test_the_prefix_comes_in_front_of_the_mask(mask: Tensor, dtype: torch.dtype, tokens: int) -> None:
    """`extend_mask` puts ones before the given mask and keeps its dtype unless another is given."""
    extended = extend_mask(mask.to(dtype), tokens)
    assert extended.dtype == dtype
    assert torch.equal(extended[:, tokens:], mask.to(dtype))
    assert bool(extended[:, :tokens].all())
    assert extend_mask(mask.to(dtype), tokens, torch.float32).dtype == torch.float32


@given(masks, st.integers(1, 5))
def test_positions_count_real_tokens_from_the_prefix_on(mask: Tensor, tokens: int) -> None:
    """The k-th real token of a row has position N + k wherever the padding is, and padding never one below N."""
    positions = position_ids(mask, tokens)
    assert positions.dtype == torch.int64
    for row, where in zip(mask, positions, strict=True):
        assert where[row == 1].tolist() == [tokens + k for k in range(int(row.sum()))]
        assert bool((where >= tokens).all())


@pytest.mark.parametrize(
    ("mask", "positions"),
    [([[1, 1, 0, 0]], [[3, 4, 4, 4]]), ([[0, 0, 1, 1]], [[3, 3, 3, 4]]), ([[0, 0]], [[3, 3]]), ([[True]], [[3]])],
)
def test_positions_of_padded_rows(mask: Any, positions: list[list[int]]) -> None:
    """Positions are right for right-padded, left-padded and empty rows, and for a boolean mask."""
    assert position_ids(torch.tensor(mask), 3).tolist() == positions

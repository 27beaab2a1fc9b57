"""Attention masks as callers send them."""

from typing import Any, Final

import torch
from torch import Tensor

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.json_text import shown
from prefix_service.prefix.wire.masks import InputMask

_BLOCK: Final = 1 << 20  # elements that are compared together


def mask_of_rows(rows: Any) -> InputMask:
    """Returns the mask that came as JSON; as a tensor it is int64.

    Raises:
        InvalidRequest: it is not a list of equally long rows of zeros and ones.
    """
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise InvalidRequest("attention_mask must be a list of rows of zeros and ones")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InvalidRequest(f"the rows of attention_mask differ in length: {min(lengths)} to {max(lengths)}")
    flags = bytearray()
    for index, row in enumerate(rows):
        if {type(value) for value in row} != {int} or not set(row) <= {0, 1}:
            wrong = next(value for value in row if type(value) is not int or value not in (0, 1))
            raise InvalidRequest(f"attention_mask row {index} holds {shown(wrong, 40)}, and only 0 and 1 are allowed")
        flags += bytes(row)
    # (rows*tokens) -> (rows, tokens)
    return InputMask(torch.frombuffer(flags, dtype=torch.uint8).view(len(rows), -1), torch.int64)


def mask_from_json(rows: Any) -> InputMask | None:
    """Returns the mask that came as JSON, or None where there is none.

    Raises:
        InvalidRequest: it is not a list of equally long rows of zeros and ones.
    """
    return None if rows is None else mask_of_rows(rows)


def mask_of_tensor(mask: Tensor) -> InputMask:
    """Returns the mask that came as bytes, `[batch, seq]` of any dtype; a bool tensor's memory is shared.

    Raises:
        InvalidRequest: it holds something else than zeros and ones.
    """
    # As bytes a bool may be anything; as numbers NaN equals nothing.
    flags = mask.view(torch.uint8) if mask.dtype == torch.bool else torch.empty(mask.shape, dtype=torch.uint8)
    found, flat = (flags if mask.dtype == torch.bool else mask).view(-1), flags.view(-1)
    for start in range(0, len(flat), _BLOCK):
        values = found[start : start + _BLOCK]
        ones = values == 1
        if not bool((ones | (values == 0)).all()):
            raise InvalidRequest("attention_mask holds values other than 0 and 1")
        flat[start : start + _BLOCK] = ones
    return InputMask(flags, mask.dtype)

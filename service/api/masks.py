"""Attention masks as callers send them."""

from typing import Any

import torch
from torch import Tensor

from service.errors import InvalidRequest


def mask_of_rows(rows: Any) -> Tensor:
    """A mask that came as JSON: int64 `[batch, seq]`.

    Raises:
        InvalidRequest: it is not a list of equally long rows of zeros and ones.
    """
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise InvalidRequest("attention_mask must be a list of rows of zeros and ones")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InvalidRequest(f"the rows of attention_mask differ in length: {min(lengths)} to {max(lengths)}")
    for index, row in enumerate(rows):
        if {type(value) for value in row} != {int} or not set(row) <= {0, 1}:
            wrong = next(value for value in row if type(value) is not int or value not in (0, 1))
            raise InvalidRequest(f"attention_mask row {index} holds {wrong!r:.40}, and only 0 and 1 are allowed")
    return torch.tensor(rows, dtype=torch.int64)


def mask_from_json(rows: Any) -> Tensor | None:
    """The same, or None where there is none.

    Raises:
        InvalidRequest: as `mask_of_rows`.
    """
    return None if rows is None else mask_of_rows(rows)


def require_flags(mask: Tensor) -> Tensor:
    """A mask that came as bytes, of any dtype.

    Raises:
        InvalidRequest: it holds something else than zeros and ones.
    """
    # As bytes a bool may be anything; as numbers NaN equals nothing.
    flags = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    if not bool(((flags == 0) | (flags == 1)).all()):
        raise InvalidRequest("attention_mask holds values other than 0 and 1")
    return mask

"""What float8 on the wire costs a prefix: its error, beside its bytes. Needs torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.prefix.kv import PrefixKV


@dataclass(frozen=True, slots=True)
class Error:
    """How far values are off. Relative errors are those of the values that are not zero; one that float8 rounds to zero
    is off by 1."""

    max_absolute: float
    mean_absolute: float
    max_relative: float
    mean_relative: float

    @classmethod
    def between(cls, exact: Tensor, found: Tensor) -> "Error":
        """Of `found` against `exact`, two tensors of one shape; computed in float64."""
        exact, off = exact.double(), (found.double() - exact.double()).abs()
        relative = off[exact != 0] / exact[exact != 0].abs()
        if not relative.numel():
            relative = torch.zeros(1)
        figures = off.max(), off.mean(), relative.max(), relative.mean()
        return cls(*(float(figure) for figure in figures))


@dataclass(frozen=True, slots=True)
class Float8Error:
    """The errors of keys and of values, and the bytes of both with their scales, beside those of bfloat16."""

    keys: Error
    values: Error
    nbytes: int
    bfloat16_nbytes: int


def float8_error(exact: PrefixKV, found: PrefixKV) -> Float8Error:
    """What a prefix lost that came as float8; `exact` is the same one in the dtype of the stored weights."""
    keys, values = (Error.between(exact.tensor[:, part], found.tensor[:, part]) for part in (0, 1))
    count = exact.tensor.numel()
    scales = exact.tensor[..., 0, 0].numel()  # one float32 a layer, part and head
    return Float8Error(keys, values, nbytes=count + 4 * scales, bfloat16_nbytes=2 * count)

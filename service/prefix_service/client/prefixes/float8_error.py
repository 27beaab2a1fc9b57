"""The error of a prefix that is sent as float8, and its size in bytes. Needs torch."""

from dataclasses import dataclass, fields
from typing import Final

import torch
from torch import Tensor

from prefix_service.client.prefixes.prefix import Prefix
from prefix_service.errors import InvalidResponse
from prefix_service.prefix.variant import Identity

_SAME: Final = [field.name for field in fields(Identity)] + ["layers", "kv_heads"]


@dataclass(frozen=True, slots=True)
class ErrorFigures:
    """The largest and mean error of values. Relative errors cover only values that are not zero; a value that float8
    rounds to zero has a relative error of 1.
    """

    max_absolute: float
    mean_absolute: float
    max_relative: float
    mean_relative: float

    @classmethod
    def between(cls, exact: Tensor, found: Tensor) -> "ErrorFigures":
        """Returns the error of `found` relative to `exact`, two tensors of one shape; computed in float64."""
        exact, off = exact.double(), (found.double() - exact.double()).abs()
        relative = off[exact != 0] / exact[exact != 0].abs()
        if not relative.numel():
            relative = torch.zeros(1)
        figures = off.max(), off.mean(), relative.max(), relative.mean()
        return cls(*(float(figure) for figure in figures))


@dataclass(frozen=True, slots=True)
class Float8Error:
    """The errors of keys and of values, and the bytes of both: in float8 with their scales, and in bfloat16."""

    keys: ErrorFigures
    values: ErrorFigures
    nbytes: int
    bfloat16_nbytes: int


def float8_error(exact: Prefix, found: Prefix) -> Float8Error:
    """Returns the error of a prefix that was sent as float8; `exact` is the same version in the stored dtype.

    Raises:
        InvalidResponse: the two are not the same version, layers and heads.
    """
    differing = [name for name in _SAME if exact.metadata[name] != found.metadata[name]]
    if differing:
        listed = ", ".join(f"{name} {exact.metadata[name]!r} and {found.metadata[name]!r}" for name in differing)
        raise InvalidResponse(f"two answers for one version differ: {listed}")
    before, after = exact.kv.tensor, found.kv.tensor
    keys, values = (ErrorFigures.between(before[:, part], after[:, part]) for part in (0, 1))
    count = before.numel()
    scales = before[..., 0, 0].numel()  # one float32 per layer, keys or values, and head
    return Float8Error(keys, values, nbytes=count + 4 * scales, bfloat16_nbytes=2 * count)

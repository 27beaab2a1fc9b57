"""The rows of tokens with which a model is called, each with an image or without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor

LENGTHS: Final = (9, 4, 6)
TEXTS: Final = [torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
PLACES: Final = "image_embeds_position_mask"
"""Kosmos' name for where an image's tokens are."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on one side or not at all, and the images that belong to them."""

    ids: Tensor
    mask: Tensor
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """The model's options for images, with as many entries for each row."""
    image_id: int | None = None
    """The token that stands for a part of an image."""

    @classmethod
    def of_row(cls, tokens: Tensor, **options: Any) -> "Batch":
        """Returns a batch of one row `[S]`, not padded."""
        return cls(tokens[None], torch.ones_like(tokens[None]), **options)

    def followed_by(self, tokens: Tensor) -> "Batch":
        """Returns the batch of one row with more tokens `[1, new]` after it."""
        ids = torch.cat([self.ids, tokens], dim=1)
        return Batch(ids, torch.ones_like(ids), self.images, self.image_id)

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """Returns the inputs of the model and of PEFT's model, without masks and positions."""
        inputs = {"input_ids": self.ids, **self.images}
        if self.image_id is None:
            return inputs
        for name in ("mm_token_type_ids", "token_type_ids", PLACES):
            if name in signature(model.forward).parameters:
                inputs[name] = self.ids.eq(self.image_id).to(torch.int64)
        return inputs


def padded(rows: Sequence[Batch], side: str) -> Batch:
    """Returns a batch of rows of several lengths."""
    longest = max(row.ids.shape[1] for row in rows)
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        length = row.ids.shape[1]
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[number, place], mask[number, place] = row.ids[0], 1
    images = {name: torch.cat([row.images[name] for row in rows]) for name in rows[0].images}
    return Batch(ids, mask, images, rows[0].image_id)

"""Adds an image to each row, in the first form that the architecture's model accepts and sees."""

import re
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor

from tests.sweep.batch import PLACES, TEXTS, Batch

Images = Mapping[str, Tensor]


def _pixels(*shape: int) -> Callable[[torch.Generator], Images]:
    return lambda generator: {"pixel_values": torch.randn(*shape, generator=generator)}


def _sized(*shape: int) -> Callable[[torch.Generator], Images]:
    return lambda generator: {
        "pixel_values": torch.randn(*shape, generator=generator),
        "image_sizes": torch.tensor([shape[-2:]]),
    }


def _grid(patch: int, **others: Tensor) -> Callable[[torch.Generator], Images]:
    return lambda generator: {
        "pixel_values": torch.randn(16, patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        **others,
    }


FORMS: Final[Mapping[str, Callable[[torch.Generator], Images]]] = {
    "pixels": _pixels(1, 3, 8, 8),
    "tiles": _pixels(1, 1, 3, 8, 8),
    "sized": _sized(1, 3, 8, 8),
    "larger, sized": _sized(1, 3, 16, 16),
    "sized tiles": _sized(1, 3, 3, 8, 8),
    "grid of 96": _grid(96),
    "grid of 48": _grid(48),
    "merged grid of 48": _grid(48, image_merge_sizes=torch.tensor([1])),
    "positioned patches": lambda generator: {
        "pixel_values": torch.rand(1, 9, 48, generator=generator),
        "image_position_ids": torch.cartesian_prod(torch.arange(3), torch.arange(3))[None],
    },
    "tiles of an aspect": lambda generator: {
        "pixel_values": torch.randn(1, 1, 4, 3, 8, 8, generator=generator),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
    },
    "question": lambda generator: {
        "pixel_values": torch.randn(1, 3, 8, 8, generator=generator),
        "qformer_input_ids": torch.tensor([[5, 6, 7]]),
    },
}
_COUNTS: Final = (4, 1, 2, 16, 9, 5, 0)


def with_images(model: Any) -> list[Batch]:
    """Returns the rows of text with an image each.

    Raises:
        LookupError: the model accepts no form of image, or none changes its answer.
    """
    if model.config.is_encoder_decoder and model.main_input_name != "input_ids":
        raise LookupError("its encoder takes an image alone")
    for form, image_tokens in _candidates(model):
        if _is_seen(model, form, image_tokens):
            return [_row(model, form, image_tokens, seed) for seed in range(len(TEXTS))]
    raise LookupError("no form of image is known that this architecture takes")


def _candidates(model: Any) -> Iterator[tuple[str, int]]:
    """Yields the forms that the model's signature has a place for, each with numbers of image tokens: the one that the
    model's error reports, or a few.
    """
    known = signature(model.forward).parameters
    for form, make in FORMS.items():
        if not set(make(torch.Generator())) <= set(known):
            continue
        if _image_id(model) is None:
            yield form, 0
            continue
        yield form, _COUNTS[0]
        reported = _reported(model, form)
        yield from ((form, count) for count in (_COUNTS[1:] if reported is None else [reported]))


def _reported(model: Any, form: str) -> int | None:
    try:
        _logits(model, _row(model, form, _COUNTS[0], 0))
    except Exception as error:  # noqa: BLE001 - anything may go wrong in a form that is not the model's
        found = re.search(r"features:? (\d+)", str(error))
        return int(found[1]) if found and int(found[1]) < 64 else None
    return None


def _is_seen(model: Any, form: str, image_tokens: int) -> bool:
    """Returns whether the model takes such an image, and answers differently for another one."""
    row, other = (_row(model, form, image_tokens, seed) for seed in (0, 100))
    try:
        found = _logits(model, row)
        return bool(
            (_logits(model, Batch.of_row(row.ids[0], images=other.images, image_id=row.image_id)) != found).any()
        )
    except Exception:  # noqa: BLE001 - see above
        return False


def _logits(model: Any, row: Batch) -> Tensor:
    logits: Tensor = model(**row.inputs(model), attention_mask=row.mask).logits
    return logits


def _row(model: Any, form: str, image_tokens: int, seed: int) -> Batch:
    image_id = _image_id(model)
    text = TEXTS[seed % len(TEXTS)]
    inside = text.new_full((image_tokens,), image_id or 0)
    images = FORMS[form](torch.Generator().manual_seed(seed))
    return Batch.of_row(torch.cat([text[:2], inside, text[2:]]), images=images, image_id=image_id)


def _image_id(model: Any) -> int | None:
    for name in ("image_token_id", "image_token_index", "im_patch_id", "image_patch_id"):
        if isinstance(value := getattr(model.config, name, None), int):
            return value
    return 126 if PLACES in signature(model.forward).parameters else None

"""Lists the architectures that transformers names as language models: decoders, encoder-decoders, with images."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from transformers.models.auto import modeling_auto

from tests.sweep.special import VARIANTS

MAPPINGS: Final[Mapping[str, Mapping[str, str]]] = {
    "vision": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "decoder": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""transformers' model types and their classes by kind. A class in several is of the first kind that has it."""
WITH_IMAGE: Final = "image"


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers, under the model type that it is named after, or the first that has it."""

    kind: str
    model_type: str
    model: str
    """The class's name in transformers."""
    variant: str = ""
    """Another config of that class, or `image`: with an image in each row."""

    @property
    def label(self) -> str:
        """Returns the model type and the variant."""
        return f"{self.model_type}:{self.variant}" if self.variant else self.model_type

    @property
    def name(self) -> str:
        """Returns the name in the sweep, `<kind>/<model type>[:<variant>]`."""
        return f"{self.kind}/{self.label}"


def architectures() -> dict[str, Architecture]:
    """Returns each model class and each variant by name, in alphabetical order."""
    classes: dict[str, Architecture] = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, model in mapping.items():
            if classes.setdefault(model, Architecture(kind, model_type, model)).kind == kind and (
                model.lower().startswith(re.sub("[-_]", "", model_type))
            ):
                classes[model] = Architecture(kind, model_type, model)
    found = [
        Architecture(each.kind, each.model_type, each.model, variant)
        for each in classes.values()
        for variant in ("", *VARIANTS.get(each.model_type, ()), *([WITH_IMAGE] if each.kind == "vision" else []))
    ]
    return {each.name: each for each in sorted(found, key=lambda each: each.name)}

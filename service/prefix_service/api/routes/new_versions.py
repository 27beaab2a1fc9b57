"""The JSON that makes a version: a fresh one or a composition, and its description."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, WithJsonSchema

from prefix_service.library.plan import QualifiedReference
from prefix_service.library.request_model import INTEGRAL, RequestModel
from prefix_service.prefix.description import (
    KEY_PATTERN,
    MOST_ANNOTATIONS,
    MOST_CARD,
    MOST_VALUE,
    Description,
    check_annotations,
    check_card,
)
from prefix_service.prefix.fingerprint import MOST_FINGERPRINT, MOST_MEMBERS, MOST_TEXT, OBJECTS, TEXTS
from prefix_service.prefix.mixed import MOST_IN_A_ROW

JSONObject = dict[Annotated[str, Field(max_length=1024)], Any]
"""An object with any members, whose number a field bounds."""


_CONFIG = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 20,
    "num_layers": 2,
    "num_attention_heads": 2,
    "token_dim": 8,
}


ANNOTATIONS_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "description": "texts by key: author, run, commit, metrics, …",
    "maxProperties": MOST_ANNOTATIONS,
    "propertyNames": {"pattern": KEY_PATTERN},
    "additionalProperties": {"type": "string", "maxLength": MOST_VALUE, "pattern": "^[^\\u0000]*$"},
    "examples": [{"run": "2026-11-26/3", "accuracy": "0.93"}],
}


FINGERPRINT_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "description": f"the fingerprint of a base model: up to {MOST_FINGERPRINT >> 10} KiB of JSON, of what is known",
    "properties": {
        **{name: {"type": "string", "minLength": 1, "maxLength": MOST_TEXT} for name in TEXTS},
        **{name: {"type": "object", "maxProperties": MOST_MEMBERS} for name in OBJECTS},
    },
    "additionalProperties": False,
    "examples": [{"architecture": "llama", "sizes": {"hidden_size": 4096}, "rope": {"rope_theta": 500000}}],
}


class DescribedVersion(RequestModel):
    """The description that a version published as JSON can have."""

    # The bounds are those of the whole body: `description` looks at them once more, in bytes and with better words.
    card: str = Field(
        default="",
        max_length=1 << 20,
        description="the model card in Markdown: up to 256 KiB of UTF-8",
        json_schema_extra={"maxLength": MOST_CARD, "pattern": "^[^\\u0000]*$"},
    )
    annotations: Annotated[JSONObject, Field(max_length=1 << 16), WithJsonSchema(ANNOTATIONS_SCHEMA)] = Field(
        default_factory=dict
    )

    def description(self) -> Description:
        """Returns card and annotations.

        Raises:
            TooLarge, InvalidRequest: they are not what a version may have.
        """
        return Description(check_card(self.card), check_annotations(self.annotations))


class FreshVersion(DescribedVersion):
    """An untrained prefix from a config alone, to try a worker's shapes before training."""

    config: JSONObject = Field(max_length=1024, examples=[_CONFIG])
    init_weights: Literal["random", "zero"] = "random"
    seed: Annotated[int, Field(ge=0, lt=1 << 63), INTEGRAL] = 0


class ComposedVersion(DescribedVersion):
    """A version that is the concatenation of others, in their order."""

    compose: list[QualifiedReference] = Field(
        min_length=2,
        max_length=MOST_IN_A_ROW,
        fail_fast=True,
        description="tenant/adapter@… each",
        examples=[["acme/summarize@1", "acme/summarize@2"]],
    )

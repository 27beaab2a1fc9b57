"""`adapter_config.json` as Hugging Face PEFT writes it, validated, and the sizes that follow from it.

`PrefixTuningConfig` and `CartridgeConfig` mirror `peft.PrefixTuningConfig` and `peft.CartridgeConfig` (0.3 … 0.21):
they have the same fields and defaults, and keep unknown keys. `parse_config` reads untrusted values.

PEFT checks few of its fields, and ignores some of them for trained weights. Fields that this service never reads
therefore hold any JSON value; the sizes, flags and names that it reads have one type.
"""

import json
import re
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from prefix_service.errors import InvalidConfig
from prefix_service.prefix.base_model import infer_dimensions
from prefix_service.prefix.json_text import shown

_EXACT = (1 << 53) - 1  # the largest integer of canonical JSON

# Far above every model in use, and far below the values at which products of them become dangerous.
_LIMITS = {
    "num_virtual_tokens": 1 << 20,
    "num_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "token_dim": 1 << 18,
    "encoder_hidden_size": 1 << 18,
}

SOFT_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
"""The types of PEFT whose virtual tokens are embeddings in front of the input, which `compile` turns into a prefix."""

_PEFT_TYPE = re.compile("[A-Z][A-Z0-9_]{1,39}")  # as PEFT writes its types

# Every other key is stored and shown, but never read.
_READ = frozenset(
    {
        *_LIMITS,
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "inference_mode",
        "num_transformer_submodules",
        "prefix_projection",
        "num_frozen_tokens",
    }
)

C = TypeVar("C", bound="PromptLearningConfig")

TaskType = Literal["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


class PromptLearningConfig(BaseModel):
    """The fields that PEFT's prompt-learning configs share; a `None` has yet to be filled in from a base model's
    config.

    `token_dim` is `head_dim * num_attention_heads`, where the heads are the key/value heads (after PEFT's adjustment
    for grouped-query attention). `num_transformer_submodules` follows from the task, as in PEFT: 2 for `SEQ_2_SEQ_LM`,
    else 1.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    is_prompt_learning: ClassVar[bool] = True

    peft_type: str
    task_type: TaskType | None = None
    auto_mapping: Any = None
    peft_version: Any = None
    base_model_name_or_path: StrictStr | None = None
    revision: Any = None
    inference_mode: StrictBool = False
    num_virtual_tokens: StrictInt = 20
    token_dim: StrictInt | None = None
    num_transformer_submodules: Annotated[int, Field(strict=True, ge=1, le=2)] = 1
    num_attention_heads: StrictInt | None = None
    num_layers: StrictInt | None = None
    modules_to_save: Any = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: dict[str, Any]) -> dict[str, Any]:
        flags = [name for name in ("inference_mode", "prefix_projection") if name in cls.model_fields]
        values = {name: value for name, value in values.items() if value is not None or name not in flags}
        if values.get("num_transformer_submodules") is None:
            values["num_transformer_submodules"] = 2 if values.get("task_type") == "SEQ_2_SEQ_LM" else 1
        return values

    @model_validator(mode="after")
    def _sizes_are_sane(self) -> Self:
        for name, limit in _LIMITS.items():
            value = getattr(self, name, None)
            if value is None:
                continue
            if not isinstance(value, int | float):  # an unknown key of a CARTRIDGE, which has no encoder
                raise ValueError(  # noqa: TRY004 - pydantic reports a ValueError, and lets a TypeError through
                    f"{name} must be an integer, got {shown(value)}"
                )
            least = 0 if name == "encoder_hidden_size" else 1  # it is read only if a projection is run
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
            if value > limit:
                raise ValueError(f"{name} must be at most {limit}, got {value}")
        if self.token_dim and self.num_attention_heads and self.token_dim % self.num_attention_heads:
            raise ValueError(
                f"token_dim must be a multiple of num_attention_heads, got {self.token_dim} and "
                f"{self.num_attention_heads}"
            )
        return self

    @property
    def prefix_embedding_dim(self) -> int | None:
        """`num_layers * 2 * token_dim`, the width of the flat prefix; `None` until both numbers are known."""
        if self.num_layers is None or self.token_dim is None:
            return None
        return self.num_layers * 2 * self.token_dim

    @property
    def total_virtual_tokens(self) -> int:
        """`num_virtual_tokens * num_transformer_submodules`, as PEFT counts them."""
        return self.num_virtual_tokens * self.num_transformer_submodules

    @property
    def head_dim(self) -> int | None:
        """`token_dim // num_attention_heads`; `None` until both are known."""
        if self.token_dim is None or self.num_attention_heads is None:
            return None
        return self.token_dim // self.num_attention_heads

    def filled(self, base_model_config: dict[str, Any]) -> Self:
        """Returns this config with every missing dimension taken from a base model's `config.json`.

        Dimensions that the adapter's config has are kept: PEFT wrote its final values there.

        Raises:
            InvalidConfig: the base model's config lacks a number, or the result is inconsistent.
        """
        missing = {
            name: value
            for name, value in infer_dimensions(base_model_config).items()
            if getattr(self, name) is None and value is not None
        }
        filled = _validate(type(self), {**self.model_dump(), **missing})
        if unknown := filled._unknown_dimensions():
            kind = base_model_config.get("model_type")
            of_type = "has no model_type, and" if kind is None else f"(model_type {shown(kind)})"
            raise InvalidConfig(
                f"the base model's config {of_type} does not give {', '.join(unknown)}: set them in adapter_config.json"
            )
        return filled

    def _unknown_dimensions(self) -> list[str]:
        return [name for name in ("num_layers", "token_dim", "num_attention_heads") if getattr(self, name) is None]

    def require_dimensions(self) -> None:
        """Checks that `num_layers`, `token_dim` and `num_attention_heads` are known.

        Raises:
            InvalidConfig: a dimension is missing; the message names it.
        """
        if missing := self._unknown_dimensions():
            raise InvalidConfig(
                f"{', '.join(missing)} missing from the adapter's config: send the base model's config.json as "
                "base_model_config, or set the numbers in adapter_config.json"
            )


class PrefixTuningConfig(PromptLearningConfig):
    """PEFT's `PrefixTuningConfig` (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

    With `prefix_projection` the prefix is `tanh(E W1 + b1) W2 + b2`, and `W1` has `encoder_hidden_size` columns.
    """

    peft_type: Literal["PREFIX_TUNING"] = "PREFIX_TUNING"
    init_weights: Any = None
    encoder_hidden_size: StrictInt | None = None
    prefix_projection: StrictBool = False

    def require_projection_size(self) -> None:
        """Checks that a projection which is about to run has a size.

        Weights that are already flat need no size: for them, `prefix_projection` is history, as in PEFT.

        Raises:
            InvalidConfig: `encoder_hidden_size` is missing or 0.
        """
        if self.encoder_hidden_size is None:
            raise InvalidConfig("encoder_hidden_size is required when prefix_projection is true")
        if not self.encoder_hidden_size:
            raise InvalidConfig("encoder_hidden_size must be positive when prefix_projection is true, got 0")

    @property
    def trainable_parameters(self) -> int | None:
        """The number of parameters that training changes; `None` until the dimensions are known.

        `N·L·2·d` without projection; `N·d + d·h + h + h·(L·2·d) + L·2·d` with it (d: `token_dim`, h:
        `encoder_hidden_size`).
        """
        width = self.prefix_embedding_dim
        if width is None or self.token_dim is None:
            return None
        if not self.prefix_projection or not self.encoder_hidden_size:
            return self.num_virtual_tokens * width
        hidden = self.encoder_hidden_size
        return self.num_virtual_tokens * self.token_dim + self.token_dim * hidden + hidden + hidden * width + width


class CartridgeConfig(PromptLearningConfig):
    """PEFT's `CartridgeConfig` (Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266).

    The first `num_frozen_tokens` rows are not trained.
    """

    peft_type: Literal["CARTRIDGE"] = "CARTRIDGE"
    num_frozen_tokens: Annotated[int, Field(strict=True, ge=0)] = 1

    @model_validator(mode="after")
    def _frozen_rows_exist(self) -> Self:
        if self.num_frozen_tokens > self.num_virtual_tokens:
            raise ValueError(
                f"num_frozen_tokens must be at most num_virtual_tokens, got {self.num_frozen_tokens} and "
                f"{self.num_virtual_tokens}"
            )
        return self

    @property
    def trainable_parameters(self) -> int | None:
        """The number of parameters that training changes, `(N - num_frozen_tokens)·L·2·d`.

        It is `None` until these numbers are known.
        """
        width = self.prefix_embedding_dim
        return None if width is None else (self.num_virtual_tokens - self.num_frozen_tokens) * width


PrefixConfig = PrefixTuningConfig | CartridgeConfig

_CONFIGS: dict[str, type[PrefixTuningConfig] | type[CartridgeConfig]] = {
    "PREFIX_TUNING": PrefixTuningConfig,
    "CARTRIDGE": CartridgeConfig,
}


def config_type_of(values: dict[str, Any]) -> type[PrefixConfig]:
    """Returns the config class for the `peft_type` of `values`.

    Raises:
        InvalidConfig: `peft_type` is missing or not supported.
    """
    peft_type = values.get("peft_type")
    if isinstance(peft_type, str) and peft_type in _CONFIGS:
        return _CONFIGS[peft_type]
    wanted = f"peft_type must be one of {', '.join(_CONFIGS)}, got {shown(peft_type)}"
    if peft_type in SOFT_PROMPTS:
        raise InvalidConfig(
            f"peft_type {peft_type} is a soft prompt: first make a prefix of it, with its base model, by "
            "`prefix-service compile --model MODEL ADAPTER_FOLDER OUT_FOLDER`"
        )
    if isinstance(peft_type, str) and _PEFT_TYPE.fullmatch(peft_type):
        raise InvalidConfig(f"this is a {peft_type} adapter, which is not hosted here: {wanted}")
    raise InvalidConfig(wanted)


def parse_config(values: dict[str, Any], *, from_file: bool = False) -> PrefixConfig:
    """Returns the config that `values` describe, in the class of their `peft_type`.

    A config `from_file` belongs to trained weights and must have `num_virtual_tokens`, which PEFT always writes. A key
    that this service does not read is dropped if canonical JSON cannot hold its value: an infinity, or an integer of 54
    to 64 bits.

    Raises:
        InvalidConfig: `peft_type` is not supported, or a field is missing, malformed or out of bounds.
    """
    config_type = config_type_of(values)
    if from_file and values.get("num_virtual_tokens") is None:
        raise InvalidConfig("num_virtual_tokens is missing from the adapter's config")
    return _validate(config_type, {n: value for n, value in values.items() if n in _READ or _is_storable(value)})


def parse_read_fields(values: dict[str, Any]) -> PrefixConfig:
    """Returns the config that stored `values` describe, without the fields that this service does not read, so that it
    is small whatever else is stored.

    Raises:
        InvalidConfig: `peft_type` is not supported, or a field is missing, malformed or out of bounds.
    """
    return parse_config({name: value for name, value in values.items() if name in _READ})


def write_config(values: dict[str, Any]) -> bytes:
    """Returns a config as PEFT's `save_pretrained` writes it."""
    return json.dumps(values, indent=2, sort_keys=True).encode()


def _is_storable(value: Any) -> bool:
    """Returns whether canonical JSON (RFC 8785) can hold the value's numbers. An integer of more than 64 bits counts as
    storable here, so that it is refused later instead of dropped.
    """
    if isinstance(value, dict):
        return all(_is_storable(child) for child in value.values())
    if isinstance(value, list):
        return all(_is_storable(child) for child in value)
    if isinstance(value, float):
        return isfinite(value)
    return not isinstance(value, int) or not _EXACT < abs(value) < 1 << 64


def _validate(config_type: type[C], values: dict[str, Any]) -> C:
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        given = f", got {shown(first['input'])}" if where else ""
        raise InvalidConfig(f"{where + ': ' if where else ''}{reason}{given}") from error

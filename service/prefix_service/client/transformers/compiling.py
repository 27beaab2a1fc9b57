"""Turns what stands in front of an input, soft prompts or text, into a prefix: one forward pass of the base model."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from prefix_service.checkpoints.folders import write_folder
from prefix_service.client.transformers.caches import check_takes_prefix, provisioned, to_cache
from prefix_service.client.transformers.devices import decoder_of, input_device, unwrapped
from prefix_service.client.transformers.fingerprints import fingerprint_of
from prefix_service.client.transformers.padding import Model, rope_changes_behind
from prefix_service.client.transformers.texts import Role, Tokenizer, template_of, text_tokens
from prefix_service.client.transformers.virtual_tokens import SoftPrompt, embeddings, read_soft_prompt
from prefix_service.errors import InvalidRequest
from prefix_service.prefix.config import parse_config
from prefix_service.prefix.file_names import RECIPE_KEYS
from prefix_service.prefix.fingerprint import Fingerprint

Progress = Callable[[int, int], None]
"""Called with the tokens that are done, and their total."""

_CHUNK: Final = 512  # tokens of one call of the model
_STORED: Final = (torch.float32, torch.float16, torch.bfloat16)
_SAME: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-3}
_SAME_IN_HALF: Final = 0.05
"""The most by which keys differ, relative to their norm, if another shape of batch rounds them differently."""
_MOST_NAME: Final = 1000  # characters of a name in the recipe


@dataclass(frozen=True, slots=True)
class CompiledPrefix:
    """The keys and values of tokens that stand in front of an input, as a CARTRIDGE adapter.

    `flat` is `[N, layers * 2 * heads * size]`, `config` its adapter_config.json. `recipe` says what was compiled, with
    which model, tokenizer and template; `publish` makes it the version's annotations. `token_ids` are the tokens, or
    None if they are virtual. `base_model` is the fingerprint of the model, which `publish` stores with the version.
    """

    flat: Tensor
    config: Mapping[str, Any]
    recipe: Mapping[str, str]
    token_ids: Sequence[int] | None
    base_model: Fingerprint

    def with_recipe(self, **more: str) -> Self:
        """Returns the same prefix with more in its recipe."""
        return replace(self, recipe={**self.recipe, **_recipe(more)})

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `publish` takes, which is created if it does not exist.

        Raises:
            Conflict: the folder contains an adapter already.
            StorageFailed: the folder cannot be written.
        """
        write_folder(Path(folder), self.config, {"prompt_embeddings": self.flat}, self.recipe, self.base_model)


@dataclass(frozen=True, slots=True)
class _Input:
    """The input of a forward pass, under the name of its argument: `input_ids` `[1, N]`, or `inputs_embeds`
    `[1, N, width]`."""

    name: str
    tensor: Tensor


def compile_prefix(
    model: Model,
    *,
    adapter: str | Path | None = None,
    task: int | None = None,
    text: str | None = None,
    tokenizer: Tokenizer | None = None,
    role: Role = "system",
    token_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> CompiledPrefix:
    """Returns the prefix that does what a soft prompt, a text or tokens in front of the input do.

    Pass one of three:

    - `adapter`, a folder of PEFT with PROMPT_TUNING, P_TUNING, CPT or MULTITASK_PROMPT_TUNING (with its `task`);
    - `text` and the model's `tokenizer`; `role` says what the text is in the chat template, or that there is none;
    - `token_ids`.

    The model is a causal one of transformers, in evaluation, maybe spread over devices. It reads the tokens once, in
    chunks, and computes no logits; the prefix has the dtype of its keys. `progress` is called after each chunk.

    Raises:
        InvalidRequest: not one of the three is given, or it is malformed; no prefix can stand in front of the input of
            this architecture, or the model has no positions left behind it; the model is in training; PEFT is missing.
        InvalidConfig, InvalidCheckpoint: the folder holds no adapter of these types.
        DimensionMismatch: the adapter was trained for another model, or the model's layers differ in shape.
    """
    if sum(source is not None for source in (adapter, text, token_ids)) != 1:
        raise InvalidRequest("pass one of adapter, text and token_ids")
    if task is not None and adapter is None:
        raise InvalidRequest(f"task {task} belongs to an adapter: pass adapter")
    if (text is None) != (tokenizer is None):
        raise InvalidRequest("pass text and tokenizer together")
    model = unwrapped(model)
    check_compiles(model.config)
    _check_model(model)
    if adapter is not None:
        prompt = read_soft_prompt(Path(adapter), task)
        require_positions(model.config, prompt.num_virtual_tokens)
        return _of_soft_prompt(model, prompt, progress)
    recipe = {"from": "token ids"}
    if text is not None:
        token_ids = text_tokens(tokenizer, text, role)
        recipe = {"from": "text", "role": role, **_of_tokenizer(tokenizer, role)}
    return _of_tokens(model, list(() if token_ids is None else token_ids), recipe, progress)


def check_compiles(config: PreTrainedConfig) -> None:
    """Checks that a prefix fits a model of `config`, and stands where text does: in front of all that it reads.

    Raises:
        InvalidRequest: the model has an encoder, or takes no prefix.
        DimensionMismatch: its layers differ in shape, so that no prefix fits.
    """
    if config.is_encoder_decoder:
        raise InvalidRequest(
            f"{config.model_type} is an encoder-decoder model, in which text and virtual tokens stand before the "
            "encoder, and a prefix in the decoder: nothing can be compiled for it"
        )
    check_takes_prefix(config)
    layers, heads, size = provisioned(config)
    probe = torch.zeros(1, heads, 1, size)
    to_cache([(probe, probe)] * layers, config)


def require_positions(config: PreTrainedConfig, tokens: int) -> None:
    """Checks that the model has positions for so many tokens, and at least one more.

    Raises:
        InvalidRequest: there are no tokens, or too many.
    """
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if tokens < 1:
        raise InvalidRequest("there are no tokens: a prefix needs at least one")
    if isinstance(most, int) and tokens >= most:
        raise InvalidRequest(
            f"there are {tokens} tokens, and {config.model_type} has positions for {most}, including the input: "
            "shorten them"
        )


def num_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Returns the bytes of a compiled prefix's tensor."""
    layers, heads, size = provisioned(config)
    return tokens * layers * 2 * heads * size * dtype.itemsize


def _check_model(model: Model) -> None:
    if model.training:
        raise InvalidRequest("the model is in training, where dropout changes keys and values: call model.eval()")
    if not model.can_generate():
        raise InvalidRequest(f"{type(model).__name__} is no language model: load it with AutoModelForCausalLM")
    _check_causal(model)


def _check_causal(model: Model) -> None:
    """Checks that a second token does not change the keys of the first: a config can say it in several ways
    (`is_decoder`, `is_causal`, `use_bidirectional_attention`), and code of its own in none.

    Raises:
        InvalidRequest: it does.
    """
    ids = torch.arange(2, device=input_device(model))[None]
    alone, together = (_last_keys(_read(model, _Input("input_ids", ids[:, :tokens]), None)) for tokens in (1, 2))
    if alone is None or together is None:
        raise InvalidRequest("the model kept no keys and values")
    difference = (together[:, :, :1].float() - alone.float()).norm()
    if difference > _SAME.get(alone.dtype, _SAME_IN_HALF) * alone.float().norm():
        raise InvalidRequest(
            f"attention of {type(model).__name__} is not causal: what follows a text changes its keys and values, so "
            "it cannot be compiled"
        )


def _last_keys(cache: DynamicCache) -> Tensor | None:
    """Returns the keys of the last layer that keeps some, `[1, H, N, D]`."""
    found: list[Any] = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    keys: Tensor | None = found[-1].keys if found else None
    return keys


def _of_soft_prompt(model: Model, prompt: SoftPrompt, progress: Progress | None) -> CompiledPrefix:
    if getattr(decoder_of(model).config, "hidden_size_per_layer_input", None):
        raise InvalidRequest(
            f"{type(model).__name__} looks up its layers' inputs by token ids, which virtual tokens do not have (PEFT "
            "fails there, or leaves out those of the input's tokens too): a soft prompt cannot be compiled for it"
        )
    given = _Input("inputs_embeds", embeddings(model, prompt))
    recipe = {"from": prompt.peft_type, "peft": version("peft")}
    if prompt.task is not None:
        recipe["task"] = str(prompt.task)
    return _compiled(model, given, recipe, None, prompt.base, progress)


def _of_tokens(model: Model, ids: list[int], recipe: dict[str, str], progress: Progress | None) -> CompiledPrefix:
    require_positions(model.config, len(ids))
    words = model.get_input_embeddings().weight
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < words.shape[0]:
            raise InvalidRequest(f"token {place} is {token!r:.80}, and the model's are 0 to {words.shape[0] - 1}")
    given = _Input("input_ids", torch.tensor([ids], device=input_device(model)))
    recipe["tokens-sha256"] = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return _compiled(model, given, recipe, ids, None, progress)


def _compiled(
    model: Model,
    given: _Input,
    recipe: dict[str, str],
    token_ids: list[int] | None,
    base: str | None,
    progress: Progress | None,
) -> CompiledPrefix:
    layers, heads, size = provisioned(model.config)
    tokens = given.tensor.shape[1]
    values = {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base or _shown_name(model.name_or_path) or None,
        "num_virtual_tokens": tokens,
        "num_frozen_tokens": 0,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * size,
    }
    config = parse_config(values).model_dump()
    flat = _flat(_read(model, given, progress), (tokens, layers, heads, size))
    used = {
        "base": _shown_name(model.name_or_path),
        "base-commit": getattr(model.config, "_commit_hash", None) or "",
        "dtype": str(flat.dtype).removeprefix("torch."),
        "prefix-service": version("prefix-service"),
        "transformers": version("transformers"),
    }
    return CompiledPrefix(flat, config, _recipe({**recipe, **used}), token_ids, fingerprint_of(model))


def _recipe(values: Mapping[str, str]) -> dict[str, str]:
    """Returns annotations of what is known."""
    return {f"{RECIPE_KEYS}{name}": value[:_MOST_NAME] for name, value in values.items() if value}


def _of_tokenizer(tokenizer: Tokenizer, role: Role) -> dict[str, str]:
    template = template_of(tokenizer, role)
    hashed = {} if template is None else {"template-sha256": hashlib.sha256(template.encode()).hexdigest()}
    return {"tokenizer": _shown_name(tokenizer.name_or_path), **hashed}


def _shown_name(name: str) -> str:
    """Returns the name of a model, or of its folder: where that lies on this machine is nobody else's business."""
    return Path(name).name if Path(name).exists() else name


def _read(model: Model, given: _Input, progress: Progress | None) -> DynamicCache:
    """Returns the cache of a model that has read the input, all tokens of every layer in it.

    Without a config the cache keeps what sliding windows forget; masks hide it from the model here, and from those that
    use the prefix.
    """
    decoder = decoder_of(model)
    accepted = signature(decoder.forward).parameters
    tokens = given.tensor.shape[1]
    # Where frequencies change with the length, the chunks of a longer input would differ from its single pass.
    chunk = _CHUNK if tokens <= rope_changes_behind(decoder.config) else tokens
    cache, device = DynamicCache(), given.tensor.device
    with torch.no_grad():
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            options = {
                # float32, as PEFT's masks and those of `generate`: with integers Falcon's ALiBi is less precise.
                "attention_mask": torch.ones(1, stop, device=device),
                "position_ids": torch.arange(start, stop, device=device)[None],
            }
            options = {name: value for name, value in options.items() if name in accepted}
            part = {given.name: given.tensor[:, start:stop]}
            decoder(**part, **options, past_key_values=cache, use_cache=True)
            if progress is not None:
                progress(stop, tokens)
    return cache


def _flat(cache: DynamicCache, shape: tuple[int, int, int, int]) -> Tensor:
    """Returns the prefix of a cache, `[N, layers * 2 * heads * size]`; a narrower layer is padded with zeros, and one
    that shares another's keys has zeros alone.

    Raises:
        InvalidRequest: a layer keeps other tokens or shapes than a prefix has, a dtype that is not stored, or NaN or
            infinite numbers.
    """
    tokens, layers, heads, size = shape
    filled: dict[int, Any] = {n: kept for n, kept in enumerate(cache.layers) if getattr(kept, "keys", None) is not None}
    dtype = next(iter(filled.values())).keys.dtype
    if dtype not in _STORED:
        raise InvalidRequest(f"the model keeps keys of {dtype}: load it in float32, float16 or bfloat16")
    flat = torch.zeros(tokens, layers, 2, heads, size, dtype=dtype)
    for layer, kept in filled.items():
        for part, tensor in enumerate((kept.keys, kept.values)):
            if tensor.ndim != 4 or tensor.shape[2] != tokens or tensor.shape[1] > heads or tensor.shape[3] > size:
                raise InvalidRequest(
                    f"layer {layer} keeps {list(tensor.shape)}, and a prefix has at most {[1, heads, tokens, size]}"
                )
            # (1, H, N, D) -> (N, H, D)
            flat[:, layer, part, : tensor.shape[1], : tensor.shape[3]] = tensor[0].transpose(0, 1)
    if not all(bool(extreme.isfinite()) for extreme in flat.aminmax()):
        raise InvalidRequest(
            f"the model computes keys or values that are NaN or infinite in {str(dtype).removeprefix('torch.')}: look "
            "at the adapter's weights, or load the model in float32"
        )
    return flat.view(tokens, -1)

"""Soft prompts that PEFT trained: the embeddings of their virtual tokens, as PEFT computes them.

Their keys and values are a prefix too: virtual tokens stand in front, and attention is causal, so nothing that follows
changes them.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from prefix_service.checkpoints.sources import TensorFiles, readable
from prefix_service.client.transformers.devices import input_device
from prefix_service.errors import DimensionMismatch, InvalidCheckpoint, InvalidConfig, InvalidRequest
from prefix_service.prefix.config import SOFT_PROMPTS
from prefix_service.prefix.file_names import CONFIG_NAME, WEIGHTS_NAME
from prefix_service.prefix.json_text import MAX_BASE_CONFIG_BYTES, parse_config_json, shown
from prefix_service.prefix.layouts import Shape, shown_names

HOW_TO_GET_PEFT: Final = "PEFT is not installed: pip install 'prefix-service[compile]'"
_MULTITASK: Final = "MULTITASK_PROMPT_TUNING"
_OF_TASKS: Final = ("prefix_task_cols", "prefix_task_rows")


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """A folder of PEFT, checked: its type, its number of virtual tokens and their width, and the task that was chosen.

    `base` is the name of the base model that the config has, or None.
    """

    folder: Path
    peft_type: str
    num_virtual_tokens: int
    width: int
    task: int | None
    base: str | None


def read_soft_prompt(folder: Path, task: int | None = None) -> SoftPrompt:
    """Returns what a folder of PEFT holds, from its config and the header of its weights.

    Raises:
        InvalidConfig: there is no config, or the adapter is none whose virtual tokens can be compiled.
        InvalidCheckpoint: there are no safetensors weights; they have no virtual tokens, no tasks, or other tensors
            too; or the config contradicts their sizes.
        InvalidRequest: a task is missing, out of range, or given for an adapter that has none.
    """
    values = _config(folder / CONFIG_NAME)
    peft_type = values["peft_type"]
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise InvalidCheckpoint(
            f"there is no {weights}: load the adapter in PEFT, and write it with save_pretrained, which writes this "
            "file"
        )
    shapes = TensorFiles.open([weights]).shapes
    shape = shapes.get("prompt_embeddings", ())
    if len(shape) != 2:
        raise InvalidCheckpoint(
            f"{weights} has no prompt_embeddings [tokens, width], but {sorted(shapes)[:4]}: is it the file of this "
            f"{peft_type} adapter?"
        )
    _check_tensors(values, shapes, weights)
    _check_task(peft_type, task, shapes)
    base = values.get("base_model_name_or_path")
    return SoftPrompt(folder, peft_type, shape[0], shape[1], task, base if isinstance(base, str) else None)


def embeddings(model: Any, prompt: SoftPrompt) -> Tensor:
    """Returns the embeddings of the virtual tokens, `[1, N, width]`, as PEFT puts them in front of the input's.

    The model's weights are left as they are.

    Raises:
        DimensionMismatch: the adapter was trained for a model of another width.
        InvalidRequest: PEFT is not installed.
        InvalidCheckpoint: PEFT cannot load the adapter.
    """
    words, device = model.get_input_embeddings(), input_device(model)
    width = words.weight.shape[1]
    if prompt.width != width:
        raise DimensionMismatch(
            f"the virtual tokens of {prompt.folder} have {prompt.width} numbers, and the embeddings of the model "
            f"{width}: compile it with its own base model{'' if prompt.base is None else f', {prompt.base}'}"
        )
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError as error:
        raise InvalidRequest(HOW_TO_GET_PEFT) from error
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        config: Any = PeftConfig.from_pretrained(str(prompt.folder))
        if prompt.peft_type == _MULTITASK:
            config.prompt_tuning_init = "RANDOM"  # the beginning of training, which the weights replace
        with warnings.catch_warnings():
            # PEFT reads a property that transformers deprecates, which the caller cannot change.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped: Any = PeftModel.from_pretrained(model, str(prompt.folder), config=config)
        tasks = {} if prompt.task is None else {"task_ids": torch.tensor([prompt.task], device=device)}
        with torch.no_grad():
            found: Tensor = wrapped.get_prompt(1, **tasks)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"PEFT cannot load {prompt.folder}: {error}") from error
    finally:
        for parameter in trainable:  # PEFT freezes them
            parameter.requires_grad_(True)
    return found.to(device, words.weight.dtype)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidConfig(f"there is no {path}, the adapter's config, which PEFT writes beside the weights")
    with readable(path):
        # CPT's has three numbers for each virtual token.
        values = parse_config_json(path.read_bytes(), str(path), MAX_BASE_CONFIG_BYTES)
    peft_type = values.get("peft_type")
    if peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise InvalidConfig(f"{path} is of a {peft_type} adapter, which is a prefix already: publish it as it is")
    if peft_type not in SOFT_PROMPTS:
        raise InvalidConfig(
            f"{path} is of peft_type {shown(peft_type)}, and a prefix can be compiled of {', '.join(SOFT_PROMPTS)}: "
            "other types change weights or activations"
        )
    if (task_type := values.get("task_type")) not in (None, "CAUSAL_LM"):
        raise InvalidConfig(
            f"{path} is of task_type {shown(task_type)}: only adapters of causal language models (CAUSAL_LM) can be "
            "compiled, whose virtual tokens see nothing of the input"
        )
    if modules := values.get("modules_to_save"):
        raise InvalidConfig(
            f"{path} has modules_to_save {shown(modules)}: the adapter also changes layers of the base model, which no "
            "prefix holds"
        )
    return values


def _check_tensors(values: Mapping[str, Any], shapes: Mapping[str, Shape], weights: Path) -> None:
    """Checks that the weights hold the virtual tokens alone, in the sizes that the config has.

    PEFT would load a tensor of any other name into the base model, and allocate what the config says before it compares
    the sizes.

    Raises:
        InvalidCheckpoint: they do not.
    """
    if others := shapes.keys() - {"prompt_embeddings", *_OF_TASKS}:
        raise InvalidCheckpoint(
            f"{weights} has more than virtual tokens ({shown_names(others)}): the adapter also changes the base model, "
            "which no prefix holds"
        )
    tokens, width = shapes["prompt_embeddings"]
    sizes = {"num_virtual_tokens": tokens, "token_dim": width, "num_transformer_submodules": 1}
    columns = shapes.get(_OF_TASKS[0], ())
    if values["peft_type"] == _MULTITASK and len(columns) == 3:
        sizes |= {"num_tasks": columns[0], "num_ranks": columns[2]}
    for name, size in sizes.items():
        found = values.get(name)
        if found is not None and (type(found) is not int or found != size):
            raise InvalidCheckpoint(f"{name} is {shown(found)} in the config, and {size} by the tensors of {weights}")
    if values.get("num_virtual_tokens") is None:
        raise InvalidCheckpoint(
            f"num_virtual_tokens is missing in the config, and {tokens} by the tensors of {weights}"
        )


def _check_task(peft_type: str, task: int | None, shapes: Any) -> None:
    if peft_type != _MULTITASK:
        if task is not None:
            raise InvalidRequest(f"a {peft_type} adapter has no tasks: leave task {task} out")
        return
    tasks = next(iter(shapes.get("prefix_task_cols", ())), 0)
    if not tasks:
        raise InvalidCheckpoint(
            f"the weights have no prefix_task_cols [tasks, tokens, ranks]: are they of this {_MULTITASK} adapter?"
        )
    if task is None or not 0 <= task < tasks:
        given = "none was given" if task is None else f"got {task}"
        raise InvalidRequest(
            f"a {_MULTITASK} adapter needs a task: this one has 0 to {tasks - 1}, and {given}: choose one with task "
            "(--task N)"
        )

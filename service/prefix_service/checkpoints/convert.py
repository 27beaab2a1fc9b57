"""Converts foreign and pickled checkpoints to a safe adapter folder, on their owner's machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from prefix_service.checkpoints.cartridges import flat_cartridge, is_cartridge
from prefix_service.checkpoints.control_trans import is_adapters_config, is_control_trans, read_control_trans
from prefix_service.checkpoints.folders import write_folder
from prefix_service.checkpoints.pickles import read_pickle
from prefix_service.checkpoints.sources import TensorFiles, is_weights_name, readable, weight_files
from prefix_service.errors import InvalidCheckpoint, InvalidConfig
from prefix_service.prefix.checkpoint import load_weights
from prefix_service.prefix.config import PrefixConfig, PrefixTuningConfig, parse_config
from prefix_service.prefix.file_names import CONFIG_NAME, PICKLE_SUFFIXES
from prefix_service.prefix.json_text import MAX_BASE_CONFIG_BYTES, MAX_CONFIG_BYTES, parse_config_json
from prefix_service.prefix.layouts import Match, Shape, find_prefix, shown_names


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion.

    `opened` describes how the source was opened, `found` the prefix in it; `config` and `tensors` are the adapter's;
    `left_out` names the tensors and objects that are not part of the prefix.
    """

    opened: str
    found: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    left_out: list[str]


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """An opened checkpoint: the shapes of its state dict, a function that reads a tensor of it, and the names of all
    other contents.
    """

    opened: str
    shapes: Mapping[str, Shape]
    tensor: Callable[[str], Tensor]
    rest: list[str]


def convert(
    source: Path, *, config: Path | None = None, base_config: Path | None = None, unsafe: bool = False
) -> Conversion:
    """Reads a checkpoint, a file or a folder, and returns a safe adapter; `unsafe` allows pickles that can run code.

    The config is `config`, or the adapter_config.json next to the checkpoint, or follows from the tensors and
    `base_config`, the base model's config.json. The service accepts the result.

    Raises:
        UnsafeCheckpoint: a pickle needs more than tensors and torch's containers.
        InvalidCheckpoint: the checkpoint cannot be read; has no prefix, several or an incomplete one; contradicts the
            config; or is a cartridge with tensors of unknown names.
        InvalidConfig: there is no config, and too little information to infer one.
    """
    base = None if base_config is None else _read_config(base_config, MAX_BASE_CONFIG_BYTES)
    checkpoint = _opened(source, unsafe=unsafe)
    if is_cartridge(checkpoint.shapes):
        read = _cartridge
    elif is_control_trans(checkpoint.shapes):
        read = _control_trans
    else:
        read = _prefix
    conversion = read(checkpoint, config or _config_next_to(source), base)
    load_weights(bytearray(save(dict(conversion.tensors))), parse_config(conversion.config))
    return conversion


def write(conversion: Conversion, folder: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors to a folder, which is created if it does not exist.

    Raises:
        Conflict: the folder contains one of the files already.
        StorageFailed: the folder cannot be written.
    """
    write_folder(folder, conversion.config, conversion.tensors)


def _opened(source: Path, *, unsafe: bool) -> _Checkpoint:
    path = _find(source)
    if path.suffix == ".safetensors":
        files = TensorFiles.open(weight_files(source))
        return _Checkpoint("safetensors: nothing to unpickle", files.shapes, files.tensor, [])
    pickled = read_pickle(path, unsafe=unsafe)
    scope = pickled.scope
    shapes = {
        name.removeprefix(scope): tuple(tensor.shape)
        for name, tensor in pickled.tensors.items()
        if name.startswith(scope)
    }
    rest = [name for name in pickled.tensors if not name.startswith(scope)] + pickled.objects
    return _Checkpoint(pickled.opened, shapes, lambda name: pickled.tensor(scope + name), rest)


def _prefix(checkpoint: _Checkpoint, path: Path | None, base: dict[str, Any] | None) -> Conversion:
    # First the config: the error of another kind of adapter names the kind.
    written = None if path is None else parse_config(_read_config(path), from_file=True)
    match = find_prefix(checkpoint.shapes)
    config = _config_for(match, checkpoint.shapes, written, base)
    config.require_dimensions()
    tensors = {name: checkpoint.tensor(name) for name in match.tensors.values()}
    left_out = [name for name in checkpoint.shapes if name not in tensors] + checkpoint.rest
    found = f"{match.layout.name}: {shown_names(tensors)}"
    return Conversion(checkpoint.opened, found, config.model_dump(), tensors, left_out)


def _cartridge(checkpoint: _Checkpoint, path: Path | None, base: dict[str, Any] | None) -> Conversion:
    values, flat = flat_cartridge(checkpoint.shapes, checkpoint.tensor)
    config = _flat_config(values, None if path is None else _read_config(path), path, base)
    found = (
        f"Cartridges: {config.num_layers} layers, {values['num_frozen_tokens']} frozen and "
        f"{config.num_virtual_tokens} tokens in all"
    )
    return Conversion(checkpoint.opened, found, config.model_dump(), {"prompt_embeddings": flat}, list(checkpoint.rest))


def _control_trans(checkpoint: _Checkpoint, path: Path | None, base: dict[str, Any] | None) -> Conversion:
    if base is None:
        raise InvalidConfig(
            "control_trans does not say how many layers and heads it is for: give the base model's --base-config (Li & "
            "Liang's code writes it beside the checkpoint, as config.json)"
        )
    if base.get("is_encoder_decoder") is True:
        raise InvalidConfig("the base model is an encoder-decoder, and control_trans is read for decoders alone")
    written = None if path is None else _read_config(path)
    adapters_config = written if written is not None and is_adapters_config(written) else None
    sizes = PrefixTuningConfig(peft_type="PREFIX_TUNING").filled(base)
    layers, heads, width = sizes.num_layers or 0, sizes.num_attention_heads or 0, sizes.token_dim or 0
    read = read_control_trans(
        checkpoint.shapes, checkpoint.tensor, layers=layers, heads=heads, width=width, adapters_config=adapters_config
    )
    values = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": len(read.flat),
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": width,
    }
    if adapters_config is not None and isinstance(adapters_config.get("model_name"), str):
        values["base_model_name_or_path"] = adapters_config["model_name"]
    config = _flat_config(values, written if adapters_config is None else None, path, base)
    left_out = [name for name in checkpoint.shapes if name not in read.names] + checkpoint.rest
    found = f"{read.project}: {layers} layers, {len(read.flat)} tokens; {shown_names(read.names)}"
    tensors = {"prompt_embeddings": read.flat.contiguous()}
    return Conversion(checkpoint.opened, found, config.model_dump(), tensors, left_out)


def _flat_config(
    values: dict[str, Any], written: dict[str, Any] | None, path: Path | None, base: dict[str, Any] | None
) -> PrefixConfig:
    """Returns the config of a prefix whose sizes follow from its tensors; the one that was written, if there is one.

    Raises:
        InvalidConfig: the written config contradicts the tensors.
    """
    if written is None:
        return parse_config({"base_model_name_or_path": _name_of(base), **values})
    config = parse_config(written, from_file=True)
    config = config if base is None else config.filled(base)
    if contradictions := [
        n for n in values if n not in ("task_type", "inference_mode") and getattr(config, n, None) != values[n]
    ]:
        raise InvalidConfig(f"{path} contradicts the tensors in {', '.join(contradictions)}")
    return config


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise InvalidCheckpoint(f"there is no {source}")
    with readable(source):
        found = sorted(path for path in source.iterdir() if is_weights_name(path.name))
    if not found or any(path.suffix not in PICKLE_SUFFIXES for path in found):
        return weight_files(source)[0]
    if len(found) != 1:
        raise InvalidCheckpoint(f"{source} holds {len(found)} checkpoints: name one of {[p.name for p in found]}")
    return found[0]


def _config_next_to(source: Path) -> Path | None:
    path = (source if source.is_dir() else source.parent) / CONFIG_NAME
    return path if path.exists() else None


def _read_config(path: Path, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    with readable(path):
        data = path.read_bytes()
    return parse_config_json(data, str(path), most)


def _name_of(base: dict[str, Any] | None) -> str | None:
    name = None if base is None else base.get("_name_or_path")
    return name if name and isinstance(name, str) else None


def _config_for(
    match: Match, shapes: Mapping[str, Shape], written: PrefixConfig | None, base: dict[str, Any] | None
) -> PrefixConfig:
    if written is not None:
        return written if base is None else written.filled(base)
    if base is None:
        raise InvalidConfig(
            "the checkpoint has no adapter_config.json: name it with --config, or name the base model's config.json "
            "with --base-config"
        )
    rows = {role: (*shapes[name], 0)[0] for role, name in match.tensors.items()}
    values: dict[str, Any] = {"base_model_name_or_path": _name_of(base)}
    if "trainable_embedding" in rows:
        frozen = rows.get("frozen_embedding", 0)
        tokens = frozen + rows["trainable_embedding"]
        values |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": frozen, "num_virtual_tokens": tokens}
    else:
        tokens = rows["embedding"] if "embedding" in rows else rows["prompt_embeddings"]
        values |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens}
        if "transform.b1" in rows:
            values |= {"prefix_projection": True, "encoder_hidden_size": rows["transform.b1"]}
    return parse_config(values).filled(base)

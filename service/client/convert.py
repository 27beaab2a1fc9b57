"""Foreign and pickled checkpoints, turned into a safe adapter folder on their owner's own machine.

Opening a pickle can run code, so it happens here, where the owner asks for it, and never in the service: first with
`torch.load(weights_only=True)`, then with nothing but torch's own containers allowed beside it, and only on request
without restriction (CVE-2025-32434).
"""

import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from service.client.checkpoints import CONFIG_NAME, PICKLES, WEIGHTS_NAME, TensorFiles, cut, weight_files
from service.errors import Conflict, InvalidCheckpoint, InvalidConfig, UnsafeCheckpoint
from service.prefix.base_model import infer_dimensions
from service.prefix.checkpoint import Match, check_shapes, find_prefix
from service.prefix.config import CartridgeConfig, PrefixConfig, parse_config, parse_json

_Allowed = Callable[..., Any] | tuple[Callable[..., Any], str]

# What training frameworks wrap a state dict in: Lightning, accelerate and torch recipes, DeepSpeed.
_CONTAINERS: Final = ("state_dict", "model_state_dict", "model", "module")
_CARTRIDGE_LISTS: Final = ("fixed_keys", "trainable_keys", "fixed_values", "trainable_values")
_SAFE_CONTAINERS: Final[list[Callable[..., Any] | tuple[Callable[..., Any], str]]] = [
    nn.ParameterList,
    nn.ParameterDict,
]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted: how the source was opened, what was found, and the config and tensors that came of it."""

    opened: str
    found: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]


def convert(
    source: Path, *, config: Path | None = None, base_config: Path | None = None, unsafe: bool = False
) -> Conversion:
    """Read a checkpoint, a file or a folder, into a safe adapter; `unsafe` allows pickles that may run code.

    The config is `config`, or the adapter_config.json beside the checkpoint, or follows from the tensors and
    `base_config`, the base model's config.json.

    Raises:
        UnsafeCheckpoint: a pickle that needs more than tensors and torch's containers.
        InvalidCheckpoint: no prefix, an incomplete one, more than one, or one that contradicts the config.
        InvalidConfig: there is no config, and not enough to infer one.
    """
    path = _find(source)
    base = None if base_config is None else parse_json(base_config.read_bytes(), str(base_config))
    if path.suffix == ".safetensors":
        files = TensorFiles.open(weight_files(source))
        match = find_prefix(files.shapes)
        opened, tensors = "safetensors: nothing to unpickle", cut(files, match)
    else:
        opened, state = load_pickle(path, unsafe=unsafe)
        if set(_CARTRIDGE_LISTS[1::2]) <= set(state):
            return _from_cartridge(opened, state, base)
        every = dict(_flatten(_unwrapped(state)))
        match = find_prefix({name: tuple(tensor.shape) for name, tensor in every.items()})
        tensors = {name: every[name].contiguous() for name in match.tensors.values()}
    parsed = _config_for(match, tensors, config or _beside(source), base)
    parsed.require_dimensions()
    check_shapes(match, parsed, lambda name: tuple(tensors[name].shape))
    return Conversion(opened, f"{match.layout.name}: {', '.join(sorted(tensors))}", parsed.model_dump(), tensors)


def write(conversion: Conversion, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Raises:
        Conflict: the folder holds one of them already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (folder / name).exists():
            raise Conflict(f"{folder / name} exists: choose an empty folder")
    save_file(dict(conversion.tensors), folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(conversion.config, indent=2, sort_keys=True) + "\n")


def load_pickle(path: Path, *, unsafe: bool) -> tuple[str, Mapping[str, Any]]:
    """Unpickle as strictly as works; how that was, and the mapping that came of it.

    Raises:
        UnsafeCheckpoint: it needs more than tensors and torch's containers, and `unsafe` is false.
        InvalidCheckpoint: it is damaged, or no mapping.
    """
    try:
        opened, state = "torch.load with weights_only=True: tensors alone", _load(path, weights_only=True)
    except pickle.UnpicklingError:
        opened, state = _load_less_strictly(path, unsafe=unsafe)
    if not isinstance(state, Mapping):
        raise InvalidCheckpoint(f"{path} holds a {type(state).__name__}, not a state dict")
    return opened, state


def _load_less_strictly(path: Path, *, unsafe: bool) -> tuple[str, Any]:
    try:
        with torch.serialization.safe_globals(_SAFE_CONTAINERS):
            return "torch.load with weights_only=True and torch.nn's parameter containers", _load(
                path, weights_only=True
            )
    except pickle.UnpicklingError as error:
        if not unsafe:
            reason = str(error).splitlines()[0]
            raise UnsafeCheckpoint(
                f"{path} needs more than tensors ({reason}): if you trust who wrote it, --unsafe opens it without "
                "restriction, and it may then run code"
            ) from error
    return "torch.load WITHOUT restriction, as --unsafe asked: it may have run code", _load(path, weights_only=False)


def _load(path: Path, *, weights_only: bool) -> Any:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on pickle protocols: it works or fails
            return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError:
        raise
    except (RuntimeError, EOFError, ValueError) as error:
        raise InvalidCheckpoint(f"{path} cannot be read by torch.load: {str(error).splitlines()[0]}") from error


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise InvalidCheckpoint(f"there is no {source}")
    pickles = sorted(path for path in source.iterdir() if path.suffix in PICKLES)
    if any(source.glob("*.safetensors")):
        return weight_files(source)[0]
    # Trainers leave their own pickles beside the weights.
    weights = [p for p in pickles if p.stem not in ("training_args", "optimizer", "scheduler") and "rng" not in p.stem]
    if len(weights) != 1:
        raise InvalidCheckpoint(f"{source} holds {len(weights)} checkpoints: name one of {[p.name for p in weights]}")
    return weights[0]


def _beside(source: Path) -> Path | None:
    path = (source if source.is_dir() else source.parent) / CONFIG_NAME
    return path if path.exists() else None


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = next((state[name] for name in _CONTAINERS if isinstance(state.get(name), Mapping)), None)
    return state if inner is None else _unwrapped(inner)


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value.detach()
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _flatten(child, f"{name}.{key}" if name else str(key))


def _config_for(
    match: Match, tensors: Mapping[str, Tensor], path: Path | None, base: dict[str, Any] | None
) -> PrefixConfig:
    if path is not None:
        config = parse_config(parse_json(path.read_bytes(), str(path)), from_file=True)
        return config if base is None else config.filled(base)
    if base is None:
        raise InvalidConfig(
            "the checkpoint has no adapter_config.json: give --config, or the base model's --base-config"
        )
    shapes = {role: tuple(tensors[name].shape) for role, name in match.tensors.items()}
    values: dict[str, Any] = {"base_model_name_or_path": base.get("_name_or_path") or None, **infer_dimensions(base)}
    if "trainable_embedding" in shapes:
        frozen = shapes.get("frozen_embedding", (0,))[0]
        tokens = frozen + shapes["trainable_embedding"][0]
        values |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": frozen, "num_virtual_tokens": tokens}
    else:
        first = shapes.get("embedding") or shapes["prompt_embeddings"]
        values |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": first[0]}
        if "transform.b1" in shapes:
            values |= {"prefix_projection": True, "encoder_hidden_size": shapes["transform.b1"][0]}
    return parse_config(values)


def _from_cartridge(opened: str, state: Mapping[str, Any], base: dict[str, Any] | None) -> Conversion:
    """Cartridges' `.pt` (HazyResearch): lists of `[1, H, tokens, D]`, one tensor a layer, for fixed and trained."""
    keys, values = (_joined(state, part) for part in ("keys", "values"))
    if len(keys) != len(values):
        raise InvalidCheckpoint(f"the cartridge has {len(keys)} layers of keys and {len(values)} of values")
    _, heads, tokens, head_dim = keys[0].shape
    # L x 2 x (1, H, N, D) -> (L, 2, H, N, D) -> (N, L, 2, H, D) -> (N, L*2*H*D)
    stacked = torch.stack([torch.cat(pair) for pair in zip(keys, values, strict=True)])
    flat = stacked.permute(3, 0, 1, 2, 4).reshape(tokens, -1)
    fixed = state.get("fixed_keys") or []
    config = CartridgeConfig(
        base_model_name_or_path=None if base is None else base.get("_name_or_path"),
        inference_mode=True,
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        num_frozen_tokens=fixed[0].shape[2] if len(fixed) else 0,
        num_layers=len(keys),
        num_attention_heads=heads,
        token_dim=heads * head_dim,
    )
    found = f"Cartridges: {len(keys)} layers, {config.num_frozen_tokens} fixed and {tokens} tokens in all"
    return Conversion(opened, found, config.model_dump(), {"prompt_embeddings": flat.contiguous()})


def _joined(state: Mapping[str, Any], part: str) -> list[Tensor]:
    trained, fixed = list(state[f"trainable_{part}"]), list(state.get(f"fixed_{part}") or [])
    if not trained or any(tensor.ndim != 4 or tensor.shape[0] != 1 for tensor in (*trained, *fixed)):
        raise InvalidCheckpoint(f"trainable_{part} and fixed_{part} must hold one [1, heads, tokens, size] a layer")
    if fixed and len(fixed) != len(trained):
        raise InvalidCheckpoint(f"fixed_{part} has {len(fixed)} layers, trainable_{part} has {len(trained)}")
    # (1, H, fixed, D) + (1, H, trained, D) -> (1, H, N, D)
    pairs = zip(fixed, trained, strict=True) if fixed else ((tensor,) for tensor in trained)
    return [torch.cat([tensor.detach() for tensor in pair], dim=2) for pair in pairs]

"""Reads the prefixes of Li & Liang's PrefixTuning, AdapterHub and OpenPrompt, whose tensors are named `control_trans`.

The prefix is `control_trans(wte)`: `wte.weight` `[N, in]` goes through linear layers `control_trans.0`,
`control_trans.2`, … with an activation between them. Or `control_trans` is the prefix itself: flat, or
`[layers*2, 1, heads, N, size]` as Li & Liang's code copies it from a model's cache. OpenPrompt prepends `decoder_` to
both names. All three read the result as `[N, layers*2, heads, size]`, as PEFT does.

AdapterHub saves the same tensors under each layer again.

Prefixes of an encoder, of cross-attention, and those that depend on the input (infix, gates) are refused.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - its customary name
from torch import Tensor

from prefix_service.errors import InvalidCheckpoint, InvalidConfig
from prefix_service.prefix.json_text import shown
from prefix_service.prefix.layouts import Shape, shown_names

_MEMBER: Final = re.compile(r"((?:.+\.)?(?:decoder_)?)(control_trans(?:\.[0-9]{1,3}\.(?:weight|bias))?|wte\.weight)")
_FLAT: Final = "control_trans"
# Further parts of the same module: prefixes of the encoder or of cross-attention, and of the input's own tokens.
_OTHER_PARTS: Final = re.compile(r"(?:.+\.)?(?:control_trans(?:2|_enc)\b.*|wte(?:2|_enc)\.weight)")
_IN_ADAPTERS: Final = re.compile(r"(?:.+\.)?prefix_tunings\.[^.]+\.(?P<place>[^.]+)\.")
_SHARED: Final = re.compile(r"(?:.+\.)?(prefix_tunings\..+)")
_MOST_VALUES: Final = 1 << 31  # that a layer of a bottleneck makes: 8 GiB
_ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, slots=True)
class ControlTrans:
    """A prefix `[tokens, layers*2*heads*size]`, the names of the tensors that made it, and its project's name."""

    flat: Tensor
    names: Collection[str]
    project: str


def is_control_trans(names: Collection[str]) -> bool:
    """Returns whether tensors with these names are a prefix of one of these projects."""
    return any("control_trans" in name for name in names)


def is_adapters_config(values: Mapping[str, Any]) -> bool:
    """Returns whether an adapter_config.json is AdapterHub's, and not PEFT's."""
    return "peft_type" not in values and isinstance(values.get("config"), dict)


def read_control_trans(
    shapes: Mapping[str, Shape],
    tensor_of: Callable[[str], Tensor],
    *,
    layers: int,
    heads: int,
    width: int,
    adapters_config: Mapping[str, Any] | None,
) -> ControlTrans:
    """Returns the prefix for a base model of so many layers and key/value heads, whose keys are `width` wide together.

    `adapters_config` is AdapterHub's adapter_config.json, or None if the file is another project's.

    Raises:
        InvalidCheckpoint: there are several prefixes, or one that is incomplete, does not fit the base model, or is not
            for a decoder's self-attention.
        InvalidConfig: AdapterHub's config is missing, contradicts the tensors, or asks for something that is no prefix.
    """
    aliases = _aliases(shapes, tensor_of)
    shapes = {name: shape for name, shape in shapes.items() if name not in aliases}
    scope = _scope(shapes)
    found = _IN_ADAPTERS.fullmatch(scope)
    activation: Callable[[Tensor], Tensor] = torch.tanh
    if found is not None:
        _check_adapters_tensors(shapes, scope, found["place"])
        activation = _activation(adapters_config, is_flat=scope + _FLAT in shapes)
    elif not scope.endswith("decoder_") and scope + "input_tokens" in shapes:
        raise InvalidCheckpoint(f"{scope}{_FLAT} is OpenPrompt's prefix of the encoder, which has no past_key_values")
    if scope + _FLAT in shapes:
        names = {scope + _FLAT}
        flat = _copied(tensor_of(scope + _FLAT), layers, heads, width)
    else:
        linear = _linear(shapes, scope, layers * 2 * width)
        names = {scope + "wte.weight", *(f"{name}.{part}" for name in linear for part in ("weight", "bias"))}
        # (N, in) -> (N, L*2*H*D)
        flat = tensor_of(scope + "wte.weight").to(torch.float32)
        for name in linear:
            flat = flat if name == linear[0] else activation(flat)
            weight, bias = (tensor_of(f"{name}.{part}").to(torch.float32) for part in ("weight", "bias"))
            flat = F.linear(flat, weight, bias)
    if adapters_config is not None:
        _check_length(adapters_config, len(flat))
    project = "Li & Liang" if found is None else "AdapterHub"
    return ControlTrans(flat, names | aliases, "OpenPrompt" if scope.endswith("decoder_") else project)


def _aliases(shapes: Mapping[str, Shape], tensor_of: Callable[[str], Tensor]) -> set[str]:
    """Returns the names under which tensors are saved again: AdapterHub's layers share one pool, and each saves it.

    Raises:
        InvalidCheckpoint: a layer's copy differs.
    """
    first: dict[str, str] = {}
    aliases = set()
    for name in sorted(shapes, key=len):
        shared = _SHARED.fullmatch(name)
        if shared is None or (same := first.setdefault(shared[1], name)) == name:
            continue
        if shapes[name] != shapes[same] or not torch.equal(tensor_of(name), tensor_of(same)):
            raise InvalidCheckpoint(
                f"{shown_names([name, same])} should be one tensor, and differ: save the adapter again"
            )
        aliases.add(name)
    return aliases


def _scope(shapes: Mapping[str, Shape]) -> str:
    """Returns the part of the names in front of `control_trans`."""
    members = {name: _MEMBER.fullmatch(name) for name in shapes}
    scopes = {member[1] for member in members.values() if member is not None and member[2].startswith(_FLAT)}
    others = {name for name in shapes if _OTHER_PARTS.fullmatch(name)}
    if len(scopes) > 1 or (others and scopes):
        raise InvalidCheckpoint(
            f"the checkpoint holds more than a prefix of a decoder's self-attention ({shown_names(scopes | others)}): "
            "prefixes of an encoder or of cross-attention, and those added to the input's own keys and values, are not "
            "past_key_values"
        )
    if not scopes:
        close = [name for name in shapes if "control_trans" in name]
        raise InvalidCheckpoint(f"{shown_names(close)}: there is no control_trans or control_trans.0.weight among them")
    return scopes.pop()


def _check_adapters_tensors(shapes: Mapping[str, Shape], scope: str, place: str) -> None:
    """Raises InvalidCheckpoint if an adapter of AdapterHub is more than a prefix of self-attention."""
    if not place.endswith("self_prefix"):
        raise InvalidCheckpoint(
            f"{scope}{_FLAT} is a prefix for {place}, and a decoder's self-attention takes the others"
        )
    if unknown := [name for name in shapes if not name.startswith(scope)]:
        what = "gates, which depend on the input," if any("gates" in name for name in unknown) else "other parts,"
        raise InvalidCheckpoint(f"the adapter has {what} beside its prefix: {shown_names(unknown)}")


def _activation(config: Mapping[str, Any] | None, *, is_flat: bool) -> Callable[[Tensor], Tensor]:
    """Returns the function between the layers of AdapterHub's bottleneck."""
    if config is None:
        if is_flat:
            return torch.tanh
        raise InvalidConfig("AdapterHub's adapter_config.json is missing, which names the bottleneck's non_linearity")
    values = config["config"]
    if values.get("architecture") != "prefix_tuning":
        raise InvalidConfig(f"AdapterHub's architecture must be prefix_tuning, got {shown(values.get('architecture'))}")
    if values.get("leave_out"):
        raise InvalidConfig(f"leave_out is {shown(values['leave_out'])}: a prefix is for every layer")
    if values.get("use_gating"):
        raise InvalidConfig("use_gating is true: gates depend on the input, and past_key_values do not")
    name = values.get("non_linearity", "tanh")
    if isinstance(name, str) and name.lower() in _ACTIVATIONS:
        return _ACTIVATIONS[name.lower()]
    if is_flat:
        return torch.tanh
    raise InvalidConfig(f"non_linearity must be one of {', '.join(_ACTIVATIONS)}, got {shown(name)}")


def _check_length(config: Mapping[str, Any], tokens: int) -> None:
    length = config["config"].get("prefix_length")
    if length != tokens:
        raise InvalidConfig(
            f"prefix_length is {shown(length)} in AdapterHub's config, and the prefix has {tokens} tokens"
        )


def _copied(prefix: Tensor, layers: int, heads: int, width: int) -> Tensor:
    """Returns a prefix that has no bottleneck as `[N, layers*2*heads*size]`."""
    row = layers * 2 * width
    if prefix.ndim == 1 and len(prefix) and len(prefix) % row == 0:
        return prefix.view(-1, row)
    if prefix.ndim == 5 and prefix.numel():
        wanted = (layers * 2, 1, heads, prefix.shape[3], width // heads)
        if prefix.shape == wanted:
            # (L*2, 1, H, N, D) -> (N, 1, L*2, H, D) -> (N, L*2*H*D)
            return prefix.permute(3, 1, 0, 2, 4).reshape(-1, row)
    raise InvalidCheckpoint(
        f"{_FLAT} has shape {list(prefix.shape)}, and a prefix for {layers} layers of {heads} heads of size "
        f"{width // heads} has tokens * {row} values, or shape [{layers * 2}, 1, {heads}, tokens, {width // heads}]"
    )


def _linear(shapes: Mapping[str, Shape], scope: str, row: int) -> list[str]:
    """Returns the names of the linear layers in order, after comparing their shapes."""
    found = re.compile(re.escape(f"{scope}{_FLAT}.") + r"([0-9]+)\.(?:weight|bias)")
    numbers = sorted({int(member[1]) for name in shapes if (member := found.fullmatch(name))})
    names = [f"{scope}{_FLAT}.{number}" for number in numbers]
    wanted = [scope + "wte.weight", *(f"{name}.{part}" for name in names for part in ("weight", "bias"))]
    if missing := [name for name in wanted if name not in shapes]:
        raise InvalidCheckpoint(f"incomplete prefix: {shown_names(missing)} missing")
    if any(second - first != 2 for first, second in pairwise([-2, *numbers])) or len(numbers) < 2:
        raise InvalidCheckpoint(
            f"{scope}{_FLAT} has the layers {numbers[:8]}, not 0, 2, … with activations between them"
        )
    embedding = shapes[scope + "wte.weight"]
    if len(embedding) != 2 or not embedding[0]:
        raise InvalidCheckpoint(f"{scope}wte.weight must be [tokens, width], got {list(embedding)}")
    width = embedding[1]
    if embedding[0] * max(shapes[f"{name}.bias"][:1] or (0,) for name in names)[0] > _MOST_VALUES:
        raise InvalidCheckpoint(f"a bottleneck for {embedding[0]} tokens would make more than {_MOST_VALUES} values")
    for name in names:
        weight, bias = shapes[f"{name}.weight"], shapes[f"{name}.bias"]
        if len(weight) != 2 or weight[1] != width or bias != weight[:1]:
            raise InvalidCheckpoint(
                f"{name} must be [out, {width}] with a bias [out], got {list(weight)} and {list(bias)}"
            )
        width = weight[0]
    if width != row:
        raise InvalidCheckpoint(
            f"{names[-1]} makes {width} values for a token, and the keys and values of the base model's layers are "
            f"{row}" + (": this is a soft prompt of embeddings" if width == embedding[1] else "")
        )
    return names

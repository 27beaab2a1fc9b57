"""Reads the `.pt` files of Cartridges (HazyResearch): lists with one `[1, heads, tokens, size]` tensor per layer.

`trainable_keys` and `trainable_values` always exist. Frozen tokens, which come first in the prefix, are in
`frozen_keys` and `frozen_values`; files of an earlier trainer call them `fixed_keys` and `fixed_values`.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from prefix_service.errors import InvalidCheckpoint
from prefix_service.prefix.layouts import shown_names

_MEMBER: Final = re.compile(r"(trainable|frozen|fixed)_(keys|values)\.([0-9]{1,6})")
_KNOWN: Final = "trainable_keys, trainable_values, frozen_keys, frozen_values, fixed_keys, fixed_values"

Lists = Mapping[str, list[Tensor]]


def is_cartridge(names: Collection[str]) -> bool:
    """Returns whether tensors with these names, such as `trainable_keys.0`, are a cartridge."""
    return any((found := _MEMBER.fullmatch(name)) and found[1] == "trainable" for name in names)


def flat_cartridge(names: Collection[str], tensor_of: Callable[[str], Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Returns the config values that follow from a cartridge, and its flat prefix `[tokens, layers*2*heads*size]`.

    Raises:
        InvalidCheckpoint: a tensor has an unknown name, a list lacks layers, or shapes contradict each other.
    """
    lists = _lists(names, tensor_of)
    if missing := [name for name in ("trainable_keys", "trainable_values") if not lists[name]]:
        raise InvalidCheckpoint(f"the cartridge has no {missing[0]}")
    frozen_kind = _frozen_kind(lists)
    layers = len(lists["trainable_keys"])
    parts = [kind for kind in (frozen_kind, "trainable") if kind is not None]
    tokens = {kind: _tokens(lists, kind, layers) for kind in parts}
    if not sum(tokens.values()):
        raise InvalidCheckpoint("the tensors of the cartridge have no tokens")
    _, heads, _, size = lists["trainable_keys"][0].shape
    stacked = torch.stack(
        [
            # (1, H, frozen, D) + (1, H, trainable, D) -> (H, N, D)
            torch.cat([lists[f"{kind}_{part}"][layer] for kind in parts], dim=2)[0]
            for layer in range(layers)
            for part in ("keys", "values")
        ]
    )
    # (L*2, H, N, D) -> (N, L*2, H, D) -> (N, L*2*H*D)
    flat = stacked.permute(2, 0, 1, 3).reshape(sum(tokens.values()), -1)
    values = {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": sum(tokens.values()),
        "num_frozen_tokens": tokens.get(frozen_kind or "", 0),
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * size,
    }
    return values, flat.contiguous()


def _lists(names: Collection[str], tensor_of: Callable[[str], Tensor]) -> Lists:
    members = {name: _MEMBER.fullmatch(name) for name in names}
    if unknown := {re.sub(r"\.[0-9]+$", "", name) for name, member in members.items() if member is None}:
        raise InvalidCheckpoint(
            f"the cartridge holds {shown_names(unknown)}, which convert does not know (it knows {_KNOWN}): without "
            "them the prefix would not be the one that was trained"
        )
    lists: dict[str, dict[int, Tensor]] = {name: {} for name in _KNOWN.split(", ")}
    for name, member in members.items():
        if member is not None:
            found, layer = lists[f"{member[1]}_{member[2]}"], int(member[3])
            if layer in found:
                raise InvalidCheckpoint(f"the cartridge has layer {layer} of {member[1]}_{member[2]} twice")
            found[layer] = tensor_of(name)
    for name, found in lists.items():
        if sorted(found) != list(range(len(found))):
            raise InvalidCheckpoint(f"{name} has the layers {sorted(found)[:8]}: one is missing")
    return {name: [found[layer] for layer in range(len(found))] for name, found in lists.items()}


def _frozen_kind(lists: Lists) -> str | None:
    kinds = [kind for kind in ("frozen", "fixed") if lists[f"{kind}_keys"] or lists[f"{kind}_values"]]
    if len(kinds) > 1:
        raise InvalidCheckpoint("the cartridge holds both frozen_ and fixed_ lists: keep those that were trained")
    return kinds[0] if kinds else None


def _tokens(lists: Lists, kind: str, layers: int) -> int:
    """Returns the number of tokens that all tensors of this kind have.

    Raises:
        InvalidCheckpoint: a list is missing or has another length, or the tensors' shapes differ.
    """
    first = lists["trainable_keys"][0].shape
    sizes = set()
    for part in ("keys", "values"):
        found = lists[f"{kind}_{part}"]
        if not found:
            raise InvalidCheckpoint(f"the cartridge has no {kind}_{part}")
        if len(found) != layers:
            raise InvalidCheckpoint(f"{kind}_{part} has {len(found)} layers, and trainable_keys has {layers}")
        for tensor in found:
            if tensor.ndim != 4 or tensor.shape[0] != 1 or (tensor.shape[1], tensor.shape[3]) != (first[1], first[3]):
                raise InvalidCheckpoint(
                    f"{kind}_{part} must hold one [1, heads, tokens, size] a layer, as trainable_keys' {list(first)}; "
                    f"got {list(tensor.shape)}"
                )
            sizes.add(tensor.shape[2])
    if len(sizes) != 1:
        raise InvalidCheckpoint(
            f"the tensors of {kind}_keys and {kind}_values have {sorted(sizes)} tokens, not one size"
        )
    return int(sizes.pop())

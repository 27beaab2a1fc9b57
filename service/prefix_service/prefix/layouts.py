"""Finds the prefix encoder among the tensors of a trained checkpoint by their names; one table row describes each
layout.

Layouts: PEFT's `save_pretrained`, PEFT's training state (bare, or inside an accelerate, DeepSpeed, FSDP or Lightning
checkpoint), hf_peft_ex, P-tuning v2 (and ChatGLM), CARTRIDGE as saved and as trained.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from prefix_service.errors import InvalidCheckpoint
from prefix_service.prefix.config import CartridgeConfig, PrefixConfig, PrefixTuningConfig
from prefix_service.prefix.safetensors_header import shown_name

Shape = tuple[int, ...]

_MLP: Final = ("transform.w1", "transform.b1", "transform.w2", "transform.b2")
_SHOWN: Final = 8  # names that an error message lists
# Names that training frameworks insert between the names of modules.
_WRAPPERS: Final = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """The tensor names that one project uses for a prefix encoder.

    `scope` matches the part of a name in front of the tensor's own; `roles` maps the rest to the role names of this
    project; `complete` lists the sets of roles that make a whole encoder. If `linear`, matrices are `[out, in]` as in
    `nn.Linear`, else `[in, out]`.
    """

    name: str
    config: tuple[type[PrefixConfig], ...]
    scope: re.Pattern[str]
    roles: Mapping[str, str]
    complete: tuple[frozenset[str], ...]
    linear: bool = True


def _roles(embedding: str, matrix: str, first: str, second: str, weight: str, bias: str) -> dict[str, str]:
    names = [f"{matrix}.{weight.format(first)}", f"{matrix}.{bias.format(first)}"]
    names += [f"{matrix}.{weight.format(second)}", f"{matrix}.{bias.format(second)}"]
    return {embedding: "embedding", **dict(zip(names, _MLP, strict=True))}


_EMBEDDING_OR_MLP = (frozenset({"embedding"}), frozenset({"embedding", *_MLP}))
_IN_PEFT_MODEL = re.compile(r"(?:(?:.+\.)?prompt_encoder\.[^.]+\.)?")

CHECKPOINT_LAYOUTS: Final = (
    CheckpointLayout(
        "PEFT saved",
        (PrefixTuningConfig, CartridgeConfig),
        re.compile(""),
        {"prompt_embeddings": "prompt_embeddings"},
        (frozenset({"prompt_embeddings"}),),
    ),
    CheckpointLayout(
        "PEFT training state",
        (PrefixTuningConfig,),
        _IN_PEFT_MODEL,
        _roles("embedding.weight", "transform", "0", "2", "{}.weight", "{}.bias"),
        _EMBEDDING_OR_MLP,
    ),
    CheckpointLayout(
        "hf_peft_ex",
        (PrefixTuningConfig,),
        re.compile(r"(?:prefix_encoder\.)?"),
        _roles("embedding", "transform", "1", "2", "w{}", "b{}"),
        _EMBEDDING_OR_MLP,
        linear=False,
    ),
    CheckpointLayout(
        "P-tuning v2",
        (PrefixTuningConfig,),
        re.compile(r"(?:.+\.)?prefix_encoder\."),
        _roles("embedding.weight", "trans", "0", "2", "{}.weight", "{}.bias"),
        _EMBEDDING_OR_MLP,
    ),
    CheckpointLayout(
        "CARTRIDGE training state",
        (CartridgeConfig,),
        _IN_PEFT_MODEL,
        {"frozen_embedding": "frozen_embedding", "trainable_embedding": "trainable_embedding"},
        (frozenset({"frozen_embedding", "trainable_embedding"}), frozenset({"trainable_embedding"})),
    ),
)


@dataclass(frozen=True, slots=True)
class Match:
    """A prefix found in a checkpoint: its layout, the scope of its names, and the name of each role's tensor."""

    layout: CheckpointLayout
    scope: str
    tensors: Mapping[str, str]


def find_prefix(names: Mapping[str, Shape]) -> Match:
    """Returns the one prefix among the tensors of a checkpoint; ignores tensors of the base model and of task heads.

    Raises:
        InvalidCheckpoint: there is no prefix, more than one, or an incomplete one; the message lists the tensors found.
    """
    matches = [match for layout in CHECKPOINT_LAYOUTS for match in _matches(layout, names)]
    if not matches:
        shown = shown_names(names)
        known = "; ".join(f"{layout.name}: {', '.join(sorted(layout.roles))}" for layout in CHECKPOINT_LAYOUTS)
        raise InvalidCheckpoint(f"no prefix encoder among {len(names)} tensors ({shown}); known layouts: {known}")
    if len(matches) > 1:
        found = "; ".join(f"{m.layout.name} ({shown_names(m.tensors.values())})" for m in matches[:8])
        raise InvalidCheckpoint(f"more than one prefix encoder in the checkpoint: {found}; keep one")
    match = matches[0]
    roles = frozenset(match.tensors)
    if roles not in match.layout.complete:
        wanted = min((c for c in match.layout.complete if roles < c), default=match.layout.complete[-1], key=len)
        missing = sorted(match.scope + name for name, role in match.layout.roles.items() if role in wanted - roles)
        raise InvalidCheckpoint(
            f"incomplete prefix encoder ({match.layout.name}): found {shown_names(match.tensors.values())}; "
            f"missing {shown_names(missing)}"
        )
    return match


def shown_names(names: Collection[str]) -> str:
    """Returns up to eight tensor names for an error message: sorted, escaped, and shortened if they are long."""
    shown = [
        name if name.isprintable() and len(name) <= 80 else shown_name(name) for name in islice(sorted(names), _SHOWN)
    ]
    return ", ".join(shown) + (", …" if len(names) > _SHOWN else "")


def _matches(layout: CheckpointLayout, names: Mapping[str, Shape]) -> list[Match]:
    scopes: dict[str, dict[str, str]] = {}
    for name in names:
        plain = _WRAPPERS.sub("", name)
        for suffix, role in layout.roles.items():
            scope = plain.removesuffix(suffix)
            if plain.endswith(suffix) and layout.scope.fullmatch(scope):
                other = scopes.setdefault(scope, {}).setdefault(role, name)
                if other != name:
                    raise InvalidCheckpoint(
                        f"more than one prefix encoder in the checkpoint: {shown_names((other, name))}; keep one"
                    )
    return [Match(layout, scope, tensors) for scope, tensors in scopes.items()]


def check_shapes(match: Match, config: PrefixConfig, shape_of: Callable[[str], Shape]) -> None:
    """Compares the shapes of a prefix with its config.

    Raises:
        InvalidCheckpoint: the layout belongs to another `peft_type`, or a shape differs; the message has both values.
        InvalidConfig: the config has a projection without a size.
    """
    if not isinstance(config, match.layout.config):
        raise InvalidCheckpoint(f"{match.layout.name} tensors do not belong to peft_type {config.peft_type}")
    found = {
        role: shape_of(name) if match.layout.linear else shape_of(name)[::-1] for role, name in match.tensors.items()
    }
    if isinstance(config, PrefixTuningConfig) and "embedding" in found:
        projected = "transform.w1" in found
        if projected != config.prefix_projection:
            raise InvalidCheckpoint(
                f"prefix_projection is {str(config.prefix_projection).lower()} in the config, and the checkpoint "
                f"{'holds' if projected else 'lacks'} the projection ({match.layout.name}: "
                f"{shown_names(match.tensors.values())})"
            )
        if projected:
            config.require_projection_size()
        if not match.layout.linear:
            found["embedding"] = found["embedding"][::-1]  # an embedding is [tokens, width] in every layout
    if isinstance(config, CartridgeConfig) and "trainable_embedding" in found:
        has_frozen = "frozen_embedding" in found
        if has_frozen != (config.num_frozen_tokens > 0):
            raise InvalidCheckpoint(
                f"num_frozen_tokens is {config.num_frozen_tokens} in the config, and the checkpoint "
                f"{'holds' if has_frozen else 'lacks'} frozen_embedding ({match.layout.name})"
            )
    expected = _expected_shapes(config, found)
    for role, name in match.tensors.items():
        if found[role] != expected[role]:
            raise InvalidCheckpoint(
                f"{shown_names([name])} has shape {list(shape_of(name))}, the config requires {_sizes_of(config)}"
            )


def _expected_shapes(config: PrefixConfig, found: Mapping[str, Shape]) -> dict[str, Shape]:
    tokens, width = config.num_virtual_tokens, config.prefix_embedding_dim or 0
    if isinstance(config, CartridgeConfig):
        return {
            "prompt_embeddings": (tokens, width),
            "frozen_embedding": (config.num_frozen_tokens, width),
            "trainable_embedding": (tokens - config.num_frozen_tokens, width),
        }
    if "transform.w1" not in found:
        return {"prompt_embeddings": (tokens, width), "embedding": (tokens, width)}
    # ChatGLM2 embeds the whole width where PEFT and P-tuning v2 embed one token.
    inner = width if found["embedding"] == (tokens, width) else config.token_dim or 0
    hidden = config.encoder_hidden_size or 0
    shapes = ((hidden, inner), (hidden,), (width, hidden), (width,))
    return {"embedding": (tokens, inner), **dict(zip(_MLP, shapes, strict=True))}


def _sizes_of(config: PrefixConfig) -> str:
    names = ["num_virtual_tokens", "num_layers", "token_dim", "num_attention_heads"]
    names += ["num_frozen_tokens"] if isinstance(config, CartridgeConfig) else ["encoder_hidden_size"]
    return ", ".join(f"{name}={getattr(config, name)}" for name in names)

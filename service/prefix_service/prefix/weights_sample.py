"""A hash of a sample of a base model's weights, equal for its files and for the model that was loaded from them.

The sample is the first values of each weight of the layers: what training changes anywhere, it changes there too. It is
hashed in bfloat16, so that it is the same for a model in float32 and in bfloat16, whichever its files hold, or in
float16 if a weight has that dtype. Hashes of the two kinds cannot be compared. Experts are left out, since transformers
stores them differently in memory, and so are embeddings and heads, since they may be resized without any other change.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

_VALUES: Final = 64  # of each weight
_LANGUAGE: Final = ("decoder", "language_model", "text_model")
"""Parts of a model with several stacks of layers; a prefix goes into this one."""


def layer_weights(names: Iterable[str]) -> dict[str, str]:
    """Returns the names of the sampled weights among those of a model, by names that do not depend on what is around
    the layers: `model.layers.0.mlp.up_proj.weight` by `layers.0.mlp.up_proj.weight`.
    """
    stacks: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        if not name.endswith(".weight") or ".experts." in name or ".lora_" in name:
            continue
        parts = name.replace(".base_layer.", ".").split(".")  # of PEFT's LoRA
        number = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
        if number:
            stacks[".".join(parts[: number - 1])][".".join(parts[number - 1 :])] = name
    language = {around: found for around, found in stacks.items() if {*around.split(".")} & {*_LANGUAGE}}
    return max((language or stacks).values(), key=len, default={})


def start_of(weight: "Tensor") -> "Tensor":
    """Returns the sampled values of a weight, on the CPU."""
    row = weight[0] if weight.ndim > 1 else weight
    return row.detach().reshape(-1)[:_VALUES].cpu()


def weights_hash(starts: "Mapping[str, Tensor]") -> str | None:
    """Returns the hash of the sampled values of each weight by its name; None if there are none, or if some are
    quantised."""
    import torch

    dtypes = {start.dtype for start in starts.values()}
    if not dtypes or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        return None
    dtype = torch.float16 if torch.float16 in dtypes else torch.bfloat16
    digest = hashlib.sha256()
    for name in sorted(starts):
        values = starts[name].to(dtype).contiguous()
        digest.update(f"{name} {len(values)}\n".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return f"sampled-{str(dtype).removeprefix('torch.')}-sha256:{digest.hexdigest()}"

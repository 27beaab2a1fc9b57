"""Makes damaged checkpoints and configs: every kind of file that `convert` reads, with bytes changed, cut or repeated.

`python -m tests.client.damaged 10000` tries ten thousand of them; the suite tries a few hundred.
"""

import io
import json
import pickle
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save
from torch import nn

from prefix_service.checkpoints.convert import convert, write
from prefix_service.checkpoints.sources import prepare_upload
from prefix_service.errors import Conflict, InvalidCheckpoint, InvalidConfig
from tests.conftest import CORPUS

# These are the errors that `convert`, `write` and `prepare_upload` document; the command line prints each as a line.
DOCUMENTED: Final = (InvalidCheckpoint, InvalidConfig, Conflict)
BASE: Final = CORPUS / "bases/llama/config.json"
CONFIG: Final = CORPUS / "cases/llama-n20-emb/adapter/adapter_config.json"
_TOKENS: Final = {
    "a": b"true",
    "b": b"null",
    "c": b"-1",
    "d": b"1e999",
    "e": b"[]",
    "f": b"{}",
    "g": b'"x"',
    "h": b"9" * 40,
}


def originals() -> dict[str, bytes]:
    """Returns small sound files by name: safetensors, zipped and bare pickles, and the two configs."""
    embedding = torch.randn(20, 96)
    lists = {
        f"{kind}_{part}": nn.ParameterList([nn.Parameter(torch.randn(1, 2, tokens, 8)) for _ in range(3)])
        for kind, tokens in (("frozen", 1), ("trainable", 5))
        for part in ("keys", "values")
    }
    bottleneck = {"0.weight": (7, 4), "0.bias": (7,), "2.weight": (96, 7), "2.bias": (96,)}
    control = {f"control_trans.{name}": torch.randn(shape) for name, shape in bottleneck.items()}
    wrapped = {"state_dict": {"prompt_encoder.default.embedding.weight": embedding}, "epoch": 3, "args": {"a": [1]}}
    return {
        "adapter_model.safetensors": save({"prompt_embeddings": embedding, "head.count": torch.tensor(3)}),
        "adapter_model.bin": _saved({"prompt_embeddings": embedding}),
        "legacy.bin": _saved(wrapped, zipped=False),
        "last.ckpt": _saved(wrapped),
        "cartridge.pt": _saved(lists),
        "control_trans.bin": _saved({"wte.weight": torch.randn(5, 4), **control}),
        "flat_control_trans.safetensors": save({"control_trans": torch.randn(5 * 96)}),
        "bare.pkl": pickle.dumps({"prompt_embeddings": [0.5] * 10, "nested": {"a": (1, "b")}}),
        "adapter_config.json": CONFIG.read_bytes(),
        "config.json": BASE.read_bytes(),
    }


def _saved(state: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Returns the bytes with one to four changes; most of them near the beginning, where the structure is."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        near = min(len(changed), 600) if draw.random() < 0.7 else len(changed)
        at = draw.randrange(max(near, 1))
        match draw.randrange(6):
            case 0:
                del changed[at:]
            case 1:
                changed[at : at + 1] = bytes([draw.randrange(256)])
            case 2:
                changed[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))
            case 3:
                del changed[at : at + draw.randint(1, 9)]
            case 4:
                changed[at:at] = changed[at : at + draw.randint(1, 40)]
            case _:
                changed[at : at + draw.randint(1, 6)] = draw.choice(list(_TOKENS.values()))
    return bytes(changed)


def attempts(count: int, seed: int = 0) -> Iterator[tuple[str, int, Exception | None]]:
    """Yields the name, number and outcome of `count` damaged files: each converted, and published up to its upload."""
    draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
    sound = originals()
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(count):
            name = list(sound)[number % len(sound)]
            folder = Path(scratch) / str(number)
            folder.mkdir()
            yield name, number, _outcome(folder, name, damaged(draw, sound[name]), sound, unsafe=number % 3 == 0)


def _outcome(folder: Path, name: str, data: bytes, sound: dict[str, bytes], *, unsafe: bool) -> Exception | None:
    (folder / name).write_bytes(data)
    source = folder / name
    if name.endswith(".json"):
        source = folder / "adapter_model.safetensors"
        source.write_bytes(sound[source.name])
    base = folder / "config.json" if name == "config.json" else BASE
    config = CONFIG if name in ("adapter_model.safetensors", "adapter_model.bin") else None
    try:
        # Only these pickles hold nothing but data, so that a damaged one names no function that exists.
        write(convert(source, config=config, base_config=base, unsafe=unsafe and name != "bare.pkl"), folder / "out")
        prepare_upload(source, config).weights.close()
    except Exception as error:  # noqa: BLE001 - the outcome is judged by the caller
        return error
    return None


def main(count: int) -> int:
    """Prints how many ended how, with a traceback of each undocumented kind; returns 1 if there was one."""
    outcomes: Counter[str] = Counter()
    shown: set[str] = set()
    for name, number, error in attempts(count, seed=1):
        kind = type(error).__name__
        outcomes[kind] += 1
        if error is not None and not _is_documented(error):
            where = f"{kind}: {str(error)[:80]}"
            if where not in shown:
                shown.add(where)
                sys.stdout.write(f"{number} {name}\n{''.join(traceback.format_exception(error)[-6:])}\n")
    sys.stdout.write(json.dumps(outcomes) + "\n")
    return int(bool(shown))


def _is_documented(error: Exception) -> bool:
    return isinstance(error, DOCUMENTED) and len(str(error).splitlines()) == 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

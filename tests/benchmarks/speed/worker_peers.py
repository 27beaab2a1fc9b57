"""Gets the same keys and values without our client: by PEFT from its disk, or by a download and safetensors."""

import http.client
import socket
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from safetensors.torch import load
from torch import Tensor

from tests.benchmarks.speed.load import Address
from tests.benchmarks.speed.peers import command_of

Pairs = list[tuple[Tensor, Tensor]]
"""One key and one value a layer, each `[B, H, N, D]`."""

BATCH: Final = 8
_TINY: Final[dict[str, Any]] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def gpt2() -> Any:
    """Returns a base model with GPT-2's heads and layers; the rest is small, because a switch does not touch it."""
    return _small(transformers.GPT2LMHeadModel, transformers.GPT2Config(n_inner=64, **_TINY))


def llama_3_8b() -> Any:
    """Returns a base model with Llama-3-8B's heads and layers, and small otherwise."""
    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = transformers.LlamaConfig(num_hidden_layers=32, hidden_size=64, intermediate_size=64, **heads, **_TINY)
    return _small(transformers.LlamaForCausalLM, config)


def _small(model: Any, config: Any) -> Any:
    return model(config).to(torch.bfloat16).eval()


class Switch:
    """PEFT's own switch: it loads an adapter from the disk, makes it the active one, and asks for the prompt."""

    def __init__(self, base: Any, folders: list[Path]) -> None:
        self._folders = folders
        self._model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="first").eval()
        for number, folder in enumerate(folders):
            self._model.load_adapter(folder, f"loaded-{number}")
        self._names = map(str, count())

    def loading(self, low_cpu_mem_usage: bool) -> Callable[[int], Pairs]:
        """Returns `load_adapter`, `set_adapter`, `get_prompt`; with `low_cpu_mem_usage` PEFT draws no weights first."""

        def switch(number: int) -> Pairs:
            name = next(self._names)
            self._model.load_adapter(self._folders[number], name, low_cpu_mem_usage=low_cpu_mem_usage)
            return self._prompt(name)

        return switch

    def loaded(self, number: int) -> Pairs:
        """Calls `set_adapter` and `get_prompt` for an adapter that was loaded before."""
        return self._prompt(f"loaded-{number}")

    def forget(self) -> None:
        """Deletes the adapters that were loaded on the way."""
        self._model.set_adapter("first")
        for name in [name for name in self._model.peft_config if name.isdigit()]:
            self._model.delete_adapter(name)

    def _prompt(self, name: str) -> Pairs:
        self._model.set_adapter(name)
        with torch.no_grad():
            cache: Any = self._model.get_prompt(BATCH)
        return [(layer.keys, layer.values) for layer in cache.layers]


def from_file(body: bytes) -> Pairs:
    """Returns keys and values of an `expand=false` answer, read by safetensors and expanded."""
    tensors = load(body)
    names = range(sum(name.endswith(".key") for name in tensors))
    # (1, H, N, D) -> (B, H, N, D)
    one = [[tensors[f"past_key_values.{layer}.{part}"] for part in ("key", "value")] for layer in names]
    return [(key.expand(BATCH, -1, -1, -1), value.expand(BATCH, -1, -1, -1)) for key, value in one]


class FromNginx:
    """Reads by `http.client` on a connection that is kept, the fastest of Python's own clients."""

    def __init__(self, address: Address) -> None:
        self._connection = http.client.HTTPConnection(*address)

    def __call__(self, number: int) -> Pairs:
        self._connection.request("GET", f"/{number}.safetensors")
        return from_file(self._connection.getresponse().read())


class FromRedis:
    """Reads by a socket into the bytes that safetensors wants."""

    def __init__(self, address: Address) -> None:
        self._socket = socket.create_connection(address)

    def __call__(self, number: int) -> Pairs:
        self._socket.sendall(command_of("GET", str(number)))
        head = b""
        while not head.endswith(b"\r\n"):
            head += self._socket.recv(1)
        body = self._socket.recv(int(head[1:]), socket.MSG_WAITALL)
        self._socket.recv(2, socket.MSG_WAITALL)
        return from_file(body)

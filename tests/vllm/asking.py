"""Asks an engine of vLLM, and compares its answers with PEFT's."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tests.conftest import Server
from tests.vllm.conftest import serving_adapters
from tests.vllm.driver import Engine, engine, multi_config, transfer_config
from tests.vllm.reference import Reference

TOKENS_SAID: Final = 24
Adapter = str | list[str] | None
"""The adapters that a request names: one, several in a list, or none."""
_CLOSE: Final = 5e-5  # of log probabilities, float32, of the small Llama


class Asking:
    """An engine with the reference that its answers must equal."""

    def __init__(self, engine: Engine, reference: Reference, server: Server) -> None:
        self.engine, self.reference, self.server, self.close = engine, reference, server, _CLOSE

    def job(self, adapter: Adapter, prompt: str, **more: Any) -> dict[str, Any]:
        """Returns a request; its adapters are the tenant's, with or without a selector."""
        named: Any = [f"acme/{one}" for one in adapter] if isinstance(adapter, list) else f"acme/{adapter}"
        return {"prompt": self.reference.prompts[prompt], **({} if adapter is None else {"adapter": named}), **more}

    def run(self, *rows: tuple[Adapter, str], count: int = TOKENS_SAID) -> list[dict[str, Any]]:
        """Asks for all in one batch, and compares each answer with PEFT's."""
        outputs: list[dict[str, Any]] = self.engine.run([self.job(*row) for row in rows], count)["outputs"]
        for row, output in zip(rows, outputs, strict=True):
            self.check(output, *row, count=count)
        return outputs

    def metrics(self) -> dict[str, float]:
        """Returns vLLM's metrics of adapters, without the labels that all metrics have."""
        lines = self.engine.ask({"metrics": True})["lines"]
        values = {}
        for line in lines:
            name, value = line.rsplit(" ", 1)
            values[re.sub(r'(engine|model_name)="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")] = float(
                value
            )
        return values

    def loaded(self) -> dict[str, list[str]]:
        """Returns the adapters that the metrics report as loaded, by level."""
        found: dict[str, list[str]] = {"cpu": [], "gpu": []}
        for name, value in self.metrics().items():
            match = re.fullmatch(r'vllm:prefix_adapter_loaded\{adapter_name="(.*)",level="(.*)"\}', name)
            if match:
                assert value == 1
                found[match[2]].append(match[1])
        return {level: sorted(names) for level, names in found.items()}

    def check(self, output: dict[str, Any], adapter: Adapter, prompt: str, *, count: int = TOKENS_SAID) -> None:
        """Compares the tokens with those of PEFT's `generate`, and the log probability of each."""
        one = self.reference.join(*adapter) if isinstance(adapter, list) else adapter
        said = self.reference.says(one and one.partition("@")[0], prompt, count)
        assert output["tokens"] == said.tokens, (adapter, prompt, output)
        apart = [abs(one - other) for one, other in zip(output["logprobs"], said.logprobs, strict=True)]
        assert max(apart) < self.close, (adapter, prompt, apart)
        assert output["prompt"] == self.reference.prompts[prompt]  # placeholders are nobody's business


@contextmanager
def started(
    reference: Reference, folder: Path, partners: Sequence[dict[str, Any]] = (), **options: Any
) -> Iterator[Asking]:
    """Yields an engine on a service, with partners around its connector: the first before it, others after it."""
    with serving_adapters(reference, folder) as server:
        transfer = transfer_config(server.url, timeout=120)
        if partners:
            transfer = multi_config(partners[0], transfer, *partners[1:])
        with engine(folder, reference.model, transfer, server.admin_key, **options) as made:
            yield Asking(made, reference, server)

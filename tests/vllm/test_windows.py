"""Models whose layers have windows say behind a prefix what PEFT says, whatever vLLM does with their blocks."""

from pathlib import Path

import pytest

from tests.vllm.architectures import ADAPTERS, ARCHITECTURES, compare, engine_options
from tests.vllm.asking import started
from tests.vllm.driver import PYTHONS
from tests.vllm.reference import make_reference

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own


@pytest.mark.parametrize(
    ("name", "python"),
    [*(("Gemma 3", version) for version in PYTHONS), ("Gemma 4", "vLLM"), ("Llama 4", "vLLM")],
    indirect=["python"],
)
def test_prefixes_shorter_and_longer_than_the_window_say_what_peft_says(
    python: Path, name: str, tmp_path: Path
) -> None:
    """Tokens and log probabilities are PEFT's with prompts in chunks, preempted requests and vLLM's prefix cache, for
    layers in groups of their own (Gemma 3), of another size (Gemma 4), and with chunks and keys in another order
    (Llama 4). The others are tried by `python -m tests.vllm.architectures`.
    """
    architecture = ARCHITECTURES[name]
    reference = make_reference(tmp_path / "reference", architecture.build(), ADAPTERS)
    with started(reference, tmp_path / "engine", python=python, **engine_options(architecture)) as asking:
        assert compare(asking) > 0

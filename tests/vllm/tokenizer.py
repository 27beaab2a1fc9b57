"""Makes a tokenizer for the small Llama, with a word for each id."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.vllm.reference import VOCABULARY


def save_tokenizer(folder: Path) -> None:
    """Writes the files that vLLM reads."""
    words, unknown = {f"w{number}": number for number in range(VOCABULARY)}, "w0"
    made = Tokenizer(models.WordLevel(words, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown).save_pretrained(folder)  # type: ignore[no-untyped-call]

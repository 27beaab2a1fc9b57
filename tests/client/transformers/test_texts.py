"""The tokens of a text are the first tokens of every input that begins with it, with one BOS."""

from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from prefix_service.client.transformers import text_tokens
from prefix_service.errors import InvalidRequest

TEXT = "You answer shortly.\nThe house opens at nine."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
INSTRUCT = (
    "<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system if loop.last }}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@cache
def tokenizer(template: str | None = None, *, ends: bool = False) -> Any:
    """Returns a byte-level BPE tokenizer that writes `<s>` in front (and `</s>` behind if it `ends` inputs)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        # Like those of Llama 3 and Qwen, it joins a word with the sign before it, and signs with line feeds behind.
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\w]?\w+| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
    corpus = [f"{TEXT}{behind}" for behind in ("A", ".A", "\n\nA", "\n\n7", ' !"', " ?\n")] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    found: Any = PreTrainedTokenizerFast(tokenizer_object=core, **special_tokens)  # type: ignore[no-untyped-call]
    found.add_special_tokens({"additional_special_tokens": special[2:]})
    found.chat_template = template
    return found


@pytest.mark.parametrize("question", ["When does it open?", "7 or 8?", "\n\nWhen?", " é", "."])
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_a_system_message_ends_before_a_special_token(template: str, question: str) -> None:
    """The prefix's tokens are the first of a whole conversation, whatever the user says."""
    found = text_tokens(tokenizer(template), TEXT)
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": question}]
    whole = tokenizer(template).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert whole[: len(found)] == found
    assert tokenizer().convert_ids_to_tokens(whole[len(found)]).startswith("<|")
    assert TEXT in tokenizer().decode(found)
    assert found.count(tokenizer().bos_token_id) == (template == LLAMA3)


@pytest.mark.parametrize("text", ["user", "e", "\nuser\n"])
def test_a_text_that_the_template_writes_too_ends_where_it_stands(text: str) -> None:
    """The word `user` of the next turn is not taken for the system message, whose prefix would join the user's text."""
    found = text_tokens(tokenizer(CHATML), text)
    assert tokenizer().decode(found) == f"<|im_start|>system\n{text}<|im_end|>\n"


def test_a_system_message_in_the_users_turn_ends_with_what_the_template_writes_behind_it() -> None:
    """Where no special token divides the two, the template's own words belong to the prefix."""
    found = text_tokens(tokenizer(INSTRUCT), TEXT)
    assert tokenizer().decode(found) == f"<s>[INST] {TEXT}\n\n"


def test_a_document_is_the_beginning_of_the_users_message() -> None:
    """In the role `user` the question follows the text without anything between."""
    found = text_tokens(tokenizer(CHATML), f"{TEXT}\n", "user")
    assert tokenizer().decode(found) == f"<|im_start|>user\n{TEXT}\n"


@pytest.mark.parametrize("ends", [False, True])
def test_a_plain_text_has_one_bos_and_no_end(ends: bool) -> None:
    """The tokenizer's own BOS is in front; the EOS that it writes behind an input is left out."""
    found = text_tokens(tokenizer(ends=ends), f"{TEXT}\n", "plain")
    assert tokenizer().decode(found) == f"<s>{TEXT}\n"
    assert found.count(tokenizer().bos_token_id) == 1


@pytest.mark.parametrize(
    ("template", "text", "role", "message"),
    [
        (None, " \n", "plain", "the text is empty"),
        (None, TEXT, "system", "has no chat template: compile the text as it is, in the role plain"),
        (None, f"<s>{TEXT}\n", "plain", "begin with <s> twice"),
        (None, TEXT, "plain", r"token \d+ of \d+ begins '\.', and before 'A' '\.A'"),
        (None, f"{TEXT} !", "plain", r"token \d+ of \d+ begins ' !', and before '\"' ' !\"'"),
        (CHATML, f"{TEXT} ?", "user", r"token \d+ of \d+ begins ' \?', and before '\\nA' ' \?\\nA'"),
        (CHATML, TEXT, "user", "the end of the text is other tokens once something follows"),
        (NO_SYSTEM, TEXT, "system", r"refuses a system message \(no system\): compile the text in the role user"),
        ("{{ messages[-1].content | upper }}", TEXT, "system", "changes the text"),
        (CHATML, TEXT, "tool", "role must be one of system, user, plain, got 'tool'"),
    ],
)
def test_a_text_without_common_tokens_is_refused(template: str | None, text: str, role: Any, message: str) -> None:
    """Each error says where the tokens differ, or what the template does, and what to do."""
    with pytest.raises(InvalidRequest, match=message):
        text_tokens(tokenizer(template), text, role)

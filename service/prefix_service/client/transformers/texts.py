"""The tokens of a text that stands in front of an input, as a tokenizer and its chat template write them.

The prefix of a text is the first N tokens of every input that begins with that text. Whoever uses it tokenizes the
whole input, the text included, and passes what follows the first N tokens to the model.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal, get_args

from prefix_service.errors import InvalidRequest

Role = Literal["system", "user", "plain"]
"""What a text is in the input: the system message; the beginning of the first user message, as a document before a
question; or the beginning of an input without a chat template."""

Tokenizer = Any
"""A `PreTrainedTokenizerBase`."""

_FOLLOWING: Final = ("A", "7", "é", '"', "'", "(", ".", "-")
"""Beginnings of what may follow the text; no two begin with the same character."""
_BLANKS: Final = (" A", "\nA")
"""Further beginnings, of what follows a text without a blank at its end; many tokenizers join blanks."""
_SHOWN: Final = 20  # characters of a text in an error message


def text_tokens(tokenizer: Tokenizer, text: str, role: Role = "system") -> list[int]:
    """Returns the ids of the tokens with which every input begins that has `text` in this role.

    With a chat template, they end before the last special token between the text and the user's message, so that no
    token joins the two. Where the template writes none there, and in the other roles, they end with the text: then
    the text must end where the tokenizer divides it from what follows: this is checked for letters, digits, signs and
    blanks, but not for a blank behind a text that ends with one, which many tokenizers join.

    Raises:
        InvalidRequest: the tokenizer has no chat template, the template refuses the role or changes the text, the text
            is empty, the tokens begin with two BOS, or the last tokens depend on what follows.
    """
    if role not in get_args(Role):
        raise InvalidRequest(f"role must be one of {', '.join(get_args(Role))}, got {role!r}")
    if not text.strip():
        raise InvalidRequest("the text is empty: a prefix needs at least one token")
    wholes = [_written(tokenizer, text, role, following) for following in _FOLLOWING]
    head = _head(tokenizer, text, role, wholes)
    found = _without_end(tokenizer, head, role)
    for following in _FOLLOWING if head[-1:].isspace() else (*_FOLLOWING, *_BLANKS):
        whole = _written(tokenizer, text, role, following)
        _require_seam(tokenizer, found, _ids(tokenizer, whole, role), following)
    bos = tokenizer.bos_token_id
    if bos is not None and found[:2] == [bos, bos]:
        raise InvalidRequest(
            f"the tokens begin with {tokenizer.bos_token} twice: the tokenizer writes it, so take it out of the text"
        )
    return found


def template_of(tokenizer: Tokenizer, role: Role) -> str | None:
    """Returns the chat template that writes a text in this role; None if none does."""
    if role == "plain":
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise InvalidRequest(
            f"the tokenizer {tokenizer.name_or_path} has no chat template: compile the text as it is, in the role plain"
        ) from error


def _written(tokenizer: Tokenizer, text: str, role: Role, following: str) -> str:
    """Returns an input that begins with the text, as the tokenizer gets it."""
    if role == "plain":
        return text + following
    messages = [{"role": "user", "content": text + following}]
    if role == "system":
        messages = [{"role": "system", "content": text}, {"role": "user", "content": following}]
    template_of(tokenizer, role)
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise InvalidRequest(
            f"the chat template of {tokenizer.name_or_path} refuses a {role} message ({error}): compile the text in "
            f"the role {'user' if role == 'system' else 'plain'}"
        ) from error


def _head(tokenizer: Tokenizer, text: str, role: Role, wholes: list[str]) -> str:
    """Returns the part of the inputs that is the prefix: what they share, up to the last special token behind the
    text."""
    if role == "plain":
        return text
    shared = wholes[0][: _shared(wholes)]
    own = text.strip()
    # A longer text is written differently from its end on; the words of the template may hold the text too.
    longer = [_written(tokenizer, text.rstrip() + more, role, _FOLLOWING[0]) for more in _FOLLOWING[:2]]
    end = min(_shared([wholes[0], *longer]), len(shared))
    if not shared[:end].endswith(own):
        raise InvalidRequest(
            f"the chat template of {tokenizer.name_or_path} changes the text in front of the user's message, so that "
            f"there is no common prefix: compile the text in the role plain"
        )
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return shared[: max((cut for token in special if (cut := shared.rfind(token)) >= end), default=len(shared))]


def _without_end(tokenizer: Tokenizer, head: str, role: Role) -> list[int]:
    """Returns the ids of the prefix, without special tokens that the tokenizer writes behind an input."""
    found = _ids(tokenizer, head, role)
    bare = list(tokenizer(head, add_special_tokens=False)["input_ids"])
    starts = (start for start in range(len(found) - len(bare) + 1) if found[start : start + len(bare)] == bare)
    start = next(starts, None)
    return found if start is None else found[: start + len(bare)]


def _ids(tokenizer: Tokenizer, text: str, role: Role) -> list[int]:
    """Returns the ids of an input; a chat template writes the special tokens itself."""
    return list(tokenizer(text, add_special_tokens=role == "plain")["input_ids"])


def _require_seam(tokenizer: Tokenizer, found: list[int], whole: list[int], following: str) -> None:
    """Raises InvalidRequest if an input does not begin with the prefix's tokens."""
    same = _shared([found, whole])
    if same == len(found):
        return
    alone, together = (tokenizer.decode(ids[same : same + 2])[:_SHOWN] for ids in (found, whole))
    raise InvalidRequest(
        f"the end of the text is other tokens once something follows: token {same} of {len(found)} begins {alone!r}, "
        f"and before {following!r} {together!r}: end the text where the tokenizer divides it, as with a line feed"
    )


def _shared(sequences: Sequence[Sequence[Any]]) -> int:
    """Returns the number of items with which all sequences begin."""
    least = min(map(len, sequences))
    return next((n for n in range(least) if any(it[n] != sequences[0][n] for it in sequences)), least)

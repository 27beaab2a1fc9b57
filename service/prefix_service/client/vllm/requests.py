"""The adapter that a request names, and every spelling of one that vLLM would ignore. Imports no vLLM.

vLLM ignores a field that it does not know: it would answer a request with a misspelt adapter by the plain model.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from prefix_service.errors import InvalidRequest
from prefix_service.prefix.mixed import MOST_IN_A_ROW
from prefix_service.prefix.references import parse_qualified

References = tuple[str, ...]
"""The adapters of a request: one, or several whose prefixes follow each other in this order."""

PARAMETER: Final = "prefix_adapter"
CONTAINER: Final = "kv_transfer_params"
BODY: Final = "body"
_MAX_COMPARED: Final = 1000  # keys of a request that share a third of the parameter's letters without being it
_MAX_EXTRA: Final = 1000  # extra parameters of an engine's request, whose one thread looks at each of them
_MAX_TEXT: Final = 16 << 10  # characters of a text of JSON in which an adapter is looked for
_OTHERS_OPTION: Final = "kv_connector_extra_config.other_parameters"

# Objects of the caller's own data: schemas, metadata, another request's answer. Their keys name no parameters.
_FREE: Final = frozenset({
    "response_format", "structured_outputs", "guided_json", "text", "metadata", "tool_choice", "generate_response"
})  # fmt: skip
# Objects whose entries are parameters, the request itself ("") among them.
_PARAMETERS: Final = frozenset({"", BODY, "extra_body", "vllm_xargs", "extra_args", "sampling_params"})

_Path = tuple[()] | tuple["_Path", Any]  # the keys from the request to a field: those around it, then its own


def adapters_asked(fields: Mapping[str, Any], others: Collection[str] | None = ()) -> References:
    """Returns the references that a request names, in their order; none if it names no adapter.

    `fields` is the JSON body of an HTTP request, or `SamplingParams.extra_args`. `others` are the keys of
    `kv_transfer_params` that other connectors read, or None if any key is allowed.

    Raises:
        InvalidReference: a reference is not of the form `tenant/adapter`, `…@7`, `…@alias` or `…@sha256:…`.
        InvalidRequest: it is neither a text nor a list of 1 to 32 texts, or the request has a field that looks like an
            adapter and that vLLM would ignore.
    """
    refuse_misplaced(fields.items())
    return adapters_of(fields.get(CONTAINER), others)


def adapters_of(kv_transfer_params: Any, others: Collection[str] | None = ()) -> References:
    """Returns the references in `kv_transfer_params`, in their order.

    Raises:
        InvalidReference: a reference is not of the form `tenant/adapter`, `…@7`, `…@alias` or `…@sha256:…`.
        InvalidRequest: `prefix_adapter` is neither a text nor a list of 1 to 32 texts, or the parameters are no object,
            or have a key that nobody reads.
    """
    if kv_transfer_params is None:
        return ()
    if not isinstance(kv_transfer_params, Mapping):
        raise InvalidRequest(f"{CONTAINER} must be an object, got {kv_transfer_params!r:.100}")
    for key, value in kv_transfer_params.items():
        if key == PARAMETER or value is None:
            continue
        if _letters(key) in _LIKE_PARAMETER:
            raise InvalidRequest(f"{CONTAINER} has {key!r:.100}: did you mean {PARAMETER}?")
        if others is not None and key not in others:
            raise InvalidRequest(
                f"{CONTAINER} has {key!r:.100}, which nobody reads here: name an adapter in {PARAMETER}. If another "
                f"connector reads it, list it in {_OTHERS_OPTION}"
            )
    return _references(kv_transfer_params.get(PARAMETER))


def _references(named: Any) -> References:
    if named is None:
        return ()
    if isinstance(named, list) and not 1 <= len(named) <= MOST_IN_A_ROW:
        raise InvalidRequest(f"{PARAMETER} as a list has 1 to {MOST_IN_A_ROW} adapters, got {len(named)}")
    references = tuple(named) if isinstance(named, list) else (named,)
    for reference in references:
        if not isinstance(reference, str):
            raise InvalidRequest(
                f"{PARAMETER} must be text such as tenant/adapter@prod, or a list of such texts, got {reference!r:.100}"
            )
        parse_qualified(reference)
    return references


def refuse_misplaced(fields: Iterable[tuple[Any, Any]]) -> None:
    """Refuses fields that look like an adapter where vLLM does not read one.

    Raises:
        InvalidRequest: there is such a field.
    """
    for name in misplaced(fields):
        raise InvalidRequest(
            f"the request has {name!r:.100}, which vLLM would ignore: an adapter is named by "
            f'"{CONTAINER}": {{"{PARAMETER}": "tenant/adapter@prod"}} at the top of the request'
        )


def misplaced(fields: Iterable[tuple[Any, Any]]) -> Iterator[str]:
    """Yields the dotted names of fields that look like an adapter, except those in `kv_transfer_params`.

    A null field counts as left out.

    Raises:
        InvalidRequest: more than 1,000 different keys must be compared letter by letter, or a field of parameters is a
            long text of JSON.
    """
    compared = set[str]()
    waiting: list[tuple[_Path, Iterable[tuple[Any, Any]]]] = [((), fields)]
    while waiting:
        inside, entries = waiting.pop()
        parameters = not inside or inside[1] in _PARAMETERS
        for key, value in entries:
            if value is None or (key == CONTAINER and not inside):
                continue
            letters = _letters(key)
            if any(near.may_be(letters) for near in _NEAR):
                compared.add(letters)
                if len(compared) > _MAX_COMPARED:
                    raise InvalidRequest(f"the request has more than {_MAX_COMPARED} keys that are like {PARAMETER}")
                if _names_adapter(letters, parameters=parameters):
                    yield _dotted((inside, key))
                    continue
            if key not in _FREE:
                waiting.extend(((inside, key), one.items()) for one in _objects(key, value))


def _objects(key: Any, value: Any) -> list[Mapping[Any, Any]]:
    """Return a field's object; of a field of parameters also those of a list, or the one that a text of JSON has.

    Raises:
        InvalidRequest: the text has more than 16,384 characters.
    """
    if key in _PARAMETERS and isinstance(value, str):
        if len(value) > _MAX_TEXT and value.lstrip()[:1] in ("{", "["):
            raise InvalidRequest(
                f"{key} is a text of JSON of more than {_MAX_TEXT} characters, in which no adapter is looked for: send "
                "an object"
            )
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if key in _PARAMETERS and isinstance(value, list):
        return [one for one in value if isinstance(one, Mapping)]
    return [value] if isinstance(value, Mapping) else []


def _dotted(path: _Path) -> str:
    keys = []
    while path:
        path, key = path
        keys.append(f"{key:.100}")
    return ".".join(reversed(keys))


def _letters(key: Any) -> str:
    """Return a key without case and punctuation; nothing for what is too long to be meant as a name of ours."""
    if not isinstance(key, str) or len(key) > 100:
        return ""
    return _PUNCTUATION.sub("", key).casefold()


class _Near:
    """The texts within some edits (insert, delete, substitute) of a name."""

    def __init__(self, name: str, edits: int) -> None:
        self._name, self._edits = _letters(name), edits
        size, parts = len(self._name), edits + 1
        self._pieces = [self._name[size * part // parts : size * (part + 1) // parts] for part in range(parts)]

    def may_be(self, letters: str) -> bool:
        """Returns False, quickly, for most texts that are not within the edits: each edit changes one piece at most."""
        apart = abs(len(letters) - len(self._name))
        return apart <= self._edits and any(piece in letters for piece in self._pieces)

    def __contains__(self, letters: str) -> bool:
        return self.may_be(letters) and _distance(letters, self._name) <= self._edits


_PUNCTUATION: Final = re.compile(r"[\W_]")
_LIKE_PARAMETER: Final = _Near(PARAMETER, 2)
_LIKE_CONTAINER: Final = _Near(CONTAINER, 1)  # ec_transfer_params, which vLLM reads, is two edits away
_LIKE_ADAPTER: Final = _Near("adapter", 1)
_NEAR: Final = (_LIKE_PARAMETER, _LIKE_CONTAINER, _LIKE_ADAPTER)


def _names_adapter(letters: str, *, parameters: bool) -> bool:
    return letters in _LIKE_PARAMETER or letters in _LIKE_CONTAINER or (parameters and letters in _LIKE_ADAPTER)


def _distance(one: str, other: str) -> int:
    """Returns the edits (insert, delete, substitute) between two short texts."""
    row = list(range(len(other) + 1))
    for count, letter in enumerate(one, 1):
        left, row[0], diagonal = count, count, row[0]
        for column, against in enumerate(other, 1):
            left = min(left + 1, row[column] + 1, diagonal + (letter != against))
            diagonal, row[column] = row[column], left
    return row[-1]


def parameters_of(request: Any) -> Mapping[str, Any]:
    """Returns the extra parameters of a vLLM request.

    Raises:
        InvalidRequest: they are no object, or more than 1,000.
    """
    sampling, pooling = request.sampling_params, request.pooling_params
    extra = sampling.extra_args if sampling is not None else pooling.extra_kwargs
    if extra is not None and not isinstance(extra, Mapping):
        raise InvalidRequest(f"extra_args must be an object, got {extra!r:.100}")
    if extra is not None and len(extra) > _MAX_EXTRA:
        raise InvalidRequest(
            f"extra_args (in the HTTP API vllm_xargs) has {len(extra)} entries, more than {_MAX_EXTRA}"
        )
    return extra or {}


def refuse_sampling(sampling: Any) -> None:
    """Refuses sampling parameters that vLLM cannot serve behind a prefix, and None, which is a pooling request.

    Raises:
        InvalidRequest: vLLM cannot serve them.
    """
    _refuse(
        {
            "pooling": sampling is None,
            "prompt_logprobs (in the HTTP API also echo with logprobs, or echo in a chat): vLLM computes them from the "
            "tokens of the whole prompt, and a prefix has none": sampling is not None
            and sampling.prompt_logprobs is not None,
            "skip_reading_prefix_cache: vLLM then takes keys and values from nowhere": sampling is not None
            and sampling.skip_reading_prefix_cache,
        }
    )


def refuse_unservable(request: Any) -> None:
    """Refuses a vLLM request whose options vLLM cannot serve behind a prefix.

    Raises:
        InvalidRequest: it has such an option.
    """
    refuse_sampling(request.sampling_params)
    _refuse(
        {
            "prompt embeddings": request.prompt_token_ids is None or request.prompt_is_token_ids is not None,
            "images, audio or video": bool(request.mm_features),
            "a prompt that comes in pieces": request.resumable,
        }
    )


def _refuse(reasons: Mapping[str, bool]) -> None:
    for reason, applies in reasons.items():
        if applies:
            raise InvalidRequest(f"a request with an adapter cannot have {reason}")

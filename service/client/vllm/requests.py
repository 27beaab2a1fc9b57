"""The adapter that a request names, and every spelling of one that vLLM would ignore. Imports no vLLM.

vLLM ignores a field that it does not know: it would answer a request with a misspelt adapter by the plain model.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

from service.errors import InvalidRequest
from service.prefix.references import parse_qualified

PARAMETER: Final = "prefix_adapter"
CONTAINER: Final = "kv_transfer_params"
BODY: Final = "body"
_OTHERS_OPTION: Final = "kv_connector_extra_config.other_parameters"

# Objects of the caller's own data: schemas, metadata, another request's answer. Their keys name no parameters.
_FREE: Final = frozenset({
    "response_format", "structured_outputs", "guided_json", "text", "metadata", "tool_choice", "generate_response"
})  # fmt: skip
# Objects whose entries are parameters, the request itself ("") among them.
_PARAMETERS: Final = frozenset({"", BODY, "extra_body", "vllm_xargs", "extra_args", "sampling_params"})


def adapter_asked(fields: Mapping[str, Any], others: Collection[str] | None = ()) -> str | None:
    """Return the reference that a request names, None if it names no adapter.

    `fields` is the JSON body of an HTTP request, or `SamplingParams.extra_args`. `others` are the keys of
    `kv_transfer_params` that other connectors read, None if any key may stand there.

    Raises:
        InvalidReference: the reference is not of the form `tenant/adapter`, `…@7`, `…@alias` or `…@sha256:…`.
        InvalidRequest: the reference is no text, or the request has a field that looks like an adapter and that vLLM
            would ignore.
    """
    refuse_misplaced(fields.items())
    return adapter_of(fields.get(CONTAINER), others)


def adapter_of(kv_transfer_params: Any, others: Collection[str] | None = ()) -> str | None:
    """Return the reference in `kv_transfer_params`, None if there is none.

    Raises:
        InvalidReference: as `adapter_asked`.
        InvalidRequest: the reference is no text, the parameters are no object, or have a key that nobody reads.
    """
    if kv_transfer_params is None:
        return None
    if not isinstance(kv_transfer_params, Mapping):
        raise InvalidRequest(f"{CONTAINER} must be an object, got {kv_transfer_params!r:.100}")
    for key in kv_transfer_params:
        if key == PARAMETER:
            continue
        if _resembles(key, PARAMETER):
            raise InvalidRequest(f"{CONTAINER} has {key!r:.100}: did you mean {PARAMETER}?")
        if others is not None and key not in others:
            raise InvalidRequest(
                f"{CONTAINER} has {key!r:.100}, which nobody reads here: name an adapter in {PARAMETER}. If another "
                f"connector reads it, list it in {_OTHERS_OPTION}"
            )
    reference = kv_transfer_params.get(PARAMETER)
    if reference is None:
        return None
    if not isinstance(reference, str):
        raise InvalidRequest(f"{PARAMETER} must be text such as tenant/adapter@prod, got {reference!r:.100}")
    parse_qualified(reference)
    return reference


def refuse_misplaced(fields: Iterable[tuple[Any, Any]]) -> None:
    """Refuse fields that look like an adapter where vLLM does not read one.

    Raises:
        InvalidRequest: there is such a field.
    """
    for name in misplaced(fields):
        raise InvalidRequest(
            f"the request has {name!r:.100}, which vLLM would ignore: an adapter is named by "
            f'"{CONTAINER}": {{"{PARAMETER}": "tenant/adapter@prod"}} at the top of the request'
        )


def misplaced(fields: Iterable[tuple[Any, Any]]) -> Iterator[str]:
    """Yield the dotted names of fields that look like an adapter, except what stands in `kv_transfer_params`."""
    waiting = [("", fields)]
    while waiting:
        inside, entries = waiting.pop()
        for key, value in entries:
            if key == CONTAINER and not inside:
                continue
            name = f"{inside}.{key}" if inside else key
            if _names_adapter(key, parameters=inside.rpartition(".")[2] in _PARAMETERS):
                yield name
            elif isinstance(value, Mapping) and key not in _FREE:
                waiting.append((name, value.items()))


def _names_adapter(key: Any, *, parameters: bool) -> bool:
    return (
        _resembles(key, PARAMETER)
        or _resembles(key, CONTAINER, edits=1)  # ec_transfer_params, which vLLM reads, is two edits away
        or (parameters and _resembles(key, "adapter", edits=1))
    )


@lru_cache(1024)  # most requests have the same fields
def _resembles(key: Any, name: str, edits: int = 2) -> bool:
    """Whether a key is within some edits of a name, without regard to case and punctuation."""
    if not isinstance(key, str) or len(key) > 100:
        return False
    one, other = (re.sub(r"[\W_]", "", text).casefold() for text in (key, name))
    return abs(len(one) - len(other)) <= edits and _distance(one, other) <= edits


def _distance(one: str, other: str) -> int:
    """Return the edits (insert, delete, substitute) between two short texts."""
    row = list(range(len(other) + 1))
    for count, letter in enumerate(one, 1):
        left, row[0], diagonal = count, count, row[0]
        for column, against in enumerate(other, 1):
            left = min(left + 1, row[column] + 1, diagonal + (letter != against))
            diagonal, row[column] = row[column], left
    return row[-1]


def parameters_of(request: Any) -> Mapping[str, Any]:
    """Return the extra parameters of a vLLM request.

    Raises:
        InvalidRequest: they are no object.
    """
    sampling, pooling = request.sampling_params, request.pooling_params
    extra = sampling.extra_args if sampling is not None else pooling.extra_kwargs
    if extra is not None and not isinstance(extra, Mapping):
        raise InvalidRequest(f"extra_args must be an object, got {extra!r:.100}")
    return extra or {}


def refuse_unservable(request: Any) -> None:
    """Refuse a vLLM request that names an adapter and asks for what vLLM cannot do behind one.

    Raises:
        InvalidRequest: it does.
    """
    sampling = request.sampling_params
    reasons = {
        "pooling": sampling is None,
        "prompt_logprobs (in the HTTP API also echo with logprobs): vLLM computes them from the whole prompt, of which "
        "a prefix is no text": sampling is not None and sampling.prompt_logprobs is not None,
        "skip_reading_prefix_cache: vLLM then takes keys and values from nowhere": request.skip_reading_prefix_cache,
        "prompt embeddings": request.prompt_token_ids is None or request.prompt_is_token_ids is not None,
        "images, audio or video": bool(request.mm_features),
        "a prompt that comes in pieces": request.resumable,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InvalidRequest(f"a request with {PARAMETER} cannot have {reason}")

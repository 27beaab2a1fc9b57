"""What a request says of its adapter, and what cannot be asked of one that names an adapter. Imports no vLLM."""

from collections.abc import Mapping
from typing import Any, Final

from service.errors import InvalidRequest
from service.prefix.references import parse_qualified

PARAMETER: Final = "prefix_adapter"


def adapter_of(kv_transfer_params: Any) -> str | None:
    """The reference that a request names; None if it names none.

    Raises:
        InvalidReference: it is not of the form `tenant/adapter`, `…@7`, `…@alias` or `…@sha256:…`.
        InvalidRequest: it is no text, or the parameters are no object.
    """
    if kv_transfer_params is None:
        return None
    if not isinstance(kv_transfer_params, Mapping):
        raise InvalidRequest(f"kv_transfer_params must be an object, got {kv_transfer_params!r:.100}")
    reference = kv_transfer_params.get(PARAMETER)
    if reference is None:
        return None
    if not isinstance(reference, str):
        raise InvalidRequest(f"{PARAMETER} must be text such as tenant/adapter@prod, got {reference!r:.100}")
    parse_qualified(reference)
    return reference


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

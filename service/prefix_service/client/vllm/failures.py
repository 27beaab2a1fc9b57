"""Why a request failed: its HTTP status, its way from vLLM's engine to its API server, and vLLM's own exceptions.

vLLM's scheduler reports a failed load as a bare `finish_reason` of `error`, without the parameters that
`request_finished` returns (`Scheduler.update_from_output`, where `error_req_ids` are finished). The one field of that
output that a connector can fill is `trace_headers`, which otherwise holds the W3C trace context of the request.
"""

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

from prefix_service.errors import InvalidInput, NotFound, PrefixServiceError, TooLarge

_HEADER: Final = "prefix-service-error"
_PARAMETER: Final = "prefix_error"


def status_of(error: PrefixServiceError) -> int:
    """Returns the status of an answer to a caller of vLLM: 503 if the caller cannot change the reason."""
    if isinstance(error, NotFound):
        return 404
    if isinstance(error, TooLarge):
        return 413
    return 400 if isinstance(error, InvalidInput) else 503


def attach(request: Any, error: PrefixServiceError) -> None:
    """Adds the reason of its failure to the trace context of a request of vLLM's scheduler."""
    reason = json.dumps([status_of(error), error.message])
    request.trace_headers = {**(request.trace_headers or {}), _HEADER: reason}


def unpack(outputs: Iterable[Any]) -> None:
    """Moves each reason in the engine's outputs to `kv_transfer_params`, which vLLM passes on to the output."""
    for output in outputs:
        reason = output.trace_headers and output.trace_headers.get(_HEADER)
        if reason:
            output.kv_transfer_params = {_PARAMETER: json.loads(reason)}


def raise_for(output: Any) -> None:
    """Raises the reason for which a request failed, if its output has one.

    Raises:
        ValueError: the caller must change the request; vLLM answers with 400.
        vllm.exceptions.VLLMError: another reason; vLLM answers with the status that it has.
    """
    params = output.kv_transfer_params
    if not isinstance(params, Mapping) or _PARAMETER not in params:
        return
    status, message = params[_PARAMETER]
    if status == HTTPStatus.BAD_REQUEST:
        raise ValueError(message)
    from vllm.exceptions import GracefulHTTPError

    raise GracefulHTTPError(message, HTTPStatus(status))

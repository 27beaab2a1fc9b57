"""Supplies what schemathesis cannot make up from the OpenAPI document: names that exist, and files that are sound."""

import json
import os
from typing import Any, Final

import schemathesis
import torch
from hypothesis import strategies as st
from safetensors.torch import save
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.meta import TestPhase

from tests.api.helpers import CONFIG, MEDIA_TYPE, weights

_EXISTING: Final = json.loads(os.environ["FUZZ_EXISTING"])
_ANY_CURSOR: Final = "cursor-of-this-listing"
_ANY_REVISION: Final = "a-revision-that-the-service-gave"
_MASK: Final = save({"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])})
_INFERENCE: Final = b'{"inputs":[{"name":"batch_size","shape":[1],"datatype":"INT32","data":[2]}]}'

schemathesis.openapi.format("cursor", st.just(_ANY_CURSOR))
schemathesis.openapi.format("revision", st.just(_ANY_REVISION))
schemathesis.openapi.media_type(MEDIA_TYPE, st.sampled_from([_MASK, weights()]))
schemathesis.openapi.media_type("application/octet-stream", st.sampled_from([_INFERENCE, json.dumps(CONFIG).encode()]))


@schemathesis.hook
def before_call(_context: schemathesis.HookContext, case: schemathesis.Case[Any], _kwargs: dict[str, Any]) -> None:
    """Replaces well-formed names by existing ones, and a cursor or a revision by one that the service returned."""
    existing = _EXISTING[""] | _EXISTING.get(case.operation.label, {})
    if case.query and case.query.get("cursor") == _ANY_CURSOR:
        case.query["cursor"] = existing["cursor"]
    if case.query and case.query.get("since") == _ANY_REVISION:
        case.query["since"] = existing["since"]
    if "origin" in existing:  # any other is refused before the body is read
        case.headers.update({"X-Prefix-CSRF": "1", "Origin": existing["origin"]})
    if case.meta is None or case.meta.is_negative_at(ParameterLocation.PATH):
        return
    for name in case.path_parameters.keys() & existing.keys():
        # For these operations `key_id` is that of a key which was just made.
        if name != "key_id" or case.meta.phase.name is not TestPhase.STATEFUL:
            case.path_parameters[name] = existing[name]

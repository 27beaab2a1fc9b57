"""The answer to an inference: JSON, and behind it the same buffers that `GET …/prefix` sends."""

import json
from functools import partial
from itertools import chain
from math import prod
from typing import Final

import orjson
import torch
from starlette.types import Receive, Scope, Send

from prefix_service.api.http.responses import RawResponse, send_chunks
from prefix_service.api.http.served import SERVED, note_load, served
from prefix_service.api.metrics.inference_statistics import Measurement
from prefix_service.api.open_inference.models import DATATYPES, JSON_LENGTH
from prefix_service.api.open_inference.schemas import MOST_NUMBERS, InferenceRequest
from prefix_service.errors import InvalidRequest
from prefix_service.library.library import Library
from prefix_service.library.plan import Plan
from prefix_service.prefix.wire.prefix_file import Slot
from prefix_service.prefix.wire.rendering import Rendering
from prefix_service.registry.admission import Admission

_STEP: Final = 1 << 14  # numbers that are written in one call, which holds Python's lock
_TEXT, _PARSED = 25, 100  # bytes of a number as text, and of memory that writing it takes


class TensorsResponse(RawResponse):
    """The outputs of a planned prefix that were asked for; its rendering stays pinned until the last byte left.

    By default these are all that have elements: without an input mask, `position_ids` has none. There are some for
    each layer: it is made in a thread.
    """

    def __init__(
        self,
        admission: Admission,
        library: Library,
        plan: Plan,
        asked: InferenceRequest,
        measurement: Measurement,
    ) -> None:
        super().__init__()
        self._admission, self._library = admission, library
        self._plan, self._asked, self._measurement = plan, asked, measurement
        by_default = asked.parameters.binary_data_output
        wanted = {output.name: output.parameters.binary_data for output in asked.outputs}
        if len(wanted) < len(asked.outputs):
            raise InvalidRequest("an output is asked for twice")
        if not wanted:
            wanted = {name: None for name, tensor in plan.file.tensors.items() if tensor.nbytes}
        self._binary = {name: by_default if own is None else own for name, own in wanted.items()}
        self._require_known()
        tensors = plan.file.tensors
        self._numbers = sum(prod(tensors[name].shape) for name, is_binary in self._binary.items() if not is_binary)
        self._binary_nbytes = sum(tensors[name].nbytes for name, is_binary in self._binary.items() if is_binary)
        self._require_moderate()

    def _require_known(self) -> None:
        known = self._plan.file.tensors
        unknown = [name for name in self._binary if name not in known]
        if unknown:
            _, last = self._plan.file.variant.layers
            extras = [name for name in known if not name.startswith("past_key_values")]
            raise InvalidRequest(
                f"there is no output {', '.join(map(repr, unknown))!s:.200} here: there are {', '.join(extras)}, and "
                f"past_key_values.0.key to past_key_values.{last - 1}.value"
            )

    def _require_moderate(self) -> None:
        numbers = self._numbers
        if numbers > MOST_NUMBERS:
            raise InvalidRequest(
                f"the outputs have {numbers} elements, more than the {MOST_NUMBERS} that are written as JSON: ask for "
                "binary data (binary_data_output), for fewer outputs, or for fewer rows"
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        scope[SERVED] = (served(self._plan.version, self._plan.file.variant.batch_size),)
        tenant, numbers = self._plan.version.tenant, self._numbers
        with self._measurement:
            async with (
                self._admission.work(tenant, _TEXT * numbers),
                self._library.current_rendering(self._plan, partial(note_load, scope)) as rendering,
            ):
                self._measurement.step()
                async with self._admission.work(tenant, _PARSED * numbers) as work:
                    head = await work.run(partial(self._head, rendering))
                self._measurement.succeeded(self._plan.file.variant.batch_size)
                await self._send(scope, send, head, rendering)

    async def _send(self, scope: Scope, send: Send, head: bytes, rendering: Rendering) -> None:
        binary = (name for name, is_binary in self._binary.items() if is_binary)
        tensors = chain.from_iterable(self._plan.file.chunks_of(name, rendering) for name in binary)
        await send({"type": "http.response.start", "status": 200, "headers": self._fields(head)})
        await send_chunks(scope, send, chain([head], tensors))

    def _fields(self, head: bytes) -> list[tuple[bytes, bytes]]:
        version = self._plan.version
        headers = {
            "content-length": str(len(head) + self._binary_nbytes),
            "content-type": "application/json",
            "cache-control": "no-store",
            "prefix-version": str(version.number),
            "prefix-digest": version.digest,
            "x-content-type-options": "nosniff",
        }
        if any(self._binary.values()):
            headers |= {"content-type": "application/octet-stream", JSON_LENGTH.lower(): str(len(head))}
        return [(name.encode(), value.encode()) for name, value in headers.items()]

    def _head(self, rendering: Rendering) -> bytes:
        """The JSON of the answer; its shape is that of `schemas.InferenceResponse`."""
        version = self._plan.version
        document: dict[str, object] = {
            "model_name": f"{version.tenant}/{version.adapter}",
            "model_version": str(version.number),
            "parameters": {"digest": version.digest, "dtype": self._plan.file.variant.dtypes.single},
            "outputs": [self._output(self._plan.file.tensors[name], rendering) for name in self._binary],
        }
        if self._asked.id is not None:
            document["id"] = self._asked.id
        return orjson.dumps(document)

    def _output(self, tensor: Slot, rendering: Rendering) -> dict[str, object]:
        about: dict[str, object] = {
            "name": tensor.name,
            "datatype": DATATYPES[tensor.dtype],
            "shape": tensor.shape,
        }
        if self._binary[tensor.name]:
            return {**about, "parameters": {"binary_data_size": tensor.nbytes}}
        elements = bytearray().join(self._plan.file.chunks_of(tensor.name, rendering))
        numbers = torch.frombuffer(elements, dtype=tensor.dtype) if elements else torch.empty(0)
        try:
            steps = (numbers[at : at + _STEP].tolist() for at in range(0, len(numbers), _STEP))
            texts = [json.dumps(step, allow_nan=False)[1:-1] for step in steps]
            return {**about, "data": orjson.Fragment(f"[{', '.join(texts)}]".encode())}
        except ValueError as error:
            raise InvalidRequest(
                f"{tensor.name} has values that {DATATYPES[tensor.dtype]} rounds to infinity, which JSON cannot write: "
                "ask for another dtype or for binary data"
            ) from error

"""Pydantic models of the Open Inference Protocol's objects, and of the parameters that are read here.

Sources: KServe's Open Inference Protocol (https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol)
and Triton's extensions `binary_tensor_data`, `model_repository` and `parameters`
(https://github.com/triton-inference-server/server/tree/main/docs/protocol).
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt

from prefix_service.library.request_model import INTEGRAL, RequestModel
from prefix_service.prefix.variant import KVDtype

InputName = Literal["batch_size", "attention_mask"]
Datatype = Literal["FP32", "FP16", "BF16", "INT32", "INT64"]
MOST_NUMBERS: Final = 1 << 20
"""Elements that come as JSON in a request or an answer: each takes up to 25 bytes there, and most of a microsecond."""

_Size = Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63), INTEGRAL]
_Text = Annotated[str, Field(max_length=1024)]


class InputParameters(RequestModel):
    """The encoding of an input's elements."""

    binary_data_size: Annotated[StrictInt, Field(ge=0, lt=1 << 63), INTEGRAL] | None = Field(
        default=None, description="bytes behind the JSON that are its own"
    )


class InferenceInput(RequestModel):
    """An input: its elements in `data`, row by row or flat, or behind the JSON."""

    name: InputName
    shape: list[_Size] = Field(max_length=8, fail_fast=True)
    datatype: Datatype
    parameters: InputParameters = InputParameters()
    data: list[Any] | None = Field(default=None, max_length=MOST_NUMBERS, fail_fast=True)


class OutputParameters(RequestModel):
    """The encoding of an output's elements."""

    binary_data: StrictBool | None = Field(default=None, description="behind the JSON; default binary_data_output")


class RequestedOutput(RequestModel):
    """An output that is wanted."""

    name: _Text
    parameters: OutputParameters = OutputParameters()


class InferenceParameters(RequestModel):
    """Options of a request; `priority` and `timeout` are hints to a scheduler, of which there is none here."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="of keys and values; default that of the stored weights"
    )
    binary_data_output: StrictBool = Field(default=False, description="all outputs come behind the JSON")
    priority: _Size | _Text | None = Field(default=None, description="ignored")
    timeout: _Size | None = Field(default=None, description="ignored")


class InferenceRequest(RequestModel):
    """`batch_size`, or `attention_mask`; with neither, one row."""

    id: _Text | None = None
    parameters: InferenceParameters = InferenceParameters()
    inputs: list[InferenceInput] = Field(max_length=2, fail_fast=True)
    outputs: list[RequestedOutput] = Field(
        default=[],
        max_length=4096,
        fail_fast=True,
        description="default all that have elements, in the order of the model's metadata",
    )


class ResponseOutput(BaseModel):
    """An output: its elements in `data`, flat and row by row, or behind the JSON (`binary_data_size`)."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | None = None


class ResponseParameters(BaseModel):
    """The digest of the version that was served, and the dtype of keys and values."""

    digest: str
    dtype: KVDtype


class InferenceResponse(BaseModel):
    """The answer to an inference; `id` is that of the request, if it had one."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: ResponseParameters
    outputs: list[ResponseOutput]


class ServerMetadata(BaseModel):
    """The server's name and version, and the extensions that it supports."""

    name: str
    version: str
    extensions: list[str]


class ServerLive(BaseModel):
    """The process answers."""

    live: bool = True


class ServerReady(BaseModel):
    """The service can do its work."""

    ready: bool = True


class ModelReady(BaseModel):
    """The version is published, and inference loads it if need be."""

    name: str
    ready: bool = True


class TensorMetadata(BaseModel):
    """A tensor of a model; -1 is a size that the request decides."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(BaseModel):
    """A model: `versions` are the 1,000 newest, ascending. Inputs are optional, and each output may be asked
    for; without the input `attention_mask`, `position_ids` is empty, `[batch, 0]`."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfiguredTensor(BaseModel):
    """A tensor of a model's configuration; -1 is a size that the request decides, the batch's included."""

    name: str
    data_type: str = Field(description="TYPE_ and the datatype of the model's metadata")
    dims: list[int]


class ConfiguredInput(ConfiguredTensor):
    """An input; none is needed."""

    optional: bool = True


class ModelConfig(BaseModel):
    """A model's configuration, as far as a prefix has what Triton's configuration names.

    `max_batch_size` is 0, which says that `dims` are whole shapes: `batch_size` is an input of its own, so not every
    tensor has a batch dimension that a client or Triton could join requests along.
    """

    name: str
    platform: str
    backend: str
    max_batch_size: Literal[0] = 0
    input: list[ConfiguredInput]
    output: list[ConfiguredTensor]


class DurationStatistics(BaseModel):
    """The number of requests, and the sum of their nanoseconds."""

    count: int
    ns: int


class RequestStatistics(BaseModel):
    """Durations of requests, from the arrival of the whole body to an answer that is ready to be sent.

    `compute_input` is reading the request, `compute_infer` having the tensors in memory (a load, if need be, and
    waiting for memory), `compute_output` writing the answer's JSON. `queue` takes no time, since no scheduler holds
    requests back; the response cache, which Triton may have, is absent here.
    """

    success: DurationStatistics
    fail: DurationStatistics
    queue: DurationStatistics
    compute_input: DurationStatistics
    compute_infer: DurationStatistics
    compute_output: DurationStatistics
    cache_hit: DurationStatistics
    cache_miss: DurationStatistics


class ModelStatistics(BaseModel):
    """Counts of one version."""

    name: str
    version: str
    last_inference: int = Field(description="milliseconds since 1970 of the newest request; 0 for none")
    inference_count: int = Field(description="rows of successful requests")
    execution_count: int = Field(description="successful requests")
    inference_stats: RequestStatistics


class Statistics(BaseModel):
    """Counts of the process that answers, since it started; each worker process counts for itself. Of each
    tenant, the 1,024 versions that were asked for last are counted; the others have zeros."""

    model_stats: list[ModelStatistics]


class IndexRequest(RequestModel):
    """The versions to list: all, or those in memory."""

    ready: StrictBool = False


class IndexEntry(BaseModel):
    """A version: READY is in the memory of the process that answers; what is not, inference loads."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class LoadRequest(RequestModel):
    """A version is what was published: there is nothing to configure."""

    parameters: dict[_Text, Any] = Field(default={}, max_length=64, json_schema_extra={"maxProperties": 0})


class UnloadParameters(RequestModel):
    """A prefix has no dependents: this changes nothing."""

    unload_dependents: StrictBool = False


class UnloadRequest(RequestModel):
    """To unload all versions of an adapter."""

    parameters: UnloadParameters = UnloadParameters()

"""`tritonclient` uses Triton's extensions of inference: configuration, statistics, and those that are absent."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from pydantic import BaseModel
from tritonclient.utils import InferenceServerException

from prefix_service.api.app import create_app
from prefix_service.api.metrics.inference_statistics import VERSIONS_PER_TENANT, InferenceStatistics
from prefix_service.api.open_inference.schemas import ModelConfig, ModelMetadata
from prefix_service.catalog.records import COMMAND_LINE, Version
from prefix_service.data_folder.opening import keys_of, opened
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import CONFIG, adapter_of, upload, upload_directory, weights
from tests.api.open_inference.triton import Keyed, masked, rows
from tests.benchmarks.fleet import Shape
from tests.conftest import Server

TENANT = "extensions"
LLAMA, T5, HALF, TWO = f"{TENANT}/llama", f"{TENANT}/t5", f"{TENANT}/half", f"{TENANT}/two"
MODELS = [LLAMA, T5, HALF]


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client, and publishes the adapters of this module."""
    client = server.client()
    upload_directory(client, TENANT, "llama", adapter_of("llama-n20-emb"))
    upload_directory(client, TENANT, "t5", adapter_of("t5-n20-emb"))
    shape = Shape(layers=2, tokens=4)
    assert upload(client, TENANT, "half", shape.config, shape.weights(0)[0]).status_code in (200, 201)
    for seed in (1, 2):
        assert upload(client, TENANT, "two", file=weights(seed)).status_code in (200, 201)
    return client


@pytest.fixture
def worker(server: Server, client: httpx.Client) -> Iterator[Keyed]:
    """Yields tritonclient with the key of a tenant that may only read."""
    keyed = Keyed(server, client.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "read"}).json()["key"])
    yield keyed
    keyed.close()


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("model", MODELS)
def test_every_output_of_the_metadata_may_be_asked_for(worker: Keyed, model: str, binary: bool) -> None:
    """Each output can be requested alone and without a mask, and has the datatype and a shape of the metadata."""
    for output in worker.get_model_metadata(model)["outputs"]:
        asked = [triton.InferRequestedOutput(output["name"], binary_data=binary)]
        found = worker.infer(model, [rows(2)], outputs=asked)
        (answer,) = found.get_response()["outputs"]
        assert (answer["name"], answer["datatype"]) == (output["name"], output["datatype"])
        assert all(want in (have, -1) for have, want in zip(answer["shape"], output["shape"], strict=True))
        assert found.as_numpy(output["name"]).shape == tuple(answer["shape"])


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_positions_without_a_mask_are_empty(worker: Keyed, binary: bool) -> None:
    """Without a mask the positions are `[batch, 0]`, INT64, and one row if no batch size is given."""
    names = ["position_ids", "past_key_values.0.key", "attention_mask"]
    asked = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    for inputs, count in (([], 1), ([rows(3)], 3)):
        found = worker.infer(LLAMA, inputs, outputs=asked)
        positions = found.as_numpy("position_ids")
        assert (positions.shape, positions.dtype) == ((count, 0), np.int64)
        assert (found.as_numpy("attention_mask") == np.ones((count, 20))).all()
        alone = worker.infer(LLAMA, inputs, outputs=[asked[1]]).as_numpy("past_key_values.0.key")
        assert found.as_numpy("past_key_values.0.key").tobytes() == alone.tobytes()
    assert worker.infer(LLAMA, [masked([[0, 1, 1]])], outputs=asked).as_numpy("position_ids").tolist() == [[20, 20, 21]]


def test_positions_are_not_listed_where_there_are_none(worker: Keyed) -> None:
    """An encoder-decoder adapter has no positions in metadata, configuration and answers."""
    for described in (worker.get_model_metadata(T5)["outputs"], worker.get_model_config(T5)["output"]):
        assert "position_ids" not in {tensor["name"] for tensor in described}
    found = worker.infer(T5, [masked([[1, 1]])]).get_response()["outputs"]
    assert "position_ids" not in {tensor["name"] for tensor in found}


@pytest.mark.parametrize("model", MODELS)
def test_the_configuration_is_the_metadata(worker: Keyed, model: str) -> None:
    """The configuration has the metadata's tensors, with Triton's names for their types, and whole shapes as `dims`."""
    config, metadata = worker.get_model_config(model), worker.get_model_metadata(model)
    assert (config["name"], config["platform"]) == (metadata["name"], metadata["platform"])
    assert (config["backend"], config["max_batch_size"]) == ("prefix-service", 0)
    for configured, described in ((config["input"], metadata["inputs"]), (config["output"], metadata["outputs"])):
        found = [(one["name"], one["data_type"], one["dims"]) for one in configured]
        assert found == [(one["name"], f"TYPE_{one['datatype']}", one["shape"]) for one in described]
    assert all(tensor["optional"] is True for tensor in config["input"])
    assert worker.get_model_config(model, "1") == config


@pytest.mark.parametrize("model", MODELS)
def test_metadata_and_configuration_are_the_documented_models(client: httpx.Client, model: str) -> None:
    """The JSON, which is written without pydantic, has every member of the documented model and no other."""
    documented: dict[str, type[BaseModel]] = {"": ModelMetadata, "/config": ModelConfig}
    for path, schema in documented.items():
        answer = client.get(f"/v2/models/{model}{path}")
        assert answer.headers["content-type"] == "application/json"
        assert schema.model_validate_json(answer.content, strict=True).model_dump(mode="json") == answer.json()


def test_the_configuration_has_the_stored_dtype(worker: Keyed) -> None:
    """The configuration of a bfloat16 adapter has TYPE_BF16."""
    types = {tensor["name"]: tensor["data_type"] for tensor in worker.get_model_config(HALF)["output"]}
    assert types["past_key_values.1.value"] == "TYPE_BF16"
    assert types["attention_mask"] == types["position_ids"] == "TYPE_INT64"


STEPS = ("compute_input", "compute_infer", "compute_output")


def _counts(worker: Keyed, model: str, version: str) -> dict[str, Any]:
    (found,) = worker.get_inference_statistics(model, version)["model_stats"]
    assert (found["name"], found["version"]) == (model, version)
    counts: dict[str, Any] = found
    return counts


@pytest.mark.one_process("the protocol's statistics are each replica's own")
def test_statistics_count_what_inference_did(worker: Keyed, client: httpx.Client) -> None:
    """Statistics count requests, rows and time of one version, without other versions and requests under `/v1`."""
    before, other = _counts(worker, TWO, "2"), _counts(worker, TWO, "1")
    asked = time.time_ns() // 1_000_000
    worker.infer(TWO, [rows(3)])
    worker.infer(TWO, [masked([[1], [1]])], model_version="2")
    assert client.get(f"/v1/tenants/{TENANT}/adapters/two/prefix").status_code == 200
    with pytest.raises(InferenceServerException):
        worker.infer(TWO, [rows(0)])
    after = _counts(worker, TWO, "2")
    assert after["inference_count"] - before["inference_count"] == 5
    assert after["execution_count"] - before["execution_count"] == 2
    assert asked <= after["last_inference"] <= time.time_ns() // 1_000_000
    stats, earlier = after["inference_stats"], before["inference_stats"]
    counts = {name: stats[name]["count"] - earlier[name]["count"] for name in stats}
    assert counts == {
        **dict.fromkeys(("success", "queue", *STEPS), 2),
        "fail": 1,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert all(stats[name]["ns"] > earlier[name]["ns"] for name in ("success", "fail", *STEPS))
    assert stats["success"]["ns"] == sum(stats[name]["ns"] for name in STEPS)
    assert stats["queue"]["ns"] == stats["cache_hit"]["ns"] == stats["cache_miss"]["ns"] == 0
    assert _counts(worker, TWO, "1") == other


@pytest.mark.one_process("the protocol's statistics are each replica's own")
def test_statistics_of_a_model_are_those_of_its_versions(worker: Keyed) -> None:
    """A model's statistics have all its versions, oldest first; without a model they have all that the key may see."""
    worker.infer(TWO, [])
    both = worker.get_inference_statistics(TWO)["model_stats"]
    assert both == [_counts(worker, TWO, version) for version in ("1", "2")]
    every = worker.get_inference_statistics()["model_stats"]
    assert [entry for entry in every if entry["name"] == TWO] == both
    assert {entry["name"] for entry in every} == {LLAMA, T5, HALF, TWO}
    assert worker.get_inference_statistics(TWO, "latest")["model_stats"] == both[1:]


def test_what_fails_while_it_loads_is_counted_as_failed(tmp_path: Path) -> None:
    """A sound request that gets 507, because no memory has room, counts as failed."""
    settings = Settings(data_dir=tmp_path, rendering_bytes=1 << 16)
    with opened(settings), keys_of(settings) as (keyring, _):
        key = keyring.create(None, "admin", "", COMMAND_LINE)[1]
    with (
        served(create_app(settings)) as url,
        httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as admin,
    ):
        shape = Shape(layers=2, tokens=20)
        assert upload(admin, "acme", "large", shape.config, shape.weights(0)[0]).status_code == 201
        assert admin.post("/v1/tenants/acme/adapters/small/versions", json={"config": CONFIG}).status_code == 201
        assert admin.post("/v2/models/acme/large/infer", json={"inputs": []}).status_code == 507
        assert admin.post("/v2/models/acme/small/infer", json={"inputs": []}).status_code == 200
        found = {entry["name"]: entry for entry in admin.get("/v2/models/stats").json()["model_stats"]}
        outcomes = {
            name: (entry["inference_stats"]["success"]["count"], entry["inference_stats"]["fail"]["count"])
            for name, entry in found.items()
        }
        assert outcomes == {"acme/large": (0, 1), "acme/small": (1, 0)}
        admin.delete("/v1/tenants/acme")
        assert admin.get("/v2/models/stats").json() == {"model_stats": []}


def _version(tenant: str, number: int) -> Version:
    return Version("", "", None, "", 0, "float32", "", 0, tenant, "a", number, None)  # type: ignore[arg-type]


def test_statistics_are_bounded_by_tenant() -> None:
    """The version that was requested least recently is dropped, from its own tenant's statistics."""
    statistics = InferenceStatistics()

    def infer(version: Version) -> None:
        measurement = statistics.measure(version)
        measurement.step()
        measurement.step()
        measurement.succeeded(1)

    infer(_version("beta", 1))
    for number in (*range(VERSIONS_PER_TENANT), 0, VERSIONS_PER_TENANT):
        infer(_version("acme", number))
    counted = [statistics.read(_version("acme", number)).success.count for number in range(VERSIONS_PER_TENANT + 1)]
    assert counted == [2, 0, *[1] * (VERSIONS_PER_TENANT - 1)]
    assert statistics.read(_version("beta", 1)).success.count == 1


def test_a_request_is_counted_once() -> None:
    """A request whose answer breaks while it is sent counts as a successful inference."""
    statistics, version = InferenceStatistics(), _version("acme", 1)
    measurement = statistics.measure(version)
    measurement.step()
    measurement.step()
    measurement.succeeded(1)
    with pytest.raises(OSError, match="reset"), measurement:
        raise OSError("reset")
    found = statistics.read(version)
    assert (found.success.count, found.fail.count) == (1, 0)


Call = Callable[[Keyed], Any]
ABSENT: dict[str, tuple[str, list[Call]]] = {
    "update_trace_settings": (
        "trace",
        [lambda w: w.update_trace_settings(settings={"trace_rate": "1"}), lambda w: w.update_trace_settings(LLAMA)],
    ),
    "get_trace_settings": ("trace", [lambda w: w.get_trace_settings(), lambda w: w.get_trace_settings(LLAMA)]),
    "update_log_settings": ("logging", [lambda w: w.update_log_settings({"log_verbose_level": 1})]),
    "get_log_settings": ("logging", [lambda w: w.get_log_settings()]),
    "get_system_shared_memory_status": (
        "system_shared_memory",
        [lambda w: w.get_system_shared_memory_status(), lambda w: w.get_system_shared_memory_status("region")],
    ),
    "register_system_shared_memory": (
        "system_shared_memory",
        [lambda w: w.register_system_shared_memory("region", "/region", 64)],
    ),
    "unregister_system_shared_memory": (
        "system_shared_memory",
        [lambda w: w.unregister_system_shared_memory(), lambda w: w.unregister_system_shared_memory("region")],
    ),
    "get_cuda_shared_memory_status": (
        "cuda_shared_memory",
        [lambda w: w.get_cuda_shared_memory_status(), lambda w: w.get_cuda_shared_memory_status("region")],
    ),
    "register_cuda_shared_memory": (
        "cuda_shared_memory",
        [lambda w: w.register_cuda_shared_memory("region", "aGFuZGxl", 0, 64)],
    ),
    "unregister_cuda_shared_memory": (
        "cuda_shared_memory",
        [lambda w: w.unregister_cuda_shared_memory(), lambda w: w.unregister_cuda_shared_memory("region")],
    ),
}
SERVED = {
    *("is_server_live", "is_server_ready", "is_model_ready", "get_server_metadata", "get_model_metadata"),
    *("get_model_config", "get_inference_statistics", "get_model_repository_index", "load_model", "unload_model"),
    *("infer", "async_infer"),
}
OF_THE_CLIENT = {
    "close",
    "generate_request_body",
    "parse_response_body",
    "plugin",
    "register_plugin",
    "unregister_plugin",
}


def test_all_methods_of_tritonclient_are_known() -> None:
    """Each method is served, refused with a clear message, or calls no server; a new one fails here."""
    methods = {name for name in dir(triton.InferenceServerClient) if not name.startswith("_")}
    assert methods == SERVED | ABSENT.keys() | OF_THE_CLIENT


@pytest.mark.parametrize("method", ABSENT)
def test_what_is_absent_says_so(worker: Keyed, method: str) -> None:
    """The exception names the absent extension, which the metadata does not list, and those that exist."""
    extension, calls = ABSENT[method]
    extensions = worker.get_server_metadata()["extensions"]
    assert extension not in extensions
    for call in calls:
        with pytest.raises(InferenceServerException) as raised:
            call(worker)
        assert raised.value.status() == "404"
        assert raised.value.message() == f"this server has no extension {extension}: it has {', '.join(extensions)}"


def test_async_infer_is_infer(worker: Keyed) -> None:
    """tritonclient's greenlets send the same request as `infer`."""
    found = worker.async_infer(LLAMA, [rows(2)]).get_result()
    assert found.as_numpy("attention_mask").shape == (2, 20)

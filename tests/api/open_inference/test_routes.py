"""`tritonclient`, unchanged, gets what `GET …/prefix` answers by the Open Inference Protocol, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.api.helpers import (
    Tensors,
    adapter_of,
    assert_same,
    expected_of,
    tensors_of,
    upload,
    upload_directory,
    weights,
)
from tests.api.open_inference.triton import Keyed, masked, rows
from tests.conftest import Server

TENANT = "open-inference"
LLAMA, T5, ODD = f"{TENANT}/llama", f"{TENANT}/t5", f"{TENANT}/a.b-c_d.9"
MASK = [[0, 0, 1, 1], [1, 1, 0, 0]]
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client, and publishes the adapters of this module."""
    client = server.client()
    upload_directory(client, TENANT, "llama", adapter_of("llama-n20-emb"))
    upload_directory(client, TENANT, "t5", adapter_of("t5-n20-emb"))
    for seed in (1, 2):
        assert upload(client, TENANT, "a.b-c_d.9", file=weights(seed)).status_code in (200, 201)
    return client


@pytest.fixture
def worker(server: Server, client: httpx.Client) -> Iterator[Keyed]:
    """Yields tritonclient as a fleet's worker uses it, with the key of the platform."""
    keyed = Keyed(server, server.admin_key)
    yield keyed
    keyed.close()


def assert_result(found: Any, expected: Tensors, dtype: str = "float32") -> None:
    """Checks that the result has the same tensors, each with the same bytes, shape and type."""
    assert {output["name"] for output in found.get_response()["outputs"]} == expected.keys()
    for name, tensor in expected.items():
        array = found.as_numpy(name)
        assert array.dtype == (np.int64 if tensor.dtype == torch.int64 else NUMPY[dtype])
        assert_same(torch.frombuffer(bytearray(array.tobytes()), dtype=tensor.dtype).view(array.shape), tensor)


def get(client: httpx.Client, model: str, query: str = "", **body: Any) -> Tensors:
    """Returns the tensors of the same prefix by `/v1`."""
    path = f"/v1/tenants/{model.replace('/', '/adapters/')}/prefix{query}"
    return tensors_of(client.post(path, json=body) if body else client.get(path))


def test_the_server_tells_of_itself(worker: Keyed) -> None:
    """The server is live and ready, and lists its extensions by Triton's names."""
    assert worker.is_server_live() is True
    assert worker.is_server_ready() is True
    metadata = worker.get_server_metadata()
    assert metadata["name"] == "prefix-service"
    assert metadata["extensions"] == [
        "binary_tensor_data",
        "model_configuration",
        "model_repository",
        "parameters",
        "statistics",
    ]


def test_a_model_tells_of_itself(worker: Keyed) -> None:
    """Metadata has versions, oldest first, -1 where a request decides a size, and outputs in inference's order."""
    metadata = worker.get_model_metadata(LLAMA)
    assert (metadata["name"], metadata["platform"]) == (LLAMA, "peft_prefix_tuning")
    assert metadata["inputs"] == [
        {"name": "batch_size", "datatype": "INT32", "shape": [1]},
        {"name": "attention_mask", "datatype": "INT64", "shape": [-1, -1]},
    ]
    answer = worker.infer(LLAMA, [masked(MASK)]).get_response()
    told = {output["name"]: output for output in metadata["outputs"]}
    assert list(told) == [output["name"] for output in answer["outputs"]]
    for output in answer["outputs"]:
        assert output["datatype"] == told[output["name"]]["datatype"]
        sizes = zip(output["shape"], told[output["name"]]["shape"], strict=True)
        assert all(size in (found, -1) for found, size in sizes)
    assert worker.get_model_metadata(ODD)["versions"] == ["1", "2"]
    assert "position_ids" not in {output["name"] for output in worker.get_model_metadata(T5)["outputs"]}


def test_a_published_version_is_ready(worker: Keyed) -> None:
    """A version is ready whether or not it is in memory, because inference loads it; a missing one is not."""
    worker.unload_model(ODD)
    assert worker.is_model_ready(ODD) is True
    assert worker.is_model_ready(ODD, "2") is True
    assert worker.is_model_ready(ODD, "3") is False
    assert worker.is_model_ready(f"{TENANT}/none") is False


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("dtype", NUMPY)
def test_rows_are_bit_equal(worker: Keyed, client: httpx.Client, dtype: str, binary: bool) -> None:
    """Keys, values and the mask of three rows are `/v1`'s, whether input and outputs are binary or JSON."""
    expected = get(client, LLAMA, f"?batch_size=3&dtype={dtype}")
    outputs = None if binary else [triton.InferRequestedOutput(name, binary_data=False) for name in expected]
    found = worker.infer(LLAMA, [rows(3, binary=binary)], outputs=outputs, parameters={"dtype": dtype})
    assert_result(found, expected, dtype)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("model", [LLAMA, T5])
def test_masks_are_bit_equal(worker: Keyed, client: httpx.Client, model: str, binary: bool) -> None:
    """The extended mask and the positions are `/v1`'s; encoder-decoder models have no positions."""
    found = worker.infer(model, [masked(MASK, binary=binary)])
    expected = get(client, model, attention_mask=MASK)
    assert ("position_ids" in expected) == (model == LLAMA)
    assert_result(found, expected)


def test_it_is_what_peft_computed(worker: Keyed) -> None:
    """Inference returns PEFT's values, without a comparison with `/v1`."""
    found, expected = worker.infer(LLAMA, [rows(1)]), expected_of("llama-n20-emb")
    for name in ("0.key", "1.value"):
        array = found.as_numpy(f"past_key_values.{name}")
        assert_same(torch.from_numpy(array.copy()), expected[f"b1.layers.{name}"])


def test_outputs_are_selected_and_ordered(worker: Keyed, client: httpx.Client) -> None:
    """The answer has only the requested outputs, in their order, each binary or not as requested."""
    wanted = {"past_key_values.1.value": True, "attention_mask": False, "past_key_values.0.key": False}
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name, binary in wanted.items()]
    found = worker.infer(LLAMA, [rows(2)], outputs=outputs)
    assert [output["name"] for output in found.get_response()["outputs"]] == list(wanted)
    for output in found.get_response()["outputs"]:
        assert ("data" in output) == (not wanted[output["name"]]) == ("parameters" not in output)
    every = get(client, LLAMA, "?batch_size=2")
    assert_result(found, {name: every[name] for name in wanted})


def test_no_input_is_one_row(worker: Keyed, client: httpx.Client) -> None:
    """A request without inputs is answered like a `GET` without a `batch_size`."""
    assert_result(worker.infer(LLAMA, []), get(client, LLAMA))


def test_both_inputs_must_agree(worker: Keyed, client: httpx.Client) -> None:
    """`batch_size` must equal the mask's rows, as in the body of `POST …/prefix`."""
    found = worker.infer(LLAMA, [rows(2), masked(MASK)])
    assert_result(found, get(client, LLAMA, attention_mask=MASK))
    with pytest.raises(InferenceServerException, match="batch_size is 3, and attention_mask has 2 rows") as raised:
        worker.infer(LLAMA, [masked(MASK), rows(3)])
    assert raised.value.status() == "400"


def test_the_answer_names_its_request_and_its_version(worker: Keyed, client: httpx.Client) -> None:
    """The answer has the request's `id`, whatever its letters, and the version, by default the latest."""
    for version, number in {"": "2", "1": "1", "2": "2", "latest": "2"}.items():
        response = worker.infer(ODD, [], model_version=version, request_id="Anfräge 7 ✓").get_response()
        assert (response["model_name"], response["model_version"]) == (ODD, number)
        assert response["id"] == "Anfräge 7 ✓"
        about = client.get(f"/v1/tenants/{TENANT}/adapters/a.b-c_d.9@{number}").json()
        assert response["parameters"] == {"digest": about["digest"], "dtype": "float32"}
    assert "id" not in worker.infer(ODD, []).get_response()


def test_versions_differ(worker: Keyed, client: httpx.Client) -> None:
    """Each version has its own tensors, by the name of an alias too."""
    client.put(f"/v1/tenants/{TENANT}/adapters/a.b-c_d.9/aliases/prod", json={"version": 1})
    for version in ("1", "2", "prod"):
        assert_result(worker.infer(ODD, [], model_version=version), get(client, f"{ODD}@{version}"))
    assert worker.infer(ODD, [], model_version="prod").get_response()["model_version"] == "1"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_requests_may_be_compressed(worker: Keyed, client: httpx.Client, algorithm: str) -> None:
    """tritonclient can compress a request, and ask for a compressed answer."""
    found = worker.infer(
        LLAMA,
        [masked(MASK)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert_result(found, get(client, LLAMA, attention_mask=MASK))


def test_hints_to_a_scheduler_change_nothing(worker: Keyed, client: httpx.Client) -> None:
    """`priority` and `timeout` are accepted and ignored, and sequences are refused."""
    assert_result(worker.infer(LLAMA, [rows(1)], priority=2, timeout=10**6), get(client, LLAMA))
    with pytest.raises(InferenceServerException, match="sequence_id"):
        worker.infer(LLAMA, [rows(1)], sequence_id=7)


def _state(worker: Keyed, model: str) -> dict[str, str]:
    index = worker.get_model_repository_index()
    return {entry["version"]: entry["state"] for entry in index if entry["name"] == model}


@pytest.mark.one_process("what is in memory is each replica's own")
def test_the_repository_is_the_residency(worker: Keyed, client: httpx.Client) -> None:
    """The index shows what is in memory; `load` loads the latest version, and `unload` unloads all."""
    worker.unload_model(ODD)
    assert _state(worker, ODD) == {"1": "UNAVAILABLE", "2": "UNAVAILABLE"}
    worker.load_model(ODD)
    assert _state(worker, ODD) == {"1": "UNAVAILABLE", "2": "READY"}
    residency = f"/v1/tenants/{TENANT}/adapters/a.b-c_d.9@{{}}/residency"
    assert client.get(residency.format(2)).json()["resident"] is True
    worker.infer(ODD, [], model_version="1")
    assert _state(worker, ODD) == {"1": "READY", "2": "READY"}
    worker.unload_model(ODD, unload_dependents=True)
    assert _state(worker, ODD) == {"1": "UNAVAILABLE", "2": "UNAVAILABLE"}
    assert client.get(residency.format(1)).json()["resident"] is False


def test_load_leaves_a_pin(worker: Keyed, client: httpx.Client) -> None:
    """`load` keeps a pin of `/v1`, and `unload` removes it."""
    residency = f"/v1/tenants/{TENANT}/adapters/llama/residency"
    client.put(residency, json={"pinned": True})
    worker.load_model(LLAMA)
    assert client.get(residency).json()["pinned"] is True
    worker.unload_model(LLAMA)
    worker.load_model(LLAMA)
    assert client.get(residency).json() == {**client.get(residency).json(), "resident": True, "pinned": False}


Call = Callable[[Keyed], Any]
REFUSED: dict[str, tuple[Call, str, str]] = {
    "missing model": (lambda worker: worker.infer(f"{TENANT}/none", []), "404", "there is no open-inference/none"),
    "missing version": (lambda worker: worker.infer(ODD, [], model_version="9"), "404", "there is no .*@9"),
    "odd version": (lambda worker: worker.infer(ODD, [], model_version="07"), "400", "neither a version number"),
    "no tenant": (lambda worker: worker.get_model_metadata("llama"), "404", "no such resource"),
    "not a name": (lambda worker: worker.get_model_metadata("acme/Zürich"), "400", "is not a name"),
    "config of a missing model": (
        lambda worker: worker.get_model_config(f"{TENANT}/none"),
        "404",
        "there is no .*/none",
    ),
    "statistics of a missing version": (
        lambda worker: worker.get_inference_statistics(ODD, "9"),
        "404",
        "there is no .*@9",
    ),
    "load with files": (
        lambda worker: worker.load_model(LLAMA, config="{}", files={"file:1/model.bin": b"x"}),
        "400",
        "load takes no parameters",
    ),
    "load with config": (lambda worker: worker.load_model(LLAMA, config="{}"), "400", "load takes no parameters"),
    "no rows": (lambda worker: worker.infer(LLAMA, [rows(0)]), "400", "batch_size"),
    "too many rows": (lambda worker: worker.infer(LLAMA, [rows(257)]), "400", "batch_size must be at most 256"),
    "mask of twos": (lambda worker: worker.infer(LLAMA, [masked([[2]])]), "400", "other than 0 and 1"),
    "mask of twos as JSON": (lambda worker: worker.infer(LLAMA, [masked([[2]], binary=False)]), "400", "row 0 holds 2"),
    "unknown output": (
        lambda worker: worker.infer(LLAMA, [], outputs=[triton.InferRequestedOutput("logits")]),
        "400",
        "there is no output 'logits' here: there are attention_mask, position_ids, and past_key_values.0.key to ",
    ),
    "positions of an encoder-decoder model": (
        lambda worker: worker.infer(T5, [masked(MASK)], outputs=[triton.InferRequestedOutput("position_ids")]),
        "400",
        "there is no output 'position_ids' here: there are attention_mask, and past_key_values.0.key to ",
    ),
    "an output twice": (
        lambda worker: worker.infer(LLAMA, [], outputs=[triton.InferRequestedOutput("attention_mask")] * 2),
        "400",
        "twice",
    ),
    "classification": (
        lambda worker: worker.infer(LLAMA, [], outputs=[triton.InferRequestedOutput("attention_mask", class_count=2)]),
        "400",
        "classification",
    ),
    "shared memory": (
        lambda worker: worker.infer(
            LLAMA, [triton.InferInput("batch_size", [1], "INT32").set_shared_memory("region", 4)]
        ),
        "400",
        "shared_memory_region",
    ),
    "float8": (lambda worker: worker.infer(LLAMA, [], parameters={"dtype": "float8_e4m3fn"}), "400", "dtype"),
    "unknown parameter": (lambda worker: worker.infer(LLAMA, [], parameters={"dtyp": "float16"}), "400", "dtyp"),
    "an input twice": (lambda worker: worker.infer(LLAMA, [rows(1), rows(1)]), "400", "batch_size is there twice"),
    "unknown input": (lambda worker: worker.infer(LLAMA, [_named("text")]), "400", "'batch_size' or 'attention_mask'"),
}


def _named(name: str) -> Any:
    return triton.InferInput(name, [1], "INT32").set_data_from_numpy(np.array([1], np.int32))


@pytest.mark.parametrize("case", REFUSED)
def test_tritonclient_raises_the_words(worker: Keyed, case: str) -> None:
    """The exception has the message and the status."""
    call, status, words = REFUSED[case]
    with pytest.raises(InferenceServerException, match=words) as raised:
        call(worker)
    assert raised.value.status() == status


def test_a_key_is_needed(server: Server, client: httpx.Client) -> None:
    """Health needs no key, and everything else says that one is missing."""
    keyless = Keyed(server, "")
    assert keyless.is_server_live() is True
    assert keyless.is_server_ready() is True
    assert keyless.is_model_ready(LLAMA) is False
    calls: list[Callable[[], Any]] = [
        keyless.get_server_metadata,
        keyless.get_model_repository_index,
        keyless.get_inference_statistics,
        lambda: keyless.get_inference_statistics(LLAMA),
        lambda: keyless.get_model_config(LLAMA),
        keyless.get_trace_settings,
    ]
    for call in calls:
        with pytest.raises(InferenceServerException, match="a key is needed") as raised:
            call()
        assert raised.value.status() == "401"
    keyless.close()


@pytest.mark.one_process("what is in memory is each replica's own")
async def test_the_asyncio_client(server: Server, client: httpx.Client) -> None:
    """tritonclient's asyncio client, whose requests differ on the wire, gets the same answers."""
    headers = {"Authorization": f"Bearer {server.admin_key}"}
    async with triton_aio.InferenceServerClient(urlsplit(server.url).netloc) as worker:
        assert await worker.is_server_ready()
        assert await worker.is_model_ready(LLAMA, headers=headers)
        assert (await worker.get_model_metadata(LLAMA, headers=headers))["name"] == LLAMA
        assert (await worker.get_model_config(LLAMA, headers=headers))["name"] == LLAMA
        (counted,) = (await worker.get_inference_statistics(LLAMA, "1", headers=headers))["model_stats"]
        assert counted["name"] == LLAMA
        for dtype in NUMPY:
            found = await worker.infer(LLAMA, [rows(5)], parameters={"dtype": dtype}, headers=dict(headers))
            assert_result(found, get(client, LLAMA, f"?batch_size=5&dtype={dtype}"), dtype)
        for binary in (True, False):
            found = await worker.infer(LLAMA, [masked(MASK, binary=binary)], headers=dict(headers))
            assert_result(found, get(client, LLAMA, attention_mask=MASK))
        await worker.unload_model(T5, headers=headers)
        await worker.load_model(T5, headers=headers)
        index = await worker.get_model_repository_index(headers=headers)
        assert {"name": T5, "version": "1", "state": "READY", "reason": ""} in index
        with pytest.raises(InferenceServerException, match="there is no open-inference/none"):
            await worker.infer(f"{TENANT}/none", [], headers=dict(headers))

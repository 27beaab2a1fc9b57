"""Parts of the vLLM connector that need no vLLM: errors, ranks, salts, and the middleware."""

import asyncio
import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.datastructures import Headers, State
from starlette.responses import Response
from starlette.routing import Route

import prefix_service.client.vllm as connector
from prefix_service.client import PrefixClient
from prefix_service.client.vllm import bodies, failures, guard
from prefix_service.client.vllm.composition import Composition, Version
from prefix_service.client.vllm.config import ConnectorConfig, refuse_partners
from prefix_service.client.vllm.middleware import PrefixMiddleware
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.requests import adapters_asked, adapters_of, parameters_of, refuse_unservable
from prefix_service.client.vllm.salt import Salts
from prefix_service.client.vllm.source import Source
from prefix_service.errors import InvalidReference, InvalidRequest
from tests.client.holding_proxy import holding_proxy
from tests.client.vllm.behind import Behind, ignore, lifespan
from tests.conftest import Server

GPT2_MODEL = Model(num_layers=4, num_kv_heads=4, head_dim=8, dtype="float32", max_length=128)


def test_without_vllm_the_connector_says_what_to_install() -> None:
    """The package can be imported without vLLM; a name that it does not have is an AttributeError."""
    hidden = "import sys; sys.modules['vllm'] = None; from prefix_service.client.vllm import PrefixConnector"
    done = subprocess.run([sys.executable, "-c", hidden], check=False, capture_output=True, text=True)
    assert (
        "ImportError: prefix_service.client.vllm needs vLLM 0.30 to 0.32, and none is installed: pip install"
        in done.stderr
    )
    with pytest.raises(AttributeError, match="nothing"):
        _ = connector.nothing
    assert connector.PrefixMiddleware is PrefixMiddleware
    multi = hidden.replace("PrefixConnector", "MultiConnector")
    done = subprocess.run([sys.executable, "-c", multi], check=False, capture_output=True, text=True)
    assert (
        "ImportError: prefix_service.client.vllm needs vLLM 0.30 to 0.32, and none is installed: pip install"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({}, "url: Field required"),
        ({"url": "http://x", "adress": 1}, "adress: Extra inputs are not permitted. It may have: url, api_key_file"),
        ({"url": "http://x", "api_key": "secret"}, "vLLM writes its configuration to its log"),
        ({"url": "http://x", "timeout": "soon"}, "timeout: Input should be a valid number"),
    ],
)
def test_a_wrong_configuration_is_refused_with_words(given_: dict[str, Any], words: str) -> None:
    """The error says what is wrong and what is allowed, and never shows the key."""
    with pytest.raises(InvalidRequest) as refused:
        ConnectorConfig.of(given_)
    assert words in str(refused.value)
    assert "secret" not in str(refused.value)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`api_key_file` goes before the environment; a file that cannot be read is an error."""
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("OTHER", "from-environment")
    monkeypatch.delenv("PREFIX_API_KEY", raising=False)
    for more, key in (
        ({"api_key_file": file}, "from-file"),
        ({"api_key_env": "OTHER"}, "from-environment"),
        ({}, None),
    ):
        assert ConnectorConfig.of({"url": "http://x", **more}).api_key() == key
    with pytest.raises(InvalidRequest, match="cannot be read"):
        Source(ConnectorConfig.of({"url": "http://x", "api_key_file": tmp_path / "none"}))


def test_a_request_names_its_adapter_or_none() -> None:
    """Parameters of other connectors are accepted if the configuration lists them."""
    others = ConnectorConfig.of({"url": "http://x", "other_parameters": ["do_remote_prefill"]}).other_parameters
    assert adapters_of(None) == ()
    assert adapters_of({"do_remote_prefill": True}, others) == ()
    assert adapters_of({"do_remote_prefill": True}, None) == ()  # the engine has no PrefixConnector
    assert adapters_of({"prefix_adapter": "acme/a@prod"}) == ("acme/a@prod",)
    assert adapters_of({"prefix_adapter": "acme/a@prod", "do_remote_prefill": True}, others) == ("acme/a@prod",)
    with pytest.raises(InvalidRequest, match=r"'do_remote_prefill', which nobody reads here.*other_parameters"):
        adapters_of({"prefix_adapter": "acme/a@prod", "do_remote_prefill": True})


_LETTERS = "abcdefghijklmnopqrstuvwxyz_-0"


@given(st.lists(st.tuples(st.integers(0, 14), st.sampled_from(["", *_LETTERS]), st.booleans()), max_size=2))
def test_what_is_within_two_edits_of_the_parameter_is_never_ignored(edits: list[tuple[int, str, bool]]) -> None:
    """A misspelt parameter is refused at the top, among other parameters, and in `kv_transfer_params`."""
    key = "prefix_adapter"
    for place, letter, insert in edits:
        key = key[:place] + letter + key[place if insert else place + 1 :]
    for fields in ({key: "acme/a"}, {"extra_body": {key: 1}}, {"vllm_xargs": {key: ""}}):
        with pytest.raises(InvalidRequest, match="which vLLM would ignore"):
            adapters_asked(fields)
    if key != "prefix_adapter":
        with pytest.raises(InvalidRequest, match="did you mean prefix_adapter"):
            adapters_asked({"kv_transfer_params": {key: "acme/a"}}, {key})


def test_several_adapters_are_a_list_in_their_order() -> None:
    """Adapters are a text, or a list of 1 to 32 references, also of the same one; anything else is refused."""
    assert adapters_of({"prefix_adapter": ["acme/a"]}) == adapters_of({"prefix_adapter": "acme/a"})
    assert adapters_of({"prefix_adapter": ["acme/b@2", "beta/a", "acme/b@2"]}) == ("acme/b@2", "beta/a", "acme/b@2")
    assert len(adapters_of({"prefix_adapter": ["acme/a"] * 32})) == 32
    for wrong in ([], ["acme/a"] * 33, ["acme/a", 7], ["acme/a", None], [["acme/a"]]):
        with pytest.raises(InvalidRequest, match="list"):
            adapters_of({"prefix_adapter": wrong})
    with pytest.raises(InvalidReference, match="'b' names no tenant"):
        adapters_of({"prefix_adapter": ["acme/a", "b"]})


def test_a_field_that_is_null_names_nothing() -> None:
    """Clients send null for a field that they leave out, at any depth."""
    nulls = {"prefix_adapter": None, "adapter": None, "kvTransferParams": None}
    fields = {**nulls, "extra_body": nulls, "kv_transfer_params": {"prefix_adapter": "acme/a", "hint": None}}
    assert adapters_asked(fields) == ("acme/a",)
    assert adapters_asked({**nulls, "kv_transfer_params": {"prefix_adapter": None, "prefix_adaptor": None}}) == ()


@pytest.mark.parametrize("name", ["extra_body", "vllm_xargs", "extra_args", "sampling_params"])
@pytest.mark.parametrize("named", [{"adapter": "acme/a"}, {"kv_transfer_params": {"prefix_adapter": "acme/a"}}])
def test_an_adapter_in_a_list_or_a_text_of_parameters_is_never_ignored(name: str, named: dict[str, Any]) -> None:
    """Parameters are found in lists and in JSON inside of a text; a text that is not JSON has no parameters."""
    for value in ([{}, named], json.dumps(named), json.dumps([named])):
        with pytest.raises(InvalidRequest, match=rf"'{name}\.[a-z_]+', which vLLM would ignore"):
            adapters_asked({name: value})
    plains: list[Any] = ["adapter", "[" * 10_000, [1, "adapter"], {}, ""]
    for plain in plains:
        assert adapters_asked({name: plain}) == ()


def test_keys_are_compared_up_to_a_limit() -> None:
    """Unlike keys are never too many; keys that must be compared letter by letter are refused above a limit."""
    others = {f"{number:013}": 1 for number in range(100_000)}
    alike = {f"ixad{number:09}": 1 for number in range(1000)}
    assert adapters_asked({**others, "inner": alike, **alike}) == ()
    with pytest.raises(InvalidRequest, match="more than 1000 keys that are like prefix_adapter"):
        adapters_asked({**alike, "ixad_one_more": 1})


def test_a_long_text_of_json_is_no_place_for_an_adapter() -> None:
    """The engine's one thread would parse it: it is refused instead, and any other text is left alone."""
    with pytest.raises(InvalidRequest, match="extra_body is a text of JSON of more than 16384 characters"):
        adapters_asked({"extra_body": " [" + "[]," * 10_000 + "[]]"})
    assert adapters_asked({"extra_body": "words " * 10_000, "other": "{" * 100_000}) == ()


def test_fields_of_vllm_and_data_of_the_callers_own_are_no_adapter() -> None:
    """Schemas and metadata may have keys that look like the parameter."""
    data = {"prefix_adapter": 1, "adapter": 2}
    fields = {
        "ec_transfer_params": {},
        "model": "adapter",
        "messages": [data],
        "chat_template_kwargs": {"adapter": 1},
        "metadata": data,
        "response_format": {"json_schema": {"schema": {"properties": data}}},
    }
    assert adapters_asked(fields) == ()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda one: st.lists(one)))
def test_whatever_a_request_sends_is_a_reference_or_an_error_of_ours(sent: Any) -> None:
    """Any other exception in vLLM's scheduler would end the engine for all requests."""
    for params in (sent, {"prefix_adapter": sent}):
        with suppress(InvalidReference, InvalidRequest):
            adapters_of(params)


def test_extra_parameters_of_an_engines_request_are_an_object() -> None:
    """Both of generating and of pooling requests; any other exception would end the engine."""
    for extra in (None, {}, {"a": 1}):
        generating = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), pooling_params=None)
        pooling = SimpleNamespace(sampling_params=None, pooling_params=SimpleNamespace(extra_kwargs=extra))
        assert parameters_of(generating) == parameters_of(pooling) == (extra or {})
    with pytest.raises(InvalidRequest, match="extra_args must be an object"):
        parameters_of(SimpleNamespace(sampling_params=SimpleNamespace(extra_args=["a"]), pooling_params=None))
    many = SimpleNamespace(extra_args={str(number): 1 for number in range(1001)})
    with pytest.raises(InvalidRequest, match="1001 entries, more than 1000"):
        parameters_of(SimpleNamespace(sampling_params=many, pooling_params=None))


def _sampling(**options: Any) -> dict[str, Any]:
    return {"sampling_params": SimpleNamespace(**options)}


_PLAIN = {
    **_sampling(prompt_logprobs=None, skip_reading_prefix_cache=False),
    "prompt_token_ids": [1],
    "prompt_is_token_ids": None,
    "mm_features": [],
    "resumable": False,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampling_params": None}, "pooling"),
        (_sampling(prompt_logprobs=0, skip_reading_prefix_cache=True), "prompt_logprobs"),
        (_sampling(prompt_logprobs=None, skip_reading_prefix_cache=True), "skip_reading_prefix_cache"),
        ({"prompt_token_ids": None}, "prompt embeddings"),
        ({"mm_features": [1]}, "images"),
        ({"resumable": True}, "in pieces"),
    ],
)
def test_what_vllm_cannot_do_behind_a_prefix_is_refused(change: dict[str, Any], words: str) -> None:
    """Each such option of a request is refused, and the error names it."""
    refuse_unservable(SimpleNamespace(**_PLAIN))
    with pytest.raises(InvalidRequest, match=words):
        refuse_unservable(SimpleNamespace(**{**_PLAIN, **change}))


def _multi(*connectors: dict[str, Any], policy: str = "fail") -> Any:
    return SimpleNamespace(kv_load_failure_policy=policy, kv_connector_extra_config={"connectors": list(connectors)})


_PREFIXES = {"kv_connector": "PrefixConnector", "kv_connector_extra_config": {"url": "http://x"}}
_OTHER = {"kv_connector": "OffloadingConnector"}
_RECOMPUTE = {"kv_load_failure_policy": "recompute"}


@pytest.mark.parametrize(
    ("transfer", "words"),
    [
        (_multi(_PREFIXES, _OTHER, policy="recompute"), "garbage"),
        (_multi({**_PREFIXES, **_RECOMPUTE}, _OTHER), "garbage"),
        (_multi(_PREFIXES, {**_OTHER, **_RECOMPUTE}), "garbage"),
        (_multi(_OTHER), r"one PrefixConnector, and have \['OffloadingConnector'\]"),
        (_multi(_PREFIXES, _PREFIXES), "one PrefixConnector"),
        (_multi(_PREFIXES, {"kv_connector": "MultiConnector"}), "inside of another"),
    ],
)
def test_partners_with_which_an_adapter_could_be_lost_are_refused(transfer: Any, words: str) -> None:
    """Such a MultiConnector is refused with the reason; other partners are accepted, before and after ours."""
    refuse_partners(_multi(_PREFIXES, _OTHER))
    refuse_partners(_multi(_OTHER, _PREFIXES, _OTHER))
    with pytest.raises(InvalidRequest, match=words):
        refuse_partners(transfer)


def test_the_engines_configuration_is_found_among_partners() -> None:
    """The configuration is found if PrefixConnector is alone, or one of several; without it there is an error."""
    alone = SimpleNamespace(kv_connector_extra_config={"url": "http://x"})
    assert ConnectorConfig.of_engine(alone) == ConnectorConfig.of_engine(_multi(_OTHER, _PREFIXES))
    for none in (None, _multi(_OTHER), SimpleNamespace(kv_connector_extra_config={})):
        with pytest.raises(InvalidRequest, match=r"without PrefixConnector|url: Field required"):
            ConnectorConfig.of_engine(none)


_VERSIONS = st.builds(Version, *[st.text(max_size=2)] * 2, st.just(1), st.text(max_size=2), st.just(5))
_COMPOSITIONS = st.builds(Composition, st.lists(_VERSIONS, min_size=1, max_size=3).map(tuple))


@given(st.lists(st.tuples(_COMPOSITIONS, st.none() | st.text(max_size=3)), unique=True, max_size=8))
def test_salts_differ_where_anything_differs(named: list[tuple[Composition, str | None]]) -> None:
    """Salts are stable within a process, and differ between processes."""
    salts = Salts()
    made = [salts.of(*one) for one in named]
    assert len(set(made)) == len(named)
    assert made == [salts.of(*one) for one in named]
    assert not set(made) & {Salts().of(*one) for one in named}


def test_the_middleware_lets_through_what_is_right_as_it_came(behind: Behind) -> None:
    """A request is unchanged if its adapter fits, or it names none, or its body is other JSON, no JSON, or empty."""
    adapter = {"kv_transfer_params": {"prefix_adapter": "vllm/fits@1"}, "prompt": "ü"}
    for content in (json.dumps(adapter), '{"prompt": "\\u00fc"}', '["prefix_adapter"]', "{prefix_adapter", "", None):
        answer = behind.post(content)
        assert (answer.status_code, answer.content) == (200, (content or "").encode())


@pytest.mark.parametrize(
    ("params", "more", "status", "words"),
    [
        ({"prefix_adapter": "vllm/none"}, {}, 404, "there is no vllm/none, or this server may not read it"),
        ({"prefix_adapter": 7}, {}, 400, "got 7"),
        (["prefix_adapter"], {}, 400, "must be an object"),
        ({"prefix_adapter": "vllm/fits"}, {"prompt_logprobs": 0}, 400, "prompt_logprobs"),
        ({"prefix_adapter": "vllm/fits"}, {"sampling_params": {"prompt_logprobs": 0}}, 400, "prompt_logprobs"),
        ({"prefix_adapter": "vllm/fits"}, {"prompt_embeds": "AA=="}, 400, "prompt_embeds"),
        ({"prefix_adapter": "vllm/fits"}, {"use_beam_search": True}, 400, "use_beam_search"),
        ({"prefix_adapter": "vllm/fits"}, {"adapter": "vllm/fits"}, 400, "'adapter', which vLLM would ignore"),
        ({"prefix_adapter": "vllm/fits", "hint": 1}, {}, 400, "'hint', which nobody reads"),
        (None, {"prefix_adaptor": "vllm/fits"}, 400, "'prefix_adaptor', which vLLM would ignore"),
        ({"prefix_adapter": "vllm/fits"}, {"echo": True, "logprobs": 1}, 400, "echo"),
    ],
)
def test_the_middleware_tells_what_is_wrong(
    behind: Behind, params: Any, more: dict[str, Any], status: int, words: str
) -> None:
    """The answer has the form of vLLM's own errors."""
    answer = behind.post(json.dumps({"kv_transfer_params": params, **more}))
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], told["param"]) == (status, status, "kv_transfer_params.prefix_adapter")
    assert words in told["message"]


def test_the_middleware_tells_of_a_wrong_model_a_wrong_engine_and_a_service_that_is_away(
    behind: Behind, server: Server
) -> None:
    """400 if the caller or the operator must change something, 503 if the fault may pass by itself."""
    content = json.dumps({"kv_transfer_params": {"prefix_adapter": "vllm/fits"}})
    other = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 2}
    away = Behind("http://127.0.0.1:9", other)
    away.extra["timeout"] = 1
    for app, status, words in (
        (Behind(server.url, other), 400, "trained for another model"),
        (Behind(server.url, other, transfers=False), 400, "without PrefixConnector"),
        (away, 503, "cannot be reached"),
    ):
        answer = app.post(content)
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]


def test_an_adapter_outside_of_a_json_body_is_refused(behind: Behind) -> None:
    """It is refused in the query, a header or a form, on other routes, and in an ambiguous or too deep body."""
    body = json.dumps({"kv_transfer_params": {"prefix_adapter": "vllm/fits"}})
    boundary = "multipart/form-data; boundary=x"
    some = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n1\r\n'
    part, many = some + "--x--\r\n", some.format("file") * 1999
    urlencoded = "application/x-www-form-urlencoded"
    for words, answer in (
        ("'query.prefix_adapter'", behind.post("{}", "/v1/completions?prefix_adapter=vllm/fits")),
        (
            "'header.prefix-adapter', which vLLM would ignore: name the adapter in the header X-P",
            behind.post("{}", Prefix_Adapter="vllm/fits"),
        ),
        ("'form.prefix_adapter'", behind.post(part.format("prefix_adapter"), content_type=boundary)),
        ("'form.kv_transfer_params'", behind.post(part.format("kv_transfer_params"), content_type=boundary)),
        ("'form.prefix-adapter'", behind.post("a=1&prefix-adapter=vllm/fits", content_type=urlencoded)),
        ("/tokenize takes no adapter", behind.post(body, "/tokenize")),
        ("'body.kv_transfer_params' is there twice", behind.post(body[:-1] + ', "kv_transfer_params": {}}')),
        ("nested too deeply", behind.post("[" * 100_000)),
        ("'form.prefix_adapter'", behind.post(many + part.format("prefix_adapter"), content_type=boundary)),
        ("more than 2000 parts", behind.post(many + some + part, content_type=boundary)),
        ("more than 2000 fields", behind.post("a=1&" * 2000, content_type=urlencoded)),
    ):
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    for content, content_type in ((part.format("file"), boundary), ("a=1", urlencoded), ('{"a": 1, "a": 2}', "")):
        assert behind.post(content, content_type=content_type).content == content.encode()


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize(
    "piece", [b"form-data;", b"--x\r\nContent-Disposition:", b"content-disposition: name=\r\n", b"%41"]
)
def test_a_hostile_form_costs_no_more_than_its_length(content_type: str, piece: bytes) -> None:
    """A form of 200 KB is read quickly; a search that began again at each piece would take a minute."""
    began = time.process_time()
    with suppress(InvalidRequest):
        bodies.fields_of({"headers": [(b"content-type", content_type.encode())]}, piece * (200_000 // len(piece)))
    assert time.process_time() - began < 2


def test_a_body_is_read_up_to_a_limit(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger body gets 413 before the rest of it has arrived."""
    monkeypatch.setattr(bodies, "MAX_BODY", 100)
    assert behind.post(" " * 100).status_code == 200
    answer = behind.post(" " * 101)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)


def test_a_server_without_an_engine_takes_no_adapter(behind: Behind) -> None:
    """On a server such as `vllm launch render` only requests without an adapter pass."""
    del behind.state.engine_client
    assert behind.post('{"prompt": "Why?"}').status_code == 200
    answer = behind.post('{"kv_transfer_params": {"prefix_adapter": "vllm/fits"}}')
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "prefix_adapter: this server has no engine")


async def test_a_client_that_leaves_within_its_body_reaches_nobody(behind: Behind) -> None:
    """The application never gets half of a body."""
    arriving = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(arriving)

    async def unreachable(*_: Any) -> None:
        pytest.fail("the application was called, or something was sent")

    app = Starlette(routes=[Route("/v1/completions", unreachable, methods=["POST"])])
    app.add_middleware(PrefixMiddleware)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await app(scope, receive, unreachable)


class Refusing:
    """An authentication between the routes and the class that `--middleware` names, where vLLM's is."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and Headers(scope=scope).get("Authorization") != "Bearer right":
            await Response("who?", 401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def test_only_who_is_let_through_learns_of_an_adapter(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller without a key gets the authentication's answer to any request of any size."""
    monkeypatch.setattr(bodies, "MAX_BODY", 100)
    behind.middlewares = [Refusing]
    for adapter, status in (("vllm/fits", 200), ("vllm/none", 404), ("none", 400), (" " * 100, 413)):
        content = json.dumps({"kv_transfer_params": {"prefix_adapter": adapter}})
        assert behind.post(content, authorization="Bearer right").status_code == status
        for headers in ({}, {"authorization": "Bearer wrong"}):
            answer = behind.post(content, **headers)
            assert (answer.status_code, answer.text) == (401, "who?")


def test_what_is_posted_to_no_route_is_not_read(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM leaves most paths open to callers without a key, so a body is only read where vLLM would read it."""
    monkeypatch.setattr(bodies, "MAX_BODY", 0)
    assert behind.post("{}", "/nowhere").status_code == 404
    assert behind.post("{}", "/tokenize").status_code == 413


def test_the_engine_gets_the_adapter_that_was_asked_for_whatever_a_route_does(behind: Behind) -> None:
    """The engine gets it in any task, if a route lost it, and with a partner's parameters; a changed one is refused."""
    adapter: dict[str, Any] = {"kv_transfer_params": {"prefix_adapter": "vllm/fits"}}
    partners: list[dict[str, Any]] = [{"kv_transfer_params": {"hint": 1}}, {"other": 2, "kv_transfer_params": None}]
    for behind.handed in (adapter, {}, *partners):
        assert behind.post(json.dumps(adapter)).status_code == 200
    for params in behind.reached:
        assert params.extra_args["kv_transfer_params"].pop("prefix_adapter").startswith("vllm/fits@sha256:")
    assert [params.extra_args["kv_transfer_params"] for params in behind.reached] == [{}, {}, {"hint": 1}, {}]
    assert behind.reached[3].extra_args["other"] == 2
    behind.handed = {"kv_transfer_params": {"prefix_adapter": "vllm/no"}}
    with pytest.raises(ValueError, match="vLLM changed or lost prefix_adapter vllm/fits on the way"):
        behind.post(json.dumps(adapter))
    assert len(behind.reached) == 4
    for behind.handed in (adapter, {}, *partners):  # requests that name none, after those that do
        assert behind.post("{}").status_code == 200
    assert [params.extra_args for params in behind.reached[4:]] == [adapter, {}, *partners]


@pytest.mark.parametrize(("option", "value"), [("prompt_logprobs", 0), ("skip_reading_prefix_cache", True)])
def test_an_option_that_a_route_adds_and_no_prefix_allows_never_reaches_the_engine(
    behind: Behind, option: str, value: Any
) -> None:
    """The call raises ValueError, which vLLM answers with 400; requests without an adapter may have the option."""
    behind.handed = {"kv_transfer_params": {"prefix_adapter": "vllm/fits"}}
    behind.sampling[option] = value
    with pytest.raises(ValueError, match=f"a request with an adapter cannot have {option}"):
        behind.post(json.dumps(behind.handed))
    assert behind.reached == []
    assert behind.post("{}").status_code == 200


def test_a_prompt_that_leaves_no_room_behind_its_prefix_never_reaches_the_engine(behind: Behind) -> None:
    """The error has the numbers; a prompt that leaves room for one token reaches the engine."""
    behind.handed = {"kv_transfer_params": {"prefix_adapter": "vllm/fits"}}
    with PrefixClient(behind.url, behind.key) as client:
        room = 128 - client.get("vllm/fits").num_virtual_tokens
    behind.prompt = {"prompt_token_ids": [1] * (room - 1)}
    assert behind.post(json.dumps(behind.handed)).status_code == 200
    behind.prompt = {"prompt_token_ids": [1] * room}
    with pytest.raises(ValueError, match=f"with the prompt's {room} there is no room for an answer"):
        behind.post(json.dumps(behind.handed))
    assert len(behind.reached) == 1


async def test_a_client_that_leaves_while_the_service_is_asked_takes_its_question_back(
    behind: Behind, server: Server
) -> None:
    """The question's connection ends, and the application is not called."""
    leaves, body = asyncio.Event(), json.dumps({"kv_transfer_params": {"prefix_adapter": "vllm/fits"}}).encode()
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def unreachable(*_: Any) -> None:
        pytest.fail("the application was called, or something was sent")

    with holding_proxy(server.url) as held:
        behind = Behind(held.url, {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1})
        held.hold(b"/tenants/vllm/")
        app = Starlette(routes=[Route("/v1/completions", unreachable, methods=["POST"])])
        app.state = State(vars(behind.state))
        app.add_middleware(PrefixMiddleware)
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        answering = asyncio.create_task(app(scope, receive, unreachable))
        await asyncio.to_thread(held.wait_for, 1)
        leaves.set()
        await answering
        await asyncio.to_thread(held.wait_for, 0)
        await app({"type": "lifespan"}, lifespan(), ignore)


async def test_the_reason_of_a_failure_in_the_engine_is_raised_where_its_outputs_are_read() -> None:
    """The trace context carries the reason, and stays; outputs without a reason are unchanged."""
    request = SimpleNamespace(trace_headers={"traceparent": "00-1-2-01"})
    failures.attach(request, InvalidRequest("too long"))
    failed = SimpleNamespace(trace_headers=request.trace_headers, kv_transfer_params=None)
    fine = SimpleNamespace(trace_headers={"traceparent": "00-1-2-01"}, kv_transfer_params={"prefix_version": 1})
    plain = SimpleNamespace(trace_headers=None, kv_transfer_params=None)
    processed: list[Any] = []

    class Engine:
        def __init__(self) -> None:
            self.output_processor = SimpleNamespace(process_outputs=processed.extend)

        async def generate(self, prompt: Any, sampling_params: Any) -> Any:
            for output in processed:
                yield output

    engine = Engine()
    guard.guard_engine(engine)
    engine.output_processor.process_outputs([plain, fine, failed])
    composition = Composition((Version("acme", "a", 1, "sha256:0", 5),))
    sampling = SimpleNamespace(
        extra_args={"kv_transfer_params": {"prefix_adapter": "acme/a"}},
        prompt_logprobs=None,
        skip_reading_prefix_cache=False,
    )
    token = guard.ASKED.set(guard.Asked(("acme/a",), composition, 100))
    try:
        outputs = engine.generate("Why?", sampling)
    finally:
        guard.ASKED.reset(token)
    assert [await anext(outputs), await anext(outputs)] == [plain, fine]
    with pytest.raises(ValueError, match="too long"):
        await anext(outputs)
    assert (plain.kv_transfer_params, fine.kv_transfer_params) == (None, {"prefix_version": 1})

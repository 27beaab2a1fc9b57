"""`api.middleware.answers` repeats a remembered answer to callers that may have it, as long as it is true."""

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefix_service.api.app import create_app
from prefix_service.api.middleware import answers as module
from prefix_service.data_folder.opening import opened
from prefix_service.library import library
from prefix_service.library.plan import Plan, make_plan
from prefix_service.settings import Settings
from tests.api.apps import served
from tests.api.helpers import CONFIG, MEDIA_TYPE, about_of, problem, upload, weights
from tests.conftest import Server, running_server
from tests.processes import eventually

TENANT = "answers"
PATH = f"/v1/tenants/{TENANT}/adapters/a/prefix"


@pytest.fixture(scope="module")
def client(server: Server) -> httpx.Client:
    """Returns a platform admin's client, with an adapter published."""
    client = server.client()
    assert upload(client, TENANT, "a").status_code == 201
    return client


QUESTIONS: list[dict[str, Any]] = [
    {},
    {"method": "HEAD"},
    {"params": {"batch_size": "3", "dtype": "bfloat16"}},
    {"params": {"layout": "stacked", "expand": "false"}},
    {"params": {"layers": "1:2", "mask_dtype": "bool"}},
    {"headers": {"Accept": MEDIA_TYPE}},
    {"headers": {"Range": "bytes=10-99"}},
    {"headers": {"Range": "bytes=999999-"}},
    {"headers": {"Want-Repr-Digest": "sha-256=1"}, "params": {"batch_size": "2"}},
    {"headers": {"If-None-Match": "*"}},
    {"headers": {"If-None-Match": 'W/"x", "y"'}},
    {"headers": {"Accept": "text/html"}},
    {"params": {"batch_size": "0"}},
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: json.dumps(question))
def test_again_it_is_the_same(client: httpx.Client, question: dict[str, Any]) -> None:
    """A repeated answer has the same status, header fields and bytes, but for time and request id."""

    def ask() -> tuple[int, dict[str, str], bytes]:
        answer = client.request(**{"method": "GET", "url": PATH, **question})
        told = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
        return answer.status_code, told, answer.content

    first = ask()
    assert [ask() for _ in range(3)] == [first] * 3
    tag = first[1].get("etag")
    if tag is not None:
        found = client.get(PATH, params=question.get("params"), headers={"If-None-Match": f'"x", {tag}'})
        assert (found.status_code, found.content) == (304, b"")


def test_it_is_for_those_who_may_see_it(server: Server, client: httpx.Client) -> None:
    """Callers with no key, a bad one or another tenant's are refused a remembered answer like a new one."""
    for _ in range(2):
        assert client.get(PATH).status_code == 200
    own, foreign = server.client(server.key("read", TENANT)), server.client(server.key("admin", "answers-other"))
    for _ in range(2):
        assert own.get(PATH).status_code == 200
        problem(foreign.get(PATH), 404, "not-found")
        problem(server.client("").get(PATH), 401, "unauthenticated")
        problem(server.client("pfx_x").get(PATH), 401, "unauthenticated")


def test_an_alias_that_moves_moves_at_once(client: httpx.Client) -> None:
    """The process that acknowledged a change uses it in its next answer."""
    for seed in (1, 2):
        assert upload(client, TENANT, "moving", file=weights(seed)).status_code == 201
    path, alias = (f"/v1/tenants/{TENANT}/adapters/moving{rest}" for rest in ("@prod/prefix", "/aliases/prod"))
    for number in (1, 2, 1, 2):
        client.put(alias, json={"version": number}).raise_for_status()
        assert [about_of(client.get(path).content)["version"] for _ in range(2)] == [number, number]
    assert upload(client, TENANT, "moving", file=weights(3)).status_code == 201
    assert about_of(client.get(path.replace("@prod", "")).content)["version"] == 3
    client.delete(alias).raise_for_status()
    problem(client.get(path), 404, "not-found")


def test_what_was_deleted_is_gone_at_once(client: httpx.Client) -> None:
    """A deleted adapter is gone by name and by number, and a namesake has its own answers."""
    adapter = f"/v1/tenants/{TENANT}/adapters/gone"
    assert upload(client, TENANT, "gone").status_code == 201
    for path in (f"{adapter}/prefix", f"{adapter}@1/prefix"):
        assert [client.get(path).status_code for _ in range(2)] == [200, 200]
    client.delete(adapter).raise_for_status()
    for path in (f"{adapter}/prefix", f"{adapter}@1/prefix"):
        problem(client.get(path), 404, "not-found")
    assert upload(client, TENANT, "gone").status_code == 201
    problem(client.get(f"{adapter}@1/prefix"), 404, "not-found")
    assert about_of(client.get(f"{adapter}/prefix").content)["version"] == 2


def test_a_rate_counts_it(client: httpx.Client) -> None:
    """A remembered answer counts against its tenant's rate, and has the fields of what is left."""
    assert upload(client, "answers-limited", "a").status_code == 201
    path = "/v1/tenants/answers-limited/adapters/a/prefix"
    assert [client.get(path).status_code for _ in range(2)] == [200, 200]
    client.put("/v1/tenants/answers-limited", json={"requests_per_second": 1}).raise_for_status()
    found = [client.get(path) for _ in range(12)]
    assert {answer.status_code for answer in found} == {200, 429}
    assert all("ratelimit" in answer.headers for answer in found)


def test_the_memory_of_answers_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest answers are forgotten, and asking for one again answers it."""
    monkeypatch.setattr(module, "_MOST_BYTES", 100_000)
    settings = Settings(data_dir=tmp_path / "data", dev=True)
    with opened(settings), served(app := create_app(settings)) as url, httpx.Client(base_url=url) as client:
        assert upload(client, TENANT, "a").status_code == 201
        for size in [*range(1, 60), 1]:
            assert client.get(PATH, params={"batch_size": size}).status_code == 200
        assert 0 < app.state.prefix_service.answers.nbytes <= 100_000


def test_nothing_is_planned_on_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning, which takes as long as an adapter has layers, runs in a thread."""
    on_loop: list[bool] = []

    def plan(*arguments: Any) -> Plan:
        on_loop.append(asyncio._get_running_loop() is not None)
        return make_plan(*arguments)

    monkeypatch.setattr(library, "make_plan", plan)
    settings = Settings(data_dir=tmp_path / "data", dev=True)
    with opened(settings), served(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        assert upload(client, TENANT, "a").status_code == 201
        assert client.get(PATH, params={"batch_size": 3}).status_code == 200
    assert on_loop == [False]


def test_an_answer_counts_all_that_it_holds(tmp_path: Path) -> None:
    """A long query or `Accept` counts with the answer with which it is remembered."""
    settings = Settings(data_dir=tmp_path / "data", dev=True)
    with opened(settings), served(app := create_app(settings)) as url, httpx.Client(base_url=url) as client:
        assert upload(client, TENANT, "a").status_code == 201
        answers = app.state.prefix_service.answers

        def ask(number: int, long: int) -> None:
            accept = f"{MEDIA_TYPE}, x/{number:0{long}}"
            assert client.get(PATH, params={"batch_size": 1 + number}, headers={"Accept": accept}).status_code == 200

        ask(255, 100)
        for long in (10, 7000):
            tracemalloc.start()
            before, counted = tracemalloc.get_traced_memory()[0], answers.nbytes
            for number in range(200):
                ask(number, long)
            gc.collect()  # what requests left in cycles is not held
            held = tracemalloc.get_traced_memory()[0] - before
            tracemalloc.stop()
            assert held < 1.2 * (answers.nbytes - counted)
            assert answers.nbytes - counted > 200 * long


def test_a_tenant_displaces_its_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many questions one tenant asks, a neighbour's few answers are remembered."""
    monkeypatch.setattr(module, "_MOST_BYTES", 200_000)
    settings = Settings(data_dir=tmp_path / "data", dev=True)
    with opened(settings), served(app := create_app(settings)) as url, httpx.Client(base_url=url) as client:
        assert upload(client, TENANT, "a").status_code == 201
        assert upload(client, "calm", "a").status_code == 201
        answers = app.state.prefix_service.answers
        assert client.get(PATH.replace(TENANT, "calm")).status_code == 200
        calm = answers.nbytes
        for size in range(1, 100):
            assert client.get(PATH, params={"batch_size": size}).status_code == 200
        assert answers.nbytes_of("calm") == calm


async def test_any_asgi_server_will_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The app runs on a server whose connections offer nothing of ours."""
    settings = Settings(data_dir=tmp_path / "data", dev=True)
    with opened(settings):
        app = create_app(settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            files = {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": weights()}
            assert (await client.post(f"/v1/tenants/{TENANT}/adapters/a/versions", files=files)).status_code == 201
            first, second = [await client.get(PATH) for _ in range(2)]
            assert (first.status_code, second.content) == (200, first.content)
    assert "defect" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service of two processes."""
    with running_server(tmp_path_factory.mktemp("workers") / "data", "--workers", "2") as running:
        yield running


def everywhere(server: Server, path: str, found: Callable[[httpx.Response], bool], key: str | None = None) -> None:
    """Waits until every process answers so: each request has a connection of its own."""
    client = server.client(key)
    eventually(lambda: all(found(client.get(path, headers={"Connection": "close"})) for _ in range(30)))


def test_every_process_sees_what_one_changed(workers: Server) -> None:
    """Within a second each process knows new versions, aliases, deletions and revoked keys."""
    admin = workers.client()
    adapter = f"/v1/tenants/{TENANT}/adapters/a"
    for seed in (1, 2):
        assert upload(admin, TENANT, "a", CONFIG, weights(seed)).status_code == 201

    def is_version(answer: httpx.Response, number: int) -> bool:
        return answer.status_code == 200 and about_of(answer.content)["version"] == number

    everywhere(workers, f"{adapter}/prefix", partial(is_version, number=2))
    for number in (1, 2):
        admin.put(f"{adapter}/aliases/prod", json={"version": number}).raise_for_status()
        everywhere(workers, f"{adapter}@prod/prefix", partial(is_version, number=number))
    made = admin.post(f"/v1/tenants/{TENANT}/keys", json={"scope": "read"}).json()
    everywhere(workers, f"{adapter}/prefix", lambda answer: answer.status_code == 200, made["key"])
    admin.delete(f"/v1/tenants/{TENANT}/keys/{made['id']}").raise_for_status()
    everywhere(workers, f"{adapter}/prefix", lambda answer: answer.status_code == 401, made["key"])
    admin.delete(adapter).raise_for_status()
    everywhere(workers, f"{adapter}/prefix", lambda answer: answer.status_code == 404)
    everywhere(workers, f"{adapter}@1/prefix", lambda answer: answer.status_code == 404)


@pytest.mark.one_process("what is in memory is each replica's own")
def test_what_another_process_deleted_leaves_memory(workers: Server) -> None:
    """Each process frees a deleted version, even a pinned one, which nobody could unpin."""
    admin = workers.client()
    assert upload(admin, TENANT, "pinned").status_code == 201
    path = f"/v1/tenants/{TENANT}/adapters/pinned"
    headers = {"Connection": "close"}

    def has_it(answer: httpx.Response) -> bool:
        return any(row["adapter"] == "pinned" for row in answer.json()["resident"])

    def both_have_it() -> bool:
        return all(has_it(admin.get("/v1/residency", headers=headers)) for _ in range(30))

    while not both_have_it():  # which process answers is chance
        admin.put(f"{path}/residency", headers=headers, json={"pinned": True}).raise_for_status()
    admin.delete(path).raise_for_status()
    everywhere(workers, "/v1/residency", lambda answer: not has_it(answer))

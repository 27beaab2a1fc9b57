"""A version that was never seen is fetched while the service is asked for it: by one round trip instead of two."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from prefix_service.client.vllm.composition import Composition, Version
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.early import Early
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.scheduler import SchedulerHalf
from prefix_service.client.vllm.shelf import Orders, Reports, Shelf
from prefix_service.client.vllm.tally import Tally
from prefix_service.client.vllm.worker import WorkerHalf
from prefix_service.errors import DimensionMismatch, NotFound, PrefixServiceError, TooLarge

_MODEL = Model(num_layers=1, num_kv_heads=1, head_dim=1, dtype="float32", max_length=1000)
_TOKEN = 8  # bytes
_A = Version("acme", "a", 1, "sha256:a1", 20)
_MOVED = Version("acme", "a", 2, "sha256:a2", 20)


class _Resolver:
    """A resolver that has never seen a reference, and answers when it is told to."""

    def __init__(self) -> None:
        self.known, self.answer = False, threading.Event()
        self.error: PrefixServiceError | None = None

    def recall(self, references: Any) -> None:
        """Returns nothing."""

    def knows(self, references: Any) -> bool:
        """Returns whether references were ever resolved."""
        return self.known

    async def resolve(self, references: Any) -> Composition:
        """Returns the version once the test allows it."""
        await asyncio.to_thread(self.answer.wait, 30)
        if self.error is not None:
            raise self.error
        return Composition((_A,))

    async def close(self) -> None:
        """Ends every wait."""
        self.answer.set()


class _Scheduler:
    """A scheduler's half with room for `tokens`, and what vLLM does with it."""

    def __init__(self, tokens: int = 100) -> None:
        self.resolver = _Resolver()
        resolver: Any = self.resolver
        config = ConnectorConfig.of({"url": "http://127.0.0.1:1"})
        self.tally = Tally()
        self.shelf = Shelf(tokens * _TOKEN, 1, self.tally)
        self.half = SchedulerHalf(resolver, self.shelf, _MODEL, config, self.tally)

    def arrive(self, name: str, adapter: str = "acme/a") -> Any:
        """Hands a request to the half, and returns it."""
        sampling = SimpleNamespace(
            extra_args={"kv_transfer_params": {"prefix_adapter": adapter}},
            prompt_logprobs=None,
            skip_reading_prefix_cache=False,
            repetition_penalty=1,
        )
        request = SimpleNamespace(
            request_id=name,
            sampling_params=sampling,
            pooling_params=None,
            lora_request=None,
            prompt_token_ids=[1, 2],
            prompt_is_token_ids=None,
            mm_features=[],
            resumable=False,
            num_prompt_tokens=2,
            _all_token_ids=[1, 2],
            cache_salt=None,
            trace_headers=None,
            block_hashes=[],
            update_block_hashes=lambda: None,
        )
        self.half.arrived(request)
        return request

    def orders(self) -> Orders:
        """Takes the orders of a step."""
        return self.half.take_orders(has_work=True)

    def answered(self, request: Any) -> None:
        """Waits until the service has answered, and asks for the request's tokens until its parcel is wanted."""
        self.resolver.answer.set()
        ticket, deadline = self.half._tickets[request.request_id], time.monotonic() + 30
        while ticket.parcel is None and ticket.error is None:
            assert time.monotonic() < deadline
            self.half.matched(request, 0)
            ticket = self.half._tickets[request.request_id]
            time.sleep(0.001)


def test_the_fetch_begins_with_the_question_and_becomes_the_versions() -> None:
    """The workers are told to fetch the reference at once, and then whose bytes these may be."""
    scheduler = _Scheduler()
    request = scheduler.arrive("r")
    first = scheduler.orders()
    assert (first.early, first.fetches) == ([(1, ("acme/a",))], [])
    scheduler.answered(request)
    second = scheduler.orders()
    assert (second.fetches, second.early, second.given_up) == ([(1, ("acme/a@sha256:a1",), 1)], [], [])
    scheduler.half.close()


def test_a_request_that_fails_after_a_preemption_leaves_the_metrics() -> None:
    """Its blocks held the adapter, and the bytes could not be fetched again: the adapter is not shown as loaded."""
    scheduler = _Scheduler()
    request = scheduler.arrive("r")
    scheduler.answered(request)
    scheduler.orders()
    scheduler.half.take_reports(Reports({1: 1}))
    assert scheduler.half.matched(request, 0) == (20, True)
    scheduler.half.allocated(request, ([1, 2],), 20)
    scheduler.shelf.forget()  # so that the preempted request needs another parcel
    assert scheduler.half.matched(request, 0) == (None, False)
    scheduler.orders()
    scheduler.half.take_reports(Reports({}, {2: NotFound("gone")}))
    assert scheduler.half.matched(request, 0) == (None, False)
    assert scheduler.half.matched(request, 0) == (1, True)
    scheduler.half.finished(request)
    counted = scheduler.half.counted()
    assert counted is not None
    assert (counted["loaded"], counted["failures"]) == ([], 1)
    scheduler.half.close()


def test_a_request_that_a_worker_could_not_write_ends_with_the_reason() -> None:
    """The reason that two workers report is on the request when vLLM ends it; one failure is counted."""
    scheduler = _Scheduler()
    request = scheduler.arrive("r")
    scheduler.answered(request)
    scheduler.orders()
    scheduler.half.take_reports(Reports({1: 1}))
    scheduler.half.matched(request, 0)
    scheduler.half.allocated(request, ([1, 2],), 20)
    unwritten = Reports(unwritten={"r": TooLarge("no memory")})
    scheduler.half.take_reports(unwritten.aggregate(Reports(unwritten={"r": TooLarge("no memory")})))
    scheduler.half.take_reports(Reports(unwritten={"r": TooLarge("again"), "gone": TooLarge("no memory")}))
    scheduler.half.finished(request)
    assert request.trace_headers == {"prefix-service-error": '[413, "no memory"]'}
    counted = scheduler.half.counted()
    assert counted is not None
    assert counted["failures"] == 1
    assert ["acme/a", "gpu"] not in counted["loaded"]
    scheduler.half.close()


def test_a_fetch_that_must_wait_for_room_gives_up_the_early_one() -> None:
    """Bytes that are charged to nobody are kept no longer than until their size is known."""
    scheduler = _Scheduler(30)
    other = scheduler.shelf.want("other", "elsewhere", ("elsewhere/b@sha256:b",), 20 * _TOKEN)
    request = scheduler.arrive("r")
    assert scheduler.orders().early == [(1, ("acme/a",))]
    scheduler.answered(request)
    waiting = scheduler.orders()
    assert (waiting.fetches, waiting.given_up) == ([], [1])
    scheduler.shelf.take_reports(Reports({other.number: 1}))
    scheduler.shelf.leave("other", other)
    assert scheduler.orders().fetches == [(2, ("acme/a@sha256:a1",), None)]
    scheduler.half.close()


def test_an_early_fetch_that_nobody_needs_is_given_up() -> None:
    """The request ended, the service refused it, or another request's parcel has the bytes."""
    scheduler = _Scheduler()
    scheduler.half.finished(scheduler.arrive("gone"))
    assert scheduler.orders().given_up == [1]
    requests = [scheduler.arrive(name) for name in ("r1", "r2")]
    assert [number for number, _ in scheduler.orders().early] == [2, 3]
    for request in requests:
        scheduler.answered(request)
    orders = scheduler.orders()
    assert (orders.fetches, orders.given_up) == ([(1, ("acme/a@sha256:a1",), 2)], [3])
    scheduler.resolver.error = NotFound("there is no acme/b")
    refused = scheduler.arrive("refused", "acme/b")
    scheduler.answered(refused)
    assert scheduler.orders().given_up == [4]
    scheduler.half.close()


def test_a_reference_that_was_resolved_before_is_asked_for_alone() -> None:
    """The workers may have its bytes under the version's name."""
    scheduler = _Scheduler()
    scheduler.resolver.known = True
    scheduler.arrive("r")
    assert scheduler.orders().early == []
    scheduler.half.close()


def test_few_fetches_are_early_and_one_tenant_has_half_of_them() -> None:
    """A tenant's fifth one waits for its version as all did before."""
    early = Early()
    numbers = [early.begin(("acme/a",)) for _ in range(5)]
    assert numbers == [1, 2, 3, 4, None]
    assert early.begin(("other/a",)) == 5
    early.end(1, is_used=True)
    early.end(2, is_used=False)
    assert early.take_orders() == ([(number, ("acme/a",)) for number in (1, 2, 3, 4)] + [(5, ("other/a",))], [2])
    assert early.take_orders() == ([], [])
    assert [early.begin(("acme/a",)) for _ in range(2)] == [6, None]


def _prefix(version: Version, heads: int = 1) -> Any:
    metadata = {"tenant": version.tenant, "adapter": version.adapter, "version": version.number}
    metadata |= {"num_layers": 1, "num_kv_heads": heads, "head_dim": 1}
    return SimpleNamespace(metadata=metadata, digest=version.digest)


@pytest.mark.parametrize(
    ("early", "asked"),
    [
        (_A, ["acme/a"]),
        (_MOVED, ["acme/a", "acme/a@sha256:a1"]),  # the alias moved between question and fetch
        (NotFound("not yet"), ["acme/a", "acme/a@sha256:a1"]),
    ],
)
def test_a_worker_uses_an_early_fetch_if_it_is_the_versions(early: Any, asked: list[str]) -> None:
    """Else it fetches the version by its name."""
    gets, begun, ended = [], threading.Event(), threading.Event()

    async def get(reference: str, **_: Any) -> Any:
        if reference == "acme/b":
            begun.set()
            try:
                await asyncio.sleep(30)
            finally:
                ended.set()
        gets.append(reference)
        if "@" not in reference and isinstance(early, Exception):
            raise early
        return _prefix(_A if "@" in reference else early)

    async def close() -> None:
        pass

    source: Any = SimpleNamespace(get=get, close=close)
    worker = WorkerHalf(source, _MODEL, (0, 1), 1 << 20)
    worker._layers = {0: SimpleNamespace()}  # type: ignore[dict-item]
    worker.start(Orders(early=[(1, ("acme/a",)), (2, ("acme/b",))]))
    assert begun.wait(60)
    worker.start(Orders(fetches=[(7, ("acme/a@sha256:a1",), 1)], given_up=[2]))
    (prefix,) = worker._parcels[7].result(30)
    assert (prefix.digest, gets, worker._early) == ("sha256:a1", asked, {})
    assert ended.wait(60)
    worker.close()


def test_a_worker_takes_no_bytes_that_do_not_fit_the_model() -> None:
    """The service said of the version that it fits, and sends a rank's heads of a prefix that has more of them."""
    ended = threading.Event()

    async def get(reference: str, **_: Any) -> Any:
        return _prefix(_A, heads=2)

    async def close() -> None:
        ended.set()

    source: Any = SimpleNamespace(get=get, close=close)
    worker = WorkerHalf(source, _MODEL, (0, 1), 1 << 20)
    worker._layers = {0: SimpleNamespace()}  # type: ignore[dict-item]
    worker.start(Orders(fetches=[(1, (_A.reference,), None)]))
    with pytest.raises(DimensionMismatch, match="has num_kv_heads 2, the model that vLLM serves has 1"):
        worker._parcels[1].result(30)
    worker.close()
    assert ended.wait(60)

"""The scheduler's half: which version a request means, its placeholders, its salt, and which blocks are to be filled.

A request that names an adapter goes through these states, one scheduling step or more each: *asked* (a thread asks the
service which version it is), *prepared* (N placeholders stand in front of its prompt, which vLLM sees for the first
time), *loading* (its blocks wait for the workers). A request that cannot be served is *refused*: it claims one block,
and the workers report it as failed. Nothing here may raise: an exception would end the engine for everybody.
"""

import logging
import secrets
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from service.client.client import PrefixClient
from service.client.vllm.model import Model
from service.client.vllm.requests import adapter_asked, parameters_of, refuse_unservable
from service.client.vllm.salt import Salts
from service.errors import InvalidRequest, PrefixServiceError

log = logging.getLogger("vllm.prefix_service")

_THREADS: Final = 32
_SPAN: Final = (0, 1)  # the least that the service gives: the metadata is what is wanted


@dataclass(frozen=True, slots=True)
class Version:
    """What a reference means now: immutable, so that all ranks load the same."""

    tenant: str
    adapter: str
    number: int
    digest: str
    num_virtual_tokens: int

    @property
    def reference(self) -> str:
        """Its immutable name."""
        return f"{self.tenant}/{self.adapter}@{self.digest}"


@dataclass(frozen=True, slots=True)
class Load:
    """What workers do for a request: write prefix positions `start` to `end` into its blocks, of which `block_ids` has
    all; or report it as failed, where there is no `reference`."""

    request_id: str
    reference: str | None
    start: int = 0
    end: int = 0
    block_ids: Sequence[int] = ()


@dataclass(slots=True)
class _Ticket:
    """One request on its way."""

    asked: "Future[Version] | None" = None
    version: Version | None = None  # from when it is prepared


class SchedulerHalf:
    """Scheduler side of the connector; called by one thread."""

    def __init__(self, client: PrefixClient, model: Model, others: Collection[str]) -> None:
        self._client, self._model, self._salts, self._others = client, model, Salts(), others
        self._threads = ThreadPoolExecutor(_THREADS, "prefix-versions")
        self._tickets: dict[str, _Ticket] = {}
        self._loads: list[Load] = []

    def arrived(self, request: Any) -> None:
        """A new request: begin to ask for its version."""
        try:
            reference = adapter_asked(parameters_of(request), self._others)
            if reference is not None:
                refuse_unservable(request)
                self._tickets[request.request_id] = _Ticket(self._threads.submit(self._ask, reference))
        except Exception as error:  # noqa: BLE001 - this request fails, the engine lives
            self._refuse(request, error)

    def _ask(self, reference: str) -> Version:
        prefix = self._client.get(reference, layers=_SPAN, kv_heads=_SPAN)
        told = prefix.metadata
        self._model.check(told)
        return Version(told["tenant"], told["adapter"], prefix.version, prefix.digest, prefix.num_virtual_tokens)

    def claims(self, request_id: str) -> bool:
        """Whether a request names an adapter, or tried to and is refused; until it has finished."""
        return request_id in self._tickets

    def matched(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind the computed ones come from the prefix, and whether later; None: ask again."""
        ticket = self._tickets.get(request.request_id)
        if ticket is None:
            return 0, False
        if ticket.asked is not None:
            if not ticket.asked.done():
                return None, False
            asked, ticket.asked = ticket.asked, None
            try:
                ticket.version = asked.result()
                self._prepare(request, ticket.version)
            except Exception as error:  # noqa: BLE001 - this request fails, the engine lives
                self._refuse(request, error)
            return None, False  # what vLLM has found for the prompt as it was is void
        if ticket.version is None:
            return 1, True
        left = max(0, ticket.version.num_virtual_tokens - num_computed_tokens)
        return left, left > 0

    def _refuse(self, request: Any, error: Exception) -> None:
        unexpected = None if isinstance(error, PrefixServiceError) else error
        log.error("request %s fails: %s", request.request_id, error, exc_info=unexpected)
        request.kv_transfer_params = None  # vLLM looks into it too, and would fall over what is no object
        request.skip_reading_prefix_cache = False  # or vLLM would not ask, and answer as if no adapter were named
        _bind(request, secrets.token_hex())  # nothing cached may stand in for the block that it claims
        self._tickets[request.request_id] = _Ticket()

    def _prepare(self, request: Any, version: Version) -> None:
        """Put placeholders in front of the prompt, and bind the request's blocks to the version."""
        count, length = version.num_virtual_tokens, request.num_prompt_tokens
        if count + length >= self._model.max_length:
            raise InvalidRequest(
                f"{version.adapter}@{version.number} has {count} virtual tokens: with the prompt's {length} there is "
                f"no room for an answer in vLLM's max_model_len {self._model.max_length}"
            )
        # A repetition penalty looks at the prompt: give it nothing new to punish. Else one id for all, to share blocks.
        penalised = request.sampling_params.repetition_penalty != 1
        placeholders = [request.prompt_token_ids[0] if penalised else 0] * count
        request.prompt_token_ids = placeholders + request.prompt_token_ids  # a new list: the old one is the caller's
        request._all_token_ids[:0] = placeholders  # the read-only views of it stay
        request.num_prompt_tokens += count
        _bind(request, self._salts.of(version.tenant, version.adapter, version.digest, request.cache_salt))

    def allocated(self, request: Any, block_ids: Sequence[int], num_tokens: int) -> None:
        """A request has its blocks, and `num_tokens` of its prefix are to be written into them."""
        ticket = self._tickets.get(request.request_id)
        if ticket is None or num_tokens == 0:
            return
        version = ticket.version
        if version is None:
            self._loads.append(Load(request.request_id, None))
            return
        end = version.num_virtual_tokens
        self._loads.append(Load(request.request_id, version.reference, end - num_tokens, end, list(block_ids)))

    def take_loads(self) -> list[Load]:
        """The loads that begin with this step."""
        loads, self._loads = self._loads, []
        return loads

    def finished(self, request_id: str) -> dict[str, Any] | None:
        """Forget a request; what its answer says of the adapter."""
        ticket = self._tickets.pop(request_id, None)
        if ticket is None or ticket.version is None:
            return None
        return {"prefix_adapter": ticket.version.reference, "prefix_version": ticket.version.number}

    def close(self) -> None:
        """End the threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()


def _bind(request: Any, salt: str) -> None:
    """Hash a request's blocks under a salt."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()

"""The scheduler's half: finds a request's versions, adds placeholders and salt, and has its blocks filled.

A request that names adapters goes through these states: *asked* (the service is asked which versions they are, and the
workers begin to fetch them; not if that is remembered), *prepared* (N placeholders stand in front of its prompt),
*awaiting* (the workers fetch the bytes; not if they have them, or if vLLM's prefix cache does), *loading* (its blocks
are filled in the next step). A request that cannot be served is *refused*: it claims one block, and the workers report
it as failed. No hook may raise, since an exception would end the engine for all requests, or wait while there is work,
since its thread schedules all requests.
"""

import logging
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from prefix_service.client.vllm.background import Background
from prefix_service.client.vllm.composition import Composition, refuse_length
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.early import Early
from prefix_service.client.vllm.failures import attach
from prefix_service.client.vllm.model import Model
from prefix_service.client.vllm.pace import Pace
from prefix_service.client.vllm.requests import (
    References,
    adapters_asked,
    parameters_of,
    refuse_unservable,
)
from prefix_service.client.vllm.resolver import Resolver
from prefix_service.client.vllm.salt import Salts
from prefix_service.client.vllm.shelf import Load, Orders, Parcel, Reports, Shelf
from prefix_service.client.vllm.tally import CACHE, Tally, adapter_name
from prefix_service.errors import Internal, PrefixServiceError, Unavailable

log = logging.getLogger("vllm.prefix_service")


@dataclass(slots=True)
class _Ticket:
    """The state of one request that names adapters."""

    asked: "Future[Composition] | None" = None
    composition: Composition | None = None  # once it is prepared
    early: int | None = None  # the number of its early fetch, until its parcel's fetch begins
    parcel: Parcel | None = None  # while it needs the bytes
    until: float = 0.0  # the time of `time.monotonic` by which they must have arrived
    error: PrefixServiceError | None = None  # why it is refused
    since: float | None = field(default_factory=time.monotonic)  # its arrival; None once it waits no longer
    is_in_cache: bool = False  # whether its blocks hold the prefixes after this step


class SchedulerHalf:
    """The scheduler's side of the connector; called by one thread."""

    def __init__(self, resolver: Resolver, shelf: Shelf, model: Model, config: ConnectorConfig, tally: Tally) -> None:
        self._resolver, self._shelf, self._model, self._config, self._tally = resolver, shelf, model, config, tally
        self._background, self._salts, self._pace = Background("prefix-versions"), Salts(), Pace()
        self._tickets: dict[str, _Ticket] = {}
        self._early = Early()
        self._wanting: list[_Ticket] = []  # those whose parcel was wanted since the last step
        self._loads: list[Load] = []

    def arrived(self, request: Any) -> None:
        """Prepares a new request, or begins to ask for its versions."""
        try:
            references = adapters_asked(parameters_of(request), self._config.other_parameters)
            references = references or self._default(request)
            if not references:
                return
            ticket = self._tickets[request.request_id] = _Ticket()
            refuse_unservable(request)
            composition = self._resolver.recall(references)
            if composition is None:
                ticket.asked = self._background.submit(self._resolver.resolve(references))
                if not self._resolver.knows(references):
                    ticket.early = self._early.begin(references)
            else:
                self._prepare(request, ticket, composition)
        except Exception as error:  # noqa: BLE001 - this request fails, the engine lives
            self._refuse(request, error)

    def _default(self, request: Any) -> References:
        """Returns the configured adapter for a request that names none; none if it uses a LoRA or generates nothing."""
        default = self._config.default_adapter
        if default is None or request.lora_request is not None or request.sampling_params is None:
            return ()
        return (default,)

    def claims(self, request_id: str) -> bool:
        """Returns whether an unfinished request names an adapter, or tried to and is refused."""
        return request_id in self._tickets

    def adapter_of(self, request_id: str) -> str | None:
        """Returns the name of an unfinished request's adapters, as metrics have it; None if it has none."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.composition is None:
            return None
        return adapter_name(ticket.composition.references)

    def matched(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Returns how many tokens after the computed ones come from the prefix, and whether they come later.

        The number is None if vLLM must ask again.
        """
        ticket = self._tickets.get(request.request_id)
        if ticket is None:
            return 0, False
        if ticket.error is not None:
            return 1, True
        try:
            return self._matched(request, ticket, num_computed_tokens)
        except Exception as error:  # noqa: BLE001 - this request fails, the engine lives
            self._refuse(request, error)
            return None, False  # vLLM must look again: what it found was for the prompt without placeholders

    def _matched(self, request: Any, ticket: _Ticket, num_computed_tokens: int) -> tuple[int | None, bool]:
        composition = ticket.composition
        if composition is None:
            if ticket.asked is not None and ticket.asked.done():
                asked, ticket.asked = ticket.asked, None
                self._prepare(request, ticket, asked.result())
            return None, False  # vLLM must look again, with the placeholders
        left = composition.num_virtual_tokens - num_computed_tokens
        if left <= 0:
            self._give_up_early(ticket)
            self._note_end_of_wait(ticket)
            return 0, False
        if ticket.parcel is None:
            nbytes = self._model.nbytes_on_worker(composition.num_virtual_tokens)
            wanted = composition.tenant, composition.references, nbytes
            ticket.parcel = self._shelf.want(request.request_id, *wanted)
            if ticket.early is not None and not ticket.parcel.has_begun and ticket.parcel.early is None:
                ticket.parcel.early = ticket.early
            self._wanting.append(ticket)
            ticket.until = time.monotonic() + self._config.timeout
        if ticket.parcel.error is not None:
            raise ticket.parcel.error
        if ticket.parcel.is_here:
            self._note_end_of_wait(ticket)
            return left, True
        if time.monotonic() > ticket.until:
            raise Unavailable(
                f"the bytes of {composition.name} have not come within {self._config.timeout} s: fetches take turns, "
                "tenant by tenant"
            )
        return None, False

    def _note_end_of_wait(self, ticket: _Ticket) -> None:
        if ticket.since is not None:
            self._tally.add_wait(time.monotonic() - ticket.since)
            ticket.since = None

    def _refuse(self, request: Any, error: Exception) -> None:
        known = isinstance(error, PrefixServiceError)
        log.error("request %s fails: %s", request.request_id, error, exc_info=None if known else error)
        self._leave(request.request_id)
        self._note_out_of_cache(request.request_id)  # a preempted request's blocks had the prefixes
        request.kv_transfer_params = None  # vLLM reads it too, and would raise if it is not an object
        request.skip_reading_prefix_cache = (
            False  # else vLLM would not ask, and would answer as if no adapter were named
        )
        _bind(request, secrets.token_hex())  # no cached block may replace the one that it claims
        self._tally.add_failure()
        reason = error if isinstance(error, PrefixServiceError) else Internal(f"an unexpected error: {error!r:.200}")
        self._tickets[request.request_id] = _Ticket(error=reason)

    def _prepare(self, request: Any, ticket: _Ticket, composition: Composition) -> None:
        """Puts placeholders in front of the prompt, and binds the request's blocks to the composition."""
        count = composition.num_virtual_tokens
        refuse_length(composition, request.num_prompt_tokens, self._model.max_length)
        # A repetition penalty counts the prompt's ids, to which its first one adds none; other requests share id 0.
        penalised = request.sampling_params.repetition_penalty != 1
        placeholders = [request.prompt_token_ids[0] if penalised else 0] * count
        request.prompt_token_ids = placeholders + request.prompt_token_ids  # a new list: the old one is the caller's
        request._all_token_ids[:0] = placeholders  # the read-only views of it stay
        request.num_prompt_tokens += count
        _bind(request, self._salts.of(composition, request.cache_salt))
        ticket.composition = composition

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Notes the blocks of a request in each group of layers, into which `num_tokens` of its prefix are to be
        written."""
        ticket = self._tickets.get(request.request_id)
        if ticket is None:
            return
        if ticket.error is None and ticket.composition is not None and not ticket.is_in_cache:
            ticket.is_in_cache = True
            self._tally.load(ticket.composition.references, CACHE)
        if num_tokens == 0:
            return
        if ticket.error is not None or ticket.composition is None or ticket.parcel is None:
            self._loads.append(Load(request.request_id, None))
            return
        end = ticket.composition.num_virtual_tokens
        self._loads.append(Load(request.request_id, ticket.parcel.number, end - num_tokens, end, block_ids))
        self._leave(request.request_id)  # the workers carry out a step's loads before they drop anything

    def take_orders(self, *, has_work: bool) -> Orders:
        """Returns the workers' orders for this step. If the model computes nothing in it, rests if the last such step
        was less than a millisecond ago."""
        loads, self._loads = self._loads, []
        if not (has_work or loads):
            self._pace.rest()
        orders = self._shelf.take_orders(loads)
        for ticket in self._wanting:
            if ticket.early is not None and ticket.parcel is not None and ticket.parcel.early == ticket.early:
                if ticket.parcel.has_begun:
                    self._early.end(ticket.early, is_used=True)
                    ticket.early = None
                else:
                    ticket.parcel.early = None  # it waits for room, which bytes that nobody counts must not take
            self._give_up_early(ticket)
        self._wanting.clear()
        early, given_up = self._early.take_orders()
        return replace(orders, early=early, given_up=given_up)

    def take_reports(self, reports: Reports) -> None:
        """Notes the workers' reports of a step."""
        self._shelf.take_reports(reports)
        for request_id, error in reports.unwritten.items():
            ticket = self._tickets.get(request_id)
            if ticket is not None and ticket.error is None:  # the workers report it as failed in the next step
                self._note_out_of_cache(request_id)
                self._tally.add_failure()
                ticket.error = error

    def finished(self, request: Any) -> dict[str, Any] | None:
        """Forgets a request, and cancels what it alone waits for. Returns the `kv_transfer_params` of its answer."""
        self._leave(request.request_id)
        self._note_out_of_cache(request.request_id)
        ticket = self._tickets.pop(request.request_id, None)
        if ticket is None:
            return None
        if ticket.error is not None:
            attach(request, ticket.error)
        return None if ticket.composition is None else ticket.composition.answer_parameters

    def _note_out_of_cache(self, request_id: str) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is not None and ticket.is_in_cache and ticket.composition is not None:
            self._tally.unload(ticket.composition.references, CACHE)
            ticket.is_in_cache = False

    def _leave(self, request_id: str) -> None:
        """Notes that a request needs neither an answer of the service nor bytes any longer."""
        ticket = self._tickets.get(request_id)
        if ticket is not None and ticket.asked is not None:
            ticket.asked.cancel()
        if ticket is not None:
            self._give_up_early(ticket)
        if ticket is not None and ticket.parcel is not None:
            self._shelf.leave(request_id, ticket.parcel)
            ticket.parcel = None

    def _give_up_early(self, ticket: _Ticket) -> None:
        if ticket.early is not None:
            self._early.end(ticket.early, is_used=False)
            ticket.early = None

    def forget(self) -> None:
        """Forgets versions and bytes, so that later requests ask and fetch again."""
        self._resolver.forget()
        self._shelf.forget()

    def counted(self) -> dict[str, Any] | None:
        """Returns the counts since the last call; None if there are none."""
        return self._tally.take()

    def close(self) -> None:
        """Ends the thread and the connections."""
        self._background.close(self._resolver.close)


def _bind(request: Any, salt: str) -> None:
    """Hashes a request's blocks under a salt."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()

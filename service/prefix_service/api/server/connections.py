"""Bounds what a peer can do on a connection before, during and after a request, with either parser.

uvicorn's protocols bound neither the time of a head nor that of a reader, and answer malformed requests in plain text.
Here, one timer per connection bounds both, and a refusal is a problem document.
"""

import asyncio
import http
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import structlog
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from prefix_service.api.http.patience import Patience
from prefix_service.api.http.problems import problem
from prefix_service.api.http.responses import DRAIN
from prefix_service.api.server.input_turns import InputTurns
from prefix_service.api.server.lingering import LingeringTransport
from prefix_service.api.server.peers import Peers, peer_name
from prefix_service.catalog.records import Principal
from prefix_service.errors import Overloaded, PrefixServiceError, RequestTimeout

KEEP_ALIVE: Final = 75
"""Seconds that an idle connection stays open.

It is longer than the 60 seconds of proxies (nginx, AWS), so that the side that sends requests is the one that closes.
Workers keep their connections open, too.
"""

_LOOKS: Final = 8
"""How often the timer checks a connection within the shorter of its deadlines, and thus their precision."""

PIECE: Final = 4 << 10
"""Bytes that a parser gets at a time; between two pieces it can stop, and the rest is kept as bytes."""

_TURN: Final = 0.001
"""Seconds of parsing after which other connections get their turn."""

_KEY: Final = re.compile(rb"\r\nauthorization:[ \t]*([^\r\n]*[^\r\n \t])[ \t]*\r\n", re.IGNORECASE)

_UNSENT: Final = 256 << 10
"""Bytes of an answer that the kernel accepts before it can send them.

Bytes in flight do not count, so a fast reader is not slowed down, however far away it is; a reader that does not read
holds no more than this.
"""

Remembered: TypeAlias = Callable[[bytes], Principal | None]
"""Returns the principal of a value of `Authorization` that was verified before and is still valid; else None."""

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("prefix_service")


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds for a head to arrive, and for an answer to be read."""

    receive: float
    send: float


class Guarded(asyncio.Protocol):
    """The behaviour that both parsers' connections share; a mixin in front of one of uvicorn's protocols."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    flow: FlowControl
    cycle: Any  # of the newest request; None before the first
    client: tuple[str, int] | None
    server_state: ServerState
    timeout_keep_alive_task: asyncio.TimerHandle | None
    app_state: dict[str, Any]

    def __init__(
        self,
        deadlines: Deadlines,
        peers: "Peers[Guarded]",
        turns: InputTurns,
        remembered: Remembered,
        **uvicorn: Any,
    ) -> None:
        self._deadlines, self._peers, self._turns, self._remembered = deadlines, peers, turns, remembered
        self._every = min(deadlines.receive, deadlines.send) / _LOOKS
        self._timer: asyncio.TimerHandle | None = None
        self._waited, self._waited_after = 0.0, None
        self._reader = Patience(deadlines.send)
        self._unsent = self._sent = 0
        self._principal: Principal | None = None  # of the newest request with a valid key
        self._caller = ""  # in whose turn input is parsed: the newest request's tenant, or the peer
        self._unparsed: bytes | memoryview = b""
        self._is_waiting = False  # for a turn to be parsed
        self._postponed: PrefixServiceError | None = None
        self._next_waits = False  # for a turn: the parser's next request
        self._is_ending = False  # once what waits for a turn is answered
        super().__init__(**uvicorn)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the timer, and counts the connection; refuses it, or closes another, if there are too many."""
        self._lingering = LingeringTransport(cast("asyncio.Transport", transport), self.loop, self._has_input)
        super().connection_made(cast("asyncio.Transport", self._lingering))
        # An answer keeps its memory until the connection can take more.
        self.app_state = {**self.app_state, DRAIN: self.flow.drain}
        self._timer = self.loop.call_later(self._every, self._look)
        if self.client is not None and sys.platform == "linux":
            self._bound_the_kernel(transport.get_extra_info("socket"))
        self._caller = peer_name(self._peer)
        try:
            victim = self._peers.open(self, self._caller)
        except Overloaded as error:
            self._refuse(error, linger=self._peers.may_read_refusal(self))
        else:
            if victim is not None:
                victim.give_way()

    def _bound_the_kernel(self, connection: socket.socket) -> None:
        """Bounds how much of an answer the kernel keeps, and for how long, even after the connection was closed."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._deadlines.send))

    def give_way(self) -> None:
        """Closes the connection in favour of another one; unread output is dropped."""
        log.info("a connection was closed for another", peer=self._peer, connections=self._peers.most)
        would_reset = self._has_input() and not self._lingering.is_closing()
        if would_reset or self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._lingering.close()

    def _note_whether_idle(self) -> None:
        """Notes whether the connection is idle.

        A connection whose reader has no key and does not keep up counts as idle: nobody waits for its answer.
        """
        self._note_key()
        if self.cycle is None or (
            self._principal is None if self.flow.write_paused else self.cycle.response_complete and not self._next_waits
        ):
            self._peers.idle(self)
        else:
            self._peers.busy(self)

    def _note_key(self) -> None:
        if self.cycle is None:
            return
        if (principal := self.cycle.scope.get("principal")) is not None:
            if principal is not self._principal:
                self._principal, self._caller = principal, _turn_of(principal)
        elif self._principal is None:
            # A probe waits neither behind many new connections, nor behind those that ask before they are answered.
            self._caller = f"{peer_name(self._peer)}, {'ahead' if self._unparsed or self._has_next() else 'again'}"

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers, drops the unparsed input, and drops what refers back to this connection.

        References alone then free its memory. A collection of garbage would stop the event loop, for 60 ms if hundreds
        of connections have ended.
        """
        self._peers.close(self)
        for timer in (self._timer, self.timeout_keep_alive_task):  # uvicorn does not stop its own after a reset
            if timer is not None:
                timer.cancel()
        self._unparsed = b""
        super().connection_lost(exc)
        self._lingering.forget()
        self.cycle = None

    def data_received(self, data: bytes) -> None:
        """Parses the input up to the first request that must wait for its turn; keeps the rest as bytes."""
        if not self.transport.is_closing():
            if self.cycle is None:
                self._note_first_key(data)
            self._unparsed = memoryview(bytes(self._unparsed) + data) if self._unparsed else data
            self._parse_in_turn()

    def _note_first_key(self, data: bytes) -> None:
        """Looks for a known key before anything is parsed, so that a tenant's new connection does not wait behind
        hundreds of another tenant's that come through the same proxy.
        """
        found = _KEY.search(data, 0, PIECE)
        if found is not None and (principal := self._remembered(found[1])) is not None:
            self._caller = _turn_of(principal)

    def _parse_in_turn(self) -> None:
        if self._is_waiting:
            self._lingering.hold(True)  # not for a first small piece: pausing costs more than most waits
        elif not self._unparsed or self._owes_answers() or self._turns.take(self._caller, self._parse_on):
            self._parse_on()
        else:
            self._is_waiting = True
            self._lingering.hold(len(self._unparsed) > PIECE)

    def _parse_on(self) -> None:
        self._is_waiting = False
        until = time.monotonic() + _TURN
        while self._unparsed and not self._owes_answers():
            if self._ignores_input:
                self._unparsed = b""
                break
            if time.monotonic() > until:
                self._is_waiting = True
                self._turns.wait(self._caller, self._parse_on)
                break
            data, size = self._unparsed, self._piece
            if len(data) > size:
                data = memoryview(data)
                self._unparsed = data[size:]
                self._parse(data[:size])
            else:
                self._unparsed = b""
                self._parse(data)
        self._lingering.hold(bool(self._unparsed))
        self._note_whether_idle()
        self._end_if_asked()

    def _parse(self, data: bytes | memoryview) -> None:
        raise NotImplementedError

    @property
    def _piece(self) -> int:
        return PIECE

    def pause_writing(self) -> None:
        """Is called when more than the high-water mark is unsent."""
        self._unsent = self.transport.get_write_buffer_size()
        super().pause_writing()
        self._note_whether_idle()

    def resume_writing(self) -> None:
        """Is called when the unsent bytes have fallen to the low-water mark."""
        self._sent += self._unsent - self.transport.get_write_buffer_size()
        super().resume_writing()
        self._note_whether_idle()

    def on_response_complete(self) -> None:
        """Goes on with the input behind the request that is now answered.

        If the parser has another request already, it begins in the caller's turn: otherwise connections that send
        several requests in one piece would fill each turn of the event loop.
        """
        self._note_key()
        if not self._has_next() or self._turns.take(self._caller, self._go_on):
            self._go_on()
        else:
            self._next_waits = True
            self._note_whether_idle()

    def _go_on(self) -> None:
        self._next_waits = False
        super().on_response_complete()  # type: ignore[misc]
        if self._postponed is not None:
            self._refuse(self._postponed)
        elif self._unparsed:
            self._parse_in_turn()
        self._note_whether_idle()
        self._end_if_asked()

    def _has_next(self) -> bool:
        """Returns whether the parser has more than the requests that are answered."""
        raise NotImplementedError

    @property
    def is_answering(self) -> bool:
        """Whether a caller waits for an answer, for the rest of one, or for its turn. A reader that has no key and does
        not keep up does not count.
        """
        if self.transport.get_write_buffer_size():
            return self._principal is not None
        return self._is_waiting or self._is_in_progress or self._next_waits

    @property
    def _is_in_progress(self) -> bool:
        """Whether the newest request that was parsed is not answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def shutdown(self) -> None:
        """Closes the connection after the answers in progress, or after that of a request that waits for its turn.

        Resets it if its reader has no key and does not keep up.
        """
        if self.transport.get_write_buffer_size() and self._principal is None:
            self.transport.abort()
        elif (self._is_waiting or self._next_waits) and not self._is_in_progress:
            self._is_ending = True
        else:
            super().shutdown()  # type: ignore[misc]

    def _end_if_asked(self) -> None:
        """Closes the connection after the request whose turn it was; immediately if that was no complete request."""
        if self._is_ending and not self.transport.is_closing():
            self.shutdown()

    def _look(self) -> None:
        if self._is_read_too_slowly():
            log.info("a reader was cut off", peer=self._peer, seconds=self._deadlines.send)
            self.transport.abort()
            return
        self._timer = self.loop.call_later(self._every, self._look)
        if self._is_awaited_too_long():
            seconds = self._deadlines.receive
            self._refuse(RequestTimeout(f"no complete head of a request within {seconds:g} seconds: send it again"))

    def _is_read_too_slowly(self) -> bool:
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self._reader.renew()
            return False
        if self.flow.write_paused:
            self._sent += self._unsent - unsent
            self._unsent = unsent
            if self._principal is not None:
                (self._peers.busy if self._sent else self._peers.stalled)(self)
        self._reader.spend(self._every, self._sent)
        self._sent = 0
        return self._reader.left <= 0

    def _is_awaited_too_long(self) -> bool:
        """Returns whether a head, or the rest of a body that was answered early, is late.

        uvicorn closes idle connections.
        """
        cycle = self.cycle
        if (cycle is not None and not cycle.response_complete) or self.timeout_keep_alive_task is not None:
            self._waited = 0
            return False
        if cycle is not self._waited_after:  # requests came and went in the meantime
            self._waited, self._waited_after = 0, cycle
            return False
        self._waited += self._every
        return self._waited >= self._deadlines.receive

    def _refuse(self, error: PrefixServiceError, *, linger: bool = True) -> None:
        if self.transport.is_closing():
            return
        if self._owes_answers():
            self._postponed = error
            self.flow.pause_reading()
            return
        answer = problem(error)
        answer.headers["Connection"] = "close"
        log.info("a connection was refused", peer=self._peer, status=answer.status_code, code=error.code)
        if not linger or not self._may_answer():
            self.transport.abort()
            return
        status = f"HTTP/1.1 {answer.status_code} {http.HTTPStatus(answer.status_code).phrase}\r\n".encode()
        fields = [*self.server_state.default_headers, *answer.raw_headers]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        self.transport.write(status + head + b"\r\n" + bytes(answer.body))
        self._lingering.linger()
        if self.cycle is not None:  # an app that waits for the rest of a body
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    @property
    def _ignores_input(self) -> bool:
        return self._postponed is not None or self.transport.is_closing()

    def _has_input(self) -> bool:
        """Returns whether input is expected or waiting that nobody will read."""
        return self._is_in_body or bool(self._unparsed)

    @property
    def _is_in_body(self) -> bool:
        """Returns whether more of the newest request's body is expected."""
        raise NotImplementedError

    def _owes_answers(self) -> bool:
        """Returns whether earlier requests wait for their answers, or one that is parsed waits for its turn."""
        cycle = self.cycle
        return self._next_waits or (cycle is not None and not cycle.response_complete and not self._is_in_body)

    def _may_answer(self) -> bool:
        """Returns whether a response sent now would be read as the answer to the faulty request, not to an earlier one
        or as part of a body.
        """
        cycle = self.cycle
        if cycle is None or not self._is_in_body:
            return True
        return not cycle.response_complete and not cycle.response_started

    @property
    def _peer(self) -> str | None:
        return self.client[0] if self.client else None


def _turn_of(principal: Principal) -> str:
    return f"tenant {principal.tenant}"

"""Caches planned answers and sends them without a route: the fast path of `GET …/prefix`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_service.api.http.responses import PrefixResponse
from prefix_service.catalog.records import Principal
from prefix_service.library.library import Library
from prefix_service.prefix.references import Reference
from prefix_service.system.shares import Shares

_MOST_BYTES: Final = 64 << 20

_Question = tuple[bytes, bytes, bytes]


@dataclass(frozen=True, slots=True)
class _Answer:
    response: PrefixResponse
    reference: Reference
    route: object

    @property
    def tenant(self) -> str:
        return self.response.version.tenant


class Answers:
    """Answers that the route has given, by everything that they depend on: the raw path, query and `Accept`.

    The caller's key and the version behind the reference are checked each time. The cache is bounded by bytes,
    including those of the questions; a tenant that asks for much displaces its own oldest answers. Whether a caller is
    on the Unix socket is not part of the key: a service listens either there or on TCP.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._known: Shares[_Question, _Answer] = Shares(_MOST_BYTES)

    @property
    def nbytes(self) -> int:
        """An estimate of the memory of all answers, in bytes."""
        return self._known.size

    def nbytes_of(self, tenant: str) -> int:
        """Returns an estimate of the memory of one tenant's answers, in bytes."""
        return self._known.size_of(tenant)

    def remember(self, scope: Scope, reference: Reference, response: PrefixResponse) -> None:
        """Caches the answer that a route is about to send."""
        question = _question(scope)
        nbytes = response.planned_nbytes + response.version.memory + sum(map(len, question))
        self._known.put(response.version.tenant, question, _Answer(response, reference, scope["route"]), nbytes)

    def find(self, scope: Scope) -> _Answer | None:
        """Returns the cached answer to a request.

        Returns None if there is none, it is outdated, or the caller may not see it.
        """
        if scope["method"] not in ("GET", "HEAD"):
            return None
        answer = self._known.get(_question(scope))
        if answer is None or not self._library.is_current(answer.response.version, answer.reference):
            return None
        principal: Principal = scope["principal"]
        return answer if principal.may_see(answer.tenant) else None


def _question(scope: Scope) -> _Question:
    accept = b",".join([value for name, value in scope["headers"] if name == b"accept"])
    return scope["raw_path"], scope["query_string"], accept


class AnswersMiddleware:
    """Sends cached answers to authenticated callers. With `is_unlimited`, only for tenants without a rate limit."""

    def __init__(
        self, app: ASGIApp, answers: Callable[[], Answers], is_unlimited: Callable[[str], bool] | None = None
    ) -> None:
        self._app = app
        self._answers = answers
        self._is_unlimited = is_unlimited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the cached answer, or passes the request on."""
        answer = self._answers().find(scope) if "principal" in scope else None
        if answer is None or not self._is_allowed(scope["principal"], answer.tenant):
            await self._app(scope, receive, send)
        else:
            scope["tenant"], scope["route"] = answer.tenant, answer.route
            await answer.response(scope, receive, send)

    def _is_allowed(self, caller: Principal, tenant: str) -> bool:
        return self._is_unlimited is None or self._is_unlimited(caller.tenant or tenant)

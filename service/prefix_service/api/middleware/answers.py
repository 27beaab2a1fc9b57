"""Caches planned answers and sends them without a route: the fast path of `GET …/prefix`."""

from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

from prefix_service.api.http.responses import PrefixResponse
from prefix_service.catalog.records import Principal
from prefix_service.library.library import Library
from prefix_service.prefix.references import Reference
from prefix_service.system.shares import Shares

_MOST_BYTES: Final = 128 << 20

_Question = tuple[bytes, bytes, bytes]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response that a route made, the reference it was asked for, and the route."""

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
        self._known: Shares[_Question, Answer] = Shares(_MOST_BYTES)

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
        self._known.put(response.version.tenant, question, Answer(response, reference, scope["route"]), nbytes)

    def find(self, scope: Scope) -> Answer | None:
        """Returns the cached answer to a request.

        Returns None if there is none, it is outdated, or the caller may not see it.
        """
        principal: Principal | None = scope.get("principal")
        if principal is None or scope["method"] not in ("GET", "HEAD"):
            return None
        answer = self._known.get(_question(scope))
        if answer is None or not self._library.is_current(answer.response.version, answer.reference):
            return None
        return answer if principal.may_see(answer.tenant) else None


def _question(scope: Scope) -> _Question:
    accept = b",".join([value for name, value in scope["headers"] if name == b"accept"])
    return scope["raw_path"], scope["query_string"], accept

"""Counts the statements that a PostgreSQL server is sent."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.postgresql import PostgreSQL
from tests.processes import eventually

_BEGINS: Final = re.compile(rb"LOG:  (?:statement|execute [^:]*): (.*)")
_MARK: Final = "SELECT 'statements are counted from here, or until here'"


@contextmanager
def counted(server: PostgreSQL) -> Iterator[Counter[str]]:
    """Yields a counter that has the statements of all sessions, each by its first words, once the block has ended."""
    found: Counter[str] = Counter()
    server.execute("ALTER SYSTEM SET log_statement = 'all'")
    server.execute("SELECT pg_reload_conf()")
    begin = _marked(server, server.log.stat().st_size)
    try:
        yield found
    finally:
        end = _marked(server, begin)
        server.execute("ALTER SYSTEM RESET log_statement")
        server.execute("SELECT pg_reload_conf()")
    with server.log.open("rb") as log:
        log.seek(begin)
        lines = log.read(end - begin).splitlines()
    for line in lines:
        if (statement := _BEGINS.search(line)) is not None and _MARK.encode() not in line:
            found[" ".join(statement[1].decode(errors="replace").split()[:6])] += 1


def _marked(server: PostgreSQL, after: int) -> int:
    """Returns the end of the log once a statement that this sends is in it, behind a position."""

    def logged() -> int:
        server.execute(_MARK)
        with server.log.open("rb") as log:
            log.seek(after)
            return log.seek(0, 2) if _MARK.encode() in log.read() else 0

    return eventually(logged)

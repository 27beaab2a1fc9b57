"""Connections to PostgreSQL that never wait for ever. The one module that imports psycopg, which is an extra."""

from typing import Any, Final, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg import errors
from psycopg.abc import PQGen
from sqlalchemy import event

T = TypeVar("T")

_CONNECT: Final = 2  # seconds; libpq takes no less
_SILENT: Final = 5.0  # seconds in which a client that is alive sends the next statement of its transaction
_MARGIN: Final = 0.5  # seconds beyond the server's own deadline


class NoAnswer(psycopg.OperationalError):
    """The server has not answered in time: it is stopped, or the connection is half-open."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed if the server does not answer within `deadline` seconds.

    The server's `statement_timeout` does not help against a server that is stopped, TCP keepalives neither, because its
    kernel goes on to acknowledge, and libpq has no deadline for reads.
    """

    deadline: float | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Waits for the server, as psycopg does for every statement, at most until the deadline.

        Raises:
            NoAnswer: the deadline has passed.
        """
        if timeout is not None:  # of who waits for notifications, without waking up in between
            return super().wait(gen, max(interval, timeout), timeout)
        if self.deadline is None:
            return super().wait(gen, interval)
        try:
            return super().wait(gen, interval, self.deadline)
        except errors._WaitTimeout as error:  # it has no public name: pyproject.toml bounds psycopg
            self.pgconn.finish()
            raise NoAnswer(f"no answer within {self.deadline:g} seconds") from error


def engine(url: str, *, statements: float, locks: float, **options: Any) -> sa.Engine:
    """Returns an engine whose statements have `statements` seconds, of which they wait at most `locks` for locks."""
    bounds = f"-c statement_timeout={int(1000 * statements)} -c lock_timeout={int(1000 * locks)}"
    # A replica that is stopped, or whose connection is half-open, holds a lock that all others wait for.
    idle = f"-c idle_in_transaction_session_timeout={int(1000 * max(_SILENT, 2 * statements))}"
    arguments = {"options": f"-c timezone=utc {bounds} {idle}", "connect_timeout": _CONNECT}
    made = sa.create_engine(url, connect_args=arguments, **options)

    def connect(_dialect: Any, _record: Any, positional: list[Any], named: dict[str, Any]) -> psycopg.Connection[Any]:
        connection = BoundedConnection.connect(*positional, **named)
        connection.deadline = statements + _MARGIN
        return connection

    event.listen(made, "do_connect", connect)
    return made


def unbounded(connection: sa.Connection) -> None:
    """Lifts all deadlines of a connection until its transaction ends, and that of its answers for good."""
    driver = connection.connection.driver_connection
    if isinstance(driver, BoundedConnection):
        driver.deadline = None
    connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
    connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")


def received(connection: sa.Connection, seconds: float) -> bool:
    """Waits for a notification for up to `seconds`; returns whether there was one.

    Raises:
        psycopg.Error: the connection was lost.
    """
    driver: Any = connection.connection.driver_connection
    return any(True for _ in driver.notifies(timeout=seconds, stop_after=1))

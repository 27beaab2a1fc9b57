"""The replicas that serve a catalog: each of their processes writes a row every few seconds. Blocking."""

import secrets
from datetime import timedelta
from typing import Final

import sqlalchemy as sa

from prefix_service.catalog.database import Database, insert, now
from prefix_service.catalog.records import Replica, Serving
from prefix_service.catalog.schema import replicas

_LIVING: Final = timedelta(seconds=15)
_FORGOTTEN: Final = timedelta(minutes=5)


class Replicas:
    """The rows of all processes, of which one is this process's.

    `replica` is the id that the processes of one replica share.
    """

    def __init__(self, database: Database, replica: str) -> None:
        self._database, self.replica = database, replica
        self._process = secrets.token_hex(8)

    def beat(self, serving: Serving) -> int:
        """Writes this process's row, and removes those of processes that are long gone; returns the number of replicas
        that live.

        Raises:
            OutOfSpace, StorageFailed: the database refused.
        """
        values = {name: getattr(serving, name) for name in Serving.__dataclass_fields__}
        with self._database.writing() as connection:
            moment = now(connection)
            own = {"process": self._process, "replica": self.replica, "started": moment}
            statement = insert(connection, replicas).values(**own, seen=moment, **values)
            again = {"seen": moment, **values}
            connection.execute(statement.on_conflict_do_update(index_elements=["process"], set_=again))
            gone = sa.select(replicas.c.process).where(replicas.c.seen < moment - _FORGOTTEN)
            gone = gone.with_for_update(skip_locked=True)  # others remove them, too
            connection.execute(sa.delete(replicas).where(replicas.c.process.in_(gone)))
            living = sa.select(sa.func.count(replicas.c.replica.distinct())).where(replicas.c.seen > moment - _LIVING)
            return connection.scalar(living) or 1

    def leave(self) -> None:
        """Removes this process's row.

        Raises:
            OutOfSpace, StorageFailed: the database refused.
        """
        with self._database.writing() as connection:
            connection.execute(sa.delete(replicas).where(replicas.c.process == self._process))

    def listed(self) -> list[Replica]:
        """Returns the replicas that live, in the order of their starts.

        Raises:
            StorageFailed: the database refused.
        """
        row = replicas.c
        total = (sa.cast(sa.func.sum(of), sa.BigInteger) for of in (row.adapters, row.device_bytes, row.host_bytes))
        serving = sa.func.min(row.address), sa.func.min(row.release), sa.func.min(row.revision), *total
        started = sa.func.min(row.started)
        with self._database.reading() as connection:
            query = sa.select(row.replica, started, sa.func.max(row.seen), *serving)
            query = query.where(row.seen > now(connection) - _LIVING).group_by(row.replica)
            found = connection.execute(query.order_by(started, row.replica)).all()
        return [Replica(row[0], row[1], row[2], Serving(*row[3:])) for row in found]

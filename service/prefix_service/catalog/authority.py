"""Proves in the transaction of a change that its caller may make it, by ids, since names can be given again."""

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa

from prefix_service.catalog.database import Database, now
from prefix_service.catalog.records import Principal
from prefix_service.catalog.schema import keys, sessions, tenants
from prefix_service.errors import NotFound, Unauthenticated


@contextlib.contextmanager
def writing_for(database: Database, by: Principal, *, frees: bool = False) -> Iterator[sa.Connection]:
    """Open a write transaction for `by`, which may free space as `Database.writing` says. Until it ends, nobody can
    revoke the key, end the session, or delete the tenant acted on.

    Raises:
        Unauthenticated: the key was revoked or has expired since its request began, or its session was ended.
        NotFound: the tenant that the request named has been deleted since.
        InvalidRequest, OutOfSpace, StorageFailed: as `Database.writing`.
    """
    with database.writing(by, frees=frees) as connection:
        _prove(connection, by, held=True)
        yield connection


def prove(database: Database, by: Principal) -> None:
    """Check that a change which `by` asks for would not be refused now: early, before work that a refusal would waste.

    Raises:
        Unauthenticated, NotFound: as `writing_for`.
        StorageFailed: the database refused.
    """
    with database.reading() as connection:
        prove_in(connection, by)


def prove_in(connection: sa.Connection, by: Principal) -> None:
    """Check it in a transaction that reads.

    Raises:
        Unauthenticated, NotFound: as `writing_for`.
    """
    _prove(connection, by, held=False)


def _prove(connection: sa.Connection, by: Principal, *, held: bool) -> None:
    # The tenant's row first, as whoever changes its things locks it: PostgreSQL's writers cannot deadlock then.
    present = sa.and_(tenants.c.id == by.acts_on, sa.not_(tenants.c.deleted))
    exists = by.acts_on is None or _found(connection, sa.select(tenants.c.id).where(present), held)
    if by.has_key:
        alive = sa.or_(keys.c.expires.is_(None), keys.c.expires > now(connection))
        same = (keys.c.id == by.key_id, keys.c.tenant_id == by.tenant_id, keys.c.scope == by.scope)
        if not _found(connection, sa.select(keys.c.id).where(*same, alive), held, key_share=True):
            raise Unauthenticated("the key has expired or was revoked while the request was under way")
    if by.session is not None:
        begun = sa.select(sessions.c.hash).where(sessions.c.hash == by.session, sessions.c.key_id == by.key_id)
        if not _found(connection, begun, held, key_share=True):
            raise Unauthenticated("the session was ended while the request was under way: sign in again")
    if not exists:
        raise NotFound("the tenant was deleted while the request was under way")


def _found(connection: sa.Connection, query: sa.Select[tuple[object]], held: bool, *, key_share: bool = False) -> bool:
    # FOR KEY SHARE: many writers hold one key, only a deletion must wait. SQLite has no row locks and needs none.
    locked = query.with_for_update(read=key_share, key_share=key_share) if held else query
    return connection.execute(locked).one_or_none() is not None

"""Databases on a test server: fresh ones, most of them copied from a migrated template."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psycopg
from psycopg.sql import SQL, Identifier

from tests.servers import Postgres


@dataclass(frozen=True)
class Database:
    """One database of a test server, as the superuser sees it."""

    server: Postgres
    name: str

    @property
    def url(self) -> str:
        """The URL for SQLAlchemy and the settings: ``postgresql+psycopg://…``."""
        return self.server.url(self.name)

    @property
    def dsn(self) -> str:
        """The URL for libpq, psql and psycopg: ``postgresql://…``."""
        return self.server.dsn(self.name)

    def connect(self, *, autocommit: bool = True) -> psycopg.Connection:
        """A new connection, to be closed by the caller."""
        return psycopg.connect(self.dsn, autocommit=autocommit)


@contextmanager
def fresh_database(server: Postgres, *, template: Database | None = None) -> Iterator[Database]:
    """A new database for the length of the block, empty or a copy of another database.

    At the end it is dropped, and open sessions are ended. No session may be connected to
    ``template`` while it is copied.
    """
    database = Database(server, f"test_{secrets.token_hex(6)}")
    source = template.name if template else "template0"
    _administer(
        server,
        SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(database.name), Identifier(source)),
    )
    try:
        yield database
    finally:
        _administer(server, SQL("DROP DATABASE {} (FORCE)").format(Identifier(database.name)))


def templates(
    stack: ExitStack,
    prepare: Callable[[Database], None],
    source: Callable[[Postgres], Database] | None = None,
) -> Callable[[Postgres], Database]:
    """Gives one prepared database of each server, made when it is first needed, to be copied.

    Args:
        stack: At its end the databases go.
        prepare: Fills a database, and leaves no connection to it.
        source: Gives the database that this one is a copy of; by default it is empty.
    """
    made: dict[int, Database] = {}

    def template(server: Postgres) -> Database:
        if id(server) not in made:
            of = source(server) if source else None
            database = stack.enter_context(fresh_database(server, template=of))
            prepare(database)
            made[id(server)] = database
        return made[id(server)]

    return template


def _administer(server: Postgres, statement: psycopg.sql.Composed) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(statement)

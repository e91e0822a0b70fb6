"""Locks by rows of a table that only our roles may write.

Advisory locks have no owner: every login of the server can take them. A row can be locked only by a
role that may update it. Two kinds:

- ``lock``: the row is locked until the transaction ends, like any row
- ``held``: the row names the session that has the lock, for as long as that session keeps a
  transaction open. A row lock would do the same, but it gives its transaction an id, and the oldest
  id holds back VACUUM in the whole database. The transaction here has no id and no snapshot. It
  ends with its session, so no process waits for the lease of a killed one.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    Table,
    Text,
    text,
)

from pipeline.db import LOG_SCHEMA, metadata, translated
from pipeline.errors import ExitCode, PipelineError

locks = Table(
    "locks",
    metadata,
    Column("name", Text, primary_key=True, comment="What is locked."),
    Column("session_pid", Integer, comment="Process id of the session that has it."),
    Column(
        "virtual_transaction",
        Text,
        comment="That session's transaction; the lock is free when pg_locks no longer shows it.",
    ),
    Column(
        "server_started_at",
        DateTime(timezone=True),
        comment="Start of the server that the session belongs to.",
    ),
    Column("role", Text, comment="Login of the session."),
    Column("application", Text, comment="What the session calls itself."),
    Column("host", Text, comment="Where its process runs."),
    Column("process_id", Integer, comment="Id of that process on its host."),
    Column("since", DateTime(timezone=True), comment="When the session took it."),
    schema=LOG_SCHEMA,
    comment="Locks of the program. Rows stay when a lock is free; the table may be emptied while "
    "no command runs.",
    postgresql_with={"fillfactor": "50"},
)

HAS_TABLE = text("SELECT to_regclass('pipeline.locks') IS NOT NULL")
LOCK = text("""
INSERT INTO pipeline.locks (name) VALUES (:name)
ON CONFLICT (name) DO UPDATE SET name = excluded.name
""")
# The server would end a session that is idle in a transaction; this one must be.
STAY = text("SET LOCAL idle_in_transaction_session_timeout = 0")
WHO_AM_I = text("""
SELECT pid, virtualtransaction FROM pg_locks
WHERE pid = pg_backend_pid() AND locktype = 'virtualxid' AND granted
""")
TAKE = text("""
INSERT INTO pipeline.locks AS l (name, session_pid, virtual_transaction, server_started_at, role,
                                 application, host, process_id, since)
VALUES (:name, :session_pid, :virtual_transaction, pg_postmaster_start_time(), session_user,
        current_setting('application_name'), :host, :process_id, now())
ON CONFLICT (name) DO UPDATE
SET session_pid = excluded.session_pid, virtual_transaction = excluded.virtual_transaction,
    server_started_at = excluded.server_started_at, role = excluded.role,
    application = excluded.application, host = excluded.host, process_id = excluded.process_id,
    since = excluded.since
WHERE l.server_started_at IS DISTINCT FROM pg_postmaster_start_time() OR NOT EXISTS (
    SELECT FROM pg_locks k WHERE k.locktype = 'virtualxid' AND k.granted
       AND k.pid = l.session_pid AND k.virtualxid = l.virtual_transaction)
RETURNING l.name
""")
# Shared until the transaction ends, so that no other session can take it meanwhile.
CONFIRM = text("""
SELECT FROM pipeline.locks
WHERE name = :name AND session_pid = :session_pid AND virtual_transaction = :virtual_transaction
  AND server_started_at = pg_postmaster_start_time()
FOR SHARE
""")
HOLDER = text("""
SELECT l.session_pid, l.role, l.application, l.host, l.process_id, l.since
FROM pipeline.locks l
JOIN pg_locks k ON k.locktype = 'virtualxid' AND k.granted
               AND k.pid = l.session_pid AND k.virtualxid = l.virtual_transaction
WHERE l.name = :name AND l.server_started_at = pg_postmaster_start_time()
""")


@dataclass(frozen=True)
class Holder:
    """The session that has a lock, according to its row."""

    session_pid: int
    role: str
    application: str
    host: str
    process_id: int
    since: datetime

    def __str__(self) -> str:
        return (
            f"{self.application!r}, process {self.process_id} on host {self.host}, has it since "
            f"{self.since:%Y-%m-%d %H:%M:%S} UTC (PostgreSQL session {self.session_pid}, role "
            f"{self.role})"
        )


class LockTakenError(PipelineError):
    """Another session has the lock. Nothing was done.

    Attributes:
        holder: Which; None if it has ended by now.
    """

    exit_code = ExitCode.FENCED

    def __init__(self, name: str, holder: Holder | None) -> None:
        super().__init__(f"lock {name!r}: {holder or 'another session had it'}")
        self.holder = holder


@dataclass(frozen=True)
class Held:
    """A lock of ours."""

    name: str
    session_pid: int
    virtual_transaction: str

    def confirm(self, db: Connection) -> None:
        """Verify that the lock is ours, and stays ours until the transaction ends.

        Raises:
            LockTakenError: The session that held it was ended, and another one took it.
        """
        if db.execute(CONFIRM, vars(self)).one_or_none() is None:
            raise LockTakenError(self.name, _holder(db, self.name))


def has_table(db: Connection) -> bool:
    """Whether the table of locks exists."""
    return bool(db.execute(HAS_TABLE).scalar_one())


def make_table(db: Connection) -> None:
    """Create the table before the migration that creates it: `migrate` itself needs a lock."""
    locks.create(db, checkfirst=True)


def lock(db: Connection, name: str) -> None:
    """Lock a name until the transaction ends; waits for another session that has it."""
    db.execute(LOCK, {"name": name})


@contextmanager
def held(
    engine: Engine, name: str, *, become: Callable[[Connection], None] = lambda _: None
) -> Iterator[Held]:
    """Hold the lock of a name until the block ends, over any number of transactions.

    It needs one connection of the engine. If the connection is lost, so is the lock: a caller that
    writes under the lock calls ``confirm`` in the same transaction.

    Args:
        engine: The database.
        name: What to lock.
        become: Called with the connection that takes the lock, to choose another role.

    Raises:
        LockTakenError: Another session has it.
        TransientError: The server is unavailable.
    """
    with translated():
        keeper = engine.connect()
    try:
        with translated():
            keeper.execute(STAY)
            ours = Held(name, *keeper.execute(WHO_AM_I).one())
        with translated(), engine.begin() as db:
            become(db)
            # Read first: the row may be locked, by the holder that confirms its lock.
            if holder := _holder(db, name):
                raise LockTakenError(name, holder)
            place = {"host": socket.gethostname(), "process_id": os.getpid()}
            if db.execute(TAKE, {**vars(ours), **place}).one_or_none() is None:
                raise LockTakenError(name, _holder(db, name))
        yield ours
    finally:
        with suppress(PipelineError), translated():
            keeper.rollback()
        keeper.close()


def _holder(db: Connection, name: str) -> Holder | None:
    row = db.execute(HOLDER, {"name": name}).one_or_none()
    return Holder(*row) if row else None

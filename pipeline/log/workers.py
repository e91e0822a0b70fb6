"""Which members of the consumer group write to this very database.

A copy of a database has all rows of the original, its identity and its workers included. But it
cannot have both the start time of the original's server and the database's oid there: a dump, a
copy from a template, a base backup, a promoted standby and a snapshot each differ in one of the
two. So each worker registers with both, as the database itself reports them.
"""

import os
import socket
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Integer,
    Interval,
    Row,
    Table,
    Text,
    bindparam,
    delete,
    func,
    select,
    text,
)

from pipeline.db import LOG_SCHEMA, metadata

KEPT = timedelta(days=1)
"""How long the row of a worker that ended is kept."""

Time = DateTime(timezone=True)

ingest_workers = Table(
    "ingest_workers",
    metadata,
    Column("member", Text, primary_key=True, comment="Kafka's id of the group's member."),
    Column("host", Text, nullable=False, comment="Where the process runs."),
    Column("pid", Integer, nullable=False, comment="Its process id there."),
    Column("since", Time, nullable=False, server_default=func.now(), comment="When it registered."),
    Column(
        "seen_at",
        Time,
        nullable=False,
        server_default=func.now(),
        comment="When it last registered again; it does so every minute.",
    ),
    Column(
        "system_identifier",
        BigInteger,
        nullable=False,
        comment="The server's cluster, as pg_control_system() has it.",
    ),
    Column(
        "timeline",
        Integer,
        nullable=False,
        comment="The server's timeline; a promotion begins a new one.",
    ),
    Column(
        "database_oid",
        BigInteger,
        nullable=False,
        comment="The database's oid in that cluster.",
    ),
    Column(
        "server_started_at",
        Time,
        nullable=False,
        comment="When the server was started. No two running copies have the same.",
    ),
    Column("server", Text, nullable=False, comment="Database, address and port, for people."),
    schema=LOG_SCHEMA,
    comment="Members of the consumer group that write to this database, and the server that "
    "each wrote to. A member that is not here writes to another database.",
    postgresql_with={"fillfactor": "50"},
)

SERVER = text("""
SELECT (SELECT system_identifier FROM pg_control_system()) AS system_identifier,
       (SELECT timeline_id FROM pg_control_checkpoint()) AS timeline,
       (SELECT oid::bigint FROM pg_database WHERE datname = current_database()) AS database_oid,
       pg_postmaster_start_time() AS server_started_at,
       current_database() || ' on '
         || coalesce(host(inet_server_addr()) || ':' || inet_server_port(),
                     'port ' || current_setting('port') || ' of its host') AS server
""")
# Written at most once per minute while nothing changes, so an idle worker writes next to nothing.
REGISTER = text("""
INSERT INTO pipeline.ingest_workers AS known
       (member, host, pid, system_identifier, timeline, database_oid, server_started_at, server)
VALUES (:member, :host, :pid,
        :system_identifier, :timeline, :database_oid, :server_started_at, :server)
ON CONFLICT (member) DO UPDATE
   SET seen_at = now(), system_identifier = excluded.system_identifier,
       timeline = excluded.timeline, database_oid = excluded.database_oid,
       server_started_at = excluded.server_started_at, server = excluded.server
 WHERE known.seen_at < now() - interval '1 minute'
    OR known.server_started_at <> excluded.server_started_at
    OR known.database_oid <> excluded.database_oid
""")
REGISTERED = select(ingest_workers.c.member).where(
    ingest_workers.c.server_started_at == bindparam("started"),
    ingest_workers.c.database_oid == bindparam("oid"),
)
NEWEST = select(ingest_workers).order_by(ingest_workers.c.seen_at.desc()).limit(1)
BY_MEMBER = select(ingest_workers).where(ingest_workers.c.member == bindparam("of_member"))
FORGET = delete(ingest_workers).where(
    ingest_workers.c.seen_at < func.now() - bindparam("kept", type_=Interval)
)


class Server(NamedTuple):
    """The running server, and the database on it.

    Attributes:
        system_identifier, timeline, database_oid: As PostgreSQL has them.
        server_started_at: With the oid, it names a running database and no copy of it.
        server: Database, address and port, for people.
    """

    system_identifier: int
    timeline: int
    database_oid: int
    server_started_at: datetime
    server: str

    @property
    def running(self) -> tuple[datetime, int]:
        """Differs between any two running databases, and after each start of the server."""
        return self.server_started_at, self.database_oid

    @property
    def location(self) -> tuple[int, int, int]:
        """Stays the same when the server is restarted."""
        return self.system_identifier, self.timeline, self.database_oid

    def __str__(self) -> str:
        """For people."""
        return f"{self.server} (system {self.system_identifier}, timeline {self.timeline})"


class Worker(NamedTuple):
    """A worker as it registered; in a copy, the original's workers too."""

    member: str
    host: str
    pid: int
    since: datetime
    seen_at: datetime
    server: Server


def here(db: Connection) -> Server:
    """The server that this connection leads to."""
    return Server(*db.execute(SERVER).one())


def register(db: Connection, member: str, at: Server) -> None:
    """Record that a member of the group, this process, writes to this database."""
    db.execute(
        REGISTER,
        {"member": member, "host": socket.gethostname(), "pid": os.getpid(), **at._asdict()},
    )


def registered(db: Connection, at: Server) -> frozenset[str]:
    """The members that have written to this database since its server was started."""
    started, oid = at.running
    return frozenset(db.execute(REGISTERED, {"started": started, "oid": oid}).scalars())


def newest(db: Connection) -> Worker | None:
    """The worker that registered last; None if none ever did."""
    row = db.execute(NEWEST).one_or_none()
    return _worker(row) if row else None


def find(db: Connection, member: str) -> Worker | None:
    """A member that has registered, here or in the database that this one is a copy of."""
    row = db.execute(BY_MEMBER, {"of_member": member}).one_or_none()
    return _worker(row) if row else None


def forget(db: Connection) -> None:
    """Remove the rows of workers that ended long ago."""
    db.execute(FORGET, {"kept": KEPT})


def _worker(row: Row[Any]) -> Worker:
    return Worker(
        row.member,
        row.host,
        row.pid,
        row.since,
        row.seen_at,
        Server(
            row.system_identifier,
            row.timeline,
            row.database_oid,
            row.server_started_at,
            row.server,
        ),
    )

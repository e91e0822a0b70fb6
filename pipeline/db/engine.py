"""PostgreSQL: the engine, and one transaction at a time.

Driver exceptions stop here: ``translated`` turns them into the program's own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from math import ceil
from typing import Any

import psycopg
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Engine, MetaData, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from pipeline.db import session, stored_times
from pipeline.db.address import Address
from pipeline.db.blockers import who_blocks
from pipeline.db.connection import WatchedConnection
from pipeline.db.postgres_errors import translate
from pipeline.errors import PipelineError

LOG_SCHEMA = "pipeline"
READ_SCHEMA = "upvest"
PERSONAL_SCHEMA = "upvest_personal"
SHADOW_SCHEMA = "pipeline_shadow"

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)
"""Every table that the program declares; migrations and this agree, which a test proves."""


class SessionLimits(BaseModel):
    """How long a session of ours may make others wait.

    Attributes:
        idle_in_transaction: After this long without a statement inside a transaction the server
            ends the session; so a stopped process cannot keep a partition's row locked.
        lock_wait: Longest wait for any lock.
        answer: In addition, longest wait for the answer to a statement while the server lives; None
            for no limit.
    """

    model_config = ConfigDict(frozen=True)

    idle_in_transaction: timedelta = timedelta(seconds=10)
    lock_wait: timedelta = timedelta(seconds=10)
    answer: timedelta | None = None


def open_engine(
    url: str,
    *,
    application: str,
    limits: SessionLimits | None = None,
    pool_size: int = 4,
    read_only: bool = False,
    fresh_url: Callable[[], str] | None = None,
) -> Engine:
    """An engine whose sessions have our settings, and end on the server when this process is gone.

    Nothing is connected yet. Half-open connections end after about 30 seconds on both sides
    (keepalive and ``tcp_user_timeout``), instead of the two hours of an ordinary socket. A server
    that hangs is given up after 15 seconds, whatever the statement.

    Args:
        url: ``postgresql://…`` as libpq takes it; it may hold a password, so it is never shown.
        application: Shown as ``application_name``, e.g. ``pipeline ingest``.
        limits: How long a session may make others wait.
        pool_size: Most connections open at a time.
        read_only: A standby is enough, and nothing can be written; else only a primary.
        fresh_url: Reads the URL again. After a refused login, a URL that has changed is used from
            then on: passwords change while we run.
    """
    limits = limits or SessionLimits()
    ours = session.Ours(
        idle_in_transaction_ms=_milliseconds(limits.idle_in_transaction),
        lock_wait_ms=_milliseconds(limits.lock_wait),
        read_only=read_only,
    )
    fixed = {
        "application_name": application,
        "client_encoding": "UTF8",
        "target_session_attrs": "any" if read_only else "primary",
    }
    address = Address(url, fixed, fresh_url)
    engine = create_engine(
        "postgresql+psycopg://", pool_size=pool_size, max_overflow=0, hide_parameters=True
    )

    @event.listens_for(engine, "do_connect")
    def connect(
        _dialect: object, _record: object, _arguments: list[Any], options: dict[str, Any]
    ) -> WatchedConnection:
        connection = address.connect(options)
        connection.where = address.where
        connection.answer_s_max = session.PROBE_S_MAX
        try:
            probe = partial(_probe, connection, address.parameters)
            begun = session.begin(connection, ours, probe)
        except BaseException:
            connection.close()
            raise
        if begun.acts_as:
            connection.where += f", which acts as role {begun.acts_as} (ALTER ROLE … SET role)"
        connection.answer_s_max = None
        connection.who_blocks = partial(_who_blocks, probe, ours, begun.pid)
        stored_times.register(connection)
        if limits.answer is not None:
            connection.answer_s_max = (limits.lock_wait + limits.answer).total_seconds()
        return connection

    return engine


def _probe(first: WatchedConnection, parameters: Mapping[str, Any]) -> WatchedConnection:
    """A second connection to the server that the first one has reached, within a short time."""
    info = first.info
    parameters_of_probe: dict[str, Any] = {
        "host": info.host,
        "port": info.port,
        "connect_timeout": ceil(session.PROBE_S_MAX),
    }
    if info.hostaddr and not info.host.startswith("/"):
        parameters_of_probe["hostaddr"] = info.hostaddr
    probe = WatchedConnection.connect(
        **{**parameters, **parameters_of_probe, "application_name": "pipeline probe"}
    )
    probe.answer_s_max = session.PROBE_S_MAX
    return probe


def _who_blocks(
    another: Callable[[], WatchedConnection], ours: session.Ours, waiting_pid: int
) -> str | None:
    """The lock that a session waits for, as another session sees it; None if not known."""
    try:
        with closing(another()) as asking:
            session.begin(asking, ours)
            return who_blocks(asking, waiting_pid)
    except (psycopg.Error, OSError, PipelineError):
        return None


def _milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)


# ------------------------------------------------------------------------------------- transactions


ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
READ_ONLY = text("SET TRANSACTION READ ONLY")


@contextmanager
def transaction(engine: Engine, *, one_snapshot: bool = False) -> Iterator[Connection]:
    """All or nothing: commits at the end of the block, rolls back when it raises.

    Args:
        engine: The database.
        one_snapshot: Every statement of the block sees what the first one sees, and may only read.

    Raises:
        TransientError: The server became unavailable, or ended the transaction to resolve a
            conflict. At COMMIT it is then unknown whether the transaction took effect.
        PoisonRecordError: A value was refused.
        MissingSegmentError: No segment of the log covers an offset.
        ConfigurationError: Login, rights or schema are wrong.
        InvariantError: Anything else, a unique violation among them.
    """
    with translated(), engine.begin() as db:
        if one_snapshot:
            use_one_snapshot(db)
            db.execute(READ_ONLY)
        yield db


def use_one_snapshot(db: Connection) -> None:
    """Have every statement of the transaction see what the first one sees; call it before that."""
    db.execute(ONE_SNAPSHOT)


def descriptor(db: Connection) -> int:
    """The file descriptor of a connection's socket, for the fail points that cut it."""
    return int(db.connection.driver_connection.fileno())  # type: ignore[union-attr]  # psycopg's


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's exceptions into ours."""
    try:
        yield
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise translate(error.orig) from None
        raise
    except psycopg.Error as error:
        raise translate(error) from None

"""PostgreSQL: the engine, one transaction at a time, and its errors in our words.

Driver exceptions stop here. PostgreSQL's messages, DETAIL and CONTEXT may quote the row that was
refused, so none of them goes on: an error names the condition and the SQLSTATE only.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psycopg
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Engine, MetaData, create_engine
from sqlalchemy.exc import DBAPIError

from pipeline.errors import (
    ConfigurationError,
    InvariantError,
    MissingSegmentError,
    PipelineError,
    TransientError,
    from_sqlstate,
)

LOG_SCHEMA = "pipeline"
READ_SCHEMA = "upvest"

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
    """How long a session of ours may hold up others.

    Attributes:
        idle_in_transaction: After this long without a statement inside a transaction the server
            ends the session; so a stopped process cannot keep a partition's row locked.
        lock_wait: Longest wait for any lock.
    """

    model_config = ConfigDict(frozen=True)

    idle_in_transaction: timedelta = timedelta(seconds=10)
    lock_wait: timedelta = timedelta(seconds=10)


def open_engine(
    url: str, *, application: str, limits: SessionLimits | None = None, pool_size: int = 4
) -> Engine:
    """An engine whose sessions read times as UTC and are given up by the server when we vanish.

    Nothing is connected yet. Half-open connections end after about 30 seconds on both sides
    (keepalive and ``tcp_user_timeout``), instead of the two hours of an ordinary socket.

    Args:
        url: ``postgresql+psycopg://…``; it may hold a password, so it is never shown.
        application: Shown as ``application_name``, e.g. ``pipeline ingest``.
        limits: How long a session may hold up others.
        pool_size: Most connections open at a time.
    """
    limits = limits or SessionLimits()
    pinned = {
        "timezone": "UTC",
        "datestyle": "ISO,YMD",
        "idle_in_transaction_session_timeout": _milliseconds(limits.idle_in_transaction),
        "lock_timeout": _milliseconds(limits.lock_wait),
        "tcp_keepalives_idle": 10,
        "tcp_keepalives_interval": 5,
        "tcp_keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        hide_parameters=True,
        connect_args={
            "application_name": application,
            "connect_timeout": 10,
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "target_session_attrs": "read-write",
            "options": " ".join(f"-c {name}={value}" for name, value in pinned.items()),
        },
    )


def _milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """All or nothing: commits at the end of the block, rolls back when it raises.

    Raises:
        TransientError: The server went away or ended the transaction to resolve a conflict. If it
            happened at COMMIT, whether the transaction took effect is unknown.
        PoisonRecordError: A value was refused.
        MissingSegmentError: No segment of the log covers an offset.
        ConfigurationError: Login, rights or schema are wrong.
        InvariantError: Anything else, a unique violation among them.
    """
    with translated(), engine.begin() as db:
        yield db


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's exceptions into ours."""
    try:
        yield
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise _translate(error.orig) from None
        raise
    except psycopg.Error as error:
        raise _translate(error) from None


def _translate(error: psycopg.Error) -> PipelineError:
    sqlstate = error.sqlstate
    if sqlstate is None:
        return _without_sqlstate(error)
    condition = type(error).__name__
    table = error.diag.table_name
    message = f"PostgreSQL: {condition} ({sqlstate})" + (f" in {table}" if table else "")
    # Only a missing segment has no constraint to name: a CHECK names itself.
    if sqlstate == "23514" and error.diag.constraint_name is None:
        return MissingSegmentError(message)
    return from_sqlstate(sqlstate, message, column=error.diag.column_name)


# libpq gives no SQLSTATE when connecting fails; these texts are the server's own, in English or
# not, and the wrong guess only means that we go on trying.
_OPERATORS_BUSINESS = re.compile(
    r"authentication failed|no password supplied|does not exist|permission denied|"
    r"no pg_hba\.conf entry|certificate|root\.crt"
)


def _without_sqlstate(error: psycopg.Error) -> PipelineError:
    if not isinstance(error, psycopg.OperationalError):
        return InvariantError(f"psycopg: {type(error).__name__}")
    text = str(error)
    if match := _OPERATORS_BUSINESS.search(text):
        return ConfigurationError(f"PostgreSQL refused the connection: {match[0]}")
    reason = "timed out" if "timeout" in text else "the connection broke or could not be made"
    return TransientError(f"PostgreSQL is away: {reason}")

"""PostgreSQL's errors, translated into the program's own.

PostgreSQL's messages, DETAIL and CONTEXT may quote the row that was refused, so none of them is
passed on: an error names the condition and the SQLSTATE only.
"""

import re

import psycopg

from pipeline.errors import (
    ConfigurationError,
    InvariantError,
    MissingSegmentError,
    PipelineError,
    TransientError,
    from_sqlstate,
)


class SilentServerError(psycopg.OperationalError):
    """The connection is open and nothing arrives on it; we have closed it."""


def translate(error: psycopg.Error) -> PipelineError:
    """The error of ours that an exception of the driver stands for."""
    sqlstate = error.sqlstate
    if sqlstate is None:
        return _without_sqlstate(error)
    condition = type(error).__name__
    table = error.diag.table_name
    message = f"PostgreSQL: {condition} ({sqlstate})" + (f" in {table}" if table else "")
    # Who holds the lock that we waited for, as `db` found out meanwhile.
    message += "".join(f": {note}" for note in getattr(error, "__notes__", ()))
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
_REASONS = {
    "it takes no more connections": re.compile(r"too many (clients|connections)|connection slots"),
    "it is read-only": re.compile(r"read-only|in hot standby mode"),
    "it is starting or stopping": re.compile(r"is (starting up|shutting down)|recovery"),
    "timed out": re.compile("timeout"),
}


def _without_sqlstate(error: psycopg.Error) -> PipelineError:
    if not isinstance(error, psycopg.OperationalError):
        return InvariantError(f"psycopg: {type(error).__name__}")
    text = str(error)
    if isinstance(error, SilentServerError):
        return TransientError(f"PostgreSQL hangs: {text}")
    if match := _OPERATORS_BUSINESS.search(text):
        return ConfigurationError(f"PostgreSQL refused the connection: {match[0]}")
    for reason, told in _REASONS.items():
        if told.search(text):
            return TransientError(f"PostgreSQL is away: {reason}")
    return TransientError("PostgreSQL is away: the connection broke or could not be made")

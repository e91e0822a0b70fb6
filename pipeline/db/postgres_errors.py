"""PostgreSQL's errors, translated into the program's own.

PostgreSQL's messages, DETAIL and CONTEXT may quote the row that was refused, so none of them is
shown. An error has the text of the table of causes, and names the SQLSTATE, the object and the
server. PostgreSQL's own words are shown only where a right is missing or a connection fails: they
name objects, roles and hosts, never a value.
"""

import re

import psycopg

from pipeline import causes
from pipeline.causes import Cause
from pipeline.errors import (
    HangingServerError,
    InvariantError,
    MissingSegmentError,
    PipelineError,
    from_sqlstate,
    server_error,
)
from pipeline.redaction import redacted

WORDS_MAX = 300
"""Maximum number of characters of libpq's message in an error."""


class SilentServerError(psycopg.OperationalError):
    """The connection is open but the server does not answer; we have closed it."""


class UnreachableError(psycopg.OperationalError):
    """A connection could not be made.

    Attributes:
        words: libpq's message.
        cause: Why.
    """

    def __init__(self, words: str, cause: Cause) -> None:
        super().__init__(words)
        self.words = words
        self.cause = cause


def add_address(error: psycopg.Error, where: str) -> None:
    """Add to an exception of the driver which server it is about: host, port, database, user."""
    error.where = where  # type: ignore[attr-defined]  # read by ``translate`` alone


def translate(error: psycopg.Error) -> PipelineError:
    """Our error for an exception of the driver."""
    where: str | None = getattr(error, "where", None)
    server = f"PostgreSQL at {where}" if where else "PostgreSQL"
    address = where.partition(" for user ")[0] if where else ""
    sqlstate = error.sqlstate
    if sqlstate is None:
        return _without_sqlstate(error, server, address)
    message = f"{server}: {type(error).__name__} ({sqlstate})"
    if table := error.diag.table_name:
        message += f" in {table}"
    if constraint := error.diag.constraint_name:
        message += f", constraint {constraint}"
    # Only a missing segment names no constraint: a CHECK does.
    if sqlstate == "23514" and error.diag.constraint_name is None:
        return MissingSegmentError(message)
    if cause := causes.of_sqlstate(sqlstate):
        if cause is causes.POSTGRES_RIGHT and error.diag.source_function in _OF_POLICIES:
            cause = causes.POSTGRES_POLICY
        named = _object_of(error)
        message = f"{server} {cause.what}. Cause: {type(error).__name__} ({sqlstate})"
        message += f", {named}. {cause.fix}" if named else f". {cause.fix}"
    # The holder of the lock that we waited for: see ``connection``.
    message += "".join(f": {note}" for note in getattr(error, "__notes__", ()))
    column = error.diag.column_name
    return from_sqlstate(sqlstate, message, column=column, address=address)


# The messages of these codes name objects of the schema, never a value.
_NAMING = re.compile(r"42501|42P01|42883|42703|3D000|3F000|28\w{3}")


_OF_POLICIES = {"get_row_security_policies", "ExecWithCheckOptions", "check_enable_rls"}
"""Functions of PostgreSQL that refuse with 42501 because of a policy, whatever the language."""
_FUNCTION = re.compile(r"PL/pgSQL function (\S+?\(.*?\)) line \d+")


def _object_of(error: psycopg.Error) -> str:
    if (error.sqlstate or "").startswith("P0"):
        # Only the function's name: the rest of the context may quote values.
        raised_by = _FUNCTION.match(error.diag.context or "")
        return f"function {raised_by[1]}" if raised_by else ""
    # A RAISE in a function may use such a code with any text.
    is_servers_own = error.diag.source_function != "exec_stmt_raise"
    if not (is_servers_own and _NAMING.fullmatch(error.sqlstate or "")):
        return error.diag.table_name or ""
    return error.diag.message_primary or ""


def _without_sqlstate(error: psycopg.Error, server: str, address: str) -> PipelineError:
    if isinstance(error, SilentServerError):
        message = f"{server} hangs: {error}. Check its disk and its processes"
        return HangingServerError(message, address=address)
    if isinstance(error, UnreachableError):
        cause = error.cause
        message = f"{server} {cause.what}. Cause: {_shortened(error.words)}. {cause.fix}"
        return server_error(cause, message, address=address)
    if isinstance(error, psycopg.OperationalError):
        cause = causes.of_libpq(str(error)) or causes.POSTGRES_BROKE
        return server_error(cause, f"{server} {cause.what}. {cause.fix}", address=address)
    return InvariantError(f"psycopg: {type(error).__name__}")


def _shortened(words: str) -> str:
    """Libpq's reasons, without the addresses, each once."""
    reasons = []
    for line in words.splitlines():
        if line.endswith("?"):  # libpq also asks whether the server runs
            continue
        reason = re.sub(r".*(?:failed: |FATAL:\s+|ERROR:\s+)", "", line).strip(" \t-.")
        if reason and "Multiple connection attempts" not in reason and reason not in reasons:
            reasons.append(reason)
    return redacted("; ".join(reasons))[:WORDS_MAX]

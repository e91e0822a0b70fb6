"""How a session with PostgreSQL begins: its settings are ours, whatever was configured elsewhere.

The environment, the URL, the role and the database may each hold settings for a session. Here, by
statements, every setting that could change meaning, isolation or time-outs gets our value and is
read back (``session_settings`` lists them). A session that cannot have these values is refused, and
so is one that a pooler would give to others between two transactions.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.sql import SQL, Literal

from pipeline.db.session_settings import PINNED
from pipeline.errors import ConfigurationError, TransientError

OLDEST, NEWEST = 15, 18
"""Major versions of PostgreSQL on which the program is tested, and all between."""

ATTEMPTS_MAX = 5
"""How often the first statement of a session is repeated that a foreign time-out has ended."""
PROBE_S_MAX = 3.0
"""How long a pooler may take to answer the second connection that finds out how it shares."""

Connection = psycopg.Connection[Any]


class Ours(NamedTuple):
    """What a session of ours needs besides ``PINNED``.

    Attributes:
        idle_in_transaction_ms: After this long without a statement in a transaction it ends.
        lock_wait_ms: Longest wait for any lock.
        read_only: It may be a standby's, and writes nothing.
    """

    idle_in_transaction_ms: int
    lock_wait_ms: int
    read_only: bool = False


class Begun(NamedTuple):
    """A session that has begun.

    Attributes:
        pid: Its process id on the server; a pooler reports another one at the login.
        acts_as: The role whose rights it has, where ``ALTER ROLE … SET role`` sets another one than
            that of the login; else None.
    """

    pid: int
    acts_as: str | None


class _Found(NamedTuple):
    server_encoding: str
    backend_pid: int
    acts_as: str | None
    read_only: str


# ------------------------------------------------------------------------------- begin a session


def begin(
    connection: Connection, ours: Ours, another: Callable[[], Connection] | None = None
) -> Begun:
    """Give a new session our settings, and verify that it has them and keeps them.

    Args:
        connection: Just connected, and in no transaction.
        ours: What it needs besides ``PINNED``.
        another: Opens one more connection to the same server, with no settings; None where an
            earlier session has shown that no pooler shares its sessions.

    Raises:
        ConfigurationError: A setting keeps another value, the database's encoding is not UTF8, the
            server is too old, or a pooler shares the server's sessions between transactions.
        TransientError: The server's own configuration makes it read-only.
    """
    if connection.info.server_version < OLDEST * 10_000:
        raise ConfigurationError(
            f"{_place(connection)} is PostgreSQL {connection.info.server_version // 10_000}; this "
            f"program needs {OLDEST} or newer: use a server of version {OLDEST} to {NEWEST}"
        )
    connection.autocommit = True
    try:
        found, values = _set(connection, ours)
    except psycopg.errors.ProtocolViolation:  # a pooler that allows no transactions
        raise ConfigurationError(_shared(connection)) from None
    _refuse_encoding(connection, found)
    _refuse_difference(connection, _wanted(ours), values)
    _decide_read_only(connection, ours, found)
    if another and connection.info.backend_pid != found.backend_pid:
        _refuse_shared_sessions(connection, found.backend_pid, another)
    connection.autocommit = False
    return Begun(found.backend_pid, found.acts_as)


def _wanted(ours: Ours) -> dict[str, str]:
    pinned = {name: pin.value for name, pin in PINNED.items()}
    pinned["lock_timeout"] = _duration(ours.lock_wait_ms)
    pinned["idle_in_transaction_session_timeout"] = _duration(ours.idle_in_transaction_ms)
    if ours.read_only:
        pinned["default_transaction_read_only"] = "on"
    return pinned


_UNITS_MS = {"d": 86_400_000, "h": 3_600_000, "min": 60_000, "s": 1000, "ms": 1}


def _duration(milliseconds: int) -> str:
    """In PostgreSQL's own spelling: the largest unit that leaves no rest."""
    if milliseconds == 0:
        return "0"
    unit, size = next(unit for unit in _UNITS_MS.items() if milliseconds % unit[1] == 0)
    return f"{milliseconds // size}{unit}"


# Half-open connections are found within about 30 seconds. Not compared: there is no TCP in a
# socket's folder, and not every system has them.
_OF_TCP = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
# One message, so one round trip. Its own transaction comes first: one of the default isolation may
# be impossible (serializable, on a standby). From then on no other schema can stand in our way, and
# no time-out can end the statement that follows.
_BEGIN = SQL(
    "BEGIN ISOLATION LEVEL READ COMMITTED; "
    "SET statement_timeout = 0; SET search_path = pg_catalog, pg_temp; "
    "SELECT {}, current_setting('server_encoding'), pg_backend_pid(), "
    "CASE WHEN current_user <> session_user THEN current_user END, {}; COMMIT"
)
# A setting that this server does not have cannot have another value.
_SET = SQL(
    "CASE WHEN current_setting({name}, true) IS NOT NULL "
    "THEN set_config({name}, {value}, false) END"
)
_SET_IF_ALLOWED = SQL(
    "CASE WHEN has_parameter_privilege({name}, 'SET') THEN set_config({name}, {value}, false) "
    "ELSE current_setting({name}) END"
)
_READ_ONLY = SQL("current_setting('default_transaction_read_only')")
# By its whole name: where the value of a setting is refused, the search path may be as well.
_SOURCE = "SELECT source FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) %s"
_MAY_WRITE = "SET default_transaction_read_only = off"
_PID = SQL("SELECT pg_backend_pid()")
_HOLD = SQL("BEGIN; SELECT pg_backend_pid()")


def _set(connection: Connection, ours: Ours) -> tuple[_Found, dict[str, str | None]]:
    """Set everything; what each setting is then, None where this server has no such setting."""
    wanted, statement = _wanted(ours), _statement(ours)
    for _ in range(ATTEMPTS_MAX - 1):
        try:
            row = _row(connection, statement)
            break
        except psycopg.errors.QueryCanceled:
            # By a statement_timeout of a millisecond, perhaps, that was there before ours.
            connection.execute("ROLLBACK")
    else:
        row = _row(connection, statement)
    values = dict(zip(wanted, row, strict=False))
    return _Found(*row[-len(_Found._fields) :]), values


@cache
def _statement(ours: Ours) -> SQL:
    columns = []
    for name, value in {**_wanted(ours), **_OF_TCP}.items():
        free = name not in PINNED or PINNED[name].settable
        form = _SET if free else _SET_IF_ALLOWED
        columns.append(form.format(name=Literal(name), value=Literal(value)))
    whole = _BEGIN.format(SQL(", ").join(columns), _READ_ONLY)
    return SQL(whole.as_string())  # once, for every session


def _row(connection: Connection, statement: SQL) -> tuple[Any, ...]:
    """The only row of several statements that are sent as one message."""
    with connection.cursor() as cursor:
        # As text: with parameters of the protocol it would have to be a single statement.
        cursor.execute(statement)
        while cursor.description is None:
            cursor.nextset()
        return cursor.fetchone() or ()


# -------------------------------------------------------------------------------- what is refused


def _refuse_encoding(connection: Connection, found: _Found) -> None:
    if found.server_encoding != "UTF8":
        raise ConfigurationError(encoding_refused(_place(connection), found.server_encoding))


def encoding_refused(where: str, encoding: str) -> str:
    """The message about a database that cannot hold every character."""
    return (
        f"{where} has encoding {encoding}, which cannot hold every character that Kafka sends: "
        "create a database with ENCODING 'UTF8' TEMPLATE template0, and use that"
    )


def _refuse_difference(
    connection: Connection, wanted: Mapping[str, str], values: Mapping[str, str | None]
) -> None:
    values = {**values, "client_encoding": _client_encoding(connection, values)}
    for name, value in wanted.items():
        if values[name] in (value, None):
            continue
        raise ConfigurationError(
            f"setting {name} is {values[name]!r} in the session of this program with "
            f"{_place(connection)}, and "
            f"must be {value!r}: another value {PINNED[name].why if name in PINNED else _WAITS}. "
            f"{_remedy(connection, name)}"
        )


_WAITS = "decides how long other sessions may have to wait for this one"


def _client_encoding(connection: Connection, values: Mapping[str, str | None]) -> str | None:
    """The server's value; or the driver's, where it differs."""
    driver = connection.info.encoding
    return values["client_encoding"] if driver == "utf-8" else driver


def _remedy(connection: Connection, name: str) -> str:
    """Where the value comes from, and how to remove it; by statements that do not run here."""
    role, database = connection.info.user, connection.info.dbname
    source = connection.execute(_SOURCE, [name]).fetchone()
    commands = {
        "user": f"ALTER ROLE {role} RESET {name}",
        "database": f"ALTER DATABASE {database} RESET {name}",
        "database user": f"ALTER ROLE {role} IN DATABASE {database} RESET {name}",
        "global": f"ALTER ROLE ALL RESET {name}",
    }
    if source and source[0] in commands:
        return f"Have a superuser run: {commands[source[0]]}"
    if source and source[0] == "client":
        return "Remove it from PGOPTIONS and from `options` in PIPELINE_DATABASE_URL"
    if source and source[0] == "session":
        return "This program has set it, and a pooler between it and PostgreSQL did not forward it"
    return (
        f"Have a superuser set it in the server's configuration, or GRANT SET ON PARAMETER {name}"
    )


# A value of a role, a database, the environment or the URL is meant for other programs. The
# server's configuration is different: an operator or a provider stops all writing by it, for
# example when a disk is nearly full.
_OVERRULED = {"user", "database", "database user", "global", "client"}


def _decide_read_only(connection: Connection, ours: Ours, found: _Found) -> None:
    if ours.read_only or found.read_only == "off":
        return
    source = connection.execute(_SOURCE, ["default_transaction_read_only"]).fetchone()
    if source is None or source[0] not in _OVERRULED:
        raise TransientError(
            f"PostgreSQL is unavailable: {_place(connection)}: it is read-only, because "
            "default_transaction_read_only is on in the server's configuration"
        )
    connection.execute(_MAY_WRITE)


def _refuse_shared_sessions(
    connection: Connection, pid: int, another: Callable[[], Connection]
) -> None:
    """Refuse a pooler that gives the session to others between two of our transactions.

    There is a pooler between us and PostgreSQL: the process that was named at the login is not the
    one that answers. In session pooling this process is ours until we leave, so a second connection
    cannot get it. Otherwise the second connection gets it, or, while the second connection keeps
    it busy, we get a different one.
    """
    second = another()
    try:
        second.autocommit = True
        # No answer: all sessions are in use, so ours is not given to others.
        with suppress(psycopg.OperationalError):
            if _row(second, _HOLD)[0] == pid:
                raise ConfigurationError(_shared(connection))
        if _row(connection, _PID)[0] != pid:
            raise ConfigurationError(_shared(connection))
    finally:
        second.close()


def _shared(connection: Connection) -> str:
    return (
        f"{_place(connection)} is reached through a pooler that shares PostgreSQL's sessions "
        "between transactions (pool_mode transaction or statement). Settings, locks and temporary "
        "tables of one client would be visible to another. Use pool_mode = session, or connect to "
        "PostgreSQL directly"
    )


# ------------------------------------------------------------------------------ where, and how


def parameters_of(url: str) -> dict[str, Any]:
    """The parameters of libpq in a URL; ``postgresql+psycopg://`` is understood too."""
    return conninfo_to_dict(re.sub(r"^postgresql\+psycopg:", "postgresql:", url))


def address_of(url: str) -> str:
    """Host, port and database of a URL, as libpq completes it; no user, no password."""
    given = parameters_of(url)
    if "service" in given and "host" not in given:
        return f"service {given['service']}"
    for option in psycopg.pq.Conninfo.get_defaults():
        if option.val:
            given.setdefault(option.keyword.decode(), option.val.decode())
    hosts = str(given.get("host") or given.get("hostaddr") or "local").split(",")
    ports = str(given.get("port") or "5432").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    addresses = ",".join(
        f"{f'[{host}]' if ':' in host else host}:{port or 5432}"
        for host, port in zip(hosts, ports, strict=False)
    )
    return f"{addresses}/{given.get('dbname') or given.get('user', '')}"


def _place(connection: Connection) -> str:
    info = connection.info
    return f"database {info.dbname} at {info.host}:{info.port}"


_WHERE_FROM = {
    "options": "remove PGOPTIONS from the environment and `options` from PIPELINE_DATABASE_URL",
    "geqo": "remove PGGEQO from the environment",
}


def login_refused(error: psycopg.Error, where: str) -> ConfigurationError | None:
    """What an operator must change, if a connection is refused because of what libpq sends."""
    message = str(error)
    if match := re.search(r"unsupported startup parameter(?: in options)?: (\w+)", message):
        return ConfigurationError(
            f"the pooler at {where} refuses the startup parameter {match[1]}: "
            f"{_WHERE_FROM.get(match[1], 'remove it from the environment')}, or add it to "
            "ignore_startup_parameters of PgBouncer; this program sets these settings itself"
        )
    if match := re.search(r"conversion between (?:UTF8 and )?(\w+)", message):
        return ConfigurationError(encoding_refused(where, match[1]))
    return None

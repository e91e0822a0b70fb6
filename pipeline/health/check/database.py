"""The database's half: server, connection, log, read models."""

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, Row, text

from pipeline.catalogue import Catalogue
from pipeline.counts import count
from pipeline.db import LOG_SCHEMA, PERSONAL_SCHEMA, READ_SCHEMA, transaction
from pipeline.db.session import NEWEST
from pipeline.db.session_settings import is_sorted
from pipeline.errors import ConfigurationError, ExitCode
from pipeline.foreign_objects import foreign_objects
from pipeline.health import problems
from pipeline.health.check.keying import check_keying
from pipeline.health.check.promises import Promise
from pipeline.health.check.result import Result, found, ok
from pipeline.health.check.rights import check_rights
from pipeline.health.recent import bad_records, read_recent
from pipeline.log import protection
from pipeline.log.ranges import ranges
from pipeline.log.search import first_since
from pipeline.partitions import OffsetRange
from pipeline.projection import dead_letters, registry
from pipeline.readmodel import Projector
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.schema.bookkeeping import our_tables
from pipeline.schema.drift import drift
from pipeline.schema.revisions import check_schema


def check_database(engine: Engine, catalogue: Catalogue) -> Iterator[Result]:
    """Examine the database; each result comes as soon as it is known.

    Raises:
        PipelineError: It is unavailable, refuses us, or has another schema than this program's.
    """
    yield from _server(engine)
    check_schema(engine)
    yield ok("database", "schema is current")
    with transaction(engine) as db:
        yield from check_rights(db)
        yield from _foreign_objects(db, catalogue)
        yield from _log(db)
        yield from check_keying(db)
        yield from _bad_records(db, catalogue.models)
        yield from _read_models(db, catalogue.models)
        yield from _drift(db, catalogue)


# ---------------------------------------------------------------------------------------- server

SERVER = text("""
SELECT current_setting('server_version_num')::int / 10000 AS major,
       current_setting('server_version') AS version, current_database() AS name,
       current_user AS role, pg_is_in_recovery() AS is_replica,
       current_setting('fsync') AS fsync,
       current_setting('full_page_writes') AS full_page_writes,
       current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('data_checksums') AS data_checksums,
       current_setting('password_encryption') AS password_encryption,
       current_setting('log_min_messages') AS log_min_messages,
       (SELECT s.version FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid()) AS tls
""")
HOUR_AGO = text("SELECT now() - interval '1 hour'")
OWN_SETTINGS = text("""
SELECT name FROM pg_settings
WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') ORDER BY 1
""")


def _server(engine: Engine) -> Iterator[Result]:
    with transaction(engine) as db:
        server = db.execute(SERVER).one()
        names = db.execute(OWN_SETTINGS).scalars().all()
        driver = db.connection.driver_connection
        if not isinstance(driver, psycopg.Connection):
            raise ConfigurationError("the database is reached through psycopg only")
        host, parameters = driver.info.host, driver.info.get_parameters()
    name = f"PostgreSQL {server.version} at {host}, database {server.name}, as {server.role}"
    if server.major <= NEWEST:
        yield ok("database", name)
    else:
        yield found(problems.NEWER_SERVER.of("database", server=name))
    if server.is_replica:
        yield found(problems.IS_STANDBY.of("database"), Promise.ONE_EFFECT, Promise.ONE_WRITER)
    yield from _durability(server)
    yield _session(names)
    yield database_tls(
        host,
        server.tls,
        parameters.get("sslmode", "prefer"),
        parameters.get("channel_binding", "prefer"),
    )
    yield _passwords(server)
    yield _servers_log(server)


_ON_COMMIT = (Promise.FAITHFUL_LOG, Promise.ONE_EFFECT, Promise.ONE_PROJECTION)
"""Promises that depend on the durability of a commit."""


def _durability(server: Row[Any]) -> Iterator[Result]:
    """Whether everything committed survives a crash unchanged."""
    guards = {"fsync": server.fsync, "full_page_writes": server.full_page_writes}
    weak = [name for name, value in guards.items() if value == "off"]
    for name in weak:
        yield found(problems.WRITES_NOT_SAFE.of("database", setting=name), *_ON_COMMIT)
    if server.synchronous_commit == "off":
        yield found(
            problems.COMMITS_NOT_SAFE.of("database"), Promise.ONE_EFFECT, Promise.ONE_PROJECTION
        )
    elif not weak:
        yield ok("database", "a commit is on disk before it is confirmed", *_ON_COMMIT)
    if server.data_checksums == "off":
        yield found(problems.NO_CHECKSUMS.of("database"), Promise.FAITHFUL_LOG)
    else:
        yield ok("database", "data checksums are on", Promise.FAITHFUL_LOG)


def _session(names: Sequence[str]) -> Result:
    """Whether this program knows every setting that a session may have of its own."""
    if unsorted := [name for name in names if not is_sorted(name)]:
        return found(
            problems.UNKNOWN_SETTINGS.of("database", names=", ".join(unsorted)),
            Promise.CONVERGENCE,
        )
    return ok(
        "database",
        "each session has our settings, whatever environment, URL, role and database specify",
        Promise.ONE_WRITER,
        Promise.CONVERGENCE,
    )


def database_tls(
    host: str, tls: str | None, sslmode: str, channel_binding: str = "prefer"
) -> Result:
    """Whether others could read the connection, or pretend to be the database.

    Args:
        host: As the connection names it.
        tls: The version of TLS that the session uses; None without.
        sslmode: libpq's parameter.
        channel_binding: libpq's parameter.
    """
    touched = (Promise.FAITHFUL_LOG, Promise.SECRECY)
    if is_loopback(host):
        return ok("database", "on this machine: no TLS needed", *touched)
    if tls is None:
        problem = problems.DATABASE_WITHOUT_TLS.of("database", sslmode=sslmode, host=host)
    elif sslmode != "verify-full":
        problem = problems.DATABASE_NOT_VERIFIED.of("database", tls=tls, sslmode=sslmode, host=host)
    elif channel_binding == "disable":
        problem = problems.NO_CHANNEL_BINDING.of("database", tls=tls, host=host)
    else:
        return ok("database", f"{tls}, verified, channel_binding={channel_binding}", *touched)
    return found(problem, *touched)


def _passwords(server: Row[Any]) -> Result:
    if server.password_encryption == "md5":  # noqa: S105 - the name of an algorithm
        return found(problems.WEAK_PASSWORDS.of("database"), Promise.SECRECY)
    return ok("database", f"passwords are set as {server.password_encryption}", Promise.SECRECY)


def _servers_log(server: Row[Any]) -> Result:
    """Whether PostgreSQL writes values that it refuses to its own log, as it does by default."""
    if server.log_min_messages in {"fatal", "panic"}:
        return ok("database", "PostgreSQL's own log repeats no value", Promise.SECRECY)
    problem = problems.SERVER_LOGS_VALUES.of(
        "database", level=server.log_min_messages, role=server.role
    )
    return found(problem, Promise.SECRECY)


def is_loopback(host: str) -> bool:
    """Whether the connection does not leave this machine."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ------------------------------------------------------------------------------- what others added


def _foreign_objects(db: Connection, catalogue: Catalogue) -> Iterator[Result]:
    foreign = foreign_objects(db, our_tables(db, catalogue))
    for thing in foreign:
        is_of_log = thing.table.startswith(LOG_SCHEMA)
        yield found(
            problems.FOREIGN_OBJECT.of(thing.table, what=thing.what, fix=thing.fix),
            Promise.FAITHFUL_LOG if is_of_log else Promise.CONVERGENCE,
            code=ExitCode.CONFIGURATION,
        )
    if not foreign:
        yield ok("database", "no trigger, rule or policy of others changes what is written")


# ------------------------------------------------------------------------------------------- log


def _log(db: Connection) -> Iterator[Result]:
    unguarded, segments = protection.unguarded(db), protection.count_segments(db)
    for name in unguarded:
        yield found(problems.LOG_NOT_PROTECTED.of("log", table=name), Promise.FAITHFUL_LOG)
    if not unguarded:
        yield ok(
            "log",
            f"append-only triggers on the log and its {count(segments, 'segment')}",
            Promise.FAITHFUL_LOG,
        )


def _bad_records(db: Connection, projectors: Sequence[Projector]) -> Iterator[Result]:
    """Records that could not be decoded are in the log; no promise depends on them."""
    hour_ago = db.execute(HOUR_AGO).scalar_one()
    began = first_since(db, [hour_ago])
    came = {
        partition: OffsetRange(began.get((partition, hour_ago), logged.end), logged.end)
        for partition, logged in ranges(db).items()
    }
    for problem in bad_records(read_recent(db, came, projectors)):
        yield found(problem)


# ----------------------------------------------------------------------------------- read models

WATCHED = text("""
SELECT c.relname AS table
FROM pg_trigger t
JOIN pg_proc p ON p.oid = t.tgfoid
JOIN pg_class c ON c.oid = t.tgrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = ANY (CAST(:schemas AS text[]))
  AND p.oid = 'pipeline.read_model_truncated()'::regprocedure
  AND t.tgenabled IN ('O', 'A')
""")


def _read_models(db: Connection, projectors: Sequence[Projector]) -> Iterator[Result]:
    watched = set(db.execute(WATCHED, {"schemas": [READ_SCHEMA, PERSONAL_SCHEMA]}).scalars())
    tables = [(model.name, table) for model in projectors for table in model.tables]
    not_watched = [(model, table) for model, table in tables if table.name not in watched]
    for model, table in not_watched:
        problem = problems.NOT_REFILLED.of(model, table=table.fullname)
        yield found(problem, Promise.DISPOSABLE)
    if not not_watched:
        yield ok(
            "read models",
            f"{count(len(tables), 'table is', 'tables are')} refilled after TRUNCATE",
            Promise.DISPOSABLE,
        )
    yield from _definitions(db, projectors)


def _drift(db: Connection, catalogue: Catalogue) -> Iterator[Result]:
    """Whether tables and views are as they are declared."""
    drifted = list(drift(db, catalogue))
    for name, what in drifted:
        yield found(problems.NOT_AS_DECLARED.of(name, what=what), Promise.CONVERGENCE)
    if not drifted:
        views = len(catalogue.views)
        yield ok(
            "read models", f"tables and {count(views, 'view')} are as declared", Promise.CONVERGENCE
        )


def _definitions(db: Connection, projectors: Sequence[Projector]) -> Iterator[Result]:
    """Whether each table was built by today's definition, and its projector is not broken."""
    reasons = registry.broken(db)
    broken = [model for model in projectors if model.name in reasons]
    for model in broken:
        problem = problems.BROKEN.of(model.name, why=reasons[model.name])
        yield found(problem, Promise.ONE_BAD_EVENT)
    if not broken:
        yield ok(
            "read models",
            f"{count(len(projectors), 'read model')}, none broken",
            Promise.ONE_BAD_EVENT,
        )
    for name, number in dead_letters.counts(db).items():
        letters = count(number, "dead letter")
        yield found(problems.DEAD_LETTERS.of(name, letters=letters))
    built = registry.fingerprints(db)
    stale = [
        model for model in projectors if built.get(model.name) not in (None, fingerprint(model))
    ]
    for model in stale:
        yield found(problems.STALE.of(model.name), Promise.CONVERGENCE)
    if not stale:
        yield ok("read models", "none was built by another definition", Promise.CONVERGENCE)

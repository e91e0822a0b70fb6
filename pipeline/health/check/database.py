"""The database's half: server, connection, log, read models."""

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, Row, text

from pipeline.db import LOG_SCHEMA, READ_SCHEMA, transaction
from pipeline.db.session import NEWEST
from pipeline.db.session_settings import is_sorted
from pipeline.errors import ConfigurationError, ExitCode
from pipeline.health.check.findings import Finding, ok, warning, wrong
from pipeline.health.check.keying import look_at_keying
from pipeline.health.check.promises import Promise
from pipeline.health.check.rights import look_at_rights
from pipeline.projection.checkpoints import fingerprints
from pipeline.readmodel import Projector
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.schema.foreign_objects import foreign_objects
from pipeline.schema.migrate import check_schema, our_tables


def look_at_database(engine: Engine, projectors: Sequence[Projector]) -> Iterator[Finding]:
    """What is found there, as soon as it is known.

    Raises:
        PipelineError: It is away, refuses us, or has another schema than this program's.
    """
    yield from _server(engine)
    check_schema(engine)
    yield ok("database", "schema is current")
    with transaction(engine) as db:
        yield from look_at_rights(db)
        yield from _foreign_objects(db)
        yield from _log(db)
        yield from look_at_keying(db)
        yield from _read_models(db, projectors)


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


OWN_SETTINGS = text("""
SELECT name FROM pg_settings
WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') ORDER BY 1
""")


def _server(engine: Engine) -> Iterator[Finding]:
    with transaction(engine) as db:
        server = db.execute(SERVER).one()
        names = db.execute(OWN_SETTINGS).scalars().all()
        driver = db.connection.driver_connection
        if not isinstance(driver, psycopg.Connection):
            raise ConfigurationError("the database is reached through psycopg only")
        host, parameters = driver.info.host, driver.info.get_parameters()
    found = f"PostgreSQL {server.version} at {host}, database {server.name}, as {server.role}"
    if server.major <= NEWEST:
        yield ok("database", found)
    else:
        yield warning("database", f"{found}: newer than tested", "run the tests on it first")
    if server.is_replica:
        yield wrong(
            "database",
            "it is a replica, and read-only",
            "connect to the primary",
            Promise.ONE_EFFECT,
            Promise.ONE_WRITER,
        )
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
"""What is worth as much as a commit is."""


def _durability(server: Row[Any]) -> Iterator[Finding]:
    """Whether what is committed is there after a crash, as it was."""
    lost = "a crash of the machine may lose or mix up what was committed"
    guards = {"fsync": server.fsync, "full_page_writes": server.full_page_writes}
    weak = [name for name, value in guards.items() if value == "off"]
    for name in weak:
        yield warning("database", f"{name} is off: {lost}", "turn it on", *_ON_COMMIT)
    if server.synchronous_commit == "off":
        yield warning(
            "database",
            "synchronous_commit is off: a crash takes back the last commits, which analysts may "
            "have seen; Kafka must still have them",
            "turn it on for this role",
            Promise.ONE_EFFECT,
            Promise.ONE_PROJECTION,
        )
    elif not weak:
        yield ok("database", "a commit is on disk before it is told", *_ON_COMMIT)
    if server.data_checksums == "off":
        yield warning(
            "database",
            "data checksums are off: a disk that changes the log is not noticed",
            "stop it and run pg_checksums --enable",
            Promise.FAITHFUL_LOG,
        )
    else:
        yield ok("database", "data checksums are on", Promise.FAITHFUL_LOG)


def _session(names: Sequence[str]) -> Finding:
    """Whether each setting that a session may have of its own is one that we have looked at."""
    if unsorted := [name for name in names if not is_sorted(name)]:
        return warning(
            "database",
            f"this PostgreSQL has settings that this program does not know: {', '.join(unsorted)}",
            "leave them at their defaults, or use a newer version of this program",
            Promise.CONVERGENCE,
        )
    return ok(
        "database",
        "each session has our settings, whatever environment, URL, role and database specify",
        Promise.ONE_WRITER,
        Promise.CONVERGENCE,
    )


_VERIFIED = "add ?sslmode=verify-full&sslrootcert=system to PIPELINE_DATABASE_URL"


def database_tls(
    host: str, tls: str | None, sslmode: str, channel_binding: str = "prefer"
) -> Finding:
    """Whether anybody could listen in, or pass for the database.

    Args:
        host: As the connection names it.
        tls: The version of TLS that the session uses; None without.
        sslmode: As libpq knows it.
        channel_binding: As libpq knows it.
    """
    touched = (Promise.FAITHFUL_LOG, Promise.SECRECY)
    if is_loopback(host):
        return ok("database", "on this machine: no TLS needed", *touched)
    if tls is None:
        return warning(
            "database",
            f"sslmode={sslmode}, and no TLS to {host}: others can read and change what goes over "
            "the network",
            _VERIFIED,
            *touched,
        )
    if sslmode != "verify-full":
        return warning(
            "database",
            f"{tls}, but sslmode={sslmode} does not make sure that it is {host} who answers",
            _VERIFIED,
            *touched,
        )
    if channel_binding == "disable":
        return warning(
            "database",
            f"{tls} to {host}, verified, but channel_binding=disable lets whoever holds a "
            "certificate in its name pass the login on",
            "set channel_binding=require in PIPELINE_DATABASE_URL",
            *touched,
        )
    return ok("database", f"{tls}, verified, channel_binding={channel_binding}", *touched)


def _passwords(server: Row[Any]) -> Finding:
    if server.password_encryption == "md5":  # noqa: S105 - the name of an algorithm
        return warning(
            "database",
            "password_encryption is md5: whoever reads the stored form of a password that is set "
            "now can log in with it",
            "set it to scram-sha-256, then set the passwords again",
            Promise.SECRECY,
        )
    return ok("database", f"passwords are set as {server.password_encryption}", Promise.SECRECY)


def _servers_log(server: Row[Any]) -> Finding:
    """Whether PostgreSQL writes down what it refuses, as it does if left alone."""
    if server.log_min_messages in {"fatal", "panic"}:
        return ok("database", "PostgreSQL's own log repeats no value", Promise.SECRECY)
    return warning(
        "database",
        f"PostgreSQL's own log repeats values that it refuses (log_min_messages is "
        f"{server.log_min_messages})",
        f"have a superuser say: ALTER ROLE {server.role} SET log_min_messages = 'fatal'; what is "
        "refused is in our log, without the values",
        Promise.SECRECY,
    )


def is_loopback(host: str) -> bool:
    """Whether nobody can listen in between: a socket of this machine."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ------------------------------------------------------------------------------- what others added


def _foreign_objects(db: Connection) -> Iterator[Finding]:
    found = foreign_objects(db, our_tables())
    for one in found:
        yield wrong(
            "database",
            f"{one.table} {one.what}",
            one.fix,
            Promise.FAITHFUL_LOG if one.table.startswith(LOG_SCHEMA) else Promise.CONVERGENCE,
            code=ExitCode.CONFIGURATION,
        )
    if not found:
        yield ok("database", "no trigger, rule or policy of others changes what is written")


# ------------------------------------------------------------------------------------------- log

UNGUARDED = text("""
SELECT c.oid::regclass::text AS segment
FROM (SELECT 'pipeline.events'::regclass AS oid
      UNION ALL
      SELECT inhrelid FROM pg_inherits WHERE inhparent = 'pipeline.events'::regclass) c
WHERE NOT EXISTS (
    SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgrelid = c.oid AND p.oid = 'pipeline.refuse_change()'::regprocedure
      AND t.tgenabled IN ('O', 'A')
      -- Bits of tgtype: DELETE 8, UPDATE 16, TRUNCATE 32, BEFORE 2; row-level 1 must be off.
      AND t.tgtype & 63 = 58)
""")
SEGMENTS = text("""
SELECT count(*) AS attached FROM pg_inherits WHERE inhparent = 'pipeline.events'::regclass
""")


def _log(db: Connection) -> Iterator[Finding]:
    unguarded = db.execute(UNGUARDED).scalars().all()
    segments = db.execute(SEGMENTS).scalar_one()
    for name in unguarded:
        yield wrong(
            "log",
            f"{name} can be changed: its append-only trigger is missing or disabled",
            f"enable it, or make it anew: CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR "
            f"TRUNCATE ON {name} FOR EACH STATEMENT EXECUTE FUNCTION pipeline.refuse_change()",
            Promise.FAITHFUL_LOG,
        )
    if not unguarded:
        yield ok(
            "log",
            f"append-only triggers on the log and its {segments} segments",
            Promise.FAITHFUL_LOG,
        )


# ----------------------------------------------------------------------------------- read models

HEALING = text("""
SELECT c.relname AS table
FROM pg_trigger t
JOIN pg_proc p ON p.oid = t.tgfoid
JOIN pg_class c ON c.oid = t.tgrelid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND p.oid = 'pipeline.read_model_truncated()'::regprocedure
  AND t.tgenabled IN ('O', 'A')
""")
BROKEN = text("SELECT projector, problem FROM pipeline.projectors WHERE state = 'broken'")


def _read_models(db: Connection, projectors: Sequence[Projector]) -> Iterator[Finding]:
    healing = set(db.execute(HEALING, {"schema": READ_SCHEMA}).scalars())
    unhealed = [t.name for one in projectors for t in one.tables if t.name not in healing]
    for name in unhealed:
        yield wrong(
            "read models",
            f"{name} does not heal after TRUNCATE: its trigger is missing or disabled",
            f"SELECT {LOG_SCHEMA}.watch_read_model('{READ_SCHEMA}.{name}', PROJECTOR)",
            Promise.DISPOSABLE,
        )
    if not unhealed:
        tables = sum(len(one.tables) for one in projectors)
        yield ok("read models", f"all {tables} tables heal", Promise.DISPOSABLE)
    yield from _definitions(db, projectors)


def _definitions(db: Connection, projectors: Sequence[Projector]) -> Iterator[Finding]:
    """Whether each table is what its projector says today, and goes on being it."""
    problems = {row.projector: row.problem for row in db.execute(BROKEN)}
    broken = [one for one in projectors if one.name in problems]
    for one in broken:
        yield wrong(
            "read models",
            f"{one.name} is broken: {problems[one.name]}",
            f"mend the projector, then `pipeline rebuild {one.name}`",
            Promise.ONE_BAD_EVENT,
        )
    if not broken:
        yield ok("read models", f"{len(projectors)} projectors, none broken", Promise.ONE_BAD_EVENT)
    built = fingerprints(db)
    stale = [one for one in projectors if built.get(one.name) not in (None, fingerprint(one))]
    for one in stale:
        yield warning(
            "read models",
            f"{one.name} was built by another definition",
            f"`pipeline rebuild {one.name}`, or `pipeline run --rebuild-stale`",
            Promise.CONVERGENCE,
        )
    if not stale:
        yield ok("read models", "none was built by another definition", Promise.CONVERGENCE)

"""The database's half: server, connection, rights, log, read models."""

import ipaddress
from collections.abc import Iterator, Sequence

import psycopg
from sqlalchemy import Connection, Engine, text

from pipeline.check.findings import Finding, ok, warning, wrong
from pipeline.db import LOG_SCHEMA, READ_SCHEMA, transaction
from pipeline.errors import ConfigurationError
from pipeline.migrate import check_schema
from pipeline.projection import Projector
from pipeline.projection.checkpoints import fingerprints
from pipeline.projection.fingerprint import fingerprint

SERVER_MIN, SERVER_MAX = 15, 18
"""Major versions of PostgreSQL that the tests run on, and all between."""


def look_at_database(engine: Engine, projectors: Sequence[Projector]) -> Iterator[Finding]:
    """What is found there, as soon as it is known.

    Raises:
        PipelineError: It is away, refuses us, or has another schema than this program's.
    """
    yield from _server(engine)
    check_schema(engine)
    yield ok("database", "schema is current")
    with transaction(engine) as db:
        yield from _rights(db)
        yield from _log(db)
        yield from _read_models(db, projectors)


# ---------------------------------------------------------------------------------------- server

SERVER = text("""
SELECT current_setting('server_version_num')::int / 10000 AS major,
       current_setting('server_version') AS version, current_database() AS name,
       current_user AS role, current_setting('server_encoding') AS encoding,
       current_setting('fsync') AS fsync, pg_is_in_recovery() AS is_replica,
       (SELECT s.version FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid()) AS tls
""")


def _server(engine: Engine) -> Iterator[Finding]:
    with transaction(engine) as db:
        server = db.execute(SERVER).one()
        driver = db.connection.driver_connection
        if not isinstance(driver, psycopg.Connection):
            raise ConfigurationError("the database is reached through psycopg only")
        host = driver.info.host
        sslmode = driver.info.get_parameters().get("sslmode", "prefer")
    found = f"PostgreSQL {server.version} at {host}, database {server.name}, as {server.role}"
    if SERVER_MIN <= server.major <= SERVER_MAX:
        yield ok("database", found)
    elif server.major < SERVER_MIN:
        yield wrong("database", found, f"use PostgreSQL {SERVER_MIN} to {SERVER_MAX}")
    else:
        yield warning("database", f"{found}: newer than tested", "run the tests on it first")
    if server.encoding != "UTF8":
        yield wrong("database", f"encoding is {server.encoding}", "create it with ENCODING 'UTF8'")
    if server.fsync == "off":
        yield warning(
            "database", "fsync is off: a crash of the machine may lose the log", "turn it on"
        )
    if server.is_replica:
        yield wrong("database", "it is a replica, and read-only", "connect to the primary")
    yield database_tls(host, server.tls, sslmode)


def database_tls(host: str, tls: str | None, sslmode: str) -> Finding:
    """Whether anybody could listen in, or pass for the database."""
    if is_loopback(host):
        return ok("database", "on this machine: no TLS needed")
    if tls is None:
        return warning(
            "database",
            f"no TLS to {host}: others can read and change what goes over the network",
            "add ?sslmode=verify-full&sslrootcert=system to PIPELINE_DATABASE_URL",
        )
    if sslmode != "verify-full":
        return warning(
            "database",
            f"{tls}, but sslmode={sslmode} does not make sure that it is {host} who answers",
            "add ?sslmode=verify-full&sslrootcert=system to PIPELINE_DATABASE_URL",
        )
    return ok("database", f"{tls}, verified")


def is_loopback(host: str) -> bool:
    """Whether nobody can listen in between: a socket of this machine."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------- rights

# What the loops do, and on which tables; a right that is missing stops them.
MISSING_RIGHTS = text("""
SELECT needed.tab AS object, needed.rights
FROM (VALUES
    ('pipeline.events', 'SELECT, INSERT'), ('pipeline.consumer_offsets', 'SELECT, INSERT, UPDATE'),
    ('pipeline.gaps', 'SELECT, INSERT, UPDATE'), ('pipeline.installation', 'SELECT'),
    ('pipeline.dead_letters', 'SELECT, INSERT, UPDATE, DELETE'),
    ('pipeline.projectors', 'SELECT, INSERT, UPDATE, DELETE'),
    ('pipeline.projection_checkpoints', 'SELECT, INSERT, UPDATE, DELETE')
) AS needed(tab, rights)
WHERE EXISTS (
    SELECT FROM regexp_split_to_table(needed.rights, ', ') AS r(one)
    WHERE NOT has_table_privilege(needed.tab, r.one))
UNION ALL
SELECT format('%I.%I', n.nspname, c.relname), 'SELECT, INSERT, UPDATE, DELETE'
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relkind = 'r' AND NOT (
    has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
    AND has_table_privilege(c.oid, 'UPDATE') AND has_table_privilege(c.oid, 'DELETE'))
UNION ALL
SELECT 'pipeline.make_segment', 'EXECUTE'
WHERE NOT has_function_privilege('pipeline.make_segment(text, bigint, bigint)', 'EXECUTE')
""")
MAY_CHANGE_LOG = text("""
SELECT has_table_privilege('pipeline.events', 'UPDATE')
    OR has_table_privilege('pipeline.events', 'DELETE')
    OR has_table_privilege('pipeline.events', 'TRUNCATE')
""")


def _rights(db: Connection) -> Iterator[Finding]:
    missing = db.execute(MISSING_RIGHTS, {"schema": READ_SCHEMA}).all()
    for row in missing:
        yield wrong(
            "database", f"rights missing: {row.rights} on {row.object}", "grant them to this role"
        )
    if not missing:
        yield ok("database", "rights: all that ingest and project need")
    if db.execute(MAY_CHANGE_LOG).scalar_one():
        yield warning(
            "log",
            "this role owns the log or may change it: only triggers keep it append-only",
            "run with a role that may only SELECT and INSERT there",
        )
    else:
        yield ok("log", "append-only for this role")


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
        )
    if not unguarded:
        yield ok("log", f"append-only triggers on the log and its {segments} segments")


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
STATES = text("SELECT projector, state, problem FROM pipeline.projectors")


def _read_models(db: Connection, projectors: Sequence[Projector]) -> Iterator[Finding]:
    healing = set(db.execute(HEALING, {"schema": READ_SCHEMA}).scalars())
    unhealed = [t.name for one in projectors for t in one.tables if t.name not in healing]
    for name in unhealed:
        yield wrong(
            "read models",
            f"{name} does not heal after TRUNCATE: its trigger is missing or disabled",
            f"SELECT {LOG_SCHEMA}.watch_read_model('{READ_SCHEMA}.{name}', PROJECTOR)",
        )
    if not unhealed:
        yield ok("read models", f"all {sum(len(p.tables) for p in projectors)} tables heal")
    built, states = fingerprints(db), {row.projector: row for row in db.execute(STATES)}
    faulty = False
    for one in projectors:
        state = states.get(one.name)
        if state is not None and state.state == "broken":
            faulty = True
            yield wrong(
                "read models",
                f"{one.name} is broken: {state.problem}",
                f"mend the projector, then `pipeline rebuild {one.name}`",
            )
        elif built.get(one.name) not in (None, fingerprint(one)):
            faulty = True
            yield warning(
                "read models",
                f"{one.name} was built by another definition",
                f"`pipeline rebuild {one.name}`, or `pipeline run --rebuild-stale`",
            )
    if not faulty:
        yield ok("read models", f"{len(projectors)} projectors, none broken or stale")

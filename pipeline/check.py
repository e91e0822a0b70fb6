"""What is right and wrong with an installation, on both sides, and which guarantees hold.

Nothing is changed, and no group is joined. What a broker does not tell its users (a managed feed
tells little) is said so, and is no fault.
"""

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import psycopg
from sqlalchemy import Connection, Engine, text

from pipeline import roles
from pipeline.db import LOG_SCHEMA, READ_SCHEMA, open_engine, transaction
from pipeline.errors import ConfigurationError, ExitCode, PipelineError, TransientError
from pipeline.log import ownership
from pipeline.migrate import check_schema
from pipeline.positions import NextOffset, Partition
from pipeline.projection import Projector
from pipeline.projection.checkpoints import fingerprints
from pipeline.projection.fingerprint import fingerprint
from pipeline.settings import Settings
from pipeline.source import KafkaSource

SERVER_MIN, SERVER_MAX = 15, 18
"""Major versions of PostgreSQL that the tests run on, and all between."""
RETENTION_MIN = timedelta(days=3)
"""A weekend: what less retention does not forgive."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``; ``warning``: works, but a guarantee or a safeguard is weaker; ``wrong``: does
            not work, or a guarantee does not hold.
        area: ``database``, ``log``, ``read models`` or ``kafka``.
        text: What was found.
        remedy: What to do; None if all is well.
        exit_code: What a command does about it.
    """

    level: Literal["ok", "warning", "wrong"]
    area: str
    text: str
    remedy: str | None = None
    exit_code: ExitCode = ExitCode.DONE


def ok(area: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", area, text)


def warning(area: str, text: str, remedy: str) -> Finding:
    """It works, but a guarantee or a safeguard is weaker."""
    return Finding("warning", area, text, remedy)


def wrong(area: str, text: str, remedy: str, code: ExitCode = ExitCode.FOUND) -> Finding:
    """It does not work, or a guarantee does not hold."""
    return Finding("wrong", area, text, remedy, code)


def examine(settings: Settings, projectors: Sequence[Projector]) -> Iterator[Finding]:
    """Look at everything; each finding comes as soon as it is known.

    Args:
        settings: What is configured.
        projectors: The read models of this program.
    """
    recorded: Recorded | None = None
    try:
        engine = open_engine(settings.database(), application="pipeline check")
        try:
            yield from _database(engine)
            check_schema(engine)
            yield ok("database", "schema is current")
            with transaction(engine) as db:
                yield from _rights(db)
                yield from _log(db)
                yield from _read_models(db, projectors)
                recorded = Recorded.of(db)
        finally:
            engine.dispose()
    except PipelineError as error:
        yield _failed("database", error)
    try:
        yield from _kafka(settings, recorded)
    except PipelineError as error:
        yield _failed("kafka", error)


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """What the shell is told: the gravest of all."""
    codes = {finding.exit_code for finding in findings}
    for code in (ExitCode.CONFIGURATION, ExitCode.UNAVAILABLE, ExitCode.FOUND):
        if code in codes:
            return code
    return ExitCode.DONE


def _failed(area: str, error: PipelineError) -> Finding:
    remedy = None
    if isinstance(error, TransientError):
        remedy = "see that the server runs and is to be reached from here"
    # A wrong setting, right or schema says itself what is to be done.
    return Finding("wrong", area, str(error), remedy, error.exit_code)


# -------------------------------------------------------------------------------------- database

SERVER = text("""
SELECT current_setting('server_version_num')::int / 10000 AS major,
       current_setting('server_version') AS version, current_database() AS name,
       current_user AS role, current_setting('server_encoding') AS encoding,
       current_setting('fsync') AS fsync, pg_is_in_recovery() AS is_replica,
       (SELECT s.version FROM pg_stat_ssl s WHERE s.pid = pg_backend_pid()) AS tls
""")


def _database(engine: Engine) -> Iterator[Finding]:
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

# By the catalogue's own ids: a name is not to be looked up without rights on its schema.
HELD = text("""
SELECT CASE needed.kind
       WHEN 'SCHEMA' THEN (SELECT has_schema_privilege(n.oid, needed.privilege)
                           FROM pg_namespace n WHERE n.nspname = needed.name)
       WHEN 'FUNCTION' THEN (SELECT bool_and(has_function_privilege(p.oid, needed.privilege))
                             FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                             WHERE n.nspname || '.' || p.proname = needed.name)
       ELSE (SELECT CASE needed.of_column
                    WHEN '' THEN has_table_privilege(c.oid, needed.privilege)
                    ELSE has_column_privilege(c.oid, needed.of_column, needed.privilege) END
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname || '.' || c.relname = needed.name) END AS is_held
FROM unnest(CAST(:kinds AS text[]), CAST(:names AS text[]), CAST(:columns AS text[]),
            CAST(:privileges AS text[])) WITH ORDINALITY
     AS needed(kind, name, of_column, privilege, place)
ORDER BY needed.place
""")
READ_MODELS = text("""
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = :schema AND c.relkind = 'r' ORDER BY 1
""")
# Settings of a role are those of its own logins only, so no group can give them.
UNBOUNDED_ANALYSTS = text("""
SELECT r.rolname AS login, string_agg(s.name, ', ' ORDER BY s.name) AS missing
FROM pg_roles r
CROSS JOIN unnest(ARRAY['default_transaction_read_only', 'statement_timeout',
                        'idle_in_transaction_session_timeout']) AS s(name)
WHERE r.rolcanlogin AND NOT r.rolsuper AND pg_has_role(r.oid, to_regrole(:analyst)::oid, 'MEMBER')
  AND NOT EXISTS (
      SELECT FROM pg_db_role_setting d CROSS JOIN unnest(d.setconfig) AS c(set_to)
      WHERE d.setrole IN (r.oid, 0) AND c.set_to LIKE s.name || '=%'
        AND (d.setdatabase = 0 OR d.setdatabase = (
             SELECT oid FROM pg_database WHERE datname = current_database())))
GROUP BY r.rolname ORDER BY r.rolname
""")
MAY_CHANGE_LOG = text("""
SELECT has_table_privilege('pipeline.events', 'UPDATE')
    OR has_table_privilege('pipeline.events', 'DELETE')
    OR has_table_privilege('pipeline.events', 'TRUNCATE')
""")


def _rights(db: Connection) -> Iterator[Finding]:
    prefix = roles.found_prefix(db)
    models = db.execute(READ_MODELS, {"schema": READ_SCHEMA}).scalars().all()
    is_for_nothing = True
    for purpose in roles.Purpose:
        held, missing = _divided(db, list(roles.needed_by(purpose, models)))
        # Looking alone tells nothing: those who ingest look at what projection does, and so on.
        if not any(one.privilege not in ("SELECT", "USAGE") for one in held):
            continue
        is_for_nothing = False
        remedy = f"GRANT {prefix}{purpose.value}" if prefix else "grant it"
        for name, lacking in missing.items():
            yield wrong(
                "database",
                f"rights missing to {purpose.value}: {', '.join(lacking)} on {name}",
                f"{remedy} to this role",
            )
        if not missing:
            yield ok("database", f"rights: all that {purpose.value} needs")
    if is_for_nothing:
        yield wrong(
            "database",
            "this role may neither ingest nor project",
            f"GRANT {prefix or 'pipeline_'}ingest, {prefix or 'pipeline_'}project to it; the roles "
            "are made by `pipeline migrate --roles`",
        )
    if prefix:
        analyst = prefix + roles.ANALYST
        for row in db.execute(UNBOUNDED_ANALYSTS, {"analyst": analyst}):
            yield warning(
                "database",
                f"analyst {row.login} may hold up others: not set for this login: {row.missing}",
                f"ALTER ROLE {row.login} SET …; settings are not inherited from {analyst}",
            )
    if db.execute(MAY_CHANGE_LOG).scalar_one():
        yield warning(
            "log",
            "this role owns the log or may change it: only triggers keep it append-only",
            "run with a role that may only SELECT and INSERT there",
        )
    else:
        yield ok("log", "append-only for this role")


def _divided(
    db: Connection, needed: Sequence[roles.Right]
) -> tuple[Sequence[roles.Right], Mapping[str, Sequence[str]]]:
    """Of rights, those that this role has; and by object what it lacks."""
    answers = db.execute(
        HELD,
        {
            "kinds": [one.kind for one in needed],
            "names": [one.name for one in needed],
            "columns": [one.column for one in needed],
            "privileges": [one.privilege for one in needed],
        },
    ).scalars()
    held, missing = [], dict[str, list[str]]()
    for one, is_held in zip(needed, answers, strict=True):
        if is_held:
            held.append(one)
        else:
            missing.setdefault(one.name, []).append(one.privilege)
    return held, missing


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


# ----------------------------------------------------------------------------------------- kafka


@dataclass(frozen=True)
class Recorded:
    """What the log says of where its records come from."""

    installation: object
    partitions: Sequence[tuple[Partition, NextOffset, str | None, str | None]]

    @classmethod
    def of(cls, db: Connection) -> "Recorded":
        """Read it."""
        rows = db.execute(RECORDED).all()
        return cls(
            ownership.installation_id(db),
            [
                (Partition(row.topic, row.partition), row.next_offset, row.cluster_id, row.topic_id)
                for row in rows
            ],
        )


RECORDED = text("""
SELECT topic, "partition", next_offset, cluster_id, topic_id
FROM pipeline.consumer_offsets ORDER BY topic, "partition"
""")


def _kafka(settings: Settings, recorded: Recorded | None) -> Iterator[Finding]:
    servers = settings.kafka_client()["bootstrap.servers"]
    yield kafka_tls(str(servers), settings.kafka_security_protocol)
    source = KafkaSource(settings)
    try:
        there = source.topics_there()
        cluster = source.cluster_id()
        yield ok("kafka", f"cluster {cluster} at {servers} answers, {len(there)} topics to be seen")
        known = recorded.partitions if recorded else []
        yield from _cluster(cluster, known)
        yield from _topics(source, settings, there)
        mine = [Partition(t, n) for t in settings.topics for n in range(there.get(t, 0))]
        yield from _group(source, settings, mine, recorded)
        yield from _topic_ids(source, known, there)
        yield from _places(source, known, there)
    finally:
        source.leave()


def kafka_tls(servers: str, protocol: str) -> Finding:
    """Whether anybody could listen in, or pass for the brokers."""
    if protocol in {"SASL_SSL", "SSL"}:
        return ok("kafka", f"{protocol}: TLS, the broker's name is verified")
    if all(is_loopback(server.rpartition(":")[0]) for server in servers.split(",")):
        return ok("kafka", f"{protocol} on this machine")
    return warning(
        "kafka",
        f"{protocol}: others can read the events{' and the login' if 'SASL' in protocol else ''}",
        "set PIPELINE_KAFKA_SECURITY_PROTOCOL to SASL_SSL",
    )


_Known = Sequence[tuple[Partition, NextOffset, str | None, str | None]]


def _cluster(cluster: str, known: _Known) -> Iterator[Finding]:
    others = {recorded for _, _, recorded, _ in known if recorded not in (None, cluster)}
    if others:
        yield wrong(
            "kafka",
            f"the log holds records of cluster {', '.join(map(str, others))}, this is {cluster}",
            "check PIPELINE_KAFKA_BOOTSTRAP_SERVERS and PIPELINE_DATABASE_URL",
            ExitCode.FOUND,
        )
    elif known:
        yield ok("kafka", "it is the cluster that the log was read from")


def _topics(source: KafkaSource, settings: Settings, there: Mapping[str, int]) -> Iterator[Finding]:
    for topic in settings.topics:
        if topic not in there:
            seen = ", ".join(sorted(name for name in there if name[:2] != "__")[:20])
            yield wrong(
                "kafka",
                f"topic {topic} does not exist or is hidden from this user",
                f"set PIPELINE_TOPICS; there are {seen or 'none'}",
                ExitCode.CONFIGURATION,
            )
            continue
        yield ok("kafka", f"topic {topic}: {there[topic]} partitions")
        yield from _retention(topic, source.topic_settings(topic))


def _retention(topic: str, told: Mapping[str, str]) -> Iterator[Finding]:
    if "retention.ms" not in told:
        yield ok("kafka", f"topic {topic}: the broker does not tell its retention; ask Upvest")
        return
    if "compact" in told.get("cleanup.policy", ""):
        yield warning(
            "kafka",
            f"topic {topic} is compacted: what is not read in time is thinned out unseen",
            "ask for cleanup.policy=delete",
        )
    kept = timedelta(milliseconds=int(told["retention.ms"]))
    if kept < timedelta(0):
        yield ok("kafka", f"topic {topic} keeps its records for ever")
    elif kept < RETENTION_MIN:
        yield warning(
            "kafka",
            f"topic {topic} keeps its records for {kept}: a longer downtime loses some",
            "ask for more, or watch `pipeline status` closely",
        )
    else:
        yield ok("kafka", f"topic {topic} keeps its records for {kept}; downtime must be shorter")


def _group(
    source: KafkaSource,
    settings: Settings,
    partitions: Sequence[Partition],
    recorded: Recorded | None,
) -> Iterator[Finding]:
    try:
        feeds = source.feeds(partitions)
    except TransientError as error:
        if "AUTHORIZATION" not in str(error):
            raise
        yield wrong(
            "kafka",
            f"group {settings.group_id} is not to be read: {error}",
            "ask for READ on the group, or set PIPELINE_GROUP_ID to one that you may use",
            ExitCode.CONFIGURATION,
        )
        return
    others = {str(one) for one in feeds.values() if recorded and one != recorded.installation}
    if others:
        yield wrong(
            "kafka",
            f"group {settings.group_id} also feeds database {', '.join(others)}: each would get a "
            "part of the events",
            "give each database its own PIPELINE_GROUP_ID",
        )
    else:
        yield ok("kafka", f"group {settings.group_id} may be used")


def _topic_ids(source: KafkaSource, known: _Known, there: Mapping[str, int]) -> Iterator[Finding]:
    topics = sorted({partition.topic for partition, *_ in known} & set(there))
    if not topics:
        return
    told = source.topic_ids(topics)
    if not told:
        yield ok("kafka", "topic ids are not told; the last stored record is compared with Kafka's")
    for topic, topic_id in told.items():
        recorded = {one for partition, _, _, one in known if partition.topic == topic and one}
        if recorded - {topic_id}:
            yield wrong(
                "kafka",
                f"topic {topic} was deleted and made anew since the log was read",
                "ingest it under another topic name or into another database",
            )


def _places(source: KafkaSource, known: _Known, there: Mapping[str, int]) -> Iterator[Finding]:
    """Whether Kafka still has what is to be read next."""
    faulty = False
    for partition, next_offset, _, _ in known:
        if partition.number >= there.get(partition.topic, 0):
            continue
        low, high = source.watermarks(partition)
        if next_offset < low:
            faulty = True
            yield wrong(
                "kafka",
                f"{partition}: {low - next_offset:,} offsets from {next_offset} on are gone",
                "run `pipeline ingest`, then see `pipeline gaps list`",
            )
        elif next_offset > high:
            faulty = True
            yield wrong(
                "kafka",
                f"{partition} ends at {high}, but the log has read up to {next_offset}: the topic "
                "was made anew, or this is another cluster",
                "ingest it under another topic name or into another database",
            )
    if known and not faulty:
        yield ok("kafka", "it still has what the log wants to read next, in every partition")

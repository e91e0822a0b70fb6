"""A session has our settings, whatever was set elsewhere; or it is refused, by name."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from confluent_kafka import Producer as KafkaProducer
from psycopg.sql import SQL, Identifier, Literal
from sqlalchemy import text

from pipeline.db import SessionLimits, open_engine, transaction
from pipeline.db import connection as connection_module
from pipeline.db.session import Ours, _wanted
from pipeline.db.session_settings import BOUNDED, BY_SETTINGS_OF_OURS, HARMLESS, PINNED, is_sorted
from pipeline.errors import ConfigurationError, ExitCode, LockHeldError, TransientError
from pipeline.log.append import driver_of
from pipeline.sandbox.servers.broker import MockBroker
from pipeline.sandbox.simulator import Chaos, Simulation
from pipeline.sandbox.simulator.producer import Producer
from tests.commands import InProcess, on_mock
from tests.integration.test_canaries import NEEDS_DATABASE, RUNS
from tests.records import envelope
from tests.servers.databases import Database, fresh_database
from tests.servers.pgbouncer import PgBouncer

TOPIC = "Notifications"
NAMES = Path(__file__).with_name("session_settings")
SOURCE = Path(__file__).parents[2]
OWN = """
SELECT name, vartype, setting, enumvals, min_val FROM pg_settings
WHERE context IN ('user', 'superuser', 'backend', 'superuser-backend') AND name !~ '[.]'
"""


@pytest.fixture
def pipeline(monkeypatch, capsys):
    return InProcess(monkeypatch, capsys)


@contextmanager
def engine_of(url, **options):
    engine = open_engine(url, application="test", **options)
    try:
        yield engine
    finally:
        engine.dispose()


# ------------------------------------------------------------------------------- the list is whole


@pytest.mark.both_postgres
def test_every_session_setting_is_classified(postgres_server):
    with psycopg.connect(postgres_server.dsn()) as db:
        found = [row[0] for row in db.execute(OWN)]

    assert len(found) > 150
    assert [name for name in found if not is_sorted(name)] == []


@pytest.mark.parametrize("version", [16, 17])
def test_every_session_setting_of_the_versions_between_is_classified(version):
    """Their names were read from real servers, 16.2 and 17.10, by the statement above."""
    found = (NAMES / f"{version}.txt").read_text().split()

    assert len(found) > 150
    assert [name for name in found if not is_sorted(name)] == []


def test_no_setting_is_classified_twice():
    kinds = [set(PINNED), set(BY_SETTINGS_OF_OURS), set(BOUNDED), set(HARMLESS)]

    assert sum(map(len, kinds)) == len(set().union(*kinds))


def test_no_statement_of_the_program_changes_a_setting_beyond_its_transaction():
    """RESET would bring back the value of the role or the database, not ours."""
    leak = re.compile(
        r"""["';]\s*(SET (?!LOCAL|TRANSACTION|ROLE)\w+ *(=|TO)|RESET (?!ROLE))"""
        r"""|set_config\([^)]*, false\)"""
    )
    files = [*SOURCE.glob("pipeline/**/*.py"), *SOURCE.glob("pipeline/**/*.sql")]

    leaks = [
        (path.name, found[0])
        for path in files
        if path.name != "session.py"
        for found in leak.finditer(path.read_text())
    ]

    assert leaks == []


def test_every_connection_of_the_program_is_opened_in_one_package():
    opening = re.compile(r"psycopg\.connect\(|Connection\.connect\(|create_engine\(")

    found = {
        path.parent.relative_to(SOURCE)
        for path in SOURCE.glob("pipeline/**/*.py")
        if opening.search(path.read_text())
    }

    assert found == {Path("pipeline/db")}


# ------------------------------------------------------------------------------------- odd values

# What no rule gives: texts, and where the smallest number is the usual one.
ODD = {
    "DateStyle": "German, DMY",
    "TimeZone": "Asia/Kathmandu",
    "timezone_abbreviations": "Australia",
    "client_encoding": "LATIN1",
    "lc_messages": "POSIX",
    "lc_monetary": "POSIX",
    "lc_numeric": "POSIX",
    "lc_time": "POSIX",
    "search_path": "pg_temp, decoy, public",
    "createrole_self_grant": "set, inherit",
    "restrict_nonsystem_relation_kind": "view, foreign-table",
    "default_table_access_method": "odd_heap",
    "default_tablespace": "no_such_tablespace",
    "temp_tablespaces": "no_such_tablespace",
    "default_text_search_config": "pg_catalog.german",
    "application_name": "odd",
    "bytea_output": "escape",
    "session_replication_role": "replica",
    "transaction_timeout": "500",
    "statement_timeout": "100",
    "lock_timeout": "1",
    "idle_in_transaction_session_timeout": "1",
    "idle_session_timeout": "500",
    "gin_fuzzy_search_limit": "1",
    "extra_float_digits": "-15",
    "commit_delay": "100",
    "temp_file_limit": "100000",
    "geqo_seed": "1",
    "synchronous_commit": "off",
    "vacuum_cost_delay": "1",
}
# PostgreSQL itself refuses a login that names a tablespace which does not exist.
NOT_AT_STARTUP = {"default_tablespace", "temp_tablespaces"}
# Of no effect beyond files and floods of the server's own log, or on the whole server's work.
LEFT_OUT = re.compile(
    r"log_.*|debug_print_.*|trace_.*|jit_.*|.*_preload_libraries|(dynamic_library|extension_control)_path|extension_destdir"
    r"|output_plugin_libraries|backtrace_functions|wal_consistency_checking|transaction_(?!timeout).*"
    r"|debug_discard_caches|post_auth_delay|ignore_system_indexes"
)
MADE_FIRST = """
CREATE SCHEMA decoy;
CREATE ACCESS METHOD odd_heap TYPE TABLE HANDLER heap_tableam_handler;
CREATE FUNCTION decoy.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS 'SELECT $2';
CREATE FUNCTION decoy.current_setting(text) RETURNS text LANGUAGE sql AS $$SELECT 'UTF8'$$
"""


def odd_values(server) -> dict[str, str]:
    """An odd value for every setting of a session that has one."""
    with psycopg.connect(server.dsn()) as db:
        rows = db.execute(OWN).fetchall()
    values = {}
    for name, kind, usual, words, least in rows:
        if LEFT_OUT.fullmatch(name):
            continue
        if name in ODD:
            values[name] = ODD[name]
        elif kind == "bool":
            values[name] = "off" if usual == "on" else "on"
        elif kind == "enum":
            values[name] = next((word for word in words if word != usual), usual)
        elif kind != "string":
            values[name] = least
    return values


SENT = [
    envelope(
        type="USER.CREATED", object={"id": secrets.token_hex(8), "last_name": "Jürgen Müßig €"}
    ),
    "Ümläute ohne JSON €".encode(),
    "LATIN1 ist kein UTF-8: ü".encode("latin-1"),
    b"\x00\xff",
    b'{"a": "\\u0000"}',
    b"",
]
COMMANDS = [
    ["ingest", "--until-end"],
    ["project", "--until-end"],
    ["rebuild", "users", "--jobs", "2"],
    ["status", "--json"],
    ["events", "--json", "--limit", "1000"],
    ["dead-letters", "list", "--json"],
    ["gaps", "list", "--json"],
    ["verify"],
    ["check", "--json"],
]


@pytest.fixture(scope="module")
def full_broker() -> Iterator[MockBroker]:
    """A few hundred events with chaos, and records that are none."""
    with MockBroker() as broker:
        broker.create_topic(TOPIC, 2)
        with Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
            producer.produce(Simulation(7, events=200, topic=TOPIC, partitions=2, chaos=Chaos()))
        raw = KafkaProducer({"bootstrap.servers": broker.bootstrap_servers})
        for value in SENT:
            raw.produce(TOPIC, value, key="schlüssel €", headers={"ä": "ö€".encode()}, partition=0)
        assert raw.flush(30) == 0
        yield broker


USUAL = """
SET statement_timeout = 0; SET search_path = pg_catalog; SET default_transaction_read_only = off;
SET client_encoding = 'UTF8'; SET TimeZone = 'UTC'; SET DateStyle = 'ISO, YMD';
SET bytea_output = 'hex'; SET extra_float_digits = 1; SET transform_null_equals = off;
SET restrict_nonsystem_relation_kind = ''
"""


def everything(database: Database) -> dict[str, list[tuple[str]]]:
    """All rows of the log and the read models, without when they were written."""
    found = {}
    with psycopg.connect(database.dsn, client_encoding="utf8", autocommit=True) as db:
        db.execute(USUAL)
        tables = db.execute(
            "SELECT schemaname || '.' || tablename FROM pg_tables "
            "WHERE schemaname = 'upvest' UNION ALL SELECT 'pipeline.events'"
        ).fetchall()
        for (table,) in tables:
            values = "to_jsonb(t) - '{ingested_at,_ingested_at}'::text[]"
            rows = db.execute(f"SELECT ({values})::text FROM {table} t ORDER BY 1")
            found[table] = rows.fetchall()
    return found


Run = tuple[list[int], list[str], dict[str, list[tuple[str]]]]


def whole_run(pipeline, database: Database, broker: MockBroker, url: str) -> Run:
    """Set up and run the commands; their exit codes, what they printed, and every row."""
    group = f"group-{database.name}"
    commands = on_mock(database, broker).with_(database_url=url, group_id=group)
    results = [pipeline(commands, *command) for command in [["migrate"], *COMMANDS]]
    problems = [
        (result.code, result.err[-1500:]) for result in results if "Traceback" in result.err
    ]
    assert problems == []
    shown = re.sub(r'"ingested_at": ?"[^"]*"', "", results[5].out)
    # Batches may be cut differently, and the newest batch is shown first.
    return [result.code for result in results], sorted(shown.splitlines()), everything(database)


def differing(found: Run, expected: Run) -> list[object]:
    """What differs between two runs, as little as shows it."""
    lines: list[object] = [
        pair for pair in zip(found[1], expected[1], strict=False) if pair[0] != pair[1]
    ]
    rows = [
        (table, row, others)
        for table, others in expected[2].items()
        for row in {*found[2][table]} ^ {*others}
    ]
    codes = [] if found[0] == expected[0] else [(found[0], expected[0])]
    return [*codes, *lines[:2], *[row[:2] for row in rows[:3]]]


_usual_runs: dict[tuple[str, str], Run] = {}


def usual_run(pipeline, server, broker: MockBroker) -> Run:
    """The same on a database where nobody has set anything; once per server and broker."""
    key = (server.dsn(), broker.bootstrap_servers)
    if key not in _usual_runs:
        with fresh_database(server) as plain:
            _usual_runs[key] = whole_run(pipeline, plain, broker, plain.dsn)
    return _usual_runs[key]


# Both versions by one way that the server knows and one that the client has.
WAYS = {18: ["role", "environment"], 15: ["database", "url"]}


@pytest.mark.faults
@pytest.mark.both_postgres
@pytest.mark.timeout(240)
def test_odd_values_of_all_settings_at_once_change_nothing(
    pipeline, postgres_server, pg_version, full_broker, monkeypatch
):
    """Set for the role and for the database, in the URL, in the environment."""
    values = odd_values(postgres_server)
    assert len(values) > 130
    expected = usual_run(pipeline, postgres_server, full_broker)
    assert expected[0][0] == ExitCode.DONE
    assert expected[0][1:4] == [ExitCode.DONE] * 3
    assert len(expected[2]["pipeline.events"]) > 200

    for way in WAYS[pg_version]:
        with odd_database(postgres_server, way, values, monkeypatch) as (odd, url):
            found = whole_run(pipeline, odd, full_broker, url)
        assert (way, differing(found, expected)) == (way, [])


@contextmanager
def odd_database(server, way, values, monkeypatch) -> Iterator[tuple[Database, str]]:
    """A database on which a session has odd values, by one of the ways, and how it is reached."""
    role = f"odd_{secrets.token_hex(4)}"
    with fresh_database(server) as database, monkeypatch.context() as patch:
        with database.connect() as db:
            db.execute(MADE_FIRST)
            db.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD 'x'")
            if way in {"role", "database"}:
                target = (
                    SQL("ROLE {}").format(Identifier(role))
                    if way == "role"
                    else SQL("DATABASE {}").format(Identifier(database.name))
                )
                for name, value in values.items():
                    db.execute(
                        SQL("ALTER {} SET {} = {}").format(
                            target, Identifier(name), parts(name, value)
                        )
                    )
        url = f"postgresql://{role}:x@{database.dsn.rpartition('@')[2]}"
        startup = " ".join(
            f"-c {name}={escaped(value)}"
            for name, value in values.items()
            if name not in NOT_AT_STARTUP
        )
        if way == "url":
            url += f"?options={quote(startup)}&client_encoding=LATIN1"
        if way == "environment":
            patch.setenv("PGOPTIONS", startup)
            patch.setenv("PGCLIENTENCODING", "LATIN1")
            patch.setenv("PGTZ", "America/Lima")
            patch.setenv("PGDATESTYLE", "SQL, DMY")
            patch.setenv("PGGEQO", "off")
        yield database, url
        for name in [name for name in os.environ if name.startswith("PG")]:
            patch.delenv(name)
    with psycopg.connect(server.dsn(), autocommit=True) as db:
        db.execute(f"DROP ROLE {role}")


def parts(name, value):
    listed = {"search_path", "temp_tablespaces"}
    return SQL(", ").join(map(Literal, value.split(", "))) if name in listed else Literal(value)


def escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


# ------------------------------------------------------------------------------ one after the other


@pytest.mark.both_postgres
def test_each_pinned_setting_has_our_value_in_every_session(database, postgres_server):
    """By a role that is no superuser, at each checkout; what it may not set is refused by name."""
    role = f"plain_{secrets.token_hex(4)}"
    odd = odd_values(postgres_server)
    wanted = _wanted(Ours(idle_in_transaction_ms=10_000, lock_wait_ms=10_000))
    url = f"postgresql://{role}:x@{database.dsn.rpartition('@')[2]}"
    refused: dict[str, str] = {}
    with database.connect() as db:
        db.execute("CREATE ACCESS METHOD odd_heap TYPE TABLE HANDLER heap_tableam_handler")
        db.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        for name in [*wanted, "default_transaction_read_only"]:
            if name not in odd:
                continue
            db.execute(f"ALTER ROLE {role} RESET ALL")
            form = SQL("ALTER ROLE {} SET {} = {}")
            db.execute(form.format(Identifier(role), Identifier(name), parts(name, odd[name])))
            with engine_of(url) as engine:
                try:
                    with transaction(engine) as ours:
                        shown = ours.execute(text(f'SHOW "{name}"')).scalar_one()
                except ConfigurationError as error:
                    refused[name] = str(error)
                    continue
            assert shown == wanted.get(name, "off"), name
        db.execute(f"DROP ROLE {role}")

    assert sorted(refused) == sorted(name for name, pin in PINNED.items() if not pin.settable)
    assert (
        f"ALTER ROLE {role} RESET session_replication_role" in refused["session_replication_role"]
    )
    assert "'replica'" in refused["session_replication_role"]
    assert "must be 'origin'" in refused["session_replication_role"]


def test_text_is_utf_8_for_the_driver_too(database, monkeypatch):
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")

    with engine_of(database.dsn) as engine, transaction(engine) as db:
        assert driver_of(db).info.encoding == "utf-8"
        assert db.execute(text("SELECT :name"), {"name": "Müßig €"}).scalar_one() == "Müßig €"


def test_a_read_only_server_is_waited_for_and_can_be_read(database):
    """Providers do so when the disk is nearly full; whereas a role's own setting is overruled."""
    with fresh_server_setting(database, "default_transaction_read_only", "on"):
        with (
            engine_of(database.dsn) as engine,
            pytest.raises(TransientError, match="it is read-only"),
            transaction(engine),
        ):
            pass
        with engine_of(database.dsn, read_only=True) as engine, transaction(engine) as db:
            assert db.execute(text("SHOW transaction_read_only")).scalar_one() == "on"


@contextmanager
def fresh_server_setting(database, name, value):
    with database.connect() as db:
        db.execute("SET default_transaction_read_only = off")
        db.execute(f"ALTER SYSTEM SET {name} = {value}")
        db.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            db.execute(f"ALTER SYSTEM RESET {name}")
            db.execute("SELECT pg_reload_conf()")


@pytest.mark.both_postgres
def test_security_definer_functions_use_no_schema_of_others(database):
    with database.connect() as db:
        found = db.execute(
            "SELECT p.oid::regprocedure::text, p.proconfig FROM pg_proc p "
            "JOIN pg_namespace n ON n.oid = p.pronamespace "
            "WHERE n.nspname IN ('pipeline', 'upvest') AND p.prosecdef"
        ).fetchall()

    assert len(found) >= 5
    pinned = ["search_path=pg_catalog, pg_temp"]
    assert [name for name, config in found if config != pinned] == []


# --------------------------------------------------------------------------------------- encodings


@pytest.fixture(scope="module")
def latin_database(postgres_server_18):
    name = f"latin_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_server_18.dsn(), autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
        yield Database(postgres_server_18, name)
        db.execute(f"DROP DATABASE {name} (FORCE)")


@pytest.mark.faults
@pytest.mark.parametrize("command", NEEDS_DATABASE)
def test_every_command_reports_a_database_that_is_not_utf_8(
    pipeline, latin_database, full_broker, command
):
    arguments = [*command.split(), *RUNS[command][0]]

    result = pipeline(on_mock(latin_database, full_broker), *arguments)

    assert result.code == ExitCode.CONFIGURATION
    assert "has encoding LATIN1" in result.out + result.err
    assert "ENCODING 'UTF8'" in result.out + result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "EUC_JP", "MULE_INTERNAL"])
def test_a_database_without_conversion_to_utf_8_is_reported_too(postgres_server_18, encoding):
    name = f"other_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_server_18.dsn(), autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
        with (
            engine_of(postgres_server_18.dsn(name)) as engine,
            pytest.raises(ConfigurationError, match=f"has encoding {encoding}"),
            transaction(engine),
        ):
            pass
        db.execute(f"DROP DATABASE {name}")


# ----------------------------------------------------------------------------------------- poolers


@pytest.mark.faults
@pytest.mark.pgbouncer
@pytest.mark.timeout(240)
def test_session_pooling_works_with_pgbouncers_default_settings(
    pipeline, postgres_server, full_broker
):
    with fresh_database(postgres_server) as pooled, PgBouncer(postgres_server) as pooler:
        found = whole_run(pipeline, pooled, full_broker, pooler.dsn(pooled.name))

    assert differing(found, usual_run(pipeline, postgres_server, full_broker)) == []


@pytest.mark.pgbouncer
@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"default_pool_size": "1"},
        {"server_round_robin": "1", "min_pool_size": "3"},
        {"server_reset_query_always": "1"},
    ],
    ids=lambda settings: "-".join(settings) or "as it comes",
)
def test_a_pooler_that_shares_sessions_is_refused(postgres_server, database, mode, settings):
    with (
        PgBouncer(postgres_server, mode, settings) as pooler,
        engine_of(pooler.dsn(database.name)) as engine,
    ):
        for _ in range(3):
            with (
                pytest.raises(ConfigurationError, match="pool_mode = session"),
                transaction(engine),
            ):
                pass


@pytest.mark.pgbouncer
def test_session_pooling_is_accepted_though_every_session_is_in_use(postgres_server, database):
    with (
        PgBouncer(postgres_server, "session", {"default_pool_size": "1"}) as pooler,
        engine_of(pooler.dsn(database.name)) as engine,
        transaction(engine) as db,
    ):
        assert db.execute(text("SHOW TimeZone")).scalar_one() == "UTC"


@pytest.mark.pgbouncer
def test_the_holder_of_a_lock_is_named_through_a_pooler_with_any_settings(
    postgres_server, database, monkeypatch
):
    """The session that asks has our settings too; the pooler gives out another process id."""
    monkeypatch.setattr(connection_module, "LOCK_CHECK_S", 0.2)
    # Long enough for two logins through the pooler on a busy machine.
    impatient = SessionLimits(lock_wait=timedelta(seconds=4))
    with database.connect() as db, PgBouncer(postgres_server) as pooler:
        db.execute(f"ALTER DATABASE {database.name} SET DateStyle = 'German, DMY'")
        db.execute(f"ALTER DATABASE {database.name} SET search_path = decoy, public")
        with (
            database.connect(autocommit=False) as holder,
            engine_of(pooler.dsn(database.name), limits=impatient) as engine,
        ):
            holder.execute("LOCK TABLE pipeline.gaps")
            pid = holder.execute("SELECT pg_backend_pid()").fetchone()[0]

            with pytest.raises(LockHeldError, match=f"locked by session {pid}"):
                lock_gaps(engine)


def lock_gaps(engine):
    with transaction(engine) as db:
        db.execute(text("LOCK TABLE pipeline.gaps"))


@pytest.mark.pgbouncer
@pytest.mark.parametrize(
    ("variable", "value", "parameter"),
    [("PGOPTIONS", "-c geqo=off", "options"), ("PGGEQO", "off", "geqo")],
)
def test_a_setting_of_the_environment_that_pgbouncer_refuses_is_named(
    postgres_server, database, monkeypatch, variable, value, parameter
):
    with PgBouncer(postgres_server) as pooler, engine_of(pooler.dsn(database.name)) as engine:
        monkeypatch.setenv(variable, value)

        with pytest.raises(ConfigurationError) as refused, transaction(engine):
            pass

    assert f"startup parameter {parameter}: remove {variable}" in str(refused.value)
    assert str(pooler.port) in str(refused.value)

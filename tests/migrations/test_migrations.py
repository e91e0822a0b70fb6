"""The schema: up, down, up again, twice, by two at once, and after a crash half-way."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text

from pipeline.db import LOG_SCHEMA, SessionLimits, metadata, open_engine
from pipeline.errors import ConfigurationError, TransientError
from pipeline.schema import migrate as migrating
from pipeline.schema import revisions as applying
from pipeline.schema.bookkeeping import declare_tables
from pipeline.schema.migrate import migrate
from pipeline.schema.revisions import check_schema
from tests.commands import Commands, InProcess

FOLDER = Path(__file__).resolve().parents[2] / "migrations"
OURS = ("pipeline", "pipeline_segments", "pipeline_shadow", "upvest", "upvest_personal")

# Everything that a migration can leave behind, with its text where it has one.
CATALOGUE = """
SELECT 'relation', c.oid::regclass::text, c.relkind::text, pg_get_viewdef(c.oid) AS said
FROM pg_class c WHERE c.relnamespace::regnamespace::text = ANY(:schemas) AND c.relkind <> 'v'
UNION ALL
SELECT 'view', c.oid::regclass::text, '', pg_get_viewdef(c.oid)
FROM pg_class c WHERE c.relnamespace::regnamespace::text = ANY(:schemas) AND c.relkind = 'v'
UNION ALL
SELECT 'column', a.attrelid::regclass::text || '.' || a.attname,
       format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull || ' '
       || row_number() OVER (PARTITION BY a.attrelid ORDER BY a.attnum),
       coalesce(col_description(a.attrelid, a.attnum), '')
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace::regnamespace::text = ANY(:schemas) AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'function', p.oid::regprocedure::text, p.prosecdef::text, p.prosrc
FROM pg_proc p WHERE p.pronamespace::regnamespace::text = ANY(:schemas)
UNION ALL
SELECT 'trigger', t.tgrelid::regclass::text || '.' || t.tgname, t.tgenabled::text,
       pg_get_triggerdef(t.oid)
FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
WHERE c.relnamespace::regnamespace::text = ANY(:schemas) AND NOT t.tgisinternal
UNION ALL
SELECT 'constraint', c.conrelid::regclass::text || '.' || c.conname, c.contype::text,
       pg_get_constraintdef(c.oid)
FROM pg_constraint c WHERE c.connamespace::regnamespace::text = ANY(:schemas)
UNION ALL
SELECT 'schema', n.nspname, '', coalesce(obj_description(n.oid), '')
FROM pg_namespace n WHERE n.nspname = ANY(:schemas)
ORDER BY 1, 2, 3, 4
"""


@pytest.fixture
def connection(empty_database):
    engine = create_engine(empty_database.url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def migrated(database):
    engine = create_engine(database.url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def catalogue(db: Connection) -> list[tuple[object, ...]]:
    found = [tuple(row) for row in db.execute(text(CATALOGUE), {"schemas": list(OURS)})]
    db.rollback()
    return found


def config(db: Connection) -> Config:
    config = Config(attributes={"connection": db})
    config.set_main_option("script_location", str(FOLDER))
    return config


def revisions() -> list[str]:
    """Oldest first."""
    return [script.revision for script in ScriptDirectory(str(FOLDER)).walk_revisions()][::-1]


# ---------------------------------------------------------------------------------------- scripts


def test_migrations_have_one_head_and_consecutive_numbers():
    scripts = ScriptDirectory(str(FOLDER))

    assert len(scripts.get_heads()) == 1
    assert revisions() == [f"{n + 1:04}" for n in range(len(revisions()))]
    for script in scripts.walk_revisions():
        assert Path(script.path).name.startswith(f"{script.revision}_")


def test_a_migration_imports_nothing_of_the_program_and_documents_its_lock():
    """It must do in a year what it does today, and an operator reads what it stops."""
    for file in sorted((FOLDER / "versions").glob("*.py")):
        source = file.read_text()

        assert "import pipeline" not in source, file.name
        assert "from pipeline" not in source, file.name
        assert "Lock:" in source.split('"""')[1], file.name


# -------------------------------------------------------------------------------------- up and down


@pytest.mark.both_postgres
def test_down_and_up_again_leaves_the_same_schema(connection):
    command.upgrade(config(connection), "head")
    first = catalogue(connection)

    command.downgrade(config(connection), "base")
    nothing = catalogue(connection)
    command.upgrade(config(connection), "head")

    assert {row[1] for row in nothing if "alembic_version" not in str(row[1])} == {"pipeline"}
    assert catalogue(connection) == first


def test_each_step_down_and_up_again_leaves_the_same_schema(connection):
    for revision in revisions():
        command.upgrade(config(connection), revision)
        above = catalogue(connection)

        command.downgrade(config(connection), "-1")
        command.upgrade(config(connection), revision)

        assert catalogue(connection) == above, revision


@pytest.mark.both_postgres
def test_the_declared_tables_and_the_migrations_agree_with_all_comments(migrated):
    declare_tables()
    context = MigrationContext.configure(
        migrated,
        opts={
            "version_table_schema": LOG_SCHEMA,
            "include_schemas": True,
            "include_name": lambda name, kind, _parents: kind != "schema" or name == LOG_SCHEMA,
            "compare_server_default": True,
        },
    )

    assert compare_metadata(context, metadata) == []


def in_a_fresh_process(script: str, *arguments: str) -> str:
    """What a script prints in a process that has imported nothing else."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def test_a_migration_that_a_fresh_process_generates_is_empty(database, tmp_path):
    """Whatever happens to be imported: the metadata is whole."""
    shutil.copytree(FOLDER, tmp_path / "migrations", ignore=shutil.ignore_patterns("__pycache__"))

    in_a_fresh_process(
        "import sys; from pathlib import Path; from tests.new_migration import write; "
        "write(sys.argv[1], 'nothing', Path(sys.argv[2]))",
        database.url,
        str(tmp_path / "migrations"),
    )

    [file] = (tmp_path / "migrations" / "versions").glob("*_nothing.py")
    assert file.name == f"{len(revisions()) + 1:04}_nothing.py"
    assert "op." not in file.read_text().partition("def upgrade")[2]


NEW_TABLE = """
import sys
from pathlib import Path
from sqlalchemy import BigInteger, Column, DateTime, Identity, Table, Text, text
from pipeline.db import metadata
from tests.new_migration import write

Table(
    "fees", metadata,
    Column("fee_id", BigInteger, Identity(), primary_key=True, comment="In order."),
    Column("topic", Text(collation="C"), nullable=False, comment="Kafka topic."),
    Column("at", DateTime(timezone=True), server_default=text("now()"), comment="When."),
    schema="pipeline", comment="100% of the fees.",
)
write(sys.argv[1], sys.argv[3], Path(sys.argv[2]))
"""


def test_a_generated_migration_makes_a_new_table_of_the_bookkeeping_and_the_next_is_empty(
    database, tmp_path, monkeypatch
):
    folder = tmp_path / "migrations"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(applying, "_IN_WHEEL", folder)
    number = len(revisions()) + 1

    in_a_fresh_process(NEW_TABLE, database.url, str(folder), "add fees")
    applied = migrate(database.url).applied
    in_a_fresh_process(NEW_TABLE, database.url, str(folder), "nothing")

    assert applied == [f"{number:04}"]
    [generated] = folder.glob(f"versions/{number:04}_add_fees.py")
    assert "import pipeline" not in generated.read_text()
    [empty] = folder.glob(f"versions/{number + 1:04}_nothing.py")
    assert "op." not in empty.read_text().partition("def upgrade")[2]
    with database.connect() as db:
        found = db.execute(
            "SELECT column_name, data_type, is_nullable, collation_name, "
            "col_description('pipeline.fees'::regclass, ordinal_position::int) "
            "FROM information_schema.columns WHERE table_name = 'fees' ORDER BY ordinal_position"
        ).fetchall()
        comment = db.execute("SELECT obj_description('pipeline.fees'::regclass)").fetchone()
    assert found == [
        ("fee_id", "bigint", "NO", None, "In order."),
        ("topic", "text", "NO", "C", "Kafka topic."),
        ("at", "timestamp with time zone", "YES", None, "When."),
    ]
    assert comment == ("100% of the fees.",)


def test_every_module_that_declares_a_table_is_imported_by_declare_tables():
    missing = in_a_fresh_process(
        "import pkgutil, pipeline; from importlib import import_module; "
        "from pipeline.schema.bookkeeping import declare_tables; from pipeline.db import metadata; "
        "declare_tables(); known = set(metadata.tables); "
        "[import_module(it.name) for it in pkgutil.walk_packages(pipeline.__path__, 'pipeline.') "
        "if not it.name.endswith('__main__')]; print(sorted(set(metadata.tables) - known))"
    )

    assert missing.strip() == "[]"


@pytest.mark.both_postgres
def test_every_table_view_and_column_has_a_comment(migrated):
    silent = text("""
        SELECT c.oid::regclass::text || coalesce('.' || a.attname, '')
        FROM pg_class c
        LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace IN ('pipeline'::regnamespace, 'upvest'::regnamespace)
          AND c.relkind IN ('r', 'p', 'v', 'm') AND c.relname <> 'alembic_version'
          AND (coalesce(obj_description(c.oid), '') = ''
               OR coalesce(col_description(c.oid, a.attnum), '') = '')
        UNION ALL
        SELECT p.oid::regprocedure::text FROM pg_proc p
        WHERE p.pronamespace IN ('pipeline'::regnamespace, 'upvest'::regnamespace)
          AND coalesce(obj_description(p.oid), '') = ''
        ORDER BY 1
    """)

    assert list(migrated.execute(silent).scalars()) == []


# ----------------------------------------------------------------------------- twice, two, half-way


@pytest.mark.both_postgres
def test_migrating_twice_does_nothing_the_second_time(empty_database):
    assert migrate(empty_database.url).applied == revisions()
    assert migrate(empty_database.url).applied == []


def test_two_concurrent_migrations_change_the_schema_once(empty_database):
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(migrate, [empty_database.url] * 2))

    assert sorted((report.applied for report in reports), key=len) == [[], revisions()]


def migrate_in_a_process(url: str, failpoint: str) -> int:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys; from pipeline import failpoints; from pipeline.schema import migrate; "
            "failpoints.arm(os.environ); migrate.migrate(sys.argv[1])",
            url,
        ],
        env={
            **os.environ,
            "PIPELINE_ENABLE_FAILPOINTS": "1",
            "PIPELINE_FAILPOINT": failpoint,
        },
        check=False,
        timeout=60,
        cwd=FOLDER.parent,
    ).returncode


@pytest.mark.faults
@pytest.mark.parametrize("step", [1, len(revisions())])
def test_a_migration_that_was_killed_half_way_is_completed_by_the_next(
    empty_database, connection, migrated, step
):
    whole = catalogue(migrated)

    status = migrate_in_a_process(empty_database.url, f"mid_migration@{step}:kill")

    assert status == -signal.SIGKILL
    assert migrate(empty_database.url).applied == revisions()[step - 1 :]
    assert catalogue(connection) == whole


def test_a_migration_that_fails_half_way_leaves_the_previous_revision(empty_database):
    status = migrate_in_a_process(empty_database.url, "mid_migration@2:raise:40001")

    assert status == 1
    with empty_database.connect() as db:
        assert db.execute("SELECT version_num FROM pipeline.alembic_version").fetchall() == [
            ("0001",)
        ]
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^pipeline'"
        assert db.execute(sessions).fetchone() == (0,)


# ---------------------------------------------------------------------------------------- refusals


def test_a_schema_from_a_newer_program_is_refused(database):
    engine = open_engine(database.url, application="test")
    with database.connect() as db:
        db.execute("UPDATE pipeline.alembic_version SET version_num = '9999'")

    with pytest.raises(ConfigurationError, match=r"revision 9999.*newer") as refused:
        migrate(database.url)
    with pytest.raises(ConfigurationError, match=r"revision 9999.*newer"):
        check_schema(engine)

    assert refused.value.exit_code == 78
    engine.dispose()


@pytest.mark.parametrize(("at", "told"), [(None, "none"), ("0001", "0001")])
def test_an_older_schema_is_refused_with_what_to_do(connection, empty_database, at, told):
    engine = open_engine(empty_database.url, application="test")
    if at:
        command.upgrade(config(connection), at)

    with pytest.raises(ConfigurationError, match=rf"revision {told}.*run `pipeline migrate`"):
        check_schema(engine)
    migrate(empty_database.url)

    check_schema(engine)
    engine.dispose()


def test_a_role_that_may_not_create_schemas_gets_an_error_that_names_it(empty_database):
    with empty_database.connect() as db:
        db.execute("DROP ROLE IF EXISTS newcomer")
        db.execute("CREATE ROLE newcomer LOGIN PASSWORD 'newcomer'")
    url = f"postgresql+psycopg://newcomer:newcomer@{empty_database.url.rpartition('@')[2]}"

    with pytest.raises(ConfigurationError, match="42501"):
        migrate(url)


def test_a_migration_waits_for_no_lock_longer_than_it_may(empty_database, monkeypatch):
    """A migration in a queue for a table holds up everybody behind it."""
    impatient = SessionLimits(lock_wait=timedelta(milliseconds=200))
    monkeypatch.setattr(migrating, "open_engine", partial(open_engine, limits=impatient))
    migrate(empty_database.url)

    with empty_database.connect(autocommit=False) as somebody:
        somebody.execute("LOCK TABLE pipeline.alembic_version IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(TransientError) as refused:
            migrate(empty_database.url)

    assert refused.value.sqlstate == "55P03"
    assert migrate(empty_database.url).applied == []


# ------------------------------------------------------------------- what others made on our tables

CHANGES = {
    "drop column": "ALTER TABLE upvest.orders DROP COLUMN side",
    "alter column": "ALTER TABLE upvest.orders ALTER COLUMN side TYPE varchar(99)",
    "drop view": "DROP VIEW upvest.holdings",
    "add column": "ALTER TABLE upvest.orders ADD COLUMN more int DEFAULT 1",
    "drop table": "DROP TABLE upvest.orders",
}
OBJECTS = {
    "view": "VIEW {name} AS SELECT side FROM upvest.orders",
    "two views": "VIEW {name} AS SELECT side FROM upvest.orders; "
    "CREATE VIEW bi.another AS SELECT side FROM upvest.orders",
    "view of a view": "VIEW {name} AS SELECT quantity FROM upvest.holdings",
    "materialized view": "MATERIALIZED VIEW {name} AS SELECT side FROM upvest.orders",
    "function": "FUNCTION {name}() RETURNS text BEGIN ATOMIC SELECT side FROM upvest.orders; END",
    "rows": "TABLE {name} (a_row upvest.orders)",
    "foreign key": "TABLE {name} (id uuid REFERENCES upvest.orders)",
}
BLOCKED = [
    ("drop column", "view", 'view bi."My View"'),
    ("drop column", "materialized view", 'materialized view bi."My View"'),
    ("drop column", "function", 'function bi."My View"()'),
    ("alter column", "two views", "rule _RETURN on view bi.another"),
    ("alter column", "view", 'rule _RETURN on view bi."My View"'),
    ("alter column", "materialized view", 'rule _RETURN on materialized view bi."My View"'),
    ("alter column", "function", 'function bi."My View"()'),
    ("drop view", "view of a view", 'view bi."My View"'),
    ("add column", "rows", 'column bi."My View".a_row'),
    ("drop table", "rows", 'column a_row of table bi."My View"'),
    ("drop table", "foreign key", 'constraint My View_id_fkey on table bi."My View"'),
]


@pytest.fixture
def anna(database):
    """A role that may read our tables and views, and refer to them; her name."""
    name = f"anna_{database.name}"
    with database.connect() as db:
        db.execute(f"CREATE ROLE {name}")
        db.execute(f"GRANT USAGE ON SCHEMA upvest TO {name}")
        db.execute(f"GRANT SELECT, REFERENCES ON ALL TABLES IN SCHEMA upvest TO {name}")
        yield name
        db.execute(f"DROP OWNED BY {name} CASCADE")
        db.execute(f"DROP ROLE {name}")


@pytest.mark.both_postgres
def test_a_migration_that_objects_of_others_block_names_them_and_their_owners(
    database, migrated, anna, tmp_path, monkeypatch, capsys
):
    """Views, materialized views, functions, tables: whatever PostgreSQL refuses a change for."""
    shutil.copytree(FOLDER, tmp_path / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(applying, "_IN_WHEEL", tmp_path / "migrations")
    newest = tmp_path / "migrations" / "versions" / "9999_change.py"
    before = catalogue(migrated)
    run = InProcess(monkeypatch, capsys)

    for change, kind, named in BLOCKED:
        newest.write_text(
            f"from alembic import op\nrevision, down_revision = '9999', '{revisions()[-1]}'\n"
            f"def upgrade(): op.execute({CHANGES[change]!r})\n"
        )
        with database.connect() as db:
            db.execute(f"CREATE SCHEMA bi AUTHORIZATION {anna}; SET ROLE {anna}")
            db.execute("CREATE " + OBJECTS[kind].format(name='bi."My View"'))
            # Another object, whose name begins with that of the first, is in nobody's way.
            db.execute('CREATE VIEW bi."My View 2" AS SELECT 1')

            done = run(Commands(database_url=database.dsn), "migrate")

            assert done.code == 78, (change, kind, done.err)
            assert f"{named} (owner {anna})" in done.err
            assert "My View 2" not in done.err
            assert catalogue(migrated) == before
            db.execute("RESET ROLE; DROP SCHEMA bi CASCADE")

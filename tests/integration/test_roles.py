"""Least privilege: every role is tried with what it must not do, and at what it is for.

Logins connect as people's do; the rights are those that ``pipeline migrate --roles`` gives.
"""

import json
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg
import pytest
from confluent_kafka import Producer
from sqlalchemy import Engine, text

from pipeline import catalogue
from pipeline.db import open_engine, transaction
from pipeline.errors import ConfigurationError
from pipeline.projection.loop import run_projection
from pipeline.projectors.orders import orders
from pipeline.readmodel import EntityTable, uuid
from pipeline.readmodel import text as text_field
from pipeline.readmodel.fields import looks_personal
from pipeline.readmodel.model import personal_columns
from pipeline.rebuild.rebuild import StoppedError, rebuild
from pipeline.schema.migrate import migrate, planned_roles
from pipeline.schema.roles import ROLES
from tests.commands import InProcess, on_mock
from tests.declared import with_field, with_models
from tests.given import (
    order_event,
    sample_events,
    some_id,
)
from tests.read_models_page import questions
from tests.servers.databases import Database

TOPIC = "Notifications"
NOT_OWNER = tuple(role for role in ROLES if role != "owner")


class Cast:
    """The roles of one database, under a prefix of its own, and logins that have them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.prefix = f"t{secrets.token_hex(4)}_"
        self._logins: list[str] = []

    def make(self) -> None:
        """As an operator does, with a superuser's login."""
        migrate(self.database.url, with_roles=True, role_prefix=self.prefix)

    def login(self, *names: str, options: str = "") -> str:
        """A new login that has these roles; its name."""
        login = f"{self.prefix}login_{len(self._logins)}"
        self._logins.append(login)
        with self.database.connect() as db:
            db.execute(f"CREATE ROLE {login} LOGIN PASSWORD 'x' {options}".encode())
            for name in names:
                db.execute(f"GRANT {self.prefix}{name} TO {login}".encode())
        return login

    def url(self, *names: str, options: str = "") -> str:
        """The database, as a new login with these roles sees it."""
        return self.url_of(self.login(*names, options=options))

    def url_of(self, login: str) -> str:
        parts = urlsplit(self.database.dsn)
        address = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=f"{login}:x@{address}").geturl()

    def connect(self, *names: str) -> psycopg.Connection:
        return psycopg.connect(self.url(*names), autocommit=True)

    @contextmanager
    def engine(self, *names: str) -> Iterator[Engine]:
        """As the program connects, with a new login."""
        url = self.url(*names).replace("postgresql://", "postgresql+psycopg://")
        engine = open_engine(url, application="test")
        try:
            yield engine
        finally:
            engine.dispose()

    @contextmanager
    def acting_as_owner(self) -> Iterator[Engine]:
        """As a migration runs."""
        with self.engine("owner") as engine, self.database.connect() as db:
            db.execute(f"ALTER ROLE {self._logins[-1]} SET role = {self.prefix}owner".encode())
            yield engine

    def end(self) -> None:
        """Leave the server without them."""
        with self.database.connect() as db:
            there = [row[0] for row in db.execute("SELECT rolname FROM pg_roles").fetchall()]
            ours = [name for name in there if name.startswith(self.prefix)]
            for name in ours:
                db.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER".encode())
                db.execute(f"DROP OWNED BY {name}".encode())
            for name in ours:
                db.execute(f"DROP ROLE {name}".encode())


@pytest.fixture
def cast(given) -> Iterator[Cast]:
    made = Cast(given.database)
    made.make()
    yield made
    made.end()


@pytest.fixture
def bare(database: Database) -> Iterator[Cast]:
    """A migrated database that has no roles yet."""
    made = Cast(database)
    yield made
    made.end()


@pytest.fixture
def other(empty_database: Database) -> Iterator[Cast]:
    """Another migrated database of the same server, without roles yet."""
    migrate(empty_database.url)
    made = Cast(empty_database)
    yield made
    made.end()


@pytest.fixture
def pipeline(monkeypatch, capsys):
    return InProcess(monkeypatch, capsys)


# -------------------------------------------------------------------------------- what is forbidden

TO_ALL = """
UPDATE pipeline.events SET problem = 'x'
DELETE FROM pipeline.events
TRUNCATE pipeline.events
UPDATE pipeline_segments.{segment} SET problem = 'x'
DELETE FROM pipeline_segments.{segment}
TRUNCATE pipeline_segments.{segment}
INSERT INTO pipeline_segments.{segment} SELECT * FROM pipeline.events
ALTER TABLE pipeline.events DISABLE TRIGGER append_only
ALTER TABLE pipeline.events DETACH PARTITION pipeline_segments.{segment}
DROP TABLE pipeline.events
DROP TABLE upvest.orders
ALTER TABLE upvest.orders ADD COLUMN x text
ALTER TABLE upvest.orders DISABLE TRIGGER refill_after_truncate
CREATE TRIGGER x BEFORE INSERT ON pipeline.events EXECUTE FUNCTION pipeline.refuse_change()
CREATE TABLE pipeline.x ()
CREATE TABLE pipeline_segments.x ()
CREATE TABLE pipeline_shadow.x ()
CREATE TABLE upvest.x ()
CREATE SCHEMA x
CREATE OR REPLACE VIEW upvest.holdings AS SELECT 1
CREATE OR REPLACE FUNCTION pipeline.reject() RETURNS boolean LANGUAGE sql AS 'SELECT true'
ALTER FUNCTION pipeline.make_segment SECURITY INVOKER
DROP FUNCTION pipeline.refuse_change CASCADE
UPDATE pipeline.alembic_version SET version_num = '0001'
UPDATE pipeline.installation SET installation_id = gen_random_uuid()
INSERT INTO pipeline.segments VALUES ('x', 'x', 0, 1)
DELETE FROM pipeline.consumer_offsets
DELETE FROM pipeline.gaps
UPDATE pipeline.gaps SET accepted_at = now()
SELECT pipeline.watch_read_model('upvest.orders', 'x')
SELECT pipeline.grants_of('upvest.orders')
SELECT pipeline.own_views_on('upvest.orders')
SELECT pipeline.start_again('orders', true)
UPDATE pipeline.declared_objects SET definition = 'x'
DELETE FROM pipeline.schema_changes
SELECT pipeline.read_model_truncated()
SET session_replication_role = replica
SET ROLE {prefix}owner
GRANT {prefix}owner TO {prefix}analyst
"""
WRITES_OF_INGEST = """
INSERT INTO pipeline.events (topic, "partition", "offset") VALUES ('Notifications', 0, 99)
INSERT INTO pipeline.consumer_offsets VALUES ('x', 0, 0, 0)
UPDATE pipeline.consumer_offsets SET next_offset = next_offset + 1
INSERT INTO pipeline.gaps (topic, "partition", first_offset, end_offset, reason)
  VALUES ('x', 0, 0, 1, 'x')
UPDATE pipeline.gaps SET end_offset = 99
SELECT pipeline.make_segment('x', 0, 1000)
"""
WRITES_OF_PROJECT = """
INSERT INTO upvest.orders SELECT * FROM upvest.orders
UPDATE upvest.orders SET status = 'x'
DELETE FROM upvest.orders
TRUNCATE upvest.orders
UPDATE pipeline.projection_checkpoints SET next_offset = 0
UPDATE pipeline.projectors SET state = 'live'
DELETE FROM pipeline.dead_letters
SELECT pipeline.make_shadow('orders')
SELECT pipeline.drop_shadow('orders')
SELECT pipeline.must_swap('orders')
SELECT pipeline.others_on('orders')
SELECT pipeline.make_shadow('orders'), pipeline.swap_read_model('orders')
"""
ACCEPTING = "SELECT pipeline.accept_gap('Notifications', 0)"
PAYLOADS = """
SELECT payload FROM pipeline.events
SELECT count(*) FROM pipeline.events
SELECT payload FROM pipeline_segments.{segment}
SELECT * FROM pipeline.consumer_offsets
SELECT * FROM pipeline.dead_letters
SELECT * FROM pipeline.alembic_version
"""
VIEW_WRITES = """
UPDATE upvest.users SET status = 'x'
DELETE FROM upvest.users
"""
PERSONAL_DATA = """
SELECT first_name FROM upvest_personal.users
SELECT user_id FROM upvest_personal.users
SELECT * FROM upvest_personal.users
SELECT to_jsonb(u) ->> 'first_name' FROM upvest_personal.users u
TABLE upvest_personal.users
COPY upvest_personal.users TO STDOUT
SELECT name FROM upvest_personal.accounts
SELECT securities_account_number FROM upvest_personal.account_groups
SELECT tax_details FROM upvest_personal.cash_transactions
SELECT confirmed_address FROM upvest_personal.user_checks
"""
FORBIDDEN = {
    "ingest": (TO_ALL, WRITES_OF_PROJECT, ACCEPTING, PERSONAL_DATA),
    "project": (TO_ALL, WRITES_OF_INGEST, ACCEPTING),
    "operator": (TO_ALL, WRITES_OF_INGEST),
    "analyst": (
        *(TO_ALL, WRITES_OF_INGEST, WRITES_OF_PROJECT, ACCEPTING, PAYLOADS, VIEW_WRITES),
        PERSONAL_DATA,
    ),
    "personal_data": (
        *(TO_ALL, WRITES_OF_INGEST, WRITES_OF_PROJECT, ACCEPTING, PAYLOADS, VIEW_WRITES),
    ),
}


def statements_of(blocks: tuple[str, ...], **names: str) -> list[str]:
    lines = "\n".join(blocks).replace("\n  ", " ").format(**names).splitlines()
    return [line for line in lines if line]


def outcome(db: psycopg.Connection, statement: str) -> str | None:
    """The SQLSTATE and text of a refusal; None if it went through, which is undone."""
    try:
        with db.transaction(force_rollback=True):
            if statement.startswith("COPY"):
                with db.cursor() as cursor, cursor.copy(statement.encode()) as copy:
                    list(copy)
            else:
                db.execute(statement.encode())
    except psycopg.Error as error:
        return f"{error.sqlstate} {error.diag.message_primary}"
    return None


# In PostgreSQL's words, so that it is the rights that refuse, and not a trigger behind them.
BY_RIGHTS = ("42501 permission denied", "42501 must be owner of", "42501 must have admin")


@pytest.mark.both_postgres
def test_no_role_has_a_right_outside_its_purpose(given, cast):
    given(sample_events()).project(*catalogue.load().models)
    segment = given.scalar("SELECT segment FROM pipeline.segments")

    got_through = {}
    for role in NOT_OWNER:
        with cast.connect(role) as db:
            for statement in statements_of(FORBIDDEN[role], segment=segment, prefix=cast.prefix):
                result = outcome(db, statement)
                if result is None or not result.startswith(BY_RIGHTS):
                    got_through[role, statement] = result

    assert got_through == {}


@pytest.mark.both_postgres
def test_each_role_has_the_rights_for_its_purpose(given, cast):
    """The lists above forbid for the right reason: with the role they go through."""
    given(sample_events()).project(*catalogue.load().models)

    refused = {}
    for role, blocks in {
        "ingest": (WRITES_OF_INGEST,),
        "project": (WRITES_OF_PROJECT,),
        "operator": (WRITES_OF_PROJECT, ACCEPTING),
        "personal_data": (PERSONAL_DATA,),
    }.items():
        with cast.connect(role) as db:
            for statement in statements_of(blocks):
                result = outcome(db, statement)
                # A row that is there already, or one without its values: the right was there.
                if result is not None and not result.startswith("23"):
                    refused[role, statement] = result

    assert refused == {}


def test_a_login_with_two_roles_has_exactly_the_rights_of_both(given, cast):
    given(sample_events()).project(*catalogue.load().models)
    segment = given.scalar("SELECT segment FROM pipeline.segments")

    with cast.connect("ingest", "project", "operator") as db:
        outcomes = [
            outcome(db, statement)
            for statement in statements_of((TO_ALL,), segment=segment, prefix=cast.prefix)
        ]

        # This one warns only.
        db.execute("GRANT SELECT ON pipeline.events TO PUBLIC")

    assert [
        outcome for outcome in outcomes if outcome is None or not outcome.startswith(BY_RIGHTS)
    ] == []
    with cast.connect("analyst") as db:
        assert outcome(db, "SELECT topic FROM pipeline.events") is not None


# ----------------------------------------------------------------------------------------- analysts


@pytest.mark.both_postgres
def test_analysts_get_an_answer_to_each_question_of_the_page(given, cast):
    given(sample_events()).project(*catalogue.load().models)

    with cast.connect("analyst") as db:
        refused = [
            title
            for title, query in questions()
            if "pipeline.events" not in query and outcome(db, query) is not None
        ]

    assert refused == []


def test_a_plain_view_shows_every_column_except_the_personal_ones(given, cast):
    given(sample_events()).project(*catalogue.load().models)

    with cast.connect("analyst") as db:
        for table in catalogue.load().tables.values():
            cursor = db.execute(f"SELECT * FROM upvest.{table.name}".encode())
            shown = {column.name for column in cursor.description or ()}
            assert shown == {c.name for c in table.columns} - personal_columns(table)
            assert cursor.fetchone() is not None


def test_statistics_of_personal_columns_are_hidden_too(given, cast):
    given(sample_events()).project(*catalogue.load().models)
    given.execute("ANALYZE upvest_personal.users")
    statistics = "SELECT count(*) FROM pg_stats WHERE tablename = 'users' AND attname = 'last_name'"
    assert given.scalar(statistics) == 1

    with cast.connect("analyst") as db:
        seen = db.execute(statistics.encode()).fetchone()

    assert seen == (0,)


@pytest.mark.both_postgres
def test_the_barrier_of_the_history_does_not_cost_an_order_its_index(given, cast):
    given(sample_events())

    with cast.connect("analyst") as db:
        db.execute("SET enable_seqscan = off")
        plan = db.execute(
            "EXPLAIN SELECT * FROM upvest.order_status_history WHERE order_id = "
            "'6f5b4f5e-5d8f-4c40-8a4b-7d3a1f6d0a11'"
        ).fetchall()

    assert given.scalar(
        "SELECT 'security_barrier=true' = ANY (reloptions) FROM pg_class "
        "WHERE oid = 'upvest.order_status_history'::regclass"
    )
    assert "entity_id_idx" in str(plan)


SEEN_BY = """
SELECT c.relname || '.' || a.attname
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace IN ('upvest'::regnamespace, 'pipeline'::regnamespace)
  AND c.relkind IN ('r', 'p', 'v') AND has_column_privilege(%s, c.oid, a.attnum, 'SELECT')
"""
NOT_OF_PERSONS = {"instruments.name", "accounts.account_number", "users.fatca_confirmed_at"}
NOT_PERSONAL_WORDS = ("instrument_name", "tax_type", "tax", "account_number", "fatca_confirmed_at")


def test_no_column_that_an_analyst_sees_looks_personal(cast):
    """Views are not declared, so what they show is looked at by its name."""
    with cast.database.connect() as db:
        rows = db.execute(SEEN_BY, [cast.prefix + "analyst"]).fetchall()

    seen = {name for (name,) in rows}
    assert "orders.order_id" in seen
    suspicious = {name for name in seen if looks_personal(name.partition(".")[2])}
    assert {
        name
        for name in suspicious - NOT_OF_PERSONS
        if name.partition(".")[2] not in NOT_PERSONAL_WORDS
    } == set()


def test_no_view_for_analysts_reads_a_personal_column(given):
    """By the columns on which PostgreSQL knows that they depend."""
    personal = {
        (table.name, name)
        for table in catalogue.load().tables.values()
        for name in personal_columns(table)
    }

    rows = given.query(
        "SELECT v.relname AS view, c.relname AS table, a.attname AS column "
        "FROM pg_rewrite r JOIN pg_class v ON v.oid = r.ev_class "
        "JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid "
        "AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0 "
        "JOIN pg_class c ON c.oid = d.refobjid "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.refobjsubid "
        "WHERE v.relnamespace = 'upvest'::regnamespace"
    )

    assert {row.view for row in rows} >= {*catalogue.load().views, "users"}
    assert {tuple(row) for row in rows if (row.table, row.column) in personal} == set()
    of_log = {row.column for row in rows if row.table == "events"}
    assert of_log & {"raw", "key", "headers"} == set()


def test_an_undeclared_view_is_readable_only_with_personal_rights(given, cast):
    with cast.acting_as_owner() as owner, transaction(owner) as db:
        for view in (
            "greetings AS SELECT u.user_id, to_jsonb(u) AS all_of_it FROM upvest_personal.users u",
            "hidden AS SELECT * FROM upvest.greetings",
            "plain AS SELECT order_id FROM upvest.orders",
            "types AS SELECT event_type FROM pipeline.events",
        ):
            db.execute(text(f"CREATE VIEW upvest.{view}"))

    migrate(given.database.url)

    may = {
        (view, role): given.scalar(
            "SELECT has_table_privilege(:role, :view, 'SELECT')",
            role=cast.prefix + role,
            view=f"upvest.{view}",
        )
        for view in ("greetings", "hidden", "plain", "types")
        for role in ("analyst", "personal_data")
    }
    assert {view for (view, role), is_so in may.items() if is_so and role == "analyst"} == set()
    assert all(is_so for (_, role), is_so in may.items() if role == "personal_data")


LETTERS = EntityTable(
    table="letters",
    comment="Letters.",
    events="LETTER.*",
    key=uuid("letter_id", "Id.", path="id"),
    fields=[
        text_field("street", "Where to.", path="to.street", personal=True),
        text_field("stamp", "Stamp."),
    ],
)


def test_a_new_read_model_gets_its_rights_automatically(given, cast):
    migrate(given.database.url, with_models(LETTERS))

    with cast.connect("project") as db:
        db.execute("SELECT count(*) FROM upvest_personal.letters")
    with cast.connect("analyst") as db:
        assert outcome(db, "SELECT * FROM upvest.letters") is None
        assert outcome(db, "SELECT letter_id, stamp FROM upvest.letters") is None
        assert outcome(db, "SELECT street FROM upvest.letters") is not None
        assert outcome(db, "SELECT street FROM upvest_personal.letters") is not None
        assert outcome(db, "UPDATE upvest.letters SET stamp = ''") is not None
    with cast.connect("personal_data") as db:
        assert outcome(db, "SELECT * FROM upvest_personal.letters") is None
    comment = given.scalar(
        "SELECT col_description('upvest_personal.letters'::regclass, attnum) FROM pg_attribute "
        "WHERE attrelid = 'upvest_personal.letters'::regclass AND attname = 'street'"
    )
    assert comment == "Where to. Personal data."


def test_a_column_that_is_declared_personal_later_is_hidden_by_the_next_migrate(given, cast):
    with cast.connect("analyst") as db:
        assert outcome(db, "SELECT execution_flow FROM upvest.orders") is None

        migrate(
            given.database.url, with_models(with_field(orders, "execution_flow", personal=True))
        )
        hidden = outcome(db, "SELECT execution_flow FROM upvest.orders")
        direct = outcome(db, "SELECT execution_flow FROM upvest_personal.orders")
        rest = outcome(db, "SELECT order_id, status FROM upvest.orders")
        book = outcome(db, "SELECT * FROM upvest.holdings")
        migrate(given.database.url)

        assert str(hidden).startswith("42703")
        assert str(direct).startswith("42501")
        assert (rest, book) == (None, None)
        assert outcome(db, "SELECT execution_flow FROM upvest.orders") is None


def test_a_table_that_the_program_does_not_know_is_not_for_every_analyst(given, cast):
    with cast.acting_as_owner() as owner, transaction(owner) as db:
        db.execute(text("CREATE TABLE upvest.relics (name text)"))

    migrate(given.database.url)

    with cast.connect("analyst") as db:
        assert outcome(db, "SELECT * FROM upvest.relics") is not None
    with cast.connect("personal_data") as db:
        assert outcome(db, "SELECT * FROM upvest.relics") is None


def test_an_object_of_another_owner_in_the_schema_is_unchanged(given, cast):
    given.execute("CREATE VIEW upvest.strange AS SELECT * FROM upvest.users")
    given.execute(f"GRANT SELECT ON upvest.strange TO {cast.prefix}analyst")

    assert migrate(given.database.url).grants == []
    assert migrate(given.database.url, with_roles=True).grants == []


# ------------------------------------------------------------------------------- the real commands


@pytest.fixture
def broker(mock_broker):
    mock_broker.create_topic(TOPIC, 2)
    return mock_broker


def produce(broker, events):
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
    for number, event in enumerate(events):
        producer.produce(TOPIC, json.dumps(event).encode(), partition=number % 2)
    assert producer.flush(30) == 0


@pytest.mark.both_postgres
def test_ingest_and_project_run_with_just_their_role(given, cast, broker, pipeline):
    produce(broker, sample_events())
    program = on_mock(given.database, broker)
    ingest = program.with_(database_url=cast.url("ingest"))
    project = program.with_(database_url=cast.url("project"))

    read = pipeline(ingest, "ingest", "--until-end")
    followed = pipeline(project, "project", "--until-end")

    assert (read.code, followed.code) == (0, 0), read.err + followed.err
    assert given.scalar("SELECT count(*) FROM pipeline.events") == len(sample_events())
    assert given.scalar("SELECT count(*) FROM upvest.orders") > 0
    # The other half is refused in time, and by name.
    login = cast.login("ingest")
    refused = pipeline(program.with_(database_url=cast.url_of(login)), "project", "--until-end")
    assert refused.code == 78
    assert "42501" in refused.err
    assert re.search("permission denied for table [a-z_]+", refused.err)
    assert f"{given.database.name} for user {login} denies a right" in refused.err


@pytest.mark.parametrize(
    ("names", "may"),
    [
        (("ingest",), {"ingest"}),
        (("operator",), {"project"}),
        (("ingest", "project"), {"ingest", "project"}),
    ],
    ids=["ingest", "operator", "both"],
)
def test_check_examines_a_login_for_its_purpose(cast, broker, pipeline, names, may):
    program = on_mock(cast.database, broker).with_(database_url=cast.url(*names))

    assert pipeline(program, "status", "--json").code == 1  # nothing was read yet
    checked = pipeline(program, "check")

    assert checked.code == 0, checked.out
    reported = {what for what in ("ingest", "project") if f"all that {what} needs" in checked.out}
    assert reported == may
    assert "append-only for this role" in checked.out


def test_run_requires_both_roles_and_no_more(given, cast, broker, pipeline):
    produce(broker, sample_events())
    both = on_mock(given.database, broker).with_(database_url=cast.url("ingest", "project"))

    done = pipeline(both, "run", "--until-end")

    assert done.code == 0, done.err
    assert given.scalar("SELECT count(*) FROM pipeline.events") == len(sample_events())
    assert given.scalar("SELECT min(next_offset) FROM pipeline.projection_checkpoints") > 0


@pytest.mark.faults
@pytest.mark.both_postgres
def test_an_operator_has_the_rights_for_every_repair(given, cast, broker, pipeline):
    bad = order_event("NEW", at=2, order="bad", cash_amount="no number", name="bad")
    given([order_event("NEW", at=1), bad]).project(*catalogue.load().models)
    given.execute(
        "INSERT INTO pipeline.gaps (topic, partition, first_offset, end_offset, reason) "
        "VALUES (:topic, 0, 2, 5, 'retention')",
        topic=TOPIC,
    )
    login = cast.login("operator")
    operator = on_mock(given.database, broker).with_(database_url=cast.url_of(login))

    def run(*arguments, code=0):
        result = pipeline(operator, *arguments)
        assert result.code == code, result.out + result.err
        return result

    assert "orders" in pipeline(operator, "status").out
    assert "no number" in run("events", some_id("bad"), "--payload").out
    assert "cash_amount" in run("dead-letters", "list").out
    run("dead-letters", "show", f"{TOPIC}:0:1", "--payload")
    run("dead-letters", "retry", code=1)
    run("rebuild", "orders", "--check")
    run("rebuild", "orders")
    run("rebuild", "orders", "--in-place")
    run("gaps", "list")
    assert "continues at offset 5" in run("gaps", "accept", f"{TOPIC}:0").err
    assert given.query(
        "SELECT accepted_by, next_offset FROM pipeline.gaps, pipeline.consumer_offsets"
    ) == [(login, 5)]


def test_a_rebuild_that_one_login_began_is_resumed_by_another(given, cast):
    given([order_event("NEW", at=n, order=f"order {n}") for n in range(30)]).project(orders)
    stop = threading.Event()
    with cast.engine("project") as first, cast.engine("operator") as second:
        with pytest.raises(StoppedError):
            rebuild(first, orders, chunk_offsets=10, stop=stop, observe=lambda _: stop.set())
        begun = given.scalar("SELECT count(*) FROM pipeline_shadow.orders")
        owner = given.scalar(
            "SELECT relowner::regrole::text FROM pg_class "
            "WHERE oid = 'pipeline_shadow.orders'::regclass"
        )

        difference = rebuild(second, orders)

    assert begun == 10
    assert owner == cast.prefix + "owner"
    assert (difference.rows, difference.differing) == (30, 0)


def test_a_truncated_table_is_filled_again_by_a_role_without_rights_on_the_log(given, cast):
    given([order_event("NEW", at=n, order=f"order {n}") for n in range(5)]).project(orders)

    with cast.connect("project") as db:
        db.execute("TRUNCATE upvest.orders")
    with cast.engine("project") as engine:
        run_projection(engine, [orders], until_end=True)

    assert len(given.rows("orders")) == 5


@pytest.mark.faults
def test_a_login_that_ingests_and_projects_may_rewind_and_verify(given, cast, broker, pipeline):
    produce(broker, sample_events())
    both = on_mock(given.database, broker).with_(database_url=cast.url("ingest", "project"))
    assert pipeline(both.with_(start="latest"), "run", "--until-end").code == 0

    filled = pipeline(both, "rewind", TOPIC, "--to", "earliest", "--execute", "--json")
    followed = pipeline(both, "run", "--until-end")
    verified = pipeline(both, "verify")

    assert [result.code for result in (filled, followed, verified)] == [0, 0, 0], verified.out
    assert sum(interval["filled"] for interval in filled.json["done"]) == len(sample_events())
    assert given.scalar("SELECT count(*) FROM pipeline.events") == len(sample_events())
    assert given.scalar("SELECT count(*) FROM upvest.orders") > 0


@pytest.mark.faults
@pytest.mark.parametrize("role", ["ingest", "project", "operator"])
def test_a_login_with_only_one_of_the_rights_fills_nothing(given, cast, broker, pipeline, role):
    produce(broker, sample_events())
    both = on_mock(given.database, broker).with_(database_url=cast.url("ingest", "project"))
    assert pipeline(both.with_(start="latest"), "run", "--until-end").code == 0

    half = both.with_(database_url=cast.url(role))
    refused = pipeline(half, "rewind", TOPIC, "--to", "earliest", "--execute")

    assert refused.code == 78, refused.err
    assert given.scalar("SELECT count(*) FROM pipeline.events") == 0


# --------------------------------------------------------------------------------- making them

RIGHTS = """
SELECT 'schema' AS kind, nspname::text, '', nspowner::regrole::text, nspacl::text
FROM pg_namespace WHERE nspname = ANY(%(ours)s)
UNION ALL
SELECT 'relation', c.oid::regclass::text, '', c.relowner::regrole::text, c.relacl::text
FROM pg_class c WHERE c.relnamespace::regnamespace::text = ANY(%(ours)s) AND c.relkind <> 'i'
UNION ALL
SELECT 'column', a.attrelid::regclass::text, a.attname, '', a.attacl::text
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace::regnamespace::text = ANY(%(ours)s) AND a.attacl IS NOT NULL
UNION ALL
SELECT 'function', p.oid::regprocedure::text, '', p.proowner::regrole::text, p.proacl::text
FROM pg_proc p WHERE p.pronamespace::regnamespace::text = ANY(%(ours)s)
UNION ALL
SELECT 'default', defaclnamespace::regnamespace::text, defaclobjtype::text,
       defaclrole::regrole::text, defaclacl::text FROM pg_default_acl
UNION ALL
SELECT 'database', '', '', '', datacl::text FROM pg_database WHERE datname = current_database()
UNION ALL
SELECT 'member', g.rolname, m.rolname, '', '' FROM pg_auth_members a
JOIN pg_roles g ON g.oid = a.roleid JOIN pg_roles m ON m.oid = a.member
WHERE starts_with(g.rolname, %(prefix)s)
UNION ALL
SELECT 'role', rolname, rolcanlogin::text, rolsuper::text, '' FROM pg_roles
WHERE starts_with(rolname, %(prefix)s)
ORDER BY 1, 2, 3
"""


def rights(cast):
    """Everything in the catalogue about who may do what, without the names' prefix."""
    ours = ["pipeline", "pipeline_segments", "pipeline_shadow", "upvest", "upvest_personal"]
    with cast.database.connect() as db:
        rows = db.execute(RIGHTS, {"ours": ours, "prefix": cast.prefix}).fetchall()
    # The order of entries tells only when they were made.
    return [
        tuple(
            ",".join(sorted(str(value).replace(cast.prefix, "@").strip("{}").split(",")))
            for value in row
        )
        for row in rows
    ]


@pytest.mark.both_postgres
def test_the_printed_sql_gives_the_same_rights_as_the_command(bare, other, pipeline, mock_broker):
    before = rights(bare)
    printed = pipeline(
        on_mock(bare.database, mock_broker),
        *("migrate", "--print-roles", "--role-prefix", bare.prefix),
    )
    assert printed.code == 0, printed.err
    assert rights(bare) == before, "printing changed something"

    with bare.database.connect() as db:
        for statement in printed.out.split(";\n"):
            db.execute(statement.encode())
    made = pipeline(
        on_mock(other.database, mock_broker), "migrate", "--roles", "--role-prefix", other.prefix
    )

    assert made.code == 0, made.err
    assert len(rights(bare)) > len(before)
    assert rights(bare) == rights(other)
    assert planned_roles(bare.database.url).grants == []


@pytest.mark.both_postgres
def test_migrate_again_changes_nothing_and_repairs_changed_rights(given, cast):
    whole = rights(cast)
    assert migrate(given.database.url).grants == []
    assert migrate(given.database.url, with_roles=True).grants == []

    for statement in (
        "GRANT UPDATE, DELETE ON pipeline.events TO {}ingest",
        "GRANT SELECT ON upvest.users TO {}analyst",
        "GRANT ALL ON SCHEMA pipeline TO {}project",
        "GRANT EXECUTE ON FUNCTION pipeline.accept_gap TO {}analyst",
        "REVOKE SELECT ON upvest.orders FROM {}analyst",
        "REVOKE INSERT ON pipeline.events FROM {}ingest",
    ):
        given.execute(statement.format(cast.prefix))
    assert rights(cast) != whole
    done = migrate(given.database.url)

    assert done.grants != []
    assert rights(cast) == whole


def test_a_login_that_may_act_as_the_owner_is_enough_for_every_later_migrate(given, cast):
    given.execute(f"REVOKE INSERT ON pipeline.events FROM {cast.prefix}ingest")
    deploy = cast.url("owner").replace("postgresql://", "postgresql+psycopg://")

    done = migrate(deploy)

    assert done.grants == [f"GRANT INSERT ON TABLE pipeline.events TO {cast.prefix}ingest"]


def test_a_login_that_may_not_act_as_the_owner_gets_an_error_with_the_fix(cast):
    stranger = cast.login()

    with pytest.raises(ConfigurationError, match=f"GRANT {cast.prefix}owner TO {stranger}"):
        migrate(cast.url_of(stranger).replace("postgresql://", "postgresql+psycopg://"))


@pytest.mark.both_postgres
def test_managed_postgresql_without_a_superuser_is_enough(empty_database, pipeline, mock_broker):
    """A login with CREATEROLE that owns the database does it alone; another is told what to do."""
    cast = Cast(empty_database)
    deploy = cast.login()
    with empty_database.connect() as db:
        db.execute(f"ALTER DATABASE {empty_database.name} OWNER TO {deploy}".encode())
    program = on_mock(empty_database, mock_broker).with_(database_url=cast.url_of(deploy))
    try:
        assert pipeline(program, "migrate").code == 0

        refused = pipeline(program, "migrate", "--roles", "--role-prefix", cast.prefix)
        with empty_database.connect() as db:
            db.execute(f"ALTER ROLE {deploy} CREATEROLE".encode())
        made = pipeline(program, "migrate", "--roles", "--role-prefix", cast.prefix)

        assert refused.code == 78
        assert f"CREATE ROLE {cast.prefix}owner" in refused.err
        assert "--print-roles" in refused.err
        assert made.code == 0, made.err
        with empty_database.connect() as db:
            db.execute(f"ALTER ROLE {deploy} NOCREATEROLE".encode())
        assert pipeline(program, "migrate").code == 0
        assert pipeline(program, "migrate", "--roles").code == 0
        with cast.connect("ingest") as db:
            assert outcome(db, "SELECT pipeline.make_segment('x', 0, 1000)") is None
    finally:
        cast.end()


def test_two_installations_on_one_server_do_not_share_roles(cast, other):
    serves_already = f"already belong to database {cast.database.name}"
    with pytest.raises(ConfigurationError, match=serves_already):
        migrate(other.database.url, with_roles=True, role_prefix=cast.prefix)
    with pytest.raises(ConfigurationError, match=serves_already):
        planned_roles(other.database.url, cast.prefix)

    other.make()

    with other.connect("ingest") as db:
        db.execute("SELECT FROM pipeline.events")


def test_roles_keep_their_names(cast):
    with pytest.raises(ConfigurationError, match=f"are called {cast.prefix}"):
        migrate(cast.database.url, with_roles=True, role_prefix="other_")


@pytest.mark.parametrize("prefix", ["Big_", "with space", "x" * 41, "1st_", "a;b", ""])
def test_a_prefix_that_is_no_name_is_refused(bare, prefix):
    with pytest.raises(ConfigurationError, match="role prefix"):
        migrate(bare.database.url, with_roles=True, role_prefix=prefix)


def test_a_role_that_was_dropped_is_named(given, cast):
    given.execute(f"DROP OWNED BY {cast.prefix}personal_data")
    given.execute(f"DROP ROLE {cast.prefix}personal_data")

    with pytest.raises(ConfigurationError, match=f"role {cast.prefix}personal_data does not exist"):
        migrate(given.database.url)

    assert migrate(given.database.url, with_roles=True).grants != []

"""What somebody else puts on our tables neither loses a record in silence nor stops us unnamed."""

import json

import pytest
from sqlalchemy import text

from pipeline import outages
from pipeline.db import metadata, open_engine, transaction
from pipeline.errors import ConfigurationError, ExitCode
from pipeline.foreign_objects import foreign_objects
from pipeline.ingest import loop
from pipeline.log.append import append
from pipeline.partitions import NextOffset, Partition
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from pipeline.projectors.users import users
from pipeline.sandbox.servers.broker import MockBroker
from pipeline.schema import bookkeeping
from tests.commands import InProcess, on_mock
from tests.contract.logs import advance, row_at
from tests.given import event, order_event, some_id
from tests.integration.ingesting import Ledger, next_offsets, running, settings_for, until

TOPIC = "Notifications"
FUNCTIONS = """
CREATE FUNCTION public.leave_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE FUNCTION public.object() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN RAISE EXCEPTION 'canary % of the row', new; END $$;
"""
TRIGGER = "CREATE TRIGGER t BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION public.leave_out()"
MADE = f"SELECT pipeline.make_segment('{TOPIC}', 0, 1000)"
SEGMENT = "pipeline_segments.notifications_a274f4_0"
ADDED = {
    "a trigger on the log": (TRIGGER.format("pipeline.events"), "pipeline.events has trigger t"),
    "a trigger on the bookkeeping": (
        TRIGGER.format("pipeline.consumer_offsets"),
        "pipeline.consumer_offsets has trigger t",
    ),
    "a trigger on a read model": (TRIGGER.format("upvest.orders"), "upvest.orders has trigger t"),
    "a rule on a read model": (
        "CREATE RULE r AS ON INSERT TO upvest.orders DO INSTEAD NOTHING",
        "upvest.orders has rule r",
    ),
    "a column": (
        "ALTER TABLE upvest.orders ADD COLUMN extra text NOT NULL",
        "upvest.orders has column extra",
    ),
    "a column that must have a value": (
        "ALTER TABLE upvest.orders ALTER COLUMN cash_amount SET NOT NULL",
        "upvest.orders has column cash_amount NOT NULL",
    ),
    "a column of another type": (
        "ALTER TABLE upvest.executions ALTER COLUMN price TYPE numeric(20, 1)",
        "upvest.executions has column price of type numeric(20,1), not numeric",
    ),
    "a text that is cut": (
        "ALTER TABLE upvest_personal.users ALTER COLUMN last_name TYPE char(60)",
        "upvest_personal.users has column last_name of type character(60), not text",
    ),
    "a column dropped": (
        "ALTER TABLE upvest.orders DROP COLUMN cash_amount CASCADE",
        "upvest.orders has no column cash_amount",
    ),
    "a column of the log dropped": (
        "ALTER TABLE pipeline.events DROP COLUMN headers",
        "pipeline.events has no column headers",
    ),
    "a primary key dropped": (
        "ALTER TABLE upvest.orders DROP CONSTRAINT orders_pkey CASCADE",
        "upvest.orders has no primary key",
    ),
    "a constraint on a segment": (
        f"{MADE}; ALTER TABLE {SEGMENT} ADD CONSTRAINT k CHECK (true)",
        f"{SEGMENT} has constraint k",
    ),
    "a unique index on a segment": (
        f"{MADE}; CREATE UNIQUE INDEX u ON {SEGMENT} (event_id)",
        f"{SEGMENT} has unique index pipeline_segments.u",
    ),
    "a segment's column that must have a value": (
        f"{MADE}; ALTER TABLE {SEGMENT} ALTER COLUMN key SET NOT NULL",
        f"{SEGMENT} has column key NOT NULL",
    ),
    "a constraint on the log": (
        "ALTER TABLE pipeline.events ADD CONSTRAINT k CHECK (event_type <> 'ORDER.NEW') NOT VALID",
        "pipeline.events has constraint k",
    ),
    "a constraint on a read model": (
        "ALTER TABLE upvest.orders ADD CONSTRAINT k CHECK (status <> 'FILLED')",
        "upvest.orders has constraint k",
    ),
    "a unique index": (
        "CREATE UNIQUE INDEX u ON upvest.orders (status)",
        "upvest.orders has unique index upvest.u",
    ),
    "a foreign key to us": (
        "CREATE TABLE public.notes (id uuid CONSTRAINT notes_order REFERENCES upvest.orders)",
        "upvest.orders is referenced by foreign key notes_order of public.notes",
    ),
    "a column that is computed": (
        "ALTER TABLE upvest.orders DROP COLUMN initiation_flow CASCADE, "
        "ADD COLUMN initiation_flow text GENERATED ALWAYS AS ('x') STORED",
        "upvest.orders has column initiation_flow that PostgreSQL computes",
    ),
    "a view in place of a table": (
        "ALTER TABLE upvest.orders RENAME TO orders_2026; "
        "CREATE MATERIALIZED VIEW upvest.orders AS SELECT * FROM upvest.orders_2026",
        "upvest.orders is no table any more",
    ),
    "a table dropped": ("DROP TABLE upvest.orders CASCADE", "upvest.orders does not exist"),
}


@pytest.fixture
def broker():
    with MockBroker() as broker:
        broker.create_topic(TOPIC, 1)
        yield broker


@pytest.mark.both_postgres
def test_our_own_tables_have_nothing_foreign(given):
    given([order_event("NEW", at=1)])
    given.execute("CREATE TABLE pipeline_segments.of_somebody (id int UNIQUE, key bytea NOT NULL)")
    bookkeeping.declare_tables()

    with transaction(given.engine) as db:
        assert foreign_objects(db, metadata.tables.values()) == []


@pytest.mark.parametrize("added", ADDED)
def test_each_change_of_others_is_refused_by_name_before_anything_is_written(given, added):
    statement, words = ADDED[added]
    given.execute(FUNCTIONS)
    given.execute(statement)

    with pytest.raises(ConfigurationError) as refused:
        bookkeeping.check_tables(given.engine)

    assert words in str(refused.value)
    assert "Nothing was written" in str(refused.value)


WRITING = (
    ["run", "--until-end"],
    ["project", "--until-end"],
    ["ingest", "--until-end"],
    ["rebuild", "orders"],
    ["dead-letters", "retry"],
    ["rewind", f"{TOPIC}:0", "--to", "0", "--execute"],
)


@pytest.mark.parametrize(
    "added", ["a trigger on the log", "a table dropped", "a column of another type"]
)
def test_every_command_that_writes_refuses_and_check_names_it(
    given, broker, added, monkeypatch, capsys
):
    pipeline = InProcess(monkeypatch, capsys)
    statement, words = ADDED[added]
    commands = on_mock(given.database, broker)
    given.execute(FUNCTIONS)
    given.execute(statement)

    for arguments in WRITING:
        if arguments[0] == "ingest" and words.startswith("upvest"):
            continue  # it writes the log alone
        result = pipeline(commands, *arguments)
        assert result.code == ExitCode.CONFIGURATION, (arguments, result.err)
        assert words in result.err
    found = pipeline(commands, "check")

    table, _, change = words.partition(" ")
    assert f"{table}: {change}" in found.out
    if "dropped" in added:
        assert pipeline(commands, "migrate").code == ExitCode.DONE
        assert pipeline(commands, "run", "--until-end").code == ExitCode.DONE


def test_a_policy_is_refused_by_name_where_it_applies_to_our_login(given):
    """It applies to nobody who is a superuser."""
    role = f"plain_{given.database.name}"
    given.execute("ALTER TABLE upvest.orders ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    given.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    given.execute(f"GRANT USAGE ON SCHEMA pipeline TO {role}")
    given.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA pipeline TO {role}")
    address = given.database.dsn.rpartition("@")[2]
    engine = open_engine(f"postgresql+psycopg://{role}:x@{address}", application="test")

    bookkeeping.check_tables(given.engine)
    with pytest.raises(ConfigurationError, match=r"upvest\.orders has row level security"):
        bookkeeping.check_tables(engine)

    given.execute(f"GRANT USAGE ON SCHEMA upvest TO {role}")
    given.execute(f"GRANT ALL ON upvest.orders TO {role}")
    for statement in ("SELECT FROM upvest.orders", "INSERT INTO upvest.orders DEFAULT VALUES"):
        with pytest.raises(ConfigurationError) as refused, transaction(engine) as db:
            db.execute(text(statement))
        assert "DISABLE ROW LEVEL SECURITY" in str(refused.value)
        assert '"orders"' in str(refused.value)
    engine.dispose()
    given.execute(f"DROP OWNED BY {role}")
    given.execute(f"DROP ROLE {role}")


def test_a_right_that_is_missing_names_the_role_that_a_login_acts_as(given):
    """``ALTER ROLE … SET role``, which no list of settings shows."""
    login, other = (f"{name}_{given.database.name}" for name in ("login", "other"))
    for statement in (
        f"CREATE ROLE {other}",
        f"CREATE ROLE {login} LOGIN PASSWORD 'x' IN ROLE {other}",
        f"ALTER ROLE {login} SET role = {other}",
    ):
        given.execute(statement)
    address = given.database.dsn.rpartition("@")[2]
    engine = open_engine(f"postgresql+psycopg://{login}:x@{address}", application="test")

    with pytest.raises(ConfigurationError) as refused, transaction(engine) as db:
        db.execute(text("SELECT FROM pipeline.events"))

    assert f"for user {login}, which acts as role {other}" in str(refused.value)
    engine.dispose()
    given.execute(f"DROP ROLE {login}, {other}")


@pytest.mark.parametrize(
    "added", [name for name, (_, words) in ADDED.items() if words.startswith("upvest.orders")]
)
def test_a_foreign_object_added_to_a_read_model_halts_only_this_read_model(given, added):
    """A refused row is not blamed on its event, and a row that is left out is noticed."""
    given([event("USER.CREATED", {"id": some_id("somebody")})])
    given.project(users, orders)
    given.execute(FUNCTIONS)
    statement, words = ADDED[added]
    given.execute(statement)

    given([order_event("NEW", at=1, order=f"order {n}", cash_amount="") for n in range(3)])
    given([order_event("FILLED", at=2), event("USER.CREATED", {"id": some_id("a user")})])
    given.project(users, orders)

    state, problem = given.query(
        "SELECT state, problem FROM pipeline.projectors WHERE projector = 'orders'"
    )[0]
    if added == "a foreign key to us":  # refuses nothing but the removal of rows
        assert state == "live"
    else:
        assert state == "broken"
        assert words in problem
        assert "`pipeline rebuild orders`" in problem
    assert given.scalar("SELECT count(*) FROM pipeline.dead_letters") == 0
    assert given.scalar("SELECT count(*) FROM upvest_personal.users") == 2


def test_a_column_that_rounds_is_found_while_the_worker_runs(given):
    given([event("USER.CREATED", {"id": some_id("somebody")})])
    given.project(users, executions)
    given.execute(ADDED["a column of another type"][0])

    given([event("USER.CREATED", {"id": some_id("a user")})])
    given.project(users, executions)

    [(problem,)] = given.query(
        "SELECT problem FROM pipeline.projectors WHERE projector = 'executions'"
    )
    assert ADDED["a column of another type"][1] in problem


@pytest.mark.parametrize("added", ["a trigger on the bookkeeping", "a constraint on the log"])
def test_a_foreign_object_added_to_the_log_stops_the_ingest_and_is_named(
    given, broker, added, monkeypatch
):
    """The offset stays where it was, so nothing is lost."""
    monkeypatch.setattr(loop, "CHECK_S", 0.2)
    monkeypatch.setattr(outages, "GRACE_S", 0.5)
    given.execute(FUNCTIONS)
    statement, words = ADDED[added]
    ledger = Ledger(broker.bootstrap_servers)
    settings = settings_for(given.database, broker.bootstrap_servers, TOPIC)
    ledger.send(TOPIC, [json.dumps(order_event("NEW", at=1)).encode()]).flush()

    with pytest.raises(ConfigurationError) as refused, running(settings) as ingest:  # noqa: PT012
        until(lambda: next_offsets(given.database, TOPIC) == {0: 1}, "the first event is there")
        given.execute(statement)
        ledger.send(TOPIC, [json.dumps(order_event("NEW", at=2)).encode()]).flush()
        until(lambda: ingest.has_ended, "it has ended")

    assert words in str(refused.value)
    stored = given.scalar("SELECT count(*) FROM pipeline.events")
    assert next_offsets(given.database, TOPIC) == {0: stored}


def test_a_batch_is_rolled_back_if_a_trigger_leaves_rows_out_of_the_log(given):
    """Added while we run, so nobody has looked: the offset does not move past them."""
    partition = Partition(TOPIC, 0)
    given([order_event("NEW", at=1)], topic=TOPIC)
    given.execute(FUNCTIONS)
    given.execute(TRIGGER.format("pipeline.events"))
    held, stored = given.query("SELECT epoch, next_offset FROM pipeline.consumer_offsets")[0]

    rows = [row_at(partition, stored), row_at(partition, stored + 1)]
    refused = pytest.raises(ConfigurationError, match="stored 0 of 2 rows of the log, without")
    with refused, transaction(given.engine) as db:
        append(db, rows, {partition: advance(held, stored, stored + 2)})

    assert given.scalar("SELECT next_offset FROM pipeline.consumer_offsets") == NextOffset(stored)


def test_an_error_of_a_foreign_trigger_is_reported_by_its_function_without_its_message(given):
    given([order_event("NEW", at=1)])
    given.execute(FUNCTIONS)
    given.execute(
        "CREATE TRIGGER o AFTER INSERT ON upvest.orders FOR EACH ROW "
        "EXECUTE FUNCTION public.object()"
    )

    with pytest.raises(ConfigurationError) as refused:
        given.project(orders)

    assert "function public.object()" in str(refused.value)
    assert "P0001" in str(refused.value)
    assert "canary" not in str(refused.value)

"""What somebody else puts on our tables neither loses a record in silence nor stops us unnamed."""

import pytest

from pipeline.db import metadata, transaction
from pipeline.errors import ConfigurationError, ExitCode
from pipeline.log.append import append
from pipeline.partitions import NextOffset, Partition
from pipeline.projectors.orders import orders
from pipeline.sandbox.servers.broker import MockBroker
from pipeline.schema import migrate
from pipeline.schema.foreign_objects import foreign_objects
from tests.commands import InProcess, on_mock
from tests.contract.logs import advance, row_at
from tests.given import order_event

TOPIC = "Notifications"
FUNCTIONS = """
CREATE FUNCTION public.leave_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE FUNCTION public.object() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN RAISE EXCEPTION 'canary % of the row', new; END $$;
"""
TRIGGER = "CREATE TRIGGER t BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION public.leave_out()"
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
    "a policy": (
        "ALTER TABLE upvest.orders ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        "upvest.orders has row level security",
    ),
    "a column": (
        "ALTER TABLE upvest.orders ADD COLUMN extra text NOT NULL",
        "upvest.orders has column extra",
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
    migrate.declare_tables()

    with transaction(given.engine) as db:
        assert foreign_objects(db, metadata.tables.values()) == []


@pytest.mark.parametrize("added", ADDED)
def test_a_command_that_writes_refuses_and_check_names_it(
    given, broker, added, monkeypatch, capsys
):
    pipeline = InProcess(monkeypatch, capsys)
    statement, words = ADDED[added]
    commands = on_mock(given.database, broker)
    role = f"plain_{given.database.name}"
    if "policy" in added:  # applies to nobody who is a superuser
        given.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        for schema in ("pipeline", "pipeline_segments", "pipeline_shadow", "upvest"):
            given.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
            given.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {role}")
            given.execute(f"GRANT ALL ON ALL FUNCTIONS IN SCHEMA {schema} TO {role}")
        place = given.database.dsn.rpartition("@")[2]
        commands = commands.with_(database_url=f"postgresql://{role}:x@{place}")
    given.execute(FUNCTIONS)
    given.execute(statement)
    is_of_log = "pipeline." in words

    for arguments in (["run", "--until-end"], ["ingest", "--until-end"], ["rebuild", "orders"]):
        if arguments[0] == "ingest" and not is_of_log:
            continue
        result = pipeline(commands, *arguments)
        assert result.code == ExitCode.CONFIGURATION, (arguments, result.err)
        assert words in result.err
        assert "Nothing was written" in result.err
    found = pipeline(commands, "check")

    assert words in found.out
    if "dropped" in added:
        migrated = pipeline(commands, "migrate")
        assert migrated.code == ExitCode.CONFIGURATION
        assert "dropped by somebody: upvest.orders. Migrations have made them" in migrated.err
    if "policy" in added:
        given.execute(f"DROP OWNED BY {role}")
        given.execute(f"DROP ROLE {role}")


def test_rows_that_a_trigger_leaves_out_of_the_log_take_the_batch_with_them(given):
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


def test_what_somebodys_trigger_raises_is_named_by_its_function_and_without_its_words(given):
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

"""Locks: only our roles can take them, and they end with their session."""

import json
import re
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from pipeline.db import SessionLimits, locks, open_engine, transaction
from pipeline.db.locks import LockTakenError
from pipeline.errors import LockHeldError
from pipeline.projectors.orders import orders
from pipeline.rebuild.rebuild import rebuild
from pipeline.schema.migrate import migrate
from tests.commands import on_mock
from tests.given import order_event
from tests.waiting import until

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
MODES = (
    "ACCESS SHARE",
    "ROW SHARE",
    "ROW EXCLUSIVE",
    "SHARE UPDATE EXCLUSIVE",
    "SHARE",
    "SHARE ROW EXCLUSIVE",
    "EXCLUSIVE",
    "ACCESS EXCLUSIVE",
)
STRENGTHS = ("UPDATE", "NO KEY UPDATE", "SHARE", "KEY SHARE")
RELATIONS = """
SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('pipeline', 'pipeline_segments', 'pipeline_shadow', 'upvest')
  AND c.relkind IN ('r', 'p', 'v')
"""


@pytest.fixture
def analyst(given):
    """A login that may read everything and write nothing."""
    name = f"reader_{given.database.name}"
    with given.database.connect() as db:
        db.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x'".encode())
        address = given.database.dsn.rpartition("@")[2]
        with psycopg.connect(f"postgresql://{name}:x@{address}") as connection:
            yield connection
        db.execute(f"DROP OWNED BY {name}".encode())
        db.execute(f"DROP ROLE {name}".encode())


def test_no_advisory_lock_is_left_in_the_product():
    files = [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("migrations/**/*.py")]

    found = [file.name for file in files if re.search(r"pg_\w*advisory", file.read_text())]

    assert files
    assert found == []


def test_whatever_a_reader_can_lock_stops_no_command(given, analyst):
    """It tries each mode on each relation, each row lock, and advisory locks of all keys we had."""
    given([order_event("NEW", at=1)]).project(orders)
    rebuild(given.engine, orders)
    with given.database.connect() as db:
        for schema in ("pipeline", "pipeline_segments", "pipeline_shadow", "upvest"):
            to = f"SCHEMA {schema} TO {analyst.info.user}"
            db.execute(f"GRANT USAGE ON {to}".encode())
            db.execute(f"GRANT SELECT ON ALL TABLES IN {to}".encode())
        names = [name for (name,) in db.execute(RELATIONS)]
    taken = set()
    attempts = [
        (f"{mode} on {name}", f"LOCK TABLE {name} IN {mode} MODE NOWAIT")
        for name in names
        for mode in MODES
    ]
    attempts += [
        (f"{strength} of {name}", f"SELECT FROM {name} FOR {strength} NOWAIT")
        for name in names
        for strength in STRENGTHS
    ]
    attempts += [
        ("advisory", "SELECT pg_advisory_lock(hashtextextended('pipeline.schema.migrate', 0))")
    ]
    for what, statement in attempts:
        try:
            with analyst.transaction():
                analyst.execute(statement.encode())
            taken.add(what.partition(" on ")[0].partition(" of ")[0])
        except psycopg.Error:
            continue
    # All that it can have at once, and keeps.
    analyst.execute(f"LOCK TABLE {', '.join(names)} IN ACCESS SHARE MODE".encode())

    assert migrate(given.database.url).applied == []
    assert rebuild(given.engine, orders).differing == 0
    with transaction(given.engine) as db:
        locks.lock(db, "begin somewhere")
    given([order_event("NEW", at=2)]).project(orders)
    with given.database.connect() as db:
        db.execute("SELECT pipeline.make_segment('another', 0, 1000)")
    assert taken <= {"ACCESS SHARE", "advisory"}


def test_a_lock_is_held_over_many_transactions_and_does_not_block_vacuum(given):
    with locks.held(given.engine, "something") as ours:
        with (
            pytest.raises(LockTakenError, match=r"process \d+ on host .*PostgreSQL session"),
            locks.held(given.engine, "something"),
        ):
            pass
        keeper = given.scalar(
            "SELECT backend_xid IS NULL AND backend_xmin IS NULL AND state = 'idle in transaction' "
            "FROM pg_stat_activity WHERE pid = :pid",
            pid=ours.session_pid,
        )
        with transaction(given.engine) as db:
            ours.confirm(db)
    with locks.held(given.engine, "something"):
        pass

    assert keeper is True


def test_a_lock_whose_session_is_ended_can_be_taken_and_is_no_longer_confirmed(given):
    with locks.held(given.engine, "something") as lost:
        with given.database.connect() as db:
            db.execute("SELECT pg_terminate_backend(%s)", [lost.session_pid])
            gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
            until(
                lambda: db.execute(gone, [lost.session_pid]).fetchone() == (0,),
                "the session is gone",
                seconds_max=10,
            )
        with (
            locks.held(given.engine, "something"),
            pytest.raises(LockTakenError),
            transaction(given.engine) as db,
        ):
            lost.confirm(db)


def test_a_session_that_waits_for_a_lock_reports_its_holder(given, capsys):
    impatient = SessionLimits(lock_wait=timedelta(seconds=3))
    engine = open_engine(given.database.url, application="test", limits=impatient)
    with given.database.connect(autocommit=False) as holder:
        holder.execute("SET application_name = 'a report'")
        holder.execute("LOCK TABLE upvest.orders IN ACCESS SHARE MODE")
        pid, user = holder.info.backend_pid, holder.info.user
        with pytest.raises(LockHeldError) as refused, transaction(engine) as db:
            db.exec_driver_sql("LOCK TABLE upvest.orders IN ACCESS EXCLUSIVE MODE")
    engine.dispose()

    holder = f"upvest.orders is locked by session {pid} (role {user}, application "
    assert f"{holder}'a report', in a transaction since 20" in str(refused.value)


# What another session locks; None for the lock of `migrate` itself.
WAITING = {
    "migrate": (["migrate"], "pipeline.alembic_version"),
    "a second migrate": (["migrate"], None),
    "rebuild": (["rebuild", "orders"], "upvest.orders"),
    "a worker that projects": (["project", "--until-end"], "pipeline.projection_workers"),
    "a worker that ingests": (["ingest", "--until-end"], "pipeline.consumer_offsets"),
    "dead letters": (["dead-letters", "retry"], "pipeline.dead_letters"),
}


@pytest.fixture
def holder(given):
    """An engine of another login, to take locks with."""
    role = f"holder_{given.database.name}"
    with given.database.connect() as db:
        db.execute(f"CREATE ROLE {role} LOGIN SUPERUSER PASSWORD 'x'".encode())
        url = f"postgresql://{role}:x@{given.database.dsn.rpartition('@')[2]}"
        engine = open_engine(url, application="a report")
        yield engine
        engine.dispose()
        db.execute(f"DROP ROLE {role}".encode())


@contextmanager
def taken(holder, table):
    """Hold a lock until the block ends; the process id of the session that has it."""
    if table is None:
        with locks.held(holder, "migrate") as ours:
            yield ours.session_pid
    else:
        with transaction(holder) as db:
            db.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            db.exec_driver_sql(f"LOCK TABLE {table}")
            yield db.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()


@pytest.mark.parametrize("name", WAITING)
def test_a_command_that_waits_for_a_lock_names_its_holder_and_finishes_afterwards(
    given, holder, mock_broker, name
):
    mock_broker.create_topic("Fresh", 1)
    given([order_event("NEW", at=1)]).project(orders)
    arguments, table = WAITING[name]
    began_at = datetime.now(UTC).replace(microsecond=0)
    with ExitStack() as running, ExitStack() as lock:
        pid = lock.enter_context(taken(holder, table))
        command = running.enter_context(
            on_mock(given.database, mock_broker).with_(topics="Fresh").started(*arguments)
        )
        command.until("waiting_for_lock")
        lock.close()
        assert command.wait() == 0, "".join(command.err)

    [line, *_] = [line for line in command.err if "waiting_for_lock" in line]
    reason = json.loads(line)["reason"]
    assert re.search(rf"session {pid}\b", reason)
    assert re.search(rf"role holder_{given.database.name}\b", reason)
    [since] = re.findall(r"since (\S+ \S+) UTC", reason)
    assert began_at <= datetime.fromisoformat(f"{since}+00:00") <= datetime.now(UTC)

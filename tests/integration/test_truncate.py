"""A read model may be truncated at any time; it heals by itself."""

import threading
import time

import psycopg
import pytest
from structlog.testing import capture_logs

from pipeline import catalogue
from pipeline.db import transaction
from pipeline.projection import registry
from pipeline.projection.loop import Limits, ProjectionProgress, run_projection
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.rebuild.rebuild import check
from tests.given import Given, contents, full, order_event, sample_events
from tests.servers.databases import Database

BOTH = (executions, orders)


@pytest.mark.both_postgres
@pytest.mark.parametrize("projector", catalogue.load().models, ids=lambda projector: projector.name)
def test_every_truncated_table_is_filled_again_alone_and_together(given: Given, projector):
    given(sample_events()).project(projector)
    expected = contents(given.engine, [projector])
    names = [table.fullname for table in projector.tables]

    for truncated in [*names, ", ".join(names)]:
        given.execute(f"TRUNCATE {truncated}")

        given.project(projector)

        assert contents(given.engine, [projector]) == expected, truncated


def test_a_table_that_was_truncated_and_is_complete_again_is_logged_once(given: Given):
    """And the first events of a new read model or a new partition are no such thing."""
    given([order_event("NEW", at=1, order="1")])
    stop = threading.Event()
    steps = [
        lambda: given([order_event("NEW", at=2, order="2")], partition=1),
        lambda: given.execute("TRUNCATE upvest.orders"),
        lambda: given([order_event("NEW", at=3, order="3")]),
    ]

    def next_step(progress: ProjectionProgress) -> None:
        if not progress.lag:
            steps.pop(0)() if steps else stop.set()

    with capture_logs() as lines:
        run_projection(given.engine, BOTH, stop=stop, observe=next_step)

    assert len(given.rows("orders")) == 3
    refilled = [line for line in lines if line["event"] == "read_model_refilled"]
    assert [line["read_model"] for line in refilled] == ["orders"]


@pytest.mark.both_postgres
def test_a_truncation_that_is_rolled_back_changes_nothing(given: Given):
    given([order_event("NEW", at="10:00:00"), order_event("NEW", at=0, fee="?", order="bad")])
    given.project(orders)
    before = bookkeeping(given)
    with given.database.connect(autocommit=False) as db:
        db.execute("TRUNCATE upvest.orders")
        db.rollback()

    assert bookkeeping(given) == before
    assert len(given.rows("orders")) == 1


def test_a_table_truncated_by_a_role_without_other_rights_is_filled_again(given: Given):
    given([order_event("NEW", at="10:00:00")]).project(orders)
    role = f"clerk_{given.database.name}"
    given.execute(f"CREATE ROLE {role}")
    try:
        given.execute(f"GRANT USAGE ON SCHEMA upvest TO {role}")
        given.execute(f"GRANT TRUNCATE ON upvest.orders TO {role}")
        with given.database.connect() as db:
            db.execute(f"SET ROLE {role}")
            db.execute("TRUNCATE upvest.orders")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute("UPDATE pipeline.projection_checkpoints SET next_offset = 0")

        assert len(given.project(orders)) == 1
    finally:
        given.execute(f"DROP OWNED BY {role}")
        given.execute(f"DROP ROLE {role}")


def test_a_child_alone_does_not_hide_that_its_parent_is_stale(given: Given):
    """The parent's rows are still those of the old definition."""
    given(sample_events()).project(executions)
    given.execute("UPDATE pipeline.projectors SET fingerprint = 'old'")

    given.execute("TRUNCATE upvest.execution_taxes")
    given.project(executions)
    with transaction(given.engine) as db:
        assert registry.fingerprints(db)["executions"] == "old"

    given.execute("TRUNCATE upvest.executions")
    given.project(executions)
    with transaction(given.engine) as db:
        assert registry.fingerprints(db)["executions"] == fingerprint(executions)


@pytest.mark.timeout(180)
def test_a_table_that_is_truncated_repeatedly_during_live_traffic_is_filled_again(
    given: Given, database: Database
):
    """Two workers, a writer, parents and children truncated: no deadlock, no lost row."""
    stop = threading.Event()
    failed: list[BaseException] = []
    events = sample_events()

    def work() -> None:
        try:
            run_projection(given.engine, BOTH, Limits(batch_offsets_max=200), stop=stop)
        except BaseException as error:  # noqa: BLE001 - reported by the test, which then fails
            failed.append(error)

    given(events)
    given.project(*BOTH)
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        truncated = 0
        with given.database.connect() as db:
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and truncated < 60:
                table = ("orders", "executions", "execution_taxes")[truncated % 3]
                db.execute(f"TRUNCATE {full(table)}")
                truncated += 1
                given.log.append(
                    [order_event("NEW", at=truncated, order=f"order {truncated}")],
                    partition=truncated % 3,
                )
    finally:
        stop.set()
        for worker in workers:
            worker.join()

    assert failed == []
    assert truncated > 20
    given.project(*BOTH)
    healed = contents(given.engine, BOTH)
    assert [check(given.engine, projector).differing for projector in BOTH] == [0, 0]
    given.execute("TRUNCATE upvest.orders, upvest.executions, upvest.execution_taxes")
    given.project(*BOTH)
    assert contents(given.engine, BOTH) == healed
    assert (
        given.scalar("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        == 0
    )


def bookkeeping(given: Given) -> list[object]:
    return [
        given.query(f"SELECT * FROM pipeline.{table} ORDER BY 1")
        for table in ("projection_checkpoints", "dead_letters", "projectors")
    ]

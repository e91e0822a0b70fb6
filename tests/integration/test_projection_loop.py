"""The loop: who goes with whom, who waits for nobody, and what it survives."""

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import psycopg
import pytest
from sqlalchemy import text

from pipeline import catalogue, failpoints
from pipeline.db import open_engine, transaction
from pipeline.errors import ConfigurationError, InvariantError, TransientError
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection import checkpoints, registry
from pipeline.projection import loop as looping
from pipeline.projection.loop import Limits, ProjectionProgress, run_projection
from pipeline.projection.one_pass import Result, project
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from pipeline.rebuild.rebuild import rebuild
from pipeline.sandbox.servers.postgres import PostgresServer
from pipeline.schema.migrate import migrate
from tests import waiting
from tests.given import TOPIC, Given, contents, execution_event, order_event, sample_events
from tests.servers import FAST_AND_UNSAFE
from tests.servers.databases import fresh_database

ALL = catalogue.load().models
BOTH = (executions, orders)
PATIENCE_S = 30.0


@pytest.fixture
def running(given: Given) -> Iterator[Callable[..., threading.Thread]]:
    """Starts the loop in a thread; ended with the test."""
    stop = threading.Event()
    threads = []

    def start(*projectors, limits: Limits | None = None) -> threading.Thread:
        thread = threading.Thread(
            target=run_projection, args=(given.engine, projectors, limits), kwargs={"stop": stop}
        )
        thread.start()
        threads.append(thread)
        return thread

    yield start
    stop.set()
    for thread in threads:
        thread.join()


eventually = partial(waiting.until, what="it comes true", seconds_max=PATIENCE_S)


def next_offsets(given: Given) -> dict[tuple[str, int], int]:
    rows = given.query(
        "SELECT projector, partition, next_offset FROM pipeline.projection_checkpoints"
    )
    return {(row.projector, row.partition): row.next_offset for row in rows}


def stands_at(given: Given, next_offset: int) -> Callable[[], bool]:
    return lambda: set(next_offsets(given).values()) == {next_offset}


def transactions(given: Given) -> set[tuple[object, ...]]:
    """In which transactions the checkpoints moved last."""
    return {
        tuple(row) for row in given.query("SELECT moved_at FROM pipeline.projection_checkpoints")
    }


def pass_over(given: Given, first: int, end: int, *projectors) -> dict[str, Result]:
    return project(
        given.engine,
        projectors,
        Partition(TOPIC, 0),
        OffsetRange(NextOffset(first), NextOffset(end)),
        rejected_max=10,
    )


@pytest.mark.both_postgres
def test_projectors_at_the_same_offsets_are_committed_together(given: Given):
    """One REPEATABLE READ transaction shows all read models at one instant of the log."""
    given(sample_events()).project(*ALL)

    assert set(next_offsets(given)) == {(projector.name, 0) for projector in ALL}
    assert len(transactions(given)) == 1


def test_a_locked_table_is_left_out_and_no_projector_waits(given: Given):
    given([order_event("NEW", at=0), execution_event("FILLED", at=1)])
    given.project(*BOTH)
    given([order_event("FILLED", at=2), execution_event("SETTLED", at=3)])

    with given.database.connect(autocommit=False) as somebody:
        somebody.execute("LOCK TABLE upvest.orders IN SHARE MODE")
        results = pass_over(given, 2, 4, *BOTH)

    assert results == {"executions": Result.DONE, "orders": Result.LEFT_OUT}
    assert next_offsets(given) == {("executions", 0): 4, ("orders", 0): 2}
    given.project(*BOTH)
    assert [row.status for row in given.rows("orders")] == ["FILLED"]


def test_a_projector_that_was_blocked_rejoins_the_others(given: Given, running):
    """While the log grows, too: or each would always be one range behind the other."""
    rejoined = threading.Event()

    def write() -> None:
        number = 0
        while not rejoined.is_set():
            number += 1
            given([order_event("NEW", at=number, order=str(number))])

    given(sample_events()).project(*BOTH)
    with given.database.connect(autocommit=False) as somebody:
        somebody.execute("LOCK TABLE upvest.orders IN SHARE MODE")
        writer = threading.Thread(target=write)
        writer.start()
        try:
            running(*BOTH, limits=Limits(batch_offsets_max=50))
            eventually(lambda: next_offsets(given)["executions", 0] > 600)
            assert next_offsets(given)["orders", 0] == 574
            somebody.rollback()
            eventually(
                lambda: next_offsets(given)["orders", 0] > 600 and len(transactions(given)) == 1
            )
        finally:
            rejoined.set()
            writer.join()


def test_a_projector_that_another_worker_runs_is_left_out(given: Given):
    given([order_event("NEW", at=0), event_for_nobody()])
    with transaction(given.engine) as db:
        registry.register(db, ["orders", "users"])
        checkpoints.progress(db, ["orders", "users"])
    users = next(projector for projector in ALL if projector.name == "users")

    with given.database.connect(autocommit=False) as somebody:
        somebody.execute("SELECT 1 FROM pipeline.projection_checkpoints FOR UPDATE")
        busy_and_idle = pass_over(given, 0, 2, orders, users)
        elsewhere = pass_over(given, 1, 2, orders, users)

    assert set(busy_and_idle.values()) == set(elsewhere.values()) == {Result.LEFT_OUT}
    assert set(next_offsets(given).values()) == {0}
    assert set(pass_over(given, 1, 2, orders, users).values()) == {Result.LEFT_OUT}


def event_for_nobody():
    return {"id": None, "type": "WEATHER.CHANGED", "object": {}}


@pytest.mark.both_postgres
def test_two_concurrent_workers_apply_every_event_once(given: Given, running):
    events = sample_events()
    for partition in range(4):
        given(events[partition::4], partition=partition)
    for _ in range(2):
        running(*ALL, limits=Limits(batch_offsets_max=20))
    eventually(lambda: len(next_offsets(given)) == 4 * len(ALL))
    eventually(
        lambda: all(next_offset >= len(events) // 4 for next_offset in next_offsets(given).values())
    )
    done = contents(given.engine, ALL)

    tables = ", ".join(table.fullname for projector in ALL for table in projector.tables)
    given.execute(f"TRUNCATE {tables}")
    eventually(
        lambda: all(next_offset >= len(events) // 4 for next_offset in next_offsets(given).values())
    )

    assert contents(given.engine, ALL) == done


def test_a_crash_before_the_commit_leaves_neither_rows_nor_checkpoint(given: Given, monkeypatch):
    given([order_event("NEW", at=0)])
    with transaction(given.engine) as db:
        registry.register(db, ["orders"])
        checkpoints.progress(db, ["orders"])
    failpoints.arm(
        {"PIPELINE_ENABLE_FAILPOINTS": "1", "PIPELINE_FAILPOINT": "after_projection:raise:57P01"}
    )
    try:
        with pytest.raises(TransientError):
            pass_over(given, 0, 1, orders)
    finally:
        monkeypatch.setattr(failpoints, "_armed", None)

    assert given.rows("orders") == []
    assert set(next_offsets(given).values()) == {0}
    assert len(given.project(orders)) == 1


def test_a_log_that_begins_late_costs_no_empty_passes(given: Given):
    """Retention had deleted the first offsets before we came."""
    seen: list[ProjectionProgress] = []
    given([order_event("NEW", at=0)])
    given.execute("UPDATE pipeline.consumer_offsets SET first_offset = 5000, next_offset = 5100")

    run_projection(
        given.engine, [orders], Limits(batch_offsets_max=10), until_end=True, observe=seen.append
    )

    assert [progress.lag for progress in seen] == [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]
    assert next_offsets(given) == {("orders", 0): 5100}


def test_a_new_event_is_projected_on_notification_before_the_poll(given: Given, running):
    given([order_event("NEW", at=0)])
    running(orders, limits=Limits(poll_interval=timedelta(hours=1)))
    eventually(lambda: len(given.rows("orders")) == 1)

    given([order_event("NEW", at=0, order="another")])

    eventually(lambda: len(given.rows("orders")) == 2)


def test_the_poll_finds_events_after_a_lost_notification(given: Given, running, monkeypatch):
    monkeypatch.setattr("pipeline.log.append.NOTIFY", text("SELECT 1"))
    given([order_event("NEW", at=0)])
    running(orders, limits=Limits(poll_interval=timedelta(milliseconds=20)))
    eventually(lambda: len(given.rows("orders")) == 1)

    given([order_event("NEW", at=0, order="another")])

    eventually(lambda: len(given.rows("orders")) == 2)


def test_until_end_means_the_end_at_the_start(given: Given):
    given([order_event("NEW", at=0)])
    added: list[Given] = []

    def add_more(_progress: ProjectionProgress) -> None:
        if len(added) < 3:
            added.append(given([order_event("NEW", at=0, order=str(len(added)))]))

    run_projection(given.engine, [orders], until_end=True, observe=add_more)

    assert len(given.rows("orders")) < 4


def test_an_empty_database_is_at_its_end(given: Given):
    run_projection(given.engine, ALL, until_end=True)

    assert next_offsets(given) == {}


def test_a_stale_projector_is_named_and_left_out_until_it_is_rebuilt(given: Given, monkeypatch):
    given([order_event("NEW", at=0)]).project(*BOTH)
    given.execute("UPDATE pipeline.projectors SET fingerprint = 'x' WHERE projector = 'orders'")
    logged = []
    monkeypatch.setattr(looping.log, "warning", lambda name, **of: logged.append((name, of)))
    given([order_event("NEW", at=1, order="another")])

    given.project(*BOTH)
    before = given.rows("orders")
    rebuild(given.engine, orders)
    given([order_event("NEW", at=2, order="a third")])

    ((name, values),) = logged
    assert name == "read_models_stale"
    assert values["projectors"] == ["orders"]
    assert len(before) == 1
    given.project(*BOTH)
    assert len(given.rows("orders")) == 3


def test_a_checkpoint_that_was_moved_by_hand_stops_the_loop(given: Given):
    given([order_event("NEW", at=0)]).project(orders)

    with (
        transaction(given.engine) as db,
        pytest.raises(InvariantError, match="orders: 0 of 1 locked"),
    ):
        checkpoints.move_together(
            db, ["orders"], Partition(TOPIC, 0), OffsetRange(NextOffset(7), NextOffset(9))
        )


@pytest.mark.faults
def test_the_loop_waits_for_a_server_that_restarts():
    """The same loop continues by itself, as often as needed."""
    with PostgresServer(18, settings=FAST_AND_UNSAFE) as server, fresh_database(server) as database:
        migrate(database.url)
        given = Given(database)
        given(sample_events()[:100])
        engine = open_engine(database.url, application="pipeline test")
        stop = threading.Event()
        worker = threading.Thread(target=run_projection, args=(engine, ALL), kwargs={"stop": stop})
        worker.start()
        try:
            for turn in range(3):
                eventually(stands_at(given, 100 + turn))
                server.restart("immediate")
                given.engine.dispose()
                given([order_event("NEW", at=turn, order=str(turn))])
            eventually(lambda: set(next_offsets(given).values()) == {103})
        finally:
            stop.set()
            worker.join()
            engine.dispose()
            given.close()


def test_the_loop_waits_for_a_right_that_is_missing_for_a_moment(given: Given, running):
    """Passwords get rotated, migrations take their time."""
    given([order_event("NEW", at=0)])
    worker = running(orders, limits=Limits(poll_interval=timedelta(milliseconds=10)))
    eventually(lambda: next_offsets(given) == {("orders", 0): 1})

    given.execute("ALTER TABLE pipeline.projectors RENAME TO elsewhere")
    removed_right(given)
    given([order_event("NEW", at=1, order="another")])
    given.execute("ALTER TABLE pipeline.elsewhere RENAME TO projectors")

    eventually(lambda: next_offsets(given) == {("orders", 0): 2})
    assert worker.is_alive()


def removed_right(given: Given) -> None:
    """Long enough for a worker to have met it."""
    with given.database.connect() as db:
        before = rollbacks(db)
        eventually(lambda: rollbacks(db) > before + 2)


def rollbacks(db: psycopg.Connection) -> int:
    db.execute("SELECT pg_stat_clear_snapshot()")
    found = db.execute(
        "SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    ).fetchone()
    assert found is not None
    count: int = found[0]
    return count


def test_a_right_that_stays_missing_ends_the_loop(given: Given, monkeypatch):
    monkeypatch.setattr("pipeline.outages.GRACE_S", 0.1)
    given([order_event("NEW", at=0)])

    def take_away(_progress: ProjectionProgress) -> None:
        given.execute("ALTER TABLE pipeline.projectors RENAME TO elsewhere")

    with pytest.raises(ConfigurationError):
        run_projection(given.engine, [orders], observe=take_away)


def test_a_right_that_never_existed_ends_the_loop_at_once(given: Given):
    given.execute("ALTER TABLE pipeline.projectors RENAME TO elsewhere")

    with pytest.raises(ConfigurationError):
        run_projection(given.engine, [orders])


@pytest.mark.faults
def test_a_one_shot_run_does_not_wait_forever(monkeypatch):
    monkeypatch.setattr("pipeline.outages.UNAVAILABLE_S_MAX", 0.2)
    with PostgresServer(18, settings=FAST_AND_UNSAFE) as server, fresh_database(server) as database:
        migrate(database.url)
        given = Given(database)
        server.stop("fast")
        with pytest.raises(TransientError):
            run_projection(given.engine, ALL, until_end=True)
        server.start()
        given.close()

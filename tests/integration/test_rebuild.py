"""Rebuild: equal afterwards, counted, resumable, beside live traffic, and one at a time."""

import threading

import pytest
from sqlalchemy import Connection

from pipeline import failpoints
from pipeline.db import transaction
from pipeline.errors import ExitCode, LockHeldError, TransientError
from pipeline.projection.checkpoints import progress
from pipeline.projection.loop import Limits, run_projection
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.rebuild.rebuild import (
    Difference,
    RebuildProgress,
    RebuildRunsError,
    StoppedError,
    check,
    rebuild,
    rebuild_in_place,
)
from pipeline.rebuild.shadow import Shadow
from tests.given import Given, contents, order_event, sample_events
from tests.waiting import until

BOTH = (executions, orders)


@pytest.fixture
def projected(given: Given) -> Given:
    """The sample in the log, over two partitions, and in the read models."""
    for number, event in enumerate(sample_events()):
        given([event], partition=number % 2) if number % 50 == 0 else None
    events = [event for number, event in enumerate(sample_events()) if number % 50]
    given(events[::2], partition=0)
    given(events[1::2], partition=1)
    given.project(*BOTH)
    return given


@pytest.mark.both_postgres
@pytest.mark.parametrize("projector", BOTH, ids=lambda projector: projector.name)
def test_a_rebuild_of_intact_tables_finds_no_difference(projected: Given, projector):
    before = contents(projected.engine, BOTH)

    difference = rebuild(projected.engine, projector, chunk_offsets=100)

    assert difference.differing == 0
    assert difference.rows == sum(len(before[table.name]) for table in projector.tables)
    assert difference.lag == 0
    assert contents(projected.engine, BOTH) == before
    assert nothing_is_left_behind(projected)


@pytest.mark.both_postgres
def test_damaged_rows_are_repaired_and_counted(projected: Given):
    before = contents(projected.engine, BOTH)
    projected.execute("UPDATE upvest.executions SET price = price + 1 WHERE side = 'SELL'")
    changed = projected.scalar("SELECT count(*) FROM upvest.executions WHERE side = 'SELL'")
    projected.execute(
        "DELETE FROM upvest.execution_taxes WHERE execution_id IN "
        "(SELECT execution_id FROM upvest.executions WHERE side = 'BUY' LIMIT 3)"
    )
    projected.execute(
        "INSERT INTO upvest.execution_taxes SELECT execution_id, 99 FROM upvest.executions LIMIT 2"
    )

    difference = rebuild(projected.engine, executions)

    assert (difference.missing, difference.changed, difference.surplus) == (3, changed, 2)
    assert contents(projected.engine, BOTH) == before


@pytest.mark.both_postgres
def test_a_check_reports_and_changes_nothing(projected: Given):
    projected.execute("UPDATE upvest.orders SET fee = 99 WHERE side = 'SELL'")
    changed = projected.scalar("SELECT count(*) FROM upvest.orders WHERE side = 'SELL'")
    damaged = contents(projected.engine, BOTH)

    difference = check(projected.engine, orders, chunk_offsets=100)

    assert difference == Difference(
        "orders", len(damaged["orders"]), 0, changed, 0, lag=0, dead_letters=0
    )
    assert contents(projected.engine, BOTH) == damaged
    assert nothing_is_left_behind(projected)


def test_a_check_restarts_when_its_table_is_truncated(projected: Given):
    truncated = threading.Event()

    def truncate(_progress: RebuildProgress) -> None:
        if not truncated.is_set():
            projected.execute("TRUNCATE upvest.orders")
            truncated.set()

    difference = check(projected.engine, orders, observe=truncate)

    assert (difference.rows, difference.differing) == (0, 0)
    assert nothing_is_left_behind(projected)


def test_a_check_of_a_repeatedly_truncated_table_gives_up(projected: Given, monkeypatch):
    monkeypatch.setattr("pipeline.rebuild.rebuild.TRUNCATIONS_MAX", 1)

    with pytest.raises(TransientError, match="orders was truncated"):
        check(
            projected.engine,
            orders,
            observe=lambda _: projected.execute("TRUNCATE upvest.orders"),
        )

    assert nothing_is_left_behind(projected)


def test_a_table_that_stays_locked_ends_the_rebuild(projected: Given, monkeypatch):
    monkeypatch.setattr("pipeline.db.table_locks.LOCK_WAIT", short_wait())
    monkeypatch.setattr("pipeline.db.table_locks.ATTEMPTS_MAX", 2)
    with projected.database.connect(autocommit=False) as somebody:
        somebody.execute("LOCK TABLE upvest.orders IN ROW EXCLUSIVE MODE")

        with pytest.raises(LockHeldError):
            rebuild(projected.engine, orders)

    assert rebuild(projected.engine, orders).differing == 0


def test_a_difference_of_spelling_is_a_difference(projected: Given):
    """1.0 and 1.00 are equal numbers, but somebody has written there."""
    projected.execute(
        "UPDATE upvest.orders SET fee = fee + 0.0000 WHERE order_id = "
        "(SELECT min(order_id::text)::uuid FROM upvest.orders)"
    )

    assert check(projected.engine, orders).changed == 1


def test_a_check_compares_at_the_live_checkpoint_while_the_log_grows(projected: Given):
    projected([order_event("NEW", at="10:00:00")])

    assert check(projected.engine, orders).differing == 0

    projected.project(orders)
    assert check(projected.engine, orders).differing == 0


def test_a_rebuild_applies_events_after_the_live_checkpoint(projected: Given):
    projected([order_event("NEW", at="10:00:00")], partition=2)

    difference = rebuild(projected.engine, orders)

    assert difference.differing == 0
    assert len(projected.rows("orders")) == difference.rows
    assert projected.query("SELECT 1 FROM upvest.orders WHERE _partition = 2") != []


def test_an_interrupted_rebuild_resumes_where_it_stopped(projected: Given):
    begin_and_stop_half_way(projected)
    seen: list[RebuildProgress] = []

    difference = rebuild(projected.engine, orders, chunk_offsets=50, observe=seen.append)

    assert seen[0].done > seen[0].total // 2
    assert difference.differing == 0
    assert nothing_is_left_behind(projected)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("place", ["mid_rebuild@2", "before_swap", "after_swap"])
def test_a_rebuild_that_is_killed_anywhere_is_resumed(projected: Given, place, armed, jobs):
    projected.execute("DELETE FROM upvest.orders WHERE side = 'SELL'")
    before = contents(projected.engine, BOTH)
    armed(f"{place}:raise:57P01")

    with pytest.raises(TransientError, match=place.partition("@")[0]):
        rebuild(projected.engine, orders, chunk_offsets=50, jobs=jobs)

    assert contents(projected.engine, BOTH) == before
    difference = rebuild(projected.engine, orders, chunk_offsets=50, jobs=jobs)
    assert difference.missing > 0
    assert check(projected.engine, orders).differing == 0
    assert nothing_is_left_behind(projected)


def test_a_broken_connection_ends_all_jobs_and_the_rebuild_can_be_resumed(projected: Given, armed):
    armed("mid_rebuild@3:disconnect")

    with pytest.raises(TransientError):
        rebuild(projected.engine, executions, chunk_offsets=20, jobs=3)

    assert rebuild(projected.engine, executions, chunk_offsets=20, jobs=3).differing == 0
    assert nothing_is_left_behind(projected)


def test_a_range_that_is_the_victim_of_a_deadlock_is_repeated(projected: Given, armed):
    armed("mid_rebuild@2:raise:40P01")

    assert rebuild(projected.engine, executions, chunk_offsets=50, jobs=2).differing == 0


def test_progress_reports_each_range_until_the_end(projected: Given):
    seen: list[RebuildProgress] = []

    rebuild(projected.engine, orders, chunk_offsets=20, jobs=3, observe=seen.append)

    assert len(seen) > 20
    assert max(seen) == (seen[0].total, seen[0].total)


def test_a_job_of_an_interrupted_rebuild_writes_nothing_after_another_resumes_it(projected: Given):
    """As one that was stopped for long, while its main connection was given up."""
    taken = 0

    def take_up(_progress: RebuildProgress) -> None:
        nonlocal taken
        taken += 1
        projected.execute(
            "UPDATE pipeline.projectors SET built_at = now() WHERE projector = 'orders@rebuild'"
        )

    with pytest.raises(RebuildRunsError):
        rebuild(projected.engine, orders, chunk_offsets=50, observe=take_up)

    assert taken == 1
    assert rebuild(projected.engine, orders).differing == 0


def test_a_resumed_rebuild_waits_for_the_jobs_of_the_killed_one(projected: Given):
    """Its process is gone, but PostgreSQL has not noticed: a statement of it is under way."""
    begin_and_stop_half_way(projected)
    before = projected.scalar("SELECT count(*) FROM pipeline.rebuild_ranges")
    with projected.database.connect(autocommit=False) as dead:
        dead.execute("SELECT FROM pipeline.projectors WHERE projector LIKE '%@rebuild' FOR SHARE")
        dead.execute("SELECT FROM pipeline.rebuild_ranges LIMIT 1 FOR UPDATE")
        rebuilding = threading.Thread(target=rebuild, args=(projected.engine, orders))
        rebuilding.start()
        waits = (
            "SELECT count(*) > 0 FROM pg_stat_activity "
            "WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        until(lambda: projected.scalar(waits), "it waits", seconds_max=30)
        assert projected.scalar("SELECT count(*) FROM pipeline.rebuild_ranges") == before
        dead.rollback()
    rebuilding.join()

    assert check(projected.engine, orders).differing == 0
    assert nothing_is_left_behind(projected)


def test_a_rebuild_by_another_definition_restarts(projected: Given):
    begin_and_stop_half_way(projected)
    projected.execute(
        "UPDATE pipeline.projectors SET fingerprint = 'another' WHERE projector = 'orders@rebuild'"
    )
    seen: list[RebuildProgress] = []

    rebuild(projected.engine, orders, chunk_offsets=50, observe=seen.append)

    assert seen[0].done == 50
    assert fingerprint_of(projected, "orders") == fingerprint(orders)


def test_a_second_rebuild_at_the_same_time_is_refused(projected: Given):
    with Shadow.exclusive(projected.engine, orders), pytest.raises(RebuildRunsError) as refused:
        rebuild(projected.engine, orders)

    assert refused.value.exit_code is ExitCode.FENCED
    assert rebuild(projected.engine, executions).differing == 0


def test_rebuild_in_place_empties_and_refills_the_table(projected: Given):
    before = contents(projected.engine, BOTH)
    projected.execute("UPDATE upvest.orders SET fee = 99")

    rebuild_in_place(projected.engine, orders, Limits(batch_offsets_max=100))

    assert contents(projected.engine, BOTH) == before
    assert fingerprint_of(projected, "orders") == fingerprint(orders)


def test_views_grants_and_comments_stay(projected: Given):
    projected.execute("CREATE VIEW upvest.open_orders AS SELECT * FROM upvest.orders")
    projected.execute("GRANT SELECT ON upvest.orders TO PUBLIC")
    projected.execute("DELETE FROM upvest.orders")

    rebuild(projected.engine, orders)

    assert projected.scalar("SELECT count(*) FROM upvest.open_orders") > 0
    assert projected.scalar("SELECT has_table_privilege('pg_monitor', 'upvest.orders', 'SELECT')")
    assert projected.scalar("SELECT obj_description('upvest.orders'::regclass)") is not None


def test_a_rebuild_waits_for_a_session_that_locks_the_table(projected: Given, monkeypatch):
    held, requested = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction(projected.engine) as db:
            lock(db, "upvest.orders")
            held.set()
            requested.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(30)
    monkeypatch.setattr("pipeline.db.table_locks.LOCK_WAIT", short_wait())
    monkeypatch.setattr("pipeline.db.table_locks.log", LetGo("table_locked", requested))

    difference = rebuild(projected.engine, orders)

    holder.join()
    assert requested.is_set()
    assert difference.differing == 0


def test_rebuilds_during_live_traffic_find_no_difference(given: Given):
    """Two live workers and a writer continue; the count of differing rows must stay 0."""
    stop = threading.Event()
    events = sample_events()
    chunk_offsets = 500

    def write() -> None:
        for turn in range(200):
            more = moved_on(events, turn)
            # A live table that is a chunk behind is repaired and not brought up first.
            while behind(given, BOTH) + len(more) >= chunk_offsets:
                if stop.wait(0.01):
                    return
            given.log.append(more, partition=turn % 3)

    given(events).project(*BOTH)
    threads = [threading.Thread(target=write)]
    threads += [
        threading.Thread(
            target=run_projection,
            args=(given.engine, BOTH, Limits(batch_offsets_max=700)),
            kwargs={"stop": stop},
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    try:
        found = [
            rebuild(given.engine, projector, chunk_offsets=chunk_offsets, jobs=jobs)
            for jobs in (1, 2, 3)
            for projector in BOTH
        ]
        found += [check(given.engine, projector, jobs=2) for projector in BOTH]
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert [(difference.differing, difference.lag) for difference in found] == [(0, 0)] * len(found)
    given.project(*BOTH)
    assert [check(given.engine, projector).differing for projector in BOTH] == [0, 0]


# -------------------------------------------------------------------------------------------- parts


def behind(given: Given, projectors) -> int:
    """Offsets that the projector which is furthest behind has not taken yet."""
    with transaction(given.engine) as db:
        return max(
            sum(partition.lag for partition in progress(db, [projector.name]))
            for projector in projectors
        )


def moved_on(events, turn: int):
    """The sample's orders and executions as they stand ``turn`` minutes later."""
    later = f"2026-02-01T{turn // 60:02}:{turn % 60:02}:00Z"
    return [
        {
            **event,
            "id": f"{turn:08x}{event['id'][8:]}",
            "created_at": later,
            "object": {**event["object"], "updated_at": later, "client_reference": str(turn)},
        }
        for event in events
        if event["type"].startswith(("ORDER.", "EXECUTION."))
    ]


def begin_and_stop_half_way(given: Given) -> None:
    def observe(progress: RebuildProgress) -> None:
        if progress.done > progress.total // 2:
            stop.set()

    stop = threading.Event()
    with pytest.raises(StoppedError):
        rebuild(given.engine, orders, chunk_offsets=50, stop=stop, observe=observe)


@pytest.fixture
def armed(monkeypatch):
    """Arms a fail point for the test."""

    def arm(spec: str) -> None:
        failpoints.arm({"PIPELINE_ENABLE_FAILPOINTS": "1", "PIPELINE_FAILPOINT": spec})

    yield arm
    monkeypatch.setattr(failpoints, "_armed", None)


class LetGo:
    """A log that sets an event when a line comes."""

    def __init__(self, line: str, event: threading.Event) -> None:
        self._line = line
        self._event = event

    def info(self, event: str, **_values: object) -> None:
        if event == self._line:
            self._event.set()


def short_wait():
    from sqlalchemy import text

    return text("SET LOCAL lock_timeout = '200ms'")


def lock(db: Connection, table: str) -> None:
    from sqlalchemy import text

    db.execute(text(f"LOCK TABLE {table} IN ROW EXCLUSIVE MODE"))


def fingerprint_of(given: Given, projector: str) -> str:
    found: str = given.scalar(
        "SELECT fingerprint FROM pipeline.projectors WHERE projector = :name", name=projector
    )
    return found


def nothing_is_left_behind(given: Given) -> bool:
    tables = given.scalar(
        "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = 'pipeline_shadow'"
    )
    names = given.scalar(
        "SELECT count(*) FROM pipeline.projection_checkpoints WHERE projector LIKE '%@rebuild'"
    )
    ranges = given.scalar("SELECT count(*) FROM pipeline.rebuild_ranges")
    return (tables, names, ranges) == (0, 0, 0)

"""One writer per partition: claims, open commits, locks and gaps, in a real PostgreSQL."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, text

from pipeline.db import SessionLimits, open_engine, transaction
from pipeline.errors import (
    FencedError,
    InvariantError,
    RecreatedTopicError,
    RetentionGapError,
    TransientError,
)
from pipeline.log import claims, gaps, offsets, origin, ranges, search, watermarks
from pipeline.log.append import append
from pipeline.log.claims import Owner
from pipeline.log.copying import decode
from pipeline.log.gaps import Gap
from pipeline.log.origin import KafkaPartition
from pipeline.log.segments import make_segment
from pipeline.partitions import Epoch, NextOffset, Ownership, Partition
from tests import waiting
from tests.contract.logs import advance, owned_at, row_at

A, B = Partition("orders", 0), Partition("orders", 1)
ME = Owner("group", "member")
WAIT_S_MAX = 20.0


@pytest.fixture
def engine(database) -> Iterator[Engine]:
    engine = open_engine(database.url, application="test", pool_size=6)
    with transaction(engine) as db:
        for partition in (A, B):
            offsets.begin(db, partition, NextOffset(0))
        make_segment(db, "orders", NextOffset(0), 1000)
    yield engine
    engine.dispose()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def claim(engine: Engine, partition: Partition) -> ranges.LoggedPartition:
    with transaction(engine) as db:
        return claims.claim(db, partition, ME)


def find(engine: Engine, partition: Partition = A) -> Ownership:
    with transaction(engine) as db:
        return claims.lock_ownerships(db, [partition])[partition]


def write(engine: Engine, partition: Partition, held: int, expected: int, new: int) -> None:
    rows = [row_at(partition, offset) for offset in range(expected, new)]
    with transaction(engine) as db:
        append(db, rows, {partition: advance(held, expected, new)})


def column(engine: Engine, name: str, partition: Partition = A) -> Any:
    with transaction(engine) as db:
        return db.execute(
            text(
                f"SELECT {name} FROM pipeline.consumer_offsets "
                'WHERE topic = :topic AND "partition" = :number'
            ),
            {"topic": partition.topic, "number": partition.number},
        ).scalar_one()


until = partial(waiting.until, seconds_max=WAIT_S_MAX)


def until_somebody_waits(database) -> None:
    """Until a session of this database waits for a lock."""
    with database.connect() as watcher:
        until(
            lambda: (
                watcher.execute(
                    "SELECT count(*) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND wait_event_type = 'Lock'"
                ).fetchone()
                == (1,)
            ),
            "a session waits for a lock",
        )


@contextmanager
def held_open(engine: Engine, do: Callable[[Any], object], *, commit: bool) -> Iterator[None]:
    """A transaction that has done something and stays open until the end of the block."""
    with engine.connect() as db:
        do(db)
        yield
        if commit:
            db.commit()
        else:
            db.rollback()


# ------------------------------------------------------------------------------------ open commits


@pytest.mark.both_postgres
@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("read", [claim, find])
def test_a_claim_waits_for_a_commit_that_is_still_in_flight(engine, database, pool, commits, read):
    """The next owner, and a writer that lost its answer, must see the outcome of a commit."""
    held = claim(engine, A).epoch

    def do(db):
        append(db, [row_at(A, 0)], {A: advance(held, 0, 1)})

    with held_open(engine, do, commit=commits):
        answer: Future[Any] = pool.submit(read, engine, A)
        until_somebody_waits(database)
        assert not answer.done()

    assert answer.result(WAIT_S_MAX).next_offset == (1 if commits else 0)


@pytest.mark.both_postgres
def test_a_writer_that_waits_for_a_claim_is_fenced_by_it(engine, database, pool):
    held = claim(engine, A).epoch

    with held_open(engine, lambda db: claims.claim(db, A, ME), commit=True):
        zombie = pool.submit(write, engine, A, held, 0, 3)
        until_somebody_waits(database)

    with pytest.raises(FencedError):
        zombie.result(WAIT_S_MAX)
    assert find(engine) == owned_at(held + 1, 0)


@pytest.mark.both_postgres
def test_a_repeat_that_waits_for_its_first_attempt_is_refused(engine, database, pool):
    """The commit whose answer was lost is still open when the batch is sent again."""
    held = claim(engine, A).epoch

    def first_try(db):
        append(db, [row_at(A, 0)], {A: advance(held, 0, 1)})

    with held_open(engine, first_try, commit=True):
        repeat = pool.submit(write, engine, A, held, 0, 1)
        until_somebody_waits(database)

    with pytest.raises(FencedError):
        repeat.result(WAIT_S_MAX)
    assert find(engine) == owned_at(held, 1)


@pytest.mark.parametrize("read", [claim, find])
def test_a_claim_waits_for_a_lock_of_another_session(engine, database, read):
    short_waits = open_engine(
        database.url,
        application="test",
        limits=SessionLimits(lock_wait=timedelta(milliseconds=200)),
    )

    with (
        held_open(engine, lambda db: claims.claim(db, A, ME), commit=False),
        pytest.raises(TransientError) as refused,
    ):
        read(short_waits, A)

    assert refused.value.sqlstate == "55P03"
    assert read(short_waits, A).next_offset == 0
    short_waits.dispose()


def test_a_silent_owner_in_a_transaction_does_not_block_the_next_owner(database, engine):
    silent = open_engine(
        database.url,
        application="test",
        limits=SessionLimits(idle_in_transaction=timedelta(milliseconds=300)),
    )
    held = claim(engine, A).epoch

    def write_and_send_nothing() -> None:
        with transaction(silent) as db:
            append(db, [row_at(A, 0)], {A: advance(held, 0, 1)})
            assert claim(engine, A).next_offset == 0

    with pytest.raises(TransientError):
        write_and_send_nothing()
    assert find(engine) == owned_at(held + 1, 0)
    silent.dispose()


def test_two_writers_of_the_same_partitions_never_deadlock(engine, pool):
    stop = threading.Event()

    def keep_writing(order: list[Partition]) -> int:
        written = 0
        while not stop.is_set():
            for partition in order:
                claim(engine, partition)
            with transaction(engine) as db:
                owned = claims.lock_ownerships(db, order)
            advances = {
                partition: advance(row.epoch, row.next_offset, row.next_offset + 1)
                for partition, row in owned.items()
            }
            rows = [row_at(partition, owned[partition].next_offset) for partition in order]
            try:
                with transaction(engine) as db:
                    append(db, rows, advances)
                written += 1
            except FencedError:
                pass
        return written

    writers = [pool.submit(keep_writing, order) for order in ([A, B], [B, A])]
    until(lambda: find(engine).next_offset >= 30, "30 batches are written")
    stop.set()

    written = [writer.result(WAIT_S_MAX) for writer in writers]
    assert find(engine, A).next_offset == find(engine, B).next_offset == sum(written)


# ------------------------------------------------------------------------------------ bookkeeping


@pytest.mark.both_postgres
def test_a_claim_records_the_owner_and_a_release_removes_it(engine):
    first = claim(engine, A).epoch
    owner = [column(engine, f"owner_{name}") for name in ("group", "member", "host", "pid")]
    second = claim(engine, A).epoch

    with transaction(engine) as db:
        claims.release(db, [(A, first)])
    still = column(engine, "owner_member")
    with transaction(engine) as db:
        claims.release(db, [(A, second)])

    assert owner == [ME.group, ME.member, ME.host, ME.pid]
    assert still == ME.member
    assert column(engine, "owner_member") is None


def test_a_partition_that_was_never_begun_cannot_be_claimed(engine):
    with pytest.raises(
        InvariantError, match=r"orders:9: claimed before its first offset was recorded"
    ):
        claim(engine, Partition("orders", 9))


def test_the_first_to_begin_a_topic_decides_for_all_its_partitions(engine, database, pool):
    def begin_all() -> frozenset[int]:
        with transaction(engine) as db:
            known = frozenset(offsets.lock_origins(db, "prices"))
            for number in {0, 1, 2} - known:
                offsets.begin(db, Partition("prices", number), NextOffset(5))
        return known

    with held_open(engine, lambda db: offsets.lock_origins(db, "prices"), commit=False):
        both = [pool.submit(begin_all), pool.submit(begin_all)]
        with database.connect() as watcher:
            until(
                lambda: (
                    watcher.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                        "AND datname = current_database()"
                    ).fetchone()
                    == (2,)
                ),
                "both wait for their turn",
            )

    assert sorted(len(future.result(WAIT_S_MAX)) for future in both) == [0, 3]


def test_a_record_of_an_older_owner_is_ignored(engine):
    old = claim(engine, A).epoch
    new = claim(engine, A).epoch
    source = KafkaPartition("cluster", "topic id", NextOffset(0), NextOffset(50))

    with transaction(engine) as db:
        offsets.record_source(db, A, old, source)
        watermarks.record_watermarks(db, [watermarks.Watermark(A, old, 70)])
        offsets.halt(db, A, old, RecreatedTopicError(A, expected="topic id a", found="topic id b"))
    ignored = [column(engine, name) for name in ("cluster_id", "high_watermark", "problem")]
    with transaction(engine) as db:
        offsets.record_source(db, A, new, source)
        watermarks.record_watermarks(db, [watermarks.Watermark(A, new, 70)])

    assert ignored == [None, None, None]
    assert [column(engine, name) for name in ("cluster_id", "topic_id", "high_watermark")] == [
        "cluster", "topic id", 70,
    ]  # fmt: skip


def test_a_topic_id_is_kept_where_the_broker_does_not_report_it_again(engine):
    held = claim(engine, A).epoch
    for topic_id in ("topic id", None):
        with transaction(engine) as db:
            source = KafkaPartition("cluster", topic_id, NextOffset(0), NextOffset(50))
            offsets.record_source(db, A, held, source)

    assert claim(engine, A).topic_id == "topic id"


def test_the_repeat_window_is_filled_with_the_last_events_only(engine):
    held = claim(engine, A).epoch
    rows = [row_at(A, n, b'{"id": "00000000-0000-0000-0000-00000000000%d"}' % n) for n in range(8)]
    rows[3] = row_at(A, 3, b"no event")
    rows[6] = row_at(A, 6, b'{"id": "00000000-0000-0000-0000-000000000006"}', repeat_of=0)
    with transaction(engine) as db:
        append(db, rows, {A: advance(held, 0, 8)})

    with transaction(engine) as db:
        seen = search.recent(db, A, NextOffset(7), 5)
        last = origin.last_record(db, A, NextOffset(8))
        none = origin.last_record(db, B, NextOffset(8))

    assert [(row.offset, row.first) for row in seen] == [(2, 2), (4, 4), (5, 5), (6, 0)]
    assert [row.digest for row in seen] == [decode(rows[row.offset]).digest for row in seen]
    assert last == (7, decode(rows[7]).digest)
    assert none is None


# -------------------------------------------------------------------------------------------- gaps


def gap(engine: Engine, held: int, expected: int, low: int) -> None:
    error = RetentionGapError(A, expected=NextOffset(expected), low=NextOffset(low))
    with transaction(engine) as db:
        offsets.halt(db, A, Epoch(held), error)


@pytest.mark.both_postgres
def test_a_gap_is_recorded_and_nothing_moves_before_it_is_accepted(engine):
    held = claim(engine, A).epoch
    write(engine, A, held, 0, 3)

    gap(engine, held, 3, 10)
    gap(engine, held, 3, 12)

    with transaction(engine) as db:
        [row] = gaps.all_gaps(db)
        freed = offsets.not_halted(db, [A])
    assert (row["topic"], row["partition"]) == A
    assert (row["first_offset"], row["end_offset"]) == (3, 12)
    assert row["accepted_at"] is None
    assert freed == []
    assert "pipeline gaps accept orders:0" in column(engine, "problem_fix")
    assert find(engine) == owned_at(held, 3)


@pytest.mark.both_postgres
def test_an_accepted_gap_fences_the_owner_and_lets_the_partition_continue_after_it(engine):
    held = claim(engine, A).epoch
    gap(engine, held, 0, 10)

    with transaction(engine) as db:
        accepted = gaps.accept_gap(db, A)
        freed = offsets.not_halted(db, [A])

    assert accepted == Gap(NextOffset(0), NextOffset(10))
    assert freed == [A]
    assert find(engine) == owned_at(held + 1, 10)
    with pytest.raises(FencedError):
        write(engine, A, held, 10, 11)
    with transaction(engine) as db:
        [row] = gaps.all_gaps(db)
        again = gaps.accept_gap(db, A)
    assert row["accepted_by"] == "postgres"
    assert again is None


def test_a_gap_that_grew_after_it_was_accepted_is_a_new_gap(engine):
    held = claim(engine, A).epoch
    gap(engine, held, 0, 10)
    with transaction(engine) as db:
        gaps.accept_gap(db, A)

    gap(engine, claim(engine, A).epoch, 10, 20)

    with transaction(engine) as db:
        found = gaps.all_gaps(db)
    listed = [(row["first_offset"], row["end_offset"], row["accepted_at"] is None) for row in found]
    assert listed == [(0, 10, False), (10, 20, True)]


def test_a_gap_that_does_not_begin_at_the_next_offset_is_not_accepted(engine):
    held = claim(engine, A).epoch
    gap(engine, held, 0, 10)
    write(engine, A, held, 0, 1)

    with (
        pytest.raises(InvariantError, match=r"orders:0: its next offset is no longer 0"),
        transaction(engine) as db,
    ):
        gaps.accept_gap(db, A)

    assert find(engine) == owned_at(held, 1)


# ---------------------------------------------------------------------------------------- sessions


@pytest.mark.both_postgres
def test_a_session_reads_times_as_utc_and_ends_when_its_client_is_lost(database):
    engine = open_engine(
        database.url,
        application="pipeline ingest",
        limits=SessionLimits(
            idle_in_transaction=timedelta(seconds=7), lock_wait=timedelta(seconds=3)
        ),
    )
    names = {
        "timezone": "UTC",
        "datestyle": "ISO, YMD",
        "application_name": "pipeline ingest",
        "idle_in_transaction_session_timeout": "7s",
        "lock_timeout": "3s",
    }

    with transaction(engine) as db:
        found = {name: db.execute(text(f"SHOW {name}")).scalar_one() for name in names}

    assert found == names
    engine.dispose()

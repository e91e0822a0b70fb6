"""The writer's thread: one step at a time, and what came of it, in a real PostgreSQL."""

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from pipeline import failpoints
from pipeline.db import SessionLimits, open_engine, transaction
from pipeline.errors import FencedError, InvariantError, TransientError
from pipeline.ingest.state import Batch, Resolve, Write
from pipeline.ingest.writer import (
    Committed,
    Failed,
    Fatal,
    Fenced,
    Resolved,
    TopicsReplaced,
    Writer,
)
from pipeline.log import offsets
from pipeline.log.offsets import Owner
from pipeline.partitions import NextOffset, Partition
from tests.contract.logs import advance, place, row_at

A = Partition("orders", 0)
WAIT_S_MAX = 20.0


@pytest.fixture
def engine(database) -> Iterator[Engine]:
    limits = SessionLimits(lock_wait=timedelta(milliseconds=500))
    engine = open_engine(database.url, application="test", limits=limits)
    with transaction(engine) as db:
        offsets.begin(db, A, NextOffset(0))
    yield engine
    engine.dispose()


@pytest.fixture
def held(engine) -> int:
    with transaction(engine) as db:
        return offsets.claim(db, A, Owner("tests", "member")).epoch


@pytest.fixture
def writer(engine) -> Iterator[Writer]:
    with Writer(engine, segment_span=1000) as writer:
        yield writer


@pytest.fixture
def arm(monkeypatch):
    monkeypatch.setattr(failpoints, "_armed", None)

    def arm(spec):
        failpoints.arm({"PIPELINE_ENABLE_FAILPOINTS": "1", "PIPELINE_FAILPOINT": spec})

    return arm


def batch_of(held: int, expected: int, *offsets: int) -> Batch:
    rows = [row_at(A, offset) for offset in offsets]
    return Batch(rows, {A: advance(held, expected, offsets[-1] + 1)})


def outcome(writer: Writer, job: Write | Resolve) -> object:
    writer.submit(job)
    return writer.outcome(WAIT_S_MAX)


def logged_offsets(database) -> list[int]:
    with database.connect() as db:
        rows = db.execute('SELECT "offset" FROM pipeline.events ORDER BY 1').fetchall()
    return [offset for (offset,) in rows]


def test_a_batch_is_written_and_its_place_found(writer, held, database):
    batch = batch_of(held, 0, 0, 1, 7)

    assert outcome(writer, Write(batch)) == Committed()
    assert outcome(writer, Resolve(batch)) == Resolved({A: place(held, 8)})
    assert logged_offsets(database) == [0, 1, 7]


def test_a_batch_of_a_topic_that_was_replaced_is_rolled_back(writer, held, database):
    """Kafka's word comes last, when all but the commit is done."""
    batch = batch_of(held, 0, 0, 1, 7)

    writer.submit(Write(batch), lambda: ["orders"])

    assert writer.outcome(WAIT_S_MAX) == TopicsReplaced(["orders"])
    assert logged_offsets(database) == []
    assert outcome(writer, Resolve(batch)) == Resolved({A: place(held, 0)})


def test_a_batch_of_which_kafka_says_nothing_is_not_committed(writer, held, database):
    def says_nothing():
        raise TransientError("Kafka is away")

    writer.submit(Write(batch_of(held, 0, 0, 1)), says_nothing)

    failed = writer.outcome(WAIT_S_MAX)
    assert isinstance(failed, Failed)
    assert str(failed.error) == "Kafka is away"
    assert logged_offsets(database) == []


def test_segments_are_made_before_they_are_needed(writer, held, database):
    outcome(writer, Write(batch_of(held, 0, 0, 950)))

    with database.connect() as db:
        made = db.execute("SELECT first_offset FROM pipeline.segments ORDER BY 1").fetchall()
    assert made == [(0,), (1000,)]


def test_a_batch_across_wide_gaps_finds_its_segments(writer, held, database):
    far_apart = [0, 5_500, 70_000, 2_000_000, 2_000_999, 9_000_000_000]

    assert outcome(writer, Write(batch_of(held, 0, *far_apart))) == Committed()

    assert logged_offsets(database) == far_apart


def test_a_segment_that_was_taken_away_is_made_again(writer, held, database):
    outcome(writer, Write(batch_of(held, 0, 0)))
    with database.connect() as db:
        segments = db.execute("SELECT segment FROM pipeline.segments").fetchall()
        for (segment,) in segments:
            db.execute(f'DROP TABLE pipeline_segments."{segment}"')
        db.execute("DELETE FROM pipeline.segments")

    assert outcome(writer, Write(batch_of(held, 1, 1, 2))) == Committed()
    assert logged_offsets(database) == [1, 2]


def test_a_fenced_batch_is_told_with_its_partition(writer, held, database):
    told = outcome(writer, Write(batch_of(held - 1, 0, 0)))

    assert isinstance(told, Fenced)
    assert isinstance(told.error, FencedError)
    assert told.error.partition == A
    assert logged_offsets(database) == []


@pytest.mark.parametrize("step", ["after_begin", "after_fence", "mid_copy", "after_copy",
                                  "before_commit"])  # fmt: skip
@pytest.mark.parametrize("trouble", ["raise:40001", "disconnect"])
def test_trouble_at_any_step_leaves_nothing_and_the_next_try_works(
    writer, held, database, arm, step, trouble
):
    batch = batch_of(held, 0, 0, 1)
    arm(f"{step}:{trouble}")

    told = outcome(writer, Write(batch))

    assert isinstance(told, Failed)
    assert isinstance(told.error, TransientError)
    assert outcome(writer, Resolve(batch)) == Resolved({A: place(held, 0)})
    assert outcome(writer, Write(batch)) == Committed()
    assert logged_offsets(database) == [0, 1]


def test_a_lost_answer_is_an_unknown_outcome_that_is_found_committed(writer, held, database, arm):
    batch = batch_of(held, 0, 0)
    arm("after_commit_before_ack:raise:08006")

    assert isinstance(outcome(writer, Write(batch)), Failed)
    assert outcome(writer, Resolve(batch)) == Resolved({A: place(held, 1)})
    assert logged_offsets(database) == [0]


def test_a_look_that_must_wait_too_long_fails_and_may_be_repeated(writer, held, database):
    batch = batch_of(held, 0, 0)
    with database.connect(autocommit=False) as somebody:
        somebody.execute("SELECT 1 FROM pipeline.consumer_offsets FOR UPDATE")

        told = outcome(writer, Resolve(batch))

    assert isinstance(told, Failed)
    assert outcome(writer, Resolve(batch)) == Resolved({A: place(held, 0)})


def test_a_row_that_is_there_already_breaks_the_work(writer, held, database):
    outcome(writer, Write(batch_of(held, 0, 0)))

    told = outcome(writer, Write(batch_of(held, 1, 0)))

    assert isinstance(told, Fatal)
    assert isinstance(told.error, InvariantError)
    assert logged_offsets(database) == [0]


def test_settling_waits_for_the_step_in_hand(writer, held, database, arm):
    arm("before_commit:sleep:0.3")
    writer.submit(Write(batch_of(held, 0, 0)))

    assert writer.outcome(0.0) is None
    writer.wait_until_idle()

    assert logged_offsets(database) == [0]


def test_leaving_does_not_wait_for_a_database_that_hangs(engine, held, arm):
    arm("before_commit:sleep:2.5")
    with Writer(engine, segment_span=1000) as writer:
        writer.submit(Write(batch_of(held, 0, 0)))
        began = time.monotonic()

    assert time.monotonic() - began < 2.0
    writer.wait_until_idle()

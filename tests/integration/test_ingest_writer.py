"""The writer's thread: one step at a time, and its outcome, in a real PostgreSQL."""

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Engine

from pipeline import failpoints
from pipeline.db import SessionLimits, open_engine, transaction
from pipeline.errors import InvariantError, TransientError
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
from pipeline.log import claims, offsets
from pipeline.log.claims import Owner
from pipeline.partitions import NextOffset, Partition
from tests.contract.logs import advance, owned_at, row_at

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
        return claims.claim(db, A, Owner("tests", "member")).epoch


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


def test_a_batch_is_written_and_its_next_offset_resolved(writer, held, database):
    batch = batch_of(held, 0, 0, 1, 7)

    assert outcome(writer, Write(batch)) == Committed()
    assert outcome(writer, Resolve(batch)) == Resolved({A: owned_at(held, 8)})
    assert logged_offsets(database) == [0, 1, 7]


def test_a_batch_of_a_recreated_topic_is_rolled_back(writer, held, database):
    """Kafka answers last, when everything but the commit is done."""
    batch = batch_of(held, 0, 0, 1, 7)

    writer.submit(Write(batch), lambda: ["orders"])

    assert writer.outcome(WAIT_S_MAX) == TopicsReplaced(["orders"])
    assert logged_offsets(database) == []
    assert outcome(writer, Resolve(batch)) == Resolved({A: owned_at(held, 0)})


def test_a_batch_is_not_committed_while_kafka_does_not_answer(writer, held, database):
    def does_not_answer():
        raise TransientError("Kafka is unavailable")

    writer.submit(Write(batch_of(held, 0, 0, 1)), does_not_answer)

    failed = writer.outcome(WAIT_S_MAX)
    assert isinstance(failed, Failed)
    assert str(failed.error) == "Kafka is unavailable"
    assert logged_offsets(database) == []


def test_segments_are_created_before_they_are_needed(writer, held, database):
    outcome(writer, Write(batch_of(held, 0, 0, 950)))

    with database.connect() as db:
        made = db.execute("SELECT first_offset FROM pipeline.segments ORDER BY 1").fetchall()
    assert made == [(0,), (1000,)]


def test_a_batch_across_wide_gaps_finds_its_segments(writer, held, database):
    far_apart = [0, 5_500, 70_000, 2_000_000, 2_000_999, 9_000_000_000]

    assert outcome(writer, Write(batch_of(held, 0, *far_apart))) == Committed()

    assert logged_offsets(database) == far_apart


def test_a_segment_that_was_dropped_is_created_again(writer, held, database):
    outcome(writer, Write(batch_of(held, 0, 0)))
    with database.connect() as db:
        segments = db.execute("SELECT segment FROM pipeline.segments").fetchall()
        for (segment,) in segments:
            db.execute(f'DROP TABLE pipeline_segments."{segment}"')
        db.execute("DELETE FROM pipeline.segments")

    assert outcome(writer, Write(batch_of(held, 1, 1, 2))) == Committed()
    assert logged_offsets(database) == [1, 2]


def test_a_fenced_batch_is_reported_and_not_written(writer, held, database):
    result = outcome(writer, Write(batch_of(held - 1, 0, 0)))

    assert result == Fenced()
    assert logged_offsets(database) == []


@pytest.mark.parametrize("step", ["after_begin", "after_fence", "mid_copy", "after_copy",
                                  "before_commit"])  # fmt: skip
@pytest.mark.parametrize("error", ["raise:40001", "disconnect"])
def test_an_error_at_any_step_writes_nothing_and_the_next_attempt_succeeds(
    writer, held, database, arm, step, error
):
    batch = batch_of(held, 0, 0, 1)
    arm(f"{step}:{error}")

    result = outcome(writer, Write(batch))

    assert isinstance(result, Failed)
    assert isinstance(result.error, TransientError)
    assert outcome(writer, Resolve(batch)) == Resolved({A: owned_at(held, 0)})
    assert outcome(writer, Write(batch)) == Committed()
    assert logged_offsets(database) == [0, 1]


def test_a_lost_answer_is_an_unknown_outcome_that_is_resolved_as_committed(
    writer, held, database, arm
):
    batch = batch_of(held, 0, 0)
    arm("after_commit_before_ack:raise:08006")

    assert isinstance(outcome(writer, Write(batch)), Failed)
    assert outcome(writer, Resolve(batch)) == Resolved({A: owned_at(held, 1)})
    assert logged_offsets(database) == [0]


def test_resolving_that_waits_too_long_for_a_lock_fails_and_can_be_repeated(writer, held, database):
    batch = batch_of(held, 0, 0)
    with database.connect(autocommit=False) as somebody:
        somebody.execute("SELECT 1 FROM pipeline.consumer_offsets FOR UPDATE")

        result = outcome(writer, Resolve(batch))

    assert isinstance(result, Failed)
    assert outcome(writer, Resolve(batch)) == Resolved({A: owned_at(held, 0)})


def test_a_row_that_is_in_the_log_already_is_fatal(writer, held, database):
    outcome(writer, Write(batch_of(held, 0, 0)))

    result = outcome(writer, Write(batch_of(held, 1, 0)))

    assert isinstance(result, Fatal)
    assert isinstance(result.error, InvariantError)
    assert logged_offsets(database) == [0]


def test_waiting_until_idle_waits_for_the_current_step(writer, held, database, arm):
    arm("before_commit:sleep:0.3")
    writer.submit(Write(batch_of(held, 0, 0)))

    assert writer.outcome(0.0) is None
    writer.wait_until_idle()

    assert logged_offsets(database) == [0]


def test_the_end_does_not_wait_for_a_database_that_hangs(engine, held, arm):
    arm("before_commit:sleep:2.5")
    with Writer(engine, segment_span=1000) as writer:
        writer.submit(Write(batch_of(held, 0, 0)))
        began = time.monotonic()

    assert time.monotonic() - began < 2.0
    writer.wait_until_idle()

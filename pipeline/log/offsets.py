"""Next offsets: where a partition begins, how far it is, and whether it is halted."""

import time
from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import (
    Connection,
    bindparam,
    case,
    func,
    insert,
    select,
    text,
    update,
)

from pipeline.db import locks
from pipeline.errors import FencedError, RefusedError, RetentionGapError
from pipeline.log import gaps
from pipeline.log.origin import KafkaPartition, Origin
from pipeline.log.tables import THIS_PARTITION, consumer_offsets, key_of
from pipeline.partitions import Advance, Epoch, NextOffset, Partition

OF_TOPIC = select(
    consumer_offsets.c.partition, consumer_offsets.c.cluster_id, consumer_offsets.c.topic_id
).where(consumer_offsets.c.topic == bindparam("of_topic"))
BEGIN_PARTITION = insert(consumer_offsets)
BEGIN_EARLIER = (
    update(consumer_offsets)
    .where(*THIS_PARTITION)
    .values(first_offset=func.least(consumer_offsets.c.first_offset, bindparam("first")))
)
# The rows are locked in one order first, so that two writers cannot deadlock.
ADVANCE = text("""
WITH batch AS (
    SELECT * FROM unnest(
        CAST(:topics AS text[]), CAST(:numbers AS int[]), CAST(:held AS bigint[]),
        CAST(:expected AS bigint[]), CAST(:new AS bigint[]), CAST(:high AS bigint[]),
        CAST(:seen_s AS double precision[])
    ) AS b(topic, number, held, expected, new, high, seen_s)
), locked AS MATERIALIZED (
    SELECT o.topic, o."partition" FROM pipeline.consumer_offsets o
    JOIN batch b ON o.topic = b.topic AND o."partition" = b.number
    ORDER BY o.topic, o."partition" FOR UPDATE OF o
)
UPDATE pipeline.consumer_offsets o
SET next_offset = b.new,
    committed_at = now(),
    high_watermark = greatest(coalesce(b.high, o.high_watermark), b.new),
    -- When Kafka reported its end, which may be long before this batch is written.
    watermarks_at = CASE WHEN b.high IS NULL THEN o.watermarks_at
        ELSE least(now(), greatest(o.watermarks_at, now() - b.seen_s * interval '1 s')) END
FROM batch b JOIN locked l ON l.topic = b.topic AND l."partition" = b.number
WHERE o.topic = b.topic AND o."partition" = b.number
  AND o.epoch = b.held AND o.next_offset = b.expected
RETURNING o.topic, o."partition"
""")
RECORD_SOURCE = (
    update(consumer_offsets)
    .where(*THIS_PARTITION, consumer_offsets.c.epoch == bindparam("held"))
    .values(
        cluster_id=bindparam("at_cluster"),
        topic_id=func.coalesce(bindparam("with_id"), consumer_offsets.c.topic_id),
        low_watermark=bindparam("low"),
        high_watermark=bindparam("high"),
        watermarks_at=func.now(),
        problem=None,
        problem_fix=None,
        problem_at=None,
    )
)
HALT = (
    update(consumer_offsets)
    .where(*THIS_PARTITION, consumer_offsets.c.epoch == bindparam("held"))
    .values(
        problem=bindparam("why"),
        problem_fix=bindparam("fix"),
        problem_at=case(
            (consumer_offsets.c.problem == bindparam("why"), consumer_offsets.c.problem_at),
            else_=func.now(),
        ),
    )
)
NOT_HALTED = select(consumer_offsets.c.topic).where(
    *THIS_PARTITION, consumer_offsets.c.problem.is_(None)
)


def lock_origins(db: Connection, topic: str) -> dict[int, Origin]:
    """The origins of the topic's partitions that the log has begun to read, by number.

    Until the transaction ends no other process may begin a partition of the topic, so that the
    first process decides for the whole topic.
    """
    locks.lock(db, f"begin {topic}")
    return {
        number: Origin(cluster_id, topic_id)
        for number, cluster_id, topic_id in db.execute(OF_TOPIC, {"of_topic": topic})
    }


def begin(db: Connection, partition: Partition, first: NextOffset) -> None:
    """Record where a partition that was never read is read from."""
    db.execute(
        BEGIN_PARTITION,
        {
            "topic": partition.topic,
            "partition": partition.number,
            "first_offset": first,
            "next_offset": first,
        },
    )


def begin_earlier(db: Connection, partition: Partition, first: NextOffset) -> None:
    """Record that the log of a partition begins here, if it began later."""
    db.execute(BEGIN_EARLIER, {**key_of(partition), "first": first})


# ------------------------------------------------------------------------------------- advance


def advance(db: Connection, advances: Mapping[Partition, Advance]) -> None:
    """Move next offsets, if each partition still has the owner and the next offset expected.

    Raises:
        FencedError: A partition has a newer owner or another next offset. Roll back.
    """
    partitions = sorted(advances)
    batch = [advances[partition] for partition in partitions]
    moved = db.execute(
        ADVANCE,
        {
            "topics": [partition.topic for partition in partitions],
            "numbers": [partition.number for partition in partitions],
            "held": [step.held for step in batch],
            "expected": [step.expected for step in batch],
            "new": [step.new for step in batch],
            "high": [step.high_watermark for step in batch],
            "seen_s": [_age_s(step.seen_at) for step in batch],
        },
    )
    done = {Partition(topic, number) for topic, number in moved}
    for partition in partitions:
        if partition not in done:
            raise FencedError(partition, held=advances[partition].held)


def _age_s(seen_at: float | None) -> float:
    return 0.0 if seen_at is None else max(0.0, time.monotonic() - seen_at)


# --------------------------------------------------------------------------------- halt, resume


def record_source(
    db: Connection, partition: Partition, held: Epoch, source: KafkaPartition
) -> None:
    """Record where the partition's records come from, and that it is not halted."""
    db.execute(
        RECORD_SOURCE,
        {
            **key_of(partition),
            "held": held,
            "at_cluster": source.cluster_id,
            "with_id": source.topic_id,
            "low": source.low,
            "high": source.high,
        },
    )


def halt(db: Connection, partition: Partition, held: Epoch, why: RefusedError) -> None:
    """Record why a partition must not continue; a retention gap also gets its row in ``gaps``."""
    db.execute(HALT, {**key_of(partition), "held": held, "why": why.what, "fix": why.fix})
    if isinstance(why, RetentionGapError):
        gaps.record(db, partition, gaps.Gap(why.expected, why.low))


def not_halted(db: Connection, partitions: Iterable[Partition]) -> Sequence[Partition]:
    """Of partitions that were halted, those that an operator has allowed to continue."""
    return [p for p in partitions if db.execute(NOT_HALTED, key_of(p)).one_or_none()]

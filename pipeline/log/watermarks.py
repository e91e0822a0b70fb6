"""Where Kafka ends and how long it keeps a record, as last recorded: lag without asking Kafka."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, bindparam, func, text, update

from pipeline.log.claims import EPOCH_UNLESS_LOCKED
from pipeline.log.tables import consumer_offsets, key_of
from pipeline.partitions import Epoch, Partition

RECORD_WATERMARKS = (
    update(consumer_offsets)
    .where(
        consumer_offsets.c.topic == bindparam("of_topic"),
        consumer_offsets.c.partition == bindparam("of_number"),
        bindparam("held") == EPOCH_UNLESS_LOCKED,
    )
    .values(
        high_watermark=bindparam("high"),
        watermarks_at=func.now(),
        retention_ms=bindparam("retention"),
    )
)
# A record that is not in the log is newer than the newest one in it. Where there was none, it came
# after Kafka's end was recorded.
ROWS = text("""
SELECT o.*, newest.at AS newest_at,
       extract(epoch FROM
               CASE WHEN o.high_watermark > o.next_offset THEN newest.at ELSE o.watermarks_at END)
           + o.retention_ms / 1000.0 AS retention_deadline
FROM pipeline.consumer_offsets o
LEFT JOIN LATERAL (
    -- A record is no newer than its arrival, whatever its producer's clock says.
    SELECT least(e.kafka_timestamp, e.ingested_at) AS at FROM pipeline.events e
    WHERE e.topic = o.topic AND e."partition" = o."partition" AND e."offset" < o.next_offset
    ORDER BY e."offset" DESC LIMIT 1) newest ON true
ORDER BY o.topic, o."partition"
""")


class Watermark(NamedTuple):
    """What Kafka answered about a partition of ours.

    Attributes:
        held: The epoch under which we own it.
        high: Its end.
        retention_ms: How long Kafka keeps a record; None if not known or without limit.
    """

    partition: Partition
    held: Epoch
    high: int
    retention_ms: int | None = None


def record_watermarks(db: Connection, watermarks: Iterable[Watermark]) -> None:
    """Record Kafka's ends, so that lag is known without Kafka. Does not wait for locks."""
    for partition, held, high, retention_ms in sorted(watermarks, key=lambda w: w.partition):
        db.execute(
            RECORD_WATERMARKS,
            {**key_of(partition), "held": held, "high": high, "retention": retention_ms},
        )


def partition_rows(db: Connection) -> Sequence[Row[Any]]:
    """Each partition's row, with the time of its newest record and until when Kafka keeps the rest.

    ``retention_deadline``, in seconds since 1970, is when Kafka may delete the oldest record that
    is not in the log, by the times of records and the topic's retention as last recorded. It is
    NULL if that is not known or if time deletes nothing.
    """
    return db.execute(ROWS).all()


def retention_deadline(db: Connection, partitions: Collection[Partition]) -> float | None:
    """Until when Kafka keeps the oldest record of these partitions that is not in the log.

    Returns:
        Seconds since 1970; None if not known, or if Kafka keeps everything.
    """
    times = [
        row.retention_deadline
        for row in partition_rows(db)
        if Partition(row.topic, row.partition) in partitions and row.retention_deadline is not None
    ]
    until = min(times, default=None)
    return float(until) if until is not None and until.is_finite() else None

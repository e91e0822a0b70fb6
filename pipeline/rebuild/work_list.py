"""The work list of a rebuild: ranges of the log that it still has to take, in any order.

A connection takes a range, brings it into the tables and removes it from the list, all in one
transaction: after a kill its range is on the list again.
"""

from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    Table,
    Text,
    bindparam,
    delete,
    func,
    select,
    text,
)

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.partitions import NextOffset, OffsetRange, Partition

rebuild_ranges = Table(
    "rebuild_ranges",
    metadata,
    Column("projector", Text, primary_key=True, comment="NAME@rebuild, the rebuild in progress."),
    Column("topic", Text(collation="C"), primary_key=True, comment="Kafka topic."),
    Column(
        "partition",
        Integer,
        primary_key=True,
        autoincrement=False,
        comment="Partition of the topic.",
    ),
    Column(
        "first_offset",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        comment="First offset of the range.",
    ),
    Column("end_offset", BigInteger, nullable=False, comment="First offset after the range."),
    schema=LOG_SCHEMA,
    comment="Ranges of the log that a rebuild in progress still has to take, in any order.",
)


class Range(NamedTuple):
    """A range that this transaction has locked."""

    partition: Partition
    offsets: OffsetRange


PUT = text("""
INSERT INTO pipeline.rebuild_ranges AS r (projector, topic, "partition", first_offset, end_offset)
SELECT :projector, :topic, :number, first, least(first + :span, :end)
FROM generate_series(CAST(:first AS bigint), CAST(:end AS bigint) - 1, :span) AS first
ON CONFLICT (projector, topic, "partition", first_offset) DO UPDATE
SET end_offset = greatest(r.end_offset, excluded.end_offset)
""")
# By offset, so that neighbours on the list are of different partitions, which share hardly any key:
# the second transaction that writes a key waits for the commit of the first.
TAKE = (
    select(
        rebuild_ranges.c.topic,
        rebuild_ranges.c.partition,
        rebuild_ranges.c.first_offset,
        rebuild_ranges.c.end_offset,
    )
    .where(rebuild_ranges.c.projector == bindparam("of_projector"))
    .order_by(rebuild_ranges.c.first_offset, rebuild_ranges.c.topic, rebuild_ranges.c.partition)
    .limit(1)
    .with_for_update(skip_locked=True)
)
REMOVE = delete(rebuild_ranges).where(
    rebuild_ranges.c.projector == bindparam("of_projector"),
    rebuild_ranges.c.topic == bindparam("of_topic"),
    rebuild_ranges.c.partition == bindparam("of_number"),
    rebuild_ranges.c.first_offset == bindparam("first"),
)
LEFT = select(
    func.coalesce(func.sum(rebuild_ranges.c.end_offset - rebuild_ranges.c.first_offset), 0)
).where(rebuild_ranges.c.projector == bindparam("of_projector"))
FORGET = delete(rebuild_ranges).where(rebuild_ranges.c.projector == bindparam("of_projector"))


def put(
    db: Connection, projector: str, partition: Partition, offsets: OffsetRange, *, span_max: int
) -> None:
    """Put a range on the list, cut into ranges of at most so many offsets."""
    db.execute(
        PUT,
        {
            "projector": projector,
            "topic": partition.topic,
            "number": partition.number,
            "first": offsets.first,
            "end": offsets.end,
            "span": span_max,
        },
    )


def take(db: Connection, projector: str) -> Range | None:
    """Lock a range that no other connection has; None if there is none."""
    row = db.execute(TAKE, {"of_projector": projector}).one_or_none()
    if row is None:
        return None
    offsets = OffsetRange(NextOffset(row.first_offset), NextOffset(row.end_offset))
    return Range(Partition(row.topic, row.partition), offsets)


def remove(db: Connection, projector: str, done: Range) -> None:
    """Remove a range that is in the tables now."""
    db.execute(
        REMOVE,
        {
            "of_projector": projector,
            "of_topic": done.partition.topic,
            "of_number": done.partition.number,
            "first": done.offsets.first,
        },
    )


def left(db: Connection, projector: str) -> int:
    """Offsets on the list, those of locked ranges included."""
    return int(db.execute(LEFT, {"of_projector": projector}).scalar_one())


def forget(db: Connection, projector: str) -> None:
    """Delete the list."""
    db.execute(FORGET, {"of_projector": projector})

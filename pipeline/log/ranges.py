"""What the log holds of each partition, and where that came from; nothing is changed."""

from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import Connection, bindparam, or_, select

from pipeline.log.origin import Origin
from pipeline.log.tables import THIS_PARTITION, consumer_offsets, key_of
from pipeline.partitions import Epoch, NextOffset, OffsetRange, Partition


class LoggedPartition(NamedTuple):
    """What the log has recorded about a partition.

    Attributes:
        epoch: The number under which its owner must append.
        next_offset: The first offset that is not in the log.
        first_offset: Where the log of the partition begins.
        cluster_id, topic_id: As recorded by the last owner; None if never recorded.
    """

    epoch: Epoch
    next_offset: NextOffset
    first_offset: NextOffset
    cluster_id: str | None
    topic_id: str | None

    @property
    def origin(self) -> Origin:
        """The cluster and the topic that its records came from."""
        return Origin(self.cluster_id, self.topic_id)


LOGGED_COLUMNS = (
    consumer_offsets.c.epoch,
    consumer_offsets.c.next_offset,
    consumer_offsets.c.first_offset,
    consumer_offsets.c.cluster_id,
    consumer_offsets.c.topic_id,
)
LOG_RANGES = select(
    consumer_offsets.c.topic,
    consumer_offsets.c.partition,
    consumer_offsets.c.first_offset,
    consumer_offsets.c.next_offset,
).subquery("log_ranges")
"""What the log holds of each partition, for statements of other packages."""

RANGES = select(LOG_RANGES).order_by(LOG_RANGES.c.topic, LOG_RANGES.c.partition)
TOPICS = select(consumer_offsets.c.topic).distinct()
LOGGED = select(consumer_offsets.c.topic, consumer_offsets.c.partition, *LOGGED_COLUMNS).order_by(
    consumer_offsets.c.topic, consumer_offsets.c.partition
)
HALTED = select(consumer_offsets.c.topic, consumer_offsets.c.partition).where(
    consumer_offsets.c.problem.is_not(None)
)
REACHED = select(consumer_offsets.c.partition).where(
    *THIS_PARTITION,
    or_(
        consumer_offsets.c.next_offset >= bindparam("end"), consumer_offsets.c.problem.is_not(None)
    ),
)


def topics(db: Connection) -> frozenset[str]:
    """The topics that the log has begun to read."""
    return frozenset(db.execute(TOPICS).scalars())


def logged_partitions(db: Connection) -> dict[Partition, LoggedPartition]:
    """What the log has recorded about every partition that it has begun to read."""
    return {
        Partition(topic, number): LoggedPartition(*rest)
        for topic, number, *rest in db.execute(LOGGED)
    }


def halted_partitions(db: Connection) -> frozenset[Partition]:
    """The partitions that do not continue until an operator decides."""
    return frozenset(Partition(*row) for row in db.execute(HALTED))


def ranges(db: Connection) -> Mapping[Partition, OffsetRange]:
    """What the log holds of each partition."""
    return {
        Partition(row.topic, row.partition): OffsetRange(
            NextOffset(row.first_offset), NextOffset(row.next_offset)
        )
        for row in db.execute(RANGES)
    }


def range_arrays(db: Connection) -> dict[str, object]:
    """What the log holds of each partition, as arrays for ``unnest`` in a statement."""
    found = ranges(db)
    return {
        "topics": [partition.topic for partition in found],
        "numbers": [partition.number for partition in found],
        "first": [offsets.first for offsets in found.values()],
        "ends": [offsets.end for offsets in found.values()],
    }


def has_reached(db: Connection, ends: Mapping[Partition, int]) -> bool:
    """Whether the log has everything below these ends, whoever writes it.

    A halted partition does not continue by itself, and is not waited for.
    """
    return all(
        db.execute(REACHED, {**key_of(partition), "end": end}).one_or_none() is not None
        for partition, end in ends.items()
    )

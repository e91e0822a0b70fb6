"""Whether a topic in Kafka is still the one whose records are in the log.

The log records Kafka's ids of cluster and topic. Where a broker reports no topic id, the newest
record decides: Kafka must still have the same one at its offset.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from sqlalchemy import Connection, bindparam, select

from pipeline.errors import (
    RecreatedTopicError,
    RefusedError,
    TruncatedTopicError,
    WrongClusterError,
)
from pipeline.events import Record, read
from pipeline.log.tables import events
from pipeline.partitions import NextOffset, Offset, Partition


class Origin(NamedTuple):
    """The cluster and the topic that a partition's records come from; None where not known."""

    cluster_id: str | None
    topic_id: str | None


class KafkaPartition(NamedTuple):
    """What Kafka reports about a partition now.

    Attributes:
        cluster_id: Kafka's id of the cluster.
        topic_id: Kafka's id of the topic; None where the broker does not report it.
        low: First offset that Kafka still has.
        high: The end: the offset that the next record will get.
    """

    cluster_id: str
    topic_id: str | None
    low: NextOffset
    high: NextOffset


class LastRecord(NamedTuple):
    """The newest record in the log; ``digest`` is None for a tombstone."""

    offset: Offset
    digest: bytes | None


class Logged(Protocol):
    """What the log has recorded about the partition."""

    @property
    def origin(self) -> Origin:
        """Where its records came from."""

    @property
    def next_offset(self) -> NextOffset:
        """The first offset that is not in the log."""


RecordAt = Callable[[Partition, Offset], Record | None]
"""Reads the record at an offset from Kafka; None if there is none."""

LAST_RECORD = (
    select(events.c.offset, events.c.digest)
    .where(events.c.topic == bindparam("of_topic"))
    .where(events.c.partition == bindparam("of_number"))
    .where(events.c.offset < bindparam("below"))
    .order_by(events.c.offset.desc())
    .limit(1)
)


def last_record(db: Connection, partition: Partition, below: NextOffset) -> LastRecord | None:
    """The newest record of a partition in the log, to compare with Kafka's at its offset."""
    row = db.execute(
        LAST_RECORD,
        {"of_topic": partition.topic, "of_number": partition.number, "below": below},
    ).one_or_none()
    return LastRecord(*row) if row else None


def replaced_topics(expected: Mapping[str, str], found: Mapping[str, str | None]) -> Sequence[str]:
    """The topics that are not the ones that were read: Kafka has another id, or no such topic.

    Args:
        expected: The ids of the topics that were read, where they are known.
        found: What Kafka reports now; None for a topic that it does not have.
    """
    return [
        topic
        for topic, topic_id in found.items()
        if topic in expected and topic_id != expected[topic]
    ]


def why_other_origin(
    partition: Partition, recorded: Iterable[Origin], now: Origin
) -> RefusedError | None:
    """Why the topic of this name is not the one that was read; None if it may be the same."""
    for cluster_id, topic_id in recorded:
        if cluster_id not in (None, now.cluster_id):
            return WrongClusterError(partition, expected=str(cluster_id), found=str(now.cluster_id))
        if topic_id and now.topic_id and topic_id != now.topic_id:
            return RecreatedTopicError(
                partition, expected=f"topic id {topic_id}", found=now.topic_id
            )
    return None


def why_other_topic(
    partition: Partition,
    logged: Logged,
    last: LastRecord | None,
    kafka: KafkaPartition,
    record_at: RecordAt,
) -> RefusedError | None:
    """Why Kafka's partition is not the one in the log; None if it is, as far as can be known.

    Args:
        partition: Which.
        logged: What the log has recorded about it.
        last: The newest record in the log; None if it has none.
        kafka: What Kafka reports about it now.
        record_at: Reads one record from Kafka.
    """
    now = Origin(kafka.cluster_id, kafka.topic_id)
    if refusal := why_other_origin(partition, [logged.origin], now):
        return refusal
    is_same_topic = bool(logged.origin.topic_id and kafka.topic_id)
    error = TruncatedTopicError if is_same_topic else RecreatedTopicError
    if logged.next_offset > kafka.high:
        return error(
            partition,
            expected=f"to continue at offset {logged.next_offset}",
            found=f"a topic that ends at {kafka.high}",
        )
    if last is None or last.offset < kafka.low:
        return None
    # The same topic, too, may have lost its newest records and have got others since.
    record = record_at(partition, last.offset)
    # None: compacted away, or part of an aborted transaction. Then it decides nothing.
    if record is None or read(record).digest == last.digest:
        return None
    return error(
        partition,
        expected=f"the record of the log at offset {last.offset}",
        found="another record there",
    )

"""Who may append to a partition, from where on, and why it stands still."""

import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import (
    Connection,
    Interval,
    bindparam,
    case,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from pipeline import locks
from pipeline.errors import InvariantError, RetentionGapError
from pipeline.log.tables import consumer_offsets, events, gaps, installation
from pipeline.positions import Epoch, NextOffset, Offset, Partition


@dataclass(frozen=True)
class Owner:
    """The process that claims, as `pipeline status` shows it."""

    group: str
    member: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


@dataclass(frozen=True)
class Source:
    """Where a partition's records come from, as Kafka told at the assignment.

    Attributes:
        cluster_id: Kafka's id of the cluster.
        topic_id: Kafka's id of the topic; None where the broker does not tell it.
        low: First offset that Kafka still has.
        high: The end: the offset that the next record will get.
    """

    cluster_id: str
    topic_id: str | None
    low: NextOffset
    high: NextOffset


class Claim(NamedTuple):
    """What the log knows of a partition.

    Attributes:
        epoch: The number under which its owner must append.
        next_offset: Where to read on.
        first_offset: Where reading began.
        cluster_id, topic_id: As recorded by an earlier owner; None if never recorded.
    """

    epoch: Epoch
    next_offset: NextOffset
    first_offset: NextOffset
    cluster_id: str | None
    topic_id: str | None


class Place(NamedTuple):
    """A partition's row: the epoch of its newest owner, and where the log ends.

    Attributes:
        is_owned: Whether that owner still reads it; False once it was released.
    """

    epoch: Epoch
    next_offset: NextOffset
    is_owned: bool = True


class LastRecord(NamedTuple):
    """The newest record in the log; ``digest`` None for a tombstone."""

    offset: Offset
    digest: bytes | None


class Seen(NamedTuple):
    """A past record, for telling repeats."""

    offset: Offset
    digest: bytes
    first: Offset


_this = (
    consumer_offsets.c.topic == bindparam("of_topic"),
    consumer_offsets.c.partition == bindparam("of_number"),
)

KNOWN = select(
    consumer_offsets.c.partition, consumer_offsets.c.cluster_id, consumer_offsets.c.topic_id
).where(consumer_offsets.c.topic == bindparam("of_topic"))
TOPICS = select(consumer_offsets.c.topic).distinct()
RECORDED = select(
    consumer_offsets.c.topic,
    consumer_offsets.c.partition,
    consumer_offsets.c.epoch,
    consumer_offsets.c.next_offset,
    consumer_offsets.c.first_offset,
    consumer_offsets.c.cluster_id,
    consumer_offsets.c.topic_id,
).order_by(consumer_offsets.c.topic, consumer_offsets.c.partition)
BEGIN_PARTITION = insert(consumer_offsets)
# Waits for a commit of the former owner that is still open, so what it returns is final.
CLAIM = (
    update(consumer_offsets)
    .where(*_this)
    .values(
        epoch=consumer_offsets.c.epoch + 1,
        owner_group=bindparam("group"),
        owner_member=bindparam("member"),
        owner_host=bindparam("host"),
        owner_pid=bindparam("pid"),
        claimed_at=func.now(),
    )
    .returning(
        consumer_offsets.c.epoch,
        consumer_offsets.c.next_offset,
        consumer_offsets.c.first_offset,
        consumer_offsets.c.cluster_id,
        consumer_offsets.c.topic_id,
    )
)
# In the midst of a COPY no timeout of PostgreSQL's applies: neither the one for idle transactions
# nor one for statements looks while the server reads from its client (ProcessClientReadInterrupt).
END_SILENT_OWNER = text("""
SELECT count(pg_terminate_backend(owner.pid))
FROM pipeline.consumer_offsets o
JOIN pg_locks l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = o.xmax
JOIN pg_stat_activity owner ON owner.pid = l.pid
WHERE o.topic = :of_topic AND o."partition" = :of_number AND owner.pid <> pg_backend_pid()
  AND owner.state = 'active' AND owner.wait_event = 'ClientRead'
  AND owner.query_start < clock_timestamp() - :silent_for
""").bindparams(bindparam("silent_for", type_=Interval))
LOOK = select(
    consumer_offsets.c.epoch,
    consumer_offsets.c.next_offset,
    consumer_offsets.c.owner_member.is_not(None),
).where(*_this)
FIND = LOOK.with_for_update()
DESCRIBE = (
    update(consumer_offsets)
    .where(*_this, consumer_offsets.c.epoch == bindparam("held"))
    .values(
        cluster_id=bindparam("at_cluster"),
        topic_id=func.coalesce(bindparam("with_id"), consumer_offsets.c.topic_id),
        low_watermark=bindparam("low"),
        high_watermark=bindparam("high"),
        watermarks_at=func.now(),
        problem=None,
        problem_at=None,
    )
)
STAND_STILL = (
    update(consumer_offsets)
    .where(*_this, consumer_offsets.c.epoch == bindparam("held"))
    .values(
        problem=bindparam("why"),
        problem_at=case(
            (consumer_offsets.c.problem == bindparam("why"), consumer_offsets.c.problem_at),
            else_=func.now(),
        ),
    )
)
# What only people look at must not wait for a batch that is being written, our own included: while
# it waits nobody polls Kafka.
_same = consumer_offsets.alias()
_epoch_unless_busy = (
    select(_same.c.epoch)
    .where(_same.c.topic == bindparam("of_topic"), _same.c.partition == bindparam("of_number"))
    .with_for_update(skip_locked=True)
    .scalar_subquery()
)
SEE_WATERMARKS = (
    update(consumer_offsets)
    .where(*_this, _epoch_unless_busy == bindparam("held"))
    .values(
        high_watermark=bindparam("high"),
        watermarks_at=func.now(),
        retention_ms=bindparam("retention"),
    )
)
# A record that is not in the log is newer than the newest one in it. Where there was none, it came
# after Kafka's end was seen.
KEPT_UNTIL = text("""
SELECT min(extract(epoch FROM
    CASE WHEN o.high_watermark > o.next_offset THEN newest.at ELSE o.watermarks_at END)
    + o.retention_ms / 1000.0)
FROM pipeline.consumer_offsets o
JOIN unnest(CAST(:topics AS text[]), CAST(:numbers AS int[])) AS ours(topic, number)
  ON ours.topic = o.topic AND ours.number = o."partition"
LEFT JOIN LATERAL (
    SELECT least(e.kafka_timestamp, e.ingested_at) AS at FROM pipeline.events e
    WHERE o.high_watermark > o.next_offset
      AND e.topic = o.topic AND e."partition" = o."partition" AND e."offset" < o.next_offset
    ORDER BY e."offset" DESC LIMIT 1) newest ON true
""")
RELEASE = (
    update(consumer_offsets)
    .where(*_this, _epoch_unless_busy == bindparam("held"))
    .values(owner_group=None, owner_member=None, owner_host=None, owner_pid=None)
)
FREED = select(consumer_offsets.c.topic, consumer_offsets.c.partition).where(
    *_this, consumer_offsets.c.problem.is_(None)
)
PASSED = select(consumer_offsets.c.partition).where(
    *_this,
    or_(
        consumer_offsets.c.next_offset >= bindparam("end"), consumer_offsets.c.problem.is_not(None)
    ),
)
DESERTED = text("""
SELECT "partition" FROM pipeline.consumer_offsets
WHERE topic = :of_topic AND problem IS NULL
  AND (owner_member IS NULL
       OR greatest(watermarks_at, claimed_at, committed_at) < now() - interval '1 minute')
ORDER BY 1
""")
LAST_RECORD = (
    select(events.c.offset, events.c.digest)
    .where(events.c.topic == bindparam("of_topic"))
    .where(events.c.partition == bindparam("of_number"))
    .where(events.c.offset < bindparam("below"))
    .order_by(events.c.offset.desc())
    .limit(1)
)
RECENT = (
    select(events.c.offset, events.c.digest, func.coalesce(events.c.repeat_of, events.c.offset))
    .where(events.c.topic == bindparam("of_topic"))
    .where(events.c.partition == bindparam("of_number"))
    .where(events.c.offset >= bindparam("at_least"))
    .where(events.c.offset < bindparam("below"))
    .where(events.c.event_id.is_not(None))
    .order_by(events.c.offset)
)
MAKE_SEGMENT = text(
    "SELECT lower(made) AS first_offset, upper(made) AS end_offset "
    "FROM pipeline.make_segment(:topic, :at_offset, :span) AS made"
)


class Origin(NamedTuple):
    """Where a partition's records came from; each None if never recorded."""

    cluster_id: str | None
    topic_id: str | None


def known_topics(db: Connection) -> frozenset[str]:
    """The topics that the log has begun to read."""
    return frozenset(db.execute(TOPICS).scalars())


def known_partitions(db: Connection, topic: str) -> dict[int, Origin]:
    """The topic's partitions that the log has begun to read, by number.

    Until the transaction ends no other process may begin one, so that the first to come decides
    for the whole topic.
    """
    locks.lock(db, f"begin {topic}")
    return {
        number: Origin(cluster_id, topic_id)
        for number, cluster_id, topic_id in db.execute(KNOWN, {"of_topic": topic})
    }


def recorded(db: Connection) -> dict[Partition, Claim]:
    """What the log knows of every partition that it has begun to read."""
    return {Partition(topic, number): Claim(*rest) for topic, number, *rest in db.execute(RECORDED)}


def begin(db: Connection, partition: Partition, first: NextOffset) -> None:
    """Note where a partition that has never been read is read from."""
    db.execute(
        BEGIN_PARTITION,
        {
            "topic": partition.topic,
            "partition": partition.number,
            "first_offset": first,
            "next_offset": first,
        },
    )


def claim(db: Connection, partition: Partition, owner: Owner) -> Claim:
    """Become the only owner of a partition that has begun; every earlier owner is fenced.

    Waits for a transaction of the former owner that is still open, at most the lock timeout.

    Raises:
        TransientError: The former owner's transaction is still open; try again.
        InvariantError: The partition has not begun.
    """
    row = db.execute(
        CLAIM,
        {
            **_of(partition),
            "group": owner.group,
            "member": owner.member,
            "host": owner.host,
            "pid": owner.pid,
        },
    ).one_or_none()
    if row is None:
        raise InvariantError(f"{partition}: claimed before it was begun")
    return Claim(*row)


def end_silent_owner(db: Connection, partition: Partition, silent_for: timedelta) -> bool:
    """End the session that locks the partition if its process stands still within a COPY.

    Args:
        db: An open transaction.
        partition: The one that could not be claimed.
        silent_for: How long the COPY must have lasted and now wait for its client.

    Raises:
        ConfigurationError: The session belongs to a role that ours may not end.
    """
    ended = db.execute(END_SILENT_OWNER, {**_of(partition), "silent_for": silent_for})
    return bool(ended.scalar_one())


def describe(db: Connection, partition: Partition, held: Epoch, source: Source) -> None:
    """Record where the partition's records come from and that it flows."""
    db.execute(
        DESCRIBE,
        {
            **_of(partition),
            "held": held,
            "at_cluster": source.cluster_id,
            "with_id": source.topic_id,
            "low": source.low,
            "high": source.high,
        },
    )


def stand_still(db: Connection, partition: Partition, held: Epoch, why: Exception) -> None:
    """Record why a partition must not go on; a retention gap also gets its row in ``gaps``."""
    db.execute(STAND_STILL, {**_of(partition), "held": held, "why": str(why)})
    if isinstance(why, RetentionGapError):
        db.execute(
            upsert(gaps).on_conflict_do_update(
                index_elements=["topic", "partition", "first_offset"],
                set_={"end_offset": why.low},
                where=gaps.c.accepted_at.is_(None),
            ),
            {
                "topic": partition.topic,
                "partition": partition.number,
                "first_offset": why.expected,
                "end_offset": why.low,
                "reason": "deleted by Kafka's retention before they were read",
            },
        )


def freed(db: Connection, partitions: Iterable[Partition]) -> Sequence[Partition]:
    """Those partitions, of some that stood still, which an operator has let go on."""
    return [p for p in partitions if db.execute(FREED, _of(p)).one_or_none()]


def has_passed(db: Connection, ends: Mapping[Partition, int]) -> bool:
    """Whether the log has everything below these ends, whoever writes it.

    A partition that stands still gets no further, and is not waited for.
    """
    return all(
        db.execute(PASSED, {**_of(partition), "end": end}).one_or_none() is not None
        for partition, end in ends.items()
    )


def deserted(db: Connection, topic: str) -> Sequence[Partition]:
    """The topic's partitions that nobody reads, though nothing is said against it."""
    return [
        Partition(topic, number) for number in db.execute(DESERTED, {"of_topic": topic}).scalars()
    ]


class Watermark(NamedTuple):
    """What Kafka answered about a partition of ours.

    Attributes:
        high: Its end.
        retention_ms: How long Kafka keeps a record; None if not known or without limit.
    """

    partition: Partition
    held: Epoch
    high: int
    retention_ms: int | None = None


def see_watermarks(db: Connection, seen: Iterable[Watermark]) -> None:
    """Record Kafka's ends, so that lag is known without Kafka; waits for nobody."""
    for partition, held, high, retention_ms in sorted(seen, key=lambda one: one.partition):
        db.execute(
            SEE_WATERMARKS,
            {**_of(partition), "held": held, "high": high, "retention": retention_ms},
        )


def kept_until(db: Connection, partitions: Collection[Partition]) -> float | None:
    """Until when Kafka keeps the oldest record of these partitions that is not in the log.

    By the times of records and the topics' retention, as last recorded; Kafka may keep it longer.

    Returns:
        Seconds since 1970; None if not known, or if Kafka keeps everything.
    """
    ours = {"topics": [p.topic for p in partitions], "numbers": [p.number for p in partitions]}
    until = db.execute(KEPT_UNTIL, ours).scalar_one()
    return float(until) if until is not None and until.is_finite() else None


def release(db: Connection, partitions: Iterable[tuple[Partition, Epoch]]) -> None:
    """Say that nobody owns the partitions; harmless where somebody has claimed them since.

    Waits for nobody: a partition whose row is locked keeps its owner's name.
    """
    for partition, held in sorted(partitions):
        db.execute(RELEASE, {**_of(partition), "held": held})


def find(db: Connection, partitions: Iterable[Partition]) -> dict[Partition, Place]:
    """Where partitions stand, after every commit that may still be in flight has ended."""
    return {
        partition: Place(*db.execute(FIND, _of(partition)).one())
        for partition in sorted(partitions)
    }


def look(db: Connection, partitions: Iterable[Partition]) -> dict[Partition, Place]:
    """Where partitions stand by what is committed; waits for nobody, so nothing may hang on it."""
    rows = {partition: db.execute(LOOK, _of(partition)).one_or_none() for partition in partitions}
    return {partition: Place(*row) for partition, row in rows.items() if row is not None}


def last_record(db: Connection, partition: Partition, below: NextOffset) -> LastRecord | None:
    """The newest record of a partition, to compare with what Kafka holds at its offset."""
    row = db.execute(LAST_RECORD, {**_of(partition), "below": below}).one_or_none()
    return LastRecord(*row) if row else None


def recent(db: Connection, partition: Partition, below: NextOffset, window: int) -> Sequence[Seen]:
    """The events of the last ``window`` offsets, in order."""
    rows = db.execute(RECENT, {**_of(partition), "below": below, "at_least": below - window})
    return [Seen(*row) for row in rows]


def make_segment(
    db: Connection, topic: str, offset: NextOffset, span: int
) -> tuple[NextOffset, NextOffset]:
    """Make sure that a segment holds ``offset``; the range of offsets that it holds."""
    row = db.execute(MAKE_SEGMENT, {"topic": topic, "at_offset": offset, "span": span}).one()
    return NextOffset(row.first_offset), NextOffset(row.end_offset)


def installation_id(db: Connection) -> UUID:
    """Who this database is."""
    identity: UUID = db.execute(select(installation.c.installation_id)).scalar_one()
    return identity


def _of(partition: Partition) -> dict[str, object]:
    return {"of_topic": partition.topic, "of_number": partition.number}


# ------------------------------------------------------------------------------------------- gaps

OPEN_GAPS = select(gaps).order_by(gaps.c.topic, gaps.c.partition, gaps.c.first_offset)
# A function of the owner's: whoever may decide on gaps need not have rights on the offsets.
ACCEPT_GAP = text(
    "SELECT first_offset, end_offset, goes_on FROM pipeline.accept_gap(:of_topic, :of_number)"
)


class Gap(NamedTuple):
    """Offsets that are lost: from ``first`` up to, and without, ``end``."""

    first: NextOffset
    end: NextOffset


def accept_gap(db: Connection, partition: Partition) -> Gap | None:
    """Go on behind the partition's open gap; the decision stays in ``pipeline.gaps``.

    Returns:
        The gap, or None if the partition has no open one.

    Raises:
        InvariantError: The partition no longer stands at the gap.
    """
    row = db.execute(ACCEPT_GAP, _of(partition)).one()
    if row.goes_on is None:
        return None
    if not row.goes_on:
        raise InvariantError(
            f"{partition}: its open gap begins at offset {row.first_offset}, its next offset is "
            "another one: nothing was accepted. `pipeline gaps list` and `pipeline status` show "
            "both; a worker that takes the partition records the gap that is there then"
        )
    return Gap(row.first_offset, row.end_offset)

"""Who may append to a partition, at which offset, and whether it is halted: `consumer_offsets`."""

import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

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

from pipeline.db import locks
from pipeline.errors import FencedError, InvariantError, RetentionGapError
from pipeline.log import gaps
from pipeline.log.origin import KafkaPartition, Origin
from pipeline.log.tables import consumer_offsets
from pipeline.partitions import (
    Advance,
    Epoch,
    NextOffset,
    OffsetRange,
    Ownership,
    Partition,
)


@dataclass(frozen=True)
class Owner:
    """The process that claims a partition, as `pipeline status` shows it."""

    group: str
    member: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


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


_this = (
    consumer_offsets.c.topic == bindparam("of_topic"),
    consumer_offsets.c.partition == bindparam("of_number"),
)
_LOGGED = (
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
OF_TOPIC = select(
    consumer_offsets.c.partition, consumer_offsets.c.cluster_id, consumer_offsets.c.topic_id
).where(consumer_offsets.c.topic == bindparam("of_topic"))
LOGGED = select(consumer_offsets.c.topic, consumer_offsets.c.partition, *_LOGGED).order_by(
    consumer_offsets.c.topic, consumer_offsets.c.partition
)
BEGIN_PARTITION = insert(consumer_offsets)
# Waits for an open transaction of the former owner, so what it returns is final.
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
    .returning(*_LOGGED)
)
# During a COPY no timeout of PostgreSQL applies: neither the one for idle transactions nor the one
# for statements is checked while the server reads from its client (ProcessClientReadInterrupt).
END_SILENT_OWNER = text("""
SELECT count(pg_terminate_backend(owner.pid))
FROM pipeline.consumer_offsets o
JOIN pg_locks l ON l.locktype = 'transactionid' AND l.granted AND l.transactionid = o.xmax
JOIN pg_stat_activity owner ON owner.pid = l.pid
WHERE o.topic = :of_topic AND o."partition" = :of_number AND owner.pid <> pg_backend_pid()
  AND owner.state = 'active' AND owner.wait_event = 'ClientRead'
  AND owner.query_start < clock_timestamp() - :silent_for
""").bindparams(bindparam("silent_for", type_=Interval))
OWNERSHIP = select(
    consumer_offsets.c.epoch,
    consumer_offsets.c.next_offset,
    consumer_offsets.c.owner_member.is_not(None),
).where(*_this)
LOCK_OWNERSHIP = OWNERSHIP.with_for_update()
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
HALT = (
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
# What only people read must not wait for a batch that is being written, our own included: while it
# waits nobody polls Kafka.
_same = consumer_offsets.alias()
EPOCH_UNLESS_LOCKED = (
    select(_same.c.epoch)
    .where(_same.c.topic == bindparam("of_topic"), _same.c.partition == bindparam("of_number"))
    .with_for_update(skip_locked=True)
    .scalar_subquery()
)
RELEASE = (
    update(consumer_offsets)
    .where(*_this, bindparam("held") == EPOCH_UNLESS_LOCKED)
    .values(owner_group=None, owner_member=None, owner_host=None, owner_pid=None)
)
NOT_HALTED = select(consumer_offsets.c.topic).where(*_this, consumer_offsets.c.problem.is_(None))
REACHED = select(consumer_offsets.c.partition).where(
    *_this,
    or_(
        consumer_offsets.c.next_offset >= bindparam("end"), consumer_offsets.c.problem.is_not(None)
    ),
)
WITHOUT_READER = text("""
SELECT "partition" FROM pipeline.consumer_offsets
WHERE topic = :of_topic AND problem IS NULL
  AND (owner_member IS NULL
       OR greatest(watermarks_at, claimed_at, committed_at) < now() - interval '1 minute')
ORDER BY 1
""")
BEGIN_EARLIER = (
    update(consumer_offsets)
    .where(*_this)
    .values(first_offset=func.least(consumer_offsets.c.first_offset, bindparam("first")))
)


def key_of(partition: Partition) -> dict[str, object]:
    """The parameters by which the statements of this package find a partition's row."""
    return {"of_topic": partition.topic, "of_number": partition.number}


# ------------------------------------------------------------------------- what the log holds


def topics(db: Connection) -> frozenset[str]:
    """The topics that the log has begun to read."""
    return frozenset(db.execute(TOPICS).scalars())


def logged_partitions(db: Connection) -> dict[Partition, LoggedPartition]:
    """What the log has recorded about every partition that it has begun to read."""
    return {
        Partition(topic, number): LoggedPartition(*rest)
        for topic, number, *rest in db.execute(LOGGED)
    }


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


# --------------------------------------------------------------------------- begin, claim, release


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


def claim(db: Connection, partition: Partition, owner: Owner) -> LoggedPartition:
    """Become the only owner of a partition that has begun; every earlier owner is fenced.

    Waits for an open transaction of the former owner, at most for the lock timeout.

    Raises:
        TransientError: The former owner's transaction is still open; try again.
        InvariantError: The partition has not begun.
    """
    row = db.execute(
        CLAIM,
        {
            **key_of(partition),
            "group": owner.group,
            "member": owner.member,
            "host": owner.host,
            "pid": owner.pid,
        },
    ).one_or_none()
    if row is None:
        raise InvariantError(f"{partition}: claimed before its first offset was recorded")
    return LoggedPartition(*row)


def end_silent_owner(db: Connection, partition: Partition, silent_for: timedelta) -> bool:
    """End the session that locks the partition if its process has stopped during a COPY.

    Args:
        db: An open transaction.
        partition: The one that could not be claimed.
        silent_for: How long ago the COPY must have begun that now waits for its client.

    Raises:
        ConfigurationError: The session belongs to a role that ours may not end.
    """
    ended = db.execute(END_SILENT_OWNER, {**key_of(partition), "silent_for": silent_for})
    return bool(ended.scalar_one())


def release(db: Connection, partitions: Iterable[tuple[Partition, Epoch]]) -> None:
    """Record that nobody owns the partitions; no effect where somebody has claimed them since.

    Does not wait: a partition whose row is locked keeps its owner's name.
    """
    for partition, held in sorted(partitions):
        db.execute(RELEASE, {**key_of(partition), "held": held})


def without_reader(db: Connection, topic: str) -> Sequence[Partition]:
    """The topic's partitions that no process reads although they are not halted."""
    rows = db.execute(WITHOUT_READER, {"of_topic": topic})
    return [Partition(topic, number) for number in rows.scalars()]


def ownerships(db: Connection, partitions: Iterable[Partition]) -> dict[Partition, Ownership]:
    """Owners and next offsets as committed. Does not wait; no decision may depend on it alone."""
    rows = {
        partition: db.execute(OWNERSHIP, key_of(partition)).one_or_none()
        for partition in partitions
    }
    return {partition: Ownership(*row) for partition, row in rows.items() if row is not None}


def lock_ownerships(db: Connection, partitions: Iterable[Partition]) -> dict[Partition, Ownership]:
    """Owners and next offsets, after every commit that may still be in flight has ended."""
    return {
        partition: Ownership(*db.execute(LOCK_OWNERSHIP, key_of(partition)).one())
        for partition in sorted(partitions)
    }


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


def halt(db: Connection, partition: Partition, held: Epoch, why: Exception) -> None:
    """Record why a partition must not continue; a retention gap also gets its row in ``gaps``."""
    db.execute(HALT, {**key_of(partition), "held": held, "why": str(why)})
    if isinstance(why, RetentionGapError):
        gaps.record(db, partition, gaps.Gap(why.expected, why.low))


def not_halted(db: Connection, partitions: Iterable[Partition]) -> Sequence[Partition]:
    """Of partitions that were halted, those that an operator has allowed to continue."""
    return [p for p in partitions if db.execute(NOT_HALTED, key_of(p)).one_or_none()]

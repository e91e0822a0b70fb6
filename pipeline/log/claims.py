"""Who owns a partition, and so may append to it: claim, release, owners that have ended."""

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import Connection, Interval, bindparam, func, select, text, update

from pipeline.errors import InvariantError
from pipeline.log.ranges import LOGGED_COLUMNS, LoggedPartition
from pipeline.log.tables import THIS_PARTITION, consumer_offsets, key_of
from pipeline.partitions import Epoch, Ownership, Partition


@dataclass(frozen=True)
class Owner:
    """The process that claims a partition, as `pipeline status` shows it."""

    group: str
    member: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


# Waits for an open transaction of the former owner, so what it returns is final.
CLAIM = (
    update(consumer_offsets)
    .where(*THIS_PARTITION)
    .values(
        epoch=consumer_offsets.c.epoch + 1,
        owner_group=bindparam("group"),
        owner_member=bindparam("member"),
        owner_host=bindparam("host"),
        owner_pid=bindparam("pid"),
        claimed_at=func.now(),
    )
    .returning(*LOGGED_COLUMNS)
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
).where(*THIS_PARTITION)
LOCK_OWNERSHIP = OWNERSHIP.with_for_update()
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
    .where(*THIS_PARTITION, bindparam("held") == EPOCH_UNLESS_LOCKED)
    .values(owner_group=None, owner_member=None, owner_host=None, owner_pid=None)
)
WITHOUT_READER = text("""
SELECT "partition" FROM pipeline.consumer_offsets
WHERE topic = :of_topic AND problem IS NULL
  AND (owner_member IS NULL
       OR greatest(watermarks_at, claimed_at, committed_at) < now() - interval '1 minute')
ORDER BY 1
""")


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

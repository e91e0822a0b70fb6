"""Dead letters: events that a projector rejected. Put aside, listed, retried.

The table has the event's coordinates, the column and the SQLSTATE, never a value: the event itself
is in the log.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    Table,
    Text,
    bindparam,
    delete,
    func,
    select,
    text,
    update,
)

from pipeline.db import LOG_SCHEMA, metadata, transaction
from pipeline.log import search
from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition, after
from pipeline.projection import registry
from pipeline.projection.apply import RejectedEvent, apply_batch, lock_tables, pin
from pipeline.projection.checkpoints import REBUILD
from pipeline.readmodel.batch import Batch
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import Projector

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("projector", Text, primary_key=True, comment="Projector that rejected the event."),
    Column("topic", Text(collation="C"), primary_key=True, comment="Kafka topic."),
    Column(
        "partition",
        Integer,
        primary_key=True,
        autoincrement=False,
        comment="Partition of the topic.",
    ),
    Column(
        "offset",
        BigInteger,
        primary_key=True,
        autoincrement=False,
        comment="Offset of the event in pipeline.events.",
    ),
    Column("event_type", Text, comment="The event's type."),
    Column("sqlstate", Text, nullable=False, comment="PostgreSQL's code for what is wrong."),
    Column("column_name", Text, comment="Column whose value is wrong, where it is known."),
    Column(
        "found_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("now()"),
        comment="When it was first put aside.",
    ),
    Column(
        "attempts",
        Integer,
        nullable=False,
        server_default=text("1"),
        comment="How often it has been tried.",
    ),
    Column(
        "last_attempt_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("now()"),
        comment="When it was last tried.",
    ),
    schema=LOG_SCHEMA,
    comment="Events that a projector rejected. All other events were applied.",
)


class DeadLetter(NamedTuple):
    """An event put aside, as it is listed."""

    projector: str
    partition: Partition
    offset: Offset
    event_type: str | None
    sqlstate: str
    column: str | None
    found_at: datetime
    attempts: int
    last_attempt_at: datetime


class RetryOutcome(Enum):
    """What a retry of one dead letter did."""

    APPLIED = "applied"
    REJECTED = "rejected"
    """It is a dead letter still."""
    GONE = "gone"
    """Somebody has deleted it, or its table was truncated: there is nothing to apply."""


_this = (
    dead_letters.c.projector == bindparam("of_projector"),
    dead_letters.c.topic == bindparam("of_topic"),
    dead_letters.c.partition == bindparam("of_number"),
    dead_letters.c.offset == bindparam("at_offset"),
)

PUT_ASIDE = text("""
INSERT INTO pipeline.dead_letters AS d
    (projector, topic, "partition", "offset", event_type, sqlstate, column_name)
SELECT :projector, e.topic, e."partition", e."offset", e.event_type, :sqlstate, :column_name
FROM pipeline.events e
WHERE e.topic = :topic AND e."partition" = :number AND e."offset" = :at_offset
ON CONFLICT (projector, topic, "partition", "offset") DO UPDATE
SET sqlstate = excluded.sqlstate,
    column_name = excluded.column_name,
    attempts = d.attempts + 1,
    last_attempt_at = now()
""")
LIST = select(
    dead_letters.c.projector,
    dead_letters.c.topic,
    dead_letters.c.partition,
    dead_letters.c.offset,
    dead_letters.c.event_type,
    dead_letters.c.sqlstate,
    dead_letters.c.column_name,
    dead_letters.c.found_at,
    dead_letters.c.attempts,
    dead_letters.c.last_attempt_at,
).order_by(
    dead_letters.c.projector,
    dead_letters.c.topic,
    dead_letters.c.partition,
    dead_letters.c.offset,
)
COUNTS = (
    select(dead_letters.c.projector, func.count())
    .where(~dead_letters.c.projector.endswith(REBUILD, autoescape=True))
    .group_by(dead_letters.c.projector)
    .order_by(dead_letters.c.projector)
)
LOCK = select(dead_letters.c.offset).where(*_this).with_for_update()
REMOVE = delete(dead_letters).where(*_this)
FORGET = delete(dead_letters).where(dead_letters.c.projector == bindparam("of_projector"))
HAND_OVER = (
    update(dead_letters)
    .where(dead_letters.c.projector == bindparam("of_projector"))
    .values(projector=bindparam("to_projector"))
)


def put_aside(
    db: Connection, projector: str, partition: Partition, rejected: Iterable[RejectedEvent]
) -> None:
    """Write dead letters; for an event that is one already, count another attempt."""
    for event in rejected:
        db.execute(
            PUT_ASIDE,
            {
                "projector": projector,
                "topic": partition.topic,
                "number": partition.number,
                "at_offset": event.offset,
                "sqlstate": event.sqlstate,
                "column_name": event.column,
            },
        )


def listed(db: Connection, projectors: Iterable[str] | None = None) -> Sequence[DeadLetter]:
    """The dead letters of all projectors, or of these, in the order of the log."""
    query = LIST if projectors is None else LIST.where(dead_letters.c.projector.in_(projectors))
    return [
        DeadLetter(
            row.projector,
            Partition(row.topic, row.partition),
            Offset(row.offset),
            row.event_type,
            row.sqlstate,
            row.column_name,
            row.found_at,
            row.attempts,
            row.last_attempt_at,
        )
        for row in db.execute(query)
    ]


def counts(db: Connection) -> Mapping[str, int]:
    """How many dead letters each read model has; without those of a rebuild in progress."""
    return {row[0]: row[1] for row in db.execute(COUNTS)}


def lock(db: Connection, letter: DeadLetter) -> bool:
    """Lock the dead letter until the transaction ends; False if it no longer exists."""
    return db.execute(LOCK, _of(letter)).one_or_none() is not None


def remove(db: Connection, letter: DeadLetter) -> None:
    """Delete the dead letter of an event that was applied."""
    db.execute(REMOVE, _of(letter))


def forget(db: Connection, projector: str) -> None:
    """Delete all dead letters of a projector, because its table is recomputed."""
    db.execute(FORGET, {"of_projector": projector})


def hand_over(db: Connection, projector: str, to: str) -> None:
    """Give a projector's dead letters to another projector."""
    db.execute(HAND_OVER, {"of_projector": projector, "to_projector": to})


def retry(
    engine: Engine, projectors: Collection[Projector], names: Collection[str] | None = None
) -> tuple[int, int]:
    """Apply dead letters again, each in its own transaction; checkpoints do not move.

    The result is right whenever that is: the version of an event decides, not the moment.

    Args:
        engine: The database.
        projectors: Every projector.
        names: Of which projectors; None for all.

    Returns:
        How many were applied, and how many are still rejected. One that no longer exists is
        neither.
    """
    by_name = {projector.name: projector for projector in projectors}
    wanted = set(by_name) if names is None else set(names)
    with transaction(engine) as db:
        letters = listed(db, wanted & set(by_name))
    outcomes = Counter[RetryOutcome]()
    for letter in letters:
        with transaction(engine) as db:
            outcomes[retry_letter(db, by_name[letter.projector], letter)] += 1
    return outcomes[RetryOutcome.APPLIED], outcomes[RetryOutcome.REJECTED]


def retry_letter(db: Connection, projector: Projector, letter: DeadLetter) -> RetryOutcome:
    """Apply one dead letter again."""
    pin(db)
    # Tables first, as TRUNCATE does. A TRUNCATE before us has deleted the dead letter.
    lock_tables(db, projector, "ROW EXCLUSIVE MODE")
    if not lock(db, letter):
        return RetryOutcome.GONE
    # A table of another definition is left as it is; its rebuild takes the event again.
    is_stale = registry.stale(db, {projector.name: fingerprint(projector)})
    if is_stale or not search.exists(db, letter.partition, letter.offset):
        return RetryOutcome.REJECTED
    offsets = OffsetRange(NextOffset(letter.offset), after(letter.offset))
    batch = Batch(letter.partition, offsets)
    rejected = apply_batch(db, projector, None, batch)
    if rejected:
        put_aside(db, projector.name, letter.partition, rejected)
        return RetryOutcome.REJECTED
    remove(db, letter)
    return RetryOutcome.APPLIED


def _of(letter: DeadLetter) -> dict[str, object]:
    return {
        "of_projector": letter.projector,
        "of_topic": letter.partition.topic,
        "of_number": letter.partition.number,
        "at_offset": letter.offset,
    }

"""Events that a projector could not take: put aside with their reason, listed, tried again.

What is kept is where the event stands and which column refused it, never a value: the event itself
is in the log.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Integer,
    Table,
    Text,
    bindparam,
    delete,
    select,
    text,
    update,
)

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.partitions import Offset, Partition

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("projector", Text, primary_key=True, comment="Projector that could not take the event."),
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
    comment="Events that a projector could not take. Everything else went on without them.",
)


class Fault(NamedTuple):
    """Why one event cannot be taken.

    Attributes:
        column: The column whose value is wrong; None where it is not known.
    """

    offset: Offset
    sqlstate: str
    column: str | None


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
LOCK = select(dead_letters.c.offset).where(*_this).with_for_update()
EVENT = text("""
SELECT 1 FROM pipeline.events
WHERE topic = :of_topic AND "partition" = :of_number AND "offset" = :at_offset
""")
TAKE_BACK = delete(dead_letters).where(*_this)
FORGET = delete(dead_letters).where(dead_letters.c.projector == bindparam("of_projector"))
HAND_OVER = (
    update(dead_letters)
    .where(dead_letters.c.projector == bindparam("of_projector"))
    .values(projector=bindparam("to_projector"))
)


def put_aside(
    db: Connection, projector: str, partition: Partition, faults: Iterable[Fault]
) -> None:
    """Note events that ``projector`` could not take; a second time counts as another attempt."""
    for fault in faults:
        db.execute(
            PUT_ASIDE,
            {
                "projector": projector,
                "topic": partition.topic,
                "number": partition.number,
                "at_offset": fault.offset,
                "sqlstate": fault.sqlstate,
                "column_name": fault.column,
            },
        )


def listed(db: Connection, projectors: Iterable[str] | None = None) -> Sequence[DeadLetter]:
    """What has been put aside, in the order of the log; of all projectors, or of these."""
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


def lock(db: Connection, letter: DeadLetter) -> bool:
    """Hold the letter until the transaction ends; False if somebody took it back meanwhile."""
    return db.execute(LOCK, _of(letter)).one_or_none() is not None


def has_event(db: Connection, letter: DeadLetter) -> bool:
    """Whether the event is in the log; a segment that was detached takes its events along."""
    return db.execute(EVENT, _of(letter)).one_or_none() is not None


def take_back(db: Connection, letter: DeadLetter) -> None:
    """The event has landed: it is no dead letter any more."""
    db.execute(TAKE_BACK, _of(letter))


def forget(db: Connection, projector: str) -> None:
    """Drop every letter of a projector, because its table is computed anew."""
    db.execute(FORGET, {"of_projector": projector})


def hand_over(db: Connection, projector: str, to: str) -> None:
    """Give a projector's letters to another name, as its table is."""
    db.execute(HAND_OVER, {"of_projector": projector, "to_projector": to})


def _of(letter: DeadLetter) -> dict[str, object]:
    return {
        "of_projector": letter.projector,
        "of_topic": letter.partition.topic,
        "of_number": letter.partition.number,
        "at_offset": letter.offset,
    }

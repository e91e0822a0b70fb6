"""Offsets that Kafka deleted before they were read, and the operator's decision: `gaps`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Identity,
    Index,
    Integer,
    Table,
    Text,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import insert as upsert

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.errors import InvariantError
from pipeline.log.tables import Time, TopicName
from pipeline.partitions import NextOffset, Partition

gaps = Table(
    "gaps",
    metadata,
    Column("gap_id", BigInteger, Identity(always=True), primary_key=True, comment="Number."),
    Column("topic", TopicName, nullable=False, comment="Kafka topic."),
    Column("partition", Integer, nullable=False, comment="Partition of the topic."),
    Column("first_offset", BigInteger, nullable=False, comment="First offset that is lost."),
    Column("end_offset", BigInteger, nullable=False, comment="First offset after the gap."),
    Column("reason", Text, nullable=False, comment="How the offsets were lost."),
    Column(
        "detected_at",
        Time,
        nullable=False,
        server_default=text("now()"),
        comment="When the gap was found.",
    ),
    Column("accepted_at", Time, comment="When an operator decided to continue after the gap."),
    Column("accepted_by", Text, comment="Database role of that operator."),
    CheckConstraint("end_offset > first_offset", name="not_empty"),
    Index("gaps_place_key", "topic", "partition", "first_offset", unique=True),
    schema=LOG_SCHEMA,
    comment="Offsets that Kafka deleted before we read them; nothing else is skipped.",
)

ALL = select(gaps).order_by(gaps.c.topic, gaps.c.partition, gaps.c.first_offset)
_insert = upsert(gaps)
# Retention may have deleted more since the gap was found.
RECORD = _insert.on_conflict_do_update(
    index_elements=["topic", "partition", "first_offset"],
    set_={"end_offset": _insert.excluded.end_offset},
    where=gaps.c.accepted_at.is_(None),
)
# A function of the owner's: a role that may decide on gaps needs no rights on the offsets.
ACCEPT = text(
    "SELECT first_offset, end_offset, continues FROM pipeline.accept_gap(:of_topic, :of_number)"
)


class Gap(NamedTuple):
    """Offsets that are lost: from ``first`` up to, and without, ``end``."""

    first: NextOffset
    end: NextOffset


def all_gaps(db: Connection) -> Sequence[Mapping[str, Any]]:
    """Every gap, open and accepted, with all its columns."""
    return [{str(name): value for name, value in row.items()} for row in db.execute(ALL).mappings()]


def record(db: Connection, partition: Partition, gap: Gap) -> None:
    """Record an open gap; one that was accepted stays as it is."""
    db.execute(
        RECORD,
        {
            "topic": partition.topic,
            "partition": partition.number,
            "first_offset": gap.first,
            "end_offset": gap.end,
            "reason": "deleted by Kafka's retention before they were read",
        },
    )


def accept_gap(db: Connection, partition: Partition) -> Gap | None:
    """Continue after the partition's open gap; the decision stays in ``pipeline.gaps``.

    Returns:
        The gap, or None if the partition has no open one.

    Raises:
        InvariantError: The partition's next offset is no longer at the gap.
    """
    row = db.execute(ACCEPT, {"of_topic": partition.topic, "of_number": partition.number}).one()
    if row.continues is None:
        return None
    if not row.continues:
        raise InvariantError(
            f"{partition}: its next offset is no longer {row.first_offset}, where the gap begins. "
            "Nothing was changed; see `pipeline gaps list` and `pipeline status`"
        )
    return Gap(row.first_offset, row.end_offset)

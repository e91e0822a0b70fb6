"""The checkpoint of each projector in each partition: `projection_checkpoints`."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Integer,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    delete,
    func,
    not_,
    or_,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.errors import InvariantError
from pipeline.log.ranges import LOG_RANGES
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection.registry import LIVE

projection_checkpoints = Table(
    "projection_checkpoints",
    metadata,
    Column("projector", Text, primary_key=True, comment="Name of the projector."),
    Column("topic", Text(collation="C"), primary_key=True, comment="Kafka topic."),
    Column(
        "partition",
        Integer,
        primary_key=True,
        autoincrement=False,
        comment="Partition of the topic.",
    ),
    Column(
        "next_offset",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="First offset of the log that is not yet in the read model.",
    ),
    Column("moved_at", DateTime(timezone=True), comment="When it last moved."),
    schema=LOG_SCHEMA,
    comment="First offset that each projector has not taken yet. Moves in the transaction that "
    "writes the read model.",
    # A few rows, rewritten with every pass: room for the new version on the same page.
    postgresql_with={"fillfactor": "50"},
)

REBUILD = "@rebuild"
"""Suffix of a projector's name: the rebuild of it that is in progress."""


class ProjectorProgress(NamedTuple):
    """How far a projector is in one partition.

    Attributes:
        next_offset: First offset that is not yet in the read model.
        log_first: First offset of the partition that the log has.
        log_end: First offset that is not yet in the log.
    """

    projector: str
    partition: Partition
    next_offset: NextOffset
    log_first: NextOffset
    log_end: NextOffset

    @property
    def lag(self) -> int:
        """Offsets of the log that are not yet in the read model."""
        return max(0, self.log_end - max(self.next_offset, self.log_first))

    def next_range(self, offsets_max: int) -> OffsetRange:
        """The next offsets to take. Offsets below the log's beginning hold nothing and are free."""
        begin = max(self.next_offset, self.log_first)
        return OffsetRange(self.next_offset, NextOffset(min(self.log_end, begin + offsets_max)))


BEGIN = (
    insert(projection_checkpoints)
    .from_select(
        ["projector", "topic", "partition"],
        select(
            func.unnest(cast(bindparam("names"), ARRAY(Text))),
            LOG_RANGES.c.topic,
            LOG_RANGES.c.partition,
        ),
    )
    .on_conflict_do_nothing()
)
PROGRESS = (
    select(
        LIVE.c.projector,
        LOG_RANGES.c.topic,
        LOG_RANGES.c.partition,
        projection_checkpoints.c.next_offset,
        LOG_RANGES.c.first_offset,
        LOG_RANGES.c.next_offset.label("log_end"),
    )
    .select_from(
        LIVE.join(LOG_RANGES, true()).outerjoin(
            projection_checkpoints,
            and_(
                projection_checkpoints.c.projector == LIVE.c.projector,
                projection_checkpoints.c.topic == LOG_RANGES.c.topic,
                projection_checkpoints.c.partition == LOG_RANGES.c.partition,
            ),
        )
    )
    .where(
        LIVE.c.projector == any_(cast(bindparam("names"), ARRAY(Text))),
        or_(
            not_(cast(bindparam("only_lagging"), Boolean)),
            projection_checkpoints.c.next_offset.is_(None),
            LOG_RANGES.c.next_offset
            > func.greatest(projection_checkpoints.c.next_offset, LOG_RANGES.c.first_offset),
        ),
    )
    .order_by(
        LOG_RANGES.c.topic,
        LOG_RANGES.c.partition,
        projection_checkpoints.c.next_offset,
        LIVE.c.projector,
    )
)

NEXT_OFFSETS = (
    select(
        projection_checkpoints.c.topic,
        projection_checkpoints.c.partition,
        projection_checkpoints.c.next_offset,
    )
    .where(projection_checkpoints.c.projector == bindparam("of_projector"))
    .order_by(projection_checkpoints.c.topic, projection_checkpoints.c.partition)
)
LOCK_ALL = NEXT_OFFSETS.with_for_update()
_checkpoint = insert(projection_checkpoints)
SET_NEXT_OFFSET = _checkpoint.on_conflict_do_update(
    index_elements=["projector", "topic", "partition"],
    set_={"next_offset": _checkpoint.excluded.next_offset, "moved_at": func.now()},
)
# SKIP LOCKED: a checkpoint that another worker holds is not waited for.
LOCK_TOGETHER = (
    select(projection_checkpoints.c.projector)
    .where(
        projection_checkpoints.c.topic == bindparam("of_topic"),
        projection_checkpoints.c.partition == bindparam("of_number"),
        projection_checkpoints.c.next_offset == bindparam("expected"),
        projection_checkpoints.c.projector.in_(bindparam("names", expanding=True)),
    )
    .with_for_update(skip_locked=True)
)
MOVE_TOGETHER = (
    update(projection_checkpoints)
    .where(
        projection_checkpoints.c.topic == bindparam("of_topic"),
        projection_checkpoints.c.partition == bindparam("of_number"),
        projection_checkpoints.c.next_offset == bindparam("expected"),
        projection_checkpoints.c.projector.in_(bindparam("names", expanding=True)),
    )
    .values(next_offset=bindparam("to"), moved_at=func.now())
)
# All checkpoints: a pass in progress may have read the log already, whatever its next offset.
# Ordered as a rebuild locks them: the live projector's, then its own.
LOCK_PARTITION = (
    select(projection_checkpoints.c.projector)
    .where(
        projection_checkpoints.c.topic == bindparam("of_topic"),
        projection_checkpoints.c.partition == bindparam("of_number"),
    )
    .order_by(projection_checkpoints.c.projector)
    .with_for_update()
)
MOVE_BACK = (
    update(projection_checkpoints)
    .where(
        projection_checkpoints.c.topic == bindparam("of_topic"),
        projection_checkpoints.c.partition == bindparam("of_number"),
        projection_checkpoints.c.next_offset > bindparam("back_to"),
    )
    .values(next_offset=bindparam("back_to"), moved_at=func.now())
)
FORGET = delete(projection_checkpoints).where(
    projection_checkpoints.c.projector == bindparam("of_projector")
)


def progress(
    db: Connection, names: Collection[str], *, only_lagging: bool = False
) -> Sequence[ProjectorProgress]:
    """The progress of registered projectors in every partition, without broken ones.

    Ordered by partition, next offset and name.

    Args:
        db: An open transaction.
        names: Which projectors.
        only_lagging: Only where the log has offsets to take.
    """
    wanted = {"names": list(names), "only_lagging": only_lagging}
    rows = db.execute(PROGRESS, wanted).all()
    if any(row.next_offset is None for row in rows):
        db.execute(BEGIN, {"names": list(names)})
        rows = db.execute(PROGRESS, wanted).all()
    return [
        ProjectorProgress(
            row.projector,
            Partition(row.topic, row.partition),
            NextOffset(row.next_offset),
            NextOffset(row.first_offset),
            NextOffset(row.log_end),
        )
        for row in rows
        # NULL: the partition is newer than BEGIN's snapshot; the next call has it.
        if row.next_offset is not None
    ]


def lock_all(db: Connection, projector: str) -> dict[Partition, NextOffset]:
    """Lock the projector's checkpoints, waiting for passes in progress; the next offset of each."""
    rows = db.execute(LOCK_ALL, {"of_projector": projector})
    return {Partition(row.topic, row.partition): NextOffset(row.next_offset) for row in rows}


def next_offsets(db: Connection, projector: str) -> dict[Partition, NextOffset]:
    """The projector's next offset in every partition that it has a checkpoint of."""
    rows = db.execute(NEXT_OFFSETS, {"of_projector": projector})
    return {Partition(row.topic, row.partition): NextOffset(row.next_offset) for row in rows}


def set_next_offsets(
    db: Connection, projector: str, next_offsets: Mapping[Partition, NextOffset]
) -> None:
    """Write the projector's checkpoints; the caller keeps every other worker out meanwhile."""
    for partition, next_offset in sorted(next_offsets.items()):
        db.execute(
            SET_NEXT_OFFSET,
            {
                "projector": projector,
                "topic": partition.topic,
                "partition": partition.number,
                "next_offset": next_offset,
            },
        )


def lock_together(
    db: Connection, names: Collection[str], partition: Partition, at: NextOffset
) -> frozenset[str]:
    """Lock the checkpoints of projectors with the same next offset until the transaction ends.

    Read the log for them only afterwards: then a rewind, which fills the log below, waits for the
    end of the transaction.

    Returns:
        The projectors that are locked. The others have another next offset by now, or another
        worker has locked them.
    """
    key = {"of_topic": partition.topic, "of_number": partition.number}
    rows = db.execute(LOCK_TOGETHER, {**key, "expected": at, "names": list(names)})
    return frozenset(rows.scalars())


def move_together(
    db: Connection, names: Collection[str], partition: Partition, offsets: OffsetRange
) -> None:
    """Move locked checkpoints to the end of a range that is now in the read models.

    Raises:
        InvariantError: One of them is not at the beginning of the range.
    """
    key = {"of_topic": partition.topic, "of_number": partition.number}
    moved = db.execute(
        MOVE_TOGETHER,
        {**key, "expected": offsets.first, "to": offsets.end, "names": list(names)},
    )
    if moved.rowcount != len(names):
        raise InvariantError(
            f"{', '.join(sorted(names))}: {moved.rowcount} of {len(names)} locked checkpoints of "
            f"{partition} were at {offsets.first}"
        )


def move_back(db: Connection, partition: Partition, to: NextOffset) -> None:
    """Move the checkpoints of every projector and rebuild in progress back to an offset.

    Waits for passes in progress and keeps new ones out until the transaction ends, so each pass
    sees all or nothing of what the caller has written to the log. To take an event twice changes
    nothing: the newest version wins, in whatever order they come.
    """
    key = {"of_topic": partition.topic, "of_number": partition.number}
    db.execute(LOCK_PARTITION, key)
    db.execute(MOVE_BACK, {**key, "back_to": to})


def forget(db: Connection, projector: str) -> None:
    """Delete every checkpoint of a projector."""
    db.execute(FORGET, {"of_projector": projector})

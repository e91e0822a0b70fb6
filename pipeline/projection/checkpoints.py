"""The bookkeeping of projection: projectors, and how far each has come in each partition."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
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
from sqlalchemy.dialects.postgresql import insert

from pipeline.db import LOG_SCHEMA, metadata
from pipeline.errors import InvariantError
from pipeline.positions import NextOffset, OffsetRange, Partition

projectors = Table(
    "projectors",
    metadata,
    Column("projector", Text, primary_key=True, comment="Name of the projector, its main table's."),
    Column(
        "fingerprint",
        Text,
        comment="Definition with which the table was last built from the start; NULL while it is "
        "empty. Another one than the program's means: rebuild.",
    ),
    Column(
        "built_at", DateTime(timezone=True), comment="When that build began, or was swapped in."
    ),
    Column(
        "state",
        Text,
        nullable=False,
        server_default=text("'live'"),
        comment="live, or broken: it stands still, and a rebuild after its repair sets it going.",
    ),
    Column("problem", Text, comment="Why it is broken; NULL when it is live."),
    Column("problem_at", DateTime(timezone=True), comment="Since when it is broken."),
    CheckConstraint("state IN ('live', 'broken')", name="state_is_known"),
    schema=LOG_SCHEMA,
    comment="Each projector that has ever run. NAME@rebuild is a rebuild in progress.",
)

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
    comment="How far each projector has come. Moves in the transaction that writes the read model.",
    # A few rows, rewritten with every pass: room for the new version on the same page.
    postgresql_with={"fillfactor": "50"},
)

REBUILD = "@rebuild"
"""Behind a projector's name: the rebuild of it that is in progress."""


class Standing(NamedTuple):
    """Where a projector stands in one partition.

    Attributes:
        next_offset: First offset that is not yet in the read model.
        log_first: Where the log of the partition begins.
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
        """The next offsets to take; what lies below the log's beginning costs nothing."""
        begin = max(self.next_offset, self.log_first)
        return OffsetRange(self.next_offset, NextOffset(min(self.log_end, begin + offsets_max)))


REGISTER = insert(projectors).on_conflict_do_nothing()
BEGIN = text("""
INSERT INTO pipeline.projection_checkpoints (projector, topic, "partition")
SELECT p.projector, o.topic, o."partition"
FROM unnest(CAST(:names AS text[])) AS p(projector) CROSS JOIN pipeline.consumer_offsets o
ON CONFLICT DO NOTHING
""")
STANDINGS = text("""
SELECT p.projector, o.topic, o."partition", c.next_offset, o.first_offset, o.next_offset AS log_end
FROM pipeline.projectors p
CROSS JOIN pipeline.consumer_offsets o
LEFT JOIN pipeline.projection_checkpoints c
       ON c.projector = p.projector AND c.topic = o.topic AND c."partition" = o."partition"
WHERE p.projector = ANY (CAST(:names AS text[])) AND p.state = 'live'
  AND (NOT CAST(:only_behind AS boolean)
       OR c.next_offset IS NULL OR o.next_offset > greatest(c.next_offset, o.first_offset))
ORDER BY o.topic, o."partition", c.next_offset, p.projector
""")

_this = (
    projection_checkpoints.c.projector == bindparam("of_projector"),
    projection_checkpoints.c.topic == bindparam("of_topic"),
    projection_checkpoints.c.partition == bindparam("of_number"),
)
PLACES = (
    select(
        projection_checkpoints.c.topic,
        projection_checkpoints.c.partition,
        projection_checkpoints.c.next_offset,
    )
    .where(projection_checkpoints.c.projector == bindparam("of_projector"))
    .order_by(projection_checkpoints.c.topic, projection_checkpoints.c.partition)
)
HOLD_ALL = PLACES.with_for_update()
_place = insert(projection_checkpoints)
PLACE = _place.on_conflict_do_update(
    index_elements=["projector", "topic", "partition"],
    set_={"next_offset": _place.excluded.next_offset, "moved_at": func.now()},
)
MOVE = (
    update(projection_checkpoints)
    .where(*_this, projection_checkpoints.c.next_offset == bindparam("expected"))
    .values(next_offset=bindparam("to"), moved_at=func.now())
)
# Somebody else's turn is left alone: nobody waits here.
HOLD_TOGETHER = (
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
# All of them: a pass that is under way may have looked at the log already, wherever it stands. In
# one order, as a rebuild takes them: the live projector's first, then its own.
HOLD_PARTITION = (
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
BUILD_BEGUN = (
    update(projectors)
    .where(projectors.c.projector == bindparam("of_projector"), projectors.c.fingerprint.is_(None))
    .values(fingerprint=bindparam("of_code"), built_at=func.now())
)
BUILT = (
    update(projectors)
    .where(projectors.c.projector == bindparam("of_projector"))
    .values(
        fingerprint=bindparam("of_code"),
        built_at=func.now(),
        state="live",
        problem=None,
        problem_at=None,
    )
    .returning(projectors.c.built_at)
)
# Whoever builds anew, or goes on with it, waits for those who share the row, and they find another
# time in it afterwards.
BUILDING = (
    select(projectors.c.projector)
    .where(
        projectors.c.projector == bindparam("of_projector"),
        projectors.c.built_at == bindparam("since"),
    )
    .with_for_update(read=True)
)
BREAK = (
    update(projectors)
    .where(projectors.c.projector == bindparam("of_projector"), projectors.c.state != "broken")
    .values(state="broken", problem=bindparam("why"), problem_at=func.now())
)
STATE = select(projectors.c.state).where(projectors.c.projector == bindparam("of_projector"))
FINGERPRINTS = select(projectors.c.projector, projectors.c.fingerprint)
DROP = delete(projectors).where(projectors.c.projector == bindparam("of_projector"))


def register(db: Connection, names: Iterable[str]) -> None:
    """Make projectors known; those that are known stay as they are."""
    for name in names:
        db.execute(REGISTER, {"projector": name})


def standings(
    db: Connection, names: Collection[str], *, only_behind: bool = False
) -> Sequence[Standing]:
    """Where registered projectors stand, broken ones left out.

    Projectors that stand at the same place come one after another, by name.

    Args:
        db: An open transaction.
        names: Which projectors.
        only_behind: Only places where there is something to take.
    """
    wanted = {"names": list(names), "only_behind": only_behind}
    rows = db.execute(STANDINGS, wanted).all()
    if any(row.next_offset is None for row in rows):
        db.execute(BEGIN, {"names": list(names)})
        rows = db.execute(STANDINGS, wanted).all()
    return [
        Standing(
            row.projector,
            Partition(row.topic, row.partition),
            NextOffset(row.next_offset),
            NextOffset(row.first_offset),
            NextOffset(row.log_end),
        )
        for row in rows
        # A partition that came into being just now has its turn next time.
        if row.next_offset is not None
    ]


def hold_all(db: Connection, projector: str) -> dict[Partition, NextOffset]:
    """Take the projector's turn in every partition that has begun, waiting for others to end."""
    rows = db.execute(HOLD_ALL, {"of_projector": projector})
    return {Partition(row.topic, row.partition): NextOffset(row.next_offset) for row in rows}


def places(db: Connection, projector: str) -> dict[Partition, NextOffset]:
    """Where the projector stands in every partition that has begun."""
    rows = db.execute(PLACES, {"of_projector": projector})
    return {Partition(row.topic, row.partition): NextOffset(row.next_offset) for row in rows}


def place(db: Connection, projector: str, at: Mapping[Partition, NextOffset]) -> None:
    """Put the projector where its tables are; only while nobody else can have a turn."""
    for partition, next_offset in sorted(at.items()):
        db.execute(
            PLACE,
            {
                "projector": projector,
                "topic": partition.topic,
                "partition": partition.number,
                "next_offset": next_offset,
            },
        )


def move(db: Connection, projector: str, partition: Partition, offsets: OffsetRange) -> None:
    """Note that a range is in the read model.

    Raises:
        InvariantError: The checkpoint is not where the caller holds it.
    """
    moved = db.execute(
        MOVE,
        {**_of(projector, partition), "expected": offsets.first, "to": offsets.end},
    )
    if moved.rowcount != 1:
        raise InvariantError(f"{projector}: {partition} no longer stands at {offsets.first}")


def hold_together(
    db: Connection, names: Collection[str], partition: Partition, at: NextOffset
) -> frozenset[str]:
    """Take the turns of projectors that stand at one place until the transaction ends.

    Whoever looks at the log for them must do so afterwards: only then a rewind, which fills it
    below, waits for their end.

    Returns:
        Those whose turn it is; the others stand elsewhere by now, or somebody else has it.
    """
    place = {"of_topic": partition.topic, "of_number": partition.number}
    rows = db.execute(HOLD_TOGETHER, {**place, "expected": at, "names": list(names)})
    return frozenset(rows.scalars())


def move_together(
    db: Connection, names: Collection[str], partition: Partition, offsets: OffsetRange
) -> None:
    """Note that a range is behind projectors whose turns are ours.

    Raises:
        InvariantError: One of them no longer stands where the caller holds it.
    """
    place = {"of_topic": partition.topic, "of_number": partition.number}
    moved = db.execute(
        MOVE_TOGETHER,
        {**place, "expected": offsets.first, "to": offsets.end, "names": list(names)},
    )
    if moved.rowcount != len(names):
        raise InvariantError(f"{partition}: {len(names)} checkpoints left {offsets.first} unseen")


def move_back(db: Connection, partition: Partition, to: NextOffset) -> None:
    """Have every projector, and every rebuild in progress, take the log from here once more.

    Waits for passes that are under way, and keeps new ones out until the transaction ends, so that
    each sees all or nothing of what the caller has written to the log. What they take twice
    changes nothing: the newest version wins, whenever it comes.
    """
    place = {"of_topic": partition.topic, "of_number": partition.number}
    db.execute(HOLD_PARTITION, place)
    db.execute(MOVE_BACK, {**place, "back_to": to})


def forget(db: Connection, projector: str) -> None:
    """Drop every checkpoint and the registration of a name."""
    db.execute(FORGET, {"of_projector": projector})
    db.execute(DROP, {"of_projector": projector})


def fingerprints(db: Connection) -> Mapping[str, str | None]:
    """With which definition each projector's table was last built; None while it is empty."""
    return {row.projector: row.fingerprint for row in db.execute(FINGERPRINTS)}


def is_live(db: Connection, projector: str) -> bool:
    """Whether the projector is known and not broken."""
    return db.execute(STATE, {"of_projector": projector}).scalar_one_or_none() == "live"


def note_build_begun(db: Connection, projector: str, fingerprint: str) -> None:
    """The table is being filled from the log's beginning; no effect if that is known."""
    db.execute(BUILD_BEGUN, {"of_projector": projector, "of_code": fingerprint})


def note_built(db: Connection, projector: str, fingerprint: str) -> datetime:
    """The table is now what this definition makes of the log; a broken projector is live again.

    Returns:
        Since when: no two builds have the same.
    """
    built = {"of_projector": projector, "of_code": fingerprint}
    since: datetime = db.execute(BUILT, built).scalar_one()
    return since


def is_building(db: Connection, projector: str, since: datetime) -> bool:
    """Whether nobody has begun or taken up the build after us; so it stays in this transaction."""
    found = db.execute(BUILDING, {"of_projector": projector, "since": since})
    return found.one_or_none() is not None


def note_broken(db: Connection, projector: str, why: str) -> bool:
    """Halt the projector until it is rebuilt; whether it was not halted before."""
    return db.execute(BREAK, {"of_projector": projector, "why": why}).rowcount > 0


def _of(projector: str, partition: Partition) -> dict[str, object]:
    return {
        "of_projector": projector,
        "of_topic": partition.topic,
        "of_number": partition.number,
    }

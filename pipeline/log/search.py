"""Finding events in the log: by id, entity, type, time, offset; and following it as it grows.

Within a partition, records came in the order of their offsets. So a span of time is a range of
offsets, found by bisection, and every search except by id uses the primary key. The exception are
records that a rewind has inserted: they came later than the records after them. They are found by
offset and by id; by time only if they lie beside records that came at that time.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    or_,
    select,
    text,
    true,
)

from pipeline.log.ranges import ranges
from pipeline.log.tables import events
from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition

FOLLOW_ROWS_MAX = 1000
"""Maximum number of events that one query of a growing partition returns."""


@dataclass(frozen=True)
class EventFilter:
    """Which events to find; what is None does not matter.

    Attributes:
        identity: The event's own id, or that of the entity it is about.
        event_type: A type, ``ORDER.FILLED``, or all of a category, ``ORDER`` or ``ORDER.*``.
        topic, partition: Where it is.
        since, until: When it came into the log; ``until`` itself is left out.
        only_bad: Only records that could not be read, or not as an event.
    """

    identity: UUID | None = None
    event_type: str | None = None
    topic: str | None = None
    partition: int | None = None
    offsets: OffsetRange | None = None
    since: datetime | None = None
    until: datetime | None = None
    only_bad: bool = False

    def includes(self, partition: Partition) -> bool:
        """Whether events of this partition may match."""
        return self.topic in (None, partition.topic) and self.partition in (None, partition.number)

    def condition(self) -> ColumnElement[bool]:
        """The condition for an event, wherever it is."""
        terms: list[ColumnElement[bool]] = []
        if self.identity is not None:
            terms.append(
                or_(events.c.event_id == self.identity, events.c.entity_id == self.identity)
            )
        if self.event_type is not None:
            category = self.event_type.removesuffix("*").removesuffix(".") + "."
            terms.append(
                or_(
                    events.c.event_type == self.event_type,
                    events.c.event_type.startswith(category, autoescape=True),
                )
            )
        if self.only_bad:
            terms.append(events.c.problem.is_not(None))
        return and_(true(), *terms)


class FoundEvent(NamedTuple):
    """An event of the log. What may hold personal data is None unless it was requested.

    ``payload`` and ``headers`` are JSON as PostgreSQL writes it.
    """

    topic: str
    partition: int
    offset: int
    event_id: UUID | None
    event_type: str | None
    created_at: datetime | None
    entity_id: UUID | None
    status: str | None
    repeat_of: int | None
    problem: str | None
    kafka_timestamp: datetime | None
    ingested_at: datetime
    payload: str | None = None
    raw: bytes | None = None
    key: bytes | None = None
    headers: str | None = None


class LoggedDigest(NamedTuple):
    """An event of the log, to recognise repeats of it; ``first``: where its content came first."""

    offset: Offset
    digest: bytes
    first: Offset


# Some twenty index searches per partition and moment, however many records there are.
FIRST_SINCE = text("""
WITH RECURSIVE search AS (
    SELECT o.topic, o."partition", m.moment, o.first_offset AS low, o.next_offset AS high
    FROM pipeline.consumer_offsets o CROSS JOIN unnest(CAST(:moments AS timestamptz[])) m(moment)
  UNION ALL
    SELECT s.topic, s."partition", s.moment,
           CASE WHEN probe.is_older THEN probe.next_offset ELSE s.low END,
           CASE WHEN probe.is_older THEN s.high ELSE s.low + (s.high - s.low) / 2 END
    FROM search s
    LEFT JOIN LATERAL (
        SELECT e."offset" + 1 AS next_offset, e.ingested_at < s.moment AS is_older
        FROM pipeline.events e
        WHERE e.topic = s.topic AND e."partition" = s."partition"
          AND e."offset" >= s.low + (s.high - s.low) / 2 AND e."offset" < s.high
        ORDER BY e."offset" LIMIT 1) probe ON true
    WHERE s.low < s.high
)
SELECT topic, "partition", moment, low AS first_offset FROM search WHERE low = high
""")

COUNT = text("""
SELECT count(*) FROM pipeline.events
WHERE topic = :topic AND "partition" = :number AND "offset" >= :first AND "offset" < :end
""")
COUNT_BY_TYPE = text("""
SELECT e.event_type, count(*) AS events FROM pipeline.events e
WHERE e.topic = :topic AND e."partition" = CAST(:number AS integer)
  AND e."offset" >= CAST(:first AS bigint) AND e."offset" < CAST(:end AS bigint)
  AND e.repeat_of IS NULL AND e.event_type IS NOT NULL
GROUP BY e.event_type
""")
EXISTS = text("""
SELECT EXISTS (SELECT FROM pipeline.events
               WHERE topic = :topic AND "partition" = :number AND "offset" = :at_offset)
""")
RECENT = (
    select(events.c.offset, events.c.digest, func.coalesce(events.c.repeat_of, events.c.offset))
    .where(events.c.topic == bindparam("of_topic"))
    .where(events.c.partition == bindparam("of_number"))
    .where(events.c.offset >= bindparam("at_least"))
    .where(events.c.offset < bindparam("below"))
    .where(events.c.event_id.is_not(None))
    .order_by(events.c.offset)
)

# Only the name of a state: it is shown by default, so it must not hold anything else.
_stated = events.c.payload["object"]["status"].astext
_status = case((_stated.regexp_match("^[A-Z][A-Z0-9_]{0,62}$"), _stated)).label("status")
_ENVELOPE = [
    events.c.topic,
    events.c.partition,
    events.c.offset,
    events.c.event_id,
    events.c.event_type,
    events.c.created_at,
    events.c.entity_id,
    _status,
    events.c.repeat_of,
    events.c.problem,
    events.c.kafka_timestamp,
    events.c.ingested_at,
]
SEARCH = select(*_ENVELOPE)
SEARCH_WITH_CONTENT = select(
    *_ENVELOPE,
    cast(events.c.payload, Text).label("payload"),
    events.c.raw,
    events.c.key,
    # As text, like the payload: a number in it could be rounded by the driver.
    cast(events.c.headers, Text).label("headers"),
)


def first_since(
    db: Connection, moments: Collection[datetime]
) -> Mapping[tuple[Partition, datetime], NextOffset]:
    """For each partition and moment, the first offset that came into the log then or later."""
    return {
        (Partition(row.topic, row.partition), row.moment): NextOffset(row.first_offset)
        for row in db.execute(FIRST_SINCE, {"moments": list(moments)})
    }


def count(db: Connection, partition: Partition, offsets: OffsetRange) -> int:
    """How many records the log has of a range of offsets."""
    key = {"topic": partition.topic, "number": partition.number}
    return int(db.execute(COUNT, {**key, "first": offsets.first, "end": offsets.end}).scalar_one())


def count_by_type(db: Connection, partition: Partition, offsets: OffsetRange) -> Mapping[str, int]:
    """How many events of each type the log has in a range of offsets, without repeats."""
    key = {"topic": partition.topic, "number": partition.number}
    rows = db.execute(COUNT_BY_TYPE, {**key, "first": offsets.first, "end": offsets.end})
    return {row.event_type: row.events for row in rows}


def exists(db: Connection, partition: Partition, offset: Offset) -> bool:
    """Whether the log has a record at this offset: it has not those of a detached segment."""
    key = {"topic": partition.topic, "number": partition.number}
    return bool(db.execute(EXISTS, {**key, "at_offset": offset}).scalar_one())


def recent(
    db: Connection, partition: Partition, below: NextOffset, window: int
) -> Sequence[LoggedDigest]:
    """The events of the last ``window`` offsets, in order, to recognise repeats of them."""
    key = {"of_topic": partition.topic, "of_number": partition.number}
    rows = db.execute(RECENT, {**key, "below": below, "at_least": below - window})
    return [LoggedDigest(*row) for row in rows]


def newest(
    db: Connection, wanted: EventFilter, *, limit: int, with_content: bool = False
) -> Sequence[FoundEvent]:
    """The newest events that match, oldest first.

    Those of one entity are ordered by when they happened; others by when they came into the log.
    """
    if wanted.identity is not None:
        found = list(_by_identity(db, wanted, limit, with_content=with_content))
        return sorted(found, key=lambda event: (event.created_at or event.ingested_at, *event[:3]))
    spans = _spans(db, wanted)
    found = [
        event
        for partition, offsets in spans.items()
        for event in _along(
            db, wanted, partition, offsets, limit, backwards=True, with_content=with_content
        )
    ]
    return sorted(found, key=lambda event: (event.ingested_at, *event[:3]))[-limit:]


def follow(
    db: Connection,
    wanted: EventFilter,
    next_offsets: dict[Partition, NextOffset],
    *,
    with_content: bool = False,
) -> Iterator[FoundEvent]:
    """The events after ``next_offsets``, each once; moves ``next_offsets`` forward.

    Args:
        db: A connection with a snapshot of its own for each call.
        wanted: Which events.
        next_offsets: The next offset of each partition; a new partition starts at its beginning.
        with_content: Payload, bytes, key and headers too.
    """
    for partition, held in ranges(db).items():
        begin = next_offsets.setdefault(partition, held.first)
        while wanted.includes(partition) and begin < held.end:
            end = NextOffset(min(held.end, begin + FOLLOW_ROWS_MAX))
            offsets = OffsetRange(begin, end)
            yield from _along(
                db,
                wanted,
                partition,
                offsets,
                FOLLOW_ROWS_MAX,
                backwards=False,
                with_content=with_content,
            )
            next_offsets[partition] = begin = end


def _spans(db: Connection, wanted: EventFilter) -> dict[Partition, OffsetRange]:
    """Which offsets of which partitions may hold matching events."""
    moments = {moment for moment in (wanted.since, wanted.until) if moment is not None}
    begins = first_since(db, moments) if moments else {}
    spans = {}
    for partition, held in ranges(db).items():
        if not wanted.includes(partition):
            continue
        first, end = wanted.offsets or held
        if wanted.since is not None:
            first = max(first, begins.get((partition, wanted.since), held.end))
        if wanted.until is not None:
            end = min(end, begins.get((partition, wanted.until), held.end))
        spans[partition] = OffsetRange(first, end)
    return spans


def _along(
    db: Connection,
    wanted: EventFilter,
    partition: Partition,
    offsets: OffsetRange,
    limit: int,
    *,
    backwards: bool,
    with_content: bool,
) -> Iterator[FoundEvent]:
    query = (
        _base(with_content=with_content)
        .where(events.c.topic == partition.topic, events.c.partition == partition.number)
        .where(events.c.offset >= offsets.first, events.c.offset < offsets.end)
        .where(wanted.condition())
        .order_by(events.c.offset.desc() if backwards else events.c.offset)
        .limit(limit)
    )
    return _found(db, _in_time(query, wanted))


def _by_identity(
    db: Connection, wanted: EventFilter, limit: int, *, with_content: bool
) -> Iterator[FoundEvent]:
    query = (
        _base(with_content=with_content)
        .where(wanted.condition())
        .order_by(events.c.created_at.desc().nulls_last(), events.c.offset.desc())
        .limit(limit)
    )
    if wanted.topic is not None:
        query = query.where(events.c.topic == wanted.topic)
    if wanted.partition is not None:
        query = query.where(events.c.partition == wanted.partition)
    return _found(db, _in_time(query, wanted))


def _in_time(query: Select[tuple[object, ...]], wanted: EventFilter) -> Select[tuple[object, ...]]:
    if wanted.since is not None:
        query = query.where(events.c.ingested_at >= wanted.since)
    if wanted.until is not None:
        query = query.where(events.c.ingested_at < wanted.until)
    return query


def _base(*, with_content: bool) -> Select[tuple[object, ...]]:
    return SEARCH_WITH_CONTENT if with_content else SEARCH


def _found(db: Connection, query: Select[tuple[object, ...]]) -> Iterator[FoundEvent]:
    for row in db.execute(query):
        yield FoundEvent(**row._mapping)  # noqa: SLF001 - its public name begins so

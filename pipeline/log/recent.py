"""What came lately, counted: by topic and type, what could not be read, and repeats."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, text

from pipeline.partitions import OffsetRange, Partition

COUNTS = text("""
SELECT e.topic, e.event_type, e.problem, e.repeat_of IS NOT NULL AS is_repeat, count(*) AS records
FROM unnest(CAST(:topics AS text[]), CAST(:numbers AS int[]), CAST(:first AS bigint[]),
            CAST(:ends AS bigint[])) AS span(topic, number, first_offset, end_offset)
-- Bounded on both sides: for an open range the planner estimates a third of the log, and scans it.
JOIN pipeline.events e ON e.topic = span.topic AND e."partition" = span.number
    AND e."offset" >= span.first_offset AND e."offset" < span.end_offset
GROUP BY 1, 2, 3, 4
""")


class RecentCount(NamedTuple):
    """Records that have all of these in common."""

    topic: str
    event_type: str | None
    problem: str | None
    is_repeat: bool
    records: int


def recent_counts(
    db: Connection, offsets: Mapping[Partition, OffsetRange]
) -> Sequence[RecentCount]:
    """Count the records of a range of each partition."""
    rows = db.execute(
        COUNTS,
        {
            "topics": [partition.topic for partition in offsets],
            "numbers": [partition.number for partition in offsets],
            "first": [held.first for held in offsets.values()],
            "ends": [held.end for held in offsets.values()],
        },
    )
    return [RecentCount(*row) for row in rows]

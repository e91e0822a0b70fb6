"""What came lately: how many records, repeats, records that could not be decoded, unknown types."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection

from pipeline.counts import count
from pipeline.health import problems
from pipeline.health.problem import Problem
from pipeline.log.recent import recent_counts
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.readmodel import Projector

RECENT_SPAN = timedelta(hours=1)
"""How far back bad records and repeats are counted."""
RECENT_OFFSETS_MAX = 10_000
"""And at most so many offsets of each partition."""


@dataclass(frozen=True)
class Recent:
    """What came within the last hour, and at most 10,000 offsets of each partition.

    Attributes:
        records: How many records were examined.
        repeats: How many of them repeat another one.
        bad: How many could not be decoded, by topic and reason.
        unknown_types: How many are of a type that no read model takes, by type.
    """

    records: int
    repeats: int
    bad: Mapping[str, Mapping[str, int]]
    unknown_types: Mapping[str, int]


def read_recent(
    db: Connection,
    logged: Mapping[Partition, OffsetRange],
    projectors: Sequence[Projector],
) -> Recent:
    """Count what came lately.

    Args:
        db: An open transaction.
        logged: For each partition, what came into the log within ``RECENT_SPAN``.
        projectors: The read models of this program.
    """
    spans = {
        partition: OffsetRange(NextOffset(max(came.first, came.end - RECENT_OFFSETS_MAX)), came.end)
        for partition, came in logged.items()
    }
    records = repeats = 0
    bad: dict[str, dict[str, int]] = {}
    unknown: dict[str, int] = {}
    for same in recent_counts(db, spans):
        records += same.records
        repeats += same.records if same.is_repeat else 0
        if same.problem is not None:
            reasons = bad.setdefault(same.topic, {})
            reasons[same.problem] = reasons.get(same.problem, 0) + same.records
        if same.event_type and not any(model.takes(same.event_type) for model in projectors):
            unknown[same.event_type] = unknown.get(same.event_type, 0) + same.records
    return Recent(records, repeats, bad, unknown)


def bad_records(recent: Recent) -> Iterable[Problem]:
    """One problem per topic with records that could not be decoded."""
    for topic, reasons in sorted(recent.bad.items()):
        most_first = sorted(reasons.items(), key=lambda item: -item[1])
        yield problems.BAD_RECORDS.of(
            f"topic {topic}",
            bad=count(sum(reasons.values()), "record"),
            reasons=", ".join(f"{number:,} {reason}" for reason, number in most_first),
        )

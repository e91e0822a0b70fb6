"""Rewind: read Kafka again from an earlier offset; fill what the log lacks, compare the rest.

1. a plan, which changes nothing: from where to where, for each partition
2. for each partition: read the range again, outside the consumer group; stage and compare it
3. one transaction: missing records are inserted into the log, its first offset moves, and the
   projectors' checkpoints move back, so that read models take these records as if they had always
   been in the log

Ingestion continues meanwhile: it writes after ``next_offset``, a rewind before it. A rewind that is
killed has changed nothing for its current partition; the same command starts that one again.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import structlog
from sqlalchemy import Engine

from pipeline import failpoints
from pipeline.db import transaction
from pipeline.errors import RefusedError
from pipeline.events import read
from pipeline.ingest.repeats import RepeatWindow
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.records import Watermarks
from pipeline.log.compare import Comparison, Staging
from pipeline.log.copying import encode
from pipeline.log.origin import KafkaPartition, last_record, why_other_topic
from pipeline.log.ranges import LoggedPartition, logged_partitions
from pipeline.log.search import count, recent
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection import checkpoints
from pipeline.settings import Settings

log = structlog.get_logger(__name__)

RETENTION_RACES_MAX = 3
"""How often a range is restarted because retention deleted its beginning while it was read."""

Goal = Literal["earliest"] | NextOffset | datetime
"""Where to rewind to: all that Kafka has, an offset, or the first record at or after a time."""

Observe = Callable[[int, int], None]
"""Called with how many offsets of how many are done."""


@dataclass(frozen=True)
class Step:
    """What a rewind does to one partition.

    Attributes:
        in_log: What the log has, from its beginning to its next offset.
        in_kafka: What Kafka has.
        requested: The requested first offset.
        offsets: What is read again; empty where Kafka has nothing of it.
        logged: How many of these offsets are in the log already.
    """

    partition: Partition
    in_log: OffsetRange
    in_kafka: Watermarks
    requested: NextOffset
    offsets: OffsetRange
    logged: int


def plan(
    engine: Engine, brokers: Brokers, partitions: Collection[Partition], to: Goal
) -> list[Step]:
    """What a rewind would do; nothing is changed.

    Args:
        engine: The database.
        brokers: Kafka.
        partitions: Which; all must be in the log.
        to: Where to.

    Raises:
        RefusedError: The topic, or the cluster, is not the one that the log was read from, or the
            topic no longer exists.
        TransientError: A server is unavailable.
    """
    cluster_id = brokers.cluster_id()
    topic_ids = brokers.topic_ids({partition.topic for partition in partitions})
    counts = brokers.partition_counts()
    steps = []
    with brokers.record_reader() as reader:
        for partition in sorted(partitions):
            if partition.number >= counts.get(partition.topic, 0):
                raise brokers.missing_topic_error(partition)
            with transaction(engine) as db:
                claim = logged_partitions(db)[partition]
                last = last_record(db, partition, claim.next_offset)
            in_kafka = brokers.watermarks(partition)
            source = KafkaPartition(cluster_id, topic_ids.get(partition.topic), *in_kafka)
            if refusal := why_other_topic(partition, claim, last, source, reader.record_at):
                raise refusal
            steps.append(_step(engine, brokers, partition, claim, in_kafka, to))
    return steps


def _step(
    engine: Engine,
    brokers: Brokers,
    partition: Partition,
    claim: LoggedPartition,
    in_kafka: Watermarks,
    to: Goal,
) -> Step:
    end = claim.next_offset
    requested = _requested(brokers, partition, in_kafka, end, to)
    begin = min(end, max(requested, in_kafka.low))
    offsets = OffsetRange(NextOffset(begin), end)
    with transaction(engine) as db:
        logged = count(db, partition, offsets)
    in_log = OffsetRange(claim.first_offset, end)
    return Step(partition, in_log, in_kafka, NextOffset(requested), offsets, logged)


def _requested(
    brokers: Brokers, partition: Partition, in_kafka: Watermarks, end: NextOffset, to: Goal
) -> int:
    match to:
        case "earliest":
            return in_kafka.low
        case datetime() as moment:
            # Kafka uses negative numbers as keywords, for the end, for example.
            milliseconds = max(0, int(moment.timestamp() * 1000))
            found = brokers.offset_at(partition, milliseconds)
            return end if found is None else min(found, end)
        case offset:
            return min(offset, end)


def execute(
    engine: Engine,
    brokers: Brokers,
    settings: Settings,
    steps: Sequence[Step],
    observe: Observe = lambda _done, _total: None,
) -> Iterator[tuple[Step, Comparison]]:
    """Do it, partition by partition; each comparison is returned as soon as it is done.

    Records that differ are reported and stay as they are: the log is append-only.

    Raises:
        RewindRunsError: Another rewind of a partition is running.
        RefusedError: Retention deletes the range faster than it can be read.
        TransientError: A server became unavailable. The current partition is unchanged; repeat.
    """
    total, before = sum(step.offsets.span for step in steps), 0

    def report(done: int) -> None:
        observe(before + done, total)

    for step in steps:
        if step.offsets.span:
            yield step, _rewind(engine, brokers, settings, step, report)
        before += step.offsets.span


def _rewind(
    engine: Engine,
    brokers: Brokers,
    settings: Settings,
    step: Step,
    report: Callable[[int], None],
) -> Comparison:
    partition, offsets = step.partition, step.offsets
    for _ in range(RETENTION_RACES_MAX):
        with Staging.alone(engine, partition) as staging:
            begins = compare(engine, brokers, settings, staging, offsets, keep=True, report=report)
            if begins != offsets.first:
                # Retention deleted the beginning while it was read. The log must have no hole.
                offsets = offsets._replace(first=max(begins, brokers.watermarks(partition).low))
                continue
            failpoints.reach("before_fill")
            found = staging.comparison
            if found.missing.count or begins < step.in_log.first:
                with staging.fill(begins, segment_span=settings.segment_offsets) as db:
                    if found.missing.count:
                        checkpoints.move_back(db, partition, found.missing.ranges[0].first)
                    failpoints.reach("mid_fill")
            failpoints.reach("after_fill")
            log.info(
                "partition_rewound",
                topic=partition.topic,
                partition=partition.number,
                read=found.read,
                same=found.same,
                filled=found.missing.count,
                changed=found.changed.count,
                surplus=found.surplus.count,
            )
            return found
    raise RefusedError(
        partition,
        f"Kafka's retention deletes records from offset {step.offsets.first} on faster than this "
        "program reads them",
        "Run `pipeline rewind` with a later offset",
    )


def compare(
    engine: Engine,
    brokers: Brokers,
    settings: Settings,
    staging: Staging,
    offsets: OffsetRange,
    *,
    keep: bool,
    report: Callable[[int], None],
) -> NextOffset:
    """Read a range of a partition again and compare it with the log.

    Args:
        engine: The database.
        brokers: Kafka.
        settings: How records become rows.
        staging: Of that partition; collects what is found.
        offsets: Within what Kafka has.
        keep: Keep what is missing in the log, to insert it later.
        report: Called with how many offsets are done.

    Returns:
        Where the part begins that was read without a hole: after the last offset that retention
        deleted meanwhile.
    """
    partition, size = staging.partition, settings.repeat_window
    with transaction(engine) as db:
        window = RepeatWindow(size, recent(db, partition, offsets.first, size))
    begins = end = offsets.first
    for batch in brokers.read(partition, offsets):
        if batch.offsets.first != end:
            begins = batch.offsets.first
        end = batch.offsets.end
        rows = [
            encode(window.mark(read(record, keep_raw=settings.keep_raw)))
            for record in batch.records
        ]
        staging.compare(batch.offsets, rows, keep=keep)
        report(end - offsets.first)
    return begins if end == offsets.end else offsets.end

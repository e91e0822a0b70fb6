"""Verify: prove the promises on the data that exists, and report where they do not hold.

1. the log against its own bookkeeping: SQL, and the digests of bytes that are kept
2. the log against Kafka, record by record, as far back as Kafka has them
3. each read model against a replay of the log

Nothing is changed, and other processes continue: rows below a next offset never change, so each
part examines what existed when it began.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Engine

from pipeline.catalogue import Catalogue
from pipeline.counts import count
from pipeline.db import transaction
from pipeline.errors import PipelineError, TransientError
from pipeline.foreign_objects import changes_of, fixes_of, foreign_objects
from pipeline.health import problems
from pipeline.health.problem import Problem, of_refusal
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.reports import ClientReports
from pipeline.log import integrity
from pipeline.log.compare import Comparison, Staging
from pipeline.log.intervals import Intervals
from pipeline.log.origin import KafkaPartition, LastRecord, last_record, why_other_topic
from pipeline.log.ranges import LoggedPartition, logged_partitions, range_arrays, ranges
from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition, after
from pipeline.projection import integrity as bookkeeping
from pipeline.readmodel import Projector
from pipeline.rebuild.rebuild import RebuildProgress, check
from pipeline.rewind import compare
from pipeline.schema.drift import drift
from pipeline.settings import Settings

Part = Literal["log", "kafka", "read models"]

Observe = Callable[[str, int, int], None]
"""Called with what is examined, and how much of how much is done."""


@dataclass(frozen=True)
class Evidence:
    """What was found about one subject.

    Attributes:
        part: Which of the three proofs.
        subject: A partition, a read model, or a table.
        claim: The sentence to prove.
        examined: How many records or rows were examined.
        wrong: How many of them contradict it; 0 is the proof.
        problem: What contradicts it (``error``), or why not everything was examined (``unknown``).
            None if everything was examined and holds.
        note: What a reader should know although it holds.
        intervals: Offsets of what contradicts it, where it has any.
    """

    part: Part
    subject: str
    claim: str
    examined: int
    wrong: int = 0
    problem: Problem | None = None
    note: str | None = None
    intervals: Sequence[OffsetRange] = ()

    @property
    def is_complete(self) -> bool:
        """Whether everything that the claim is about was examined."""
        return self.problem is None or self.problem.severity != "unknown"


# -------------------------------------------------------------------------------------------- log

_CLAIMS = (
    ("every row lies between its partition's first and next offset", integrity.BOUNDS),
    ("a row's type and id are those of its payload", integrity.ENVELOPES),
    ("a repeat has an earlier row with the same bytes", integrity.REPEATS),
    ("every segment is attached, and registered", integrity.SEGMENTS),
    ("no checkpoint is after the log's end", bookkeeping.CHECKPOINTS),
    ("every dead letter has its event", bookkeeping.DEAD_LETTERS),
)

_DIGESTED = "the bytes that are kept have their digest"


def verify_log(engine: Engine, observe: Observe = lambda *_: None) -> Iterator[Evidence]:
    """The log against its bookkeeping, at one moment.

    Raises:
        TransientError: The server became unavailable.
    """
    with transaction(engine, one_snapshot=True) as db:
        arrays = range_arrays(db)
        for done, (claim, statement) in enumerate(_CLAIMS):
            observe(claim, done, len(_CLAIMS))
            for subject, examined, wrong, first, last in db.execute(statement, arrays):
                intervals = [] if first is None else [OffsetRange(first, after(Offset(last)))]
                problem = problems.LOG_CONTRADICTED.of(subject) if wrong else None
                yield Evidence("log", subject, claim, examined, wrong, problem, intervals=intervals)
        if not ranges(db):
            yield Evidence("log", "log", _CLAIMS[0][0], 0, problem=problems.EMPTY_LOG.of("log"))
        for partition, offsets in ranges(db).items():

            def report(
                done: int, partition: Partition = partition, span: int = offsets.span
            ) -> None:
                observe(f"bytes of {partition}", done, span)

            found = integrity.wrong_digests(db, partition, offsets, report)
            wrong = found.wrong
            yield Evidence(
                "log",
                str(partition),
                _DIGESTED,
                found.examined,
                wrong.count,
                problems.LOG_CONTRADICTED.of(partition) if wrong.count else None,
                intervals=wrong.ranges,
            )


# ------------------------------------------------------------------------------------------ kafka

_FAITHFUL = "the log holds what Kafka holds, record by record"
_KINDS = {
    "missing": problems.MISSING_IN_LOG,
    "changed": problems.DIFFERS_FROM_KAFKA,
    "surplus": problems.MISSING_IN_KAFKA,
}


def verify_kafka(
    engine: Engine, settings: Settings, observe: Observe = lambda *_: None
) -> Iterator[Evidence]:
    """The log against Kafka, for what Kafka still has.

    Raises:
        TransientError: A server became unavailable.
    """
    with transaction(engine) as db:
        known = logged_partitions(db)
        newest = {
            partition: last_record(db, partition, claim.next_offset)
            for partition, claim in known.items()
        }
    if not known:
        yield Evidence("kafka", "log", _FAITHFUL, 0, problem=problems.EMPTY_LOG.of("log"))
        return
    brokers = Brokers(settings, ClientReports())
    try:
        cluster_id, counts = brokers.cluster_id(), brokers.partition_counts()
        topic_ids = brokers.topic_ids({partition.topic for partition in known} & set(counts))
        for partition, claim in known.items():
            if partition.number >= counts.get(partition.topic, 0):
                problem = problems.PARTITION_NOT_VISIBLE.of(partition)
                yield Evidence("kafka", str(partition), _FAITHFUL, 0, problem=problem)
                continue
            topic_id = topic_ids.get(partition.topic)
            source = KafkaPartition(cluster_id, topic_id, *brokers.watermarks(partition))
            yield from _against_kafka(
                engine, brokers, settings, partition, claim, source, newest[partition], observe
            )
    finally:
        brokers.close()


def _against_kafka(
    engine: Engine,
    brokers: Brokers,
    settings: Settings,
    partition: Partition,
    claim: LoggedPartition,
    source: KafkaPartition,
    last: LastRecord | None,
    observe: Observe,
) -> Iterator[Evidence]:
    subject = str(partition)
    with brokers.record_reader() as reader:
        refusal = why_other_topic(partition, claim, last, source, reader.record_at)
    if refusal is not None:
        yield Evidence("kafka", subject, _FAITHFUL, 0, 1, of_refusal(refusal))
        return
    begin = min(claim.next_offset, max(claim.first_offset, source.low))
    offsets = OffsetRange(NextOffset(begin), claim.next_offset)
    with Staging.of(engine, partition) as staging:
        compare(
            engine,
            brokers,
            settings,
            staging,
            offsets,
            keep=False,
            report=lambda done: observe(subject, done, offsets.span),
        )
        found = staging.comparison
    is_compacted = "compact" in brokers.topic_settings(partition.topic).get("cleanup.policy", "")
    yield from _of_comparison(partition, found, is_compacted=is_compacted)
    if begin > claim.first_offset:
        problem = problems.NO_LONGER_IN_KAFKA.of(
            partition, first=claim.first_offset, last=begin - 1
        )
        yield Evidence("kafka", subject, _FAITHFUL, 0, problem=problem)


def _of_comparison(
    partition: Partition, found: Comparison, *, is_compacted: bool
) -> Iterator[Evidence]:
    differing: Mapping[str, Intervals] = {
        "missing": found.missing,
        "changed": found.changed,
        "surplus": Intervals() if is_compacted else found.surplus,
    }
    subject = str(partition)
    note = None
    if is_compacted and found.surplus.count:
        note = (
            f"{count(found.surplus.count, 'more is', 'more are')} only in the log: the topic is "
            "compacted"
        )
    if not any(intervals.count for intervals in differing.values()):
        yield Evidence("kafka", subject, _FAITHFUL, found.read, note=note)
    for kind, intervals in differing.items():
        if intervals.count:
            yield Evidence(
                "kafka",
                subject,
                _FAITHFUL,
                found.read,
                intervals.count,
                _KINDS[kind].of(
                    partition,
                    topic=partition.topic,
                    number=partition.number,
                    first=intervals.ranges[0].first,
                ),
                intervals=intervals.ranges,
            )


# ------------------------------------------------------------------------------------ read models

_REPLAYED = "its tables equal a replay of the log"
_DECLARED = "tables and views are as declared"
_UNCHANGED = "nobody has changed its tables"


def verify_declared(engine: Engine, catalogue: Catalogue) -> Iterator[Evidence]:
    """Tables and views against their declarations.

    Raises:
        TransientError: The server became unavailable.
    """
    with transaction(engine) as db:
        drifted = list(drift(db, catalogue))
    examined = len(catalogue.tables) + len(catalogue.views)
    if not drifted:
        yield Evidence("read models", "upvest", _DECLARED, examined)
    for name, what in drifted:
        problem = problems.NOT_AS_DECLARED.of(name, what=what)
        yield Evidence("read models", name, _DECLARED, 1, 1, problem)


def verify_read_models(
    engine: Engine,
    projectors: Sequence[Projector],
    *,
    rejected_max: int,
    observe: Observe = lambda *_: None,
) -> Iterator[Evidence]:
    """Each read model against the log, up to its checkpoints.

    Raises:
        TransientError: The server became unavailable.
    """
    # Where a column rounds what is stored, a replay rounds it too.
    for projector in projectors:
        yield _changed_tables(engine, projector)
    for projector in projectors:
        name = projector.name

        def report(progress: RebuildProgress, name: str = name) -> None:
            observe(name, progress.done, progress.total)

        try:
            found = check(engine, projector, rejected_max=rejected_max, observe=report)
        except TransientError:
            raise
        except PipelineError as error:
            problem = problems.NOT_COMPARED.of(name, error=error)
            yield Evidence("read models", name, _REPLAYED, 0, problem=problem)
            continue
        difference = None
        if found.differing:
            difference = problems.DIFFERS_FROM_REPLAY.of(
                name,
                missing=count(found.missing, "row is missing", "rows are missing"),
                changed=count(found.changed, "is not the same", "are not the same"),
                surplus=found.surplus,
            )
        yield Evidence("read models", name, _REPLAYED, found.rows, found.differing, difference)


def _changed_tables(engine: Engine, projector: Projector) -> Evidence:
    with transaction(engine) as db:
        changes = foreign_objects(db, projector.tables)
    problem = None
    if changes:
        problem = problems.CHANGED_TABLE.of(
            projector.name,
            changes=changes_of(changes),
            fixes=fixes_of(changes),
        )
    examined = len(projector.tables)
    return Evidence("read models", projector.name, _UNCHANGED, examined, len(changes), problem)

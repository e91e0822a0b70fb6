"""Verify: put the promises to the proof on what is there, and say where they do not hold.

1. the log against its own bookkeeping: SQL, and the digests of bytes that are kept
2. the log against Kafka, record by record, for as far back as Kafka's retention lasts
3. each read model against a replay of the log; and its tables against their declaration, for where
   a column rounds what is stored, a replay rounds it too

Nothing is changed, and what runs goes on: rows below a next offset never change, so each part looks
at what was there when it began.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from sqlalchemy import Connection, Engine, text

from pipeline.db import transaction
from pipeline.errors import PipelineError, TransientError
from pipeline.foreign_objects import foreign_objects
from pipeline.ingest.takeover import another_topic
from pipeline.log import ownership
from pipeline.log.comparison import Comparison, Intervals, Staging
from pipeline.log.ownership import Claim, LastRecord, Source
from pipeline.positions import NextOffset, Offset, OffsetRange, Partition, after
from pipeline.projection import Projector
from pipeline.projection.rebuild import RebuildProgress, check
from pipeline.rewind import compare
from pipeline.settings import Settings
from pipeline.source import Brokers

Part = Literal["log", "kafka", "read models"]

BYTES_ROWS = 200
"""How many rows with their bytes are fetched at a time."""

Observe = Callable[[str, int, int], None]
"""Told what is being looked at, and how much of how much is done."""


@dataclass(frozen=True)
class Evidence:
    """What was found of one thing.

    Attributes:
        part: Which of the three proofs.
        subject: A partition, a read model, or a table.
        claim: The sentence that was put to the proof.
        examined: How many records or rows were looked at.
        wrong: How many of them contradict it; 0 is the proof.
        words: What contradicts it and what to do, or why less was examined than there is.
        complete: Whether all that the claim is about was examined.
        intervals: Offsets of what contradicts it, where it has any.
    """

    part: Part
    subject: str
    claim: str
    examined: int
    wrong: int = 0
    words: str | None = None
    intervals: Sequence[OffsetRange] = ()
    complete: bool = True


# -------------------------------------------------------------------------------------------- log

# Each gives, for a subject, how many rows were looked at, how many are wrong, and where.
_BOUNDS = text("""
SELECT format('%s[%s]', topic, "partition") AS subject, count(*) AS examined,
       count(*) FILTER (WHERE outside) AS wrong,
       min("offset") FILTER (WHERE outside) AS first, max("offset") FILTER (WHERE outside) AS last
FROM (SELECT e.topic, e."partition", e."offset",
             coalesce(e."offset" < o.first_offset OR e."offset" >= o.next_offset, true) AS outside
      FROM pipeline.events e
      LEFT JOIN pipeline.consumer_offsets o
             ON o.topic = e.topic AND o."partition" = e."partition") AS rows
GROUP BY topic, "partition" ORDER BY topic, "partition"
""")
_ENVELOPES = text("""
SELECT format('%s[%s]', topic, "partition") AS subject, count(*) AS examined,
       count(*) FILTER (WHERE differs) AS wrong,
       min("offset") FILTER (WHERE differs) AS first, max("offset") FILTER (WHERE differs) AS last
FROM (SELECT topic, "partition", "offset",
             event_type IS DISTINCT FROM payload ->> 'type'
             OR event_id::text IS DISTINCT FROM lower(payload ->> 'id') AS differs
      FROM pipeline.events WHERE problem IS NULL) AS rows
GROUP BY topic, "partition" ORDER BY topic, "partition"
""")
_REPEATS = text("""
SELECT format('%s[%s]', topic, "partition") AS subject, count(*) AS examined,
       count(*) FILTER (WHERE differs) AS wrong,
       min("offset") FILTER (WHERE differs) AS first, max("offset") FILTER (WHERE differs) AS last
FROM (SELECT e.topic, e."partition", e."offset",
             f."offset" IS NULL OR f."offset" >= e."offset"
             OR (f.event_id, f.digest) IS DISTINCT FROM (e.event_id, e.digest) AS differs
      FROM pipeline.events e
      LEFT JOIN pipeline.events f
             ON f.topic = e.topic AND f."partition" = e."partition" AND f."offset" = e.repeat_of
      WHERE e.repeat_of IS NOT NULL) AS rows
GROUP BY topic, "partition" ORDER BY topic, "partition"
""")
_CHECKPOINTS = text("""
SELECT c.projector AS subject, count(*) AS examined,
       count(*) FILTER (WHERE o.topic IS NULL OR c.next_offset > o.next_offset) AS wrong,
       NULL AS first, NULL AS last
FROM pipeline.projection_checkpoints c
LEFT JOIN pipeline.consumer_offsets o ON o.topic = c.topic AND o."partition" = c."partition"
GROUP BY c.projector ORDER BY c.projector
""")
_DEAD_LETTERS = text("""
SELECT d.projector AS subject, count(*) AS examined,
       count(*) FILTER (WHERE e.topic IS NULL) AS wrong,
       min(d."offset") FILTER (WHERE e.topic IS NULL) AS first,
       max(d."offset") FILTER (WHERE e.topic IS NULL) AS last
FROM pipeline.dead_letters d
LEFT JOIN pipeline.events e
       ON e.topic = d.topic AND e."partition" = d."partition" AND e."offset" = d."offset"
GROUP BY d.projector ORDER BY d.projector
""")
_SEGMENTS = text("""
SELECT 'pipeline.segments' AS subject, count(*) AS examined,
       count(*) FILTER (WHERE s.segment IS NULL OR i.relname IS NULL) AS wrong,
       NULL AS first, NULL AS last
FROM pipeline.segments s
FULL JOIN (SELECT c.relname FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid
           WHERE h.inhparent = 'pipeline.events'::regclass) i ON i.relname = s.segment
""")
_CLAIMS = (
    ("every row lies between its partition's first and next offset", _BOUNDS),
    ("a row's type and id are those of its payload", _ENVELOPES),
    ("a repeat has an earlier row with the same bytes", _REPEATS),
    ("every segment is attached, and known", _SEGMENTS),
    ("no checkpoint lies behind the log's end", _CHECKPOINTS),
    ("every dead letter has its event", _DEAD_LETTERS),
)

_DIGESTED = "the bytes that are kept have their digest"
# Where they are not kept, only Kafka has them.
_WITH_BYTES = text("""
SELECT "offset", raw, digest FROM pipeline.events
WHERE topic = :topic AND "partition" = :number AND "offset" >= :first AND "offset" < :end
  AND raw IS NOT NULL ORDER BY "offset"
""")
_AT_ONE_MOMENT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")


def verify_log(engine: Engine, observe: Observe = lambda *_: None) -> Iterator[Evidence]:
    """The log against its bookkeeping, at one moment.

    Raises:
        TransientError: The server went away.
    """
    with transaction(engine) as db:
        db.execute(_AT_ONE_MOMENT)
        for done, (claim, statement) in enumerate(_CLAIMS):
            observe(claim, done, len(_CLAIMS))
            for subject, examined, wrong, first, last in db.execute(statement):
                intervals = [] if first is None else [OffsetRange(first, after(Offset(last)))]
                yield Evidence("log", subject, claim, examined, wrong, None, intervals)
        recorded = ownership.recorded(db)
        if not recorded:
            yield Evidence("log", "log", _CLAIMS[0][0], 0, words="it is empty", complete=False)
        for partition, known in recorded.items():
            yield _digests(db, partition, known, observe)


def _digests(db: Connection, partition: Partition, known: Claim, observe: Observe) -> Evidence:
    examined, wrong = 0, Intervals()
    rows = db.execution_options(yield_per=BYTES_ROWS).execute(
        _WITH_BYTES,
        {
            "topic": partition.topic,
            "number": partition.number,
            "first": known.first_offset,
            "end": known.next_offset,
        },
    )
    joins = False
    for offset, raw, digest in rows:
        examined += 1
        is_wrong = blake2b(raw, digest_size=16).digest() != digest
        if is_wrong:
            wrong.add(Offset(offset), joins=joins)
        joins = is_wrong
        if examined % BYTES_ROWS == 0:
            span = known.next_offset - known.first_offset
            observe(f"bytes of {partition}", offset - known.first_offset, span)
    return Evidence("log", str(partition), _DIGESTED, examined, wrong.count, None, wrong.ranges)


# ------------------------------------------------------------------------------------------ kafka

_FAITHFUL = "the log holds what Kafka holds, record by record"
_REMEDIES = {
    "missing": "in Kafka and not in the log: `pipeline rewind {topic}:{number} --to {first}`",
    "changed": "in both, and not the same: find out who changed the log, or the topic",
    "surplus": "in the log and not in Kafka: was the topic compacted, or made anew?",
}


def verify_kafka(
    engine: Engine, settings: Settings, observe: Observe = lambda *_: None
) -> Iterator[Evidence]:
    """The log against Kafka, for what Kafka still has.

    Raises:
        TransientError: A server went away.
    """
    with transaction(engine) as db:
        known = ownership.recorded(db)
        newest = {
            partition: ownership.last_record(db, partition, claim.next_offset)
            for partition, claim in known.items()
        }
    if not known:
        yield Evidence("kafka", "log", _FAITHFUL, 0, words="it is empty", complete=False)
        return
    brokers = Brokers(settings)
    try:
        cluster_id, there = brokers.cluster_id(), brokers.topics_there()
        topic_ids = brokers.topic_ids({partition.topic for partition in known} & set(there))
        for partition, claim in known.items():
            if partition.number >= there.get(partition.topic, 0):
                yield Evidence(
                    "kafka",
                    str(partition),
                    _FAITHFUL,
                    0,
                    words="Kafka has no such partition, or hides it from this login",
                    complete=False,
                )
                continue
            topic_id = topic_ids.get(partition.topic)
            source = Source(cluster_id, topic_id, *brokers.watermarks(partition))
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
    claim: Claim,
    source: Source,
    last: LastRecord | None,
    observe: Observe,
) -> Iterator[Evidence]:
    subject = str(partition)
    with brokers.probing():
        refusal = another_topic(brokers, partition, claim, source, last)
    if refusal is not None:
        words = str(refusal).removeprefix(f"{subject}: ")
        yield Evidence("kafka", subject, _FAITHFUL, 0, 1, words)
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
            told=lambda done: observe(subject, done, offsets.span),
        )
        found = staging.comparison
    is_compacted = "compact" in brokers.topic_settings(partition.topic).get("cleanup.policy", "")
    yield from _of_comparison(partition, found, is_compacted=is_compacted)
    if begin > claim.first_offset:
        words = f"offsets {claim.first_offset} to {begin - 1} are no longer in Kafka"
        yield Evidence("kafka", subject, _FAITHFUL, 0, words=words, complete=False)


def _of_comparison(
    partition: Partition, found: Comparison, *, is_compacted: bool
) -> Iterator[Evidence]:
    differing: Mapping[str, Intervals] = {
        "missing": found.missing,
        "changed": found.changed,
        "surplus": Intervals() if is_compacted else found.surplus,
    }
    subject = str(partition)
    words = None
    if is_compacted and found.surplus.count:
        words = f"{found.surplus.count:,} more are in the log alone: the topic is compacted"
    if not any(intervals.count for intervals in differing.values()):
        yield Evidence("kafka", subject, _FAITHFUL, found.read, 0, words)
    for kind, intervals in differing.items():
        if intervals.count:
            words = _REMEDIES[kind].format(
                topic=partition.topic, number=partition.number, first=intervals.ranges[0].first
            )
            yield Evidence(
                "kafka", subject, _FAITHFUL, found.read, intervals.count, words, intervals.ranges
            )


# ------------------------------------------------------------------------------------ read models

_REPLAYED = "its tables equal a replay of the log"
_UNCHANGED = "nobody has changed its tables"


def verify_read_models(
    engine: Engine,
    projectors: Sequence[Projector],
    *,
    guilty_max: int,
    observe: Observe = lambda *_: None,
) -> Iterator[Evidence]:
    """Each read model against the log, as far as its checkpoints are.

    Raises:
        TransientError: The server went away.
    """
    for projector in projectors:
        with transaction(engine) as db:
            changes = foreign_objects(db, projector.tables)
        words = "; ".join(f"{one.table} {one.what}: {one.fix}" for one in changes) or None
        examined = len(projector.tables)
        yield Evidence("read models", projector.name, _UNCHANGED, examined, len(changes), words)
    for projector in projectors:
        name = projector.name

        def told(progress: RebuildProgress, name: str = name) -> None:
            observe(name, progress.done, progress.total)

        try:
            found = check(engine, projector, guilty_max=guilty_max, observe=told)
        except TransientError:
            raise
        except PipelineError as error:
            yield Evidence("read models", name, _REPLAYED, 0, words=str(error), complete=False)
            continue
        words = None
        if found.differing:
            words = (
                f"{found.missing:,} rows are missing, {found.changed:,} are not the same, "
                f"{found.surplus:,} should not be there: `pipeline rebuild {name}`"
            )
        yield Evidence("read models", name, _REPLAYED, found.rows, found.differing, words)

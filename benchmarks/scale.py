"""Whether a row costs the same at tens of millions of rows as at the first million.

One topic grows. At each size two steps of real events are ingested and measured: one right after a
checkpoint, when the first change of each page of an index writes the whole page to the WAL, and one
later. In between the log is filled inside PostgreSQL, with rows like those of the first step
but ids of their own, at offsets that as many small records take up in Kafka.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import LiteralString

from confluent_kafka import Producer

from benchmarks.report import Lines, Section
from benchmarks.stage import PARTITIONS, Stage
from pipeline import catalogue
from pipeline.db import open_engine
from pipeline.health.status import read_status
from pipeline.settings import Settings
from tests.servers.databases import Database

SIZES = (1_000_000, 10_000_000, 20_000_000, 30_000_000)
STEP = 500_000
QUICK_SIZES = (120_000, 240_000)
QUICK_STEP = 30_000
WANTED = 1.2
LOOKS = 5
FILLER = b"-"
FILLER_DIGEST = blake2b(FILLER, digest_size=16).digest()
"""Of the filled rows: the records at the log's end must be equal in Kafka and in the log."""
FILLERS_IN_FLIGHT = 100_000
SPAN: int = Settings.model_fields["segment_offsets"].default

ENDS = """
SELECT "partition", next_offset FROM pipeline.consumer_offsets WHERE topic = %s
"""
MAKE_SEGMENTS = """
SELECT pipeline.make_segment(%(topic)s, least(at, %(end)s - 1), %(span)s)
FROM generate_series(%(first)s, %(end)s + %(span)s - 1, %(span)s) AS at
"""
FILL = """
INSERT INTO pipeline.events (topic, "partition", "offset", event_id, event_type, created_at,
    entity_id, payload, digest, key, headers, kafka_timestamp, kafka_timestamp_type)
SELECT topic, "partition", "offset" + %(further)s, gen_random_uuid(), event_type, created_at,
    gen_random_uuid(), payload, %(digest)s, key, headers, kafka_timestamp, kafka_timestamp_type
FROM pipeline.events
WHERE topic = %(topic)s AND "partition" = %(partition)s AND "offset" < %(model)s
ORDER BY "offset"
"""
MOVE = """
UPDATE pipeline.consumer_offsets SET next_offset = next_offset + %(rows)s
WHERE topic = %(topic)s AND "partition" = %(partition)s
"""
STEADY = """
WITH batches AS (
    SELECT ingested_at, count(*) AS rows FROM pipeline.events
    WHERE ingested_at >= to_timestamp(%s) GROUP BY 1
)
SELECT sum(rows) - (SELECT rows FROM batches ORDER BY ingested_at DESC LIMIT 1),
    extract(epoch FROM max(ingested_at) - min(ingested_at))
FROM batches
"""
DISK = "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('pipeline.events')"
SOME = """
SELECT event_id, entity_id FROM pipeline.events
WHERE entity_id IS NOT NULL AND starts_with(event_type, 'ORDER.') LIMIT 1
"""
QUERIES: Mapping[str, LiteralString] = {
    "`pipeline.lag`": "SELECT * FROM pipeline.lag",
    "events of an entity": "SELECT * FROM pipeline.events WHERE entity_id = %(entity)s",
    "event by id": "SELECT * FROM pipeline.events WHERE event_id = %(event)s",
    "an order in `order_status_history`": """
        SELECT * FROM upvest.order_status_history WHERE order_id = %(entity)s
    """,
    "last 100 of a partition": """
        SELECT * FROM pipeline.events WHERE topic = %(topic)s AND "partition" = 0
        ORDER BY "offset" DESC LIMIT 100
    """,
}


@dataclass(frozen=True)
class Step:
    """The cost of one ingest into a log of some size.

    Attributes:
        before: The number of rows before the step.
        is_after_checkpoint: Whether a checkpoint had just been made.
        rate: Events per second.
        server_us: CPU of PostgreSQL, microseconds per event; None if it cannot be measured.
        client_us: CPU of the whole command, microseconds per event.
        bytes_per_row: The log on disk, with its indexes.
        query_ms: Milliseconds of each of ``QUERIES``, and of the queries of `pipeline status`.
    """

    before: int
    is_after_checkpoint: bool
    rate: float
    server_us: float | None
    client_us: float
    bytes_per_row: float
    query_ms: Sequence[float]

    def line(self) -> str:
        """The step as a row of the table."""
        server = "" if self.server_us is None else f"{self.server_us:.1f} µs"
        looks = " | ".join(f"{ms:.1f} ms" for ms in self.query_ms)
        return (
            f"| {self.before:,}{', checkpoint' if self.is_after_checkpoint else ''} "
            f"| {self.rate:,.0f} | {server} | {self.client_us:.1f} µs "
            f"| {self.bytes_per_row:,.0f} | {looks} |"
        )


def measure(stage: Stage, *, quick: bool) -> Section:
    """Grow one log, and measure a step at each size."""
    sizes, step = (QUICK_SIZES, QUICK_STEP) if quick else (SIZES, STEP)
    topic = stage.load(step)
    with stage.database() as database:
        _ingested(stage, database, topic, step, before=0, after_checkpoint=True)
        model = _ends(database, topic)
        steps = []
        rows = step
        for size in sizes:
            for _ in range((size - rows) // step):
                _fill(stage, database, topic, model)
                rows += step
            for after_checkpoint in (True, False):
                stage.load(step, topic=topic)
                steps.append(
                    _ingested(
                        stage,
                        database,
                        topic,
                        step,
                        before=rows,
                        after_checkpoint=after_checkpoint,
                    )
                )
                rows += step
    after_checkpoints, others = steps[::2], steps[1::2]
    return Section(
        "Scale",
        f"One topic of {PARTITIONS} partitions. At each size twice {step:,} events more were "
        "ingested by `pipeline ingest --until-end`: right after a checkpoint, when the first "
        "change of each page of an index writes the whole page to the WAL, and once more. Rate by "
        f"PostgreSQL's clock, CPU with start and end. The queries: median of {LOOKS}, warm.",
        [
            "| rows before | events/s | CPU of PostgreSQL per row | of the client | bytes per row "
            f"| {' | '.join(QUERIES)} | `pipeline status` |",
            "|" + "---|" * (6 + len(QUERIES)),
            *(step.line() for step in steps),
            "",
            f"{others[-1].before:,} rows against {others[0].before:,} (wanted: {WANTED:g} at "
            f"most): {_compared(others[0], others[-1])}; right after a checkpoint: "
            f"{_compared(after_checkpoints[0], after_checkpoints[-1])}.",
        ],
        [
            Lines(
                "scale",
                "Time per row, by how many the log holds already",
                "million rows",
                "µs",
                {
                    "pipeline ingest": _by_size(others),
                    "pipeline ingest, right after a checkpoint": _by_size(after_checkpoints),
                },
            )
        ],
    )


def _by_size(steps: Sequence[Step]) -> Sequence[tuple[float, float]]:
    return [(step.before / 1e6, 1e6 / step.rate) for step in steps]


def _compared(first: Step, last: Step) -> str:
    return f"time per row **{first.rate / last.rate:.2f}**{_cpu_ratio(first, last)}"


def _cpu_ratio(first: Step, last: Step) -> str:
    if first.server_us is None or last.server_us is None:
        return ""
    return f", PostgreSQL's CPU per row **{last.server_us / first.server_us:.2f}**"


def _ingested(
    stage: Stage,
    database: Database,
    topic: str,
    step: int,
    *,
    before: int,
    after_checkpoint: bool,
) -> Step:
    if after_checkpoint:
        with database.connect() as connection:
            connection.execute("VACUUM (ANALYZE) pipeline.events")
        stage.settle()
    begun = time.time()
    cpu_before = stage.server_cpu_s()
    finished = stage.ingest(topic, database)
    server_us = stage.server_us(cpu_before, step)
    with database.connect() as connection:
        [(steady, seconds)] = connection.execute(STEADY, [begun]).fetchall()
        [(on_disk,)] = connection.execute(DISK).fetchall()
        [(rows,)] = connection.execute("SELECT count(*) FROM pipeline.events").fetchall()
    assert rows == before + step
    return Step(
        before=before,
        is_after_checkpoint=after_checkpoint,
        rate=float(steady) / float(seconds),
        server_us=server_us,
        client_us=finished.cpu_s / step * 1e6,
        bytes_per_row=float(on_disk) / rows,
        query_ms=_looked(database, topic),
    )


def _ends(database: Database, topic: str) -> dict[int, int]:
    with database.connect() as connection:
        return dict(connection.execute(ENDS, [topic]).fetchall())


def _fill(stage: Stage, database: Database, topic: str, model: Mapping[int, int]) -> None:
    """Add as many rows as the first step had, partition by partition."""
    producer = Producer({"bootstrap.servers": stage.kafka.bootstrap_servers, "linger.ms": 50})
    for partition, rows in model.items():
        further = _ends(database, topic)[partition]
        partition_key = {"topic": topic, "partition": partition}
        covered = {"topic": topic, "first": further, "end": further + rows, "span": SPAN}
        with database.connect() as connection, connection.transaction():
            connection.execute(MAKE_SEGMENTS, covered)
            connection.execute(
                FILL, {**partition_key, "further": further, "model": rows, "digest": FILLER_DIGEST}
            )
            connection.execute(MOVE, {**partition_key, "rows": rows})
        for _ in range(rows):
            producer.produce(topic, FILLER, partition=partition)
            if len(producer) > FILLERS_IN_FLIGHT:
                producer.poll(0.1)
    assert producer.flush(60) == 0


def _looked(database: Database, topic: str) -> list[float]:
    """Milliseconds of each query, and of the queries of `pipeline status`."""
    engine = open_engine(database.url, application="benchmark")
    with database.connect() as connection:
        [(event, entity)] = connection.execute(SOME).fetchall()
        given = {"topic": topic, "event": event, "entity": entity}
        taken = [
            _median_ms(partial(connection.execute, query, given)) for query in QUERIES.values()
        ]
        taken.append(_median_ms(partial(read_status, engine, catalogue.load())))
    engine.dispose()
    return taken


def _median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(LOOKS):
        begun = time.monotonic()
        work()
        times.append((time.monotonic() - begun) * 1000)
    return statistics.median(times)

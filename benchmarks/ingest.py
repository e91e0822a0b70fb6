"""``pipeline ingest`` against a bare COPY of the same rows, and against the simplest loop.

Ours is the real command with everything on: consumer group, claim, fence, repeats, envelope, proof
that jsonb holds the same value. The bare side has the rows encoded in memory, as PostgreSQL's own
COPY TO BINARY gave them, and sends them in the same batches, each committed: the limit. The loop is
the simplest code without the guarantees. All three fill the same table with the same indexes.
"""

import time
from functools import partial

import psycopg

from benchmarks.filling import fill, one_row
from benchmarks.report import Pairs, Section, bars, table
from benchmarks.rivals.naive import rival as loop
from benchmarks.stage import Finished, Stage
from pipeline.db import open_engine, transaction
from pipeline.log import segments
from pipeline.log.tables import events
from pipeline.partitions import NextOffset
from pipeline.settings import Settings
from tests.servers.databases import Database

SIZES = (400, 700, 4096)
"""Bytes of a value."""
LARGE = 1000
"""For values of this size or more, a third as many are enough."""
COLUMNS = ", ".join(f'"{column.name}"' for column in events.c if column.name != "ingested_at")
COPY_IN = f"COPY pipeline.events ({COLUMNS}) FROM STDIN (FORMAT binary)"
BATCHES = "SELECT ingested_at FROM pipeline.events GROUP BY 1 ORDER BY 1"
COPY_OUT = (
    f"COPY (SELECT {COLUMNS} FROM pipeline.events WHERE ingested_at = '{{}}' "
    "ORDER BY tableoid, ctid) TO STDOUT (FORMAT binary)"
)
CONTENT = (
    f"SELECT count(*), bit_xor(hashtextextended(CAST(ROW({COLUMNS}) AS text), 0)) "
    "FROM pipeline.events"
)


def measure(stage: Stage, rows: int, pairs: int) -> Section:
    """Fill the log in three ways, in turn, from topics of events of several sizes.

    Args:
        stage: The servers.
        rows: How many events a topic holds.
        pairs: How often each way is measured.
    """
    measured = []
    for size in SIZES:
        measured += _of_size(stage, size, rows_of(size, rows), pairs)
    return Section(
        "Ingest",
        f"{rows:,} simulated events per topic, {rows // 3:,} of those of {SIZES[-1]:,} bytes, in 6 "
        "partitions. Rate: rows per second from the beginning of the first batch to that of the "
        "last, by PostgreSQL's clock; then from the start of the command to its end. CPU is that "
        "of the whole command. Ours and the bare COPY leave the same rows.",
        table(measured),
        [bars("ingest", "Ingest, rows per second", measured)],
    )


def rows_of(size: int, rows: int) -> int:
    """The number of events of a size in a topic, if a topic of small events has ``rows``."""
    return rows if size < LARGE else rows // 3


def _of_size(stage: Stage, size: int, rows: int, pairs: int) -> list[Pairs]:
    topic = stage.load(rows, size=size)
    stage.warm_up(topic)
    ours = f"pipeline ingest, {size:,} bytes"
    limit = Pairs(f"{ours} / bare COPY BINARY", target=0.8)
    simplest = Pairs(f"{ours} / {loop.name}", target=loop.wanted, ours=limit.ours)
    batches: list[bytes] = []
    for _ in range(pairs):
        with stage.database() as database:
            limit.ours.append(fill(stage, database, rows, partial(stage.ingest, topic, database)))
            batches = batches or _dumped(database)
            wanted = one_row(database, CONTENT)
        with stage.database() as database:
            _make_segment(database, topic)
            limit.theirs.append(fill(stage, database, rows, partial(_copy, database, batches)))
            assert one_row(database, CONTENT) == wanted
        simplest.theirs.append(loop.run(stage, topic, rows))
    return [limit, simplest]


def _dumped(database: Database) -> list[bytes]:
    """The batches of an ingest, as they went in, each ready for COPY."""
    with database.connect() as connection:
        moments = [str(moment) for (moment,) in connection.execute(BATCHES)]
        dumped = []
        for moment in moments:
            with connection.cursor().copy(COPY_OUT.format(moment)) as copy:
                dumped.append(b"".join(map(bytes, copy)))
    return dumped


def _copy(database: Database, batches: list[bytes]) -> Finished:
    """Send the batches, each in a transaction."""
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        begun, cpu_begun = time.monotonic(), time.process_time()
        for batch in batches:
            with connection.transaction(), connection.cursor().copy(COPY_IN) as copy:
                copy.write(batch)
        return Finished(time.monotonic() - begun, time.process_time() - cpu_begun)


def _make_segment(database: Database, topic: str) -> None:
    engine = open_engine(database.url, application="benchmark")
    span: int = Settings.model_fields["segment_offsets"].default
    with transaction(engine) as db:
        segments.make_segment(db, topic, NextOffset(0), span)
    engine.dispose()
